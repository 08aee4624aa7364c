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
import errno
import json
import logging
import math
import os
import re
import secrets
import shutil
import stat
import time
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_promptcache import places, privacy
from mlx_promptcache.errors import (
    CacheMiss,
    DamagedFile,
    PromptCacheError,
    StoreError,
    UnreadableStore,
)
from mlx_promptcache.files import (
    TEMPORARY,
    File,
    Reader,
    on_disk,
    sync_directory,
    sync_file,
    write_once,
)
from mlx_promptcache.locks import LOCK_FILES, Locks

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from mlx_promptcache import container

log = logging.getLogger("mlx_promptcache")

BLOCKS = "blocks"
SNAPSHOTS = "snapshots"
NAMES = "names"
TOKENIZERS = "tokenizers"
KINDS = (BLOCKS, SNAPSHOTS, TOKENIZERS)
QUARANTINE = "quarantine"
DIRECTORIES = (*KINDS, NAMES, QUARANTINE)
USES = "uses.jsonl"
TRUSTED_KEYS = "trusted_keys"  # whose signatures are asked for; see `signatures.py`
OURS = {
    *KINDS,
    NAMES,
    QUARANTINE,
    USES,
    TRUSTED_KEYS,
    *LOCK_FILES,
}  # after a power cut any of them may be left

SUFFIX = ".safetensors"
APPENDING = os.O_WRONLY | os.O_APPEND | os.O_CREAT
LARGEST_USES_BYTES = 1 << 26  # of the statistics, the last ones: more are not read
ELSEWHERE = "choose a --cache-dir that you may use"
ROOM = "make room there, or choose a --cache-dir on another drive"
TO_DO = {
    errno.EACCES: ELSEWHERE, errno.EPERM: ELSEWHERE, errno.EROFS: ELSEWHERE, errno.ENOSPC: ROOM,
    errno.EDQUOT: ROOM, errno.EFBIG: ROOM, errno.ENOTDIR: ELSEWHERE,
}  # fmt: skip
SHARD = re.compile(r"[0-9a-f]{2}")
STEM = re.compile(r"[0-9a-f]{2}/[0-9a-f-]{1,200}")
LONGEST_NAME_BYTES = 200
LEFTOVER_SECONDS = 3600.0  # a write that is on its way is younger
MOST_STATISTICS_BYTES = 4 << 20
SETTLED_NS = 2_000_000_000  # what was just written may change within one tick of its times


