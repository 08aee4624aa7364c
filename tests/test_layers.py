"""Layers: what is taken down of mlx-lm's cache objects is all that they are, and nothing more."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
)

import tiny
from mlx_promptcache.arrays import dtype_name, from_array, to_array
from mlx_promptcache.blueprint import Blueprint
from mlx_promptcache.container import Array
from mlx_promptcache.errors import UnsupportedLayer
from mlx_promptcache.fingerprint import KVSettings
from mlx_promptcache.layers import (
    ROWS,
    Layer,
    capture,
    chunks_lose_rows,
    fill,
    is_sliceable,
    leaves,
    live_arrays,
    make_layers,
    quantise,
)
from mlx_promptcache.windows import Window
from tiny import bits

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PLAIN = KVSettings()
HEADS, DIM = 2, 32


def noise(shape: Sequence[int], seed: int) -> mx.array:
    return mx.random.normal(tuple(shape), key=mx.random.key(seed))


def feed(layer: Any, count: int, seed: int) -> list[tuple[str, tuple[int, ...], bytes]]:
    """Append the rows of `count` tokens, as attention does, and return what it would then see."""
    if isinstance(layer, ArraysCache):
        last = layer[0] if layer[0] is not None else mx.zeros((1, 3, 5))
        layer[0] = last + noise((1, 3, 5), seed)
        return [bits(layer[0])]
    if isinstance(layer, CacheList):
        return [seen for inner in layer.caches for seen in feed(inner, count, seed)]
    if isinstance(layer, ChunkedKVCache):
        layer.maybe_trim_front()
    keys = noise((1, HEADS, count, DIM), 2 * seed)
    values = noise((1, HEADS, count, DIM), 2 * seed + 1)
    seen = layer.update_and_fetch(keys, values)
    return [bits(array) for array in _arrays(seen)]


def _arrays(value: Any) -> Iterator[mx.array]:
    if isinstance(value, mx.array):
        yield value
    else:
        for item in value:
            yield from _arrays(item)


def fed(layer: Any, *counts: int) -> Any:
    for i, count in enumerate(counts):
        feed(layer, count, 1000 + i)
    return layer


def trimmed(layer: Any, count: int) -> Any:
    assert layer.trim(count) == count
    return layer


def sparse_arrays() -> Any:
    layer = ArraysCache(3)
    layer[0] = noise((1, 3, 5), 7)
    layer[2] = noise((1, 4), 8).astype(mx.bfloat16)
    return layer


Make = Callable[[], Any]

# A way to a layer in each of its conditions, and an empty layer as a model would make it.
CASES: dict[str, tuple[Make, Make, int]] = {
    "rows": (lambda: fed(KVCache(), 10), KVCache, 10),
    "rows, one by one": (lambda: fed(KVCache(), 10, 1, 1, 1), KVCache, 13),
    "rows, a whole buffer": (lambda: fed(KVCache(), 256), KVCache, 256),
    "rows, a buffer and one": (lambda: fed(KVCache(), 256, 1), KVCache, 257),
    "rows, trimmed": (lambda: trimmed(fed(KVCache(), 300), 45), KVCache, 255),
    "quantised": (
        lambda: fed(QuantizedKVCache(32, 8), 10, 1),
        lambda: QuantizedKVCache(32, 8),
        11,
    ),
    "quantised, trimmed": (
        lambda: trimmed(fed(QuantizedKVCache(32, 4), 300), 40),
        lambda: QuantizedKVCache(32, 4),
        260,
    ),
    "quantised on the way": (
        lambda: fed(fed(KVCache(), 20).to_quantized(32, 8), 1, 1),
        lambda: QuantizedKVCache(32, 8),
        22,
    ),
    "window, not full": (
        lambda: fed(RotatingKVCache(16), 10, 1),
        lambda: RotatingKVCache(16),
        11,
    ),
    "window, prompt only": (lambda: fed(RotatingKVCache(16), 40), lambda: RotatingKVCache(16), 40),
    "window, wrapped": (
        lambda: fed(RotatingKVCache(16), 14, *[1] * 9),
        lambda: RotatingKVCache(16),
        23,
    ),
    "window, wrapped, with a start that is kept": (
        lambda: fed(RotatingKVCache(16, keep=4), 40, *[1] * 5),
        lambda: RotatingKVCache(16, keep=4),
        45,
    ),
    "window, wrapped, then a chunk": (
        lambda: fed(RotatingKVCache(16), 14, *[1] * 9, 12),
        lambda: RotatingKVCache(16),
        35,
    ),
    "window, trimmed": (
        lambda: trimmed(fed(RotatingKVCache(16), 1, *[1] * 11), 5),
        lambda: RotatingKVCache(16),
        7,
    ),
    "window, a prompt trimmed": (
        lambda: trimmed(fed(RotatingKVCache(16), 12), 5),
        lambda: RotatingKVCache(16),
        7,
    ),
    "arrays": (lambda: fed(ArraysCache(1), 3, 4), lambda: ArraysCache(1), 7),
    "arrays, some None": (sparse_arrays, lambda: ArraysCache(3), 3),
    "arrays, all None": (lambda: ArraysCache(2), lambda: ArraysCache(2), 3),
    "chunks, the first": (
        lambda: fed(ChunkedKVCache(16), 10, 1),
        lambda: ChunkedKVCache(16),
        11,
    ),
    "chunks, past the first": (
        lambda: fed(ChunkedKVCache(16), 30, *[1] * 5),
        lambda: ChunkedKVCache(16),
        35,
    ),
    "chunks, trimmed": (
        lambda: trimmed(fed(ChunkedKVCache(16), 30, *[1] * 5), 3),
        lambda: ChunkedKVCache(16),
        32,
    ),
    "a list": (
        lambda: fed(CacheList(ArraysCache(2), KVCache()), 9, 1),
        lambda: CacheList(ArraysCache(2), KVCache()),
        10,
    ),
    "a list of lists": (
        lambda: fed(CacheList(KVCache(), CacheList(RotatingKVCache(8), KVCache())), 9, 1),
        lambda: CacheList(KVCache(), CacheList(RotatingKVCache(8), KVCache())),
        10,
    ),
}

every_case = pytest.mark.parametrize("case", CASES)


def refilled(contents: Sequence[Layer], empty: Make, n_past: int) -> Any:
    layers = [empty()]
    fill(layers, contents, n_past, PLAIN)
    return layers[0]


@every_case
def test_a_filled_layer_is_taken_down_as_it_was(case: str) -> None:
    make, empty, n_past = CASES[case]
    contents = capture([make()], n_past)
    again = capture([refilled(contents, empty, n_past)], n_past)
    assert [x.path for x in again] == [x.path for x in contents]
    for before, after in zip(contents, again, strict=True):
        assert (before.kind, before.attributes) == (after.kind, after.attributes)
        assert {n: bits(a) for n, a in before.rows.items()} == {
            n: bits(a) for n, a in after.rows.items()
        }
        assert {n: bits(a) for n, a in before.arrays.items()} == {
            n: bits(a) for n, a in after.arrays.items()
        }


@every_case
@pytest.mark.parametrize("ways", [(1,) * 24, (5, 1, 1), (1, 20, 1), (300, 1)])
def test_going_on_from_a_filled_layer_is_going_on_from_the_original(
    case: str, ways: tuple[int, ...]
) -> None:
    make, empty, n_past = CASES[case]
    original = make()
    filled = refilled(capture([original], n_past), empty, n_past)
    for i, count in enumerate(ways):
        assert feed(filled, count, i) == feed(original, count, i)


@every_case
def test_the_live_layer_going_on_does_not_change_what_was_taken_down(case: str) -> None:
    make, empty, n_past = CASES[case]
    live = make()
    before = capture([make()], n_past)
    contents = capture([live], n_past)
    for i in range(20):
        feed(live, 1, i)
    feed(live, 3, 99)
    going_on = [feed(refilled(contents, empty, n_past), 1, i) for i in range(2)]
    assert going_on == [feed(refilled(before, empty, n_past), 1, i) for i in range(2)]
    for taken, expected in zip(contents, before, strict=True):
        arrays = {**taken.rows, **taken.arrays}
        assert {n: bits(a) for n, a in arrays.items()} == {
            n: bits(a) for n, a in {**expected.rows, **expected.arrays}.items()
        }


@every_case
def test_filling_twice_from_the_same_content_gives_two_layers_of_their_own(case: str) -> None:
    make, empty, n_past = CASES[case]
    contents = capture([make()], n_past)
    first = refilled(contents, empty, n_past)
    run = [feed(first, count, i) for i, count in enumerate((1, 1, 4, 1))]
    second = refilled(contents, empty, n_past)
    assert [feed(second, count, i) for i, count in enumerate((1, 1, 4, 1))] == run


def test_trimming_a_filled_layer_and_going_on_does_not_write_into_its_content() -> None:
    for n_past in (255, 256, 257, 512):
        contents = capture([fed(KVCache(), n_past)], n_past)
        before = {n: bits(a) for n, a in contents[0].rows.items()}
        filled = trimmed(refilled(contents, KVCache, n_past), 9)
        feed(filled, 5, 1)
        assert {n: bits(a) for n, a in contents[0].rows.items()} == before


@every_case
def test_padding_and_trimmed_rows_are_left_out(case: str) -> None:
    make, _, n_past = CASES[case]
    layer = make()
    for path, live in leaves([layer]):
        (content,) = [x for x in capture([layer], n_past) if x.path == path]
        if isinstance(live, ArraysCache):
            assert content.nbytes == live.nbytes
        elif isinstance(live, QuantizedKVCache):
            packed_row = 2 * HEADS * (DIM * live.bits // 8 + 2 * 4 * DIM // live.group_size)
            assert content.nbytes == n_past * packed_row
        else:
            held = n_past
            if isinstance(live, ChunkedKVCache):
                held -= live.start_position
            elif isinstance(live, RotatingKVCache):
                held = min(n_past, live.max_size)
            assert content.nbytes == held * 2 * HEADS * DIM * 4


def test_only_layers_with_a_row_for_each_token_are_sliceable() -> None:
    assert is_sliceable(fed(KVCache(), 10), 10)
    assert is_sliceable(fed(QuantizedKVCache(32, 8), 10), 10)
    assert not is_sliceable(fed(KVCache(), 10), 11)
    assert not is_sliceable(KVCache(), 0)
    assert not is_sliceable(fed(RotatingKVCache(16), 10), 10)
    assert not is_sliceable(fed(ChunkedKVCache(16), 10), 10)
    assert not is_sliceable(ArraysCache(2), 10)


def test_a_cut_layer_holds_the_first_rows() -> None:
    (whole,) = capture([fed(KVCache(), 10)], 10)
    (short,) = capture([trimmed(fed(KVCache(), 10), 3)], 7)
    assert {n: bits(a) for n, a in whole.cut(7).rows.items()} == {
        n: bits(a) for n, a in short.rows.items()
    }


# Models


def greedy(model: Any, layers: list[Any], count: int) -> tuple[list[int], list[Any]]:
    token: Any = 3
    tokens, seen = [], []
    for _ in range(count):
        logits = model(mx.array([[token]]), cache=layers)[0, -1]
        token = mx.argmax(logits).item()
        tokens.append(token)
        seen.append(bits(logits))
    return tokens, seen


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("n", [5, 70])
def test_a_model_goes_on_from_filled_layers_bit_for_bit(kind: str, n: int) -> None:
    model = tiny.KINDS[kind]()
    layers = make_layers(model, PLAIN)
    prompt = tiny.random_tokens(n, 5)
    mx.eval(model(mx.array(prompt[:-2])[None], cache=layers))
    for token in prompt[-2:]:
        mx.eval(model(mx.array([[token]]), cache=layers), live_arrays(layers))
    contents = capture(layers, n)
    straight = greedy(model, layers, 8)
    for _ in range(2):
        filled = make_layers(model, PLAIN)
        fill(filled, contents, n, PLAIN)
        assert greedy(model, filled, 8) == straight


def test_quantised_rows_fill_layers_that_the_model_makes_plain() -> None:
    model, kv = tiny.plain(), KVSettings(8, 32, 0)
    layers = make_layers(model, kv)
    mx.eval(model(mx.array(tiny.random_tokens(40, 6))[None], cache=layers))
    quantise(layers, kv)
    contents = capture(layers, 40)
    filled = make_layers(model, kv)
    fill(filled, contents, 40, kv)
    assert all(type(layer) is QuantizedKVCache for layer in filled)
    assert [(layer.bits, layer.group_size) for layer in filled] == [(8, 32)] * 2
    assert greedy(model, filled, 5) == greedy(model, layers, 5)


def test_layers_are_quantised_from_the_position_that_was_asked_for() -> None:
    layers = [fed(KVCache(), 9), fed(KVCache(), 10)]
    quantise(layers, KVSettings(8, 32, 10))
    assert [type(layer) for layer in layers] == [KVCache, QuantizedKVCache]
    quantise(layers, KVSettings(None, 32, 0))
    assert type(layers[0]) is KVCache


def test_quantising_a_window_is_refused_in_words() -> None:
    with pytest.raises(UnsupportedLayer, match="RotatingKVCache"):
        quantise([fed(RotatingKVCache(16), 9)], KVSettings(8, 32, 0))


# What cannot be


@pytest.mark.parametrize("value", [{"a": 1}, object(), {1, 2}, b"bytes", [1, object()]])
def test_an_attribute_of_an_unknown_type_is_refused_by_layer_and_name(value: Any) -> None:
    odd = ArraysCache(1)
    odd.unheard_of = value
    with pytest.raises(UnsupportedLayer) as error:
        capture([KVCache(), CacheList(KVCache(), odd)], 3)
    assert "layer 1.1 (ArraysCache)" in str(error.value)
    assert "'unheard_of" in str(error.value)


@pytest.fixture
def chunks_of_mlx_lm_0_31(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Chunks are trimmed by the length of their buffer, padding included."""

    def trim(chunk: ChunkedKVCache) -> None:
        if chunk.keys is not None:
            chunk.start_position += max(0, chunk.keys.shape[2] - chunk.chunk_size)

    monkeypatch.setattr(ChunkedKVCache, "maybe_trim_front", trim)
    chunks_lose_rows.cache_clear()
    yield
    chunks_lose_rows.cache_clear()


