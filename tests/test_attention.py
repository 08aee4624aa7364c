"""Attention over several cores: the bits of MLX's own, wherever it stands in for that."""

from __future__ import annotations

import functools
import itertools
import sys
import threading
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache

import architectures
import tiny
from mlx_promptcache import Runner, attention, exponentials
from mlx_promptcache.attention import ATTENTION, BASE, by_groups, stand_in

if TYPE_CHECKING:
    from collections.abc import Callable

CPU = mx.Device(mx.cpu)
pytestmark = pytest.mark.skipif(
    mx.default_device() != CPU, reason="on a GPU MLX's own attention is never stood in for"
)

SHAPES = {  # batch, heads, heads of K/V, queries, rows, width, width of values
    "one head each": (1, 4, 4, 7, 12, 16, 16),
    "grouped": (1, 6, 2, 7, 12, 16, 16),
    "one head of K/V": (1, 5, 1, 7, 12, 16, 16),
    "one head in all": (1, 1, 1, 7, 12, 16, 16),
    "many heads": (1, 40, 20, 3, 9, 8, 8),
    "several sequences": (3, 6, 3, 5, 11, 16, 16),
    "other values": (1, 6, 3, 5, 11, 16, 24),
    "a token": (1, 6, 3, 1, 700, 16, 16),
    "a prompt": (1, 9, 3, 64, 300, 64, 64),
}
MASKS: dict[str, Callable[[int, int, mx.Dtype], Any]] = {
    "none": lambda *_: None,
    "causal": lambda *_: "causal",
    "window": lambda n, rows, _: mx.arange(rows) + 5 > mx.arange(rows - n, rows)[:, None],
    "nothing seen": lambda n, rows, _: mx.zeros((n, rows), mx.bool_),
    "for all heads": lambda n, rows, _: (mx.arange(rows) % 3 > 0).reshape(1, 1, 1, rows)
    & mx.ones((1, 1, n, 1), mx.bool_),
    "by sequence": lambda n, rows, _: mx.ones((1, 1, n, rows), mx.bool_),
    "added": lambda n, rows, dtype: mx.sin(mx.arange(n * rows)).reshape(n, rows).astype(dtype),
    "added for all heads": lambda n, rows, dtype: mx.sin(mx.arange(n * rows))
    .reshape(1, 1, n, rows)
    .astype(dtype),
}  # fmt: skip
DTYPES = [mx.float32, mx.bfloat16, mx.float16]


def same_bits(a: mx.array, b: mx.array) -> bool:
    return tiny.bits(a) == tiny.bits(b)


def parts(shape: str, dtype: mx.Dtype) -> tuple[mx.array, mx.array, mx.array]:
    batch, heads, kv_heads, count, rows, width, values = SHAPES[shape]
    keys = mx.random.split(mx.random.key(7), 3)
    return (
        mx.random.normal((batch, heads, count, width), key=keys[0]).astype(dtype),
        mx.random.normal((batch, kv_heads, rows, width), key=keys[1]).astype(dtype),
        mx.random.normal((batch, kv_heads, rows, values), key=keys[2]).astype(dtype),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_has_the_bits_of_mlx_s_own(
    shape: str, mask: str, dtype: mx.Dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "LEAST_SCORES", 0)
    queries, keys, values = parts(shape, dtype)
    monkeypatch.setattr(exponentials, "LEAST", 1 << 10)
    seen = MASKS[mask](queries.shape[2], keys.shape[2], dtype)
    if mask == "by sequence":
        seen = mx.broadcast_to(seen, (len(queries), *seen.shape[1:]))
        seen = seen & (mx.arange(seen.size).reshape(seen.shape) % 5 > 0)
    assert attention._serves(queries, keys, values, seen)
    own = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=0.21, mask=seen)
    assert same_bits(by_groups(queries, keys, values, 0.21, seen), own)
    with exponentials.inferring():
        assert same_bits(by_groups(queries, keys, values, 0.21, seen), own)


