"""Softmax with several exponentials at a time, to the last bit what MLX computes (see
`exponentials.py`).
"""

from __future__ import annotations

import functools

import mlx.core as mx

from mlx_promptcache import exponentials

PIECE = 1 << 18  # numbers computed at once: several operations on them wait at any time


def serves(scores: mx.array) -> bool:
    """Whether `softmax` has these scores sooner than MLX, and the same bits."""
    return exponentials.serve(scores) and _is_the_same()


def softmax(scores: mx.array) -> mx.array:
    """`mx.softmax(scores, axis=-1, precise=True)` of float32 scores; in the current stream."""
    rows = scores.reshape(-1, scores.shape[-1])
    size = max(1, PIECE // scores.shape[-1])
    weights = [_softmax(rows[begin : begin + size]) for begin in range(0, len(rows), size)]
    joined = weights[0] if len(weights) == 1 else mx.concatenate(weights)
    return joined.reshape(scores.shape)


def _softmax(rows: mx.array) -> mx.array:
    powers = exponentials.exp(rows - rows.max(axis=-1, keepdims=True))
    return powers * (1 / powers.sum(axis=-1, keepdims=True))  # added up one by one, as MLX does


@functools.cache
def _is_the_same() -> bool:
    """Whether MLX has a compiler, and its own softmax these bits."""
    scores = 30 * mx.sin(mx.arange(4 * 1021)).reshape(4, -1) - mx.array([[0], [9], [60], [1e38]])
    usual = functools.partial(mx.softmax, axis=-1, precise=True)
    return exponentials.is_the_same(softmax, usual, scores)
