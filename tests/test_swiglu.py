"""The gate of feed-forward layers in loops over vectors: the bits of mlx-lm's own."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import pytest
from loops import LACKS, needs_compiler, on_x86, without
from mlx_lm.models import activations

import architectures
import processes
import tiny
from mlx_promptcache import Runner, exponentials, swiglu
from mlx_promptcache.streams import uncompiled

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = on_x86
SPECIAL = [0.0, -0.0, 88.0, 88.00001, -88.0, -88.00001, 1e-38, -1e-45, 3e38, -3e38]
INFINITE = [float("inf"), -float("inf"), float("nan")]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of what was computed here, few numbers or many."""
    shapes, own = [], swiglu.swiglu

    def counting(gate: mx.array, x: mx.array) -> mx.array:
        shapes.append(gate.shape)
        return own(gate, x)

    assert swiglu._is_the_same(activations.swiglu)
    monkeypatch.setattr(swiglu, "swiglu", counting)
    monkeypatch.setattr(exponentials, "LEAST", 0)
    return shapes


def normal(*shape: int, seed: int = 3) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 30.0, 1e37])
@pytest.mark.parametrize("shape", [(1, 22, 1536), (3, 5), (1, 1), (700,)], ids=str)
def test_gates_have_the_bits_of_mlx_lm_s_own(shape: tuple[int, ...], scale: float) -> None:
    gate, x = scale * normal(*shape), normal(*shape, seed=4)
    assert tiny.bits(swiglu.swiglu(gate, x)) == tiny.bits(activations.swiglu(gate, x))


def test_so_have_those_at_the_limits() -> None:
    gate = mx.array(SPECIAL + [near for number in SPECIAL for near in (0.9 * number, -number)])
    for x in (mx.ones(gate.shape), -1e-3 * mx.ones(gate.shape)):
        assert tiny.bits(swiglu.swiglu(gate, x)) == tiny.bits(activations.swiglu(gate, x))
    gate = mx.array(INFINITE)
    ours, own = (each(gate, mx.ones((3,))) for each in (swiglu.swiglu, activations.swiglu))
    assert mx.array_equal(ours, own, equal_nan=True).item()


def asked(model: Any) -> list[Any]:
    tokens = mx.array([[3 + 7 * i % 200 for i in range(40)]])
    return [tiny.bits(model(tokens)), tiny.bits(model(tokens[:, :1]))]


@needs_compiler
@pytest.mark.parametrize("name", architectures.runnable())
def test_every_architecture_computes_the_same_bits(
    name: str, counted: list[tuple[int, ...]]
) -> None:
    model = architectures.build(name)
    Runner(model)  # lets it
    counted.clear()
    own = asked(model)
    assert counted == []  # for gradients, perhaps
    with exponentials.inferring():
        assert asked(model) == own


@needs_compiler
@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral3", "olmo2"])
def test_known_architectures_do_so(name: str, counted: list[tuple[int, ...]]) -> None:
    model = architectures.build(name)
    runner = Runner(model)
    counted.clear()
    mx.eval(runner.forward(mx.array([[5, 9, 13]]), runner.make_layers())[0])
    assert len(counted) == len(model.layers)
    assert {shape[:2] for shape in counted} == {(1, 3)}


@needs_compiler
@pytest.mark.usefixtures("inferring")
def test_others_are_left_to_mlx_lm(counted: list[tuple[int, ...]]) -> None:
    gated, few = swiglu._or_usual(activations.swiglu), normal(4, 4)
    halves = few.astype(mx.float16)
    for gate, x in [(halves, halves), (few, halves), (few, few[:1])]:
        assert tiny.bits(gated(gate, x)) == tiny.bits(activations.swiglu(gate, x))
    with uncompiled():
        gated(few, few)
    assert counted == []
    many = mx.zeros((swiglu.MOST + 1,))
    gated(many, many)
    assert counted == []
    gated(many[1:], many[1:])
    gated(few, few)
    assert counted == [(swiglu.MOST,), (4, 4)]


def test_it_stands_in_once_and_for_mlx_lm_s_own_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.plain()
    modules = [sys.modules[type(module).__module__] for module in model.modules()]
    (module,) = {module for module in modules if hasattr(module, "swiglu")}
    monkeypatch.setattr(module, "swiglu", activations.swiglu)
    swiglu.spread(model)
    there: Any = module.swiglu
    assert there is not activations.swiglu
    assert there.__wrapped__ is activations.swiglu
    swiglu.spread(model)
    assert module.swiglu is there

    def somebody_s(gate: mx.array, x: mx.array) -> mx.array:
        return gate * x

    monkeypatch.setattr(module, "swiglu", somebody_s)
    swiglu.spread(model)
    assert module.swiglu is somebody_s


def test_mlx_lm_s_own_stays_what_it_is() -> None:
    usual, model = activations.swiglu, architectures.build("apertus")
    assert activations.__name__ in {type(module).__module__ for module in model.modules()}
    swiglu.spread(model)
    assert activations.swiglu is usual


def test_on_other_machines_nothing_stands_in(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.plain()
    module: Any = sys.modules["mlx_lm.models.llama"]
    monkeypatch.setattr(module, "swiglu", activations.swiglu)
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    swiglu.spread(model)
    assert module.swiglu is activations.swiglu


@pytest.mark.usefixtures("inferring")
def test_another_mlx_that_computes_otherwise_is_left_alone() -> None:
    def otherwise(gate: mx.array, x: mx.array) -> mx.array:
        told: mx.array = activations.swiglu(gate, x) * (1 + 2.0**-20)
        return told

    assert not swiglu._is_the_same(otherwise)
    gate = normal(exponentials.LEAST)
    assert tiny.bits(swiglu._or_usual(otherwise)(gate, gate)) == tiny.bits(otherwise(gate, gate))


CHILD = """
import json
from mlx_lm.models.activations import swiglu as usual
from mlx_promptcache import swiglu
print(json.dumps(swiglu._is_the_same(usual)))
"""


@pytest.mark.parametrize("lack", LACKS)
def test_it_does_not_serve_where_nothing_can_be_compiled(lack: str, tmp_path: Path) -> None:
    assert processes.python(CHILD, **without(lack, tmp_path)) is False