def test_rows_that_are_cut_out_of_a_buffer_are_like_others() -> None:
    queries, keys, values = parts("a prompt", mx.float32)
    room = mx.zeros((1, 3, 200, 64))
    keys, values = (mx.concatenate([rows, room], axis=2)[:, :, :300] for rows in (keys, values))
    own = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=0.125, mask="causal")
    assert same_bits(by_groups(queries, keys, values, 0.125, "causal"), own)


@pytest.mark.parametrize("cores", [2, 3, 40])
def test_the_number_of_cores_changes_no_bit(cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    queries, keys, values = parts("many heads", mx.float32)
    own = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=0.3)
    monkeypatch.setattr(attention, "cores", lambda: cores)
    found = attention._parts(20, 2)
    assert len(found) == min(cores + 1, attention.MOST_GROUPS)
    heads = [head for (part, _), _ in found for head in range(20)[part]]
    assert heads == list(range(20))
    assert all(a != b for (_, a), (_, b) in itertools.combinations(found, 2))
    assert same_bits(by_groups(queries, keys, values, 0.3, None), own)


# Where it stands in


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many queries were attended by groups, call for call."""
    for dtype in DTYPES:
        attention._is_the_same(dtype)  # a trial that does not count
    calls: list[int] = []
    by = attention.by_groups

    def counting(queries: mx.array, *others: Any) -> mx.array:
        calls.append(queries.shape[2])
        return by(queries, *others)

    monkeypatch.setattr(attention, "by_groups", counting)
    monkeypatch.setattr(attention, "cores", lambda: 2)
    return calls


def asked(model: Any) -> tuple[mx.array, mx.array]:
    """Logits of a prompt in two passes, and of a token after it."""
    layers = make_prompt_cache(model)
    tokens = mx.array([[3 + 7 * i % 200 for i in range(40)]])
    model(tokens[:, :20], cache=layers)
    return model(tokens[:, 20:39], cache=layers), model(tokens[:, 39:], cache=layers)


@pytest.mark.parametrize("name", architectures.runnable())
def test_every_architecture_computes_the_same_bits(
    name: str, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = architectures.build(name)
    monkeypatch.setattr(attention, "LEAST_SCORES", 1 << 60)
    attention.spread(model)
    own = asked(model)
    assert counted == []
    monkeypatch.setattr(attention, "LEAST_SCORES", 0)
    spread = asked(model)
    assert all(same_bits(a, b) for a, b in zip(own, spread, strict=True))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3_text", "mixtral", "phi3"])
def test_known_architectures_attend_by_groups(
    kind: str, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "LEAST_SCORES", 0)
    model = architectures.build(kind)
    Runner(model)  # lets it
    counted.clear()
    asked(model)
    assert len(counted) == 3 * len(model.layers)


def test_a_runner_and_its_draft_model_do_so(
    counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "LEAST_SCORES", 0)
    model, draft = tiny.plain(), architectures.build("qwen2")
    usual = getattr(sys.modules[BASE], ATTENTION)
    monkeypatch.setattr(sys.modules["mlx_lm.models.qwen2"], ATTENTION, usual)
    Runner(model, draft_model=draft)
    counted.clear()
    asked(draft)
    assert counted


def test_little_is_left_to_mlx(counted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding, above all: what streams wait for each other takes longer then."""
    monkeypatch.setattr(attention, "LEAST_SCORES", 4 * 20 * 40)
    model = tiny.plain()
    Runner(model)
    counted.clear()
    layers = make_prompt_cache(model)
    tokens = mx.array([[5] * 40])
    for begin, end in ((0, 20), (20, 40), (39, 40)):
        model(tokens[:, begin:end], cache=layers)
    assert counted == [20] * len(layers)


