"""Mapped: the tensors of a file of weights where the system has it in memory, and not read again.

On a CPU MLX reads weights into memory of its own: of 538 MB that is 131,000 page faults, 0.3 s of
the processor, and as much memory again as the system's page cache takes for the file. Here the file
is mapped (`mmap(2)`, private), as llama.cpp maps its own and PyTorch those of safetensors, over the
memory of one array of MLX, and tensors are views of that array. Whoever writes to one gets pages of
his own; the file does not change.

As with them, a file that is overwritten in its place while it is in use is seen by the process, and
one that is cut short ends it. A file that is replaced, as the Hub's client and `mv` do, is not.

MLX takes memory from `malloc`, and gives it back there. glibc's unmaps a piece as large as this
one, and with it what is mapped over it; what another allocator would do with it is not known. So
this is for Linux, glibc and MLX with nothing but a CPU. Everywhere else, and for all files that are
not as expected, `mx.load` reads.
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

if TYPE_CHECKING:
    from collections.abc import Callable

LEAST_BYTES = 64 << 20  # twice what glibc may take from a heap, where nothing is unmapped alone
LARGEST_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
COPIED_BYTES = 1 << 16  # tensors of fewer are copied: norms, biases, scales
WORD = 8  # bytes: files are larger than 2 GiB, and ...
MOST_ITEMS = (1 << 31) - 1  # ... MLX counts what is along an axis with 31 bits
AT_ONCE = 32 << 20  # bytes that are touched by one operation
SHOWN_BYTES = 1 << 16  # Linux's `fault_around_bytes`
MAP_FIXED = 0x10  # these two: Linux, on all processors that MLX runs on
MADV_SEQUENTIAL = 2
DTYPES = {
    "F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16,
    "I8": mx.int8, "I16": mx.int16, "I32": mx.int32, "I64": mx.int64,
    "U8": mx.uint8, "U16": mx.uint16, "U32": mx.uint32, "U64": mx.uint64,
}  # fmt: skip
UNREADABLE = (OSError, RuntimeError, LookupError, TypeError, ValueError, RecursionError)


class MappedFiles:
    """Reads files as `mx.load` does, and maps those that can be mapped."""

    def __init__(self) -> None:
        self._mapped: list[tuple[Path, os.stat_result]] = []
        self._touched: list[mx.array] = []

    def load(self, file: Any, *args: Any, **kwargs: Any) -> Any:
        """`mx.load(file, ...)`; the arrays of a file that was mapped are not evaluated.

        Raises:
            RuntimeError: as `mx.load`.
        """
        libc = _libc() if isinstance(file, str) and not (args or kwargs) else None
        if libc is None:
            return mx.load(file, *args, **kwargs)
        try:
            with Path(file).open("rb", buffering=0) as opened:
                mapping = _Mapping(opened.fileno(), libc)
            arrays = mapping.tensors()
        except UNREADABLE:  # `mx.load` says what is wrong with it, if anything is
            return mx.load(file)
        self._mapped.append((Path(file), mapping.file))
        self._touched += mapping.touched()
        return arrays

    def touched(self) -> list[mx.array]:
        """What is to be evaluated, once and piece by piece, for the system to show all that is
        mapped before it is used: then who computes with it need not wait for each page.
        """
        touched, self._touched = self._touched, []
        return touched

    def changed(self) -> bool:
        """Whether a file that is mapped was written to. One that was replaced by another stays what
        it was for whoever has it mapped.
        """
        return any(_was_written_to(*known) for known in self._mapped)


class _Mapping:
    """A safetensors file over the memory of an array, which has room for it from one page on."""

    def __init__(self, fd: int, libc: Any) -> None:
        self.file = os.fstat(fd)
        self._size = self.file.st_size
        self._head = _head(fd, self._size)
        mmap.mmap(fd, self._size, mmap.MAP_PRIVATE).close()  # an error over an array leaves a hole
        words = -(-self._size // WORD) + 2 * mmap.PAGESIZE // WORD
        if words > MOST_ITEMS:
            raise ValueError("the file is too large for one array")
        self._address, self._shift = 0, 0
        self._array = _left_as_it_is(words, functools.partial(self._map, fd, libc))
        if _address(memory_of(self._array)) + self._shift != self._address:
            raise ValueError("MLX has copied what was mapped")

    def _map(self, fd: int, libc: Any, memory: memoryview) -> None:
        """Map the file over the pages that begin in this memory."""
        begin = _address(memory)
        self._address = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
        self._shift = self._address - begin
        if self._shift + self._size + mmap.PAGESIZE > len(memory) or self._shift % WORD:
            raise ValueError("there is no room for the file")
        kind, access = mmap.MAP_PRIVATE | MAP_FIXED, mmap.PROT_READ | mmap.PROT_WRITE
        if libc.mmap(self._address, self._size, access, kind, fd, 0) != self._address:
            raise OSError("the file cannot be mapped")
        libc.madvise(self._address, self._size, MADV_SEQUENTIAL)

    def touched(self) -> list[mx.array]:
        """See `MappedFiles.touched`: a page fault shows 64 KiB of a file, and unlike a system call
        for all of them it lets other threads of the process have memory meanwhile.
        """
        begin, behind = self._shift // WORD, (self._shift + self._size) // WORD
        count, step = AT_ONCE // WORD, SHOWN_BYTES // WORD
        return [
            mx.max(self._array[i : min(i + count, behind) : step])
            for i in range(begin, behind, count)
        ]

    def tensors(self) -> dict[str, mx.array]:
        """The tensors of the file by their names: views, not evaluated.

        Raises:
            LookupError, TypeError, ValueError: its header is not as expected.
        """
        length, table = self._head
        rows = {name: row for name, row in table.items() if name != "__metadata__"}
        return {name: self._tensor(8 + length, row) for name, row in rows.items()}

    def _tensor(self, data: int, row: Any) -> mx.array:
        dtype, shape = DTYPES[row["dtype"]], [int(n) for n in row["shape"]]
        begin, end = (data + int(offset) for offset in row["data_offsets"])
        if not data <= begin <= end <= self._size or min(shape, default=0) < 0:
            raise ValueError("a tensor is not inside the file")
        if end - begin != math.prod(shape) * dtype.size:
            raise ValueError("a tensor is not as long as its shape says")
        begin, end = begin + self._shift, end + self._shift
        if end - begin < COPIED_BYTES:
            return _copied(memory_of(self._array)[begin:end], dtype).reshape(shape)
        words, skipped = self._array[begin // WORD : -(-end // WORD)], begin % WORD
        # Files that MLX wrote begin their tensors anywhere, also where no number should begin.
        unit = dtype if skipped % dtype.size == 0 else mx.uint8
        if words.size * WORD // unit.size > MOST_ITEMS:
            raise ValueError("a tensor is too large for one axis")
        first, items = skipped // unit.size, (end - begin) // unit.size
        return words.view(unit)[first : first + items].view(dtype).reshape(shape)


class _Shown:
    """A file that MLX may believe to read `words` words of 8 bytes from: `show` gets the memory for
    them, which is left as it is. MLX has no other array that it does not write to.

    Its head is that of NumPy's format, version 1.0.
    """

    closed = False

    def __init__(self, words: int, show: Callable[[memoryview], None]) -> None:
        told = f"{{'descr': '<u8', 'fortran_order': False, 'shape': ({words},), }}"
        text = told.encode().ljust(117) + b"\n"  # all before the data are 128 bytes
        self._head = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text
        self._bytes = words * WORD
        self._at = 0
        self._show = show
        self.failed: Exception | None = None

    def readable(self) -> bool:
        return True

    def read(self, _: int = -1) -> bytes:
        raise OSError("it is read into memory only")

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        begin = {os.SEEK_CUR: self._at, os.SEEK_END: len(self._head) + self._bytes}
        self._at = begin.get(whence, 0) + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        memory = memoryview(buffer).cast("B")
        size, at = len(memory), self._at
        self._at += size
        if self._at <= len(self._head):
            memory[:] = self._head[at : at + size]
        else:  # by a thread of MLX, which has nobody to raise an error for
            try:
                if (at, size) != (len(self._head), self._bytes):
                    raise OSError("other bytes were asked for than all of the data")
                self._show(memory)
            except Exception as exc:  # noqa: BLE001 - whatever it is, `_left_as_it_is` raises it
                self.failed = exc
        return size


def _left_as_it_is(words: int, show: Callable[[memoryview], None]) -> mx.array:
    """An array of so many words whose memory nobody has written to but `show`.

    Raises:
        Exception: what `show` raised.
    """
    shown = _Shown(words, show)
    array: Any = mx.load(shown, format="npy")  # type: ignore[arg-type]
    mx.eval(array)
    if shown.failed is not None:
        raise shown.failed
    return array  # type: ignore[no-any-return]


def _was_written_to(path: Path, known: os.stat_result) -> bool:
    try:
        now = path.stat()
    except OSError:
        return False
    same = (now.st_dev, now.st_ino) == (known.st_dev, known.st_ino)
    return same and (now.st_size, now.st_mtime_ns) != (known.st_size, known.st_mtime_ns)


def _copied(memory: Any, dtype: mx.Dtype) -> mx.array:
    return mx.array(memory).view(dtype) if memory else mx.zeros((0,), dtype)


def _head(fd: int, size: int) -> tuple[int, dict[str, Any]]:
    """The length of a safetensors header, and what it tells of tensors.

    Raises:
        TypeError, ValueError: there is none, or the file is small.
    """
    length = int.from_bytes(os.pread(fd, 8, 0), "little")
    if size < LEAST_BYTES or length > min(size - 8, LARGEST_HEADER_BYTES):
        raise ValueError("not a large file of tensors")
    table = json.loads(os.pread(fd, length, 8))
    if not isinstance(table, dict):
        raise TypeError("not a table of tensors")
    return length, table


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
    libc.mmap.restype = address
    libc.mmap.argtypes = [address, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.madvise.argtypes = [address, ctypes.c_size_t, ctypes.c_int]
    return libc if mallocs[0] == mallocs[1] else None


def _address(memory: memoryview) -> int:
    import ctypes

    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
