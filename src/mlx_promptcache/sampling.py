"""From logits and a key to a token.

The transforms are mlx-lm's, in mlx-lm's order. What differs is the randomness: mlx-lm draws from
the global `mx.random.state`, which says nothing about where in a run a draw was made; here every
draw takes a key that the caller split off, so a state can carry it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx

from mlx_promptcache.engine import sample_utils

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mlx_promptcache.ranks import Ranks

MOST = sys.float_info.max
INDICES = (1 << 31) - 1  # what MLX takes for a token id and a length


def fresh_seed(bits: int, ranks: Ranks | None = None) -> int:
    """A seed of so many bits that no other run has, and all ranks of this one; of the system's own
    randomness.
    """
    own = int.from_bytes(os.urandom(-(-bits // 8)), "little") >> -bits % 8
    return own if ranks is None else ranks.told("choosing a seed", own)[0][0]


class _Range(NamedTuple):
    title: str
    kind: type[int] | type[float]
    low: float
    high: float

    def checked(self, value: Any) -> int | float:
        number = Integral if self.kind is int else Real
        is_number = isinstance(value, number) and not isinstance(value, bool)
        if not (is_number and self.low <= value <= self.high):
            raise ValueError(self._sentence)
        return self.kind(value)

    @property
    def _sentence(self) -> str:
        number = "a whole number" if self.kind is int else "a number"
        if self.low == -self.high:
            return f"{self.title} must be {number}"
        if self.high == MOST:
            return f"{self.title} must be {number}, {self.low} or more"
        return f"{self.title} must be {number} between {self.low} and {self.high}"


RANGES = {
    "temp": _Range("the temperature", float, 0, MOST),
    "top_p": _Range("top-p", float, 0, 1),
    "top_k": _Range("top-k", int, 0, MOST),
    "min_p": _Range("min-p", float, 0, 1),
    "min_tokens_to_keep": _Range("the number of tokens that min-p keeps", int, 1, MOST),
    "xtc_probability": _Range("the XTC probability", float, 0, 1),
    "xtc_threshold": _Range("the XTC threshold", float, 0, 0.5),
    "repetition_penalty": _Range("the repetition penalty", float, 0, MOST),
    "repetition_context_size": _Range("the repetition context", int, 1, INDICES),
    "presence_penalty": _Range("the presence penalty", float, -MOST, MOST),
    "presence_context_size": _Range("the presence context", int, 1, INDICES),
    "frequency_penalty": _Range("the frequency penalty", float, -MOST, MOST),
    "frequency_context_size": _Range("the frequency context", int, 1, INDICES),
    "seed": _Range("the seed", int, 0, (1 << 64) - 1),
}
OPTIONAL = {"repetition_penalty", "presence_penalty", "frequency_penalty", "seed"}
TOKEN = _Range("a token id", int, 0, INDICES)
BIAS = _Range("a logit bias", float, -MOST, MOST)


class Biases(Mapping[int, float]):
    """What is added to the logits of some tokens, by token id. A value, with a hash.

    Raises:
        ValueError: an id or a bias is none.
    """

    def __init__(self, biases: Mapping[Any, Any]) -> None:
        pairs = sorted((TOKEN.checked(t), BIAS.checked(bias)) for t, bias in biases.items())
        self._biases = {int(token): float(bias) for token, bias in pairs}

    def __getitem__(self, token: int) -> float:
        return self._biases[token]

    def __iter__(self) -> Iterator[int]:
        return iter(self._biases)

    def __len__(self) -> int:
        return len(self._biases)

    def __hash__(self) -> int:
        return hash(tuple(self._biases.items()))

    def __repr__(self) -> str:
        return repr(self._biases)

    def to_json(self) -> dict[str, float]:
        """The biases as JSON, whose keys are strings."""
        return {str(token): bias for token, bias in self.items()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Biases:
        """The biases from JSON.

        Raises:
            ValueError, TypeError: they make no sense.
        """
        tokens = {name: int(name) for name in value}
        if any(str(token) != name for name, token in tokens.items()):
            raise ValueError("a token id is a plain number")
        return cls({tokens[name]: bias for name, bias in value.items()})


def _tokens(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    if not isinstance(value, Iterable):
        raise TypeError("the special tokens of XTC must be a list of token ids")
    return tuple(sorted({int(TOKEN.checked(token)) for token in value}))


def _biases(value: Any) -> Biases | None:
    if value is None or value == {}:
        return None
    if not isinstance(value, Mapping):
        raise TypeError("the logit bias must be a mapping from token ids to biases")
    return Biases(value)


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; names and meanings as in `mlx_lm.sample_utils`.

    `temp` 0 takes the likeliest token, after `logit_bias` and the penalties. A penalty of None or
    0 is none. `seed` starts the key of a run; a state that was sampled from carries its key
    instead, and a seed of None.

    Raises:
        ValueError, TypeError: a setting makes no sense; the sentence says which.
    """

    temp: float = 0.0
    top_p: float = 0.0
    top_k: int = 0
    min_p: float = 0.0
    min_tokens_to_keep: int = 1
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    xtc_special_tokens: Sequence[int] = ()
    logit_bias: Mapping[int, float] | None = None
    repetition_penalty: float | None = None
    repetition_context_size: int = 20
    presence_penalty: float | None = None
    presence_context_size: int = 20
    frequency_penalty: float | None = None
    frequency_context_size: int = 20
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, allowed in RANGES.items():
            value = getattr(self, name)
            if value is not None or name not in OPTIONAL:
                self._set(name, allowed.checked(value))
        self._set("xtc_special_tokens", _tokens(self.xtc_special_tokens))
        self._set("logit_bias", _biases(self.logit_bias))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # one spelling of a value, so that equals are equal

    @property
    def context_size(self) -> int:
        """How many of the last tokens the penalties look at."""
        penalties = (
            (self.repetition_penalty, self.repetition_context_size),
            (self.presence_penalty, self.presence_context_size),
            (self.frequency_penalty, self.frequency_context_size),
        )
        return max((size for penalty, size in penalties if penalty), default=0)

    def check(self, vocabulary: int) -> None:
        """Compare with the number of tokens that a model has.

        Raises:
            ValueError: a bias is for a token that the model does not have.
        """
        beyond = max(self.logit_bias or (0,))
        if beyond >= vocabulary:  # MLX would write beyond the logits
            raise ValueError(
                f"a logit bias is for the token {beyond}, and this model has {vocabulary} of them"
            )

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON."""
        bias = Biases(self.logit_bias).to_json() if self.logit_bias else None
        special = list(self.xtc_special_tokens)
        return {**asdict(self), "xtc_special_tokens": special, "logit_bias": bias}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Sampling:
        """The settings from JSON; what this version does not know is left out.

        Raises:
            ValueError, TypeError: they make no sense.
        """
        if not isinstance(value, Mapping):
            raise TypeError("sampling settings must be an object")
        known = {f.name for f in fields(cls)}
        given = {name: v for name, v in value.items() if name in known}
        if isinstance(given.get("logit_bias"), Mapping):
            given["logit_bias"] = Biases.from_json(given["logit_bias"])
        return cls(**given)

    def sampler(self) -> Sampler:
        """Return what draws tokens like this."""
        return Sampler(self)


class Sampler:
    """Draws tokens as one `Sampling` says, and remembers nothing. No call waits for a value."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._processors = sample_utils.make_logits_processors(
            logit_bias=dict(sampling.logit_bias) if sampling.logit_bias else None,
            repetition_penalty=sampling.repetition_penalty,
            repetition_context_size=sampling.repetition_context_size,
            presence_penalty=sampling.presence_penalty,
            presence_context_size=sampling.presence_context_size,
            frequency_penalty=sampling.frequency_penalty,
            frequency_context_size=sampling.frequency_context_size,
        )

    def __call__(self, logits: mx.array, tokens: mx.array, key: mx.array) -> mx.array:
        """Return a token, `[1]`, after `logits` `[1, vocab]` and the last `tokens`, oldest first.

        Raises:
            ValueError: a bias is for a token beyond the logits.
        """
        return self.drawn(self.processed(logits, tokens), key)

    @property
    def processes(self) -> bool:
        """Whether there are a bias or penalties."""
        return bool(self._processors)

    def drawn(self, logits: mx.array, key: mx.array) -> mx.array:
        """Return a token, `[1]`, after logits `[1, vocab]` that were processed."""
        if self._sampling.temp == 0:
            return mx.argmax(logits, axis=-1)
        coin = key
        if self._sampling.xtc_probability > 0:  # else the key of the draw stays what it always was
            key, coin = mx.random.split(key)
        return mx.random.categorical(
            self.filtered(logits, coin) * (1 / self._sampling.temp), key=key
        )

    def processed(self, logits: mx.array, tokens: mx.array) -> mx.array:
        """The logits after bias and penalties. The penalties count the last `tokens`."""
        self._sampling.check(logits.shape[-1])
        if self._processors:
            logits = logits + 0  # some write in place, into what a state holds
        for process in self._processors:
            logits = process(tokens, logits)
        return logits

    def filtered(self, logits: mx.array, coin: mx.array) -> mx.array:
        """Log-probabilities, before the temperature, with -inf for what is not to be drawn.

        `coin` is the key that decides about XTC.
        """
        sampling = self._sampling
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        vocabulary = logprobs.shape[-1]
        if 0 < sampling.top_p < 1:
            logprobs = sample_utils.apply_top_p(logprobs, sampling.top_p)
        if sampling.min_p > 0:
            # An error inside a compiled function would break MLX's global random state for good.
            kept = min(sampling.min_tokens_to_keep, vocabulary)
            logprobs = sample_utils.apply_min_p(logprobs, sampling.min_p, kept)
        if sampling.xtc_probability > 0:
            logprobs = self._without_top_choices(logprobs, coin)
        if 0 < sampling.top_k < vocabulary:
            logprobs = sample_utils.apply_top_k(logprobs, sampling.top_k)
        return logprobs

    def _without_top_choices(self, logprobs: mx.array, coin: mx.array) -> mx.array:
        """XTC: at times leave out all tokens above the threshold but the least likely of them.

        Written here because mlx-lm's takes its coin from the global random state.
        """
        probs = mx.softmax(logprobs, axis=-1)
        above = mx.where(probs > self._sampling.xtc_threshold, probs, mx.inf)
        left_out = probs > mx.min(above, axis=-1, keepdims=True)
        special = [t for t in self._sampling.xtc_special_tokens if t < probs.shape[-1]]
        if special:
            left_out[..., special] = False
        spared = mx.random.uniform(key=coin) > self._sampling.xtc_probability
        return mx.where(spared | ~left_out, logprobs, -mx.inf)
