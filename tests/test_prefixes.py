"""The tree of shared prefixes: beside a naive oracle, and as it is drawn."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from known import model_of
from mlx_promptcache import PromptCache, Runner, cli
from mlx_promptcache.catalog import OK, Catalog, Entry
from mlx_promptcache.cli import drawing
from mlx_promptcache.facts import Facts, Snapshot, Use
from mlx_promptcache.prefixes import Branch, join, tree_of, walk
from mlx_promptcache.store import BLOCKS, SNAPSHOTS, Store
from mlx_promptcache.tree import agreeing
from tiny import random_tokens

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Row = tuple[str, int]  # a block and a position

SHARED = random_tokens(300, 1, 16)


def kept(directory: Path, prompts: Sequence[Sequence[int]]) -> Store:
    """A store in which each prompt is named by its number."""
    for number, tokens in enumerate(prompts):
        cache = PromptCache(directory, "smallest")
        state = Runner(model_of("smallest"), None, cache).prefill(list(tokens))
        cache.save(str(number), state, sync=False)
    return Store(directory)


def trees(store: Store) -> list[Branch]:
    """The tree of a store, as it is drawn."""
    catalog = Catalog(store)
    branches, others = tree_of(catalog.facts, catalog.entries())
    assert others == []
    join(branches)
    return branches


def shared_in(branches: Sequence[Branch]) -> dict[frozenset[str], int]:
    """How many tokens each two named states share, as a tree has it."""
    ways: dict[str, dict[int, int]] = {}
    for branch, above in walk(branches):
        for state in branch.states:
            way = {id(each): each.end for each in above} | {id(branch): state.tokens}
            ways[str(state.name)] = way
    return {
        frozenset((a, b)): max(
            (min(one[i], other[i]) for i in one.keys() & other.keys()), default=0
        )
        for a, one in ways.items()
        for b, other in ways.items()
        if a < b
    }


def leaving(tokens: Sequence[int], *lengths: int) -> list[list[int]]:
    """Prompts that leave this one after so many tokens, each with an end of its own."""
    return [[*tokens[:n], (tokens[n] + 1) % 16, 2 + i] for i, n in enumerate(lengths)]


def test_states_share_in_the_tree_what_their_tokens_have_in_common(tmp_path: Path) -> None:
    long = random_tokens(600, 2, 16)
    near = leaving(long, 1, 100, 255, 256, 257, 300, 512, 550)
    prompts = [long, *near, *leaving([*near[5], *long], 301, 350, 700), [*long, 1, 2]]
    found = shared_in(trees(kept(tmp_path, prompts)))
    for a, one in enumerate(prompts):
        for b, other in enumerate(prompts[:a]):
            assert found[frozenset((str(a), str(b)))] == agreeing(one, other)


def test_a_tree_never_claims_that_states_share_what_they_do_not(tmp_path: Path) -> None:
    """Last tokens that were computed again stand in blocks of their own."""
    prompts = [SHARED[:n] for n in (300, 40, 41, 256, 255, 1)]
    found = shared_in(trees(kept(tmp_path, prompts)))
    for a, one in enumerate(prompts):
        for b, other in enumerate(prompts[:a]):
            shared = found[frozenset((str(a), str(b)))]
            assert agreeing(one, other) - 2 <= shared <= agreeing(one, other)


def test_every_byte_of_a_store_stands_on_one_branch(tmp_path: Path) -> None:
    prompts = [[*SHARED, 1], [*SHARED, 2, 3], [*SHARED[:40], 9, 9], [9, *SHARED]]
    store = kept(tmp_path, prompts)
    branches = trees(store)
    on_disk = sum(store.size(kind, s) for kind in (BLOCKS, SNAPSHOTS) for s in store.stems(kind))
    assert sum(branch.bytes for branch, _ in walk(branches)) == on_disk
    assert all(branch.bytes for branch, _ in walk(branches))


def test_branches_follow_one_another_and_fork_or_end(tmp_path: Path) -> None:
    branches = trees(
        kept(tmp_path, [[*SHARED, 1], [*SHARED, 2, 3], [*SHARED[:40], 9, 9], [9, *SHARED]])
    )
    assert [branch.start for branch in branches] == [0, 0]
    for branch, above in walk(branches):
        assert branch.start == (above[-1].end if above else 0)
        assert branch.end > branch.start
        assert len(branch.branches) != 1
        ends = [state.tokens for state in branch.states]
        assert ends == sorted(ends)
        assert all(branch.start < end <= branch.end for end in ends)


def test_what_goes_on_without_a_fork_is_one_branch(tmp_path: Path) -> None:
    """A conversation of many turns is not a tree of that depth."""
    (branch,) = trees(kept(tmp_path, [SHARED[:n] for n in (40, 41, 256, 299, 300)]))
    assert [state.tokens for state in branch.states] == [40, 41, 256, 299, 300]
    assert (branch.start, branch.end, branch.branches) == (0, 300, [])


def test_cells_that_two_writers_cut_in_different_ways_are_the_same_cells(tmp_path: Path) -> None:
    long = [*SHARED, *SHARED]
    kept(tmp_path / "one", [long[:100], [*long, 1]])
    other = PromptCache(tmp_path / "two", "smallest")
    state = Runner(model_of("smallest"), None, other).prefill([*long, 2])
    other.save("other", state, sync=False)
    shutil.copytree(tmp_path / "two", tmp_path / "one", dirs_exist_ok=True)
    found = shared_in(trees(Store(tmp_path / "one")))
    assert found[frozenset(("1", "other"))] >= 512


def test_hits_are_those_of_all_states_on_a_branch_and_beyond(tmp_path: Path) -> None:
    store = kept(tmp_path, [[*SHARED, 1], [*SHARED, 2]])
    cache = PromptCache(tmp_path, "smallest")
    for name in ("0", "0", "1"):
        cache.load(name)
    (branch,) = trees(store)
    assert branch.hits == 3
    assert sorted(below.hits for below in branch.branches) == [1, 2]


def test_a_state_with_two_names_is_counted_once(tmp_path: Path) -> None:
    store = kept(tmp_path, [SHARED])
    (stem,) = store.stems(SNAPSHOTS)
    store.names.write("again", stem)
    PromptCache(tmp_path, "smallest").load("0")
    (branch,) = trees(store)
    assert [state.name for state in branch.states] == ["0", "again"]
    assert branch.hits == 1
    assert branch.bytes == Catalog(store).facts.total_bytes


def test_what_cannot_be_read_has_no_place_in_the_tree(tmp_path: Path) -> None:
    store = kept(tmp_path, [SHARED, [1, 2]])
    path = store.path(SNAPSHOTS, store.names.read("1"))
    path.write_bytes(b"")
    catalog = Catalog(store)
    branches, others = tree_of(catalog.facts, catalog.entries())
    assert [state.name for branch, _ in walk(branches) for state in branch.states] == ["0"]
    assert [(entry.name, entry.status) for entry in others] == [("1", "damaged")]


def test_states_of_other_models_are_trees_of_their_own(tmp_path: Path) -> None:
    kept(tmp_path, [SHARED])
    cache = PromptCache(tmp_path, "another")
    cache.save("theirs", Runner(model_of("smallest"), None, cache).prefill(SHARED), sync=False)
    assert len(trees(Store(tmp_path))) == 2


# Beside one that is made row by row


@st.composite
def paths(draw: st.DrawFn) -> dict[str, list[Use]]:
    """States of a few short blocks each. A block's name says where it begins."""
    found: dict[str, list[Use]] = {}
    for number in range(draw(st.integers(0, 7))):
        position, uses = 0, []
        for _ in range(draw(st.integers(1, 4))):
            which, rows = draw(st.sampled_from("ab")), draw(st.integers(1, 4))
            uses.append(Use(f"00/{position}{which}-0-end", "digest", position, rows))
            position += rows
        found[f"state {number}"] = uses
    return found


