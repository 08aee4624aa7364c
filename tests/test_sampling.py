"""Sampling: from the same logits, what mlx-lm would draw."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from mlx_promptcache.sampling import Sampling

VOCAB = 97
NOTHING = mx.array([], mx.int32)

SETTINGS = [
    {"temp": 1.0},
    {"temp": 0.3},
    {"temp": 2.5},
    {"temp": 1.0, "top_p": 0.9},
    {"temp": 0.8, "top_p": 0.05},
    {"temp": 1.0, "top_p": 1.0},
    {"temp": 1.0, "min_p": 0.1},
    {"temp": 1.0, "min_p": 0.9, "min_tokens_to_keep": 5},
    {"temp": 1.0, "top_k": 1},
    {"temp": 1.3, "top_k": 7},
    {"temp": 1.0, "top_k": VOCAB - 1},
    {"temp": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.02},
]


def logits_of(seed: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return (mx.random.normal((1, VOCAB), key=mx.random.key(seed)) * 3).astype(dtype)


def logprobs_of(logits: mx.array) -> mx.array:
    """As mlx-lm's `generate_step` makes them of logits."""
    return logits - mx.logsumexp(logits, keepdims=True)


def drawn(sampling: Sampling, logits: mx.array, key: mx.array, last: mx.array = NOTHING) -> int:
    token: Any = sampling.sampler()(logits, last, key).item()
    return int(token)


def drawn_by_mlx_lm(settings: dict[str, Any], logprobs: mx.array, seed: int) -> int:
    """The first draw of mlx-lm's sampler after the global state was seeded."""
    mx.random.seed(seed)
    return int(make_sampler(**settings)(logprobs).item())


def key_of_first_draw(seed: int) -> mx.array:
    """The key that the first draw after `mx.random.seed(seed)` uses."""
    return mx.random.split(mx.random.key(seed))[1]


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_same_random_key_draws_the_token_that_mlx_lm_draws(
    settings: dict[str, Any], dtype: mx.Dtype
) -> None:
    sampling = Sampling(**settings)
    tokens = set()
    for seed in range(60):
        logits = logits_of(seed % 3, dtype)
        token = drawn(sampling, logits, key_of_first_draw(seed))
        assert token == drawn_by_mlx_lm(settings, logprobs_of(logits), seed)
        tokens.add(token)
    narrow = settings.get("top_k") == 1 or settings.get("top_p") == 0.05
    assert len(tokens) > (0 if narrow else 2)


def test_the_global_random_state_is_neither_used_nor_moved() -> None:
    sampling = Sampling(temp=1.0, top_p=0.9, min_p=0.01, top_k=50)
    seen, following = [], []
    for seed in (1, 2):
        mx.random.seed(seed)
        seen.append([drawn(sampling, logits_of(1), mx.random.key(i)) for i in range(20)])
        following.append(mx.random.uniform(shape=(4,)).tolist())
        mx.random.seed(seed)
        assert mx.random.uniform(shape=(4,)).tolist() == following[-1]
    assert seen[0] == seen[1]
    assert following[0] != following[1]


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"top_k": 3}, [5, 1, 2]),
        ({"top_p": 0.7}, [5, 1]),
        ({"min_p": 0.3}, [5, 1]),
        ({"min_p": 0.3, "min_tokens_to_keep": 4}, [5, 1, 2, 0]),
        ({"top_p": 0.95, "top_k": 2}, [5, 1]),
    ],
    ids=str,
)
def test_tokens_are_drawn_as_often_as_their_probabilities_say(
    settings: dict[str, Any], kept: list[int]
) -> None:
    probabilities = [0.06, 0.25, 0.11, 0.04, 0.04, 0.5]
    logits = mx.log(mx.array([probabilities]))
    sample = Sampling(temp=1.0, **settings).sampler()
    keys = mx.random.split(mx.random.key(4), 2000)
    counts = [0] * len(probabilities)
    drawn_tokens = mx.concatenate([sample(logits, NOTHING, key) for key in keys])
    found: Any = drawn_tokens.tolist()
    for token in found:
        counts[token] += 1
    mass = sum(probabilities[token] for token in kept)
    for token, count in enumerate(counts):
        expected = probabilities[token] / mass if token in kept else 0.0
        assert count / 2000 == pytest.approx(expected, abs=0.04 if expected else 0.0)


def test_a_temperature_of_zero_takes_the_likeliest_token_whatever_the_key() -> None:
    for seed in range(20):
        logits = logits_of(seed)
        expected = mx.argmax(logits, axis=-1).item()
        several: list[dict[str, Any]] = [{}, {"top_k": 5}, {"top_p": 0.3}, {"min_p": 0.5}]
        for settings in several:
            sampling = Sampling(temp=0.0, **settings)
            assert drawn(sampling, logits, mx.random.key(seed)) == expected


