"""Mapped: the tensors of a file of weights where the system has it in memory, and not read again.

On a CPU MLX reads weights into memory of its own: of 538 MB that is 131,000 page faults, 0.3 s of
the processor, and as much memory again as the system's page cache takes for the file. Here the file
is mapped (`mmap(2)`, private), as llama.cpp maps its own and PyTorch those of safetensors, over the
memory of one array of MLX, and tensors are views of that array. Whoever writes to one gets pages of
his own; the file does not change.

As with them, a file that is overwritten in its place while it is in use is seen by the process, and
one that is cut short, or that the drive cannot read, ends it. A file that is replaced, as the Hub's
client and `mv` do it, stays what it was for whoever has it mapped.

Linux keeps files in pieces of up to 2 MiB where the file system lets it: of what is read through
such a mapping, and of what was written in as large pieces, as a download is. If its address is as
far from a multiple of 2 MiB as its place in the file each is one page fault, and not 32 or 512.

When the last view is gone MLX gives the memory to `free`, and glibc unmaps a piece of that size,
with all that is mapped there. Where that is not known, files are not mapped: with another `malloc`,
with one that was told to take such pieces from the heap, with a cache of MLX that would keep them,
beside an accelerator, and on other systems than Linux. `mx.load` reads these files, those of less
than 64 MiB or more than 16 GiB, with tensors of rare types, and all that are not as expected.
"""

from __future__ import annotations

import functools
import json
import math
import mmap
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_promptcache.arrays import memory_of
from mlx_promptcache.container import LARGEST_HEADER_BYTES
from mlx_promptcache.files import SUFFIX
from mlx_promptcache.unwritten import WORD, unwritten

if TYPE_CHECKING:
    from collections.abc import Iterable

LEAST_BYTES = 64 << 20  # what glibc never takes from the heaps of threads
COPIED_BYTES = 1 << 16  # tensors of no more are copied: norms, biases
MOST_ITEMS = (1 << 31) - 1  # along an axis of MLX's
SHOWN_BYTES = 1 << 16  # by a page fault: Linux's `fault_around_bytes`
HUGE_PAGE = 1 << 21  # of Linux where pages have 4 KiB
MAP_FIXED = 0x10  # these: of Linux, on all processors that MLX runs on
MADV_SEQUENTIAL, MADV_HUGEPAGE = 2, 14
DTYPES = {
    "F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16,
    "I8": mx.int8, "I16": mx.int16, "I32": mx.int32, "I64": mx.int64,
    "U8": mx.uint8, "U16": mx.uint16, "U32": mx.uint32, "U64": mx.uint64,
}  # fmt: skip


class MappedFiles:
    """Reads files as `mx.load` does, and maps those that can be mapped."""

    def __init__(self) -> None:
        self._mapped: list[tuple[Path, os.stat_result]] = []
        self._touches: dict[int, tuple[mx.array, mx.array]] = {}

    def load(self, file: Any, *args: Any, **kwargs: Any) -> Any:
        """`mx.load(file, ...)`; the arrays of a file that was mapped are not evaluated.

        Raises:
            RuntimeError: as `mx.load`.
        """
        usual = isinstance(file, str) and file.endswith(SUFFIX) and not (args or kwargs)
        libc = _libc() if usual else None
        if libc is None:
            return mx.load(file, *args, **kwargs)
        path = Path(file).absolute()
        try:
            with path.open("rb", buffering=0) as opened:
                mapping = _Mapping(opened.fileno(), libc)
                found = mapping.tensors(opened.fileno())
        except Exception:  # noqa: BLE001 - whatever it is, `mx.load` says what is wrong, if anything
            return mx.load(file)
        self._mapped.append((path, mapping.file))
        self._touches.update((id(array), (array, touch)) for array, touch in found.values())
        return {name: array for name, (array, _) in found.items()}

    def touches(self, used: Iterable[mx.array]) -> list[mx.array]:
        """What is to be evaluated, once, for the system to show tensors that are `used` before they
        are: then who computes with them need not wait for each page. Forgets all others.
        """
        known, self._touches = self._touches, {}
        return [known[id(array)][1] for array in used if id(array) in known]

    def changed(self) -> bool:
        """Whether a file that was mapped may have been written to since."""
        return any(_is_changed(*known) for known in self._mapped)


