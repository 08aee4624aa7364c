"""Sampling: from the same logits, what mlx-lm would draw."""

from __future__ import annotations

import inspect
import json
import math
from dataclasses import fields, replace
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from mlx_lm import sample_utils
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from mlx_promptcache.sampling import INDICES, MOST, RANGES, Sampling, fresh_seed
from tiny import bits

FIXED = hypothesis_settings(derandomize=True, deadline=None, max_examples=300)
VOCAB = 97
NOTHING = mx.array([], mx.int32)
every_dtype = pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])

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


@every_dtype
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
    sampling = Sampling(temp=1.0, top_p=0.9, min_p=0.01, top_k=50, xtc_probability=0.5)
    seen, following = [], []
    for seed in (1, 2):
        mx.random.seed(seed)
        seen.append([drawn(sampling, logits_of(1), mx.random.key(i)) for i in range(20)])
        following.append(mx.random.uniform(shape=(4,)).tolist())
        mx.random.seed(seed)
        assert mx.random.uniform(shape=(4,)).tolist() == following[-1]
    assert seen[0] == seen[1]
    assert following[0] != following[1]


# The transforms, exactly

PROCESSORS: dict[str, dict[str, Any]] = {
    "logit_bias": {"logit_bias": {0: 2.5, 3: -100.0, 96: 0.125, 40: -1.5}},
    "repetition_penalty": {"repetition_penalty": 1.3},
    "repetition_penalty below 1": {"repetition_penalty": 0.7, "repetition_context_size": 3},
    "presence_penalty": {"presence_penalty": 1.5, "presence_context_size": 4},
    "presence_penalty below 0": {"presence_penalty": -0.5},
    "frequency_penalty": {"frequency_penalty": 0.75},
    "frequency_penalty below 0": {"frequency_penalty": -0.25, "frequency_context_size": 1},
    "all": {
        "logit_bias": {2: 1.0, 3: -0.5},
        "repetition_penalty": 1.2, "repetition_context_size": 2,
        "presence_penalty": 0.5, "presence_context_size": 30,
        "frequency_penalty": 0.3, "frequency_context_size": 5,
    },
}  # fmt: skip
FILTERS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.05},
    "min_tokens_to_keep": {"min_p": 0.9, "min_tokens_to_keep": 5},
    "top_k": {"top_k": 7},
    "xtc": {"xtc_probability": 1.0, "xtc_threshold": 0.05},
    "xtc of everything": {"xtc_probability": 1.0, "xtc_threshold": 0.0},
    "xtc of nothing": {"xtc_probability": 1.0, "xtc_threshold": 0.5},
    "xtc but for some": {
        "xtc_probability": 1.0, "xtc_threshold": 0.01, "xtc_special_tokens": [9, 4, 22],
    },
    "all": {
        "top_p": 0.95, "min_p": 0.02, "xtc_probability": 1.0, "xtc_threshold": 0.02, "top_k": 4,
        "min_tokens_to_keep": 2,
    },
}  # fmt: skip
LAST = [[], [3], [3, 3, 3], [1, 2, 3, 1, 2, 1], list(range(30)), [96, 0, 96]]


@every_dtype
@pytest.mark.parametrize("last", LAST, ids=str)
@pytest.mark.parametrize("name", PROCESSORS)
def test_bias_and_penalties_make_of_the_logits_what_mlx_lm_makes_of_them(
    name: str, last: list[int], dtype: mx.Dtype
) -> None:
    sampler, tokens = Sampling(**PROCESSORS[name]).sampler(), mx.array(last, mx.int32)
    changed = 0
    for seed in range(5):
        logits = logits_of(seed, dtype)
        expected = mx.array(logits)
        for process in make_logits_processors(**PROCESSORS[name]):
            expected = process(tokens, expected)
        assert bits(sampler.processed(logits, tokens)) == bits(expected)
        changed += bits(expected) != bits(logits)
    assert changed == (5 if last or "logit_bias" in PROCESSORS[name] else 0)


