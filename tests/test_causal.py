"""The causal mask in loops over vectors: the bits of MLX's own choice, and one mask for a call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mlx.core as mx
import pytest
from loops import LACKS, needs_compiler, on_x86, served_without

import tiny
from mlx_promptcache import Runner, attention, causal, exponentials

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = on_x86

SEED = 3
NAN, INFINITE = float("nan"), float("inf")


def own(scores: mx.array) -> mx.array:
    queries, rows = scores.shape[-2:]
    seen = mx.arange(rows) <= mx.arange(rows - queries, rows)[:, None]
    return mx.where(seen, scores, mx.finfo(mx.float32).min)


@pytest.mark.parametrize(
    "shape", [(1, 1, 3, 22, 1940), (2, 3, 1, 5, 5), (1, 7), (1, 1), (4, 512, 600)], ids=str
)
def test_it_has_the_bits_of_mlx_s_own_choice(shape: tuple[int, ...]) -> None:
    scores = mx.random.normal(shape, key=mx.random.key(SEED))
    assert tiny.bits(causal.hide(scores)) == tiny.bits(own(scores))


@pytest.mark.parametrize("value", [NAN, INFINITE, -INFINITE, -0.0, 1e-45], ids=str)
def test_no_number_comes_through_where_it_is_not_seen(value: float) -> None:
    scores = mx.full((2, 3, 4, 6), value)
    hidden = causal.hide(scores)
    assert tiny.bits(hidden) == tiny.bits(own(scores))
    assert (hidden == mx.finfo(mx.float32).min).sum().item() == 2 * 3 * (3 + 2 + 1)


@needs_compiler
def test_one_mask_serves_all_layers_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "LEAST_SCORES", 0)
    monkeypatch.setattr(exponentials, "LEAST", 0)
    made: list[tuple[int, int, int]] = []
    hidden: list[tuple[int, ...]] = []
    bits, hide = causal._bits_seen, causal.hide

    def counted(queries: int, rows: int, times: int) -> mx.array:
        made.append((queries, rows, times))
        return bits(queries, rows, times)

    def noted(scores: mx.array) -> mx.array:
        hidden.append(scores.shape)
        return hide(scores)

    model = tiny.plain()
    runner = Runner(model)
    causal._is_the_same()
    monkeypatch.setattr(causal, "_bits_seen", counted)
    monkeypatch.setattr(causal, "hide", noted)
    layers = runner.make_layers()
    for tokens in ([[5, 9, 13, 4] * 5], [[8, 3, 1]]):
        made.clear()
        hidden.clear()
        mx.eval(runner.forward(mx.array(tokens), layers)[0])
        assert len(hidden) >= len(model.layers) > 1
        assert len(made) == len(set(made)) == len(set(hidden))
    assert {rows for _, rows, _ in made} == {23}  # another call has another one


@needs_compiler
@pytest.mark.usefixtures("inferring")
def test_it_serves_many_scores_but_not_more_than_its_mask_may_have() -> None:
    many = mx.zeros((3, 22, exponentials.LEAST // 66 + 1))
    assert causal.serves(many)
    assert not causal.serves(many[:1])
    assert not causal.serves(many.astype(mx.bfloat16))
    assert not causal.serves(mx.zeros((causal.MOST // 1024 + 1, 1, 1024)))


def test_it_serves_nobody_who_may_want_gradients() -> None:
    assert not causal.serves(mx.zeros((3, 22, exponentials.LEAST)))


@pytest.mark.usefixtures("inferring")
def test_another_mlx_that_chooses_otherwise_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exponentials, "LEAST", 0)
    usual = mx.where

    def otherwise(condition: mx.array, one: mx.array, other: Any) -> mx.array:
        chosen = usual(condition, one, other)
        return chosen * (1 - 2.0**-20) if chosen.dtype == mx.float32 else chosen

    causal._is_the_same.cache_clear()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(mx, "where", otherwise)
            assert not causal.serves(mx.zeros((2, 2)))
    finally:
        causal._is_the_same.cache_clear()


@pytest.mark.parametrize("lack", LACKS)
def test_it_does_not_serve_where_nothing_can_be_compiled(lack: str, tmp_path: Path) -> None:
    assert served_without(lack, tmp_path, "causal") == [False, False]