@pytest.mark.usefixtures("chunks_of_mlx_lm_0_31")
def test_chunks_are_refused_where_mlx_lm_itself_loses_their_rows() -> None:
    rows = noise((1, HEADS, 3, DIM), 1)
    chunk = ChunkedKVCache(512)
    chunk.update_and_fetch(rows, rows)
    with pytest.raises(UnsupportedLayer, match=r"layer 1\.1 is a ChunkedKVCache"):
        capture([fed(KVCache(), 3), CacheList(KVCache(), chunk)], 3)
    with pytest.raises(UnsupportedLayer, match="ChunkedKVCache"):
        Blueprint.of(tiny.chunked(), PLAIN)
    assert Blueprint.of(tiny.rotating(), PLAIN).rows


def test_numbers_texts_and_nests_of_them_are_taken_down() -> None:
    odd = ArraysCache(1)
    extra = (1, [2.5, "three", None, (True, mx.array([4, 5]))], ())
    odd.extra = extra
    empty: Any = ArraysCache(1)
    empty.extra = None
    filled = refilled(capture([odd], 3), lambda: empty, 3)
    one, (number, text, nothing, (flag, array)), none = filled.extra
    assert (one, number, text, nothing, flag, none) == (1, 2.5, "three", None, True, ())
    assert array.tolist() == [4, 5]


