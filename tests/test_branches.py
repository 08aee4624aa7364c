"""The tree of prefixes, against one that is made row by row."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mlx_promptcache import branches
from mlx_promptcache.facts import Use

Path = list[Use]
Row = tuple[str, int]  # a block and a position


@st.composite
def paths(draw: st.DrawFn) -> dict[str, Path]:
    """States of a few short blocks each. A block's name says where it begins."""
    found: dict[str, Path] = {}
    for number in range(draw(st.integers(0, 7))):
        position, uses = 0, []
        for _ in range(draw(st.integers(1, 4))):
            which, rows = draw(st.sampled_from("ab")), draw(st.integers(1, 4))
            uses.append(Use(f"{position}{which}", "digest", position, rows))
            position += rows
        found[f"state {number}"] = uses
    return found


def rows_of(uses: Path) -> list[Row]:
    return [(use.stem, use.start + i) for use in uses for i in range(use.rows)]


def way_to(tree: list[branches.Branch], index: int) -> list[int]:
    """The branches from the root to one of them."""
    way = [index]
    while tree[way[-1]].parent >= 0:
        way.append(tree[way[-1]].parent)
    return way[::-1]


def common(one: list[Row], other: list[Row]) -> int:
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count


@given(paths())
def test_two_states_part_in_the_tree_where_their_rows_do(found: dict[str, Path]) -> None:
    tree = branches.grow(found)
    ends = {state: i for i, branch in enumerate(tree) for state in branch.states}
    assert sorted(ends) == sorted(found)
    for one in found:
        for other in found:
            ways = way_to(tree, ends[one]), way_to(tree, ends[other])
            shared = [a for a, b in zip(*ways, strict=False) if a == b]
            end = tree[shared[-1]].end if shared else 0
            assert end == common(rows_of(found[one]), rows_of(found[other]))


@given(paths())
def test_each_branch_goes_on_where_its_parent_ends_and_each_file_is_counted_once(
    found: dict[str, Path],
) -> None:
    tree = branches.grow(found)
    for index, branch in enumerate(tree):
        assert branch.parent < index
        assert branch.start == (tree[branch.parent].end if branch.parent >= 0 else 0) < branch.end
        ways_on = [other for other in tree if other.parent == index]
        assert branch.states or len(ways_on) > 1  # else it would be one branch with the next
    files = [file for branch in tree for file in branch.files]
    assert sorted(files) == sorted({use.stem for uses in found.values() for use in uses})


def test_a_block_that_is_used_in_part_is_cut_where_the_shorter_state_ends() -> None:
    whole = Use("a", "digest", 0, 10)
    found = {"long": [whole], "short": [whole._replace(rows=4), Use("b", "digest", 4, 2)]}
    assert branches.grow(found) == [
        branches.Branch(-1, 0, 4, ("a",), ()),
        branches.Branch(0, 4, 10, (), ("long",)),
        branches.Branch(0, 4, 6, ("b",), ("short",)),
    ]


def test_a_conversation_of_a_thousand_turns_is_no_matter() -> None:
    uses = [Use(str(i), "digest", i, 1) for i in range(1100)]  # deeper than Python recurs
    tree = branches.grow({str(n): uses[:n] for n in range(1, 1101)})
    assert len(tree) == 1100
    assert tree[-1].parent == 1098
