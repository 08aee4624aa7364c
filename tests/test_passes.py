"""Passes and lineages: rows count as the same bits only after the same forward calls."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_promptcache.passes import (
    UNKNOWN,
    Lineage,
    Pass,
    PassRecord,
    Plan,
    extended,
    next_end,
)

FIXED = settings(derandomize=True, deadline=None, max_examples=200)
ROOT = "root"


def run_of(ends: list[int], start: int = 0, lineage: str = ROOT) -> list[Pass]:
    """The passes of one run that began at `start` and ended its passes at `ends`."""
    passes = []
    for end in ends:
        passes.append(Pass(start, end, lineage))
        start, lineage = end, extended(lineage, start, end)
    return passes


def after(passes: list[Pass]) -> str:
    """The lineage at the end of a run."""
    last = passes[-1]
    return extended(last.lineage, last.start, last.end)


def edges(draw: st.DrawFn, last: int) -> list[int]:
    """Rising positions above 0, the last one given."""
    return [*sorted(draw(st.sets(st.integers(1, last - 1), max_size=6)) if last > 1 else []), last]


@st.composite
def runs(draw: st.DrawFn) -> list[Pass]:
    return run_of(edges(draw, draw(st.integers(1, 60))))


@st.composite
def cuts_of(draw: st.DrawFn, length: int) -> list[tuple[int, int]]:
    """`[0, length)` cut into blocks somehow."""
    ends = edges(draw, length)
    return list(zip([0, *ends], ends, strict=False))


def composed(passes: list[Pass], blocks: list[tuple[int, int]]) -> Lineage:
    """The lineage after blocks of one run, as a loader puts it together from their records."""
    lineage = Lineage(ROOT)
    for begin, end in blocks:
        lineage = lineage.along(PassRecord.of(passes, begin, end), begin, end)
    return lineage


# Where a pass ends


@FIXED
@given(
    st.integers(0, 99),
    st.integers(1, 100),
    st.sampled_from([1, 16, 32]),
    st.lists(st.integers(0, 120), max_size=4),
)
def test_a_pass_ends_at_the_first_position_where_it_must(
    position: int, more: int, step: int, boundaries: list[int]
) -> None:
    length = position + more
    wanted = next(
        p for p in itertools.count(position + 1) if p % step == 0 or p in boundaries or p == length
    )
    assert next_end(position, length, step, boundaries) == wanted


@FIXED
@given(st.integers(1, 100), st.lists(st.integers(0, 100), max_size=4), st.data())
def test_a_warm_run_cuts_where_a_cold_run_does(
    length: int, boundaries: list[int], data: st.DataObject
) -> None:
    def ends_from(position: int) -> list[int]:
        ends = []
        while position < length:
            position = next_end(position, length, 16, boundaries)
            ends.append(position)
        return ends

    cold = ends_from(0)
    resumed = data.draw(st.sampled_from([0, *cold]))
    assert ends_from(resumed) == [end for end in cold if end > resumed]


# Records


@FIXED
@given(runs(), st.data())
def test_a_record_keeps_just_the_passes_that_computed_its_rows(
    passes: list[Pass], data: st.DataObject
) -> None:
    begin, end = sorted(
        data.draw(
            st.lists(st.integers(0, passes[-1].end), min_size=2, max_size=2, unique=True),
        )
    )
    record = PassRecord.of(passes, begin, end)
    used = [p for p in passes if p.start < end and p.end > begin]
    assert record.passes == [(p.start, p.end) for p in used]
    assert record.lineage == used[0].lineage


@FIXED
@given(runs(), st.data())
def test_a_record_comes_back_from_json(passes: list[Pass], data: st.DataObject) -> None:
    begin = data.draw(st.integers(0, passes[-1].end - 1))
    end = data.draw(st.integers(begin + 1, passes[-1].end))
    record = PassRecord.of(passes, begin, end)
    text = json.dumps(record.to_json())
    assert PassRecord.from_json(json.loads(text), begin, end) == record


@pytest.mark.parametrize(("begin", "end"), [(0, 20), (5, 31), (0, 31), (40, 50), (9, 11)], ids=str)
def test_rows_that_the_passes_did_not_compute_are_of_unknown_lineage(begin: int, end: int) -> None:
    passes = run_of([20, 30], start=10)
    assert PassRecord.of(passes, begin, end) == PassRecord(begin, (end,), UNKNOWN)
    assert PassRecord.of([], begin, end).lineage == UNKNOWN


SOUND = {"start": 10, "ends": [20, 30], "lineage": "ab"}
NONSENSE: list[Any] = [
    None, [], {}, 7, "text", True,
    {**SOUND, "start": None}, {**SOUND, "start": "x"}, {**SOUND, "start": float("nan")},
    {**SOUND, "start": float("inf")}, {**SOUND, "start": 13}, {**SOUND, "start": "9" * 5000},
    {**SOUND, "ends": []}, {**SOUND, "ends": None}, {**SOUND, "ends": 30},
    {**SOUND, "ends": [30, 20]}, {**SOUND, "ends": [20, 20, 30]}, {**SOUND, "ends": [20]},
    {**SOUND, "ends": [10, 30]}, {**SOUND, "ends": ["x"]}, {**SOUND, "ends": [[30]]},
    {"start": 10, "ends": [20, 30]}, {"start": 10, "lineage": "ab"}, {"ends": [30], "lineage": "a"},
]  # fmt: skip


@pytest.mark.parametrize("value", NONSENSE, ids=lambda value: repr(value)[:40])
def test_a_record_that_makes_no_sense_is_of_unknown_lineage(value: Any) -> None:
    assert PassRecord.from_json(value, 12, 25) == PassRecord(12, (25,), UNKNOWN)


def test_a_record_that_makes_sense_is_taken() -> None:
    assert PassRecord.from_json(SOUND, 12, 25) == PassRecord(10, (20, 30), "ab")


@FIXED
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "start": st.integers(-5, 30) | st.none() | st.floats(),
            "ends": st.lists(st.integers(-5, 60), max_size=4) | st.text() | st.none(),
            "lineage": st.text() | st.none() | st.integers(),
        },
    )
)
def test_whatever_a_record_says_it_covers_its_rows(value: dict[str, Any]) -> None:
    record = PassRecord.from_json(value, 12, 25)
    assert record.start <= 12
    assert record.ends[-1] >= 25
    assert all(a < b for a, b in record.passes)
    assert record.passes[0][0] == record.start


# Lineages


@FIXED
@given(st.data())
def test_blocks_of_one_run_have_its_lineage_however_they_were_cut(data: st.DataObject) -> None:
    passes = data.draw(runs())
    length = passes[-1].end
    blocks = data.draw(cuts_of(length))
    assert composed(passes, blocks) == Lineage(after(passes))
    assert composed(passes, blocks).at(length) == after(passes)


@FIXED
@given(st.data())
def test_the_lineage_of_a_position_does_not_depend_on_how_blocks_were_cut(
    data: st.DataObject,
) -> None:
    passes = data.draw(runs())
    length = passes[-1].end
    position = data.draw(st.integers(1, length))
    lineages = set()
    for _ in range(2):
        blocks = [(a, min(b, position)) for a, b in data.draw(cuts_of(length)) if a < position]
        lineages.add(composed(passes, blocks).at(position))
    assert len(lineages) == 1
    held = [p for p in passes if p.end <= position]
    if held and held[-1].end == position:
        assert lineages == {after(held)}


@FIXED
@given(st.data())
def test_rows_that_are_left_out_of_a_block_do_not_count(data: st.DataObject) -> None:
    """A block of which only the first rows are used is a block that was cut there."""
    passes = data.draw(runs())
    length = passes[-1].end
    position = data.draw(st.integers(1, length))
    whole = PassRecord.of(passes, 0, length)
    short = PassRecord.of(passes, 0, position)
    used = Lineage(ROOT).along(whole, 0, position)
    assert used.at(position) == Lineage(ROOT).along(short, 0, position).at(position)


@FIXED
@given(runs(), runs(), st.data())
def test_other_passes_make_another_lineage(
    one: list[Pass], other: list[Pass], data: st.DataObject
) -> None:
    length = min(one[-1].end, other[-1].end)
    position = data.draw(st.integers(1, length))

    def history(passes: list[Pass]) -> list[tuple[int, int]]:
        return [(p.start, p.end) for p in passes if p.start < position]

    lineages = []
    for passes in (one, other):
        blocks = [(a, b) for a, b in data.draw(cuts_of(length)) if a < position]
        blocks[-1] = (blocks[-1][0], position)
        lineages.append(composed(passes, blocks).at(position))
    assert (lineages[0] == lineages[1]) == (history(one) == history(other))


def test_positions_inside_one_pass_have_lineages_of_their_own() -> None:
    passes = run_of([10, 30])
    lineages = {composed(passes, [(0, p)]).at(p) for p in range(1, 31)}
    assert len(lineages) == 30


@FIXED
@given(st.data())
def test_rows_of_two_runs_never_have_the_lineage_of_one(data: st.DataObject) -> None:
    """A second run resumed inside a pass of the first, or after other rows than it was told."""
    first = data.draw(runs())
    length = first[-1].end
    middle = data.draw(st.integers(1, length))
    held = Lineage(ROOT).along(PassRecord.of(first, 0, middle), 0, middle)
    begin_lineage = data.draw(st.sampled_from([held.at(middle), "another", UNKNOWN]))
    second = run_of([middle + 5, length + 9], start=middle, lineage=begin_lineage)
    joined = held.along(PassRecord.of(second, middle, length + 9), middle, length + 9)
    whole = run_of([*(p.end for p in first if p.end < length), length + 9])
    pure = {after(whole), after(second) if begin_lineage != held.at(middle) else ""}
    assert joined.at(length + 9) not in pure


@FIXED
@given(runs(), runs(), st.data())
def test_blocks_of_two_runs_have_the_lineage_of_one_just_where_their_passes_are_the_same(
    one: list[Pass], other: list[Pass], data: st.DataObject
) -> None:
    length = min(one[-1].end, other[-1].end)
    if data.draw(st.booleans()):  # runs that began alike
        shared = [p.end for p in one if p.end < length]
        other = run_of([*shared[: data.draw(st.integers(0, len(shared)))], length + 7])
    blocks = data.draw(cuts_of(length))
    mixed, same = Lineage(ROOT), True
    for begin, end in blocks:
        passes = data.draw(st.sampled_from([one, other]))
        mixed = mixed.along(PassRecord.of(passes, begin, end), begin, end)
        used = [(p.start, p.end) for p in passes if p.start < end]
        same = same and used == [(p.start, p.end) for p in one if p.start < end]
    assert (mixed.at(length) == composed(one, blocks).at(length)) == same


def test_the_same_rows_after_different_ones_have_different_lineages() -> None:
    foreign = PassRecord.of(run_of([20], start=10, lineage="another"), 10, 20)
    lineages = set()
    for ends in ([10], [4, 10], [12]):
        before = Lineage(ROOT).along(PassRecord.of(run_of(ends), 0, 10), 0, 10)
        lineages.add(before.along(foreign, 10, 20).at(20))
    assert len(lineages) == 3


def test_a_run_that_went_on_where_a_pass_ended_continues_its_lineage() -> None:
    first = run_of([16, 30])
    second = run_of([32, 40], start=30, lineage=after(first))
    held = Lineage(ROOT).along(PassRecord.of(first, 0, 30), 0, 30)
    assert held.along(PassRecord.of(second, 30, 40), 30, 40) == Lineage(after(second))


def test_rows_of_unknown_lineage_stay_apart_from_all_others() -> None:
    known = PassRecord.of(run_of([10, 20]), 0, 20)
    unknown = PassRecord.from_json(None, 0, 20)
    start = Lineage(ROOT)
    assert start.along(unknown, 0, 20).at(20) != start.along(known, 0, 20).at(20)
    assert Lineage("another").along(known, 0, 20).at(20) != start.along(known, 0, 20).at(20)
    later = PassRecord.of(run_of([10, 20]), 10, 20)
    assert start.along(PassRecord.from_json(None, 0, 10), 0, 10).along(later, 10, 20).at(
        20
    ) != start.along(known, 0, 20).at(20)


# What a cold run would compute


@FIXED
@given(st.data())
def test_rows_count_up_to_the_first_pass_that_a_cold_run_would_not_make(
    data: st.DataObject,
) -> None:
    """Beside a naive oracle: the histories of passes, compared as lists."""
    step = 16
    length = data.draw(st.integers(1, 60))
    boundaries = data.draw(st.lists(st.integers(1, 60), max_size=2))
    plan = Plan(ROOT, length, step, boundaries)

    stored = data.draw(st.integers(1, 60))
    if data.draw(st.booleans()):
        passes = data.draw(runs())
    else:  # a run of another length, which began as this one does
        ends, position = [], 0
        while position < stored:
            others = data.draw(st.sampled_from([boundaries, []]))
            position = next_end(position, stored, step, others)
            ends.append(position)
        passes = run_of(ends, lineage=data.draw(st.sampled_from([ROOT, ROOT, "other versions"])))

    begin = data.draw(st.integers(0, passes[-1].end - 1))
    end = data.draw(st.integers(begin + 1, passes[-1].end))
    rows = data.draw(st.integers(1, end - begin))

    cold, position = [], 0
    while position < length:
        cold.append((position, next_end(position, length, step, boundaries)))
        position = cold[-1][1]
    agreed = 0
    if passes[0].lineage == ROOT:
        for mine, theirs in zip(cold, passes, strict=False):
            if mine != (theirs.start, theirs.end):
                break
            agreed = mine[1]
    wanted = max(0, min(agreed, begin + rows) - begin)
    assert plan.rows(PassRecord.of(passes, begin, end), begin, rows) == wanted


def test_passes_that_ended_before_a_block_began_make_no_rows_of_it() -> None:
    plan = Plan(ROOT, 60, 16, [])
    assert plan.rows(PassRecord(0, (16, 40), ROOT), 20, 10) == 0
    assert plan.rows(PassRecord(0, (16, 32), ROOT), 20, 10) == 10


def test_rows_of_unknown_lineage_are_never_those_of_a_cold_run() -> None:
    plan = Plan(ROOT, 60, 16, [])
    assert plan.rows(PassRecord(0, (16,), ROOT), 0, 16) == 16
    assert plan.rows(PassRecord(0, (16,), UNKNOWN), 0, 16) == 0
    assert plan.rows(PassRecord.from_json(None, 16, 32), 16, 16) == 0


@FIXED
@given(st.integers(1, 100), st.lists(st.integers(1, 100), max_size=3), st.data())
def test_a_plan_is_cut_at_the_last_end_of_a_pass(
    length: int, boundaries: list[int], data: st.DataObject
) -> None:
    plan = Plan(ROOT, length, 16, boundaries)
    ends = {0, length, *range(16, length, 16), *(b for b in boundaries if b < length)}
    position = data.draw(st.integers(0, length))
    assert plan.cut(position) == max(end for end in ends if end <= position)
    assert plan.cut(length) == length


@FIXED
@given(st.integers(1, 100), st.lists(st.integers(1, 100), max_size=3))
def test_a_plan_knows_the_lineage_of_each_end(length: int, boundaries: list[int]) -> None:
    plan = Plan(ROOT, length, 16, boundaries)
    passes = run_of(sorted(plan.ends.values()))
    assert {p.start: p.end for p in passes} == plan.ends
    assert plan.lineages == {
        0: ROOT,
        **{p.end: extended(p.lineage, p.start, p.end) for p in passes},
    }
