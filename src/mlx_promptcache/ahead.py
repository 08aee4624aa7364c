"""Room for rows that is made before anybody knows which rows come.

Fresh memory costs more than anything else in a restore. While a process that has just begun encodes
its prompt it needs one core: another one may make room meanwhile for as many rows as were used the
last time.
"""

from __future__ import annotations

import atexit
import contextlib
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

MOST_BYTES = 1 << 29  # of room that nobody may need


class Ahead:
    """Room that a thread makes, by its shape: who finds some of the right one takes it. For one
    thread at a time.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[int, ...], list[mx.array]] = {}
        self._thread: threading.Thread | None = None

    def make(self, rows: Iterable[Shape], count: int) -> None:
        """Begin to make room for `count` rows of these layers, padded as `Room` does it, and no
        more than MOST_BYTES; on a CPU only.
        """
        padded = count + -count % CELL
        shapes = [
            (*rest[:TOKEN_AXIS], padded, math.prod(rest[TOKEN_AXIS + 1 :]) * ITEMSIZE[dtype])
            for dtype, rest in rows
        ]
        stream = of_any_thread() if 0 < sum(map(math.prod, shapes)) <= MOST_BYTES else None
        if stream is None:
            return
        self.clear()
        arrays = [mx.zeros(shape, mx.uint8, stream=stream) for shape in shapes]
        for shape, array in zip(shapes, arrays, strict=True):
            self._made.setdefault(shape, []).append(array)
        # Here MLX would let this thread wait until it is nearly done.
        self._thread = threading.Thread(target=_evaluate, args=(arrays,), daemon=True)
        self._thread.start()
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


def _evaluate(arrays: list[mx.array]) -> None:
    with contextlib.suppress(RuntimeError):  # there is no memory: who takes one is told
        mx.eval(arrays)
