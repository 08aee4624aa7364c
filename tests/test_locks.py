"""The locks of a store: readers share, whoever deletes waits for them and gets its turn."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mlx_promptcache import locks
from mlx_promptcache.errors import CacheLocked
from mlx_promptcache.locks import GATE, LOCK, LOCK_FILES, Locks

READER = """
import sys, time
from pathlib import Path
from mlx_promptcache.locks import Locks
here = Locks(Path(sys.argv[1]))
until = time.monotonic() + float(sys.argv[2])
print("ready", flush=True)
while time.monotonic() < until:
    with here.shared():
        time.sleep(0.05)
"""
TAKER = """
import sys
from pathlib import Path
from mlx_promptcache import locks
locks.LOCK_SECONDS = 0.05
getattr(locks.Locks(Path(sys.argv[1])), sys.argv[2])().__enter__()
"""

FORKER = """
import os, sys, threading, time
from pathlib import Path
from mlx_promptcache.locks import Locks
held, forked = threading.Event(), threading.Event()
def hold():
    with getattr(Locks(Path(sys.argv[1])), sys.argv[2])():
        held.set()
        forked.wait()
thread = threading.Thread(target=hold)
thread.start()
held.wait()
child = os.fork()
if child == 0:
    time.sleep(60)
    os._exit(0)
print(child, flush=True)
forked.set()
thread.join()
"""
UNWINDER = """
import os, sys
from pathlib import Path
from mlx_promptcache import locks
here = locks.Locks(Path(sys.argv[1]))
with here.adding():
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        locks.LOCK_SECONDS = 0.05
        try:
            with here.adding():
                print("free")
        except locks.CacheLocked:
            print("held")
if not child:
    os._exit(0)
"""


@pytest.fixture
def here(tmp_path: Path) -> Locks:
    made = Locks(tmp_path)
    made.create()
    return made


def test_whoever_deletes_gets_its_turn_among_readers_that_never_pause(here: Locks) -> None:
    readers = [
        subprocess.Popen(
            [sys.executable, "-c", READER, str(here.directory), "20"], stdout=subprocess.PIPE
        )
        for _ in range(4)
    ]
    try:
        for reader in readers:
            assert reader.stdout is not None
            assert reader.stdout.readline() == b"ready\n"
        for _ in range(3):
            with here.exclusive(5.0):
                pass
        assert all(reader.poll() is None for reader in readers)
    finally:
        for reader in readers:
            reader.kill()
            reader.wait()
            assert reader.stdout is not None
            reader.stdout.close()


def test_a_thread_that_reads_may_read_within_while_somebody_waits_to_delete(here: Locks) -> None:
    deleted: list[float] = []

    def delete() -> None:
        with here.exclusive(10.0):
            deleted.append(time.monotonic())

    with here.shared():
        thread = threading.Thread(target=delete)
        thread.start()
        time.sleep(0.1)  # it has closed the gate by now
        began = time.monotonic()
        with here.shared():
            within = time.monotonic()
        assert within - began < 5
        assert not deleted
    thread.join()
    assert deleted


def test_nobody_reads_while_somebody_deletes_and_nobody_deletes_while_somebody_reads(
    here: Locks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "LOCK_SECONDS", 0.05)

    def in_another_process(how: str) -> bool:
        done = subprocess.run(
            [sys.executable, "-c", TAKER, str(here.directory), how],
            capture_output=True,
            check=False,
        )
        return done.returncode == 0

    with here.shared():
        assert in_another_process("shared")
        assert not in_another_process("exclusive")
        assert in_another_process("adding")
    with here.exclusive():
        assert not in_another_process("shared")
        assert in_another_process("adding")
    with here.adding():
        assert in_another_process("shared")
        assert in_another_process("exclusive")
        assert not in_another_process("adding")


def test_the_lock_is_free_again_after_whatever_happened(here: Locks) -> None:
    with pytest.raises(RuntimeError), here.exclusive():
        raise RuntimeError
    with pytest.raises(RuntimeError), here.shared():
        raise RuntimeError
    with here.exclusive(0.0):
        pass


def test_files_of_locks_are_private_and_made_again_where_they_are_missing(here: Locks) -> None:
    for name in LOCK_FILES:
        assert (here.directory / name).stat().st_mode & 0o777 == 0o600
        (here.directory / name).unlink()
    with here.shared():
        pass
    assert not any((here.directory / name).exists() for name in LOCK_FILES)
    with here.adding(), here.exclusive():
        pass
    assert all((here.directory / name).exists() for name in LOCK_FILES)


@pytest.mark.parametrize("how", ["shared", "exclusive", "adding"])
def test_a_process_that_was_forked_while_a_thread_held_a_lock_does_not_keep_it(
    how: str, here: Locks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "LOCK_SECONDS", 1.0)
    arguments = [sys.executable, "-c", FORKER, str(here.directory), how]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as forker:
        assert forker.stdout is not None
        child = int(forker.stdout.readline())
        try:
            assert forker.wait() == 0
            with here.exclusive(), here.adding():
                os.kill(child, 0)  # it is alive
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_forked_process_does_not_let_go_of_a_lock_that_it_did_not_take(here: Locks) -> None:
    arguments = [sys.executable, "-c", UNWINDER, str(here.directory)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert done.stdout == "held\n"


def test_whoever_waits_for_two_locks_waits_no_longer_than_for_one(here: Locks) -> None:
    with (here.directory / GATE).open() as gate, (here.directory / LOCK).open() as lock:
        fcntl.flock(gate, fcntl.LOCK_SH)
        fcntl.flock(lock, fcntl.LOCK_SH)
        opened = threading.Timer(0.6, fcntl.flock, (gate, fcntl.LOCK_UN))
        opened.start()
        began = time.monotonic()
        with pytest.raises(CacheLocked), here.exclusive(1.0):
            pass
        assert time.monotonic() - began < 1.5
        opened.join()


def test_who_waits_too_long_is_told(here: Locks) -> None:
    failed: list[str] = []

    def delete() -> None:
        try:
            with here.exclusive(0.05):
                pass
        except CacheLocked as exc:
            failed.append(str(exc))

    with here.shared():
        thread = threading.Thread(target=delete)
        thread.start()
        thread.join()
    assert "in use by another process; try again" in failed[0]
