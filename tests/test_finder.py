"""The finder: beside a naive oracle, all that any chain of stored blocks leads to is found."""

from __future__ import annotations

import hashlib
import tempfile
from typing import TYPE_CHECKING, NamedTuple
from unittest import mock

from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_promptcache import beginnings, container
from mlx_promptcache.finder import Finder
from mlx_promptcache.fingerprint import Fingerprint, KVSettings
from mlx_promptcache.passes import Pass, PassRecord, Plan, extended, next_end
from mlx_promptcache.quarantine import Quarantine
from mlx_promptcache.store import BLOCKS, Store
from mlx_promptcache.tree import (
    CELL,
    BlockName,
    Keys,
    agreeing,
    cell_start,
    pieces,
    shard,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

FIXED = settings(derandomize=True, deadline=None, max_examples=80)
FINGERPRINT = Fingerprint.of_text("a model")
STEP = CELL
VERSIONS = "versions"  # the lineage of position 0


class Written(NamedTuple):
    """A block that was written: where it begins, all tokens up to its end, its passes."""

    begin: int
    tokens: tuple[int, ...]
    record: PassRecord


class Shelf:
    """A store in a directory of its own, and what was written to it."""

    def __init__(self, directory: str) -> None:
        self.store = Store(directory)
        self.store.create()
        self.written: dict[str, Written] = {}

    @property
    def finder(self) -> Finder:
        return Finder(
            self.store, FINGERPRINT, KVSettings(), Quarantine(self.store, read_only=False)
        )

    def write(self, tokens: Sequence[int], begin: int, passes: Sequence[Pass]) -> None:
        """Write the rows `[begin, len(tokens))`, a variant where the name is taken."""
        keys = Keys(self.finder.root(""), tokens)
        for a, b in pieces(begin, len(tokens)):
            record = PassRecord.of(passes, a, b)
            content = {
                "fingerprint": FINGERPRINT.digest, "start": a, "start_key": keys[a],
                "end_key": keys[b], "tokens": list(tokens[a:b]), "complete": True, "stacks": {},
            }  # fmt: skip
            packed = container.pack("block", content, {"passes": record.to_json()}, {})
            name = BlockName(shard(keys[cell_start(a)]), keys[a], tokens[a], keys[b])
            variant = hashlib.sha256(str(record).encode()).hexdigest()[:16]
            for stem in (str(name), str(name._replace(variant=variant))):
                there = self.written.get(stem)
                if there is None:
                    assert self.store.write(BLOCKS, stem, packed)
                    self.written[stem] = Written(a, tuple(tokens[:b]), record)
                if there is None or there.record == record:
                    break

    def lose(self, stem: str) -> None:
        self.store.remove(BLOCKS, stem)
        del self.written[stem]

    def furthest(self, query: Sequence[int], plan: Plan | None = None) -> int:
        """Where the longest chain of blocks ends, each cut anywhere. Knows nothing of keys."""
        reached = {0}
        for begin, tokens, record in sorted(self.written.values()):
            rows = agreeing(tokens, tuple(query)) - begin
            if plan is not None and rows > 0:
                rows = plan.rows(record, begin, rows)
            if begin in reached and rows > 0:
                reached.update(range(begin + 1, begin + rows + 1))
        return max(reached)


@st.composite
def sequences(draw: st.DrawFn) -> list[int]:
    """A token sequence of a few long runs, which often begins as others do and crosses cells."""
    lengths = st.integers(1, 12) | st.sampled_from([50, 200, 255, 256, 257, 300])
    runs = draw(st.lists(st.tuples(st.sampled_from([1, 2, 17]), lengths), min_size=1, max_size=4))
    return [token for token, count in runs for _ in range(count)][: 3 * CELL]


@st.composite
def families(draw: st.DrawFn) -> list[list[int]]:
    """Sequences that branch off from one another."""
    family = [draw(sequences())]
    for _ in range(draw(st.integers(1, 5))):
        trunk = draw(st.sampled_from(family))
        at = draw(st.integers(0, len(trunk)) | st.just(len(trunk)))
        family.append((trunk[:at] + draw(sequences()))[: 3 * CELL])
    return family


def passes_of(length: int, boundaries: Sequence[int]) -> list[Pass]:
    passes, position, lineage = [], 0, VERSIONS
    while position < length:
        end = next_end(position, length, STEP, boundaries)
        passes.append(Pass(position, end, lineage))
        position, lineage = end, extended(lineage, position, end)
    return passes


@FIXED
@given(families(), st.data())
def test_all_that_any_blocks_lead_to_is_found(family: list[list[int]], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as directory:
        shelf = Shelf(directory)
        for tokens in family:
            reached = shelf.finder.find(tokens, limit=len(tokens)).position
            begin = data.draw(st.integers(max(0, reached - 20), reached))
            shelf.write(tokens, begin, passes_of(len(tokens), []))
        for stem in sorted(shelf.written):
            if data.draw(st.integers(0, 5)) == 0:
                shelf.lose(stem)
        for tokens in [*family, data.draw(sequences())]:
            found = shelf.finder.find(tokens, limit=len(tokens))
            assert found.position == shelf.furthest(tokens)
            assert sum(step.rows for step in found.steps) == found.position
            with mock.patch.object(beginnings, "MOST_LISTED", -1):  # as where there are too many
                assert shelf.finder.find(tokens, limit=len(tokens)).steps == found.steps


def test_an_exact_run_goes_on_inside_a_whole_block_of_which_it_takes_a_part(
    tmp_path: Path,
) -> None:
    tokens = [1] * 100 + [2] * 300
    shelf = Shelf(str(tmp_path))
    shelf.write(tokens[:CELL], 0, passes_of(CELL, [100, 180]))  # 100 rows are of the plan
    shelf.write(tokens, 60, passes_of(400, [100]))  # all are, and begin before these end
    plan = Plan(VERSIONS, 400, STEP, [100])
    assert shelf.finder.find(tokens, plan, limit=400).position == 400


@FIXED
@given(families(), st.data())
def test_an_exact_run_finds_all_that_its_own_passes_would_have_computed(
    family: list[list[int]], data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        shelf = Shelf(directory)
        boundaries = data.draw(st.lists(st.integers(1, 300), max_size=2))
        for tokens in family:
            own = [*boundaries, *data.draw(st.lists(st.integers(1, 300), max_size=1))]
            plan = Plan(VERSIONS, len(tokens), STEP, own)
            reached = shelf.finder.find(tokens, plan, limit=len(tokens)).position
            begin = data.draw(st.integers(max(0, reached - 60), reached))
            shelf.write(tokens, begin, passes_of(len(tokens), own))
        for tokens in family:
            own = data.draw(st.sampled_from([boundaries, []]))
            plan = Plan(VERSIONS, len(tokens), STEP, own)
            found = shelf.finder.find(tokens, plan, limit=len(tokens))
            assert found.position == plan.cut(shelf.furthest(tokens, plan))
