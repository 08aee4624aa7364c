"""Counts what a process asks of the file system, and kills the process in the middle of it."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

CHANGES = {
    "os.mkdir", "os.rmdir", "os.link", "os.rename", "os.remove", "os.utime", "os.chmod",
}  # fmt: skip
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Calls:
    """The calls of this process that change anything below a directory, or take a lock.

    There is no way back: make it in a process that is there to be killed.
    """

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.count = 0
        self._last = 0
        self._write = os.write
        sys.addaudithook(self._heard)
        os.write = self._written

    def begin(self, last: int = 0) -> None:
        """Count anew; the process does not live to see the call of number `last` done."""
        self.count, self._last = 0, last

    def _heard(self, event: str, args: tuple[Any, ...]) -> None:
        if (
            event == "fcntl.flock"
            or (event in CHANGES and self._is_below(args[0]))
            or (event == "open" and self._is_below(args[0]) and (args[2] or 0) & WRITES)
        ):
            self._called()

    def _is_below(self, path: Any) -> bool:
        return isinstance(path, (str, os.PathLike)) and str(path).startswith(self.directory)

    def _written(self, fd: int, data: Any, /) -> int:
        if self.count + 1 == self._last:  # torn
            self._write(fd, bytes(data[: len(data) // 2]))
        self._called()
        return self._write(fd, data)

    def _called(self) -> None:
        self.count += 1
        if self.count == self._last:
            os.kill(os.getpid(), signal.SIGKILL)
