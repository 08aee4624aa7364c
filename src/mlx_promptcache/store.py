"""A directory of write-once containers: atomic, locked, private.

    <directory>/               0700, every file 0600
      blocks/<stem>.safetensors       the stem says the directory, too: 3f/...
      snapshots/<stem>.safetensors
      names/<name>             one line: the stem of a snapshot
      tokenizers/<stem>.safetensors
      quarantine/              files found damaged, moved aside
      uses.jsonl               one line a hit; statistics only
      lock, gate, turn         see `locks.py`

A file appears whole or not at all, under a name that nothing else is ever written to, and is never
written again: not even its mtime changes, so that backups and `rsync` see what is new and nothing
else. The time of last use is the file's atime, which `touch` sets. Nothing here knows what the
stems mean.
"""

from __future__ import annotations

import contextlib
import json
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

from mlx_promptcache.errors import CacheMiss, DamagedFile, PromptCacheError, StoreError
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
    from collections.abc import Iterable, Iterator

    from mlx_promptcache import container

BLOCKS = "blocks"
SNAPSHOTS = "snapshots"
NAMES = "names"
TOKENIZERS = "tokenizers"
KINDS = (BLOCKS, SNAPSHOTS, TOKENIZERS)
QUARANTINE = "quarantine"
USES = "uses.jsonl"

SUFFIX = ".safetensors"
STEM = re.compile(r"[0-9a-f]{2}/[0-9a-f-]{1,200}")
LONGEST_NAME_BYTES = 200
LEFTOVER_SECONDS = 3600.0  # a write that is on its way is younger
MOST_STATISTICS_BYTES = 4 << 20


