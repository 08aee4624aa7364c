"""SharedRows: the rows of one prefix, held once under many sequences.

mlx-lm's batch layers hold a copy of a prefix for each sequence, and every token reads all of them.
Here the queries of all sequences meet the one set of rows in one matrix product. What each sequence
has of its own is joined to that: attention is a weighted mean, and the means over two sets of rows
make the mean over both once their weights are known ("Hydragen": J. Juravsky et al.,
arXiv:2402.05099).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_promptcache.attention import stand_in
from mlx_promptcache.engine import cache as mlx_cache
from mlx_promptcache.layers import TOKEN_AXIS

NOWHERE = 1 << 30  # a position that no token comes to


@dataclass
class Masks:
    """Which rows the tokens of one forward call look at; the same in all layers."""

    whole: mx.array | None = None
    own: mx.array | None = None


@dataclass
class _Given:
    """The rows that a layer has told the model of. No tuple: they are not to be evaluated."""

    keys: mx.array
    values: mx.array


class SharedRows(mlx_cache.BatchKVCache):  # type: ignore[misc]
    """The rows of a `KVCache` under `size` sequences, with room for `room` more tokens of each.

    Sequences of different lengths end in a gap before what follows, which nobody looks at: so no
    row has to be moved when they are fed. Attention of a model's own sees all rows side by side.
    """

    def __init__(self, layer: Any, size: int, room: int, masks: Masks) -> None:
        super().__init__([0] * size)
        self._size, self._masks = size, masks
        self._before = int(layer.offset)
        self._shared_keys = layer.keys[:, :, : self._before]
        self._shared_values = layer.values[:, :, : self._before]
        self.keys = _empty(self._shared_keys, size, room)
        self.values = _empty(self._shared_values, size, room)
        self._given: _Given | None = None
        self.rewind()

    def rewind(self) -> None:
        """Forget all after the prefix."""
        self._idx = self._gap_end = 0
        self._lengths = mx.zeros((self._size,), mx.int32)
        self.offset = self._before + self._lengths

    def close_questions(self, lengths: mx.array) -> None:
        """What was fed since `rewind` was padded on the right: only so many tokens count."""
        self._gap_end, self._lengths = self._idx, lengths
        self.offset = self._before + lengths

    def make_mask(
        self,
        N: int,  # noqa: N803 - mlx-lm's names
        return_array: bool = False,  # noqa: ARG002
        window_size: int | None = None,
    ) -> mx.array:
        """Which rows each of the next `N` tokens looks at, `[sequences, 1, N, rows]`."""
        own = self._positions(self._idx + N)
        shared = mx.broadcast_to(mx.arange(self._before), (self._size, self._before))
        rows = mx.concatenate([shared, own], axis=1)[:, None, None]
        tokens = (self.offset[:, None] + mx.arange(N))[:, None, :, None]
        whole = rows <= tokens
        self._masks.own = own[:, None, None] <= tokens
        if window_size is not None:
            whole = whole & (tokens < rows + window_size)
            self._masks.own = None
        self._masks.whole = whole
        return whole

    def _positions(self, count: int) -> mx.array:
        """Where in its sequence each of the own rows stands, `[sequences, rows]`."""
        rows, lengths = mx.arange(count), self._lengths[:, None]
        after = mx.where(rows < self._gap_end, NOWHERE, lengths + rows - self._gap_end)
        return self._before + mx.where(rows < lengths, rows, after)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Add rows; return all of them, side by side. Nothing is copied until somebody looks."""
        own_keys, own_values = super().update_and_fetch(keys, values)
        self._given = _Given(
            _side_by_side(self._shared_keys, own_keys),
            _side_by_side(self._shared_values, own_values),
        )
        return self._given.keys, self._given.values

    def attends(self, keys: Any, values: Any, mask: Any) -> bool:
        """Whether attention to these rows through this mask is what `attend` computes."""
        given, masks = self._given, self._masks
        usual = given is not None and keys is given.keys and values is given.values
        return usual and masks.own is not None and mask is masks.whole

    def attend(self, queries: mx.array, scale: float) -> mx.array:
        """Attention of queries `[sequences, heads, N, D]` to all rows."""
        self._given = None  # what it holds would keep rows from being written in place
        size, heads, count, width = queries.shape
        kv_heads, dtype = self._shared_keys.shape[1], queries.dtype
        each = (size, kv_heads, heads // kv_heads, count)
        queries = (queries * scale).reshape(*each, width)
        together = queries.swapaxes(0, 1).reshape(1, kv_heads, -1, width)
        shared = _scores(together, self._shared_keys)
        own = _scores(queries, self.keys[:, :, None, : self._idx])
        assert self._masks.own is not None  # noqa: S101 - `attends` has looked
        own = mx.where(self._masks.own[:, :, None], own, -mx.inf)
        highest = _by_sequence(mx.max(shared, -1, keepdims=True), each)
        highest = mx.maximum(highest, mx.max(own, -1, keepdims=True))
        shared = _exp(shared - highest.swapaxes(0, 1).reshape(1, kv_heads, -1, 1))
        own = _exp(own - highest)
        weights = _by_sequence(mx.sum(shared, -1, keepdims=True), each) + mx.sum(
            own, -1, keepdims=True
        )
        told = _by_sequence(shared.astype(dtype) @ self._shared_values, each)
        told = told + own.astype(dtype) @ self.values[:, :, None, : self._idx]
        return (told / weights).astype(dtype).reshape(size, heads, count, -1)


def _empty(rows: mx.array, size: int, room: int) -> mx.array:
    shape = list(rows.shape)
    shape[0], shape[TOKEN_AXIS] = size, room
    return mx.zeros(shape, rows.dtype)


def _side_by_side(shared: mx.array, own: mx.array) -> mx.array:
    wide = mx.broadcast_to(shared, (own.shape[0], *shared.shape[1:]))
    return mx.concatenate([wide, own], axis=TOKEN_AXIS)


def _scores(queries: mx.array, keys: mx.array) -> mx.array:
    return (queries @ keys.swapaxes(-1, -2)).astype(mx.float32)


def _by_sequence(told: mx.array, each: tuple[int, ...]) -> mx.array:
    """What was told of the queries of all sequences together, by sequence."""
    size, kv_heads, queries_each, count = each
    return told.reshape(kv_heads, size, queries_each, count, -1).swapaxes(0, 1)


def _exp(x: mx.array) -> mx.array:
    """The exponential of numbers that nobody else looks at. On a CPU MLX's own takes eight times as
    long as numpy's, which writes over them in the memory that they share.
    """
    if mx.default_device().type != mx.cpu:
        return mx.exp(x)
    mx.eval(x)
    rows = np.asarray(memoryview(x))  # type: ignore[arg-type]
    np.exp(rows, out=rows)
    return x


def let_attend(model: Any) -> None:
    """Let layers that are `SharedRows` attend by themselves wherever this model's own modules call
    mlx-lm's attention; any other layer goes through that as before.
    """
    stand_in(model, "shared rows", _attend)


def _attend(
    queries: mx.array, keys: Any, values: Any, cache: Any, scale: float, mask: Any
) -> mx.array | None:
    if isinstance(cache, SharedRows) and cache.attends(keys, values, mask):
        return cache.attend(queries, scale)
    return None
