"""Windows: positions against a naive oracle, and rows of real layers on their way into blocks."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.models.cache import KVCache, RotatingKVCache

from mlx_promptcache.fingerprint import KVSettings
from mlx_promptcache.layers import capture, fill
from mlx_promptcache.window_rows import WindowRows, held, joined, latest, limited
from mlx_promptcache.windows import Span, Window, merged, widest

if TYPE_CHECKING:
    from collections.abc import Sequence

spans = st.lists(
    st.tuples(st.integers(0, 60), st.integers(0, 20)).map(lambda t: Span(t[0], t[0] + t[1])),
    max_size=6,
)
windows = st.tuples(st.integers(1, 30), st.integers(0, 29)).map(
    lambda t: Window(t[0], min(t[1], t[0] - 1))
)


def positions(some: Sequence[Span]) -> set[int]:
    return {p for span in some for p in range(*span)}


# Positions


@given(windows, st.integers(0, 100))
def test_a_window_holds_its_first_rows_and_the_last_ones(window: Window, n_past: int) -> None:
    expected = {
        p for p in range(n_past) if p < window.keep or p >= n_past - (window.size - window.keep)
    }
    if n_past <= window.size:
        expected = set(range(n_past))
    assert positions(window.spans(n_past)) == expected
    assert len(expected) == min(n_past, window.size)


@given(spans)
def test_merging_spans_changes_no_position_and_leaves_no_two_that_touch(some: list[Span]) -> None:
    whole = merged(some)
    assert positions(whole) == positions(some)
    assert all(a.stop < b.start for a, b in itertools.pairwise(whole))
    assert all(span.start < span.stop for span in whole)


@given(windows, spans, st.integers(0, 80), st.integers(1, 7))
def test_the_deepest_position_is_the_one_that_trying_all_finds(
    window: Window, some: list[Span], last: int, step: int
) -> None:
    there = positions(some)
    possible = [p for p in range(1, last + 1) if positions(window.spans(p)) <= there]
    assert window.deepest(some, last) == max(possible, default=0)
    on_steps = [p for p in possible if p % step == 0]
    assert window.deepest(some, last, lambda p: p - p % step) == max(on_steps, default=0)


@given(st.lists(windows, min_size=1, max_size=4), st.integers(0, 100))
def test_the_widest_window_holds_what_each_of_them_holds(some: list[Window], n_past: int) -> None:
    whole = positions(widest(some).spans(n_past))
    assert all(positions(window.spans(n_past)) <= whole for window in some)


# Rows of real layers: the row of position p is p everywhere


def feed(layers: list[Any], widths: Sequence[int]) -> int:
    """Feed passes of these widths; return how many tokens the layers hold."""
    for width in widths:
        offset = layers[0].offset
        row = mx.arange(offset, offset + width, dtype=mx.float32).reshape(1, 1, width, 1)
        for layer in layers:
            layer.update_and_fetch(
                mx.broadcast_to(row, (1, 2, width, 4)), mx.tile(row, (1, 2, 1, 4))
            )
    return int(layers[0].offset)


def numbers(array: mx.array) -> list[int]:
    return [int(p) for p in array[0, 0, :, 0].tolist()]  # type: ignore[union-attr, arg-type]


WAYS = [
    [2],
    [5],
    [16],
    [40],
    [5, 1, 1],
    [40, 1],
    [40, *[1] * 7],
    [40, *[1] * 40],
    [10, *[1] * 30],
    [30, *[1] * 5, 20],
    [30, *[1] * 5, 20, 1, 1],
    [*[1] * 50],
]


@pytest.mark.parametrize("keep", [0, 3])
@pytest.mark.parametrize("widths", WAYS, ids=str)
def test_a_window_is_taken_down_in_the_order_of_positions_and_goes_on_as_if_it_had_not_been(
    widths: list[int], keep: int
) -> None:
    live = [RotatingKVCache(16, keep=keep)]
    n_past = feed(live, widths)
    (content,) = capture(live, n_past)
    assert content.window == Window(16, keep)
    expected = [p for span in Window(16, keep).spans(n_past) for p in range(*span)]
    for name in ("keys", "values"):
        assert numbers(content.rows[name]) == expected
    for more in ([1], [1] * 20, [7], [1, 1, 30, 1], [40]):
        original, copy = [RotatingKVCache(16, keep=keep)], [RotatingKVCache(16, keep=keep)]
        feed(original, widths)
        fill(copy, [content], n_past, KVSettings())
        for width in more:
            row = mx.full((1, 2, width, 4), 7.0)
            for one, other in zip(original, copy, strict=True):
                a, b = one.update_and_fetch(row, row), other.update_and_fetch(row, row)
                assert mx.array_equal(a[0], b[0])
                assert mx.array_equal(a[1], b[1])


@pytest.mark.parametrize("count", [1, 4, 16, 30])
@pytest.mark.parametrize("widths", WAYS, ids=str)
def test_the_latest_rows_are_those_of_the_latest_positions(widths: list[int], count: int) -> None:
    layers = [RotatingKVCache(16), RotatingKVCache(9, keep=2), KVCache()]
    n_past = feed(layers, widths)
    rows = latest(layers, n_past, min(count, n_past))
    assert rows is not None
    assert rows.span.stop == n_past
    assert set(rows.rows) == {"0", "1"}  # the full layer is no window
    if widths[-1] > 1:  # the rows of a long pass are all there
        assert rows.span.start <= max(n_past - count, n_past - widths[-1])
    for named in rows.rows.values():
        for array in named.values():
            assert numbers(array) == list(range(*rows.span))


def test_a_model_without_windows_has_no_rows_of_windows() -> None:
    layers = [KVCache()]
    n_past = feed(layers, [5])
    assert latest(layers, n_past, 5) is None
    assert held(capture(layers, n_past), n_past) == []


def test_what_windows_hold_in_common_is_known_of_their_content() -> None:
    layers = [RotatingKVCache(16), RotatingKVCache(9)]
    n_past = feed(layers, [20, 1])
    (rows,) = held(capture(layers, n_past), n_past)
    assert rows.span == (12, 21)
    assert all(numbers(a) == list(range(12, 21)) for a in rows.arrays)


def some_rows(start: int, stop: int) -> WindowRows:
    row = mx.arange(start, stop, dtype=mx.float32).reshape(1, 1, -1, 1)
    return WindowRows(Span(start, stop), {"0": {"keys": row}})


@given(spans.map(lambda some: [s for s in some if s.start < s.stop]), st.data())
def test_rows_are_joined_from_as_early_as_they_are_known(some: list[Span], data: Any) -> None:
    begin = data.draw(st.integers(0, 60))
    end = data.draw(st.integers(begin + 1, 80))
    there, start = positions(some), end
    while start > begin and start - 1 in there:
        start -= 1
    rows = joined([some_rows(*span) for span in some], begin, end)
    if start == end:
        assert rows is None
        return
    assert rows is not None
    assert rows.span == (start, end)
    assert numbers(rows.rows["0"]["keys"]) == list(range(start, end))


def test_of_the_rows_that_have_passed_the_latest_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    passed = [some_rows(0, 10), some_rows(10, 20), some_rows(20, 30)]
    assert limited(passed) == passed
    monkeypatch.setattr("mlx_promptcache.window_rows.MOST_PASSED_BYTES", 2 * 10 * 4)
    assert limited(passed) == passed[1:]
    assert limited([]) == []