def test_filling_refuses_another_number_of_layers() -> None:
    contents = capture([fed(KVCache(), 5), fed(KVCache(), 5)], 5)
    for count in (0, 1, 3):
        with pytest.raises(UnsupportedLayer, match="2 layers"):
            fill([KVCache() for _ in range(count)], contents, 5, PLAIN)


def test_filling_refuses_layers_that_are_nested_otherwise() -> None:
    contents = capture([fed(KVCache(), 5), fed(KVCache(), 5)], 5)
    with pytest.raises(UnsupportedLayer):
        fill([CacheList(KVCache(), KVCache())], contents, 5, PLAIN)


def test_filling_refuses_rows_for_a_window_and_a_window_for_rows() -> None:
    with pytest.raises(UnsupportedLayer, match="takes no rows"):
        fill([RotatingKVCache(16)], capture([fed(KVCache(), 5)], 5), 5, PLAIN)
    with pytest.raises(UnsupportedLayer, match="no such window"):
        fill([KVCache()], capture([fed(RotatingKVCache(16), 5)], 5), 5, PLAIN)


def test_filling_refuses_a_window_that_is_not_this_one() -> None:
    (content,) = capture([fed(RotatingKVCache(16, keep=2), 5, 20)], 25)
    assert content.attributes is not None
    fill([RotatingKVCache(16, keep=2)], [content], 25, PLAIN)
    changes: list[dict[str, Any]] = [
        {"window": Window(17, 2)},
        {"window": Window(16, 1)},
        {"attributes": {**content.attributes, "max_size": 17}},
        {"attributes": {**content.attributes, "keep": 1}},
        {"attributes": {**content.attributes, "offset": 24}},
        {"attributes": {**content.attributes, "_idx": 1}},
        {"attributes": {**content.attributes, "_idx": 17}},
        {"attributes": {**content.attributes, "_idx": -1}},
        {"rows": {name: rows[:, :, 1:] for name, rows in content.rows.items()}},
        {"rows": {"keys": content.rows["keys"]}},
    ]
    for change in changes:
        with pytest.raises(UnsupportedLayer):
            fill([RotatingKVCache(16, keep=2)], [content._replace(**change)], 25, PLAIN)


