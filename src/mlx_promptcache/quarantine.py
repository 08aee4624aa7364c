"""Files that cannot be used: remembered in this process, and moved aside if they are damaged."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from mlx_promptcache.errors import CacheMiss, DamagedFile, PromptCacheError

if TYPE_CHECKING:
    from mlx_promptcache.store import Store

log = logging.getLogger("mlx_promptcache")


class BadFile(CacheMiss):
    """A file that was needed cannot be used, and was set aside: look again without it."""


class Quarantine:
    """The files of one store that this process will not read again."""

    def __init__(self, store: Store, *, read_only: bool) -> None:
        self._store, self.read_only = store, read_only
        self._stems: set[str] = set()
        self.told: list[str] = []
        """Why each file that was set aside cannot be used, in a sentence."""

    def __contains__(self, stem: str) -> bool:
        return stem in self._stems

    def ignore(self, stem: str) -> None:
        """Do not read this file again in this process; it stays where it is."""
        self._stems.add(stem)

    def trust(self, stem: str) -> None:
        """Read this file again: it has just been written."""
        self._stems.discard(stem)

    def set_aside(self, kind: str, stem: str, why: PromptCacheError) -> BadFile:
        """Give notice of a file that cannot be used; move it aside if it is damaged.

        What was moved aside leaves its name to the next sound file. What only cannot be read (a
        drive's error, a missing permission) stays: it may be sound. What others have deleted since
        it was found needs no notice.
        """
        damaged = isinstance(why, DamagedFile) and not self.read_only
        moved = damaged and self._store.quarantine(kind, stem)
        if not moved:
            self._stems.add(stem)
        what = kind.removesuffix("s")
        done = "was moved aside" if moved else "is passed over"
        level = logging.INFO if type(why) is CacheMiss else logging.WARNING
        log.log(level, "a stored %s cannot be used and %s: %s", what, done, why)
        self.told.append(f"a stored {what} cannot be used: {why}")
        return BadFile(self.told[-1])
