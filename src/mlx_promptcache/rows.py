"""Rows: from layers into the arrays of blocks, and from blocks into room for a whole layer.

Layers whose rows are alike are stacked along a new first axis, in the model's order: fewer and
larger arrays. `keys/0` is the first stack of the rows `keys`; those of windows, of which a block
may hold fewer, are `window.keys/0`.
"""

from __future__ import annotations

import itertools
import math
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx

from mlx_promptcache import ahead
from mlx_promptcache.arrays import dealt, dtype_name, memory_of, mlx_dtype
from mlx_promptcache.container import ITEMSIZE, Dealt, Entry, raw_bytes
from mlx_promptcache.errors import UnsupportedLayer
from mlx_promptcache.headers import WINDOW
from mlx_promptcache.layers import TOKEN_AXIS
from mlx_promptcache.planes import join
from mlx_promptcache.streams import beside, in_main_thread_on_cpu
from mlx_promptcache.unwritten import WORD, unwritten

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from mlx_promptcache.ahead import Ahead
    from mlx_promptcache.windows import Span

    Place = tuple[str, str]  # the path of a layer and the name of its rows
    Stacks = Mapping[str, Sequence[str]]

OPENERS = 2  # streams that allocate room


def stacked(
    rows: Iterable[tuple[str, str, mx.array]], prefix: str = ""
) -> tuple[dict[str, Dealt], dict[str, list[str]]]:
    """The rows of layers, given as `(path, name, [batch, heads, tokens, ...])`, as few arrays
    `[layers, batch, heads, tokens, ...]`, and of which layers each is a stack.
    """
    groups: dict[tuple[str, str, tuple[int, ...]], list[tuple[str, mx.array]]] = {}
    for path, name, array in rows:
        alike = (name, dtype_name(array), tuple(array.shape))
        groups.setdefault(alike, []).append((path, array))
    arrays: dict[str, Dealt] = {}
    stacks: dict[str, list[str]] = {}
    for (name, _, _), members in groups.items():
        label = f"{prefix}{name}/{sum(s.startswith(f'{prefix}{name}/') for s in stacks)}"
        arrays[label] = dealt(mx.stack([array for _, array in members]))
        stacks[label] = [path for path, _ in members]
    return arrays, stacks


def name_of(label: str) -> tuple[str, bool]:
    """The name of the rows that a label stands for, and whether they are those of windows."""
    name = label.removeprefix(WINDOW).partition("/")[0]
    return name, label.startswith(WINDOW)


