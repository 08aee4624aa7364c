"""What goes first when a store has to become smaller: a plan, made of what its files say.

States and blocks that no name needs go leaf first, so that what is left of a path can still be
used: a snapshot before the blocks that it stands on, a block before the one that it follows. Among
the leaves the one goes first that is worth least: the seconds that it saves, for each byte that it
takes in memory and each second since its last use (the rank of "hyperbolic" caches: A. Blankstein
et al., USENIX ATC 2017). All states of one model save the same for a byte of rows, so among these
the least recently used one goes first.
"""

from __future__ import annotations

import heapq
import time
from collections import defaultdict
from itertools import pairwise
from typing import TYPE_CHECKING

from mlx_promptcache import headers
from mlx_promptcache.deletion import Deletion
from mlx_promptcache.errors import DamagedFile, PromptCacheError
from mlx_promptcache.store import BLOCKS, SNAPSHOTS, TOKENIZERS
from mlx_promptcache.tree import BlockName

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from mlx_promptcache.facts import Block, Facts, Snapshot
    from mlx_promptcache.files import File

    Node = tuple[str, str]  # a kind and a stem

TOKENIZER_SECONDS = 1.0  # about what it takes to make one anew: see docs/log.md
UNKNOWN_SECONDS = 1e-3  # for a token, where nobody noted it
LEAST_IDLE_SECONDS = 1e-3


