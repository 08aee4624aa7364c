"""From logits and a key to a token.

The transforms are mlx-lm's own, in mlx-lm's order. What differs is the randomness: mlx-lm draws
from the global `mx.random.state`, which says nothing about where in a run a draw was made; here
every draw takes a key that the caller split off, so a state can carry it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx_lm.sample_utils import (
    apply_min_p,
    apply_top_k,
    apply_top_p,
    make_logits_processors,
)

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; names and meanings as in `mlx_lm.sample_utils`.

    `temp` 0 takes the likeliest token. `seed` starts the key of a run; a state that was sampled
    from carries its key instead, and a seed of None.
    """

    temp: float = 0.0
    top_p: float = 0.0
    top_k: int = 0
    min_p: float = 0.0
    min_tokens_to_keep: int = 1
    repetition_penalty: float | None = None
    repetition_context_size: int = 20
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temp < math.inf:
            raise ValueError("the temperature must be 0 or more")
        if not 0 <= self.top_p <= 1 or not 0 <= self.min_p <= 1:
            raise ValueError("top-p and min-p must be between 0 and 1")
        if self.top_k < 0:
            raise ValueError("top-k must be 0 or more")
        penalty = self.repetition_penalty
        if penalty is not None and not 0 < penalty < math.inf:
            raise ValueError("the repetition penalty must be more than 0")
        if self.min_tokens_to_keep < 1:
            raise ValueError("at least 1 token must be kept")
        if self.seed is not None and not 0 <= self.seed < 1 << 64:
            raise ValueError("the seed must be a number of 64 bits, from 0 on")
        if self.repetition_context_size < 1:
            raise ValueError("the repetition context must be 1 token or more")

    @property
    def context_size(self) -> int:
        """How many of the last tokens the penalties look at."""
        return self.repetition_context_size if self.repetition_penalty else 0

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Sampling:
        """The settings from JSON; what this version does not know is left out.

        Raises:
            ValueError, TypeError: they make no sense.
        """
        known = {f.name for f in fields(cls)}
        return cls(**{name: v for name, v in value.items() if name in known})

    def sampler(self) -> Callable[[mx.array, mx.array, mx.array], mx.array]:
        """Return the function from `(logits [1, vocab], last tokens, key)` to a token `[1]`."""
        processors = make_logits_processors(
            repetition_penalty=self.repetition_penalty,
            repetition_context_size=self.repetition_context_size,
        )

        def sample(logits: mx.array, tokens: mx.array, key: mx.array) -> mx.array:
            for process in processors:
                logits = process(tokens, logits + 0)  # some write in place, into what a state holds
            if self.temp == 0:
                return mx.argmax(logits, axis=-1)
            return mx.random.categorical(self._filtered(logits) * (1 / self.temp), key=key)

        return sample

    def _filtered(self, logits: mx.array) -> mx.array:
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        if 0 < self.top_p < 1:
            logprobs = apply_top_p(logprobs, self.top_p)
        if self.min_p > 0:
            logprobs = apply_min_p(logprobs, self.min_p, self.min_tokens_to_keep)
        if 0 < self.top_k < logprobs.shape[-1]:
            logprobs = apply_top_k(logprobs, self.top_k)
        return logprobs
