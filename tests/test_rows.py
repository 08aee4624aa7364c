"""Rows: planes that are joined to the bytes of layers, and room that these are put into."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_promptcache import rows
from mlx_promptcache.ahead import Ahead
from mlx_promptcache.container import ITEMSIZE, Entry
from mlx_promptcache.errors import UnsupportedLayer
from mlx_promptcache.rows import Planes, Room, Staging
from mlx_promptcache.windows import Span

CPU_ONLY = pytest.mark.skipif(
    mx.default_device() != mx.Device(mx.cpu), reason="on a GPU room is made when it is needed"
)
LAYERS, HEADS, WIDTH = 5, 2, 3


def entry_of(dtype: str, tokens: int, width: int = WIDTH) -> Entry:
    return Entry(dtype, (LAYERS, 1, HEADS, tokens, width), (), "", 0, 0)


def drawn(entry: Entry, seed: int) -> Any:
    """The bytes of an array, `[layers, batch, heads, tokens, width, bytes of an item]`."""
    shape = (*entry.shape, ITEMSIZE[entry.dtype])
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def staged(entry: Entry, items: Any) -> tuple[Planes, Staging]:
    """The planes of an array, as a reader leaves them in memory that was used before."""
    staging = Staging(1, 2 * items.size)
    planes = staging.take(entry)
    planes.memory[:] = np.moveaxis(items, -1, 0).tobytes()
    return planes, staging


def bytes_of(array: mx.array) -> bytes:
    flat: Any = mx.contiguous(array).reshape(-1)
    return bytes(memoryview(flat)) if array.size else b""


@pytest.mark.parametrize("dtype", ITEMSIZE)
@pytest.mark.parametrize("layers", [(0, LAYERS), (0, 1), (2, 4), (LAYERS - 1, LAYERS)])
def test_planes_are_joined_to_the_bytes_of_the_layers_that_are_asked_for(
    dtype: str, layers: tuple[int, int]
) -> None:
    entry = entry_of(dtype, tokens=7)
    items = drawn(entry, seed=3)
    planes, _ = staged(entry, items)
    joined = planes.joined(*layers)
    begin, end = layers
    assert joined.dtype == mx.uint8
    assert joined.shape == (end - begin, 1, HEADS, 7, WIDTH * ITEMSIZE[dtype])
    assert bytes_of(joined) == items[begin:end].tobytes()


def test_rows_without_a_width_are_joined_to_nothing() -> None:
    entry = entry_of("float32", tokens=7, width=0)
    planes, _ = staged(entry, drawn(entry, seed=3))
    assert planes.joined(0, LAYERS).shape == (LAYERS, 1, HEADS, 7, 0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "complex64"])
def test_rows_of_several_stacks_are_put_in_the_order_of_their_positions(dtype: str) -> None:
    spans = [Span(0, 4), Span(4, 5), Span(5, 11)]
    entries = [entry_of(dtype, span.stop - span.start) for span in spans]
    parts = [drawn(entry, seed) for seed, entry in enumerate(entries)]
    rooms = [Room(entries[0], [Span(0, 9)], padded=True) for _ in range(LAYERS)]
    for span, entry, items in reversed(list(zip(spans, entries, parts, strict=True))):
        planes, _ = staged(entry, items)
        Room.open(rooms)  # those that are open keep what was put there
        joined = planes.joined(0, LAYERS)
        for layer, room in enumerate(rooms):
            room.put(joined, layer, span)
    whole = np.concatenate(parts, axis=3)[:, :, :, :9]  # two rows more than there was room for
    for layer, room in enumerate(rooms):
        array = room.close()
        assert array.shape == (1, HEADS, 256, WIDTH)
        assert bytes_of(array[:, :, :9].view(mx.uint8)) == whole[layer].tobytes()
        assert not any(bytes_of(array[:, :, 9:].view(mx.uint8)))


def test_room_that_lacks_rows_is_not_closed() -> None:
    entry = entry_of("float32", tokens=4)
    room = Room(entry, [Span(0, 5)], padded=False)
    Room.open([room])
    planes, _ = staged(entry, drawn(entry, seed=1))
    room.put(planes.joined(0, LAYERS), 0, Span(0, 4))
    with pytest.raises(UnsupportedLayer, match="lack rows"):
        room.close()


# Rooms that are opened beside


def rooms_of(count: int) -> list[Room]:
    return [Room(entry_of("float32", 8), [Span(0, 8)], padded=True) for _ in range(count)]


@CPU_ONLY
def test_rooms_that_are_opened_beside_are_empty_and_take_rows() -> None:
    entry, rooms = entry_of("float32", 8), rooms_of(7)
    items = drawn(entry, seed=4)
    planes, _ = staged(entry, items)
    Room.open_beside(rooms, Ahead())
    joined = planes.joined(0, LAYERS)
    mx.eval(joined)
    for i, room in enumerate(rooms[:LAYERS]):
        room.put(joined, i, Span(0, 8))
    for i, room in enumerate(rooms[:LAYERS]):
        assert bytes_of(room.close()[:, :, :8].view(mx.uint8)) == items[i].tobytes()
    assert not mx.any(rooms[-1].bytes).item()


@CPU_ONLY
def test_in_another_thread_no_stream_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int) -> None:
        raise AssertionError("a stream was made")

    def work() -> None:
        done.extend(rooms_of(2))
        Room.open_beside(done, Ahead())

    done: list[Room] = []
    monkeypatch.setattr(rows, "beside", refuse)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result()
    assert len(done) == 2
    with pytest.raises(AssertionError, match="a stream was made"):  # as here
        Room.open_beside(rooms_of(1), Ahead())