class Store:
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
        self.directory = Path(directory)
        self.allow_foreign, self.read_only = allow_foreign, read_only
        self.locks = Locks(self.directory)
        self._closed = read_only
        self._named: tuple[tuple[int, ...] | None, dict[str, str]] = (None, {})

    def __repr__(self) -> str:
        return f"Store({str(self.directory)!r})"

    def create(self) -> None:
        """Make the directory, private to its owner, if it is not there yet.

        Raises:
            StoreError: it cannot be made, is something else than a store, or is read-only.
        """
        self.check_writable()
        self.check()
        with _told(f"the store {self.directory} cannot be made"):
            self.directory.parent.mkdir(parents=True, exist_ok=True)
            privacy.make_directory(self.directory)
            for name in (*KINDS, NAMES):
                privacy.make_directory(self._inside(name))
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

    def check_writable(self) -> None:
        """Whether anything may be written here, or deleted.

        Raises:
            StoreError: writing is switched off.
        """
        if not self.read_only:
            return
        what = f"unset {places.READ_ONLY}" if places.writing_is_off() else "open it for writing"
        raise StoreError(f"the store {self.directory} is read-only: {what} to change it")

    # Privacy

    def allow(self) -> frozenset[int]:
        """The users whose files count here.

        Raises:
            ForeignStore: the store belongs to another user, and that is not allowed.
        """
        return privacy.users(self.directory, allow_foreign=self.allow_foreign)

    def _inside(self, *parts: str) -> str:
        """The path of a directory of the store, which may not be there.

        Raises:
            ForeignStore: the store belongs to another user, and that is not allowed.
            StoreError: the directory, or one above it, is a link or belongs to a third user.
        """
        trusted, path = self.allow(), str(self.directory)
        for part in parts:
            path = f"{path}/{part}"
            privacy.check_directory(path, trusted)
        return path

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
        kept += [f"{self.directory}/{NAMES}/{name}" for name in self.names()]
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
        """The path of the file of this stem, in a directory that counts. Raises as `_inside`."""
        path = self._file(kind, stem)
        self._inside(kind, stem[: stem.index("/")])
        return path

    def exists(self, kind: str, stem: str) -> bool:
        """Whether the file is there; says nothing of its content."""
        return self.file(kind, stem) is not None

    def beginning(self, kind: str, start: str) -> list[str]:
        """The stems that begin with `start`, in order; it begins with a directory: `3f/ab`."""
        directory, _, first = start.partition("/")
        names = [name for name in self.listing(kind, directory) if name.startswith(first)]
        return sorted(stems_of(directory, names))

    def listing(self, kind: str, directory: str) -> list[str]:
        """The names of all files in one directory of a kind, whatever they are; see `stems_of`."""
        return self._names_in(kind, directory)

    def _names_in(self, *parts: str) -> list[str]:
        try:
            return os.listdir(self._inside(*parts))  # noqa: PTH208
        except (OSError, StoreError):
            return []

    def stems(self, kind: str) -> list[str]:
        """All stems of a kind, in order. Raises as `files` does."""
        with _told(f"the store {self.directory} cannot be read"):
            shards = sorted(filter(SHARD.fullmatch, self._all_names_in(kind)))
            return [s for d in shards for s in sorted(stems_of(d, self._all_names_in(kind, d)))]

    def files(self, kind: str) -> dict[str, File]:
        """All stems of a kind, in no order, and what the file system says of their files.

        Raises:
            StoreError: a directory cannot be read. What is not told of would be taken for deleted.
        """
        found: dict[str, File] = {}
        with _told(f"the store {self.directory} cannot be read"):
            for shard in filter(SHARD.fullmatch, self._all_names_in(kind)):
                for entry in self._all_entries_in(kind, shard):
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

    def _entries_in(self, *parts: str) -> list[os.DirEntry[str]]:
        try:
            return self._all_entries_in(*parts)
        except OSError:
            return []

    def _all_entries_in(self, *parts: str) -> list[os.DirEntry[str]]:
        directory = self._seen(*parts)
        return [] if directory is None else _entries(directory)

    def _all_names_in(self, *parts: str) -> list[str]:
        directory = self._seen(*parts)
        return [] if directory is None else _names(directory)

    def _seen(self, *parts: str) -> str | None:
        """The path of a directory of the store; None if it does not count, as a link."""
        try:
            return self._inside(*parts)
        except StoreError:
            return None

    def write(self, kind: str, stem: str, packed: container.Packed, *, sync: bool = False) -> bool:
        """Write a file under a name that is not taken; return whether it was not taken.

        With `sync` the bytes and the name are on the drive when this returns.

        Raises:
            StoreError: the file system refuses; nothing is left behind.
        """
        path = Path(self._own(kind, stem))
        with _told(f"cannot write to the store {self.directory}"):
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
        with _told(f"cannot write to the store {self.directory}"):
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
        with _told(f"cannot delete from the store {self.directory}"):
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # other files are in it
                path.parent.rmdir()
        return size

    def quarantine(self, kind: str, stem: str) -> bool:
        """Move a damaged file aside, so that a sound one can be written in its place."""
        try:
            path = Path(self._own(kind, stem))
            for parts in ((QUARANTINE,), (QUARANTINE, kind)):
                privacy.make_directory(self._inside(*parts))
            target = Path(self._inside(QUARANTINE, kind))
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
                entries = _entries(waiting.pop())
            except OSError:  # what cannot be looked into cannot be counted
                continue
            for entry in entries:
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
        shards = [(kind, shard) for kind in KINDS for shard in self._names_in(kind)]
        for parts in (*shards, (NAMES,)):  # elsewhere it is not ours
            for entry in self._entries_in(*parts):
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
        for kind in self._names_in(QUARANTINE):
            for entry in self._entries_in(QUARANTINE, kind):
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
        there = Path(self._inside(*parts), name)
        told = _told(f"cannot delete from the store {self.directory}")
        with told, contextlib.suppress(FileNotFoundError):
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

    # Names

    def labels(self) -> list[str]:
        """Every name, in order, whatever it stands for: for that its file would have to be read.

        Raises:
            ForeignStore: the store belongs to another user, and that is not allowed.
            StoreError: the directory cannot be read.
        """
        self.allow()
        with _told(f"the store {self.directory} cannot be read"):
            return [name for name in sorted(self._all_names_in(NAMES)) if _is_name(name)]

    def names(self, *, certain: bool = False) -> dict[str, str]:
        """Every name and the stem that it stands for (empty if its file cannot be read).

        Raises:
            StoreError: the directory cannot be read; with `certain` also if the file of a name
                cannot. Whoever deletes what has no name is to be certain.
        """
        with _told(f"the store {self.directory} cannot be read"):
            names = sorted(self._all_names_in(NAMES))
        found: dict[str, str] = {}
        users = self.allow()  # once: there may be thousands
        for name in names:
            try:
                path = f"{self.directory}/{NAMES}/{check_name(name)}"
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

    def name_of(self, stem: str) -> str | None:
        """The first name that stands for this stem; None if there is none.

        Every hit asks. So names are read again only if their directory has changed since, or was
        changed so shortly before that its time would not tell.

        Raises:
            StoreError: the directory cannot be read.
        """
        now, stamp = time.time_ns(), self._stamp_of_names()
        if stamp is None or stamp != self._named[0]:
            named = {stem: name for name, stem in reversed(self.names().items())}
            settled = stamp is not None and stamp[0] < now - SETTLED_NS
            self._named = (stamp if settled else None, named)
        return self._named[1].get(stem)

    def _stamp_of_names(self) -> tuple[int, int, int] | None:
        try:
            status = os.lstat(self._inside(NAMES))
        except (OSError, StoreError):
            return None
        return max(status.st_mtime_ns, status.st_ctime_ns), status.st_ctime_ns, status.st_ino

    def read_name(self, name: str) -> str:
        """Return the stem that a name stands for.

        Raises:
            CacheMiss: there is no such name.
        """
        return _stem_in(name, self._name(name), self.allow())

    def write_name(self, name: str, stem: str, *, sync: bool = False) -> None:
        """Let a name stand for a stem, atomically; it may have stood for another before.

        Raises:
            StoreError: the name cannot be one, or the file system refuses.
        """
        path = self._name(name)
        with _told(f"cannot write to the store {self.directory}"):
            write_once(path, [stem.encode() + b"\n"], sync=sync, replace=True)

    def remove_name(self, name: str) -> None:
        """Delete a name; what it stands for stays. The caller holds `exclusive()`."""
        with _told(f"cannot delete from the store {self.directory}"):
            self._name(name).unlink(missing_ok=True)

    def _name(self, name: str) -> Path:
        checked = check_name(name)
        return Path(self._inside(NAMES), checked)

    # Statistics

    def record_use(self, use: dict[str, Any]) -> None:
        """Append a line to the statistics. Failing is no matter.

        Where nothing is added nobody makes room: so they are kept short here, too.
        """
        line = json.dumps(use, separators=(",", ":")) + "\n"
        with contextlib.suppress(OSError, StoreError):
            fd = privacy.open_file(f"{self._inside()}/{USES}", APPENDING)
            try:
                os.write(fd, line.encode())
                size = os.fstat(fd).st_size
            finally:
                os.close(fd)
            if size > MOST_STATISTICS_BYTES:
                self.shorten_uses()

    def record_write(self, count: int) -> None:
        """Note that so many bytes were written now. Failing is no matter."""
        if count:
            self.record_use({"when": round(time.time(), 3), "wrote": count})

    def shorten_uses(self) -> None:
        """Forget the older half of long statistics. Failing is no matter, nor is it if what others
        append at this moment is forgotten, too.
        """
        path = self.directory / USES
        with contextlib.suppress(OSError, PromptCacheError):
            if path.lstat().st_size > MOST_STATISTICS_BYTES:
                lines = self._statistics().splitlines(keepends=True)
                write_once(path, lines[len(lines) // 2 :], sync=False, replace=True)

    def _statistics(self) -> bytes:
        """The statistics as they stand; of very long ones the end. Raises as `reader` does."""
        with contextlib.closing(Reader(self.directory / USES, self.allow())) as reader:
            begin = max(0, reader.size - LARGEST_USES_BYTES)
            return reader.read(begin, LARGEST_USES_BYTES)

    def written_by_day(self) -> dict[str, int]:
        """How many bytes were written on each day (UTC) that the statistics know of."""
        days: dict[str, int] = {}
        for use in self.uses():
            when, wrote = use.get("when"), use.get("wrote")
            if isinstance(when, (int, float)) and type(wrote) is int:
                with contextlib.suppress(ValueError, OverflowError, OSError):
                    day = time.strftime("%Y-%m-%d", time.gmtime(when))
                    days[day] = days.get(day, 0) + wrote
        return days

    def uses(self) -> Iterator[dict[str, Any]]:
        """The statistics, oldest first; lines that cannot be read are passed over."""
        try:
            lines = self._statistics().splitlines()
        except PromptCacheError:
            return
        for line in lines:
            try:
                use = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(use, dict):
                yield use


def no_state(name: str) -> CacheMiss:
    """What is said of a name that nothing has."""
    return CacheMiss(f"there is no state named {name!r}; `list` shows those that are")


def _stem_in(name: str, path: str | Path, users: Collection[int]) -> str:
    """The stem in the file of a name. Raises as `Store.read_name` does."""
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


def stems_of(directory: str, names: Iterable[str]) -> list[str]:
    """The stems that names in one directory stand for; files of others have none."""
    stems = [f"{directory}/{name[: -len(SUFFIX)]}" for name in names if name.endswith(SUFFIX)]
    return [stem for stem in stems if STEM.fullmatch(stem)]


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


def _names(directory: str) -> list[str]:
    """The names in a directory, none if there is no such directory. Raises OSError."""
    try:
        return os.listdir(directory)  # noqa: PTH208 - only the names are wanted
    except (FileNotFoundError, NotADirectoryError):
        return []


def _entries(directory: str) -> list[os.DirEntry[str]]:
    """What is in a directory, nothing if there is no such directory. Raises OSError."""
    try:
        with os.scandir(directory) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _sync_path(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        sync_file(fd)
    finally:
        os.close(fd)


def _sentence(what: str, exc: OSError) -> str:
    """What went wrong, and what to do where that is known."""
    todo = TO_DO.get(exc.errno or 0)
    return f"{what}: {exc.strerror}; {todo}" if todo else f"{what}: {exc.strerror}"


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise StoreError(_sentence(what, exc)) from exc
