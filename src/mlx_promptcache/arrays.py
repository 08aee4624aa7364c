"""MLX's arrays out of MLX, and back."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlx_promptcache import planes
from mlx_promptcache.container import ITEMSIZE, Array, Dealt


def dtype_name(array: mx.array) -> str:
    """The dtype's name as files keep it: `bfloat16`, `float32`, `bool`, ..."""
    return str(array.dtype).removeprefix("mlx.core.").rstrip("_")


def mlx_dtype(name: str) -> mx.Dtype:
    """The dtype of a name that files keep."""
    dtype: mx.Dtype = getattr(mx, "bool_" if name == "bool" else name)
    return dtype


def to_array(array: mx.array) -> Array:
    """Copy an array out of MLX."""
    flat: Any = mx.contiguous(array).reshape(-1)
    raw = bytes(memoryview(flat.view(mx.uint8))) if array.size else b""
    return Array(dtype_name(array), tuple(array.shape), raw)


def dealt(array: mx.array) -> Dealt:
    """Copy an array out of MLX, dealt out into its planes."""
    dtype = dtype_name(array)
    found: Any = planes.deal(array, ITEMSIZE[dtype])
    mx.eval(found)
    return Dealt(dtype, tuple(array.shape), [memoryview(p) if p.size else b"" for p in found])


def from_array(array: Array) -> mx.array:
    """Copy an array into MLX."""
    dtype = mlx_dtype(array.dtype)
    if not array.nbytes:
        return mx.zeros(array.shape, dtype)
    raw: Any = memoryview(array.data)
    return mx.array(raw).view(dtype).reshape(array.shape)


def memory_of(array: mx.array) -> memoryview:
    """The memory of an array, which must be evaluated: what is written there is in the array."""
    memory: Any = array
    return memoryview(memory).cast("B")
