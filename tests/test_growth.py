"""Growth: what is said of layers without computing is what live ones hold, to the byte."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import ArraysCache, KVCache

import architectures
import tiny
from mlx_promptcache import Runner
from mlx_promptcache.errors import UnsupportedLayer
from mlx_promptcache.feeding import Fed, FedAlone, feeder
from mlx_promptcache.fingerprint import KVSettings
from mlx_promptcache.growth import Bytes, Growth, Held
from mlx_promptcache.layers import capture_one, leaves, live_arrays

if TYPE_CHECKING:
    from mlx_promptcache.growth import Layout

STEP = 256
PLAIN = KVSettings()
QUANTISED = KVSettings(8, 32, 700)
WINDOWED = KVSettings(max_size=48)
SLOW = {"deepseek_v41"}  # whole models that are fed for want of anything better

each = pytest.mark.parametrize("name", architectures.runnable())


@functools.cache
def model_of(name: str) -> Any:
    return architectures.build(name)


def live(model: Any, kv: KVSettings, tokens: int) -> Layout:
    """What the layers hold after a prompt that was computed."""
    run = Runner(model, kv=kv, prefill_step=STEP).start([i % 16 for i in range(tokens)])
    return tuple(held_by(path, layer, tokens) for path, layer in leaves(run._layers))


def held_by(path: str, layer: Any, tokens: int) -> Held:
    kind, count = type(layer).__name__, sum(array.nbytes for array in live_arrays([layer]))
    content = capture_one(path, layer, tokens)
    if content.sliceable:
        return Held(path, kind, Bytes(count, rows=content.nbytes))
    if content.opaque:
        return Held(path, kind, Bytes(count, opaque=content.nbytes))
    return Held(path, kind, Bytes(count, window=content.nbytes))


def built(model: Any, kv: KVSettings, tokens: int) -> Layout:
    """What they hold after every pass of the whole model was built, and none computed."""
    fed = Fed(model, kv)
    for start in range(0, tokens, STEP):
        fed.feed(min(STEP, tokens - start))
    return tuple(held_by(path, layer, tokens) for path, layer in leaves(fed.layers))


# Every architecture


@each
def test_what_is_said_is_what_live_layers_hold(name: str) -> None:
    """After one token; one after a whole pass, which windows take otherwise; and several."""
    growth = Growth(model_of(name), PLAIN, STEP)
    for tokens in (1, 257, 300):
        assert growth.at(tokens) == live(model_of(name), PLAIN, tokens)


@each
def test_the_straight_line_is_what_building_every_pass_gives(name: str) -> None:
    if name == "dbrx":
        pytest.skip("it evaluates what it is fed")
    growth, tokens = Growth(model_of(name), PLAIN, STEP), 1600
    assert tokens >= growth.settled + STEP
    assert growth.at(tokens) == built(model_of(name), PLAIN, tokens)


@pytest.mark.parametrize("name", [n for n in architectures.runnable() if n not in SLOW])
def test_layers_that_are_known_are_fed_alone(name: str) -> None:
    """Else a long context would take as long as building all its passes."""
    assert isinstance(feeder(model_of(name), PLAIN)(1000), FedAlone)


# Every kind of layer, far


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("tokens", [1281, 1500])
def test_far_beyond_windows_it_is_what_live_layers_hold(kind: str, tokens: int) -> None:
    model = tiny.KINDS[kind]()
    growth = Growth(model, PLAIN, STEP)
    assert growth.settled < 1281
    assert growth.at(tokens) == live(model, PLAIN, tokens)


@pytest.mark.parametrize("tokens", [1, 48, 300, 1281, 1500])
def test_windows_that_keep_their_first_rows_are_what_live_ones_hold(tokens: int) -> None:
    model = tiny.bare()
    said = Growth(model, WINDOWED, STEP).at(tokens)
    assert {held.kind for held in said} == {"RotatingKVCache"}
    assert said == live(model, WINDOWED, tokens)


@pytest.mark.parametrize("kind", ["plain", "hybrid"])
@pytest.mark.parametrize("tokens", [699, 700, 769, 1793])
def test_quantised_layers_are_what_live_ones_hold(kind: str, tokens: int) -> None:
    """Before they are quantised, at the very token, just after and far beyond."""
    model = tiny.KINDS[kind]()
    said = Growth(model, QUANTISED, STEP).at(tokens)
    kinds = {held.kind for held in said}
    assert ("QuantizedKVCache" in kinds) == (tokens >= QUANTISED.quantized_start)
    assert said == live(model, QUANTISED, tokens)


def test_a_late_start_of_quantising_is_not_passed_over() -> None:
    """The line before it is straight, too."""
    model, late = tiny.plain(), KVSettings(8, 32, 1500)
    growth = Growth(model, late, STEP)
    for tokens in (1300, 1499, 1500, 2600):
        assert growth.at(tokens) == built(model, late, tokens)


def test_rows_of_another_dtype_take_their_own_bytes() -> None:
    model = architectures.build("Qwen 3")
    single = Growth(model, PLAIN, STEP).at(300)
    model.set_dtype(mx.bfloat16)
    half = Growth(model, PLAIN, STEP).at(300)
    assert half == live(model, PLAIN, 300)
    assert [2 * held.bytes.live for held in half] == [held.bytes.live for held in single]


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_the_way_passes_the_most_that_live_layers_ever_hold(kind: str) -> None:
    model, tokens = tiny.KINDS[kind](), 1900
    ends = [*range(STEP, tokens, STEP), tokens]
    most = max(sum(held.bytes.live for held in built(model, PLAIN, end)) for end in ends)
    way = list(Growth(model, PLAIN, STEP).on_the_way(tokens))
    assert max(sum(held.bytes.live for held in layout) for layout in way) == most
    assert way[-1] == built(model, PLAIN, tokens)


def test_the_way_passes_rows_that_are_not_yet_quantised() -> None:
    way = list(Growth(tiny.plain(), KVSettings(4, 32, 700), STEP).on_the_way(800))
    live_bytes = [sum(held.bytes.live for held in layout) for layout in way]
    assert max(live_bytes) == live_bytes[1] == 512 * 1024 > live_bytes[-1]


def test_the_way_of_a_short_prompt_is_its_only_pass() -> None:
    growth = Growth(tiny.plain(), PLAIN, STEP)
    assert list(growth.on_the_way(STEP)) == [growth.at(STEP)]


# What does not grow as expected


class Odd:
    """A model of two layers; each pass it adds another number of rows to the second."""

    def __init__(self, first: Any, rows: Any, second: Any = ArraysCache) -> None:
        self.first, self.rows, self.second = first, rows, second

    def make_cache(self) -> list[Any]:
        return [self.first(), self.second(1)]

    def __call__(self, inputs: mx.array, cache: list[Any]) -> mx.array:
        rows = mx.zeros((1, 1, inputs.shape[1], 8))
        cache[0].update_and_fetch(rows, rows)
        held = 0 if cache[1][0] is None else cache[1][0].shape[1]
        cache[1][0] = mx.zeros((1, self.rows(held, inputs.shape[1])))
        return mx.zeros((1, inputs.shape[1], 4))


@pytest.mark.parametrize("tokens", [STEP, 2900])
def test_arrays_that_grow_make_the_whole_model_be_fed(tokens: int) -> None:
    model = Odd(KVCache, lambda held, count: held + count // 2)
    growth = Growth(model, PLAIN, STEP)
    assert not isinstance(feeder(model, PLAIN)(1000), FedAlone)
    assert growth.at(tokens)[1].bytes.live == 4 * (tokens // 2)


def test_what_does_not_grow_in_a_straight_line_is_built_pass_by_pass() -> None:
    model = Odd(KVCache, lambda held, _: 2 * held + 1)
    growth = Growth(model, PLAIN, STEP)
    assert growth.settled < 10 * STEP
    assert growth.at(10 * STEP)[1].bytes.live == 4 * (2**10 - 1)


def test_a_class_that_is_not_known_makes_the_whole_model_be_fed() -> None:
    class Other(ArraysCache):  # type: ignore[misc]
        """It may do anything; this one adds a row for every 128 tokens, so none for a few."""

    model = Odd(KVCache, lambda held, count: held + count // 128, Other)
    assert not isinstance(feeder(model, PLAIN)(1000), FedAlone)
    assert Growth(model, PLAIN, STEP).at(10 * STEP)[1].bytes.live == 4 * 20


def test_what_cannot_be_taken_down_still_has_its_bytes() -> None:
    class Closed(KVCache):  # type: ignore[misc]
        """It keeps an object."""

        def __init__(self) -> None:
            super().__init__()
            self.thing = object()

    held = Growth(Odd(Closed, lambda *_: 3), PLAIN, STEP).at(300)[0]
    assert (held.capturable, held.bytes) == (False, Bytes(2 * 512 * 8 * 4))
    with pytest.raises(UnsupportedLayer):
        capture_one("0", Closed(), 300)


def test_nothing_is_evaluated() -> None:
    model = tiny.nested()
    mx.synchronize()
    before = mx.get_active_memory()
    Growth(model, KVSettings(), 512).at(100_000)
    assert mx.get_active_memory() - before < 1000
