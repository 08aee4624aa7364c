"""The gate of a feed-forward layer with several exponentials at a time, and what stands in for
mlx-lm's: `swiglu`, to the last bit what MLX computes (see `exponentials.py`).
"""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_promptcache import exponentials

if TYPE_CHECKING:
    from collections.abc import Callable

    Swiglu = Callable[[mx.array, mx.array], mx.array]

SWIGLU = "swiglu"
ACTIVATIONS = "mlx_lm.models.activations"
MOST = 1 << 20  # numbers: of more it takes four times the memory that MLX takes, and no less time


def spread(model: Any) -> None:
    """Let the feed-forward layers of this model be computed several numbers at a time, where that
    is worth it; no bit of them changes.
    """
    usual = _of(ACTIVATIONS)
    if usual is None or not exponentials.is_x86():
        return
    # Some models have classes of that module itself, whose own function stays what it is.
    for name in {type(module).__module__ for module in model.modules()} - {ACTIVATIONS}:
        if _of(name) is usual:
            setattr(sys.modules[name], SWIGLU, _or_usual(usual))


def _of(module: str) -> Swiglu | None:
    return getattr(sys.modules.get(module), SWIGLU, None)


def _or_usual(usual: Swiglu) -> Swiglu:
    """`swiglu` where it serves, and else the usual."""

    @functools.wraps(usual)
    def gated(gate: mx.array, x: mx.array) -> mx.array:
        alike = gate.shape == x.shape and gate.dtype == x.dtype
        if alike and gate.size <= MOST and exponentials.serve(gate) and _is_the_same(usual):
            return swiglu(gate, x)
        return usual(gate, x)

    return gated


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """`gate * sigmoid(gate) * x` of float32 numbers, as `mlx_lm.models.activations.swiglu`."""
    powers = exponentials.factors(mx.abs(gate))
    return exponentials.of_one_shape(_gated, tuple(gate.shape))(*powers, gate, x, *_limits())


@functools.cache
def _limits() -> tuple[mx.array, mx.array]:
    """As arrays: see `exponentials._smallest`."""
    return mx.array(exponentials.LARGEST), mx.array(0.0)


def _gated(
    p: mx.array, e: mx.array, gate: mx.array, x: mx.array, largest: mx.array, zero: mx.array
) -> mx.array:
    """What is left to do when exp(abs(gate)) is p * e, in the order of `Sigmoid` in
    mlx/backend/cpu/unary_ops.h.
    """
    y = mx.where(mx.abs(gate) > largest, zero, 1.0 / (1.0 + p * e))
    return gate * mx.where(gate < zero, y, 1.0 - y) * x


@functools.cache
def _is_the_same(usual: Swiglu) -> bool:
    """Whether MLX has a compiler, and the usual one these bits."""
    numbers = mx.sin(mx.arange(4 * 1021)).reshape(4, -1)
    gate = numbers * mx.array([[1e-3], [9], [99], [1e38]])
    return exponentials.is_the_same(swiglu, usual, gate, numbers + 1)