class Store:
    """One store. Making the object touches nothing; `create` makes the directory."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self.locks = Locks(self.directory)
        self.shared, self.exclusive = self.locks.shared, self.locks.exclusive
        self.adding = self.locks.adding

    def __repr__(self) -> str:
        return f"Store({str(self.directory)!r})"

    def create(self) -> None:
        """Make the directory, private to its owner, if it is not there yet.

        Raises:
            StoreError: it cannot be made, or is something else than a store.
        """
        self.check()
        with _told(f"the store {self.directory} cannot be made"):
            self.directory.mkdir(0o700, parents=True, exist_ok=True)
            with contextlib.suppress(OSError):  # of another owner: not ours to change
                self.directory.chmod(0o700)
            for kind in (BLOCKS, SNAPSHOTS, NAMES, TOKENIZERS):
                (self.directory / kind).mkdir(0o700, exist_ok=True)
            self.locks.create()

    def check(self) -> bool:
        """Whether there is a store here.

        Raises:
            StoreError: there is something here, but it is no store.
        """
        try:
            names = os.listdir(self.directory)  # noqa: PTH208 - only the names are wanted
        except FileNotFoundError:
            return False
        except NotADirectoryError:
            raise StoreError(f"{self.directory} is a file, not a store of prompt caches") from None
        except OSError as exc:
            raise StoreError(f"the store {self.directory} cannot be read: {exc.strerror}") from exc
        foreign = [
            name for name in names if not name.startswith(".") and name not in {*LOCK_FILES, USES}
        ]
        if foreign and BLOCKS not in names and SNAPSHOTS not in names:
            raise StoreError(
                f"{self.directory} is not a store of prompt caches: choose another --cache-dir, "
                "or an empty or new directory"
            )
        return bool(names)

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

    def exists(self, kind: str, stem: str) -> bool:
        """Whether the file is there; says nothing of its content."""
        return os.path.exists(self._file(kind, stem))  # noqa: PTH110

    def beginning(self, kind: str, start: str) -> list[str]:
        """The stems that begin with `start`, in order; it begins with a directory: `3f/ab`."""
        directory, _, first = start.partition("/")
        names = [name for name in self.listing(kind, directory) if name.startswith(first)]
        return sorted(stems_of(directory, names))

    def listing(self, kind: str, directory: str) -> list[str]:
        """The names of all files in one directory of a kind, whatever they are; see `stems_of`."""
        try:
            return os.listdir(f"{self.directory}/{kind}/{directory}")  # noqa: PTH208
        except OSError:
            return []

    def stems(self, kind: str) -> list[str]:
        """All stems of a kind, in order."""
        try:
            shards = sorted(os.listdir(self.directory / kind))  # noqa: PTH208
        except OSError:
            return []
        return [stem for shard in shards for stem in self.beginning(kind, f"{shard}/")]

    def files(self, kind: str) -> dict[str, File]:
        """All stems of a kind, in no order, and what the file system says of their files."""
        found: dict[str, File] = {}
        for shard in _entries(f"{self.directory}/{kind}"):
            for entry in _entries(shard.path):
                stem = f"{shard.name}/{entry.name.removesuffix(SUFFIX)}"
                if entry.name.endswith(SUFFIX) and STEM.fullmatch(stem):
                    with contextlib.suppress(OSError):
                        found[stem] = File.of(entry.stat(follow_symlinks=False))
        return found

    def file(self, kind: str, stem: str) -> File | None:
        """What the file system says of a file; None if it is not there."""
        try:
            return File.of(os.lstat(self._file(kind, stem)))
        except OSError:
            return None

    def write(self, kind: str, stem: str, packed: container.Packed, *, sync: bool = False) -> bool:
        """Write a file under a name that is not taken; return whether it was not taken.

        With `sync` the bytes and the name are on the drive when this returns.

        Raises:
            StoreError: the file system refuses; nothing is left behind.
        """
        path = self.path(kind, stem)
        with _told(f"cannot write to the store {self.directory}"):
            path.parent.mkdir(0o700, parents=True, exist_ok=True)
            return write_once(path, packed.chunks, sync=sync)

    def sync(self, kind: str, stem: str) -> None:
        """Return when a file that was written before, and its name, are on the drive.

        Raises:
            StoreError: the file system refuses, or the file is not there any more.
        """
        path = self.path(kind, stem)
        with _told(f"cannot write to the store {self.directory}"):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                sync_file(fd)
            finally:
                os.close(fd)
            for directory in (path.parent, path.parent.parent, self.directory):
                sync_directory(directory)

    def reader(self, kind: str, stem: str) -> contextlib.closing[Reader]:
        """Open a file for reading; close it when done (`with store.reader(...) as reader`).

        Raises:
            CacheMiss: it is not there.
            StoreError: it cannot be read.
        """
        return contextlib.closing(Reader(self._file(kind, stem)))

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
        try:
            return self.path(kind, stem).stat().st_size
        except OSError:
            return 0

    def last_use(self, kind: str, stem: str) -> float:
        """Seconds since the epoch when the file was last used; 0 if it is not there."""
        file = self.file(kind, stem)
        return 0.0 if file is None else file.last_use

    def touch(self, kind: str, stem: str) -> None:
        """Note that the file was used now. Its mtime stays. Failing is no matter."""
        path = self.path(kind, stem)
        with contextlib.suppress(OSError):
            os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))

    def remove(self, kind: str, stem: str) -> int:
        """Delete a file and return how many bytes it had. The caller holds `exclusive()`.

        Raises:
            StoreError: the file system refuses.
        """
        path, size = self.path(kind, stem), self.size(kind, stem)
        with _told(f"cannot delete from the store {self.directory}"):
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # other files are in it
                path.parent.rmdir()
        return size

    def quarantine(self, kind: str, stem: str) -> bool:
        """Move a damaged file aside, so that a sound one can be written in its place."""
        target = self.directory / QUARANTINE / kind
        try:
            for directory in (target.parent, target):
                directory.mkdir(0o700, exist_ok=True)
            path = self.path(kind, stem)
            path.rename(target / f"{path.stem}.{secrets.token_hex(4)}{SUFFIX}")
        except (OSError, DamagedFile):
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
            for entry in _entries(waiting.pop()):
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
        for place in (*(f"{kind}/*/" for kind in KINDS), f"{NAMES}/"):  # elsewhere it is not ours
            for path in self.directory.glob(f"{place}{TEMPORARY}*"):
                with contextlib.suppress(OSError):
                    file = File.of(path.lstat())
                    if abs(now - file.mtime_ns / 1e9) > LEFTOVER_SECONDS:  # the clock may be set
                        found[path.relative_to(self.directory).as_posix()] = file
        return found

    def set_aside(self) -> dict[str, File]:
        """The files in quarantine, by their paths in the store."""
        found: dict[str, File] = {}
        for kind in _entries(f"{self.directory}/{QUARANTINE}"):
            for entry in _entries(kind.path):
                with contextlib.suppress(OSError):
                    path = f"{QUARANTINE}/{kind.name}/{entry.name}"
                    found[path] = File.of(entry.stat(follow_symlinks=False))
        return found

    def remove_leftover(self, path: str) -> int:
        """Delete what `leftovers` or `set_aside` told of, and return how many bytes it had. The
        caller holds `exclusive()`.

        Raises:
            StoreError: the file system refuses.
        """
        there = self.directory / path
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
        shutil.rmtree(self.directory / QUARANTINE, ignore_errors=True)
        for path in (*self.leftovers(math.inf), USES):
            with contextlib.suppress(OSError):
                (self.directory / path).unlink(missing_ok=True)

    # Names

    def names(self) -> dict[str, str]:
        """Every name and the stem that it stands for (empty if its file cannot be read)."""
        try:
            names = sorted(os.listdir(self.directory / NAMES))  # noqa: PTH208
        except OSError:
            return {}
        found: dict[str, str] = {}
        for name in names:
            try:
                check_name(name)
            except StoreError:  # a leftover of a crash, or something that a file manager put there
                continue
            try:
                found[name] = self.read_name(name)
            except PromptCacheError:
                found[name] = ""
        return found

    def read_name(self, name: str) -> str:
        """Return the stem that a name stands for.

        Raises:
            CacheMiss: there is no such name.
        """
        path = self.directory / NAMES / check_name(name)
        try:
            with contextlib.closing(Reader(path)) as reader:
                stem = reader.read(0, LONGEST_NAME_BYTES * 2).decode("ascii").rstrip("\n")
        except CacheMiss:
            raise CacheMiss(
                f"there is no state named {name!r}; `list` shows those that are"
            ) from None
        except UnicodeDecodeError:
            raise DamagedFile(f"the name {name!r} is damaged") from None
        if not STEM.fullmatch(stem):
            raise DamagedFile(f"the name {name!r} is damaged")
        return stem

    def write_name(self, name: str, stem: str, *, sync: bool = False) -> None:
        """Let a name stand for a stem, atomically; it may have stood for another before.

        Raises:
            StoreError: the name cannot be one, or the file system refuses.
        """
        path = self.directory / NAMES / check_name(name)
        with _told(f"cannot write to the store {self.directory}"):
            write_once(path, [stem.encode() + b"\n"], sync=sync, replace=True)

    def remove_name(self, name: str) -> None:
        """Delete a name; what it stands for stays. The caller holds `exclusive()`."""
        with _told(f"cannot delete from the store {self.directory}"):
            (self.directory / NAMES / check_name(name)).unlink(missing_ok=True)

    # Statistics

    def record_use(self, use: dict[str, Any]) -> None:
        """Append a line to the statistics. Failing is no matter."""
        line = json.dumps(use, separators=(",", ":")) + "\n"
        with contextlib.suppress(OSError):
            fd = os.open(self.directory / USES, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                os.write(fd, line.encode())
            finally:
                os.close(fd)

    def record_write(self, count: int) -> None:
        """Note that so many bytes were written now. Failing is no matter."""
        if count:
            self.record_use({"when": round(time.time(), 3), "wrote": count})

    def shorten_uses(self) -> None:
        """Forget the older half of long statistics. The caller holds `exclusive()`. Failing is no
        matter.
        """
        path = self.directory / USES
        with contextlib.suppress(OSError):
            if path.stat().st_size > MOST_STATISTICS_BYTES:
                lines = path.read_bytes().splitlines(keepends=True)
                write_once(path, lines[len(lines) // 2 :], sync=False, replace=True)

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
            lines = (self.directory / USES).read_bytes().splitlines()
        except OSError:
            return
        for line in lines:
            try:
                use = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(use, dict):
                yield use


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
            f"{name!r} cannot be a name: use letters, digits, spaces, '.', '_' and '-', "
            "and begin with a letter or a digit"
        )
    return name


def _entries(directory: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as entries:
            return list(entries)
    except OSError:
        return []


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise StoreError(f"{what}: {exc.strerror}") from exc
