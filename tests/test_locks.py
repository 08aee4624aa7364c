"""The locks of a store: readers share, whoever deletes waits for them and gets its turn."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mlx_promptcache import locks
from mlx_promptcache.errors import CacheLocked
from mlx_promptcache.locks import LOCK_FILES, Locks

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
