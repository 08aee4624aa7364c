"""Stands between the package and the operating system: sees each call for files beneath one
directory, and can let calls fail.
"""

from __future__ import annotations

import errno
import fcntl
import io
import os
import pathlib
import re
import threading
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Call_ = Callable[..., Any]

ONE_PATH = (
    "access", "chmod", "listdir", "lstat", "mkdir", "open", "readlink", "remove", "rmdir",
    "scandir", "stat", "statvfs", "symlink", "truncate", "unlink", "utime",
)  # fmt: skip
TWO_PATHS = ("link", "rename", "replace")
DESCRIPTORS = (
    "close", "fchmod", "fdatasync", "fstat", "fsync", "ftruncate", "pread", "preadv", "pwrite",
    "read", "write",
)  # fmt: skip
LOCKS = ("fcntl", "flock")
RANDOM = re.compile(r"\.tmp-[^/]+|(?<=\.)[0-9a-f]{8}(?=\.safetensors)")  # parts of names

HALF = 0  # in place of an error: only half of the bytes are written or read
READING = (errno.EIO, HALF)
WRITING = (errno.ENOSPC, errno.EIO, HALF)
MAKING = (errno.ENOSPC, errno.EIO, errno.EACCES)
LOOKING = (errno.EIO, errno.EACCES)
LISTING = (errno.EIO, errno.EACCES, errno.EMFILE)
FAILURES: dict[str, tuple[int, ...]] = {
    "access": LOOKING, "chmod": LOOKING, "lstat": LOOKING, "stat": LOOKING, "utime": LOOKING,
    "readlink": LOOKING, "rmdir": LOOKING, "remove": LOOKING, "unlink": LOOKING,
    "listdir": LISTING, "scandir": LISTING, "open": LISTING, "create": (*MAKING, errno.EMFILE),
    "link": MAKING, "mkdir": MAKING, "rename": MAKING, "replace": MAKING, "symlink": MAKING,
    "pread": READING, "preadv": READING, "read": READING, "write": WRITING, "pwrite": WRITING,
    "fstat": (errno.EIO,), "statvfs": (errno.EIO,), "fchmod": LOOKING,
    "fsync": (errno.EIO, errno.ENOSPC), "fdatasync": (errno.EIO, errno.ENOSPC),
    "truncate": (errno.EIO,), "ftruncate": (errno.EIO,), "fcntl": (errno.EIO,),
    "flock": (errno.ENOLCK, errno.EIO),
    "close": (), "close written": (errno.EIO, errno.ENOSPC),
}  # fmt: skip


class Call(NamedTuple):
    """A call that was made: the `turn`-th one of this function for this path.

    `create` is an `open` that may make the file, and `close written` the `close` after a `write`.
    Paths are relative to the directory, and what is drawn at random in names is `*`.
    """

    function: str
    path: str
    turn: int

    def __str__(self) -> str:
        return f"{self.function} {self.path} ({self.turn})"


class Done(NamedTuple):
    """A call that was done, as it was: `other` is the second path, or the bytes of a write."""

    function: str
    path: str
    other: Any = None


@dataclass(frozen=True)
class Fault:
    """A call that fails with this error; with `stays` so does each later one that can."""

    call: Call
    error: int
    stays: bool = False

    def __str__(self) -> str:
        what = errno.errorcode[self.error] if self.error else "half"
        return f"{what}{' from' if self.stays else ' at'} {self.call}"


def faults(calls: list[Call]) -> Iterator[Fault]:
    """Each of these calls with each error that it can have, and with the first of them to stay."""
    for call in calls:
        for number, error in enumerate(FAILURES[call.function]):
            yield Fault(call, error)
            if number == 0 and error != HALF:
                yield Fault(call, error, stays=True)


