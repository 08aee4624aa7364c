"""A directory of write-once containers: atomic, locked, private.

    <directory>/               0700, every file 0600, no links: see `privacy.py`
      blocks/, snapshots/, tokenizers/    where the file of a stem is says `layout.py`
      names/<name>             one line: the stem of a snapshot
      quarantine/              files found damaged, moved aside
      uses.jsonl               one line a hit; statistics only
      trusted_keys             whose signatures are asked for; the user's own
      lock, gate, turn         see `locks.py`

A file appears whole or not at all, under a name that nothing else is ever written to, and is never
written again: not even its mtime changes, so that backups and `rsync` see what is new and nothing
else. The time of last use is the file's atime, which `touch` sets. Nothing here knows what the
stems mean.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_promptcache import layout, privacy
from mlx_promptcache.directory import StoreDirectory, entries, told
from mlx_promptcache.errors import DamagedFile, StoreError, UnreadableStore
from mlx_promptcache.files import (
    STEM,
    SUFFIX,
    TEMPORARY,
    File,
    Reader,
    on_disk,
    sync_directory,
    sync_file,
    write_once,
)
from mlx_promptcache.locks import LOCK_FILES, Locks
from mlx_promptcache.names import NAMES, Names
from mlx_promptcache.uses import USES, Uses

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from mlx_promptcache import container

log = logging.getLogger("mlx_promptcache")

BLOCKS, SNAPSHOTS = layout.BLOCKS, layout.SNAPSHOTS
TOKENIZERS = "tokenizers"
KINDS = (BLOCKS, SNAPSHOTS, TOKENIZERS)
QUARANTINE = "quarantine"
DIRECTORIES = (*KINDS, NAMES, QUARANTINE)
TRUSTED_KEYS = "trusted_keys"  # whose signatures are asked for; see `signatures.py`
OURS = {
    *KINDS,
    NAMES,
    QUARANTINE,
    USES,
    TRUSTED_KEYS,
    *LOCK_FILES,
}  # after a power cut any of them may be left

LEFTOVER_SECONDS = 3600.0  # a write that is on its way is younger


class Store(StoreDirectory):
    """One store. Making the object touches nothing; `create` makes the directory.

    A store of another user is not used unless `allow_foreign` is set: then everything that reads,
    writes or locks raises ForeignStore, and what only asks finds nothing. What others could look
    into is closed to them when the store is first used, but for one that is `read_only`.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        allow_foreign: bool = False,
        read_only: bool = False,
    ) -> None:
        super().__init__(directory, allow_foreign=allow_foreign, read_only=read_only)
        self.locks = Locks(self.directory)
        self.names = Names(self)
        self.uses = Uses(self)
        self._closed = read_only

    def __repr__(self) -> str:
        return f"Store({str(self.directory)!r})"

    def create(self) -> None:
        """Make the directory, private to its owner, if it is not there yet.

        Raises:
            StoreError: it cannot be made, is something else than a store, or is read-only.
        """
        self.check_writable()
        self.check()
        with told(f"the store {self.directory} cannot be made"):
            self.directory.parent.mkdir(parents=True, exist_ok=True)
            privacy.make_directory(self.directory)
            for name in (*KINDS, NAMES):
                privacy.make_directory(self.inside(name))
            self.locks.create()

    def check(self) -> bool:
        """Whether there is a store here.

        Raises:
            StoreError: there is something here, but it is no store, or another user's.
            UnreadableStore: it cannot be told what is here.
        """
        self.allow()
        try:
            names = os.listdir(self.directory)  # noqa: PTH208 - only the names are wanted
        except FileNotFoundError:
            return False
        except NotADirectoryError:
            raise StoreError(
                f"{self.directory} is a file, not a store of prompt caches: choose another "
                "--cache-dir"
            ) from None
        except OSError as exc:
            raise UnreadableStore(
                f"the store {self.directory} cannot be read: {exc.strerror}; mend that, or choose "
                "another --cache-dir"
            ) from exc
        foreign = [name for name in names if not name.startswith(".") and name not in OURS]
        if foreign and BLOCKS not in names and SNAPSHOTS not in names:
            raise StoreError(
                f"{self.directory} is not a store of prompt caches: choose another --cache-dir, "
                "or an empty or new directory"
            )
        self._close()
        return bool(names)

    # Privacy

    def _close(self) -> None:
        """Close to others what they could look into, once; what is deeper is then closed, too."""
        if self._closed:
            return
        self._closed = True
        opened = privacy.close(self.directory, follow=True)
        if sum(privacy.close(self.directory / name) for name in DIRECTORIES) or opened:
            log.warning("others could look into the store %s: that is over now", self.directory)

    def close_files(self) -> int:
        """Close each file that is open to others, and return how many those were."""
        stems = [(kind, stem) for kind in KINDS for stem in self.stems(kind)]
        kept = [p for kind, stem in stems for p in self._there(kind, self._places(kind, stem))]
        kept += [f"{self.directory}/{NAMES}/{name}" for name in self.names.all()]
        kept += [f"{self.directory}/{name}" for name in (USES, *LOCK_FILES)]
        return 0 if self.read_only else sum(map(privacy.close, kept))

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Hold the lock that readers and writers share: nothing is deleted meanwhile.

        Raises:
            CacheLocked: somebody deletes, and does not come to an end.
            ForeignStore: the store belongs to another user, and that is not allowed.
        """
        self.allow()
        self._close()
        with self.locks.shared():
            yield

    @contextlib.contextmanager
    def exclusive(self, seconds: float | None = None) -> Iterator[None]:
        """Hold the lock alone, to delete; wait at most so many seconds for it (30).

        Raises:
            CacheLocked: others read or write, and do not come to an end.
            ForeignStore: the store belongs to another user, and that is not allowed.
            StoreError: the store is read-only.
        """
        self.allow()
        self.check_writable()
        self._close()
        with self.locks.exclusive(seconds):
            yield

    @contextlib.contextmanager
    def adding(self) -> Iterator[None]:
        """Hold the turn to add to the store: nobody else adds meanwhile.

        Raises:
            CacheLocked: somebody else adds, and does not come to an end.
            ForeignStore: the store belongs to another user, and that is not allowed.
            StoreError: the store is read-only.
        """
        self.allow()
        self.check_writable()
        with self.locks.adding():
            yield

    # Containers

    def path(self, kind: str, stem: str) -> Path:
        """Where the file of this stem is, or would be.

        Raises:
            DamagedFile: it is no stem. Stems stand in files, too, and files are deleted by them.
        """
        places = self._places(kind, stem)
        return Path(next(self._there(kind, places), places[0]))

    def _places(self, kind: str, stem: str) -> list[str]:  # `Path`s take longer to make than files
        if not STEM.fullmatch(stem):
            raise DamagedFile("it names a file that no store has")
        return [f"{self.directory}/{kind}/{path}" for path in layout.paths(kind, stem)]

    def _there(self, kind: str, places: Iterable[str]) -> Iterator[str]:
        """Those of these paths where something is, in a directory that counts."""
        with contextlib.suppress(StoreError):
            trusted, _ = self.allow(), self.inside(kind)
            for path in places:
                if privacy.is_there(path.rpartition("/")[0], trusted) and os.path.lexists(path):
                    yield path

    def _own(self, kind: str, stem: str) -> str:
        """The path of the file of this stem, in a directory that counts. Raises as `inside`."""
        places = self._places(kind, stem)
        for path in self._there(kind, places):
            return path
        self.inside(kind, places[0].rsplit("/", 2)[1])
        return places[0]

    def exists(self, kind: str, stem: str) -> bool:
        """Whether the file is there; says nothing of its content."""
        return self.file(kind, stem) is not None

    def beginning(self, kind: str, start: str) -> list[str]:
        """The stems that begin with `start`, in order; `layout.directories` says how it ends."""
        first = start.partition("/")[2]
        listed = self.names_in_each(kind, layout.directories(kind, start))
        stems = {
            layout.stem(kind, directory, name)
            for directory, names in listed.items()
            for name in names
            if name.startswith(first)
        }
        return sorted(stem for stem in stems if stem is not None)

    def stems(self, kind: str) -> list[str]:
        """All stems of a kind, in order. Raises as `files` does."""
        with self.cannot_be_read():
            places = [(d, name) for d in self._all(kind) for name in self.all_names_in(kind, d)]
        stems = {layout.stem(kind, directory, name) for directory, name in places}
        return sorted(stem for stem in stems if stem is not None)

    def files(self, kind: str) -> dict[str, File]:
        """All stems of a kind, in no order, and what the file system says of their files.

        Raises:
            StoreError: a directory cannot be read. What is not told of would be taken for deleted.
        """
        found: dict[str, File] = {}
        with self.cannot_be_read():
            for directory in self._all(kind):
                for entry in self.all_entries_in(kind, directory):
                    stem = layout.stem(kind, directory, entry.name)
                    if stem is not None and stem not in found:
                        with contextlib.suppress(FileNotFoundError):  # deleted since
                            found[stem] = File.of(entry.stat(follow_symlinks=False))
        return found

    def _all(self, kind: str) -> list[str]:
        """The directories that files of a kind may be in, those that are looked into first at the
        head, and else in order. Raises OSError.
        """
        names = [name for name in self.all_names_in(kind) if layout.is_directory(kind, name)]
        return sorted(names, key=lambda name: (-len(name), name))

    def file(self, kind: str, stem: str) -> File | None:
        """What the file system says of a file; None if it is not there."""
        try:
            return File.of(os.lstat(self._own(kind, stem)))
        except (OSError, StoreError):
            return None

    def write(self, kind: str, stem: str, packed: container.Packed, *, sync: bool = False) -> bool:
        """Write a file under a name that is not taken; return whether it was not taken.

        With `sync` the bytes and the name are on the drive when this returns.

        Raises:
            StoreError: the file system refuses; nothing is left behind.
        """
        path = Path(self._own(kind, stem))
        with self.cannot_be_written():
            try:
                return self._write(path, packed, sync=sync)
            except FileNotFoundError:  # the directory went with the last file in it
                return self._write(path, packed, sync=sync)

    def _write(self, path: Path, packed: container.Packed, *, sync: bool) -> bool:
        for directory in (path.parent.parent, path.parent):
            privacy.make_directory(directory)
        try:
            return write_once(path, packed.chunks, sync=sync)
        except OSError:
            _remove_if_empty(path.parent)
            raise

    def sync(self, files: Iterable[tuple[str, str]]) -> None:
        """Return when these files that were written before, each a kind and a stem, are on the
        drive, with their names and the names of all directories on the way to them.

        Raises:
            StoreError: the file system refuses, or a file is not there any more.
        """
        directories: dict[Path, None] = {}
        with self.cannot_be_written():
            for kind, stem in files:
                path = Path(self._own(kind, stem))
                _sync_path(path)
                directories.update(dict.fromkeys((path.parent, path.parent.parent)))
            # Whoever made the store, and directories above it, may not have synced them.
            for above in self.directory.absolute().parents:
                with contextlib.suppress(OSError):  # of another owner, who made it
                    sync_directory(above)
            for directory in (*directories, self.directory):
                sync_directory(directory)

    def reader(self, kind: str, stem: str) -> contextlib.closing[Reader]:
        """Open a file for reading; close it when done (`with store.reader(...) as reader`).

        Raises:
            CacheMiss: it is not there.
            StoreError: it cannot be read.
        """
        return contextlib.closing(Reader(self._own(kind, stem), self.allow()))

    def header(self, kind: str, stem: str) -> container.Header:
        """Read the header of a file.

        Raises:
            CacheMiss: it is not there; DamagedFile if it is, and is damaged.
            StoreError: it cannot be read.
        """
        with self.reader(kind, stem) as reader:
            return reader.header()

    def names_and_bytes(self, kind: str, directory: str) -> tuple[int, int]:
        """How many names are in a directory of files, and what the drive gave for it itself; zeros
        where that cannot be told.
        """
        try:
            own = on_disk((self.directory / kind / directory).lstat())
        except OSError:
            return 0, 0
        return len(self.names_in(kind, directory)), own

    def size(self, kind: str, stem: str) -> int:
        """Bytes of a file, 0 if it is not there."""
        file = self.file(kind, stem)
        return 0 if file is None else file.size

    def last_use(self, kind: str, stem: str) -> float:
        """Seconds since the epoch when the file was last used; 0 if it is not there."""
        file = self.file(kind, stem)
        return 0.0 if file is None else file.last_use

    def touch(self, kind: str, stem: str) -> None:
        """Note that the file was used now. Its mtime stays. Failing is no matter."""
        with contextlib.suppress(OSError, StoreError):
            path = self._own(kind, stem)
            times = (time.time_ns(), os.lstat(path).st_mtime_ns)
            os.utime(path, ns=times, follow_symlinks=False)

    def remove(self, kind: str, stem: str) -> int:
        """Delete a file and return how many bytes it had. The caller holds `exclusive()`.

        Raises:
            StoreError: the file system refuses.
        """
        freed, refused = 0, None
        with self.cannot_delete():
            for path in map(Path, self._places(kind, stem)):
                try:
                    freed += self._remove(kind, path)
                except StoreError as exc:  # a directory that does not count
                    refused = exc
        if refused is not None and not freed:
            raise refused
        return freed

    def _remove(self, kind: str, path: Path) -> int:
        try:
            size = path.lstat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return 0
        self.inside(kind, path.parent.name)
        path.unlink(missing_ok=True)
        _remove_if_empty(path.parent)
        return size

    def quarantine(self, kind: str, stem: str) -> bool:
        """Move a damaged file aside, so that a sound one can be written in its place."""
        try:
            path = Path(self._own(kind, stem))
            for parts in ((QUARANTINE,), (QUARANTINE, kind)):
                privacy.make_directory(self.inside(*parts))
            target = Path(self.inside(QUARANTINE, kind))
            path.rename(target / f"{path.stem}.{os.urandom(4).hex()}{SUFFIX}")
        except (OSError, DamagedFile, StoreError):
            return False
        return True

    # What is no state

    def taken(self) -> int:
        """Bytes on disk of all that is in the directory, whatever it is."""
        try:
            total = on_disk(self.directory.lstat())
        except OSError:
            return 0
        waiting = [str(self.directory)]
        while waiting:
            try:
                found = entries(waiting.pop())
            except OSError:  # what cannot be looked into cannot be counted
                continue
            for entry in found:
                try:  # tens of thousands of times before a save: no `File`, no `suppress`
                    status = entry.stat(follow_symlinks=False)
                except OSError:  # it is gone
                    continue
                total += on_disk(status)
                if stat.S_ISDIR(status.st_mode):
                    waiting.append(entry.path)
        return total

    def leftovers(self, now: float) -> dict[str, File]:
        """What crashes left behind an hour ago or longer, by their paths in the store."""
        found: dict[str, File] = {}
        shards = [(kind, shard) for kind in KINDS for shard in self.names_in(kind)]
        for parts in (*shards, (NAMES,)):  # elsewhere it is not ours
            for entry in self.entries_in(*parts):
                if not entry.name.startswith(TEMPORARY):
                    continue
                with contextlib.suppress(OSError):
                    file = File.of(entry.stat(follow_symlinks=False))
                    if abs(now - file.mtime_ns / 1e9) > LEFTOVER_SECONDS:  # the clock may be set
                        found["/".join((*parts, entry.name))] = file
        return found

    def set_aside(self) -> dict[str, File]:
        """The files in quarantine, by their paths in the store."""
        found: dict[str, File] = {}
        for kind in self.names_in(QUARANTINE):
            for entry in self.entries_in(QUARANTINE, kind):
                with contextlib.suppress(OSError):
                    path = f"{QUARANTINE}/{kind}/{entry.name}"
                    found[path] = File.of(entry.stat(follow_symlinks=False))
        return found

    def remove_leftover(self, path: str) -> int:
        """Delete what `leftovers` or `set_aside` told of, and return how many bytes it had. The
        caller holds `exclusive()`.

        Raises:
            StoreError: the file system refuses.
        """
        *parts, name = path.split("/")
        there = Path(self.inside(*parts), name)
        with self.cannot_delete(), contextlib.suppress(FileNotFoundError):
            size = there.lstat().st_size
            there.unlink()
            if parts[0] in KINDS:
                _remove_if_empty(there.parent)
            return size
        return 0

    def clear_traces(self) -> None:
        """Delete what is no state: quarantined files, statistics, leftovers of crashes, directories
        that lost their last file to the quarantine.

        The caller holds `exclusive()`. Failing is no matter.
        """
        import shutil

        shutil.rmtree(self.directory / QUARANTINE, ignore_errors=True)  # not what a link leads to
        for path in (*self.leftovers(math.inf), USES):
            with contextlib.suppress(OSError):
                (self.directory / path).unlink(missing_ok=True)
        for kind in KINDS:
            for name in filter(functools.partial(layout.is_directory, kind), self.names_in(kind)):
                _remove_if_empty(self.directory / kind / name)


def _remove_if_empty(directory: Path) -> None:
    with contextlib.suppress(OSError):  # other files are in it
        directory.rmdir()


def _sync_path(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        sync_file(fd)
    finally:
        os.close(fd)