def test_threads_attend_as_mlx_does(counted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams belong to the thread that made them, and are never given back."""
    monkeypatch.setattr(attention, "LEAST_SCORES", 0)
    model = tiny.plain()
    Runner(model)
    counted.clear()
    told: list[Any] = []
    thread = threading.Thread(target=lambda: told.extend(logits.shape for logits in asked(model)))
    thread.start()
    thread.join()
    assert (len(told), counted) == (2, [])


def test_one_core_leaves_all_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.plain()
    (name,) = {type(module).__module__ for module in model.modules()} & {"mlx_lm.models.llama"}
    usual = getattr(sys.modules[BASE], ATTENTION)
    monkeypatch.setattr(sys.modules[name], ATTENTION, usual)
    monkeypatch.setattr(attention, "cores", lambda: 1)
    monkeypatch.setattr(exponentials, "is_x86", lambda: False)
    attention.spread(model)
    assert getattr(sys.modules[name], ATTENTION) is usual


def test_one_core_of_an_x86_cpu_attends_in_one_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "cores", lambda: 1)
    monkeypatch.setattr(exponentials, "is_x86", lambda: True)
    model = tiny.plain()
    attention.spread(model)
    assert attention._kinds(getattr(sys.modules["mlx_lm.models.llama"], ATTENTION)) == ("spread",)
    queries, keys, values = parts("many heads", mx.float32)
    own = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=0.3)
    assert [part for part, _ in attention._parts(20, 2)] == [(slice(0, 20), slice(None))]
    assert same_bits(by_groups(queries, keys, values, 0.3, None), own)


def test_another_mlx_that_computes_otherwise_is_left_alone(
    counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "LEAST_SCORES", 0)
    model = tiny.plain()
    Runner(model)
    own = mx.fast.scaled_dot_product_attention
    monkeypatch.setattr(
        mx.fast, ATTENTION, lambda *args, **more: own(*args, **more) * (1 + 2.0**-20)
    )
    attention._is_the_same.cache_clear()
    try:
        counted.clear()
        mx.eval(asked(model))
        assert counted == [1, 3, 3, 3]  # the trial
    finally:
        attention._is_the_same.cache_clear()


@pytest.mark.parametrize(
    "what",
    [
        "sinks",
        "quantised rows",
        "mixed types",
        "a mask a head",
        "text",
        "layers that attend",
        "fewer rows than queries",
    ],
)
def test_what_is_not_the_same_is_left_to_mlx(
    what: str, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "LEAST_SCORES", 0)
    seen: list[Any] = []

    def usual(*args: Any, **more: Any) -> mx.array:
        seen.append((args, more))
        return mx.array(0)

    spread = attention.asking_first(attention.attend_by_groups, usual)
    queries, keys, values = parts("grouped", mx.float32)
    asked: dict[str, Any] = {"cache": None, "scale": 1.0, "mask": None}

    class Quantised:
        bits = 8

    class Attends:
        def attends(self) -> bool:
            return True

    spread(queries, keys, values, **asked)
    assert (seen, counted.pop()) == ([], 7)
    changes: dict[str, dict[str, Any]] = {
        "sinks": {"sinks": mx.zeros(6)},
        "quantised rows": {"cache": Quantised()},
        "mixed types": {"keys": keys.astype(mx.float16)},
        "a mask a head": {"mask": mx.ones((1, 6, 7, 12), mx.bool_)},
        "text": {"mask": "other"},
        "layers that attend": {"cache": Attends()},
        "fewer rows than queries": {"keys": keys[:, :, :5], "values": values[:, :, :5]},
    }
    spread(**{"queries": queries, "keys": keys, "values": values, **asked, **changes[what]})
    assert (len(seen), counted) == (1, [])


def test_each_kind_stands_in_once_around_what_is_there() -> None:
    model = tiny.plain()
    module = sys.modules["mlx_lm.models.llama"]
    before = getattr(module, ATTENTION)

    def attend(*_: Any) -> None:
        return None

    try:
        for kind in ("a test's", "a test's", "another test's"):
            stand_in(model, kind, attend)
        made = [before, getattr(module, ATTENTION).__wrapped__]
        assert made[1].__wrapped__ is before
        assert made[1] is not before
        for own in (lambda *_: None, functools.wraps(before)(lambda *_: None)):
            setattr(module, ATTENTION, own)  # somebody else's
            stand_in(model, "a third", attend)
            assert getattr(module, ATTENTION) is own
    finally:
        setattr(module, ATTENTION, before)
