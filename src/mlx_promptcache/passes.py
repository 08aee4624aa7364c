"""Which forward calls computed which rows.

A *pass* is one forward call of the model over positions `[start, end)`. The bits of a row depend on
the width of the pass that computed it and on all rows before it, so two rows for the same tokens
are the same bits only if they, and all before them, came from the same passes. A *lineage* is the
hash of all passes up to a position. It lets `--exact` tell rows that this run would have computed
itself from rows that differ in the last bit.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from mlx_promptcache.container import Header

UNKNOWN = "unknown"
NO_END = 1 << 40  # beyond any prompt


class Pass(NamedTuple):
    """One forward call over `[start, end)`; `lineage` is that of the position where it began."""

    start: int
    end: int
    lineage: str


class Lineage(NamedTuple):
    """The lineage of a position; `inside` is the pass that went on beyond it, if one did."""

    digest: str
    inside: tuple[int, int] | None = None

    def at(self, position: int) -> str:
        """The lineage of `position` as text: a pass of which only a part is used counts as
        another pass.
        """
        return self.digest if self.inside is None else _hash(self.digest, *self.inside, position)

    def along(self, record: PassRecord, begin: int, end: int) -> Lineage:
        """The lineage after rows `[begin, end)` of a block were appended."""
        first = (record.start, record.ends[0])
        if record.lineage == self.digest and self.inside in {None, first}:
            digest = record.lineage
        else:
            digest = _hash("joined", self.at(begin), record.lineage, record.start)
        for start, stop in record.passes:
            if stop > end:
                return Lineage(digest, (start, stop) if start < end else None)
            digest = extended(digest, start, stop)
        return Lineage(digest)


class PassRecord(NamedTuple):
    """The passes that computed a block's rows, as the block's notes keep them.

    They follow one another: the first began at `start`, with the lineage `lineage`, and they end at
    `ends`. The first may have begun before the block, the last may end beyond it.
    """

    start: int
    ends: tuple[int, ...]
    lineage: str

    @property
    def passes(self) -> list[tuple[int, int]]:
        """Each pass as `(start, end)`."""
        return list(zip((self.start, *self.ends[:-1]), self.ends, strict=True))

    def to_json(self) -> dict[str, Any]:
        """The record as JSON."""
        return {"start": self.start, "ends": list(self.ends), "lineage": self.lineage}

    @classmethod
    def from_json(cls, value: Any, begin: int, end: int) -> PassRecord:
        """The record of a block of rows `[begin, end)`; of unknown lineage if it makes no sense."""
        try:
            record = cls(int(value["start"]), tuple(map(int, value["ends"])), str(value["lineage"]))
            edges = (record.start, *record.ends)
            rising = all(a < b for a, b in itertools.pairwise(edges))
        except (TypeError, KeyError, ValueError, OverflowError):
            rising = False
        if not rising or not record.ends or record.start > begin or record.ends[-1] < end:
            return cls(begin, (end,), UNKNOWN)
        return record

    @classmethod
    def of(cls, passes: Sequence[Pass], begin: int, end: int) -> PassRecord:
        """The record of rows `[begin, end)`, which these passes (or some of them) computed.

        From a pass on that did not begin with the lineage of the one before (a round of speculative
        decoding) they stand as one that no plan has: `NO_END`.
        """
        first = bisect.bisect_right(passes, begin, key=lambda p: p.end)
        last = bisect.bisect_left(passes, end, key=lambda p: p.start)
        used = passes[first:last]
        if not used or used[0].start > begin or used[-1].end < end:
            return cls(begin, (end,), UNKNOWN)
        ends = [used[0].end]
        for before, after in itertools.pairwise(used):
            if after.lineage != extended(before.lineage, before.start, before.end):
                ends.append(NO_END)
                break
            ends.append(after.end)
        return cls(used[0].start, tuple(ends), used[0].lineage)


def extended(lineage: str, start: int, end: int) -> str:
    """The lineage after one more pass."""
    return _hash(lineage, start, end)


def speculated(lineage: str, start: int, end: int) -> str:
    """The lineage before a pass over proposed tokens: unlike that before any other pass."""
    return _hash("speculated", lineage, start, end)


def next_end(position: int, length: int, step: int, boundaries: Iterable[int]) -> int:
    """Where a pass that begins at `position` of a prompt of `length` tokens ends.

    At the next multiple of `step`, the next boundary or the end of the prompt: absolute positions,
    so that warm runs cut where cold runs do.
    """
    grid = (position // step + 1) * step
    return min([grid, length, *(b for b in boundaries if b > position)])


class Plan:
    """The passes of a cold run over a prompt, and how much of a block they would have computed."""

    def __init__(self, root: str, length: int, step: int, boundaries: Sequence[int]) -> None:
        self.lineages = {0: root}
        self.ends: dict[int, int] = {}
        position = 0
        while position < length:
            end = next_end(position, length, step, boundaries)
            self.ends[position] = end
            self.lineages[end] = extended(self.lineages[position], position, end)
            position = end

    def rows(self, record: PassRecord, begin: int, rows: int) -> int:
        """How many of a block's first `rows` rows, from `begin` on, are bits of this plan."""
        if self.lineages.get(record.start) != record.lineage:
            return 0
        agreed = 0
        for start, end in record.passes:
            if self.ends.get(start) != end:
                break
            agreed = end - begin
        return max(0, min(agreed, rows))

    def cut(self, position: int) -> int:
        """The last end of a pass at or before `position`."""
        return max(end for end in self.lineages if end <= position)

    def wide_cut(self, position: int) -> int:
        """The last end, at or before `position`, of a pass of more than one token.

        A pass of one token leaves a window's ring in another order than its rows have.
        """
        wide = (end for start, end in self.ends.items() if end - start > 1 and end <= position)
        return max(wide, default=0)


def record_of(block: Header) -> PassRecord:
    """The passes that computed a block's rows."""
    start = block.content["start"]
    return PassRecord.from_json(
        block.notes.get("passes"), start, start + len(block.content["tokens"])
    )


def _hash(*parts: object) -> str:
    return hashlib.blake2b("|".join(map(str, parts)).encode(), digest_size=16).hexdigest()
