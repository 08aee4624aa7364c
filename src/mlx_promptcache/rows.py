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
        self._missing = rows = sum(span.stop - span.start for span in spans)
        rows += -rows % CELL if padded else 0
        batch_and_heads, rest = _around_rows(entry.shape)
        self._shape = (*batch_and_heads, rows, *rest)
        self._row_shape = (entry.dtype, batch_and_heads, rest)
        self._row_bytes = math.prod(rest) * ITEMSIZE[entry.dtype]
        self._bytes: mx.array | None = None
        self._view: Any = None  # where rows are put: the memory of `_bytes`, or an array of its own

    @staticmethod
    def open(rooms: Iterable[Room]) -> None:
        """Allocate what these rooms need: then rows can be put there.

        Bytes are put into MLX's own memory: every further copy of a state costs its page faults.
        """
        opened = list(rooms)
        for room in opened:
            room._allocate()
        mx.eval([room._bytes for room in opened if room._bytes is not None])
        for room in opened:
            if room._bytes is not None:
                room._view = np.asarray(memoryview(room._bytes))  # type: ignore[arg-type]

    def _allocate(self) -> None:
        shape = (*self._shape[: TOKEN_AXIS + 1], self._row_bytes)
        if _HOST_SEES_ARRAYS and 0 not in shape:
            self._bytes = mx.zeros(shape, mx.uint8)
        else:
            self._view = np.zeros(shape, np.uint8)

    def check(self, stack: Array | Entry) -> None:
        """Compare the rows of a stack with those that belong here.

        Raises:
            UnsupportedLayer: they are not rows of this layer.
        """
        if self._row_shape != (stack.dtype, *_around_rows(stack.shape)):
            raise UnsupportedLayer("the blocks do not hold the same layers")

    def wants(self, used: Span) -> bool:
        """Whether any of these positions has a place here."""
        return bool(self._shared(used))

    def put(self, stack: Array, layer: int, used: Span) -> None:
        """Put the first rows of one layer of a stack, which are those of the positions `used`.

        Raises:
            UnsupportedLayer: they are not rows of this layer.
        """
        self.check(stack)
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


def _around_rows(stack: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Batch and heads, and the rest, of the shape `[layers, batch, heads, tokens, ...]`."""
    return stack[1 : TOKEN_AXIS + 1], stack[TOKEN_AXIS + 2 :]


# Where the CPU and whatever computes share memory, a view of an array may be written to. CUDA's
# arrays may lie elsewhere.
_HOST_SEES_ARRAYS = mx.metal.is_available() or mx.default_device() == mx.Device(mx.cpu)
