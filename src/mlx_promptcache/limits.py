"""What a model takes: which tokens, how many of them, and which sampling."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from mlx_promptcache.errors import PromptError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mlx_promptcache.prompt import Prompt
    from mlx_promptcache.sampling import Sampling


def full(length: int, context_length: int | None) -> PromptError:
    """What is said of a prompt of so many tokens that leaves no room for an answer."""
    return PromptError(
        f"the prompt has {length} tokens, and the model's context ends at {context_length}: "
        "shorten it"
    )


class Limits(NamedTuple):
    """How many tokens a model knows, and how many its context holds (None: any number)."""

    vocabulary: int
    context_length: int | None

    def prompt(self, prompt: Prompt, boundaries: Sequence[int] = ()) -> Prompt:
        """A prompt with more boundaries, if the model can be given it.

        Raises:
            PromptError: it is empty or too long, or has tokens that the model does not know.
        """
        if not prompt.tokens:
            raise PromptError("the prompt is empty: give some text or tokens")
        for token in prompt.tokens:
            if not 0 <= token < self.vocabulary:  # MLX would read beyond the embeddings
                raise PromptError(
                    f"{token} is no token of this model, which has {self.vocabulary} of them"
                )
        if self.context_length is not None and len(prompt.tokens) > self.context_length:
            raise PromptError(
                f"the prompt has {len(prompt.tokens)} tokens, more than the {self.context_length} "
                "of the model's context: shorten it"
            )
        ends = {b for b in (*prompt.boundaries, *boundaries) if 0 < b < len(prompt.tokens)}
        return replace(prompt, boundaries=tuple(sorted(ends)))

    def sampling(self, sampling: Sampling) -> Sampling:
        """The sampling, if the model can be sampled so.

        Raises:
            PromptError: it names a token that the model does not know.
        """
        try:
            sampling.check(self.vocabulary)
        except ValueError as exc:
            raise PromptError(str(exc)) from exc
        return sampling

    def room_for(self, held: int, max_tokens: int) -> int:
        """How many tokens may be generated after `held` ones; `max_tokens` < 0 is no limit."""
        wanted = max_tokens if max_tokens >= 0 else sys.maxsize
        if self.context_length is None:
            return wanted
        return min(wanted, max(0, self.context_length - held))