class Eviction:
    """One look at what may be evicted from a store. `kept` are stems that must stay, whatever they
    are worth. The caller holds a lock of the store.

    What has a name stays, with its blocks; so does what cannot be read for now, and files of other
    versions. While a state with a name cannot be read no block goes. Damaged files go first.
    """

    def __init__(self, facts: Facts, kept: Collection[str] = ()) -> None:
        self._facts, self._now = facts, time.time()
        named = {
            stem for stem in facts.store.names.all(certain=True).values() if stem in facts.snapshots
        }
        self._stays, named_known = _blocks_of(facts, named)
        self._all_known = named_known
        self._stays |= named | set(kept)
        self._blocks: dict[str, Block | None] = {}
        self._snapshots: dict[str, Snapshot | None] = {}
        self._look()
        paths = [s.uses for s in self._snapshots.values() if s is not None]
        if not named_known:  # then any block may belong to what has a name
            self._blocks = {}
        elif not self._all_known:  # then a block that no snapshot is known to use may be in use
            used = {use.stem for path in paths for use in path}
            self._blocks = {stem: b for stem, b in self._blocks.items() if stem in used}
        self._parents = self._edges()
        self._rates = self._seconds_per_token()

    def _look(self) -> None:
        facts = self._facts
        for stem in facts.snapshots.keys() - self._stays:
            try:
                self._snapshots[stem] = facts.snapshot(stem)
            except DamagedFile:
                self._snapshots[stem] = None
            except PromptCacheError:  # of another version, or not to be read for now
                self._all_known = False
        for stem in facts.blocks.keys() - self._stays:
            try:
                self._blocks[stem] = facts.block(stem)
            except DamagedFile:
                self._blocks[stem] = None
            except PromptCacheError:
                continue

    def _edges(self) -> dict[Node, set[Node]]:
        """What each file stands on: a snapshot on its blocks, a block on the one before.

        On all its blocks: the last alone would not hold the others where one between them stays
        for a name and is no part of this plan.
        """
        parents: dict[Node, set[Node]] = defaultdict(set)
        follows: set[str] = set()
        for stem, snapshot in self._snapshots.items():
            path = [use.stem for use in snapshot.uses] if snapshot is not None else []
            parents[SNAPSHOTS, stem].update((BLOCKS, use) for use in path)
            for before, after in pairwise(path):
                parents[BLOCKS, after].add((BLOCKS, before))
            follows.update(path)
        ends: dict[str, list[str]] = defaultdict(list)
        names = {stem: BlockName.parse(stem) for stem in self._blocks}
        for stem, name in names.items():
            if name is not None:
                ends[name.end_key].append(stem)
        for stem in self._blocks.keys() - follows:  # its snapshot is gone: the names still tell
            name = names[stem]
            for before in ends[name.start_key] if name is not None else ():
                parents[BLOCKS, stem].add((BLOCKS, before))
        return parents

    def _seconds_per_token(self) -> dict[str, float]:
        """How long a token took, by fingerprint."""
        noted: dict[str, list[float]] = defaultdict(list)
        for block in self._blocks.values():
            if block is not None and block.seconds_per_token > 0:
                noted[block.fingerprint].append(block.seconds_per_token)
        from statistics import median  # with fractions and decimals, which no start waits for

        return {fingerprint: median(rates) for fingerprint, rates in noted.items()}

    def plan(self, wanted_bytes: int) -> Deletion:
        """What to evict so that at least so many bytes on disk are freed, or as many as can be."""
        gone: dict[str, list[str]] = {SNAPSHOTS: [], BLOCKS: [], TOKENIZERS: []}
        freed = size = 0
        for kind, stem, file, on_disk in self.order():
            if freed >= wanted_bytes:
                break
            gone[kind].append(stem)
            freed += on_disk
            size += file.size
        return Deletion(
            snapshots=tuple(gone[SNAPSHOTS]),
            blocks=tuple(gone[BLOCKS]),
            tokenizers=tuple(gone[TOKENIZERS]),
            freed_bytes=size,
            freed_on_disk=freed,
        )

    def order(self) -> Iterator[tuple[str, str, File, int]]:
        """All that may be evicted, what goes first at the head: kinds, stems, files, and the bytes
        on disk that are free then. A directory goes with the last file in it.
        """
        store = self._facts.store
        left: dict[tuple[str, str], tuple[int, int]] = {}  # names in directories, their own bytes
        children: dict[Node, set[Node]] = defaultdict(set)
        nodes = [*((SNAPSHOTS, s) for s in self._snapshots), *((BLOCKS, b) for b in self._blocks)]
        nodes += [(TOKENIZERS, stem) for stem in self._facts.tokenizers.keys() - self._stays]
        for node in nodes:
            for parent in self._parents.get(node, ()):
                children[parent].add(node)
        leaves = [(self._rank(node), node) for node in nodes if not children[node]]
        heapq.heapify(leaves)
        there = set(nodes)
        while leaves:
            _, node = heapq.heappop(leaves)
            file, directory = self._file(node), (node[0], store.path(*node).parent.name)
            names, own = left.get(directory) or store.names_and_bytes(*directory)
            left[directory] = names - 1, own
            yield *node, file, file.on_disk + (own if names == 1 else 0)
            for parent in self._parents.get(node, ()):
                children[parent].discard(node)
                if not children[parent] and parent in there:
                    heapq.heappush(leaves, (self._rank(parent), parent))

    def _rank(self, node: Node) -> tuple[float, int]:
        """Least first: its worth; of the same path the deeper one."""
        idle = max(LEAST_IDLE_SECONDS, self._now - self._file(node).last_use)
        kind, stem = node
        if kind == TOKENIZERS:
            return TOKENIZER_SECONDS / max(1, self._file(node).size) / idle, 0
        block = self._blocks.get(stem) if kind == BLOCKS else None
        if block is not None:
            return self._worth_of_rows(block) / idle, -block.start
        snapshot = self._snapshots.get(stem) if kind == SNAPSHOTS else None
        if snapshot is None:
            return 0.0, 0
        last = self._facts_of_block(snapshot.uses[-1].stem) if snapshot.uses else None
        worth = 0.0 if last is None else self._worth_of_rows(last)
        if snapshot.whole and last is not None:
            seconds = self._rates.get(last.fingerprint, UNKNOWN_SECONDS) * snapshot.n_past
            worth = seconds / max(1, snapshot.raw_bytes)
        return worth / idle, -snapshot.n_past

    def _worth_of_rows(self, block: Block) -> float:
        """Seconds saved by a byte."""
        rate = self._rates.get(block.fingerprint, UNKNOWN_SECONDS)
        return rate / max(1, block.row_bytes)

    def _facts_of_block(self, stem: str) -> Block | None:
        try:
            return self._facts.block(stem)
        except PromptCacheError:
            return None

    def _file(self, node: Node) -> File:
        kind, stem = node
        facts = self._facts
        files = {SNAPSHOTS: facts.snapshots, BLOCKS: facts.blocks, TOKENIZERS: facts.tokenizers}
        return files[kind][stem]


def _blocks_of(facts: Facts, snapshots: Iterable[str]) -> tuple[set[str], bool]:
    """The blocks of these snapshots, and whether all of them are known.

    Their files are read, whatever is remembered: a named state must not depend on a memo.
    """
    blocks: set[str] = set()
    all_known = True
    for stem in snapshots:
        try:
            header = headers.snapshot_header(facts.store, stem)
        except DamagedFile:  # it needs nothing any more
            continue
        except PromptCacheError:
            all_known = False
        else:
            blocks.update(ref[0] for ref in header.content["refs"])
    return blocks, all_known
