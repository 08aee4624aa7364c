"""Keys, and the walk to the longest match. Pure: nothing here reads a file.

A key is the identity of a position of a token sequence. Positions are cut into cells of 256, on a
fixed grid; the key of a position is the hash of the key of its cell's start and the tokens from
there to it. So it depends on the tokens alone, not on how runs cut them, and what different runs
stored joins again at the next cell.

    K(0) = root                      the fingerprint
    K(p) = H(K(g), tokens[g:p])      for g < p <= g + 256, g a multiple of 256

The names of files carry the keys, and so the file system is a radix tree: from the key of a
position, the blocks whose names begin with it are the ways on.

    block     xx / K(a) - first token - K(b) [- variant]   rows [a, b) of one cell
    snapshot  xx / K(g) - (n - g) - K(n) - id

where `g` is the start of the cell, and `xx` the first two digits of `K(g)`: what a remote has of a
cell is in one directory. Where a store has its files says `layout.py`.
"""

from __future__ import annotations

import hashlib
import heapq
import re
import struct
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

CELL = 256
KEY_BYTES = 16
TOKEN_BYTES = 4
ID_DIGITS = 16  # of a snapshot's id, and of a variant

_NUMBER = r"(0|[1-9][0-9]{0,9})"
_BLOCK = re.compile(
    r"([0-9a-f]{2})/([0-9a-f]{32})-" + _NUMBER + r"-([0-9a-f]{32})(?:-([0-9a-f]{16}))?"
)
_SNAPSHOT = re.compile(
    r"([0-9a-f]{2})/([0-9a-f]{32})-" + _NUMBER + r"-([0-9a-f]{32})-([0-9a-f]{16})"
)


def cell_start(position: int) -> int:
    """The start of the cell that a position is in."""
    return position - position % CELL


def cell_end(position: int) -> int:
    """The end of the cell that a position is in."""
    return cell_start(position) + CELL


def shard(cell_key: str) -> str:
    """What the stems begin with of all that there is of a cell."""
    return cell_key[:2]


def root_key(fingerprint: str, phase: str = "") -> str:
    """The key of position 0: the fingerprint, or one of its own for each further namespace."""
    if not phase:
        return fingerprint
    text = bytes.fromhex(fingerprint) + phase.encode()
    return hashlib.blake2b(text, digest_size=KEY_BYTES, person=b"namespace").hexdigest()


class Keys:
    """The keys of the positions of one token sequence, computed as they are asked for."""

    def __init__(self, root: str, tokens: Sequence[int]) -> None:
        self.tokens = tokens
        self._cells = [root]
        self._packed = (0, b"")  # the start of a cell, and what is hashed to its end
        self._inside: dict[int, str] = {}  # those of positions inside a cell that were asked for

    def __getitem__(self, position: int) -> str:
        """The key of a position between 0 and `len(tokens)`."""
        if position in self._inside:
            return self._inside[position]
        start = cell_start(position)
        while len(self._cells) <= start // CELL:
            self._cells.append(_hash(self._pack((len(self._cells) - 1) * CELL)))
        if position == start:
            return self._cells[start // CELL]
        key = _hash(self._pack(start)[: KEY_BYTES + TOKEN_BYTES * (position - start)])
        self._inside[position] = key
        return key

    def _pack(self, start: int) -> bytes:
        """The key of the start of a cell, and the cell's tokens."""
        if self._packed[0] != start or not self._packed[1]:
            tokens = self.tokens[start : start + CELL]
            packed = struct.pack(f"<{len(tokens)}I", *tokens)
            self._packed = (start, bytes.fromhex(self._cells[start // CELL]) + packed)
        return self._packed[1]


def _hash(packed: bytes) -> str:
    return hashlib.blake2b(packed, digest_size=KEY_BYTES).hexdigest()


class BlockName(NamedTuple):
    """What a block's stem says; `shard` is that of its cell."""

    shard: str
    start_key: str
    first_token: int
    end_key: str
    variant: str = ""

    def __str__(self) -> str:
        stem = f"{self.shard}/{self.start_key}-{self.first_token}-{self.end_key}"
        return f"{stem}-{self.variant}" if self.variant else stem

    @classmethod
    def parse(cls, stem: str) -> BlockName | None:
        """The parts of a stem, or None if it is not a block's."""
        found = _BLOCK.fullmatch(stem)
        return found and cls(found[1], found[2], int(found[3]), found[4], found[5] or "")


class SnapshotName(NamedTuple):
    """What a snapshot's stem says."""

    cell_key: str
    offset: int
    key: str
    id: str

    def __str__(self) -> str:
        return f"{shard(self.cell_key)}/{self.cell_key}-{self.offset}-{self.key}-{self.id}"

    @classmethod
    def parse(cls, stem: str) -> SnapshotName | None:
        """The parts of a stem, or None if it is not a snapshot's."""
        found = _SNAPSHOT.fullmatch(stem)
        if found is None or found[1] != shard(found[2]):
            return None
        return cls(found[2], int(found[3]), found[4], found[5])


def id_of(stem: str) -> str:
    """The id of a snapshot, which ends its stem."""
    return stem.rpartition("-")[2]


class Stretch(NamedTuple):
    """Rows `[start, start + rows)`, taken from the first rows of one block."""

    stem: str
    start: int
    rows: int

    @property
    def end(self) -> int:
        """The position after the rows."""
        return self.start + self.rows


def longest_match(
    ways_on: Callable[[int], Iterable[Stretch]], goal: int | None = None
) -> list[Stretch]:
    """Return the steps from position 0 to the furthest position that can be reached, or to `goal`.

    `ways_on(p)` yields the steps that begin at `p`: of each block there, as many rows as may be
    used, at least one, and not beyond the end of the cell. Where several blocks agree in part,
    each position reached is tried, not only the furthest. A step to the end of its cell ends the
    search in that cell: every way on goes through there. A step to `goal`, beyond which there is
    none, ends it altogether.
    """
    came_by: dict[int, Stretch | None] = {0: None}
    waiting = [0]
    while waiting:
        position = heapq.heappop(waiting)
        for step in ways_on(position):
            if step.end not in came_by:
                came_by[step.end] = step
                heapq.heappush(waiting, step.end)
            if step.end == goal:
                return _path(came_by)
            if step.end == cell_end(position):
                waiting = [step.end]  # all that waits is in this cell: positions go up
                break
    return _path(came_by)


def _path(came_by: dict[int, Stretch | None]) -> list[Stretch]:
    steps: list[Stretch] = []
    step = came_by[max(came_by)]
    while step is not None:
        steps.append(step)
        step = came_by[step.start]
    return steps[::-1]


def cut(steps: Iterable[Stretch], position: int) -> list[Stretch]:
    """The part of a path that leads to `position`, which it must reach."""
    return [
        step._replace(rows=min(step.end, position) - step.start)
        for step in steps
        if step.start < position
    ]


def pieces(begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Cut `[begin, end)` at the cells' ends."""
    while begin < end:
        stop = min(cell_end(begin), end)
        yield begin, stop
        begin = stop


def agreeing(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens agree from the start on."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    return next(i for i in range(n) if a[i] != b[i])