def test_of_equally_likely_tokens_greedy_takes_the_one_that_mlx_lm_takes() -> None:
    logits = mx.zeros((1, VOCAB))
    assert drawn(Sampling(), logits, mx.random.key(0)) == drawn_by_mlx_lm({}, logits, 0) == 0


def test_top_k_of_the_whole_vocabulary_or_more_filters_nothing() -> None:
    for top_k in (VOCAB, VOCAB + 1, 10 * VOCAB):
        for seed in range(20):
            key = mx.random.key(seed)
            assert drawn(Sampling(temp=1.0, top_k=top_k), logits_of(1), key) == drawn(
                Sampling(temp=1.0), logits_of(1), key
            )


LAST = [[], [3], [3, 3, 3], [1, 2, 3, 1, 2, 1], list(range(30)), [96, 0, 96]]


@pytest.mark.parametrize("last", LAST, ids=str)
@pytest.mark.parametrize("penalty", [1.1, 1.5, 0.7])
@pytest.mark.parametrize("size", [1, 2, 20, 64])
def test_the_repetition_penalty_is_that_of_mlx_lm(
    last: list[int], penalty: float, size: int
) -> None:
    sampling = Sampling(temp=1.0, repetition_penalty=penalty, repetition_context_size=size)
    (process,) = make_logits_processors(repetition_penalty=penalty, repetition_context_size=size)
    tokens = mx.array(last, mx.int32)
    for seed in range(15):
        logits = logits_of(seed)
        expected = process(tokens, mx.array(logits))
        assert drawn(sampling, logits, key_of_first_draw(seed), tokens) == drawn_by_mlx_lm(
            {"temp": 1.0}, logprobs_of(expected), seed
        )


def test_the_repetition_penalty_is_put_on_a_repeated_token_once() -> None:
    logits = mx.array([[2.0, 1.5, -1.0, -9.0]])
    sampling = Sampling(repetition_penalty=1.2)
    for last, expected in [([0], 0), ([0, 0, 0], 0), ([0, 1], 0), ([1], 0)]:
        assert drawn(sampling, logits, mx.random.key(0), mx.array(last)) == expected
    assert drawn(replace(sampling, repetition_penalty=1.4), logits, mx.random.key(0),
                 mx.array([0, 0])) == 1  # fmt: skip


def test_the_penalty_looks_no_further_back_than_it_is_told() -> None:
    logits = mx.array([[2.0, 1.5, 1.0]])
    sampling = Sampling(repetition_penalty=2.0, repetition_context_size=2)
    assert drawn(sampling, logits, mx.random.key(0), mx.array([0, 2, 2])) == 0
    assert drawn(sampling, logits, mx.random.key(0), mx.array([2, 0, 2])) == 1
    assert sampling.context_size == 2
    assert Sampling(repetition_context_size=9).context_size == 0


@pytest.mark.parametrize("settings", [{}, *SETTINGS], ids=str)
def test_the_logits_that_a_state_holds_are_not_written_to(settings: dict[str, Any]) -> None:
    state_logits = mx.random.normal((VOCAB,), key=mx.random.key(1))
    before = state_logits.tolist()
    sampling = Sampling(**settings, repetition_penalty=1.7)
    drawn(sampling, state_logits[None], mx.random.key(2), mx.array([1, 2, 3, 3]))
    assert state_logits.tolist() == before
    logits = state_logits[None]
    drawn(sampling, logits, mx.random.key(2), mx.array([1, 2, 3, 3]))
    assert logits.tolist() == [before]


@pytest.mark.parametrize("settings", [{}, *SETTINGS], ids=str)
def test_settings_come_back_from_json_as_they_were(settings: dict[str, Any]) -> None:
    sampling = Sampling(**settings, repetition_penalty=1.1, repetition_context_size=7, seed=2**63)
    text = json.dumps(sampling.to_json())
    assert Sampling.from_json(json.loads(text)) == sampling
    assert json.loads(text) == asdict(sampling)


def test_settings_of_a_later_version_are_left_out() -> None:
    value = {**Sampling(temp=0.5).to_json(), "mirostat": 2}
    assert Sampling.from_json(value) == Sampling(temp=0.5)
    assert Sampling.from_json({}) == Sampling()


@pytest.mark.parametrize(
    "settings",
    [
        {"temp": -0.1},
        {"temp": float("nan")},
        {"temp": float("inf")},
        {"top_p": -0.1},
        {"top_p": 1.1},
        {"top_p": float("nan")},
        {"min_p": -0.1},
        {"min_p": 1.01},
        {"min_tokens_to_keep": 0},
        {"top_k": -1},
        {"repetition_penalty": -1.0},
        {"repetition_penalty": float("nan")},
        {"repetition_context_size": 0},
        {"repetition_context_size": -3},
        {"seed": -1},
        {"seed": 2**64},
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"\w+ \w+"):
        Sampling(**settings)
