"""What stored states share: a tree of their prefixes, which forks where they part. Pure.

States that use the same first rows of the same block stand on the same branch. A block whose rows
two states use in part is cut where the shorter one ends, so that each row stands in the tree once.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mlx_promptcache.facts import Use

    Cuts = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Branch:
    """Positions `[start, end)`, which all states on this branch and beyond it have in common.

    `parent` is the index of the branch before it, -1 for none. `files` are the blocks whose rows
    begin here: the first rows of a block that is cut count for all of it. `states` are those that
    end here.
    """

    parent: int
    start: int
    end: int
    files: tuple[str, ...]
    states: tuple[str, ...]


class _Piece(NamedTuple):
    """Rows `[start, end)` of a block."""

    block: str
    start: int
    end: int


class _Node:
    """A place in the tree, with one piece of a block before it; the root has none."""

    def __init__(self, piece: _Piece | None = None) -> None:
        self.piece = piece
        self.states: list[str] = []
        self.ways_on: dict[_Piece, _Node] = {}

    @property
    def is_fork(self) -> bool:
        """Whether a branch ends here: a state does, or more ways than one lead on, or none."""
        return bool(self.states) or len(self.ways_on) != 1


def grow(paths: Mapping[str, Sequence[Use]]) -> list[Branch]:
    """The tree of these states, each with the rows that it uses, in order. A branch stands before
    those that begin at its end, and what begins at one place stands in the order of the states.
    """
    cuts = _cuts(paths)
    root = _Node()
    for state, uses in paths.items():
        node = root
        for piece in _pieces(uses, cuts):
            node = node.ways_on.setdefault(piece, _Node(piece))
        if node is not root:
            node.states.append(state)
    return _branches(root)


def _cuts(paths: Mapping[str, Sequence[Use]]) -> Cuts:
    """After how many rows of each block a state leaves it, or ends."""
    cuts: dict[str, set[int]] = defaultdict(set)
    for uses in paths.values():
        for use in uses:
            cuts[use.stem].add(use.rows)
    return {stem: sorted(rows) for stem, rows in cuts.items()}


def _pieces(uses: Sequence[Use], cuts: Cuts) -> Iterator[_Piece]:
    for use in uses:
        taken = 0
        for cut in cuts[use.stem]:
            if cut > use.rows:
                break
            yield _Piece(use.stem, use.start + taken, use.start + cut)
            taken = cut


def _branches(root: _Node) -> list[Branch]:
    found: list[Branch] = []
    begun: set[str] = set()
    waiting = [(-1, node) for node in reversed(root.ways_on.values())]
    while waiting:  # no recursion: a conversation of a thousand turns is a thousand deep
        parent, node = waiting.pop()
        pieces = [node.piece]
        while not node.is_fork:
            (node,) = node.ways_on.values()
            pieces.append(node.piece)
        taken = [piece for piece in pieces if piece is not None]
        files = dict.fromkeys(piece.block for piece in taken if piece.block not in begun)
        begun.update(files)
        states = tuple(node.states)
        found.append(Branch(parent, taken[0].start, taken[-1].end, tuple(files), states))
        waiting += [(len(found) - 1, way) for way in reversed(node.ways_on.values())]
    return found
