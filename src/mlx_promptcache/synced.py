"""Synced: which files of a store a process has brought to the drive."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mlx_promptcache.store import Store


class Synced:
    """The files of a store that this process has brought to the drive.

    Whoever saves a state that grows, again and again, need not read and sync all of it each time.
    A file that was replaced or written to since has another inode, size or mtime.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._seen: dict[tuple[str, str], tuple[int, ...] | None] = {}

    def __contains__(self, one: tuple[str, str]) -> bool:
        return one in self._seen and self._seen[one] == self._look(one) is not None

    def sync(self, files: Iterable[tuple[str, str]]) -> None:
        """Bring to the drive what has not been brought there yet. Raises as `Store.sync`."""
        missing = [one for one in files if one not in self]
        self._store.sync(missing)
        self._seen.update((one, self._look(one)) for one in missing)

    def _look(self, one: tuple[str, str]) -> tuple[int, ...] | None:
        file = self._store.file(*one)
        return file and (file.inode, file.size, file.mtime_ns)  # a ctime changes with each use
