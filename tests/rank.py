"""What one rank does in the tests of ranks: a runner of its part of a tiny model, and its deeds.

    python rank.py STRATEGY KIND STORE DEEDS

DEEDS are JSON, `[[deed, arguments], ...]`; what they return is printed, as JSON, at the end.
"""

from __future__ import annotations

# First: mlx-lm is imported in part then, which saves each process seconds.
import mlx_promptcache.engine  # noqa: F401  # isort: skip

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx_lm.models import llama, qwen2

import tiny
from mlx_promptcache import PromptCacheError, Runner, Sampling, StoreError
from mlx_promptcache.ranks import Ranks
from mlx_promptcache.shard_cache import ShardCache
from mlx_promptcache.store import Store

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
        log = logging.getLogger("mlx_promptcache")
        log.handlers, log.propagate = [logging.NullHandler()], False
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

    def branch(self, seed: int, how: str = "", cut: int = 0) -> None:
        """Begin as others did, end otherwise, and keep it; one pass ends at `cut`."""
        prompt = [*tiny.random_tokens(512, 1), seed, *tiny.random_tokens(80, seed)]
        exact = how == "exact"
        self.run = self.runner.start(prompt, boundaries=[cut], exact=exact, sampling=SAMPLED)
        assert self.runner.cache is not None
        self.runner.cache.keep(self.run.prompt_state(), exact=exact)

    def steps(self, count: int) -> list[int]:
        """Generate."""
        assert self.run is not None
        return [step.token for step in self.run.steps(count)]

    def keep(self) -> None:
        """Keep the prompt."""
        assert self.runner.cache is not None
        assert self.run is not None
        self.runner.cache.keep(self.run.prompt_state())

    def attach(self, url: str) -> None:
        """Ask a remote from now on, and tell it."""
        assert self.runner.cache is not None
        self.runner.cache.attach(url, seconds=60)

    def finish_sending(self) -> None:
        """Wait until the remote has what was kept."""
        assert self.runner.cache is not None
        assert self.runner.cache.supply is not None
        self.runner.cache.supply.close()

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

    def draw_afresh(self, length: int, count: int) -> list[int]:
        """Generate with no seed."""
        prompt = tiny.random_tokens(length, 2)
        return [step.token for step in self.runner.generate(prompt, count, Sampling(temp=2.0))]

    def skew(self, rank: int) -> None:
        """Let one rank's logits be nothing like the others'."""
        forward = self.runner.forward

        def skewed(inputs: mx.array, layers: list[Any]) -> tuple[mx.array, mx.array | None]:
            logits, hidden = forward(inputs, layers)
            return -logits, hidden

        if self.ranks.rank == rank:
            vars(self.runner)["forward"] = skewed

    def fill_drive(self, rank: int) -> None:
        """Let nothing be written by one rank any more."""

        def write(*_: Any, **__: Any) -> bool:
            raise StoreError("the drive is full")

        if self.ranks.rank == rank:
            Store.write = write  # type: ignore[method-assign]

    def die_when_writing(self, rank: int) -> None:
        """Let one rank end at its next write, as a crash would end it."""
        if self.ranks.rank == rank:
            Store.write = lambda *_, **__: os._exit(9)  # type: ignore[method-assign]

    def sleep(self, rank: int, seconds: float) -> None:
        """Let one rank do nothing."""
        if self.ranks.rank == rank:
            time.sleep(seconds)


if __name__ == "__main__":
    player = Player(*sys.argv[1:4])
    print(json.dumps([player.do(*deed) for deed in json.loads(sys.argv[4])]))