class _Mapping:
    """A safetensors file of `size` bytes over the memory of an array, from its byte `shift` on."""

    def __init__(self, fd: int, libc: Any) -> None:
        self.file = os.fstat(fd)
        self._size = self.file.st_size
        self._data, self._table = _head(fd, self._size)
        self._libc = libc
        with mmap.mmap(fd, self._size, mmap.MAP_PRIVATE):
            pass  # what fails later, over an array, may leave a hole there
        words = -(-(self._size + HUGE_PAGE + mmap.PAGESIZE) // WORD)
        if words > MOST_ITEMS or _keeps_freed(words * WORD):
            raise ValueError("the file is too large")
        self._address, self._shift = 0, 0
        self._array = unwritten(words, functools.partial(self._map, fd))
        if _address(memory_of(self._array)) + self._shift != self._address:
            raise ValueError("MLX has copied what was mapped")

    def _map(self, fd: int, memory: memoryview) -> None:
        """Map the file over the huge pages that begin in this memory."""
        begin = _address(memory)
        if begin < self._libc.sbrk(0):  # nothing at all, or of the heap
            raise ValueError("free() would not unmap the file")
        self._address = -(-begin // HUGE_PAGE) * HUGE_PAGE
        self._shift = self._address - begin
        if self._shift + self._size + mmap.PAGESIZE > len(memory):
            raise ValueError("there is no room for the file")
        kind, access = mmap.MAP_PRIVATE | MAP_FIXED, mmap.PROT_READ | mmap.PROT_WRITE
        if self._libc.mmap(self._address, self._size, access, kind, fd, 0) != self._address:
            raise OSError("the file cannot be mapped")
        if self._libc.madvise(self._address, self._size, MADV_HUGEPAGE):
            self._libc.madvise(self._address, self._size, MADV_SEQUENTIAL)

    def tensors(self, fd: int) -> dict[str, tuple[mx.array, mx.array]]:
        """The tensors by their names, not evaluated, each with what touches its pages; `fd` is the
        file, open.

        Raises:
            Exception: the header is not as expected.
        """
        rows = {name: row for name, row in self._table.items() if name != "__metadata__"}
        return {name: self._tensor(fd, row) for name, row in rows.items()}

    def _tensor(self, fd: int, row: Any) -> tuple[mx.array, mx.array]:
        dtype, shape, (first, last) = DTYPES[row["dtype"]], row["shape"], row["data_offsets"]
        if any(type(n) is not int or n < 0 for n in (*shape, first, last)):
            raise TypeError("a tensor has no shape, or no place")
        if last > self._size - self._data or last - first != math.prod(shape) * dtype.size:
            raise ValueError("a tensor is not where its shape says")
        begin, end = (self._shift + self._data + offset for offset in (first, last))
        if end - begin <= COPIED_BYTES:
            # Not from the mapping: its page faults are for others to wait for.
            copied = _copied(os.pread(fd, last - first, self._data + first), dtype).reshape(shape)
            return copied, copied
        words, skipped = self._array[begin // WORD : -(-end // WORD)], begin % WORD
        # Files that MLX wrote begin their tensors anywhere, also where no number should begin.
        unit = dtype if skipped % dtype.size == 0 else mx.uint8
        if words.size * WORD // unit.size > MOST_ITEMS:
            raise ValueError("a tensor is too large for one axis")
        at, items = skipped // unit.size, (end - begin) // unit.size
        tensor = words.view(unit)[at : at + items].view(dtype).reshape(shape)
        # A page fault lets other threads have memory meanwhile, unlike a system call for all pages.
        return tensor, mx.max(words[:: SHOWN_BYTES // WORD])


def _copied(data: bytes, dtype: mx.Dtype) -> mx.array:
    memory: Any = memoryview(data)
    return mx.array(memory).view(dtype) if data else mx.zeros((0,), dtype)


def _head(fd: int, size: int) -> tuple[int, dict[str, Any]]:
    """Where the data of a safetensors file begin, and what its header tells of tensors.

    Raises:
        ValueError: there is no header, or the file is small.
    """
    length = int.from_bytes(os.pread(fd, 8, 0), "little")
    if size < LEAST_BYTES or length >= LARGEST_HEADER_BYTES:
        raise ValueError("not a large file of tensors")
    table: dict[str, Any] = json.loads(os.pread(fd, length, 8).decode())
    return 8 + length, table


def _is_changed(path: Path, known: os.stat_result) -> bool:
    try:
        now = path.stat()
    except OSError:
        return False
    replaced = (now.st_dev, now.st_ino) != (known.st_dev, known.st_ino)
    return not replaced and now.st_ctime_ns != known.st_ctime_ns


def _keeps_freed(size: int) -> bool:
    """Whether MLX would keep freed memory of so many bytes for other arrays."""
    limit = mx.set_cache_limit(1 << 62)  # it tells the former one
    mx.set_cache_limit(limit)
    return limit >= size


@functools.cache
def _libc() -> Any:
    """glibc, where its `malloc` is the one that MLX uses, and MLX computes on a CPU only."""
    accelerated = mx.metal.is_available() or mx.cuda.is_available()
    if sys.platform != "linux" or accelerated or mx.default_device() != mx.Device(mx.cpu):
        return None
    try:
        import ctypes

        libc, here = ctypes.CDLL("libc.so.6"), ctypes.CDLL(None)
        address = ctypes.c_void_p
        mallocs = [ctypes.cast(library.malloc, address).value for library in (libc, here)]
        libc.gnu_get_libc_version  # noqa: B018 - musl has none
    except (ImportError, OSError, AttributeError):
        return None
    libc.mmap.restype = libc.sbrk.restype = address
    libc.mmap.argtypes = [address, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.madvise.argtypes = [address, ctypes.c_size_t, ctypes.c_int]
    libc.sbrk.argtypes = [ctypes.c_long]
    return libc if mallocs[0] == mallocs[1] else None


def _address(memory: memoryview) -> int:
    import ctypes

    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
