"""Rows: from layers into the arrays of blocks, and from blocks into room for a whole layer.

Layers whose rows are alike are stacked along a new first axis, in the model's order: fewer and
larger arrays. `keys/0` is the first stack of the rows `keys`; those of windows, of which a block
may hold fewer, are `window.keys/0`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlx_promptcache.arrays import dtype_name, mlx_dtype, to_array
from mlx_promptcache.container import ITEMSIZE, Array, Entry
from mlx_promptcache.errors import UnsupportedLayer
from mlx_promptcache.headers import WINDOW
from mlx_promptcache.layers import TOKEN_AXIS
from mlx_promptcache.tree import CELL

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from mlx_promptcache.windows import Span

    Place = tuple[str, str]  # the path of a layer and the name of its rows
    Stacks = Mapping[str, Sequence[str]]


def stacked(
    rows: Iterable[tuple[str, str, mx.array]], prefix: str = ""
) -> tuple[dict[str, Array], dict[str, list[str]]]:
    """The rows of layers, given as `(path, name, [batch, heads, tokens, ...])`, as few arrays
    `[layers, batch, heads, tokens, ...]`, and of which layers each is a stack.
    """
    groups: dict[tuple[str, str, tuple[int, ...]], list[tuple[str, mx.array]]] = {}
    for path, name, array in rows:
        alike = (name, dtype_name(array), tuple(array.shape))
        groups.setdefault(alike, []).append((path, array))
    arrays: dict[str, Array] = {}
    stacks: dict[str, list[str]] = {}
    for (name, _, _), members in groups.items():
        label = f"{prefix}{name}/{sum(s.startswith(f'{prefix}{name}/') for s in stacks)}"
        arrays[label] = to_array(mx.stack([array for _, array in members]))
        stacks[label] = [path for path, _ in members]
    return arrays, stacks


def name_of(label: str) -> tuple[str, bool]:
    """The name of the rows that a label stands for, and whether they are those of windows."""
    name = label.removeprefix(WINDOW).partition("/")[0]
    return name, label.startswith(WINDOW)


class Room:
    """Room for the rows of one layer at some positions, which any thread may put there.

    With `padded` the array is a bit longer, as mlx-lm's own buffers are: the next token is then
    written in place.
    """

    def __init__(self, entry: Entry, spans: Sequence[Span], *, padded: bool) -> None:
        self._spans, self._dtype = spans, entry.dtype
        self._missing = self.rows = sum(span.stop - span.start for span in spans)
        rows = self.rows + (-self.rows % CELL if padded else 0)
        batch_and_heads, rest = entry.shape[1 : TOKEN_AXIS + 1], entry.shape[TOKEN_AXIS + 2 :]
        self._shape = (*batch_and_heads, rows, *rest)
        self._row_shape = (entry.dtype, batch_and_heads, rest)
        # Bytes are put into MLX's own memory: every further copy of a state costs its page faults.
        self._row_bytes = math.prod(rest) * ITEMSIZE[entry.dtype]
        room = (*batch_and_heads, rows, self._row_bytes)
        direct = _HOST_SEES_ARRAYS and 0 not in room
        self._bytes = mx.zeros(room, mx.uint8) if direct else None
        self._view: Any = np.zeros(room, np.uint8) if self._bytes is None else None

    @staticmethod
    def open(rooms: Iterable[Room]) -> None:
        """Make these rooms ready for `put`."""
        unopened = [room for room in rooms if room._view is None]
        mx.eval([room._bytes for room in unopened])
        for room in unopened:
            room._view = np.asarray(memoryview(room._bytes))  # type: ignore[arg-type]

    def wants(self, used: Span) -> bool:
        """Whether any of these positions has a place here."""
        return bool(self._shared(used))

    def put(self, stack: Array, layer: int, used: Span) -> None:
        """Put the first rows of one layer of a stack, which are those of the positions `used`.

        Raises:
            UnsupportedLayer: they are not rows of this layer.
        """
        batch_and_heads, rest = stack.shape[1 : TOKEN_AXIS + 1], stack.shape[TOKEN_AXIS + 2 :]
        if (stack.dtype, batch_and_heads, rest) != self._row_shape:
            raise UnsupportedLayer("the blocks do not hold the same layers")
        source = np.frombuffer(stack.data, np.uint8).reshape(
            *stack.shape[: TOKEN_AXIS + 2], self._row_bytes
        )[layer]
        for start, stop, at in self._shared(used):
            rows = source[:, :, start - used.start : stop - used.start]
            self._view[:, :, at : at + stop - start] = rows
            self._missing -= stop - start

    def _shared(self, used: Span) -> list[tuple[int, int, int]]:
        """What of `used` has a place here: positions `[start, stop)`, and the row of the first."""
        shared, row = [], 0
        for span in self._spans:
            start, stop = max(span.start, used.start), min(span.stop, used.stop)
            if start < stop:
                shared.append((start, stop, row + start - span.start))
            row += span.stop - span.start
        return shared

    def close(self) -> mx.array:
        """The array: rows in the order of their positions, then padding.

        Raises:
            UnsupportedLayer: rows were not put here.
        """
        if self._missing:
            raise UnsupportedLayer("the blocks lack rows of a layer")
        view, self._view = self._view, None
        array = mx.array(view) if self._bytes is None else self._bytes
        self._bytes = None
        if not array.size:
            return mx.zeros(self._shape, mlx_dtype(self._dtype))
        return array.view(mlx_dtype(self._dtype)).reshape(self._shape)


# Where the CPU and whatever computes share memory, a view of an array may be written to. CUDA's
# arrays may lie elsewhere.
_HOST_SEES_ARRAYS = mx.metal.is_available() or mx.default_device() == mx.Device(mx.cpu)
