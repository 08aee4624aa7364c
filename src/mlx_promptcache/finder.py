"""How much of a prompt is stored, and where: a walk through the names of files.

Reads headers only, and needs neither a model nor MLX.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from mlx_promptcache import catalog
from mlx_promptcache.errors import DamagedFile, PromptCacheError
from mlx_promptcache.fingerprint import PLAIN
from mlx_promptcache.passes import PassRecord, Plan
from mlx_promptcache.store import BLOCKS, SNAPSHOTS, Store
from mlx_promptcache.tree import (
    CELL,
    BlockName,
    Keys,
    SnapshotName,
    Step,
    agreeing,
    cell_end,
    cell_start,
    cut,
    longest_match,
    root_key,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mlx_promptcache.container import Header
    from mlx_promptcache.fingerprint import Fingerprint, KVSettings
    from mlx_promptcache.quarantine import Quarantine

LOGITS = "logits"
FOREIGN_SNAPSHOTS = 64  # how many files are looked into to explain a miss


class Found(NamedTuple):
    """A way to resume at `position`: from a snapshot, or from the rows of `steps` alone.

    `exact` if a whole state stands at the end of the prompt.
    """

    position: int
    steps: tuple[Step, ...]
    snapshot: str | None
    exact: bool
    phase: str


NOTHING = Found(0, (), None, False, PLAIN)


class Finder:
    """Finds the states of one fingerprint in one store."""

    def __init__(
        self, store: Store, fingerprint: Fingerprint, kv: KVSettings, bad: Quarantine
    ) -> None:
        self.store, self.fingerprint, self.kv, self.bad = store, fingerprint, kv, bad

    def root(self, phase: str) -> str:
        """The key of position 0 in a namespace."""
        return root_key(self.fingerprint.digest, phase)

    def find(
        self, tokens: Sequence[int], plan: Plan | None = None, limit: int | None = None
    ) -> Found:
        """The furthest way to resume these tokens.

        With `plan` only through rows that it would have computed; with `limit` at most there, which
        rules an exact hit out.
        """
        best = NOTHING
        for phase in self.kv.phases:
            found = self._find_in(phase, tokens, plan, limit)
            better = (found.position, found.exact) > (best.position, best.exact)
            if better and self.kv.phase_at(found.position) == phase:
                best = found
        return best

    def _find_in(
        self, phase: str, tokens: Sequence[int], plan: Plan | None, limit: int | None
    ) -> Found:
        keys = Keys(self.root(phase), tokens)
        walk = _Walk(self, keys, plan)
        steps = longest_match(walk.ways_on)
        reached = steps[-1].end if steps else 0
        if limit is None and reached == len(tokens):
            stem = self.snapshot_at(keys, reached, plan.lineages[reached] if plan else None)
            if stem is not None:
                return Found(reached, tuple(steps), stem, True, phase)
        last = min(reached, len(tokens) - 1 if limit is None else limit)
        if walk.complete:
            position = plan.cut(last) if plan else last
            return Found(position, tuple(cut(steps, position)), None, False, phase)
        for position, stem in self.snapshots(keys, last):
            header = self.header(stem)
            if header and (
                plan is None or header.notes.get("lineage") == plan.lineages.get(position)
            ):
                return Found(position, tuple(cut(steps, position)), stem, False, phase)
        return NOTHING

    def snapshots(self, keys: Keys, position: int) -> Iterator[tuple[int, str]]:
        """Snapshots of these tokens at or before a position, deepest first: one listing a cell."""
        start = cell_start(position)
        while start >= 0:
            yield from self._snapshots_in_cell(keys, start, position)
            start -= CELL

    def _snapshots_in_cell(self, keys: Keys, start: int, position: int) -> list[tuple[int, str]]:
        here = []
        for stem in self.store.beginning(SNAPSHOTS, f"{keys[start]}-"):
            name = SnapshotName.parse(stem)
            if name is not None and name.offset < CELL and stem not in self.bad:
                at = start + name.offset
                if 0 < at <= position and keys[at] == name.key:
                    here.append((at, stem))
        return sorted(here, reverse=True)

    def snapshot_at(self, keys: Keys, position: int, lineage: str | None = None) -> str | None:
        """A snapshot with logits at this very position; of this lineage, if one is given."""
        for at, stem in self._snapshots_in_cell(keys, cell_start(position), position):
            header = self.header(stem) if at == position else None
            if (
                header is not None
                and LOGITS in header.entries
                and lineage in {None, header.notes.get("lineage")}
                and all(self.store.exists(BLOCKS, ref[0]) for ref in header.content["refs"])
            ):
                return stem
        return None

    def header(self, stem: str) -> Header | None:
        """The header of a snapshot of this fingerprint; one that is damaged is set aside."""
        try:
            header = catalog.snapshot_header(self.store, stem)
        except PromptCacheError as exc:
            self.bad.set_aside(SNAPSHOTS, stem, exc)
            return None
        return header if header.content["fingerprint"] == self.fingerprint.digest else None

    def source(self, tokens: Sequence[int], found: Found) -> str | None:
        """The stem of the deepest snapshot on the way, if there is one."""
        if found.snapshot is not None:
            return found.snapshot
        keys = Keys(self.root(found.phase), tokens)
        return next((stem for _, stem in self.snapshots(keys, found.position)), None)

    def why_none(self, tokens: Sequence[int]) -> str:
        """Why nothing was found, from what there is of other fingerprints."""
        stems = self.store.stems(SNAPSHOTS)
        if not stems:
            return "nothing is stored yet"
        stems.sort(key=lambda stem: self.store.last_use(SNAPSHOTS, stem), reverse=True)
        reasons: Counter[str] = Counter()
        for stem in stems[:FOREIGN_SNAPSHOTS]:
            with contextlib.suppress(PromptCacheError):
                header = catalog.snapshot_header(self.store, stem)
                refs = header.content["refs"]
                first = BlockName.parse(refs[0][0]) if refs else None
                same = header.content["fingerprint"] == self.fingerprint.digest
                if not same and first is not None and first.first_token == tokens[0]:
                    reasons[self.fingerprint.explain(catalog.fingerprint_parts(header))] += 1
        if reasons:
            return f"what is stored of it was made with {reasons.most_common(1)[0][0]}"
        return "nothing that is stored begins as this prompt does"


class _Walk:
    """The ways on from each position of a prompt; remembers whether blocks are all there is."""

    def __init__(self, finder: Finder, keys: Keys, plan: Plan | None) -> None:
        self.finder, self.keys, self.plan = finder, keys, plan
        self.complete = True

    def ways_on(self, position: int) -> Iterator[Step]:
        """The blocks that begin at a position, each with as many rows as may be used."""
        store = self.finder.store
        wanted = list(self.keys.tokens[position : cell_end(position)])
        if not wanted:
            return
        whole = ""
        if len(wanted) == CELL:  # by name alone: the usual way through a long prefix
            whole = str(BlockName(self.keys[position], wanted[0], self.keys[position + CELL]))
            if store.exists(BLOCKS, whole):
                yield from self._step(whole, position, wanted)
        for stem in store.beginning(BLOCKS, f"{self.keys[position]}-{wanted[0]}-"):
            if stem != whole:
                yield from self._step(stem, position, wanted)

    def _step(self, stem: str, position: int, wanted: list[int]) -> Iterator[Step]:
        if stem in self.finder.bad:
            return
        try:
            header = catalog.block_header(self.finder.store, stem)
            rows = self._agreeing(header, position, wanted)
        except PromptCacheError as exc:
            self.finder.bad.set_aside(BLOCKS, stem, exc)
            return
        self.complete = self.complete and header.content.get("complete") is True
        if self.plan is not None:
            rows = self.plan.rows(record_of(header), position, rows)
        if rows:
            yield Step(stem, position, rows)

    def _agreeing(self, header: Header, position: int, wanted: list[int]) -> int:
        content = header.content
        rows = agreeing(content["tokens"], wanted)
        through = rows == len(content["tokens"])
        if content["start"] != position or (
            through and self.keys[position + rows] != content["end_key"]
        ):
            raise DamagedFile("it is not at the position where its name was found")
        return rows


def record_of(block: Header) -> PassRecord:
    """The passes that computed a block's rows."""
    start = block.content["start"]
    return PassRecord.from_json(
        block.notes.get("passes"), start, start + len(block.content["tokens"])
    )