def filtered_by_mlx_lm(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], logprobs: mx.array
) -> mx.array:
    """What mlx-lm's sampler would draw from."""
    drawn_from = []

    def draw(logprobs: mx.array, temp: float) -> mx.array:
        drawn_from.append(logprobs)
        return mx.zeros(1)

    monkeypatch.setattr(sample_utils, "categorical_sampling", draw)
    make_sampler(temp=1.0, **settings)(logprobs)
    return drawn_from[0]


@every_dtype
@pytest.mark.parametrize("name", FILTERS)
def test_what_is_not_to_be_drawn_is_what_mlx_lm_leaves_out(
    name: str, dtype: mx.Dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = Sampling(temp=1.0, **FILTERS[name]).sampler()
    left_out = 0
    for seed in range(20):
        logits = logits_of(seed, dtype)
        expected = filtered_by_mlx_lm(monkeypatch, FILTERS[name], logprobs_of(logits))
        assert bits(sampler.filtered(logits, mx.random.key(seed))) == bits(expected)
        left_out += int(mx.sum(expected == -mx.inf).item())  # type: ignore[arg-type]
    assert (left_out > 0) == (name not in {"nothing", "xtc of nothing"})


def test_the_coin_of_xtc_falls_as_often_as_it_should() -> None:
    sampler = Sampling(temp=1.0, xtc_probability=0.3, xtc_threshold=0.05).sampler()
    logits = logits_of(2)
    whole = sampler.filtered(logits, mx.random.key(0)) * 0 + logprobs_of(logits)
    keys = mx.random.split(mx.random.key(1), 4000)
    thinned = [mx.any(sampler.filtered(logits, key) != whole) for key in keys]
    share: Any = mx.mean(mx.stack(thinned)).item()
    assert share == pytest.approx(0.3, abs=0.03)  # four standard deviations


def test_with_xtc_the_key_is_split_into_one_of_the_draw_and_one_of_the_coin() -> None:
    """A stored state counts on it: another way to split gives other tokens."""
    logits, tokens = logits_of(2), []
    sampler = Sampling(temp=1.0, xtc_probability=0.5, xtc_threshold=0.05).sampler()
    for seed in range(40):
        of_draw, of_coin = mx.random.split(mx.random.key(seed))
        coin: Any = mx.random.uniform(key=of_coin).item()
        fallen = Sampling(xtc_probability=float(coin <= 0.5), xtc_threshold=0.05).sampler()
        expected = mx.random.categorical(fallen.filtered(logits, of_coin), key=of_draw).item()
        assert sampler(logits, NOTHING, mx.random.key(seed)).item() == expected
        tokens.append(expected)
    assert len(set(tokens)) > 3


def test_a_run_without_xtc_uses_the_key_of_the_draw_as_it_is() -> None:
    logits = logits_of(1)
    for seed in range(20):
        key = mx.random.key(seed)
        expected = mx.random.categorical(logprobs_of(logits) * (1 / 0.9), key=key).item()
        idle = Sampling(temp=0.9, xtc_threshold=0.02, xtc_special_tokens=[1])
        assert drawn(Sampling(temp=0.9), logits, key) == drawn(idle, logits, key) == expected


# The draws, as often as they should be

FEW = [0.31, 0.22, 0.15, 0.11, 0.08, 0.06, 0.04, 0.02, 0.01]
ROWS, KEYS = 20_000, 2_000
OF_ROWS: dict[str, dict[str, Any]] = {  # many rows of logits, one key: the rows are independent
    "temperature": {"temp": 1.7},
    "top_p": {"temp": 1.0, "top_p": 0.7},
    "min_p": {"temp": 1.0, "min_p": 0.3},
    "min_tokens_to_keep": {"temp": 1.0, "min_p": 0.9, "min_tokens_to_keep": 4},
    "top_k": {"temp": 1.0, "top_k": 3},
    "all but xtc": {"temp": 0.8, "top_p": 0.95, "min_p": 0.05, "top_k": 5},
}
XTC: dict[str, Any] = {"xtc_probability": 0.6, "xtc_threshold": 0.1}
OF_KEYS: dict[str, dict[str, Any]] = {  # one row of logits, a key for each draw, and so a coin
    "temperature": {"temp": 0.6},
    "xtc": {"temp": 1.0, **XTC},
    "xtc but for some": {"temp": 1.0, **XTC, "xtc_special_tokens": [1]},
    "all": {"temp": 0.8, "top_p": 0.95, "min_p": 0.05, **XTC, "top_k": 5},
}


def chi_square(counts: list[int], probabilities: list[float]) -> float:
    """How far counts are from what they should be; what cannot be must not have been."""
    total, distance = sum(counts), 0.0
    for count, probability in zip(counts, probabilities, strict=True):
        if probability == 0:
            assert count == 0
        else:
            distance += (count - total * probability) ** 2 / (total * probability)
    return distance


def bound(probabilities: list[float]) -> float:
    """Six standard deviations above what chance gives."""
    free = sum(p > 0 for p in probabilities) - 1
    return free + 6 * math.sqrt(2 * free)


def counts_of(tokens: mx.array) -> list[int]:
    found: Any = tokens.tolist()
    return [found.count(token) for token in range(len(FEW))]


def probabilities_of_mlx_lm(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], logits: mx.array
) -> list[float]:
    """What mlx-lm's transforms make of logits, with and without XTC, as often as its coin falls."""
    others = {name: value for name, value in settings.items() if name != "temp"}
    probability = others.pop("xtc_probability", 0.0)
    mixed = mx.zeros(len(FEW))
    for falls, share in ((0.0, 1 - probability), (1.0, probability)):
        each = filtered_by_mlx_lm(monkeypatch, {**others, "xtc_probability": falls}, logits)
        mixed = mixed + share * mx.softmax(each / settings["temp"], axis=-1)[0]
    found: Any = mixed.tolist()
    return [float(p) for p in found]


