"""A directory of write-once containers: atomic, locked, private.

    <directory>/               0700, every file 0600, no links: see `privacy.py`
      blocks/<stem>.safetensors       the stem says the directory, too: 3f/...
      snapshots/<stem>.safetensors
      names/<name>             one line: the stem of a snapshot
      tokenizers/<stem>.safetensors
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
import logging
import math
import os
import re
import secrets
import shutil
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_promptcache import privacy
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

BLOCKS = "blocks"
SNAPSHOTS = "snapshots"
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

SHARD = re.compile(r"[0-9a-f]{2}")
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
        kept = [self._file(kind, stem) for kind in KINDS for stem in self.stems(kind)]
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
        return Path(self._file(kind, stem))

    def _file(self, kind: str, stem: str) -> str:  # a `Path` takes longer to make than to open
        if not STEM.fullmatch(stem):
            raise DamagedFile("it names a file that no store has")
        return f"{self.directory}/{kind}/{stem}{SUFFIX}"

    def _own(self, kind: str, stem: str) -> str:
        """The path of the file of this stem, in a directory that counts. Raises as `inside`."""
        path = self._file(kind, stem)
        self.inside(kind, stem[: stem.index("/")])
        return path

    def exists(self, kind: str, stem: str) -> bool:
        """Whether the file is there; says nothing of its content."""
        return self.file(kind, stem) is not None

    def beginning(self, kind: str, start: str) -> list[str]:
        """The stems that begin with `start`, in order; it begins with a directory: `3f/ab`."""
        directory, _, first = start.partition("/")
        names = [name for name in self.names_in(kind, directory) if name.startswith(first)]
        return sorted(stems_of(directory, names))

    def stems(self, kind: str) -> list[str]:
        """All stems of a kind, in order. Raises as `files` does."""
        with self.cannot_be_read():
            shards = sorted(filter(SHARD.fullmatch, self.all_names_in(kind)))
            return [s for d in shards for s in sorted(stems_of(d, self.all_names_in(kind, d)))]

    def files(self, kind: str) -> dict[str, File]:
        """All stems of a kind, in no order, and what the file system says of their files.

        Raises:
            StoreError: a directory cannot be read. What is not told of would be taken for deleted.
        """
        found: dict[str, File] = {}
        with self.cannot_be_read():
            for shard in filter(SHARD.fullmatch, self.all_names_in(kind)):
                for entry in self.all_entries_in(kind, shard):
                    stem = f"{shard}/{entry.name.removesuffix(SUFFIX)}"
                    if entry.name.endswith(SUFFIX) and STEM.fullmatch(stem):
                        with contextlib.suppress(FileNotFoundError):  # deleted since
                            found[stem] = File.of(entry.stat(follow_symlinks=False))
        return found

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
            for directory in (path.parent.parent, path.parent):
                privacy.make_directory(directory)
            return write_once(path, packed.chunks, sync=sync)

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
        path, size = Path(self._own(kind, stem)), self.size(kind, stem)
        with self.cannot_delete():
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # other files are in it
                path.parent.rmdir()
        return size

    def quarantine(self, kind: str, stem: str) -> bool:
        """Move a damaged file aside, so that a sound one can be written in its place."""
        try:
            path = Path(self._own(kind, stem))
            for parts in ((QUARANTINE,), (QUARANTINE, kind)):
                privacy.make_directory(self.inside(*parts))
            target = Path(self.inside(QUARANTINE, kind))
            path.rename(target / f"{path.stem}.{secrets.token_hex(4)}{SUFFIX}")
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
            return size
        return 0

    def clear_traces(self) -> None:
        """Delete what is no state: quarantined files, statistics, leftovers of crashes.

        The caller holds `exclusive()`. Failing is no matter.
        """
        shutil.rmtree(self.directory / QUARANTINE, ignore_errors=True)  # not what a link leads to
        for path in (*self.leftovers(math.inf), USES):
            with contextlib.suppress(OSError):
                (self.directory / path).unlink(missing_ok=True)


def stems_of(directory: str, names: Iterable[str]) -> list[str]:
    """The stems that names in one directory stand for; files of others have none."""
    stems = [f"{directory}/{name[: -len(SUFFIX)]}" for name in names if name.endswith(SUFFIX)]
    return [stem for stem in stems if STEM.fullmatch(stem)]


def _sync_path(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        sync_file(fd)
    finally:
        os.close(fd)
