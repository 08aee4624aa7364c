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
    from collections.abc import Iterable, Iterator, Sequence

    from mlx_promptcache.catalog import Catalog, Entry
    from mlx_promptcache.facts import Facts, Use

    Step = tuple[str, int]  # a block without its variant, and how many rows less than none
    Chain = tuple[Step, ...]


@dataclass
class Branch:
    """Tokens `[start, end)` that all states on it and beyond it share, without a fork.

    `states` end on it, the first ones first; `branches` go on from its end. `bytes` are those of
    the files that stand for its own tokens, `hits` those of all states on it and beyond it.
    """

    start: int
    end: int
    states: list[Entry] = field(default_factory=list)
    branches: list[Branch] = field(default_factory=list)
    bytes: int = 0
    hits: int = 0


class _Path(NamedTuple):
    """The blocks of a state from the first token on, and all names that it has."""

    chain: Chain
    end: int
    uses: Sequence[Use]
    entries: list[Entry]


def tree_of(catalog: Catalog) -> tuple[list[Branch], list[Entry]]:
    """The tree of a store, its largest branches first; and the states that have no place in it,
    because they cannot be read.
    """
    entries = catalog.entries()
    paths, others = _paths(catalog.facts, entries)
    root = _grown(sorted(paths, key=lambda path: (path.chain, path.end)))
    _join(root)
    _count(root, catalog.facts, {id(e): path.uses for path in paths for e in path.entries})
    return root.branches, others


def walk(branches: Iterable[Branch]) -> Iterator[tuple[Branch, list[Branch]]]:
    """Each branch with those on the way to it, the first one first. Trees may be deep."""
    waiting: list[tuple[Branch, list[Branch]]] = [(b, []) for b in reversed(list(branches))]
    while waiting:
        branch, above = waiting.pop()
        yield branch, above
        waiting += [(below, [*above, branch]) for below in reversed(branch.branches)]


# Paths


def _paths(facts: Facts, entries: Sequence[Entry]) -> tuple[list[_Path], list[Entry]]:
    named: dict[str, list[Entry]] = {}
    for entry in entries:
        named.setdefault(entry.stem, []).append(entry)
    found: dict[str, tuple[Use, ...]] = {}
    for stem in named:
        with contextlib.suppress(PromptCacheError):
            found[stem] = facts.snapshot(stem).uses
    cells = {stem: _cells(stem, uses) for stem, uses in found.items()}
    usual: dict[str, Chain] = {}  # how the cell that ends with a key is cut, whoever asks
    for chains in cells.values():
        for end_key, chain in chains:
            usual[end_key] = min(usual.get(end_key, chain), chain)
    paths = [
        _Path(
            tuple(step for end_key, chain in cells[stem] for step in usual.get(end_key, chain)),
            uses[-1].start + uses[-1].rows,
            uses,
            named[stem],
        )
        for stem, uses in found.items()
    ]
    return paths, [entry for entry in entries if entry.stem not in found]


def _cells(stem: str, uses: Sequence[Use]) -> list[tuple[str, Chain]]:
    """The blocks of each cell, and the key of its end; an own key where a state ends within."""
    name = SnapshotName.parse(stem)
    chains: dict[int, list[Step]] = {}
    keys: dict[int, str] = {}
    for use in uses:
        block = use.stem.split("-", 3)
        chains.setdefault(cell_start(use.start), []).append(("-".join(block[:3]), -use.rows))
        keys[use.start] = block[0][len("3f/") :]
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


def _join(root: Branch) -> None:
    """Let what goes on without a fork be one branch."""
    for branch, _ in walk(root.branches):
        while len(branch.branches) == 1:
            (only,) = branch.branches
            branch.end, branch.branches = only.end, only.branches
            branch.states += only.states


def _count(root: Branch, facts: Facts, uses: dict[int, Sequence[Use]]) -> None:
    seen: set[str] = set()
    for branch, above in walk(root.branches):
        way = [*above, branch]
        for state in branch.states:
            for stem, start, size in _files(facts, state, uses[id(state)]):
                if stem not in seen:
                    seen.add(stem)
                    next(b for b in reversed(way) if b.start <= start).bytes += size
        hits = sum({state.stem: state.hits for state in branch.states}.values())
        for each in way:
            each.hits += hits
    for branch, _ in [(root, []), *walk(root.branches)]:
        branch.branches.sort(key=lambda b: -_bytes(b))


def _files(facts: Facts, state: Entry, uses: Sequence[Use]) -> Iterator[tuple[str, int, int]]:
    """The files of a state, where they begin, and their bytes."""
    for use in uses:
        if use.stem in facts.blocks:
            yield use.stem, use.start, facts.blocks[use.stem].size
    yield state.stem, state.tokens, facts.snapshots[state.stem].size


def _bytes(branch: Branch) -> int:
    return branch.bytes + sum(below.bytes for below, _ in walk(branch.branches))
