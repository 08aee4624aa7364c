"""Attention over several cores of a CPU, and what stands in for mlx-lm's.

MLX computes an operation on a CPU on one core, and the exponentials of attention, which are half of
a forward call over a prompt, one number at a time. Heads have nothing to do with each other: here
the weights of several groups of them are made of their scores at the same time, in streams of their
own. The operations are those that `mx.fast.scaled_dot_product_attention` comes to on a CPU (mlx
0.32), in their order and for each head as there, so that the bits are the same; matrix products
stay in one stream, because BLAS gives other bits to callers that it has to share its threads among.
Whether they are the same is tried before it is used.
"""

from __future__ import annotations

import functools
import itertools
import sys
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_promptcache import causal, exponentials, softmax
from mlx_promptcache.streams import beside, cores, in_main_thread_on_cpu

if TYPE_CHECKING:
    from collections.abc import Callable

    # Of queries, keys, values, the layer, the scale and the mask; None leaves them to the usual.
    Attend = Callable[[mx.array, Any, Any, Any, float, Any], mx.array | None]

ATTENTION = "scaled_dot_product_attention"
BASE = "mlx_lm.models.base"
LEAST_SCORES = 1 << 16  # of a layer: of fewer, what streams wait for each other takes longer
MOST_GROUPS = 16
DTYPES = (mx.float32, mx.bfloat16, mx.float16)


def stand_in(model: Any, kind: str, attend: Attend) -> None:
    """Let `attend` be asked wherever this model's own modules call mlx-lm's attention, before what
    they call now: once for each `kind`, the last one first.
    """
    usual = _innermost(getattr(sys.modules[BASE], ATTENTION))
    for name in {type(module).__module__ for module in model.modules()}:
        now = getattr(sys.modules.get(name), ATTENTION, None)
        if now is None or _innermost(now) is not usual or kind in _kinds(now):
            continue
        made = asking_first(attend, now)
        # With itself: what others make of it with `wraps` has all that it has.
        made.stands_in = made, (*_kinds(now), kind)  # type: ignore[attr-defined]
        setattr(sys.modules[name], ATTENTION, made)


