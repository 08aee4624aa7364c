"""How much of a prompt is stored, and where: a walk through the names of files.

Reads headers only, and needs neither a model nor MLX.
"""

from __future__ import annotations

import contextlib
import heapq
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from mlx_promptcache import headers, layout
from mlx_promptcache.beginnings import Beginnings
from mlx_promptcache.errors import DamagedFile, PromptCacheError
from mlx_promptcache.files import SUFFIX
from mlx_promptcache.fingerprint import PLAIN
from mlx_promptcache.headers import LOGITS
from mlx_promptcache.passes import record_of
from mlx_promptcache.store import BLOCKS, SNAPSHOTS, Store
from mlx_promptcache.tree import (
    CELL,
    BlockName,
    Keys,
    SnapshotName,
    Stretch,
    agreeing,
    cell_end,
    cell_start,
    cut,
    longest_match,
    root_key,
    shard,
)
from mlx_promptcache.windows import Span, Window

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mlx_promptcache.container import Header
    from mlx_promptcache.fingerprint import Fingerprint, KVSettings
    from mlx_promptcache.passes import Plan
    from mlx_promptcache.quarantine import Quarantine

ID_AND_SUFFIX = len("-0123456789abcdef" + SUFFIX)  # at the end of the name of a snapshot's file
FOREIGN_SNAPSHOTS = 64  # how many files are looked into to explain a miss


class Found(NamedTuple):
    """A way to resume at `position`: from a snapshot, or from the rows of `steps` alone.

    `exact` if a whole state stands at the end of the prompt. `reached` is how many tokens of the
    prompt are stored: more than `position` where no layer can be resumed between snapshots.
    """

    position: int
    steps: tuple[Stretch, ...]
    snapshot: str | None
    exact: bool
    phase: str
    reached: int
    blocks: Mapping[str, Header]


NOTHING = Found(0, (), None, False, PLAIN, 0, {})


