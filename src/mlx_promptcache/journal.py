"""A journal: rows that are appended to a file, and read until they are written down elsewhere.

It lies in the cache directory of a user, and may be lost or damaged at any time: a row that is not
as it was written is passed over.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from typing import TYPE_CHECKING, Any

from mlx_promptcache.version import __version__

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FORMAT = 1
MOST_BYTES = 1 << 24  # more is not appended: whoever reads it begins a new one
FORGOTTEN_SECONDS = 30 * 86400.0  # nobody reads a journal of what is not there any more
DIGITS = 16  # of the checksum that begins a line


class Journal:
    """The journal at one path. Making the object touches no file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read_bytes = 0

    def append(self, row: Any) -> None:
        """Add a row, which must be JSON, in one write. Failing is no matter.

        Whoever begins a journal deletes those beside it, with the same suffix, to which nothing was
        added for a month.
        """
        line = _line(json.dumps(row))
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(0o700, parents=True, exist_ok=True)
            fd = os.open(self._path, flags, 0o600)
            try:
                size = os.fstat(fd).st_size
                if size < MOST_BYTES:
                    os.write(fd, line)
            finally:
                os.close(fd)
            if not size:
                self._forget_old()

    def _forget_old(self) -> None:
        before = time.time() - FORGOTTEN_SECONDS
        for other in self._path.parent.glob(f"*{self._path.suffix}"):
            if other.lstat().st_mtime < before:
                other.unlink()

    def rows(self) -> Iterator[Any]:
        """The rows that are whole, in the order in which they were added."""
        try:
            data = self._path.read_bytes()
        except OSError:
            return
        self._read_bytes = len(data)
        for line in data.splitlines(keepends=True):
            text = line[DIGITS + 1 : -1].decode("ascii", "replace")
            if line == _line(text):
                yield json.loads(text)

    def clear(self) -> None:
        """Delete what `rows` has read, unless more was added since. Failing is no matter."""
        with contextlib.suppress(OSError):
            if self._path.stat().st_size == self._read_bytes:
                self._path.unlink()

    def forget(self) -> None:
        """Delete it. Failing is no matter."""
        with contextlib.suppress(OSError):
            self._path.unlink()


def _line(text: str) -> bytes:
    checksum = hashlib.sha256(f"{__version__} {FORMAT} {text}".encode()).hexdigest()[:DIGITS]
    return f"{checksum} {text}\n".encode()
