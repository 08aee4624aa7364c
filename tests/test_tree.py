"""Keys and the walk: what is found depends on tokens alone, and is all that there is to find."""

from __future__ import annotations

import hashlib
import itertools
import struct
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_promptcache.tree import (
    CELL,
    KEY_BYTES,
    BlockName,
    Keys,
    SnapshotName,
    Stretch,
    agreeing,
    cell_end,
    cell_start,
    cut,
    longest_match,
    pieces,
    root_key,
    shard,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

FIXED = settings(derandomize=True, deadline=None, max_examples=150)
ROOT = "0f" * KEY_BYTES
LONGEST = 3 * CELL

token_lists = st.lists(st.integers(0, (1 << 32) - 1), max_size=300)


# Cells and pieces


def test_a_cell_is_256_positions_wide() -> None:
    assert CELL == 256
    assert [(cell_start(p), cell_end(p)) for p in (0, 1, 255, 256, 511, 512)] == [
        (0, 256), (0, 256), (0, 256), (256, 512), (256, 512), (512, 768),
    ]  # fmt: skip


@FIXED
@given(st.integers(0, 2000), st.integers(0, 2000))
def test_pieces_cover_all_positions_once_and_cross_no_cell(begin: int, end: int) -> None:
    cuts = list(pieces(begin, end))
    assert [p for a, b in cuts for p in range(a, b)] == list(range(begin, end))
    assert all(a < b <= cell_end(a) for a, b in cuts)
    inner = [b for _, b in cuts[:-1]]
    assert inner == [p for p in range(begin + 1, end) if p % CELL == 0]


# Keys


def naive_key(root: str, tokens: Sequence[int], position: int) -> str:
    """K(position), as the definition says it, from the start."""
    key = root
    for g in range(0, position, CELL):
        part = tokens[g : min(g + CELL, position)]
        packed = b"".join(struct.pack("<I", token) for token in part)
        key = hashlib.blake2b(bytes.fromhex(key) + packed, digest_size=KEY_BYTES).hexdigest()
    return key


@FIXED
@given(token_lists, st.data())
def test_a_key_is_the_hash_that_the_definition_says(tokens: list[int], data: st.DataObject) -> None:
    tokens = tokens + [7] * data.draw(st.integers(0, 2 * CELL))
    keys = Keys(ROOT, tokens)
    edges = [p for p in (0, 1, CELL - 1, CELL, CELL + 1, 2 * CELL, len(tokens)) if p <= len(tokens)]
    for position in [data.draw(st.integers(0, len(tokens))), *reversed(edges)]:
        assert keys[position] == naive_key(ROOT, tokens, position)


@FIXED
@given(token_lists, token_lists)
def test_two_sequences_have_the_same_key_just_where_their_tokens_agree(
    one: list[int], other: list[int]
) -> None:
    other = one[: len(one) // 2] + other
    agreed = agreeing(one, other)
    for position in range(0, min(len(one), len(other)) + 1, 7):
        same = Keys(ROOT, one)[position] == Keys(ROOT, other)[position]
        assert same == (position <= agreed)


def test_the_key_of_a_position_does_not_depend_on_the_tokens_after_it() -> None:
    tokens = list(range(600))
    for position in (0, 10, 256, 300, 512, 600):
        assert Keys(ROOT, tokens[:position])[position] == Keys(ROOT, tokens)[position]


def test_no_two_positions_of_a_run_of_one_token_have_the_same_key() -> None:
    keys = Keys(ROOT, [5] * LONGEST)
    assert len({keys[p] for p in range(LONGEST + 1)}) == LONGEST + 1


def test_keys_are_pinned_as_files_are_named_by_them() -> None:
    keys = Keys(ROOT, range(1000))
    assert keys[0] == ROOT
    assert [keys[1], keys[256], keys[257], keys[1000]] == [
        "fb0f4ebde3a2c1c97ec8a62bf6af023f",
        "5d1b5f411c5b3b9632bef2b1e4b8bb25",
        "5965eac5c58a677f9aa8adca94aed108",
        "bd695957e16ab58d63b85f365a05c5bf",
    ]


def test_each_fingerprint_and_each_phase_has_a_root_of_its_own() -> None:
    assert root_key(ROOT) == ROOT
    assert root_key(ROOT, "quantised") == "a361b60dde8ca3be813cd7fe578b1d86"
    roots = {root_key(f, phase) for f in (ROOT, "ab" * KEY_BYTES) for phase in ("", "quantised")}
    assert len(roots) == 4
    assert all(len(root) == 2 * KEY_BYTES for root in roots)


# Names

hex_digits = st.text("0123456789abcdef", min_size=32, max_size=32)
short_hex = st.text("0123456789abcdef", min_size=16, max_size=16)


@FIXED
@given(hex_digits, st.integers(0, (1 << 32) - 1), hex_digits, short_hex | st.just(""))
def test_a_block_name_comes_back_from_its_stem(a: str, token: int, b: str, variant: str) -> None:
    name = BlockName(b[:2], a, token, b, variant)
    assert BlockName.parse(str(name)) == name
    assert str(name).count("-") == (3 if variant else 2)


@FIXED
@given(hex_digits, st.integers(0, CELL - 1), hex_digits, short_hex)
def test_a_snapshot_name_comes_back_from_its_stem(a: str, n: int, b: str, snapshot: str) -> None:
    name = SnapshotName(a, n, b, snapshot)
    assert SnapshotName.parse(str(name)) == name


A, B, V = "a" * 32, "b" * 32, "c" * 16
JUNK = [
    "", "/", "aa/", "-", "--", "---", "----", "block", f"aa/{A}-{B}", f"aa/{A}--{B}",
    f"aa/{A}-x-{B}", f"aa/{A}-1.5-{B}",
    f"aa/{A}--1-{B}", f"aa/{A}-1-{B}-{V}-{V}", f"aa/{A}- 1-{B}", f"aa/{A}-0x1-{B}", f"aa/{A}-1-",
    f"-1-{B}", f"aa/{A}-1-{B}-",
]  # fmt: skip
HOSTILE = {
    "no directory": f"{A}-1-{B}",
    "a directory up": f"../{A}-1-{B}",
    "a directory of three digits": f"aaa/{A}-1-{B}",
    "two directories": f"aa/aa/{A}-1-{B}",
    "a path up": f"../model-00001-{B}",
    "a weights file": "../model-00001-of-00002",
    "a path down": f"aa/{A}-1-{B}/x",
    "a key that is a path": f"aa/{A}-1-../../{B}",
    "a variant that is a path": f"aa/{A}-1-{B}-../../x",
    "an absolute path": f"/{A}-1-{B}",
    "a key that is too short": f"aa/{A[:-1]}-1-{B}",
    "a key that is too long": f"aa/{A}-1-{B}b",
    "a key that is not hexadecimal": f"aa/{'g' * 32}-1-{B}",
    "a key in capitals": f"aa/{A.upper()}-1-{B}",
    "digits of another script": f"aa/{A}-\u0661-{B}",
    "a zero before a number": f"aa/{A}-01-{B}",
    "a number that no number may be as long as": f"aa/{A}-{'1' * 5000}-{B}",
    "a line end": f"aa/{A}-1-{B}\n",
    "a NUL": f"aa/{A}-1-{B}\0",
}


@pytest.mark.parametrize("stem", JUNK)
def test_a_stem_that_is_no_name_is_none(stem: str) -> None:
    assert BlockName.parse(stem) is None
    assert SnapshotName.parse(stem) is None


@pytest.mark.parametrize("stem", HOSTILE.values(), ids=list(HOSTILE))
def test_a_stem_that_would_lead_out_of_the_store_is_none(stem: str) -> None:
    """Stems stand in snapshots, too, which may come from anywhere; files are deleted by them."""
    assert BlockName.parse(stem) is None
    assert SnapshotName.parse(stem) is None
    assert SnapshotName.parse(f"{stem}-{V}") is None


def test_names_that_are_what_they_should_be_are_taken() -> None:
    assert BlockName.parse(f"aa/{A}-1-{B}") == BlockName("aa", A, 1, B)
    assert BlockName.parse(f"aa/{A}-0-{B}-{V}") == BlockName("aa", A, 0, B, V)
    assert SnapshotName.parse(f"aa/{A}-255-{B}-{V}") == SnapshotName(A, 255, B, V)
    assert SnapshotName.parse(f"bb/{A}-255-{B}-{V}") is None  # the directory is that of its key


@pytest.mark.parametrize("parse", [BlockName.parse, SnapshotName.parse])
@FIXED
@given(
    stem=st.text("0a-\n/.", max_size=12)
    | st.from_regex(r"a{2}/[0-9a-f]{30,33}-\d{1,3}-[0-9a-f]{32}")
)
def test_a_stem_that_is_taken_is_the_only_one_for_its_name(
    parse: Callable[[str], object], stem: str
) -> None:
    name = parse(stem)
    assert name is None or str(name) == stem


# Agreement


@FIXED
@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)), st.integers(0, 20))
def test_agreeing_counts_the_tokens_before_the_first_difference(
    a: list[int], b: list[int], common: int
) -> None:
    a, b = [1] * common + a, [1] * common + b
    naive = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))))
    assert agreeing(a, b) == agreeing(b, a) == naive
    assert agreeing(tuple(a), tuple(b)) == naive


