"""Files of a store: written once and whole, read without a trace, synced to the drive."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
import sys
from typing import TYPE_CHECKING, NamedTuple

from mlx_promptcache import container, privacy
from mlx_promptcache.errors import CacheMiss, StoreError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable
    from pathlib import Path

TEMPORARY = ".tmp-"
SUFFIX = ".safetensors"
STEM = re.compile(r"[0-9a-f]{2}/[0-9a-f-]{1,200}")  # of a container, below its kind
SETTLED_NS = 2_000_000_000  # what was just written may change within one tick of its times
BLOCK_BYTES = 512  # the unit of st_blocks, whatever the file system's own blocks are
NO_LINKS = {
    errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS, errno.EINVAL,
    errno.EACCES,
}  # fmt: skip
NO_ATIME: int = getattr(os, "O_NOATIME", 0)  # Linux only
FULL_FSYNC = 51  # F_FULLFSYNC of macOS's <fcntl.h>: the drive's own cache too


class File(NamedTuple):
    """What the file system says of a file."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    last_use: float  # seconds since the epoch
    on_disk: int  # bytes that the drive gave for it

    @property
    def stamp(self) -> tuple[int, ...]:
        """While this stays the same, so do the bytes: only the system sets `ctime_ns`."""
        return self[:4]

    @classmethod
    def of(cls, status: os.stat_result) -> File:
        """From the answer of `stat`."""
        return cls(
            status.st_size,
            status.st_mtime_ns,
            status.st_ctime_ns,
            status.st_ino,
            max(status.st_atime, status.st_mtime),
            on_disk(status),
        )


def on_disk(status: os.stat_result) -> int:
    """Bytes that the drive gave for a file, at least those in it: some file systems give blocks
    later than bytes, and some pack small files.
    """
    return max(status.st_size, status.st_blocks * BLOCK_BYTES)


class Reader:
    """A file of the store, open for reading. It stays whole while it is open, deleted or not.

    What belongs to none of the `users` is not read.
    """

    def __init__(self, path: str | Path, users: Collection[int]) -> None:
        try:
            self._fd = _open_unnoticed(path)
        except FileNotFoundError:
            raise CacheMiss("a file that is needed is not there") from None
        except OSError as exc:
            raise StoreError(f"a file of the store cannot be read: {exc.strerror}") from exc
        try:
            self._status = os.fstat(self._fd)
        except OSError as exc:
            os.close(self._fd)
            raise StoreError(f"a file of the store cannot be read: {exc.strerror}") from exc
        self.file = File.of(self._status)
        """The file as it was opened; when it is closed, as it is left."""
        self.size = self.file.size
        wrong = None
        if not stat.S_ISREG(self._status.st_mode):  # a pipe would be waited for without end
            wrong = "a file of the store is something else than a file"
        elif self._status.st_uid not in users:
            wrong = "a file of the store belongs to another user"
        if wrong is not None:
            os.close(self._fd)
            raise StoreError(wrong)

    def close(self) -> None:
        """Close the file."""
        if not NO_ATIME:  # looking is not using
            with contextlib.suppress(OSError):
                os.utime(self._fd, ns=(self._status.st_atime_ns, self._status.st_mtime_ns))
                self.file = File.of(os.fstat(self._fd))
        os.close(self._fd)

    def read(self, offset: int, length: int) -> bytes:
        """Return up to `length` bytes from `offset`; fewer only at the end of the file.

        Raises:
            StoreError: the file system refuses.
        """
        length = max(0, min(length, self.size - offset))
        chunks = []
        while length:
            try:
                chunk = os.pread(self._fd, length, offset)
            except OSError as exc:
                raise StoreError(f"a file of the store cannot be read: {exc.strerror}") from exc
            if not chunk:
                break
            chunks.append(chunk)
            offset += len(chunk)
            length -= len(chunk)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def read_into(self, offset: int, memory: memoryview) -> int:
        """Read from `offset` into memory, and return how many bytes that were: fewer than there is
        room for only at the end of the file.

        Raises:
            StoreError: the file system refuses.
        """
        done = 0
        while done < len(memory):
            try:
                count = os.preadv(self._fd, [memory[done:]], offset + done)
            except OSError as exc:
                raise StoreError(f"a file of the store cannot be read: {exc.strerror}") from exc
            if not count:
                break
            done += count
        return done

    def header(self) -> container.Header:
        """Return the file's header, checked.

        Raises:
            DamagedFile: it is not the one that was written.
        """
        return container.read_header(self.read, self.size)


def _open_unnoticed(path: str | Path) -> int:
    """Open a file to read, and let its atime be."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        return os.open(path, flags | NO_ATIME)
    except PermissionError:  # only the owner may leave no trace
        return os.open(path, flags)


def write_once(
    path: Path, chunks: Iterable[bytes | memoryview], *, sync: bool, replace: bool = False
) -> bool:
    """Write a file under a name that is not taken, or with `replace` in place of another; return
    whether that was done. It appears whole or not at all, and nothing is left behind.

    With `sync` its bytes and its name are on the drive when this returns.

    Raises:
        OSError: the file system refuses.
    """
    if not replace and path.exists():
        return False
    temporary = path.parent / f"{TEMPORARY}{os.getpid()}-{os.urandom(6).hex()}"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, privacy.FILE)
    try:
        try:
            os.fchmod(fd, privacy.FILE)  # whatever the umask took
            for chunk in chunks:
                _write_all(fd, chunk)
            if sync:
                sync_file(fd)
        finally:
            os.close(fd)
        if replace:
            temporary.replace(path)
        elif not _link(temporary, path):
            return False
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    if sync:
        sync_directory(path.parent)
    return True


def _write_all(fd: int, chunk: bytes | memoryview) -> None:
    view = memoryview(chunk)
    while view:
        view = view[os.write(fd, view) :]


def _link(temporary: Path, path: Path) -> bool:
    """Give the file its name unless the name is taken: the first writer wins."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as exc:
        if exc.errno not in NO_LINKS:
            raise
        # A file system without hard links. Between these two lines another writer may win the
        # name and be replaced by a file of equal worth.
        if path.exists():
            return False
        temporary.rename(path)
    return True


def sync_file(fd: int) -> None:
    """Return when the bytes of an open file are on the drive."""
    if sys.platform == "darwin":
        with contextlib.suppress(OSError):
            fcntl.fcntl(fd, FULL_FSYNC)
            return
    os.fsync(fd)


def sync_directory(directory: Path) -> None:
    """Return when the names in a directory are on the drive."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
