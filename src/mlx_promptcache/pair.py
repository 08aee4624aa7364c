"""Pair: a model and its draft model as one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlx_promptcache.engine import cache as mlx_cache
from mlx_promptcache.fingerprint import KVSettings
from mlx_promptcache.layers import make_layers

if TYPE_CHECKING:
    import mlx.core as mx


class Pair:
    """Both are fed the same, the logits are the model's, and the layers are those of the model,
    then those of the draft model.
    """

    def __init__(self, model: Any, draft: Any) -> None:
        self.model, self.draft = model, draft
        self.own = len(make_layers(model, KVSettings()))

    def make_cache(self) -> list[Any]:
        """Empty layers of both."""
        return [layer for m in (self.model, self.draft) for layer in make_layers(m, KVSettings())]

    def __call__(self, inputs: mx.array, cache: list[Any]) -> Any:
        """Feed both; return the model's logits."""
        logits = self.model(inputs, cache=cache[: self.own])
        self.draft(inputs, cache=cache[self.own :])
        return logits

    def propose(self, inputs: mx.array, cache: list[Any]) -> mx.array:
        """Feed the draft model alone; return its logits `[vocab]` after the last token."""
        logits: mx.array = self.draft(inputs, cache=cache[self.own :])
        return logits[0, -1]

    def rewind(self, cache: list[Any], own: int, drafted: int) -> None:
        """Forget the last tokens: so many of the model's, and of the draft model's."""
        mlx_cache.trim_prompt_cache(cache[: self.own], own)
        mlx_cache.trim_prompt_cache(cache[self.own :], drafted)