def tree_from(found: Mapping[str, Sequence[Use]]) -> list[Branch]:
    """The tree of states that are stored nowhere; each file has a byte."""
    file = SimpleNamespace(size=1)
    snapshots = {
        stem: Snapshot(uses[-1].start + uses[-1].rows, 0, 0.0, False, "{}", tuple(uses))
        for stem, uses in found.items()
    }
    facts = SimpleNamespace(
        snapshot=snapshots.__getitem__,
        snapshots=dict.fromkeys(snapshots, file),
        blocks={use.stem: file for uses in found.values() for use in uses},
    )
    entries = [
        Entry(None, stem, told.n_past, 0, 0, 0, 0.0, 0.0, 0, OK, None, stem)
        for stem, told in snapshots.items()
    ]
    return tree_of(cast("Facts", facts), entries)[0]


def common(one: Sequence[Use], other: Sequence[Use]) -> int:
    """How many rows two states have in common."""
    rows: list[list[Row]] = [
        [(use.stem, use.start + i) for use in uses for i in range(use.rows)]
        for uses in (one, other)
    ]
    return next(
        (i for i, (a, b) in enumerate(zip(*rows, strict=False)) if a != b), min(map(len, rows))
    )


@given(paths())
def test_two_states_part_in_the_tree_where_their_rows_do(found: dict[str, list[Use]]) -> None:
    ways = {
        state.stem: [*above, branch]
        for branch, above in walk(tree_from(found))
        for state in branch.states
    }
    assert sorted(ways) == sorted(found)
    for one in found:
        for other in found:
            shared = [a for a, b in zip(ways[one], ways[other], strict=False) if a is b]
            end = shared[-1].end if shared else 0
            assert end == common(found[one], found[other])


