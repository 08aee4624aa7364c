"""Softmax in loops over vectors: the bits of MLX's own, and only where there is a gain."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import pytest
from loops import LACKS, needs_compiler, on_x86, served_without
from mlx.nn.utils import value_and_grad

import tiny
from mlx_promptcache import Runner, attention, exponentials, softmax
from mlx_promptcache.streams import beside, may_compile, uncompiled

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = on_x86

SEED = 3


def own(scores: mx.array) -> mx.array:
    return mx.softmax(scores, axis=-1, precise=True)


def normal(*shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(SEED))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 40.0, 1e37])
@pytest.mark.parametrize("shape", [(1, 3, 22, 1940), (2, 1, 5), (1, 1), (700, 1)], ids=str)
def test_softmax_has_the_bits_of_mlx_s_own(shape: tuple[int, ...], scale: float) -> None:
    scores = scale * normal(*shape)
    assert tiny.bits(softmax.softmax(scores)) == tiny.bits(own(scores))


def test_what_is_masked_weighs_nothing() -> None:
    scores = normal(4, 50)
    scores[1:, 20:] = mx.finfo(mx.float32).min
    scores[2:, 10:] = -float("inf")
    weights = softmax.softmax(scores)
    assert tiny.bits(weights) == tiny.bits(own(scores))
    assert not weights[2:, 10:].any()


@pytest.mark.parametrize("piece", [1, 50, 120, 1 << 20])
def test_pieces_change_no_bit(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax, "PIECE", piece)
    scores = normal(3, 7, 40)
    assert tiny.bits(softmax.softmax(scores)) == tiny.bits(own(scores))


def test_each_stream_computes_its_own() -> None:
    told = []
    for stream in beside(3):
        with mx.stream(stream):
            told.append(softmax.softmax(normal(5, 40)))
    assert {tiny.bits(weights) for weights in told} == {tiny.bits(own(normal(5, 40)))}


# Where it serves


@needs_compiler
@pytest.mark.usefixtures("inferring")
def test_it_serves_many_scores_of_float32() -> None:
    many = normal(22, exponentials.LEAST // 22 + 1)
    assert softmax.serves(many)
    assert not softmax.serves(many[:20])
    assert not softmax.serves(many.astype(mx.float16))


@needs_compiler
def test_it_serves_a_runner_s_own_calls_and_nobody_who_wants_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "LEAST_SCORES", 0)
    monkeypatch.setattr(exponentials, "LEAST", 0)
    counted: list[tuple[int, ...]] = []

    def counting(scores: mx.array) -> mx.array:
        counted.append(scores.shape)
        return own(scores)

    model = tiny.plain()
    runner = Runner(model)
    tokens = mx.array([[5, 9, 13, 4] * 5])

    def loss(module: Any) -> mx.array:
        logits: mx.array = module(tokens)
        return logits.square().mean()

    given, gradients = value_and_grad(model, loss)(model)
    mx.eval(given, gradients)  # `View` has no gradient
    monkeypatch.setattr(softmax, "softmax", counting)
    mx.eval(loss(model))
    assert counted == []
    mx.eval(runner.forward(tokens, runner.make_layers())[0])
    assert len(counted) >= len(model.layers)


@pytest.mark.usefixtures("inferring")
def test_it_does_not_serve_in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exponentials, "LEAST", 0)
    told: list[bool] = []
    thread = threading.Thread(target=lambda: told.append(softmax.serves(normal(4, 4))))
    thread.start()
    thread.join()
    assert told == [False]


@pytest.mark.usefixtures("inferring")
def test_it_does_not_serve_other_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exponentials, "LEAST", 0)
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert not softmax.serves(normal(4, 4))


@pytest.mark.usefixtures("inferring")
def test_it_does_not_serve_while_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is found out later is not lost by it."""
    monkeypatch.setattr(exponentials, "LEAST", 0)
    usually = softmax.serves(normal(4, 4))
    softmax._is_the_same.cache_clear()
    with uncompiled():
        assert not may_compile()
        assert not softmax.serves(normal(4, 4))
    assert softmax.serves(normal(4, 4)) is usually


@pytest.mark.usefixtures("inferring")
def test_another_mlx_that_computes_otherwise_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(exponentials, "LEAST", 0)
    usual = mx.softmax
    softmax._is_the_same.cache_clear()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(mx, "softmax", lambda *a, **more: usual(*a, **more) * (1 + 2.0**-20))
            assert not softmax.serves(normal(4, 4))
    finally:
        softmax._is_the_same.cache_clear()


@pytest.mark.parametrize("lack", LACKS)
def test_it_does_not_serve_where_nothing_can_be_compiled(lack: str, tmp_path: Path) -> None:
    assert served_without(lack, tmp_path, "softmax") == [False, False]