# The longest match, beside a naive oracle


class Blocks:
    """The blocks of a store, in memory: found by key and first token, as files are.

    `sequences` holds for each stem where the block begins, and all tokens up to its end.
    """

    def __init__(self) -> None:
        self.sequences: dict[str, tuple[int, list[int]]] = {}

    def add(self, tokens: Sequence[int], begin: int, end: int) -> None:
        """Write the rows `[begin, end)` of a sequence; the first writer of a name wins."""
        keys = Keys(ROOT, tokens)
        directory = shard(keys[cell_start(begin)])
        stem = str(BlockName(directory, keys[begin], tokens[begin], keys[end]))
        self.sequences.setdefault(stem, (begin, list(tokens[:end])))

    def held(self, stem: str) -> list[int]:
        """The tokens in a block."""
        begin, tokens = self.sequences[stem]
        return tokens[begin:]

    def walk(self, tokens: Sequence[int]) -> list[Stretch]:
        return longest_match(self.ways_on(tokens))

    def ways_on(self, tokens: Sequence[int]) -> Callable[[int], Iterator[Stretch]]:
        keys = Keys(ROOT, tokens)

        def ways_on(position: int) -> Iterator[Stretch]:
            wanted = tokens[position : cell_end(position)]
            if wanted:
                for stem in self.beginning(keys, position):
                    rows = agreeing(self.held(stem), wanted)
                    yield Stretch(stem, position, rows)
                    for k in range(1, rows):  # blocks may begin among these rows
                        if any(self.beginning(keys, position + k)):
                            yield Stretch(stem, position, k)

        return ways_on

    def beginning(self, keys: Keys, position: int) -> list[str]:
        """The blocks that begin at a position of the keys' tokens, with the next one of them."""
        directory, token = shard(keys[cell_start(position)]), keys.tokens[position]
        start = f"{directory}/{keys[position]}-{token}-"
        return sorted(stem for stem in self.sequences if stem.startswith(start))

    def furthest(self, query: Sequence[int]) -> int:
        """Where the longest chain of blocks ends, each cut anywhere. Knows nothing of keys."""
        found = {0}
        for begin, tokens in sorted(self.sequences.values()):
            agreed = agreeing(tokens, list(query))
            if begin in found and agreed > begin:
                found.update(range(begin + 1, agreed + 1))
        return max(found)

    def check(self, tokens: Sequence[int]) -> None:
        """The walk reaches as far as any chain does, by a path that may be gone."""
        path = self.walk(tokens)
        keys = Keys(ROOT, tokens)
        position = 0
        for step in path:
            held = self.held(step.stem)
            assert step.start == position
            assert f"/{keys[position]}-" in step.stem
            assert 0 < step.rows <= len(held)
            assert held[: step.rows] == list(tokens[position : step.end])
            assert step.end <= cell_end(position)
            position = step.end
        assert position == self.furthest(tokens)