class Shim:
    """While this lasts: the calls for files beneath a directory, and for what was opened there.

    `calls` are those that were made, `done` those that were not let fail, `met` whether the fault
    was, and `open` the descriptors that are open, with their paths.
    """

    def __init__(self, directory: Path, fault: Fault | None = None) -> None:
        self._root = str(directory)
        self._fault = fault
        self._counts: Counter[tuple[str, str]] = Counter()
        self._written: set[int] = set()
        self._original: list[tuple[Any, str, Any]] = []
        self._lock = threading.Lock()
        self.calls: list[Call] = []
        self.done: list[Done] = []
        self.met = False
        self.open: dict[int, str] = {}

    def __enter__(self) -> Shim:
        for name in ONE_PATH:
            self._replace(os, name, self._of_path(name, getattr(os, name)))
        for name in TWO_PATHS:
            self._replace(os, name, self._of_paths(name, getattr(os, name)))
        for name in DESCRIPTORS:
            self._replace(os, name, self._of_descriptor(name, getattr(os, name)))
        for name in LOCKS:
            self._replace(fcntl, name, self._of_descriptor(name, getattr(fcntl, name)))
        self._replace(io, "open", self._of_stream(io.open))
        return self

    def __exit__(self, *_: object) -> None:
        for owner, name, original in reversed(self._original):
            setattr(owner, name, original)
        self._original.clear()

    def _replace(self, owner: Any, name: str, call: Call_) -> None:
        self._original.append((owner, name, getattr(owner, name)))
        setattr(owner, name, call)
        accessor = getattr(pathlib, "_NormalAccessor", None)  # Python 3.10 took its own copies
        if owner is os and hasattr(accessor, name):
            self._original.append((accessor, name, accessor.__dict__[name]))
            setattr(accessor, name, staticmethod(call))

    def _where(self, path: Any, directory: int | None = None) -> str | None:
        """The whole path, if it is beneath the directory."""
        if isinstance(path, int):
            return self.open.get(path)
        text = os.fsdecode(path)
        if directory is not None:
            text = f"{self.open.get(directory, '')}/{text}"
        text = os.path.abspath(text)  # noqa: PTH100 - a Path asks the system
        return text if f"{text}/".startswith(f"{self._root}/") else None

    # What is called in place of the functions

    def _of_path(self, name: str, original: Call_) -> Call_:
        def call(path: Any = ".", *args: Any, **more: Any) -> Any:
            where = self._where(path, more.get("dir_fd"))
            if where is None:
                return original(path, *args, **more)
            made = "create" if name == "open" and args and args[0] & os.O_CREAT else name
            self._begin(made, where)
            result = original(path, *args, **more)
            if name == "open":
                self.open[result] = where
            self.done.append(Done(made, where))
            return _Listing(self, where, result) if name == "scandir" else result

        return call

    def _of_paths(self, name: str, original: Call_) -> Call_:
        def call(path: Any, target: Any, **more: Any) -> Any:
            where = self._where(path, more.get("src_dir_fd"))
            other = self._where(target, more.get("dst_dir_fd"))
            if other is None:
                return original(path, target, **more)
            self._begin(name, other)
            result = original(path, target, **more)
            self.done.append(Done(name, str(where), other))
            return result

        return call

    def _of_descriptor(self, name: str, original: Call_) -> Call_:
        def call(fd: Any, *args: Any, **more: Any) -> Any:
            where = self.open.get(fd)
            if where is None:
                return original(fd, *args, **more)
            if name == "close":
                return self._close(fd, where, original)
            half = self._begin(name, where)
            if half:
                args = (_half(args[0]), *args[1:])
            result = original(fd, *args, **more)
            written = None
            if name == "write":
                self._written.add(fd)
                written = bytes(memoryview(args[0])[:result])
            self.done.append(Done(name, where, written))
            return result

        return call

    def _close(self, fd: int, where: str, original: Call_) -> None:
        """Close a file; it is closed, too, if that fails."""
        with self._lock:
            del self.open[fd]
            written = fd in self._written
            self._written.discard(fd)
        original(fd)
        self._begin("close written" if written else "close", where)

    def _of_stream(self, original: Call_) -> Call_:
        def call(path: Any, mode: str = "r", *args: Any, **more: Any) -> Any:
            if isinstance(path, int) or self._where(path) is None:
                return original(path, mode, *args, **more)
            assert mode == "rb", f"no file of a store is opened with {mode!r}"
            return io.BufferedReader(_Stream(os.open(path, os.O_RDONLY)))

        return call

    def _begin(self, function: str, where: str) -> bool:
        """Note a call; raise if it is to fail, and return whether it is to do only half."""
        path = RANDOM.sub("*", os.path.relpath(where, self._root))
        with self._lock:
            self._counts[function, path] += 1
            call = Call(function, path, self._counts[function, path])
            self.calls.append(call)
            if not self._fails(call):
                return False
            self.met = True
        assert self._fault is not None
        if self._fault.error == HALF:
            return True
        raise OSError(self._fault.error, os.strerror(self._fault.error), where)

    def _fails(self, call: Call) -> bool:
        fault = self._fault
        if fault is None:
            return False
        later = fault.stays and self.met and fault.error in FAILURES[call.function]
        return later or call == fault.call


def _half(what: Any) -> Any:
    """Half of what was to be written, or of the room or the number of bytes to be read."""
    if isinstance(what, int):
        return (what + 1) // 2
    if isinstance(what, list):
        return [memoryview(what[0])[: (len(what[0]) + 1) // 2]]
    return memoryview(what)[: (len(what) + 1) // 2]


class _Stream(io.RawIOBase):
    """An open file, read by the functions of `os`."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def readable(self) -> bool:
        return True

    def readinto(self, room: Any) -> int:
        data = os.read(self._fd, len(room))
        room[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            super().close()
            os.close(self._fd)


class _Listing:
    """What `scandir` returns."""

    def __init__(self, shim: Shim, where: str, entries: Any) -> None:
        self._shim, self._where, self._entries = shim, where, entries

    def __enter__(self) -> _Listing:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> _Listing:
        return self

    def __next__(self) -> _Entry:
        return _Entry(self._shim, self._where, next(self._entries))

    def close(self) -> None:
        self._entries.close()


class _Entry:
    """An entry of a listing, whose `stat` is a call like any other."""

    def __init__(self, shim: Shim, where: str, entry: Any) -> None:
        self._shim, self._where, self._entry = shim, where, entry

    def __getattr__(self, name: str) -> Any:
        return getattr(self._entry, name)

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        self._shim._begin("stat", f"{self._where}/{self._entry.name}")
        status: os.stat_result = self._entry.stat(follow_symlinks=follow_symlinks)
        return status