@pytest.mark.parametrize("slots", [0, 1, 3])
def test_filling_refuses_another_number_of_places_than_the_model_has(slots: int) -> None:
    contents = capture([fed(ArraysCache(2), 5)], 5)
    odd = capture([ArraysCache(slots)], 5)
    refilled(contents, lambda: ArraysCache(2), 5)
    with pytest.raises(UnsupportedLayer, match="2 places in 'cache'"):
        refilled(odd, lambda: ArraysCache(2), 5)


def test_filling_refuses_rows_of_which_some_are_missing() -> None:
    (content,) = capture([fed(KVCache(), 5)], 5)
    lacking = Layer("0", "KVCache", {"keys": content.rows["keys"]})
    with pytest.raises(UnsupportedLayer, match="no values"):
        fill([KVCache()], [lacking], 5, PLAIN)


# Blueprints


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("n", [1, 2, 31, 100, 300])
def test_a_blueprint_accepts_what_its_model_holds(kind: str, n: int) -> None:
    model = tiny.KINDS[kind]()
    blueprint = Blueprint.of(model, PLAIN)
    layers = make_layers(model, PLAIN)
    mx.eval(model(mx.array(tiny.random_tokens(n, 9))[None], cache=layers))
    for content in capture(layers, n):
        for name, array in content.rows.items():
            blueprint.check_rows(content.path, name, dtype_name(array), array.shape)
        for name, array in content.arrays.items():
            blueprint.check_opaque(content.path, name, dtype_name(array), array.shape, n)
    assert blueprint.sliceable == (kind == "plain")


