"""What mlx-lm does by itself: nothing here comes from this project."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import QuantizedKVCache, make_prompt_cache

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")
Decoded = tuple[list[int], list[mx.array]]
"""Greedy tokens, and the logits that each was taken from."""


def with_cache(model: Any, prompt: Sequence[int], ends: Sequence[int], count: int) -> Decoded:
    """Decode with mlx-lm's own cache; the passes over the prompt end at `ends`."""
    cache = make_prompt_cache(model)
    starts = [0, *ends[:-1]]
    for start, end in zip(starts, ends, strict=True):
        logits = model(mx.array(list(prompt[start:end]))[None], cache=cache)[0, -1]
        mx.eval(logits)
    decoded: Decoded = ([], [])
    for _ in range(count):
        _append(decoded, logits)
        logits = model(mx.array([[decoded[0][-1]]]), cache=cache)[0, -1]
    return decoded


def without_cache(model: Any, prompt: Sequence[int], count: int) -> Decoded:
    """Decode by computing everything again for each token."""
    decoded: Decoded = ([], [])
    for _ in range(count):
        _append(decoded, model(mx.array([*prompt, *decoded[0]])[None])[0, -1])
    return decoded


def _append(decoded: Decoded, logits: mx.array) -> None:
    likeliest: Any = mx.argmax(logits).item()
    decoded[0].append(likeliest)
    decoded[1].append(logits)


def apart(a: Sequence[mx.array], b: Sequence[mx.array]) -> float:
    """The largest difference between logits; tokens that are ruled out must be so in both."""
    one, other = mx.stack(list(a)), mx.stack(list(b))
    finite = mx.isfinite(one)
    if not mx.array_equal(finite, mx.isfinite(other)):
        return float("inf")
    away: Any = mx.max(mx.where(finite, mx.abs(one - other), 0)).item()
    return float(away)


def quantises(model: Any, prompt: Sequence[int], **kv: int) -> bool:
    """Whether there is anything that mlx-lm quantises; raises whatever mlx-lm raises."""
    cache = make_prompt_cache(model)
    steps = generate_step(
        mx.array(list(prompt)), model, max_tokens=2, prompt_cache=cache, prefill_step_size=16, **kv
    )
    list(steps)
    return any(type(layer) is QuantizedKVCache for layer in cache)


def answer(call: Callable[..., T], *arguments: Any, **more: Any) -> T | str:
    """What mlx-lm returns when this is called, or the first sentence of what it raises."""
    try:
        return call(*arguments, **more)
    except Exception as exc:  # noqa: BLE001 - mlx-lm may raise anything
        line = (str(exc).splitlines() or [type(exc).__name__])[0]
        return line.partition(". ")[0].strip()
