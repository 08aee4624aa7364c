"""The prefixes that stored states share, as a tree. Needs neither a model nor MLX.

What is drawn is what is stored once. It is read off the names of blocks, which say the keys of
their ends: states whose keys agree at a position have all tokens before it in common. No block is
read for it, so that where a last token was computed again, or two writers cut a cell in different
ways, a fork may stand some tokens before the place where the tokens differ.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from mlx_promptcache.errors import PromptCacheError
from mlx_promptcache.tree import CELL, SnapshotName, cell_start

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from mlx_promptcache.catalog import Entry
    from mlx_promptcache.facts import Facts, Use

    Uses = Sequence[Use]
    Step = tuple[str, int]  # a block without its variant, and how many rows less than none
    Chain = tuple[Step, ...]


@dataclass
class Branch:
    """Tokens `[start, end)` that all states on it and beyond it share.

    `states` end on it, the first ones first; `branches` go on from its end. `blocks` are those that
    stand for its own tokens: one of which states use a part counts where it begins. `bytes` are
    those of these files and of the states on it, `hits` those of all states on it and beyond it.
    """

    start: int
    end: int
    states: list[Entry] = field(default_factory=list)
    branches: list[Branch] = field(default_factory=list)
    blocks: list[str] = field(default_factory=list)
    bytes: int = 0
    hits: int = 0


class _Path(NamedTuple):
    """The blocks of a state from the first token on, and all names that it has."""

    chain: Chain
    end: int
    entries: list[Entry]


def tree_of(facts: Facts, entries: Sequence[Entry]) -> tuple[list[Branch], list[Entry]]:
    """The tree of these states, its largest branches first; and those that have no place in it,
    because they cannot be read. A branch ends where a state does, or where states part.
    """
    uses = _uses(facts, entries)
    root = _grown(sorted(_paths(entries, uses), key=lambda path: (path.chain, path.end)))
    _place(root.branches, facts, uses)
    _count(root)
    return root.branches, [entry for entry in entries if entry.stem not in uses]


def join(branches: Iterable[Branch]) -> None:
    """Let what goes on without a fork be one branch, however many states end on it: a conversation
    is then one branch, and not as deep a tree as it has turns.
    """
    for branch, _ in walk(branches):
        while len(branch.branches) == 1:
            (only,) = branch.branches
            branch.end, branch.branches = only.end, only.branches
            branch.states += only.states
            branch.blocks += only.blocks
            branch.bytes += only.bytes


def walk(branches: Iterable[Branch]) -> Iterator[tuple[Branch, list[Branch]]]:
    """Each branch with those on the way to it, the first one first. Trees may be deep."""
    waiting: list[tuple[Branch, list[Branch]]] = [(b, []) for b in reversed(list(branches))]
    while waiting:
        branch, above = waiting.pop()
        yield branch, above
        waiting += [(below, [*above, branch]) for below in reversed(branch.branches)]


# Paths


def _uses(facts: Facts, entries: Iterable[Entry]) -> dict[str, Uses]:
    """The blocks of each state that can be read."""
    found: dict[str, Uses] = {}
    for entry in entries:
        with contextlib.suppress(PromptCacheError):
            found[entry.stem] = facts.snapshot(entry.stem).uses
    return found


def _paths(entries: Iterable[Entry], found: Mapping[str, Uses]) -> list[_Path]:
    named: dict[str, list[Entry]] = {}
    for entry in entries:
        named.setdefault(entry.stem, []).append(entry)
    blocks = {stem: _block(stem) for stem in {use.stem for uses in found.values() for use in uses}}
    cells = {stem: _cells(stem, uses, blocks) for stem, uses in found.items()}
    usual: dict[str, Chain] = {}  # how the cell that ends with a key is cut, whoever asks
    for chains in cells.values():
        for end_key, chain in chains:
            usual[end_key] = min(usual.get(end_key, chain), chain)
    return [
        _Path(
            tuple(step for end_key, chain in cells[stem] for step in usual.get(end_key, chain)),
            uses[-1].start + uses[-1].rows,
            named[stem],
        )
        for stem, uses in found.items()
    ]


def _block(stem: str) -> tuple[str, str]:
    """A block without its variant, and the key of its first position."""
    start, token, end = stem.split("-", 3)[:3]
    return f"{start}-{token}-{end}", start[len("3f/") :]


def _cells(stem: str, uses: Uses, blocks: Mapping[str, tuple[str, str]]) -> list[tuple[str, Chain]]:
    """The blocks of each cell, and the key of its end; an own key where a state ends within."""
    name = SnapshotName.parse(stem)
    chains: dict[int, list[Step]] = {}
    keys: dict[int, str] = {}
    for used, _, start, rows in uses:
        block, keys[start] = blocks[used]
        chains.setdefault(cell_start(start), []).append((block, -rows))
    end = uses[-1].start + uses[-1].rows
    keys[end] = name.key if name is not None and end % CELL == 0 else stem
    return [(keys.get(g + CELL, stem), tuple(chain)) for g, chain in chains.items()]


def _shared(a: Chain, b: Chain) -> int:
    """How many tokens two states share from the first one on."""
    shared = 0
    for (block, rows), (other, others) in zip(a, b, strict=False):
        if block != other:
            return shared
        shared -= max(rows, others)
    return shared


# Growing


def _grown(paths: Sequence[_Path]) -> Branch:
    """The tree of paths in order, which share most with their neighbours."""
    root = Branch(0, 0)
    on_the_way = [root]
    shares = [_shared(one.chain, other.chain) for one, other in pairwise(paths)]
    for path, shared in zip(paths, [0, *shares], strict=False):
        _fork(on_the_way, shared)
        top = on_the_way[-1]
        if path.end > top.end:
            on_the_way.append(Branch(top.end, path.end))
            top.branches.append(on_the_way[-1])
        on_the_way[-1].states += path.entries
    return root


def _fork(on_the_way: list[Branch], position: int) -> None:
    """Go back to a position, and fork the branch that leads over it."""
    last = None
    while on_the_way[-1].end > position:
        last = on_the_way.pop()
    top = on_the_way[-1]
    if top.end < position and last is not None:
        middle = Branch(top.end, position, branches=[last])
        last.start = position
        top.branches[-1] = middle
        on_the_way.append(middle)


# Counting


def _place(branches: Iterable[Branch], facts: Facts, uses: Mapping[str, Uses]) -> None:
    """Let each file stand on the branch on which it begins."""
    placed: set[str] = set()
    for branch, above in walk(branches):
        way = [branch, *reversed(above)]
        for stem in dict.fromkeys(state.stem for state in branch.states):
            branch.bytes += facts.snapshots[stem].size
            for use in uses[stem]:
                if use.stem not in placed and use.stem in facts.blocks:
                    placed.add(use.stem)
                    own = next(each for each in way if each.start <= use.start)
                    own.blocks.append(use.stem)
                    own.bytes += facts.blocks[use.stem].size


def _count(root: Branch) -> None:
    """Sum up hits from the ends on, and let the largest branches come first."""
    totals: dict[int, int] = {}
    for branch in reversed([branch for branch, _ in walk([root])]):
        own = {state.stem: state.hits for state in branch.states}
        branch.hits = sum(own.values()) + sum(below.hits for below in branch.branches)
        branch.branches.sort(key=lambda below: -totals[id(below)])
        totals[id(branch)] = branch.bytes + sum(totals[id(below)] for below in branch.branches)