def test_a_blueprint_accepts_rows_before_and_after_they_are_quantised() -> None:
    model, kv = tiny.plain(), KVSettings(8, 32, 20)
    either = Blueprint.of(model, kv)
    layers = make_layers(model, kv)
    for _ in range(2):
        mx.eval(model(mx.array(tiny.random_tokens(12, 9))[None], cache=layers))
        quantise(layers, kv)
        for content in capture(layers, layers[0].offset):
            for name, array in content.rows.items():
                either.check_rows(content.path, name, dtype_name(array), array.shape)
    assert type(layers[0]) is QuantizedKVCache


def test_a_blueprint_refuses_rows_of_another_model() -> None:
    blueprint = Blueprint.of(tiny.plain(), PLAIN)
    blueprint.check_rows("1", "values", "float32", (1, 2, 77, 32))
    for path, name, dtype, shape in [
        ("2", "keys", "float32", (1, 2, 77, 32)),  # layers
        ("0.0", "keys", "float32", (1, 2, 77, 32)),
        ("1", "queries", "float32", (1, 2, 77, 32)),
        ("1", "keys.0", "uint32", (1, 2, 77, 32)),
        ("1", "keys", "float16", (1, 2, 77, 32)),  # dtype
        ("1", "keys", "float32", (1, 4, 77, 32)),  # heads
        ("1", "keys", "float32", (2, 2, 77, 32)),  # batch
        ("1", "keys", "float32", (1, 2, 77, 64)),  # dimensions of a head
        ("1", "keys", "float32", (1, 2, 77)),
        ("1", "keys", "float32", (1, 2, 77, 32, 1)),
        ("1", "keys", "float32", ()),
    ]:
        with pytest.raises(UnsupportedLayer):
            blueprint.check_rows(path, name, dtype, shape)