@given(paths())
def test_each_branch_goes_on_where_its_parent_ends_and_each_file_is_counted_once(
    found: dict[str, list[Use]],
) -> None:
    tree = tree_from(found)
    for branch, above in walk(tree):
        assert branch.start == (above[-1].end if above else 0) < branch.end
        assert branch.states or len(branch.branches) > 1  # else it would be one with the next
        assert all(state.tokens == branch.end for state in branch.states)
        assert branch.bytes == len(branch.blocks) + len(branch.states)
    stems = [stem for branch, _ in walk(tree) for stem in branch.blocks]
    assert sorted(stems) == sorted({use.stem for uses in found.values() for use in uses})


@given(paths())
def test_what_is_joined_has_the_same_states_and_files_on_fewer_branches(
    found: dict[str, list[Use]],
) -> None:
    tree, joined = tree_from(found), tree_from(found)
    join(joined)
    for each in ("states", "blocks"):
        one, other = (
            [x for b, _ in walk(some) for x in getattr(b, each)] for some in (tree, joined)
        )
        assert sorted(map(repr, one)) == sorted(map(repr, other))
    for branch, above in walk(joined):
        assert branch.start == (above[-1].end if above else 0) < branch.end
        assert len(branch.branches) != 1
        assert branch.bytes == len(branch.blocks) + len(branch.states)


def test_a_block_that_is_used_in_part_is_cut_where_the_shorter_state_ends() -> None:
    whole, more = Use("00/a-0-b", "digest", 0, 10), Use("00/c-0-d", "digest", 4, 2)
    tree = tree_from({"long": [whole], "short": [whole._replace(rows=4), more]})
    assert [
        (branch.start, branch.end, branch.blocks, [state.stem for state in branch.states])
        for branch, _ in walk(tree)
    ] == [
        (0, 4, [whole.stem], []),
        (4, 6, [more.stem], ["short"]),
        (4, 10, [], ["long"]),
    ]  # fmt: skip


def test_a_conversation_of_a_thousand_turns_is_no_matter() -> None:
    uses = [Use(f"00/{i}-0-end", "digest", i, 1) for i in range(1100)]  # deeper than Python recurs
    tree = tree_from({str(n): uses[:n] for n in range(1, 1101)})
    assert [len(above) for _, above in walk(tree)] == [*range(1100)]


# As it is shown


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return kept(tmp_path, [[*SHARED, 1], [*SHARED, 2, 3], [*SHARED[:40], 9, 9], [9, *SHARED]])


def run(store: Store, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    assert cli.run(["list", "--cache-dir", str(store.directory), "--tree", *more]) == 0
    return capsys.readouterr().out


def test_a_tree_is_drawn_with_tokens_on_edges_and_names_at_leaves(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = run(store, capsys).splitlines()
    assert lines[0].startswith("40 tokens")
    assert lines[1].startswith("├─ 260 tokens  ")
    assert [line[:6] for line in lines[2:4]] == ["│  ├─ ", "│  └─ "]
    assert {line[6:14] for line in lines[2:4]} == {"2 tokens", "1 token "}
    assert sorted(line[-3:] for line in lines[2:4]) == ["  0", "  1"]
    assert lines[4].startswith("└─ 2 tokens  ")
    assert lines[4].endswith("  0 hits  2")
    assert lines[-1].startswith("301 tokens")
    assert lines[-1].endswith("  3")


def test_a_terminal_without_such_signs_gets_plain_ones(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Old:
        encoding = "ascii"

    monkeypatch.setattr(sys, "stdout", Old)
    text = "\n".join(drawing.lines(trees(store)))
    assert text.isascii()
    assert "\n|- " in text
    assert "\n`- " in text


def test_a_tree_is_nested_in_json(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    told = json.loads(run(store, capsys, "--json"))
    (tree,) = told["trees"]
    assert told["others"] == []

    def names(branches: list[dict[str, Any]]) -> list[str]:
        return [
            name
            for branch in branches
            for name in (*(s["name"] for s in branch["states"]), *names(branch["branches"]))
        ]

    assert sorted(names(tree["branches"])) == ["0", "1", "2", "3"]
    largest = tree["branches"][0]
    assert (largest["from"], largest["to"], largest["tokens"]) == (0, 40, 40)
    assert [below["from"] for below in largest["branches"]] == [40, 40]


def test_a_deep_tree_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A conversation that is forked at every turn."""
    root = branch = Branch(0, 1)
    for depth in range(1, 3000):
        branch.branches = [Branch(depth, depth + 1), Branch(depth, depth + 2)]
        branch = branch.branches[0]
    nested = drawing.to_json([root])
    assert len(json.dumps(nested)) > 3000
    assert sum(1 for _ in walk([root])) == 2 * 2999 + 1


def test_an_empty_store_has_no_tree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(Store(tmp_path), capsys) == "nothing is stored\n"
