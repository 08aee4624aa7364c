"""Prompts whose answers are known: what a model says after them without a cache.

All of them begin alike, and leave one another inside a cell, at its edge, and in the next one.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx

import tiny
from mlx_promptcache import Runner, Sampling, State

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ANSWER = 4  # tokens
GREEDY, DRAWN = Sampling(), Sampling(temp=1.0, seed=7)
SURE = 1e-2  # of logits: what rounding may change is far less
SHARED, TAILS = 270, (0, 12, 14, 250)  # tokens
SHORT = (40, 256)


@dataclass(frozen=True)
class Known:
    """A prompt, and what is said after it: the likeliest tokens, and those drawn with a seed.

    What is drawn is known of runs with `exact` alone: rounding may change it.
    """

    prompt: tuple[int, ...]
    greedy: tuple[int, ...]
    drawn: tuple[int, ...]

    def said(self, *, drawn: bool) -> tuple[int, ...]:
        """What is said after the prompt."""
        return self.drawn if drawn else self.greedy

    def after(self, state: State) -> tuple[int, ...] | None:
        """What is said after a state; None if it is not of this prompt and answer."""
        said = self.said(drawn=state.sampling.temp > 0)
        start, rest = state.tokens[: len(self.prompt)], state.tokens[len(self.prompt) :]
        return said[len(rest) :] if (start, rest) == (self.prompt, said[: len(rest)]) else None


@functools.cache
def model_of(kind: str) -> Any:
    """A tiny model, the same in every process."""
    return tiny.smallest() if kind == "smallest" else tiny.KINDS[kind]()


def known(kind: str) -> list[Known]:
    """The prompts of a kind of model, with their answers."""
    runner = Runner(model_of(kind))
    return [_answered(runner, prompt) for prompt in _prompts(_vocabulary(kind))]


def _vocabulary(kind: str) -> int:
    return 16 if kind == "smallest" else tiny.VOCAB


def _prompts(vocabulary: int) -> Iterator[tuple[int, ...]]:
    shared = tiny.random_tokens(SHARED, 1, vocabulary)
    for length in SHORT:
        yield tuple(shared[:length])
    for i, tail in enumerate(TAILS):
        yield (*shared, *tiny.random_tokens(tail, 2 + i, vocabulary))


def _answered(runner: Runner, prompt: tuple[int, ...]) -> Known:
    while not _is_sure(runner, prompt):
        prompt = (*prompt[:-1], (prompt[-1] + 1) % 16)
    return Known(prompt, _said(runner, prompt, GREEDY), _said(runner, prompt, DRAWN))


def _said(runner: Runner, prompt: Sequence[int], sampling: Sampling) -> tuple[int, ...]:
    return tuple(s.token for s in runner.generate(prompt, ANSWER, sampling, exact=True))


def _is_sure(runner: Runner, prompt: Sequence[int]) -> bool:
    """Whether each of the likeliest tokens is so by more than rounding."""
    for _ in runner.generate(prompt, ANSWER, GREEDY, exact=True):
        logits = runner.state.logits
        assert logits is not None
        likeliest: Any = mx.sort(logits)[-2:].tolist()
        if likeliest[1] - likeliest[0] < SURE:
            return False
    return True