def assert_drawn_alike(ours: mx.array, theirs: mx.array, expected: list[float]) -> None:
    print(f"{counts_of(ours)} and {counts_of(theirs)} of {ours.size}, expected {expected}")
    assert chi_square(counts_of(ours), expected) < bound(expected)
    assert chi_square(counts_of(theirs), expected) < bound(expected)
    both = counts_of(mx.concatenate([ours, theirs]))
    together = [count / sum(both) for count in both]
    assert chi_square(counts_of(ours), together) < bound(together)


@pytest.mark.parametrize("seed", [4, 2029])
@pytest.mark.parametrize("name", OF_ROWS)
def test_tokens_are_drawn_as_often_as_by_mlx_lm(
    name: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, settings = mx.log(mx.array([FEW])), OF_ROWS[name]
    rows = mx.repeat(logits, ROWS, axis=0)
    ours = Sampling(**settings).sampler()(rows, NOTHING, mx.random.key(seed))
    mx.random.seed(seed)
    theirs = make_sampler(**settings)(rows)
    mx.eval(theirs)
    assert_drawn_alike(ours, theirs, probabilities_of_mlx_lm(monkeypatch, settings, logits))


@pytest.mark.parametrize("name", OF_KEYS)
def test_tokens_are_drawn_as_often_as_by_mlx_lm_with_a_key_for_each(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, settings, seed = mx.log(mx.array([FEW])), OF_KEYS[name], 5
    sample = Sampling(**settings).sampler()
    keys = mx.random.split(mx.random.key(seed), KEYS)
    ours = mx.concatenate([sample(logits, NOTHING, key) for key in keys])
    mx.random.seed(seed)
    theirs = mx.concatenate([make_sampler(**settings)(logits) for _ in range(KEYS)])
    mx.eval(theirs)
    assert_drawn_alike(ours, theirs, probabilities_of_mlx_lm(monkeypatch, settings, logits))


def test_the_distance_of_wrong_frequencies_is_seen() -> None:
    rows = mx.repeat(mx.log(mx.array([FEW])), ROWS, axis=0)
    counts = counts_of(Sampling(temp=1.0).sampler()(rows, NOTHING, mx.random.key(4)))
    slightly = [FEW[0] - 0.02, FEW[1] + 0.02, *FEW[2:]]
    assert chi_square(counts, FEW) < bound(FEW) < chi_square(counts, slightly)


# Greedy


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


# Penalties


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


def test_each_penalty_looks_no_further_back_than_it_is_told() -> None:
    logits, last = mx.zeros((1, 6)), mx.array([0, 1, 2, 3, 4])
    sampling = Sampling(
        logit_bias=dict.fromkeys(range(6), 1.0),
        repetition_penalty=4.0, repetition_context_size=2,
        presence_penalty=8.0, presence_context_size=4,
        frequency_penalty=32.0, frequency_context_size=1,
    )  # fmt: skip
    expected = [1.0, 1.0 - 8, 1.0 - 8, 0.25 - 8, 0.25 - 8 - 32, 1.0]
    assert sampling.context_size == 4
    assert sampling.sampler().processed(logits, last).tolist() == [expected]
    assert sampling.sampler().processed(logits, last[-4:]).tolist() == [expected]
    assert sampling.sampler().processed(logits, last[-3:]).tolist() != [expected]


@pytest.mark.parametrize("penalty", ["repetition", "presence", "frequency"])
def test_only_penalties_that_are_there_look_back(penalty: str) -> None:
    sizes = {"repetition_context_size": 7, "presence_context_size": 8, "frequency_context_size": 9}
    size = sizes[f"{penalty}_context_size"]
    assert Sampling(**{f"{penalty}_penalty": 1.5}, **sizes).context_size == size  # type: ignore[arg-type]
    for nothing in (None, 0.0):
        assert Sampling(**{f"{penalty}_penalty": nothing}, **sizes).context_size == 0  # type: ignore[arg-type]


def test_a_penalty_counts_as_often_as_a_token_occurs_or_once() -> None:
    logits, last = mx.zeros((1, 3)), mx.array([1, 1, 1, 2])
    frequency, presence = Sampling(frequency_penalty=1.0), Sampling(presence_penalty=1.0)
    assert frequency.sampler().processed(logits, last).tolist() == [[0.0, -3.0, -1.0]]
    assert presence.sampler().processed(logits, last).tolist() == [[0.0, -1.0, -1.0]]


# What the logits and the global state are to be spared

EVERYTHING: dict[str, Any] = {**PROCESSORS["all"], **FILTERS["all"], "temp": 0.9}


@pytest.mark.parametrize("settings", [{}, *SETTINGS, *PROCESSORS.values(), EVERYTHING], ids=str)
def test_the_logits_that_a_state_holds_are_not_written_to(settings: dict[str, Any]) -> None:
    state_logits = mx.random.normal((VOCAB,), key=mx.random.key(1))
    before = state_logits.tolist()
    sampling = Sampling(**{"repetition_penalty": 1.7, **settings})
    drawn(sampling, state_logits[None], mx.random.key(2), mx.array([1, 2, 3, 3]))
    assert state_logits.tolist() == before
    logits = state_logits[None]
    drawn(sampling, logits, mx.random.key(2), mx.array([1, 2, 3, 3]))
    assert logits.tolist() == [before]


def test_a_draw_waits_for_no_value() -> None:
    """What MLX can trace asks for none: a value that is asked for ends the tracing."""
    sample, last = Sampling(**EVERYTHING).sampler(), mx.array([1, 2, 3, 3])
    traced = mx.compile(sample)
    for seed in range(10):
        key = mx.random.key(seed)
        expected = sample(logits_of(seed), last, key).item()
        assert traced(logits_of(seed), last, key).item() == expected

    def waiting(logits: mx.array, last: mx.array, key: mx.array) -> mx.array:
        return logits if sample(logits, last, key).item() else last

    with pytest.raises(ValueError, match="not allowed"):
        mx.compile(waiting)(logits_of(1), last, mx.random.key(1))


def test_more_tokens_to_keep_than_there_are_leave_mlx_sound() -> None:
    for keep in (VOCAB, VOCAB + 1, 1 << 40, 1 << 70):
        sampling = Sampling(temp=1.0, min_p=0.9, min_tokens_to_keep=keep)
        whole = Sampling(temp=1.0)
        for seed in range(5):
            key = mx.random.key(seed)
            assert drawn(sampling, logits_of(1), key) == drawn(whole, logits_of(1), key)
    mx.random.seed(1)
    assert drawn_by_mlx_lm({"temp": 1.0, "top_p": 0.9}, logprobs_of(logits_of(1)), 1) >= 0


@pytest.mark.parametrize("token", [VOCAB, VOCAB + 1, INDICES])
def test_a_bias_beyond_the_logits_is_refused_and_nothing_is_written(token: int) -> None:
    sampling = Sampling(logit_bias={0: 1.0, token: 2.0})
    with pytest.raises(ValueError, match=rf"token {token}, .* has 97"):
        drawn(sampling, logits_of(1), mx.random.key(1))
    with pytest.raises(ValueError, match=rf"token {token}"):
        sampling.check(VOCAB)
    Sampling(logit_bias={VOCAB - 1: 2.0}).check(VOCAB)


def test_special_tokens_beyond_the_logits_change_nothing() -> None:
    settings: dict[str, Any] = {"xtc_probability": 1.0, "xtc_threshold": 0.01}
    for seed in range(5):
        few = Sampling(**settings, xtc_special_tokens=[3]).sampler()
        more = Sampling(**settings, xtc_special_tokens=[3, VOCAB, INDICES]).sampler()
        logits, key = logits_of(seed), mx.random.key(seed)
        assert bits(few.filtered(logits, key)) == bits(more.filtered(logits, key))


# As a value, and as JSON


def test_every_setting_of_mlx_lm_is_one_of_ours_with_the_same_meaning_of_nothing() -> None:
    ours = {f.name: f.default for f in fields(Sampling)}
    theirs: dict[str, Any] = {}
    for function in (make_sampler, make_logits_processors):
        theirs |= {p.name: p.default for p in inspect.signature(function).parameters.values()}
    assert set(ours) == {*theirs, "seed"}
    assert {name: ours[name] or None for name in theirs} == {
        name: default or None for name, default in theirs.items()
    }


def test_equal_settings_are_equal_however_they_were_spelt() -> None:
    one = Sampling(temp=1, xtc_special_tokens=[2, 1, 2], logit_bias={5: 1, 3: -2})
    other = Sampling(temp=1.0, xtc_special_tokens=(1, 2), logit_bias={3: -2.0, 5: 1.0})
    assert (one, hash(one), repr(one)) == (other, hash(other), repr(other))
    assert Sampling(logit_bias={}, xtc_special_tokens=[]) == Sampling()
    assert replace(one, temp=0.5) != one
    assert replace(one, logit_bias={5: 1, 3: -1}) != one
    assert dict(one.logit_bias or {}) == {3: -2.0, 5: 1.0}


def test_settings_do_not_change_with_what_they_were_made_of() -> None:
    biases, special = {5: 1.0}, [1]
    sampling = Sampling(logit_bias=biases, xtc_special_tokens=special)
    biases[6], before = 2.0, hash(sampling)
    special.append(2)
    assert (sampling.logit_bias, sampling.xtc_special_tokens) == ({5: 1.0}, (1,))
    assert hash(sampling) == before


def _scalar(name: str) -> st.SearchStrategy[Any]:
    allowed = RANGES[name]
    numbers: st.SearchStrategy[Any]
    if allowed.kind is int:
        highest = None if allowed.high == MOST else int(allowed.high)
        numbers = st.integers(int(allowed.low), highest)
    else:
        numbers = st.floats(allowed.low, allowed.high) | st.just(int(allowed.low))
    return st.none() | numbers if Sampling.__dataclass_fields__[name].default is None else numbers


token_ids = st.integers(0, INDICES)
samplings = st.fixed_dictionaries(
    {},
    optional={
        **{name: _scalar(name) for name in RANGES},
        "xtc_special_tokens": st.lists(token_ids, max_size=5),
        "logit_bias": st.none() | st.dictionaries(token_ids, st.floats(-MOST, MOST), max_size=5),
    },
).map(lambda settings: Sampling(**settings))


@FIXED
@given(samplings)
def test_settings_come_back_from_json_as_they_were(sampling: Sampling) -> None:
    text = json.dumps(sampling.to_json(), allow_nan=False)
    again = Sampling.from_json(json.loads(text))
    assert (again, hash(again)) == (sampling, hash(sampling))
    assert again.to_json() == json.loads(text)


def test_biases_have_names_in_json() -> None:
    value = Sampling(logit_bias={7: -1.5, 0: 2}).to_json()
    assert value["logit_bias"] == {"0": 2.0, "7": -1.5}
    for wrong in ({"07": 1.0}, {" 7": 1.0}, {"7.0": 1.0}, {"seven": 1.0}, {"-7": 1.0}, [[7, 1.0]]):
        with pytest.raises((ValueError, TypeError)):
            Sampling.from_json({"logit_bias": wrong})


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
names = st.sampled_from([f.name for f in fields(Sampling)])


@FIXED
@given(st.dictionaries(names, junk, max_size=4) | junk)
@example({"temp": 10**400})
@example({"top_k": 2.5, "temp": 1.0})
@example({"min_p": True})
@example({"min_p": 0.5, "temp": 1.0, "min_tokens_to_keep": 10**30})
@example({"repetition_penalty": 2.0, "repetition_context_size": 2**40})
@example({"logit_bias": {"2147483648": 1.0}})
@example({"logit_bias": {"9" * 5000: 1.0}})
@example({"xtc_special_tokens": "12"})
@example({"xtc_special_tokens": 0})
def test_junk_is_refused_or_draws_tokens(value: Any) -> None:
    try:
        sampling = Sampling.from_json(value)
        sampling.check(VOCAB)
    except (ValueError, TypeError):
        return
    assert Sampling.from_json(sampling.to_json()) == sampling
    assert 0 <= drawn(sampling, logits_of(1), mx.random.key(1), mx.array([1, 2])) < VOCAB


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
        {"top_k": 2.5},
        {"top_k": True},
        {"repetition_penalty": -1.0},
        {"repetition_penalty": float("nan")},
        {"repetition_context_size": 0},
        {"repetition_context_size": -3},
        {"repetition_context_size": 2**31},
        {"presence_penalty": float("inf")},
        {"presence_context_size": 0},
        {"presence_context_size": 2**31},
        {"frequency_penalty": float("nan")},
        {"frequency_context_size": 0},
        {"frequency_context_size": 2**31},
        {"xtc_probability": -0.1},
        {"xtc_probability": 1.1},
        {"xtc_threshold": 0.51},
        {"xtc_special_tokens": [-1]},
        {"xtc_special_tokens": [1.5]},
        {"xtc_special_tokens": 7},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {"1": 1.0}},
        {"logit_bias": {1: float("inf")}},
        {"logit_bias": {1: "2"}},
        {"logit_bias": [(1, 2.0)]},
        {"seed": -1},
        {"seed": 2**64},
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(
        (ValueError, TypeError), match=r"^(the |a |top-|min-)[^.\n]+ must be [^\n]+$"
    ):
        Sampling(**settings)


# Seeds


@pytest.mark.parametrize("size", [1, 8, 32, 63, 64])
def test_a_fresh_seed_has_its_bits_and_no_more(size: int) -> None:
    seen = [fresh_seed(size) for _ in range(500)]
    assert max(seen) < 1 << size
    assert all(any(seed >> bit & 1 for seed in seen) for bit in range(size))
    assert all(any(not seed >> bit & 1 for seed in seen) for bit in range(size))
    assert len(set(seen)) > 400 or size < 32