@st.composite
def sequences(draw: st.DrawFn) -> list[int]:
    """A token sequence of a few long runs, which often begins as others do and crosses cells."""
    runs = draw(
        st.lists(
            st.tuples(
                st.integers(1, 2),
                st.integers(1, 12) | st.sampled_from([50, 200, 255, 256, 257, 300, 500]),
            ),
            min_size=1,
            max_size=5,
        )
    )
    return [token for token, count in runs for _ in range(count)][:LONGEST]


@st.composite
def families(draw: st.DrawFn) -> list[list[int]]:
    """Sequences that branch off from one another."""
    family = [draw(sequences())]
    for _ in range(draw(st.integers(1, 7))):
        trunk = draw(st.sampled_from(family))
        at = draw(st.integers(0, len(trunk)) | st.sampled_from([len(trunk), min(CELL, len(trunk))]))
        family.append((trunk[:at] + draw(sequences()))[:LONGEST])
    return family


def write(blocks: Blocks, tokens: Sequence[int], begin: int) -> None:
    for a, b in pieces(begin, len(tokens)):
        blocks.add(tokens, a, b)


@FIXED
@given(families(), st.data())
def test_the_walk_finds_all_that_writers_left_who_began_where_it_ended(
    family: list[list[int]], data: st.DataObject
) -> None:
    blocks = Blocks()
    waiting = list(family)
    while waiting:
        together = data.draw(st.integers(1, 3))  # writers that look before any of them writes
        writers, waiting = waiting[:together], waiting[together:]
        walks = [blocks.walk(tokens) for tokens in writers]
        for tokens, walk in zip(writers, walks, strict=True):
            write(blocks, tokens, walk[-1].end if walk else 0)
    for tokens in [*family, data.draw(sequences()), family[0][:-1]]:
        blocks.check(tokens)
    for tokens in family:
        assert sum(step.rows for step in blocks.walk(tokens)) == len(tokens)


