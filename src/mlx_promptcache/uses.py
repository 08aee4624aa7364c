"""The statistics of a store: `uses.jsonl`, a line of JSON for each hit and each write.

Nothing depends on them: what cannot be read or written is passed over.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from typing import TYPE_CHECKING, Any

from mlx_promptcache import privacy
from mlx_promptcache.errors import PromptCacheError, StoreError
from mlx_promptcache.files import Reader, write_once

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from mlx_promptcache.directory import StoreDirectory

USES = "uses.jsonl"
APPENDING = os.O_WRONLY | os.O_APPEND | os.O_CREAT
LARGEST_USES_BYTES = 1 << 26  # the last ones: more are not read
LATEST_USES_BYTES = 1 << 12  # in which the last one is looked for
MOST_STATISTICS_BYTES = 4 << 20


class Uses:
    """The statistics in the directory of a store."""

    def __init__(self, at: StoreDirectory) -> None:
        self._at = at

    def note(self, use: dict[str, Any]) -> None:
        """Append a line. Failing is no matter.

        Where nothing is added nobody makes room: so they are kept short here, too.
        """
        line = json.dumps(use, separators=(",", ":")) + "\n"
        with contextlib.suppress(OSError, StoreError):
            fd = privacy.open_file(f"{self._at.inside()}/{USES}", APPENDING)
            try:
                os.write(fd, line.encode())
                size = os.fstat(fd).st_size
            finally:
                os.close(fd)
            if size > MOST_STATISTICS_BYTES:
                self.shorten()

    def note_write(self, count: int) -> None:
        """Note that so many bytes were written now. Failing is no matter."""
        if count:
            self.note({"when": round(time.time(), 3), "wrote": count})

    def shorten(self) -> None:
        """Forget the older half of long statistics. Failing is no matter, nor is it if what others
        append at this moment is forgotten, too.
        """
        path = self._at.directory / USES
        with contextlib.suppress(OSError, PromptCacheError):
            if path.lstat().st_size > MOST_STATISTICS_BYTES:
                lines = self._text(LARGEST_USES_BYTES).splitlines(keepends=True)
                write_once(path, lines[len(lines) // 2 :], sync=False, replace=True)

    def all(self) -> Iterator[dict[str, Any]]:
        """All of them, oldest first; lines that cannot be read are passed over."""
        try:
            lines = self._text(LARGEST_USES_BYTES).splitlines()
        except PromptCacheError:
            return
        yield from _read(lines)

    def last_rows(self) -> int | None:
        """How many rows the state had that was used last; None if that is not known."""
        try:
            lines = self._text(LATEST_USES_BYTES).splitlines()
        except PromptCacheError:
            return None
        for use in _read(reversed(lines)):
            if type(rows := use.get("rows")) is int:
                return max(0, rows)
        return None

    def written_by_day(self) -> dict[str, int]:
        """How many bytes were written on each day (UTC) that they know of."""
        days: dict[str, int] = {}
        for use in self.all():
            when, wrote = use.get("when"), use.get("wrote")
            if isinstance(when, (int, float)) and type(wrote) is int:
                with contextlib.suppress(ValueError, OverflowError, OSError):
                    day = time.strftime("%Y-%m-%d", time.gmtime(when))
                    days[day] = days.get(day, 0) + wrote
        return days

    def _text(self, most_bytes: int) -> bytes:
        """The file as it stands; of a longer one the end. Raises as `Reader` does."""
        with contextlib.closing(Reader(self._at.directory / USES, self._at.allow())) as reader:
            return reader.read(max(0, reader.size - most_bytes), most_bytes)


def _read(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """Those of these lines that can be read."""
    for line in lines:
        try:
            use = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(use, dict):
            yield use
