"""The locks of a store: who reads and writes, who deletes, and whose turn it is to add.

    lock    shared by whoever reads or writes; exclusive to whoever deletes
    gate    passed by whoever wants `lock`; closed by whoever wants it alone, so that those who come
            later wait behind, and a busy store can still be cleaned up (a turnstile)
    turn    exclusive to whoever adds to the store: room is made for one state at a time

All three are `flock`s: the system lets go of them when a process ends, however it ends. Where a
file system has no locks, or nobody may make files, there are none, and the order of writing and
deleting alone protects what is read. Locks are taken in the order turn, gate, lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
from typing import TYPE_CHECKING

from mlx_promptcache import privacy
from mlx_promptcache.errors import CacheLocked, StoreError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LOCK, GATE, TURN = "lock", "gate", "turn"
LOCK_FILES = (LOCK, GATE, TURN)
LOCK_SECONDS = 30.0
POLL_SECONDS = 0.01

_held = threading.local()  # the directories of the locks that this thread holds


class Locks:
    """The locks of the store in one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def create(self) -> None:
        """Make the files, if they are not there. Raises OSError."""
        for name in LOCK_FILES:
            os.close(privacy.open_file(self.directory / name, os.O_RDONLY | os.O_CREAT))

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Hold the lock that readers and writers share: nothing is deleted meanwhile.

        Raises:
            CacheLocked: somebody deletes, and does not come to an end.
        """
        if str(self.directory) in vars(_held):  # behind somebody who waits for us we wait forever
            yield
            return
        deadline = _deadline()
        with contextlib.ExitStack() as stack:
            with self._flock(GATE, fcntl.LOCK_SH, deadline):
                stack.enter_context(self._flock(LOCK, fcntl.LOCK_SH, deadline))
            with self._noted():
                yield

    @contextlib.contextmanager
    def exclusive(self, seconds: float | None = None) -> Iterator[None]:
        """Hold the lock alone, to delete; wait at most so many seconds for it (30).

        Raises:
            CacheLocked: others read or write, and do not come to an end.
        """
        deadline = _deadline(seconds)
        with (
            self._flock(GATE, fcntl.LOCK_EX, deadline),
            self._flock(LOCK, fcntl.LOCK_EX, deadline),
            self._noted(),
        ):
            yield

    @contextlib.contextmanager
    def adding(self) -> Iterator[None]:
        """Hold the turn to add to the store: nobody else adds meanwhile.

        Raises:
            CacheLocked: somebody else adds, and does not come to an end.
        """
        with self._flock(TURN, fcntl.LOCK_EX, _deadline()):
            yield

    @contextlib.contextmanager
    def _noted(self) -> Iterator[None]:
        vars(_held)[str(self.directory)] = True
        try:
            yield
        finally:
            vars(_held).pop(str(self.directory), None)

    @contextlib.contextmanager
    def _flock(self, name: str, how: int, deadline: float) -> Iterator[None]:
        fd = self._open(name, make=how == fcntl.LOCK_EX)
        if fd is None:
            yield
            return
        process = os.getpid()
        try:
            _wait(fd, how, self.directory, deadline)
            yield
        finally:
            _let_go(fd, process)

    def _open(self, name: str, *, make: bool) -> int | None:
        """Open a lock; None where there is nothing to lock, or nobody can delete anything."""
        make = make and os.path.isdir(self.directory)  # noqa: PTH112 - a Path's may raise
        flags = os.O_RDONLY | (os.O_CREAT if make else 0)
        try:
            return privacy.open_file(self.directory / name, flags)
        except OSError as exc:
            if make:
                raise StoreError(
                    f"the store {self.directory} cannot be locked: {exc.strerror}; choose another "
                    "--cache-dir"
                ) from exc
            return None


def _deadline(seconds: float | None = None) -> float:
    """Until when somebody waits, for however many locks."""
    return time.monotonic() + (LOCK_SECONDS if seconds is None else seconds)


def _let_go(fd: int, process: int) -> None:
    """Let go of a lock, and close its file. A process that another thread forked meanwhile has a
    copy of the file, and would keep the lock as long as it lives.
    """
    if os.getpid() == process:  # a copy must not let go of the lock of whoever made it
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)


def _wait(fd: int, how: int, directory: Path, deadline: float) -> None:
    while True:
        try:
            fcntl.flock(fd, how | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise CacheLocked(
                    f"the store {directory} is in use by another process; try again"
                ) from None
            time.sleep(POLL_SECONDS)
        except OSError:
            return  # a file system without locks, as some of the network's
        else:
            return
