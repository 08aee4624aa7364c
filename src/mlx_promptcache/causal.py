"""The causal mask of attention on an x86 CPU, put on several scores at a time.

MLX (0.32) chooses numbers one by one there, and makes the mask again for each layer. Bit by bit
loops over vectors choose between the same bits, and one mask serves all layers.
"""

from __future__ import annotations

import functools

import mlx.core as mx

from mlx_promptcache import exponentials

MOST = 1 << 22  # scores: the mask has as many numbers
LEAST = mx.finfo(mx.float32).min  # the score of what is not seen, as MLX has it


def serves(scores: mx.array) -> bool:
    """Whether `hide` puts the mask on these scores sooner than MLX."""
    return scores.size <= MOST and exponentials.serve(scores) and _is_the_same()


def hide(scores: mx.array) -> mx.array:
    """Scores `[..., queries, rows]` of float32, where the last query sees all rows, the one before
    it all but the last one, and so on; what is not seen has the least score.
    """
    queries, rows = scores.shape[-2:]
    times = scores.size // (queries * rows)
    seen = exponentials.once(
        ("causal", queries, rows, times), lambda: _bits_seen(queries, rows, times)
    )
    chosen = exponentials.of_one_shape(_chosen, (scores.size,))
    bits: mx.array = chosen(scores.reshape(-1).view(mx.int32), seen, _least())
    return bits.view(mx.float32).reshape(scores.shape)


def sees(queries: int, rows: int) -> mx.array:
    """Which rows a query sees: `[queries, rows]`."""
    positions = mx.arange(rows)
    return positions[rows - queries :, None] >= positions[None]


def _bits_seen(queries: int, rows: int, times: int) -> mx.array:
    """All bits of scores that are seen, and none of the others."""
    every, none = mx.array(-1, mx.int32), mx.array(0, mx.int32)
    return mx.tile(mx.where(sees(queries, rows), every, none), (times, 1)).reshape(-1)


@functools.cache
def _least() -> mx.array:
    return mx.array(LEAST).view(mx.int32)


def _chosen(bits: mx.array, seen: mx.array, least: mx.array) -> mx.array:
    return (bits & seen) | (least & ~seen)


@functools.cache
def _is_the_same() -> bool:
    """Whether MLX has a compiler for it, and its own choice these bits."""
    scores = mx.sin(mx.arange(2 * 3 * 5)).reshape(2, 3, 5)
    return exponentials.is_the_same(hide, lambda s: mx.where(sees(3, 5), s, LEAST), scores)
