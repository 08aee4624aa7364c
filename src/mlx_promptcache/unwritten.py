"""Unwritten: arrays of MLX whose memory nobody has written to.

MLX has no such array: `mx.empty` is `mx.zeros` (0.32). But it reads files into fresh memory, also
from a Python object, which may leave that memory as it is. So a file can be mapped over it
(`mapped.py`), or it is written to where it is used (`rows.py`): writing zeros before would take as
long.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import mlx.core as mx

if TYPE_CHECKING:
    from collections.abc import Callable

WORD = 8  # bytes of an item: MLX counts what is along an axis with 31 bits


def unwritten(words: int, show: Callable[[memoryview], None] = lambda _: None) -> mx.array:
    """An array of so many words of 64 bits, evaluated, whose memory nobody has written to but
    `show`: it may hold anything.

    Raises:
        ValueError: `show` failed. It may not have been called at all.
    """
    file = _Shown(words, show)
    array: Any = mx.load(file, format="npy")  # type: ignore[arg-type]
    mx.eval(array)
    if file.failed is not None:
        raise ValueError(file.failed)
    return array  # type: ignore[no-any-return]


class _Shown:
    """A file that MLX may believe to read so many words from: `show` gets the memory for them, and
    it is left as it is. MLX has no other array that it does not write to.

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
        self.failed: str | None = None

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
        elif (at, size) == (len(self._head), self._bytes):
            try:
                self._show(memory)
            except Exception as exc:  # noqa: BLE001 - a thread of MLX could tell nobody
                self.failed = str(exc)
        return size