class Staging:
    """Memory that the planes of stacks are read into, used again and again: fresh memory costs
    more than reading. `take` may be called by any thread, the rest by the one that computes.
    """

    def __init__(self, count: int, largest_bytes: int) -> None:
        words = -(-largest_bytes // WORD) + 1
        arrays = [unwritten(words).view(mx.uint8) for _ in range(count)]
        mx.eval(arrays)
        self._free: SimpleQueue[tuple[mx.array, memoryview]] = SimpleQueue()
        for array in arrays:
            host = memory_of(array) if _HOST_SEES_ARRAYS else memoryview(bytearray(largest_bytes))
            self._free.put((array, host))

    def take(self, entry: Entry) -> Planes:
        """Memory for the planes of an array, as soon as there is some."""
        array, host = self._free.get()
        return Planes(entry, array, host[: raw_bytes(entry.dtype, entry.shape)], host)

    def give_back(self, planes: Planes) -> None:
        """Let it be taken again."""
        self._free.put((planes.array, planes.host))


class Planes(NamedTuple):
    """The planes of an array, one after the other, in `memory`."""

    entry: Entry
    array: mx.array
    memory: memoryview
    host: memoryview

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer of the array."""
        return len(self.memory) // max(1, self.entry.shape[0])

    def joined(self, begin: int, end: int) -> mx.array:
        """The bytes of the layers `[begin, end)` of the array, `[..., rows, bytes of a row]`; not
        evaluated.
        """
        itemsize, shape = ITEMSIZE[self.entry.dtype], self.entry.shape
        memory: Any = self.memory
        flat = self.array[: len(memory)] if _HOST_SEES_ARRAYS else mx.array(memory)
        planes, items = flat.reshape(itemsize, -1), self.layer_bytes // itemsize
        joined = join([planes[k, begin * items : end * items] for k in range(itemsize)])
        _, rest = _around_rows(shape)
        row_bytes = math.prod(rest) * itemsize
        return joined.reshape(end - begin, *shape[1 : TOKEN_AXIS + 2], row_bytes)


class Room:
    """Room for the rows of one layer at some positions.

    With `padded` the array is a bit longer, as mlx-lm's own buffers are: the next token is then
    written in place.
    """

    def __init__(self, entry: Entry, spans: Sequence[Span], *, padded: bool) -> None:
        self._spans, self._dtype = spans, entry.dtype
        self._missing = rows = sum(span.stop - span.start for span in spans)
        batch_and_heads, rest = _around_rows(entry.shape)
        self._shape = (*batch_and_heads, ahead.padded(rows) if padded else rows, *rest)
        self._row_shape = (entry.dtype, batch_and_heads, rest)
        self._row_bytes = math.prod(rest) * ITEMSIZE[entry.dtype]
        self._bytes: mx.array | None = None

    @staticmethod
    def open(rooms: Iterable[Room]) -> None:
        """Allocate what these rooms need, those that are not open yet: then rows can be put there.

        Bytes are put into MLX's own memory: every further copy of a state costs its page faults.
        """
        closed = [room for room in rooms if room._bytes is None]
        for room, memory in zip(closed, _zeros([r._bytes_shape for r in closed]), strict=True):
            room._bytes = memory

    @staticmethod
    def open_beside(rooms: Iterable[Room], made: Ahead) -> None:
        """Have these rooms opened, all of them: with what was made ahead, the rest in threads of
        MLX's beside the one that joins planes, since fresh memory costs more than anything else in
        a restore. Only in the main thread and on a CPU: elsewhere what was made ahead is given
        back, and `open` opens them when they are needed.
        """
        if not in_main_thread_on_cpu():
            made.clear()
            return
        closed = []
        for room in rooms:
            room._bytes = made.take(room._bytes_shape)
            if room._bytes is None:
                closed.append(room)
        made.clear()  # before more is taken
        shapes = [room._bytes_shape for room in closed]
        for room, memory in zip(closed, _zeros(shapes, beside(OPENERS)), strict=True):
            room._bytes = memory

    @property
    def _bytes_shape(self) -> tuple[int, ...]:
        return ahead.bytes_shape(self._dtype, self._shape)

    def check(self, stack: Entry) -> None:
        """Compare the rows of a stack with those that belong here.

        Raises:
            UnsupportedLayer: they are not rows of this layer.
        """
        if self._row_shape != (stack.dtype, *_around_rows(stack.shape)):
            raise UnsupportedLayer("the blocks do not hold the same layers")

    def wants(self, used: Span) -> bool:
        """Whether any of these positions has a place here."""
        return bool(self._shared(used))

    def put(self, stack: mx.array, layer: int, used: Span) -> None:
        """Put the first rows of one layer of a stack, which are those of the positions `used`.

        `stack` has the bytes of an array that was checked: see `Planes.joined`.
        """
        for start, stop, at in self._shared(used):
            first, count = start - used.start, stop - start
            if not self._row_bytes:
                pass  # rows of nothing: some layers have such keys or values
            elif _HOST_SEES_ARRAYS:
                self._copy(stack, layer, first, at, count)
            else:
                self.bytes[:, :, at : at + count] = stack[layer, :, :, first : first + count]
            self._missing -= count

    def _copy(self, stack: mx.array, layer: int, first: int, at: int, count: int) -> None:
        """Copy rows from memory to memory: several times as fast as as many small operations."""
        into, source = memory_of(self.bytes), memory_of(stack)
        heads, rows, width = (
            math.prod(self._shape[:TOKEN_AXIS]),
            self._shape[TOKEN_AXIS],
            self._row_bytes,
        )
        held, size = stack.shape[TOKEN_AXIS + 1], count * width
        for head in range(heads):
            begin = ((layer * heads + head) * held + first) * width
            to = (head * rows + at) * width
            into[to : to + size] = source[begin : begin + size]

    def _shared(self, used: Span) -> list[tuple[int, int, int]]:
        """What of `used` has a place here: positions `[start, stop)`, and the row of the first."""
        shared, row = [], 0
        for span in self._spans:
            start, stop = max(span.start, used.start), min(span.stop, used.stop)
            if start < stop:
                shared.append((start, stop, row + start - span.start))
            row += span.stop - span.start
        return shared

    @property
    def bytes(self) -> mx.array:
        """What is here so far: `[batch, heads, rows, bytes of a row]`."""
        assert self._bytes is not None  # noqa: S101 - it was opened
        return self._bytes

    def close(self) -> mx.array:
        """The array: rows in the order of their positions, then padding.

        Raises:
            UnsupportedLayer: rows were not put here.
        """
        if self._missing:
            raise UnsupportedLayer("the blocks lack rows of a layer")
        array, self._bytes = self.bytes, None
        if not array.size:
            return mx.zeros(self._shape, mlx_dtype(self._dtype))
        return array.view(mlx_dtype(self._dtype)).reshape(self._shape)


def _zeros(
    shapes: Sequence[tuple[int, ...]], streams: Sequence[mx.Stream | None] = (None,)
) -> list[mx.array]:
    """Bytes in arrays of these shapes, which are being made in these streams of MLX by turns."""
    made = [
        mx.zeros(shape, mx.uint8, stream=stream)
        for shape, stream in zip(shapes, itertools.cycle(streams), strict=False)
    ]
    mx.async_eval(made)
    return made


def _around_rows(stack: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Batch and heads, and the rest, of the shape `[layers, batch, heads, tokens, ...]`."""
    return stack[1 : TOKEN_AXIS + 1], stack[TOKEN_AXIS + 2 :]


# Where the CPU and whatever computes share memory, a view of an array may be written to. CUDA's
# arrays may lie elsewhere.
_HOST_SEES_ARRAYS = mx.metal.is_available() or mx.default_device() == mx.Device(mx.cpu)
