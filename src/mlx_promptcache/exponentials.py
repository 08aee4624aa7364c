"""Exponentials on an x86 CPU, several at a time, to the last bit what MLX computes there.

MLX (0.32) computes them on such a CPU one by one, and asks the C library for each of the six fused
multiplications and additions of its polynomial: they were two thirds of a question's forward call
after a long prefix. Here is the same polynomial in operations that MLX's compiler makes loops over
vectors of. A fused multiplication and addition rounds once. So does this one: in double precision
the product of two float32 is exact, and a sum with a number so large that its last place is the
result's is rounded there.

Of every float32 from -89 to 88 the bits are the same (`scripts/trials exponentials`); whether those
of the installed MLX are is tried before this is used, by those who use it. What is not a number
stays none, but another one. There are no gradients: who trains a model gets MLX's own.
"""

from __future__ import annotations

import contextlib
import functools
import io
import platform
import struct
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_promptcache.streams import may_compile

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

    Step = Callable[..., mx.array]

LEAST = 1 << 14  # numbers: of fewer, the number of operations takes longer than MLX's one
SHAPES = 64  # that what is compiled is kept for

# `exp` of mlx/backend/cpu/simd/math.h: 2**k, times a polynomial of what is left of x * log2(e); all
# of these as the float32 that they are there.
SMALLEST, LARGEST = -88.0, 88.0  # of less than this it is 0, of more infinite
LOG2_E, *POLYNOMIAL = struct.unpack(
    "8f",
    struct.pack(
        "8f",
        1.442695,
        1.535336188319500e-4,
        1.339887440266574e-3,
        9.618437357674640e-3,
        5.550332471162809e-2,
        2.402264791363012e-1,
        6.931472028550421e-1,
        1.0,
    ),
)
BIAS, MANTISSA_BITS = 127, 23  # of the exponent of a float32

_CALL: ContextVar[dict[Hashable, mx.array] | None] = ContextVar("call", default=None)


@contextlib.contextmanager
def inferring() -> Iterator[None]:
    """While this lasts, a forward call of a model, nobody asks for gradients of what this thread
    computes: what is computed here has none.
    """
    before = _CALL.set({})
    try:
        yield
    finally:
        _CALL.reset(before)


def once(what: Hashable, make: Callable[[], mx.array]) -> mx.array:
    """What is made for the first layer of a forward call that asks, and serves the others."""
    made = _CALL.get()
    if made is None:
        return make()
    if what not in made:
        made[what] = make()
    return made[what]


def is_x86() -> bool:
    """Whether this is a CPU for which MLX has no loops over vectors."""
    return platform.machine() in ("x86_64", "AMD64")


def serve(values: mx.array) -> bool:
    """Whether those of these numbers are computed sooner here, and nobody minds how."""
    if _CALL.get() is None or values.dtype != mx.float32 or values.size < LEAST:
        return False
    return is_x86() and may_compile()


def exp(values: mx.array) -> mx.array:
    """`mx.exp` of float32 numbers of which none is above LARGEST; in the current stream."""
    powers: mx.array = mx.multiply(*factors(values))
    return powers


def factors(values: mx.array) -> tuple[mx.array, mx.array]:
    """Two numbers for each, whose product is its exponential: see `exp`."""
    halves, begin, end = _compiled(tuple(values.shape))
    exponents, rest = halves(values, _smallest())
    return end(begin(rest), rest), exponents.view(mx.float32)


@functools.lru_cache(maxsize=2 * SHAPES)  # of `causal.py` and of `swiglu.py`
def of_one_shape(function: Step, _shape: tuple[int, ...]) -> Step:
    """A function compiled for arrays of one shape alone; why, is told at `_compiled`."""
    return mx.compile(functools.partial(function))


def is_the_same(ours: Step, usual: Step, *given: mx.array) -> bool:
    """Whether MLX has a compiler for ours, and what it gives has the bits of the usual."""
    try:
        told = ours(*given)
        return _is_compiled(told) and bool(mx.array_equal(told, usual(*given)).item())
    except RuntimeError:  # where it would compile belongs to somebody else
        return False


def _is_compiled(array: mx.array) -> bool:
    """Whether this, which is not evaluated, is made by functions that MLX has compiled."""
    text = io.StringIO()
    mx.export_to_dot(text, array)
    return "Compiled" in text.getvalue()


@functools.cache
def _smallest() -> mx.array:
    """As an array: a constant to choose would be a branch, and the loop not one over vectors."""
    return mx.array(SMALLEST)


@functools.lru_cache(maxsize=SHAPES)
def _compiled(_shape: tuple[int, ...]) -> list[Callable[..., Any]]:
    """What `exp` of an array of this shape consists of: three passes over memory, because MLX's
    compiler makes one of eleven operations in turn at most.

    Of a function it keeps what it made for every shape, and goes through all of it, until the
    function is gone; so these are of one shape each.
    """
    return [mx.compile(functools.partial(part)) for part in (_halves, _begin, _end)]


def _halves(values: mx.array, smallest: mx.array) -> tuple[mx.array, mx.array]:
    """Of x * log2(e): its whole part, as the exponent of a float32, and what is left of it."""
    x = mx.where(values < smallest, smallest, values) * LOG2_E
    # The whole part is floor(x + 0.5). With the bias it is not below zero, and cut, not floored.
    exponents = (x.astype(mx.float64) + _double(BIAS + 0.5)).astype(mx.int32) << MANTISSA_BITS
    return exponents, x - (exponents.astype(mx.float32) * 2.0**-MANTISSA_BITS - float(BIAS))


def _begin(rest: mx.array) -> mx.array:
    """The first three steps of the polynomial; the results of each have one last place."""
    f = rest.astype(mx.float64)
    p = _fused(_double(POLYNOMIAL[0]), f, POLYNOMIAL[1], last_place=-33)
    p = _fused(p, f, POLYNOMIAL[2], last_place=-30)
    return _fused(p, f, POLYNOMIAL[3], last_place=-28).astype(mx.float32)


def _end(p: mx.array, rest: mx.array) -> mx.array:
    """The other three. What the fourth and the sixth give has one of two last places: it is rounded
    to a double before, which changes no bit of any value that there is.
    """
    f = rest.astype(mx.float64)
    p = p.astype(mx.float64) * f + _double(POLYNOMIAL[4])
    p = _fused(p.astype(mx.float32).astype(mx.float64), f, POLYNOMIAL[5], last_place=-24)
    return (p * f + _double(POLYNOMIAL[6])).astype(mx.float32)


def _fused(p: mx.array, f: mx.array, constant: float, last_place: int) -> mx.array:
    """`p * f + constant`, rounded once, to a multiple of 2**last_place."""
    large = 1.5 * 2.0 ** (52 + last_place)
    return (p * f + _double(constant + large)) - _double(large)


def _double(value: float) -> mx.array:
    return mx.array(value, mx.float64)