def test_a_blueprint_refuses_opaque_arrays_of_another_model() -> None:
    blueprint = Blueprint.of(tiny.chunked(), PLAIN)
    blueprint.check_opaque("0", "keys", "float32", (1, 1, 32, 16), 40)
    for path, name, dtype, shape in [
        ("3", "keys", "float32", (1, 1, 32, 16)),  # that layer has rows
        ("4", "keys", "float32", (1, 1, 32, 16)),  # layers
        ("0", "keys", "bfloat16", (1, 1, 32, 16)),  # dtype
        ("0", "keys", "float32", (1, 4, 32, 16)),  # heads
        ("0", "keys", "float32", (1, 1, 32, 64)),  # dimensions of a head
        ("0", "keys", "float32", (1, 1, 32, 1 << 40)),
        ("0", "keys", "float32", (1, 1, 1 << 40, 16)),
        ("0", "keys", "float32", (1, 1, 32)),
        ("0", "unheard_of", "float32", (1, 1 << 40)),
    ]:
        with pytest.raises(UnsupportedLayer):
            blueprint.check_opaque(path, name, dtype, shape, 40)


def test_reading_a_blueprint_evaluates_nothing() -> None:
    model = tiny.plain()
    mx.synchronize()
    before = mx.get_active_memory()
    Blueprint.of(model, PLAIN)
    assert mx.get_active_memory() == before


# Arrays

DTYPES = [
    mx.bool_, mx.uint8, mx.int8, mx.uint16, mx.int16, mx.float16, mx.bfloat16, mx.uint32, mx.int32,
    mx.float32, mx.uint64, mx.int64, mx.complex64,
]  # fmt: skip
SHAPES: list[tuple[int, ...]] = [(), (1,), (0,), (3, 0, 2), (7,), (2, 3, 5), (1, 1, 1, 1)]


@pytest.mark.parametrize(("dtype", "shape"), itertools.product(DTYPES, SHAPES))
def test_an_array_comes_back_as_it_was(dtype: mx.Dtype, shape: tuple[int, ...]) -> None:
    array = (noise(shape, 3) * 100).astype(dtype)
    copied = to_array(array)
    back = from_array(copied)
    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    assert copied.nbytes == array.nbytes == len(copied.data)
    assert bits(back) == bits(array)
    assert mx.array_equal(back, array)


def test_every_bit_pattern_of_bfloat16_comes_back_as_it_was() -> None:
    patterns = mx.arange(1 << 16, dtype=mx.uint16)
    back = from_array(to_array(patterns.view(mx.bfloat16)))
    assert back.dtype == mx.bfloat16
    assert mx.array_equal(back.view(mx.uint16), patterns)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.bool_])
def test_arrays_that_are_views_of_others_are_copied_in_order(dtype: mx.Dtype) -> None:
    whole = (noise((4, 6, 8), 4) * 9).astype(dtype)
    views = [
        whole.transpose(2, 0, 1),
        whole[1:3, ::2, 3:],
        whole[:, ::-1],
        mx.broadcast_to(whole[:1], (3, 6, 8)),
    ]
    for view in views:
        assert from_array(to_array(view)).tolist() == view.tolist()


def test_an_array_is_a_copy_of_its_bytes() -> None:
    data = bytearray(range(8))
    array = from_array(Array("uint8", (8,), memoryview(data)))
    data[0] = 99
    assert array.tolist() == list(range(8))


def test_live_arrays_are_all_arrays_of_all_layers() -> None:
    layers = [fed(CacheList(ArraysCache(2), KVCache()), 3), fed(QuantizedKVCache(32, 8), 3)]
    found = live_arrays(layers)
    expected = 1 + len(ROWS) + 3 * len(ROWS)
    assert len(found) == expected
    assert sum(a.nbytes for a in found) == sum(layer.nbytes for layer in layers)
