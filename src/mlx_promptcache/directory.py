"""The directory of a store: who may use it, what is in it, and what is said where that fails."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_promptcache import places, privacy
from mlx_promptcache.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

ELSEWHERE = "choose a --cache-dir that you may use"
ROOM = "make room there, or choose a --cache-dir on another drive"
TO_DO = {
    errno.EACCES: ELSEWHERE, errno.EPERM: ELSEWHERE, errno.EROFS: ELSEWHERE, errno.ENOSPC: ROOM,
    errno.EDQUOT: ROOM, errno.EFBIG: ROOM, errno.ENOTDIR: ELSEWHERE,
}  # fmt: skip


class StoreDirectory:
    """A directory that belongs to one user, and the directories in it.

    One of another user is not used unless `allow_foreign` is set. Nothing in it is changed where it
    is `read_only`. Making the object touches nothing.
    """

    def __init__(
        self, directory: str | os.PathLike[str], *, allow_foreign: bool, read_only: bool
    ) -> None:
        self.directory = Path(directory)
        self.allow_foreign, self.read_only = allow_foreign, read_only

    def allow(self) -> frozenset[int]:
        """The users whose files count here.

        Raises:
            ForeignStore: the directory belongs to another user, and that is not allowed.
        """
        return privacy.users(self.directory, allow_foreign=self.allow_foreign)

    def check_writable(self) -> None:
        """Whether anything may be written here, or deleted.

        Raises:
            StoreError: writing is switched off.
        """
        if not self.read_only:
            return
        what = f"unset {places.READ_ONLY}" if places.writing_is_off() else "open it for writing"
        raise StoreError(f"the store {self.directory} is read-only: {what} to change it")

    def inside(self, *parts: str) -> str:
        """The path of a directory in this one, which may not be there.

        Raises:
            ForeignStore: this one belongs to another user, and that is not allowed.
            StoreError: that one, or one above it, is a link or belongs to a third user.
        """
        trusted, path = self.allow(), str(self.directory)
        for part in parts:
            path = f"{path}/{part}"
            privacy.check_directory(path, trusted)
        return path

    def names_in(self, *parts: str) -> list[str]:
        """The names in a directory; none if it is not there, does not count or cannot be read."""
        try:
            return os.listdir(self.inside(*parts))  # noqa: PTH208 - only the names are wanted
        except (OSError, StoreError):
            return []

    def few_names_in(self, part: str, at_most: int) -> list[str] | None:
        """The names in a directory of directories, if they are at most so many; None if they are
        more, or it is not there, does not count or cannot be read.

        Most file systems say how many directories there are in one. Where they do not it is None.
        """
        with contextlib.suppress(OSError, StoreError):
            path = self.inside(part)
            if os.lstat(path).st_nlink - 2 in range(at_most + 1):
                return os.listdir(path)  # noqa: PTH208 - only the names are wanted
        return None

    def names_in_each(self, part: str, directories: Iterable[str]) -> dict[str, list[str]]:
        """The names in each of many directories in one, by what these are called; none of one
        that is not there, does not count or cannot be read.
        """
        found: dict[str, list[str]] = {}
        wanted = set(directories)
        # To ask for some that are not there takes as long as to list twice as many that are.
        if len(wanted) > 1 and (there := self.few_names_in(part, 2 * len(wanted))) is not None:
            wanted.intersection_update(there)
        with contextlib.suppress(StoreError):
            trusted, above = self.allow(), self.inside(part)
            for name in wanted:
                path = f"{above}/{name}"
                if privacy.is_there(path, trusted):
                    with contextlib.suppress(OSError):
                        found[name] = os.listdir(path)  # noqa: PTH208 - only the names are wanted
        return found

    def entries_in(self, *parts: str) -> list[os.DirEntry[str]]:
        """What is in a directory; nothing if it is not there, does not count or cannot be read."""
        try:
            return self.all_entries_in(*parts)
        except OSError:
            return []

    def all_names_in(self, *parts: str) -> list[str]:
        """The names in a directory; none if it is not there, or does not count. Raises OSError."""
        directory = self._seen(*parts)
        return [] if directory is None else _names(directory)

    def all_entries_in(self, *parts: str) -> list[os.DirEntry[str]]:
        """What is in a directory; nothing if it is not there, or does not count. Raises OSError."""
        directory = self._seen(*parts)
        return [] if directory is None else entries(directory)

    def _seen(self, *parts: str) -> str | None:
        """The path of a directory; None if it does not count, as a link."""
        try:
            return self.inside(*parts)
        except StoreError:
            return None

    def cannot_be_read(self) -> contextlib.AbstractContextManager[None]:
        """Around what reads: an OSError is a StoreError that says so."""
        return told(f"the store {self.directory} cannot be read")

    def cannot_be_written(self) -> contextlib.AbstractContextManager[None]:
        """Around what writes: an OSError is a StoreError that says so."""
        return told(f"cannot write to the store {self.directory}")

    def cannot_delete(self) -> contextlib.AbstractContextManager[None]:
        """Around what deletes: an OSError is a StoreError that says so."""
        return told(f"cannot delete from the store {self.directory}")


def _names(directory: str) -> list[str]:
    """The names in a directory, none if there is no such directory. Raises OSError."""
    try:
        return os.listdir(directory)  # noqa: PTH208 - only the names are wanted
    except (FileNotFoundError, NotADirectoryError):
        return []


def entries(directory: str) -> list[os.DirEntry[str]]:
    """What is in a directory, nothing if there is no such directory. Raises OSError."""
    try:
        with os.scandir(directory) as found:
            return list(found)
    except (FileNotFoundError, NotADirectoryError):
        return []


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    """An OSError is a StoreError that says what went wrong, and what to do where that is known."""
    try:
        yield
    except OSError as exc:
        todo = TO_DO.get(exc.errno or 0)
        why = f"{exc.strerror}; {todo}" if todo else exc.strerror
        raise StoreError(f"{what}: {why}") from exc
