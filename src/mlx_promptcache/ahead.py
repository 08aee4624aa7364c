"""Room for rows that is made before anybody knows which rows come.

Fresh memory costs more than anything else in a restore. While a process that has just begun encodes
its prompt it needs one core: another one may make room meanwhile for as many rows as were used the
last time.
"""

from __future__ import annotations

import atexit
import math
import threading
from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_promptcache.container import ITEMSIZE
from mlx_promptcache.layers import TOKEN_AXIS
from mlx_promptcache.streams import of_any_thread
from mlx_promptcache.tree import CELL

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mlx_promptcache.blueprint import Shape

MOST_BYTES = 1 << 28  # of room that nobody may need


def padded(rows: int) -> int:
    """How many rows there is room for where so many are to be followed by others."""
    return rows + -rows % CELL


def bytes_shape(dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of room for an array `[batch, heads, rows, ...]`: bytes of a row come last."""
    return (*shape[: TOKEN_AXIS + 1], math.prod(shape[TOKEN_AXIS + 1 :]) * ITEMSIZE[dtype])


class Ahead:
    """Room that a thread makes, by its shape: who finds some of the right one takes it. For one
    thread at a time.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[int, ...], list[mx.array]] = {}
        self._thread: threading.Thread | None = None
        self._stream: mx.Stream | None = None  # one, since MLX never ends its thread

    def make(self, rows: Iterable[Shape], count: int) -> None:
        """Begin to make room for `count` rows of these layers, padded, in the place of what was
        made before; none if that is more than MOST_BYTES, and on a CPU only.
        """
        self.clear()
        shapes = [
            bytes_shape(dtype, (*around[:TOKEN_AXIS], padded(count), *around[TOKEN_AXIS + 1 :]))
            for dtype, around in rows
        ]
        if not 0 < sum(map(math.prod, shapes)) <= MOST_BYTES:
            return
        self._stream = self._stream or of_any_thread()
        if self._stream is None:
            return
        arrays = [mx.zeros(shape, mx.uint8, stream=self._stream) for shape in shapes]
        # In this thread MLX would let us wait until it is nearly done.
        thread = threading.Thread(target=mx.eval, args=(arrays,), daemon=True)
        try:
            thread.start()
        except RuntimeError:  # there can be no more threads
            return
        self._thread = thread
        for shape, array in zip(shapes, arrays, strict=True):
            self._made.setdefault(shape, []).append(array)
        atexit.register(self.wait)  # MLX aborts a process that ends while another thread computes

    def wait(self) -> None:
        """Return when the room is there."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            atexit.unregister(self.wait)

    def take(self, shape: tuple[int, ...]) -> mx.array | None:
        """Room of this shape, if some is left, when all of it is there."""
        self.wait()
        made = self._made.get(shape)
        return made.pop() if made else None

    def clear(self) -> None:
        """Give back what nobody took."""
        self.wait()
        self._made.clear()
