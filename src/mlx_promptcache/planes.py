"""Byte planes of MLX's arrays: the first byte of every item, the second, ..., dealt out and joined.

What a store holds of an array are its planes (`codec.py`). Compiled, either way is a single pass
over memory, four times as fast as strided copies (`docs/log.md`).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_promptcache.streams import may_compile

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

WORDS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}  # by their bytes


def deal(array: mx.array, itemsize: int) -> list[mx.array]:
    """The planes of an array, least significant byte first, each `[items]`; not evaluated."""
    words = mx.contiguous(array).reshape(-1).view(WORDS[itemsize])
    if itemsize == 1:
        return [words]
    if may_compile() and _compiles(_dealt, (WORDS[itemsize],)):
        return _dealt(words)
    items = words.view(mx.uint8).reshape(-1, itemsize)
    return [mx.contiguous(items[:, k]) for k in range(itemsize)]


def join(planes: Sequence[mx.array]) -> mx.array:
    """The bytes of the items that have these planes, item after item; not evaluated."""
    if len(planes) == 1:
        return planes[0]
    if may_compile() and _compiles(_joined, (mx.uint8,) * len(planes)):
        return _joined(*planes).view(mx.uint8)
    return mx.concatenate([plane[:, None] for plane in planes], axis=1).reshape(-1)


@mx.compile
def _dealt(words: mx.array) -> list[mx.array]:
    return [(words >> (8 * k)).astype(mx.uint8) for k in range(words.dtype.size)]


@mx.compile
def _joined(*planes: mx.array) -> mx.array:
    kind = WORDS[len(planes)]
    words = planes[0].astype(kind)
    for k, plane in enumerate(planes[1:], 1):
        words = words | (plane.astype(kind) << (8 * k))
    return words


@functools.cache
def _compiles(function: Callable[..., Any], dtypes: tuple[mx.Dtype, ...]) -> bool:
    """Whether MLX compiles a function of such arrays. Its compiler writes into the system's
    temporary directory, to a place that may be another user's.
    """
    try:
        mx.eval(function(*(mx.zeros((8,), dtype) for dtype in dtypes)))
    except RuntimeError:
        return False
    return True
