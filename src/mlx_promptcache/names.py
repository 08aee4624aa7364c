"""The names of a store's states: `names/<name>` is one line, the stem of a snapshot."""

from __future__ import annotations

import contextlib
import os
import time
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_promptcache.errors import CacheMiss, DamagedFile, StoreError
from mlx_promptcache.files import SETTLED_NS, STEM, Reader, write_once

if TYPE_CHECKING:
    from collections.abc import Collection

    from mlx_promptcache.directory import StoreDirectory

NAMES = "names"
LONGEST_NAME_BYTES = 200


class Names:
    """The names in the directory of a store, and what they stand for."""

    def __init__(self, at: StoreDirectory) -> None:
        self._at = at
        self._by_stem: tuple[tuple[int, ...] | None, dict[str, str]] = (None, {})

    def labels(self) -> list[str]:
        """Every name, in order, whatever it stands for: for that its file would have to be read.

        Raises:
            ForeignStore: the store belongs to another user, and that is not allowed.
            StoreError: the directory cannot be read.
        """
        self._at.allow()
        with self._at.cannot_be_read():
            return [name for name in sorted(self._at.all_names_in(NAMES)) if _is_name(name)]

    def all(self, *, certain: bool = False) -> dict[str, str]:
        """Every name and the stem that it stands for (empty if its file cannot be read).

        Raises:
            StoreError: the directory cannot be read; with `certain` also if the file of a name
                cannot. Whoever deletes what has no name is to be certain.
        """
        with self._at.cannot_be_read():
            names = sorted(self._at.all_names_in(NAMES))
        found: dict[str, str] = {}
        users = self._at.allow()  # once: there may be thousands
        for name in names:
            try:
                path = f"{self._at.directory}/{NAMES}/{check_name(name)}"
            except StoreError:  # a leftover of a crash, or something that a file manager put there
                continue
            try:
                found[name] = _stem_in(name, path, users)
            except CacheMiss:
                found[name] = ""
            except StoreError as exc:
                if certain:
                    raise StoreError(f"the name {name!r} cannot be read: {exc}") from exc
                found[name] = ""
        return found

    def of(self, stem: str) -> str | None:
        """The first name that stands for this stem; None if there is none.

        Every hit asks. So names are read again only if their directory has changed since, or was
        changed so shortly before that its time would not tell.

        Raises:
            StoreError: the directory cannot be read.
        """
        now, stamp = time.time_ns(), self._stamp()
        if stamp is None or stamp != self._by_stem[0]:
            named = {stem: name for name, stem in reversed(self.all().items())}
            settled = stamp is not None and stamp[0] < now - SETTLED_NS
            self._by_stem = (stamp if settled else None, named)
        return self._by_stem[1].get(stem)

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            status = os.lstat(self._at.inside(NAMES))
        except (OSError, StoreError):
            return None
        return max(status.st_mtime_ns, status.st_ctime_ns), status.st_ctime_ns, status.st_ino

    def read(self, name: str) -> str:
        """Return the stem that a name stands for.

        Raises:
            CacheMiss: there is no such name; DamagedFile if there is, and it is damaged.
        """
        return _stem_in(name, self._path(name), self._at.allow())

    def write(self, name: str, stem: str, *, sync: bool = False) -> None:
        """Let a name stand for a stem, atomically; it may have stood for another before.

        Raises:
            StoreError: the name cannot be one, or the file system refuses.
        """
        path = self._path(name)
        with self._at.cannot_be_written():
            write_once(path, [stem.encode() + b"\n"], sync=sync, replace=True)

    def remove(self, name: str) -> None:
        """Delete a name; what it stands for stays. The caller holds the store alone."""
        with self._at.cannot_delete():
            self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        checked = check_name(name)
        return Path(self._at.inside(NAMES), checked)


def no_state(name: str) -> CacheMiss:
    """What is said of a name that nothing has."""
    return CacheMiss(f"there is no state named {name!r}; `list` shows those that are")


def _stem_in(name: str, path: str | Path, users: Collection[int]) -> str:
    """The stem in the file of a name. Raises as `Names.read` does."""
    try:
        with contextlib.closing(Reader(path, users)) as reader:
            text = reader.read(0, LONGEST_NAME_BYTES * 2).decode("ascii")
    except CacheMiss:
        raise no_state(name) from None
    except UnicodeDecodeError:
        text = ""
    stem, end = text[:-1], text[-1:]
    if end != "\n" or not STEM.fullmatch(stem):
        raise DamagedFile(
            f"the name {name!r} is damaged: save it again (--force), or delete it (`clear`)"
        )
    return stem


def check_name(name: str) -> str:
    """Return the name as it is stored.

    Raises:
        StoreError: it cannot be the name of a file everywhere.
    """
    name = unicodedata.normalize("NFC", name)
    bad = not name or name[0] in ".-" or not name.isprintable() or set(name) & set('/\\:*?"<>|')
    if bad or len(os.fsencode(name)) > LONGEST_NAME_BYTES:
        raise StoreError(
            f"{name[:LONGEST_NAME_BYTES]!r} cannot be a name: use letters, digits, spaces, '.', "
            "'_' and '-', and begin with a letter or a digit"
        )
    return name


def _is_name(name: str) -> bool:
    """Whether it is not a leftover of a crash, or something that a file manager put there."""
    try:
        check_name(name)
    except StoreError:
        return False
    return True