def asking_first(attend: Attend, usual: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """Attention that is what `attend` gives, or where that is None, or more is asked, the usual."""

    @functools.wraps(usual)
    def attention(
        queries: mx.array,
        keys: Any,
        values: Any,
        cache: Any,
        scale: float,
        mask: Any,
        **more: Any,  # sinks, and whatever other releases of mlx-lm have
    ) -> mx.array:
        if all(value is None for value in more.values()):
            told = attend(queries, keys, values, cache, scale, mask)
            if told is not None:
                return told
        return usual(queries, keys, values, cache=cache, scale=scale, mask=mask, **more)

    return attention


def _innermost(attention: Any) -> Any:
    """What these stand in for; what others put around it is theirs, and stays as it is."""
    while _kinds(attention):
        attention = attention.__wrapped__
    return attention


def _kinds(attention: Any) -> tuple[str, ...]:
    own, kinds = getattr(attention, "stands_in", (None, ()))
    return kinds if own is attention else ()


def spread(model: Any) -> None:
    """Let the attention of this model be computed on several cores, and several exponentials at a
    time, where that is on a CPU and it gains; no bit of it changes.
    """
    if in_main_thread_on_cpu() and (cores() > 1 or exponentials.is_x86()):
        stand_in(model, "spread", attend_by_groups)


def attend_by_groups(
    queries: mx.array, keys: Any, values: Any, cache: Any, scale: float, mask: Any
) -> mx.array | None:
    """Attention by groups of heads; None where that is not what MLX computes, or not worth it."""
    if hasattr(cache, "bits") or hasattr(cache, "attends"):  # quantised, or attending by itself
        return None
    if not _serves(queries, keys, values, mask):
        return None
    return by_groups(queries, keys, values, scale, mask)


def _serves(queries: mx.array, keys: Any, values: Any, mask: Any) -> bool:
    """Whether it is worth it, and nothing but what `by_groups` does."""
    if not (isinstance(keys, mx.array) and isinstance(values, mx.array)):
        return False
    if not queries.ndim == keys.ndim == values.ndim == 4:
        return False
    batch, heads, count, _ = queries.shape
    kv_heads, length = keys.shape[1:3]
    if batch * heads * count * length < LEAST_SCORES or heads % kv_heads or count > length:
        return False
    if not queries.dtype == keys.dtype == values.dtype or queries.dtype not in DTYPES:
        return False
    if isinstance(mask, mx.array):
        usual = mask.dtype in (mx.bool_, queries.dtype)
        if not usual or (mask.ndim > 2 and mask.shape[-3] != 1):
            return False
    elif mask not in (None, "causal"):
        return False
    return in_main_thread_on_cpu() and _is_the_same(queries.dtype)


def by_groups(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: mx.array | str | None
) -> mx.array:
    """Attention of queries `[batch, heads, N, D]` to rows `[batch, KV heads, L, D]`, as
    `mx.fast.scaled_dot_product_attention` computes it, for one group of heads beside the other.
    """
    batch, heads, count, width = queries.shape
    kv_heads, length = keys.shape[1], keys.shape[2]
    dtype, repeats = queries.dtype, heads // kv_heads
    queries = (mx.array(scale, dtype) * queries).reshape(batch, kv_heads, repeats, count, width)
    keys, values = keys.swapaxes(-1, -2)[:, :, None], values[:, :, None]
    hides = isinstance(mask, str)
    if isinstance(mask, str):
        mask = causal.sees(count, length)  # computed only if a group needs it
    elif mask is not None and mask.ndim > 2:
        mask = mask[..., None, :, :]  # one for all heads
    told = []
    for part, stream in _parts(kv_heads, repeats):
        of_keys = slice(None) if kv_heads == 1 else part[0]
        scores = queries[:, part[0], part[1]] @ keys[:, of_keys]
        if hides and causal.serves(scores):
            scores = causal.hide(scores)
        elif mask is not None:
            scores = _masked(scores, mask)
        told.append(_weights(scores, stream) @ values[:, of_keys])
    joined = mx.concatenate(told, axis=2 if kv_heads == 1 else 1)
    return joined.reshape(batch, heads, count, values.shape[-1])


def _masked(scores: mx.array, mask: mx.array) -> mx.array:
    if mask.dtype != mx.bool_:
        return scores + mask
    return mx.where(mask, scores, mx.array(mx.finfo(scores.dtype).min, scores.dtype))


def _weights(scores: mx.array, stream: mx.Stream) -> mx.array:
    if not softmax.serves(scores):
        return mx.softmax(scores, axis=-1, precise=True, stream=stream)
    with mx.stream(stream):
        return softmax.softmax(scores)


def _parts(kv_heads: int, repeats: int) -> list[tuple[tuple[slice, slice], mx.Stream]]:
    """Groups of heads, `[KV heads, heads of each]`, and a stream for each. There is one more than
    cores, if there are several: so there are products to be computed while weights are.
    """
    size = repeats if kv_heads == 1 else kv_heads
    number = min(size, cores() + 1 if cores() > 1 else 1, MOST_GROUPS)
    edges = [size * i // number for i in range(number + 1)]
    slices = [slice(begin, end) for begin, end in itertools.pairwise(edges)]
    whole = slice(None)
    return [
        ((whole, part) if kv_heads == 1 else (part, whole), stream)
        for part, stream in zip(slices, beside(number), strict=True)
    ]


@functools.cache
def _is_the_same(dtype: mx.Dtype) -> bool:
    """Whether the installed MLX computes the same bits."""
    rows = mx.sin(mx.arange(2 * 5 * 8)).reshape(1, 2, 5, 8).astype(dtype)
    queries = mx.concatenate([rows, 1 - rows], axis=1)[:, :, :3]
    seen = mx.arange(5) < mx.arange(2, 5)[:, None]
    same = [
        mx.array_equal(
            by_groups(queries[:, :, :count], rows, 2 * rows, 0.3, mask),
            mx.fast.scaled_dot_product_attention(
                queries[:, :, :count], rows, 2 * rows, scale=0.3, mask=mask
            ),
        )
        for count, mask in ((1, None), (3, "causal"), (3, seen), (3, seen.astype(dtype)))
    ]
    return bool(mx.all(mx.stack(same)).item())
