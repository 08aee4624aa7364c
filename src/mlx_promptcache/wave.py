"""Waves: some questions at a time, after a prefix whose rows are there once for all of them.

mlx-lm's batch generator copies the rows of a prefix for every question, several times on its way.
Where the prefix is long that takes longer than to answer. Here each wave of questions has rows of
its own after those of the prefix, and the next wave writes over them. The price is that a wave
lasts until its longest answer ends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_promptcache.layers import live_arrays
from mlx_promptcache.run import Draw
from mlx_promptcache.shared_rows import Masks, SharedRows, let_attend

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mlx_promptcache.sampling import Sampling

MOST_TOKENS = 512  # of a question: they are fed in one pass


class Waves:
    """Decodes up to `size` questions at a time after one prefix, on whose layers it stands. All of
    these are `KVCache` objects; they stay as they are.
    """

    def __init__(self, model: Any, layers: Sequence[Any], *, size: int, room: int) -> None:
        let_attend(model)
        self._model, self._size, masks = model, size, Masks()
        self._layers = [SharedRows(layer, size, room, masks) for layer in layers]

    def decode(
        self, questions: Sequence[tuple[Sequence[int], Sequence[int], Sampling]]
    ) -> Iterator[list[int]]:
        """Yield a token of each question, again and again, until the caller has enough. A question
        is the tokens of the prefix and the question that penalties count, those to be fed, and how
        to draw, with a seed.
        """
        draw = _Draws([(held, sampling) for held, _, sampling in questions])
        fed = [list(tokens) for _, tokens, _ in questions]
        fed += [[0]] * (self._size - len(fed))  # rows that nobody asks
        self._feed([tokens[:-1] for tokens in fed])
        following = mx.array([tokens[-1] for tokens in fed])
        while True:
            logits = self._model(following[:, None], cache=self._layers)[:, -1]
            drawn = draw(logits)
            yield [int(token) for token in drawn.tolist()]  # type: ignore[union-attr, arg-type]
            idle = mx.zeros((self._size - len(questions),), drawn.dtype)
            following = mx.concatenate([drawn, idle])

    def _feed(self, questions: list[list[int]]) -> None:
        for layer in self._layers:
            layer.rewind()
        lengths = [len(tokens) for tokens in questions]
        if not any(lengths):
            return
        padded = [tokens + [0] * (max(lengths) - len(tokens)) for tokens in questions]
        self._model(mx.array(padded), cache=self._layers)  # its logits are never computed
        for layer in self._layers:
            layer.close_questions(mx.array(lengths))
        mx.eval(live_arrays(self._layers))


class _Draws:
    """Draws a token of each question, with the keys that a run of its own would take."""

    def __init__(self, questions: Sequence[tuple[Sequence[int], Sampling]]) -> None:
        self._count = len(questions)
        self._plain = all(s.temp == 0 and not s.sampler().processes for _, s in questions)
        self._draws = [Draw(sampling, held) for held, sampling in questions]
        self._keys = [mx.random.key(sampling.seed or 0) for _, sampling in questions]
        self._last: list[mx.array] | None = None

    def __call__(self, logits: mx.array) -> mx.array:
        """The tokens after logits `[size, vocab]`; those of the questions come first."""
        if self._plain:
            return mx.argmax(logits[: self._count], axis=-1)
        last: list[mx.array | None] = [*self._last] if self._last else [None] * self._count
        drawn = [
            draw(key, logits[i], token)
            for i, (draw, key, token) in enumerate(zip(self._draws, self._keys, last, strict=True))
        ]
        self._keys = [key for key, _ in drawn]
        self._last = [token for _, token in drawn]
        return mx.concatenate(self._last)
