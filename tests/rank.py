"""What one rank does in the tests of ranks: a runner of its part of a tiny model, and its deeds.

    python rank.py STRATEGY KIND STORE DEEDS

DEEDS are JSON, `[[deed, arguments], ...]`; what they return is printed, as JSON, at the end.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_lm.models import llama, qwen2

import tiny
from mlx_promptcache import PromptCacheError, Runner, Sampling
from mlx_promptcache.ranks import Ranks
from mlx_promptcache.shard_cache import ShardCache

if TYPE_CHECKING:
    from mlx_promptcache.run import Run

SAMPLED = Sampling(temp=1.0, top_p=0.9, repetition_penalty=1.1, seed=7)
LAYERS = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4}


def wide() -> Any:
    """A llama that can be split into four."""
    return tiny.uneven(
        tiny.with_weights(llama.Model(llama.ModelArgs.from_dict({**tiny.LLAMA, **LAYERS})))
    )


def deep() -> Any:
    """A qwen2 of four layers."""
    model = qwen2.Model(qwen2.ModelArgs.from_dict({**tiny.LLAMA, **LAYERS}))
    return tiny.uneven(tiny.without_biases(tiny.with_weights(model)))


class Player:
    """One rank."""

    def __init__(self, strategy: str, kind: str, store: str) -> None:
        self.ranks = Ranks.join(strategy)
        model = {"wide": wide, "deep": deep, **tiny.KINDS}[kind]()
        self.ranks.split(model)
        directory = Path(store.format(rank=self.ranks.rank))
        self.runner = Runner(model, None, ShardCache(directory, kind, self.ranks), ranks=self.ranks)
        self.run: Run | None = None

    def do(self, deed: str, *arguments: Any) -> Any:
        """Do something, and tell what came of it; an error is its class and its sentence."""
        fed = self.runner.tokens_fed
        try:
            told = getattr(self, deed)(*arguments)
        except PromptCacheError as exc:
            return [type(exc).__name__, str(exc)]
        match = self.run and self.run.match
        return {
            "told": told,
            "fed": self.runner.tokens_fed - fed,
            "reason": match and match.reason,
        }

    def start(self, length: int, seed: int = 1) -> None:
        """Begin with a prompt of random tokens."""
        self.run = self.runner.start(tiny.random_tokens(length, seed), sampling=SAMPLED)

    def steps(self, count: int) -> list[int]:
        """Generate."""
        assert self.run is not None
        return [step.token for step in self.run.steps(count)]

    def keep(self) -> None:
        """Keep the prompt."""
        assert self.runner.cache is not None
        assert self.run is not None
        self.runner.cache.keep(self.run.prompt_state())

    def save(self, name: str) -> None:
        """Save the state at hand."""
        assert self.runner.cache is not None
        self.runner.cache.save(name, self.runner.state, sync=False)

    def load(self, name: str) -> None:
        """Go on from a named state."""
        assert self.runner.cache is not None
        self.run = self.runner.resume(self.runner.cache.load(name))

    def state(self) -> str:
        """A hash of the state at hand, to the last bit."""
        return tiny.digest(self.runner.state)

    def die(self, rank: int) -> None:
        """End one rank as a crash would."""
        if self.ranks.rank == rank:
            os._exit(9)


if __name__ == "__main__":
    player = Player(*sys.argv[1:4])
    print(json.dumps([player.do(*deed) for deed in json.loads(sys.argv[4])]))