@FIXED
@given(families(), st.data())
def test_the_walk_finds_all_that_can_be_reached_through_any_blocks(
    family: list[list[int]], data: st.DataObject
) -> None:
    """Writers that began earlier than a walk would have ended, and files that are lost."""
    blocks = Blocks()
    for tokens in family:
        walk = blocks.walk(tokens)
        reached = walk[-1].end if walk else 0
        write(blocks, tokens, data.draw(st.integers(max(0, reached - 20), reached)))
    for stem in sorted(blocks.sequences):
        if data.draw(st.integers(0, 5)) == 0:
            del blocks.sequences[stem]
    for tokens in [*family, data.draw(sequences())]:
        blocks.check(tokens)


def test_a_block_that_begins_inside_the_rows_of_another_is_found() -> None:
    """As when a prompt is generated from twice, and the second time more, or otherwise."""
    prompt, first, second = [1] * 60, [2] * 5, [2] * 5 + [3] * 300
    blocks = Blocks()
    write(blocks, prompt + first, 0)
    write(blocks, prompt + second, len(prompt))
    blocks.check([*prompt, *second, 4])
    assert sum(step.rows for step in blocks.walk([*prompt, *second, 4])) == 365


def test_each_position_that_is_reached_is_tried_and_not_only_the_furthest() -> None:
    blocks = Blocks()
    blocks.add([1] * 100, 0, 100)
    blocks.add([1] * 60 + [2] * 3, 0, 63)
    blocks.add([1] * 60 + [2] * 196 + [3] * 9, 63, 256)
    blocks.add([1] * 60 + [2] * 196 + [3] * 9, 256, 265)
    query = [1] * 60 + [2] * 196 + [3] * 5
    assert [(step.start, step.rows) for step in blocks.walk(query)] == [
        (0, 63), (63, 193), (256, 5),
    ]  # fmt: skip


def test_what_was_cut_otherwise_joins_again_at_the_next_cell() -> None:
    tokens = list(range(2 * CELL))
    blocks = Blocks()
    blocks.add(tokens, 0, 100)
    blocks.add(tokens, 100, CELL)
    blocks.add(tokens, CELL, 2 * CELL)
    blocks.add(tokens, 0, 200)
    blocks.add(tokens, 200, CELL)
    assert sum(step.rows for step in blocks.walk(tokens)) == 2 * CELL


def test_nothing_is_looked_up_inside_a_cell_whose_end_was_reached() -> None:
    tokens = [1] * LONGEST
    blocks = Blocks()
    write(blocks, tokens, 0)
    blocks.add(tokens, 0, 90)
    ways_on = blocks.ways_on(tokens)
    asked: list[int] = []

    for longest_first in (True, False):

        def counted(position: int, longest_first: bool = longest_first) -> list[Stretch]:
            asked.append(position)
            return sorted(ways_on(position), key=lambda way: way.rows, reverse=longest_first)

        assert [step.end for step in longest_match(counted)] == [CELL, 2 * CELL, 3 * CELL]
    assert [p for p in asked if p % CELL] == []


def test_an_empty_store_leads_nowhere() -> None:
    assert longest_match(lambda _: []) == []


# Cutting a path


@FIXED
@given(families(), st.data())
def test_a_path_that_is_cut_ends_where_it_was_cut(
    family: list[list[int]], data: st.DataObject
) -> None:
    blocks = Blocks()
    write(blocks, family[0], 0)
    path = blocks.walk(family[0])
    position = data.draw(st.integers(0, path[-1].end))
    shorter = cut(path, position)
    assert sum(step.rows for step in shorter) == position
    assert all(step.rows > 0 for step in shorter)
    assert [step.stem for step in shorter] == [step.stem for step in path[: len(shorter)]]
    assert cut(path, path[-1].end) == path
