"""Processes that are cheap to start, so that a thousand of them can be killed.

One process imports everything and computes nothing; the others are its forks. Where a fork of a
process that has loaded MLX cannot be relied upon, each is started afresh.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import processes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Note = dict[str, Any]
    Say = Callable[..., None]

STARTED_SECONDS = 120  # everything is imported meanwhile
MOST_TOLD = 3000  # bytes of a traceback: a line is written whole only if it is short
FORKS = sys.platform != "darwin"
HERE = Path(__file__)


class Nursery:
    """Starts processes that run `work(job, say)` of a module, and hears what they say."""

    def __init__(self, module: str, *, forks: bool = FORKS) -> None:
        hears, says = os.pipe()
        self._notes, self._rest = hears, b""
        self._early: list[Note] = []  # said before it was told who was started
        path = os.pathsep.join([str(HERE.parent), *sys.path])
        self._mother = subprocess.Popen(
            [sys.executable, str(HERE), "mother", module, str(says), str(int(forks))],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env=processes.environment(PYTHONPATH=path),
            pass_fds=(says,),
            text=True,
        )
        os.close(says)

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._mother.stdin is not None
        self._mother.stdin.close()
        self._mother.wait(60)
        os.close(self._notes)

    def start(self, **job: Any) -> int:
        """Start a process, and return its id. It stays its own until its end was heard of."""
        self._ask(job)
        for note in self._heard(STARTED_SECONDS):
            if "started" in note:
                return int(note["pid"])
            self._early.append(note)
        raise AssertionError("no process could be started")

    def kill(self, pid: int) -> None:
        """Kill a process that was started here and has not been waited for."""
        os.kill(pid, signal.SIGKILL)

    def wait(self, pid: int, seconds: float = 60) -> list[Note]:
        """Wait until a process has ended; return what it said last, `{"ended": status}` at the end.

        Raises:
            TimeoutError: it does not end.
        """
        self._ask({"wait": pid})
        heard = []
        for note in self.notes(seconds):
            heard.append(note)
            if note["pid"] == pid and "ended" in note:
                return heard
        raise AssertionError("who starts the processes has ended")

    def notes(self, seconds: float) -> Iterator[Note]:
        """What is said from now on.

        Raises:
            TimeoutError: nothing was said for so long.
        """
        while self._early:
            yield self._early.pop(0)
        yield from self._heard(seconds)

    def _heard(self, seconds: float) -> Iterator[Note]:
        while True:
            while b"\n" not in self._rest:
                if not select.select([self._notes], [], [], seconds)[0]:
                    raise TimeoutError(f"nothing was heard for {seconds} seconds")
                heard = os.read(self._notes, 1 << 16)
                if not heard:
                    return
                self._rest += heard
            line, _, self._rest = self._rest.partition(b"\n")
            yield json.loads(line)

    def _ask(self, what: Note) -> None:
        assert self._mother.stdin is not None
        self._mother.stdin.write(json.dumps(what) + "\n")
        self._mother.stdin.flush()


def mother(module: str, notes: int, *, forks: bool) -> None:
    """Start what is asked for on standard input, until its end."""
    work = importlib.import_module(module).work
    for line in sys.stdin:
        asked = json.loads(line)
        if "wait" in asked:
            pid, status = os.waitpid(asked["wait"], 0)
            say(notes, pid, ended=status)
            continue
        pid = os.fork() if forks else fresh(module, notes, line)
        if pid == 0:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            child(work, asked, notes)
        say(notes, pid, started=True)


def fresh(module: str, notes: int, job: str) -> int:
    """Start a process that imports everything itself."""
    command = [sys.executable, str(HERE), "child", module, str(notes), job]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=(notes,)).pid


def child(work: Callable[[Note, Say], None], job: Note, notes: int) -> None:
    """Do one job, and end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    write = os.write  # as it is now: a job may count calls

    def told(**note: Any) -> None:
        say(notes, os.getpid(), write, **note)

    try:
        work(job, told)
    except BaseException:  # noqa: BLE001 - told to the parent, whatever it is
        told(wrong=traceback.format_exc()[-MOST_TOLD:])
    finally:
        os._exit(0)


def say(
    notes: int, pid: int, write: Callable[[int, bytes], int] = os.write, /, **note: Any
) -> None:
    """Write a line, whole or not at all; with the time, for all processes have one clock."""
    write(notes, json.dumps({"pid": pid, "at": time.monotonic(), **note}).encode() + b"\n")


def work(job: Note, say: Say) -> None:
    """A job without a store: to stay until the end, to fail, or nothing at all."""
    if job["what"] == "stay":
        say(ready=True)
        signal.pause()
    elif job["what"] == "fail":
        raise ValueError(job["what"])
    say(done=True)


if __name__ == "__main__":
    role, name, fd, more = sys.argv[1:]
    if role == "mother":
        mother(name, int(fd), forks=bool(int(more)))
    else:
        child(importlib.import_module(name).work, json.loads(more), int(fd))