class Finder:
    """Finds the states of one fingerprint in one store."""

    def __init__(
        self, store: Store, fingerprint: Fingerprint, kv: KVSettings, bad: Quarantine
    ) -> None:
        self.store, self.fingerprint, self.kv, self.bad = store, fingerprint, kv, bad
        self.quantises = True
        """Whether the model has layers that are quantised where the settings ask for it."""

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
            better = (found.position, found.exact) > (best.position, best.exact) or not best.reached
            if better and self._phase_at(found.position) == phase:
                best = found
        return best

    def _phase_at(self, position: int) -> str:
        return self.kv.phase_at(position) if self.quantises else PLAIN

    def _find_in(
        self, phase: str, tokens: Sequence[int], plan: Plan | None, limit: int | None
    ) -> Found:
        keys = Keys(self.root(phase), tokens)
        walk = _Walk(self, keys, plan)
        steps = longest_match(walk.ways_on, goal=len(tokens))
        reached = steps[-1].end if steps else 0
        if limit is None and reached == len(tokens):
            lineage = plan.lineages[reached] if plan else None
            stem = self.snapshot_at(keys, reached, lineage, walk.digests)
            if stem is not None:
                return Found(reached, tuple(steps), stem, True, phase, reached, walk.through)
        last = max(0, min(reached, len(tokens) - 1 if limit is None else limit))
        position, stem = walk.deepest(steps, last), None
        if position < (plan.cut(last) if plan else last):
            position, stem = self._deeper_snapshot(keys, position, last, plan)
        path = tuple(cut(steps, position))
        return Found(position, path, stem, False, phase, reached, walk.through)

    def _deeper_snapshot(
        self, keys: Keys, position: int, last: int, plan: Plan | None
    ) -> tuple[int, str | None]:
        """The deepest snapshot at most at `last`, if it is not above `position`."""
        for at, stem in self.snapshots(keys, last):
            if at < position:
                break
            header = self.header(stem)
            if header and (plan is None or plan.lineages.get(at) == header.notes.get("lineage")):
                return at, stem
        return position, None

    def rows(self, tokens: Sequence[int], phase: str) -> list[tuple[Stretch, str]]:
        """The blocks that hold the rows of as many of these tokens as are stored, each with its
        digest, whether a model can go on from there or not.
        """
        walk = _Walk(self, Keys(self.root(phase), tokens), None)
        steps = longest_match(walk.ways_on, goal=len(tokens))
        return [(step, walk.digests[step.stem]) for step in steps]

    def snapshots(self, keys: Keys, position: int) -> Iterator[tuple[int, str]]:
        """Snapshots of these tokens at or before a position, deepest first, cell by cell."""
        start = cell_start(position)
        while start >= 0:
            yield from self._snapshots_in_cell(keys, start, position)
            start -= CELL

    def _snapshots_in_cell(self, keys: Keys, start: int, position: int) -> list[tuple[int, str]]:
        """Those of one cell at or before a position, deepest first. There may be thousands of
        others here: what they are called is compared before anything is parsed.
        """
        cell_key = keys[start]
        end = min(position + 1, start + CELL)
        *groups, once = layout.directories(SNAPSHOTS, f"{shard(cell_key)}/{cell_key}-")
        there = [*groups[: (end - 1 - start) // layout.NEIGHBOURS + 1], once]
        listed = [
            (directory, name)
            for directory, names in self.store.names_in_each(SNAPSHOTS, there).items()
            for name in names
            if name.startswith(cell_key)
        ]
        if not listed:
            return []
        wanted = {f"{cell_key}-{at - start}-{keys[at]}": at for at in range(max(1, start), end)}
        here = set()
        for directory, name in listed:
            if (at := wanted.get(name[:-ID_AND_SUFFIX])) is not None:
                stem = layout.stem(SNAPSHOTS, directory, name)
                if stem is not None and SnapshotName.parse(stem) and stem not in self.bad:
                    here.add((at, stem))
        return sorted(here, reverse=True)

    def snapshot_at(
        self, keys: Keys, position: int, lineage: str | None, digests: Mapping[str, str]
    ) -> str | None:
        """A snapshot with logits at this very position; of this lineage, if one is given.

        Its blocks are there, and are those that it was made with: `digests` are known already.
        """
        start = cell_start(position)
        cell_key = keys[start]
        name = f"{shard(cell_key)}/{cell_key}-{position - start}-{keys[position]}-"
        for stem in reversed(self.store.beginning(SNAPSHOTS, name)):
            header = None if stem in self.bad else self.header(stem)
            if (
                header is not None
                and LOGITS in header.entries
                and lineage in {None, header.notes.get("lineage")}
                and all(self.is_there(ref[0], ref[1], digests) for ref in header.content["refs"])
            ):
                return stem
        return None

    def is_there(self, stem: str, digest: str, digests: Mapping[str, str] | None = None) -> bool:
        """Whether a block is there, and has this digest; `digests` are known already."""
        try:
            known = (digests or {}).get(stem) or headers.block_header(self.store, stem).digest
        except PromptCacheError:
            return False
        return known == digest

    def header(self, stem: str) -> Header | None:
        """The header of a snapshot of this fingerprint; one that is damaged is set aside."""
        try:
            header = headers.snapshot_header(self.store, stem)
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
        files = self.store.files(SNAPSHOTS)
        if not files:
            return "nothing is stored yet"
        reasons: Counter[str] = Counter()
        for stem in heapq.nlargest(FOREIGN_SNAPSHOTS, files, lambda s: (files[s].last_use, s)):
            with contextlib.suppress(PromptCacheError):
                header = headers.snapshot_header(self.store, stem)
                refs = header.content["refs"]
                first = BlockName.parse(refs[0][0]) if refs else None
                same = header.content["fingerprint"] == self.fingerprint.digest
                if not same and first is not None and first.first_token == next(iter(tokens), None):
                    reasons[self.fingerprint.explain(headers.fingerprint_parts(header))] += 1
        if reasons:
            return f"what is stored of it was made with {reasons.most_common(1)[0][0]}"
        return "nothing that is stored begins as this prompt does"


class _Walk:
    """The ways on from each position of a prompt; remembers whether blocks are all there is."""

    def __init__(self, finder: Finder, keys: Keys, plan: Plan | None) -> None:
        self.finder, self.keys, self.plan = finder, keys, plan
        self._complete = True
        self._window: Window | None = None
        self._window_spans: dict[str, Span] = {}
        self.digests: dict[str, str] = {}
        self.through: dict[str, Header] = {}
        self._beginnings = Beginnings(finder.store, keys)

    def ways_on(self, position: int) -> Iterator[Stretch]:
        """The blocks that begin at a position, each with as many rows as may be used."""
        wanted = list(self.keys.tokens[position : cell_end(position)])
        if not wanted:
            return
        # By name alone: the usual way through a long prefix, and to the end of a prompt that is
        # stored. Then nothing is listed.
        end_key = self.keys[position + len(wanted)]
        whole = str(BlockName(self._shard(position), self.keys[position], wanted[0], end_key))
        if self.finder.store.exists(BLOCKS, whole):
            for step in self._step(whole, position, wanted):
                yield step
                yield from self._branches(step)  # where a plan allows a part of it only
        for stem in self._beginnings.at(position):
            if stem != whole:
                for step in self._step(stem, position, wanted):
                    yield step
                    yield from self._branches(step)

    def _shard(self, position: int) -> str:
        return shard(self.keys[cell_start(position)])

    def _branches(self, step: Stretch) -> Iterator[Stretch]:
        """Where blocks begin among the rows of a step: a run may have used a part of it only, and
        gone on with a row of its own for the next token.
        """
        for position in self._beginnings.among(step.start + 1, step.end):
            yield step._replace(rows=position - step.start)

    def _step(self, stem: str, position: int, wanted: list[int]) -> Iterator[Stretch]:
        if stem in self.finder.bad:
            return
        try:
            header = headers.block_header(self.finder.store, stem)
            rows = self._agreeing(header, position, wanted)
        except PromptCacheError as exc:
            self.finder.bad.set_aside(BLOCKS, stem, exc)
            return
        if self.plan is None and headers.window_span(header).start > position:
            stem, header = self._fullest(stem, header, position)
        self.digests[stem] = header.digest
        if rows == len(wanted):  # few are, of the thousands that may be walked by
            self.through[stem] = header
        self._complete = self._complete and header.content["complete"]
        if (window := header.content.get("window")) is not None:
            self._window = Window(window["size"], window["keep"])
            self._window_spans[stem] = headers.window_span(header)
        if self.plan is not None:
            rows = self.plan.rows(record_of(header), position, rows)
        if rows:
            yield Stretch(stem, position, rows)

    def _fullest(self, stem: str, header: Header, position: int) -> tuple[str, Header]:
        """The variant of a block that has the most rows of windows: the first writer may have had
        fewer than those who came later.
        """
        best = stem, header
        if header.content.get("window") is None:
            return best
        end = f"-{header.content['end_key']}"
        for other in [s for s in self._beginnings.at(position) if end in s and s != stem]:
            with contextlib.suppress(PromptCacheError):
                told = headers.block_header(self.finder.store, other)
                spans = headers.window_span(told), headers.window_span(best[1])
                if other not in self.finder.bad and spans[0].start < spans[1].start:
                    best = other, told
        return best

    def deepest(self, steps: Sequence[Stretch], last: int) -> int:
        """The deepest position, at most `last`, where the rows of these steps are all that there
        is of a state; 0 if there is none.
        """
        if not self._complete:
            return 0
        if self._window is None:
            return self.plan.cut(last) if self.plan else last
        if self._window.keep and self.plan is None:  # see `Blueprint.cuts_matter`
            return 0
        covered = []
        for step in steps:
            span = self._window_spans.get(step.stem, Span(step.end, step.end))
            covered.append(Span(max(step.start, span.start), min(step.end, span.stop)))
        return self._window.deepest(covered, last, self.plan.wide_cut if self.plan else None)

    def _agreeing(self, header: Header, position: int, wanted: list[int]) -> int:
        content = header.content
        rows = agreeing(content["tokens"], wanted)
        through = rows == len(content["tokens"])
        if content["start"] != position or (
            through and self.keys[position + rows] != content["end_key"]
        ):
            raise DamagedFile("it is not at the position where its name was found")
        if content["fingerprint"] != self.finder.fingerprint.digest:
            raise DamagedFile("it is a block of another model")
        return rows
