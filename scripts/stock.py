"""The files of a store, or of a place that machines share, by their names: no file is made.

Keys, names, the walk and what goes first are the program's own (`tree`, `eviction`); how a walk
looks at blocks and what a save writes are those of `finder` and `saver`, on names instead of
files. A test compares both with a real store.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from mlx_promptcache import facts, tree
from mlx_promptcache.eviction import Eviction
from mlx_promptcache.files import File
from mlx_promptcache.store import BLOCKS, SNAPSHOTS
from mlx_promptcache.tree import (
    BlockName,
    Keys,
    SnapshotName,
    Stretch,
    agreeing,
    cell_end,
    cell_start,
    longest_match,
    pieces,
    shard,
)

if TYPE_CHECKING:
    from array import array
    from collections.abc import Iterator, Sequence

SHARDS = 256
DRIVE_BYTES = 4096  # a drive gives whole pieces of this size


@dataclass(frozen=True)
class Sizes:
    """Bytes of files: `row` of a token's rows as stored, the rest of what stands beside them.

    Headers are those of 30 layers, as `scripts/scale` makes them: 1,736 bytes and 6 for each token
    of a block, 2,096 and 160 for each block of a snapshot.
    """

    row: float
    block: int = 1736
    token: int = 6
    snapshot: int = 2096 + 4 * (49_152 + 576)  # logits and embedding of SmolLM2, not compressed
    use: int = 160

    def of_block(self, rows: int) -> int:
        """A block of so many rows."""
        return self.block + round(rows * (self.row + self.token))

    def of_snapshot(self, blocks: int) -> int:
        """A snapshot that uses so many blocks, of a model whose layers are all in blocks."""
        return self.snapshot + self.use * blocks


class Block(NamedTuple):
    """A block: its name, the key of its cell, its first position, its tokens, its bytes, and what
    kind of machine computed it, for other kinds have other bits.
    """

    stem: str
    cell_key: str
    start_key: str
    end_key: str
    start: int
    tokens: array[int]
    size: int
    kind: int

    @property
    def way(self) -> tuple[str, int]:
        """From which key, and by which token, it leads on."""
        return self.start_key, self.tokens[0]


class Snapshot(NamedTuple):
    """A snapshot: its name, its position in the tokens, the blocks that it uses, and its bytes."""

    stem: str
    cell_key: str
    offset: int
    key: str
    position: int
    blocks: tuple[Block, ...]
    size: int


class Walk(NamedTuple):
    """How far a prompt is stored: the blocks on the way with the rows taken of each, the position
    to resume at, and the snapshot at the end of the prompt if a whole state stands there.
    """

    steps: tuple[tuple[Block, int], ...]
    position: int
    state: Snapshot | None = None

    @property
    def stems(self) -> list[str]:
        """The files that are used."""
        blocks = [block.stem for block, _ in self.steps]
        return blocks if self.state is None else [*blocks, self.state.stem]


@dataclass
class Stock:
    """Blocks and snapshots, by cell."""

    sizes: Sizes
    blocks: dict[str, Block] = field(default_factory=dict)
    snapshots: dict[str, Snapshot] = field(default_factory=dict)
    used: dict[str, float] = field(default_factory=dict)
    bytes: int = 0
    _cells: dict[str, dict[tuple[str, int], list[Block]]] = field(default_factory=dict)
    _starts: dict[str, Counter[int]] = field(default_factory=dict)  # where blocks of a cell begin
    _states: dict[str, dict[int, dict[str, Snapshot]]] = field(default_factory=dict)
    _names: dict[str, list[int]] = field(
        default_factory=lambda: {BLOCKS: [0] * SHARDS, SNAPSHOTS: [0] * SHARDS}
    )

    # What is there

    def names(self, kind: str, directory: str) -> int:
        """How many files are in a directory."""
        return self._names[kind][int(directory, 16)]

    def add(self, files: Sequence[Block | Snapshot], now: float) -> None:
        """Add files that may be there already."""
        for file in files:
            self.used[file.stem] = now
            if isinstance(file, Block):
                if file.stem in self.blocks:
                    continue
                self.blocks[file.stem] = file
                cell = self._cells.setdefault(file.cell_key, {})
                cell.setdefault(file.way, []).append(file)
                self._starts.setdefault(file.cell_key, Counter())[file.start] += 1
                self._count(BLOCKS, file, 1)
            elif file.stem not in self.snapshots:
                self.snapshots[file.stem] = file
                states = self._states.setdefault(file.cell_key, {})
                states.setdefault(file.offset, {})[file.key] = file
                self._count(SNAPSHOTS, file, 1)

    def _count(self, kind: str, file: Block | Snapshot, sign: int) -> None:
        self._names[kind][int(file.stem[:2], 16)] += sign
        self.bytes += sign * on_disk(file.size)

    def remove_block(self, stem: str) -> None:
        """Delete a block."""
        block = self.blocks.pop(stem)
        cell = self._cells[block.cell_key]
        cell[block.way].remove(block)
        if not cell[block.way]:
            del cell[block.way]
        self._starts[block.cell_key][block.start] -= 1
        if not self._starts[block.cell_key][block.start]:
            del self._starts[block.cell_key][block.start]
        if not cell:
            del self._cells[block.cell_key], self._starts[block.cell_key]
        self._count(BLOCKS, block, -1)
        del self.used[stem]

    def remove_snapshot(self, stem: str) -> None:
        """Delete a snapshot."""
        snapshot = self.snapshots.pop(stem)
        states = self._states[snapshot.cell_key]
        there = states[snapshot.offset]
        if there.get(snapshot.key) is snapshot:
            del there[snapshot.key]
        if not there:
            del states[snapshot.offset]
        if not states:
            del self._states[snapshot.cell_key]
        self._count(SNAPSHOTS, snapshot, -1)
        del self.used[stem]

    # Looking up

    def beginning(self, keys: Keys, position: int) -> list[Block]:
        """The blocks that begin at a position of a prompt, with the token there."""
        cell = self._cells.get(keys[cell_start(position)])
        if cell is None or position >= len(keys.tokens):
            return []
        return cell.get((keys[position], keys.tokens[position]), [])

    def state_at(self, keys: Keys, position: int) -> Snapshot | None:
        """The snapshot of all tokens before a position."""
        start = cell_start(position)
        there = self._states.get(keys[start], {}).get(position - start)
        return there.get(keys[position]) if there else None

    def deepest_state(self, keys: Keys) -> Snapshot | None:
        """The longest beginning of a prompt that a snapshot stands at."""
        last = len(keys.tokens)
        for start in range(cell_start(last), -1, -tree.CELL):
            offsets = self._states.get(keys[start], ())
            for offset in sorted(offsets, reverse=True):
                if start + offset <= last and (found := self.state_at(keys, start + offset)):
                    return found
        return None

    def walk(self, keys: Keys) -> Walk:
        """How far a prompt is stored, as `finder` walks through blocks in part, too."""
        n = len(keys.tokens)
        steps = longest_match(lambda position: self._ways_on(keys, position), goal=n)
        reached = steps[-1].end if steps else 0
        state = self.state_at(keys, n) if reached == n else None
        if state is not None and all(block.stem in self.blocks for block in state.blocks):
            return Walk(self._taken(steps, n), n, state)
        position = max(0, min(reached, n - 1))
        return Walk(self._taken(steps, position), position)

    def whole(self, keys: Keys) -> Walk:
        """How far whole blocks lead, as names alone tell; `supply` walks like this."""
        n = len(keys.tokens)
        steps = longest_match(lambda position: self._whole_ways_on(keys, position), goal=n)
        reached = steps[-1].end if steps else 0
        return Walk(self._taken(steps, reached), reached)

    def _taken(self, steps: list[Stretch], position: int) -> tuple[tuple[Block, int], ...]:
        cut = tree.cut(steps, position)
        return tuple((self.blocks[step.stem], step.rows) for step in cut)

    def _ways_on(self, keys: Keys, position: int) -> Iterator[Stretch]:
        here = self.beginning(keys, position)
        if not here:
            return
        wanted = keys.tokens[position : cell_end(position)]
        end_key = keys[position + len(wanted)]
        for block in sorted(here, key=lambda b: (b.end_key != end_key, b.stem)):
            rows = agreeing(block.tokens, wanted)
            yield Stretch(block.stem, position, rows)
            yield from self._branches(keys, Stretch(block.stem, position, rows))

    def _branches(self, keys: Keys, step: Stretch) -> Iterator[Stretch]:
        """Where other blocks begin among the rows of a step."""
        starts = self._starts[keys[cell_start(step.start)]]
        for position in sorted(at for at in starts if step.start < at < step.end):
            if self.beginning(keys, position):
                yield step._replace(rows=position - step.start)

    def _whole_ways_on(self, keys: Keys, position: int) -> Iterator[Stretch]:
        here = self.beginning(keys, position)
        last = min(cell_end(position), len(keys.tokens))
        found = [
            (position + len(block.tokens), block.stem)
            for block in here
            if position + len(block.tokens) <= last
            and keys[position + len(block.tokens)] == block.end_key
        ]
        for end, stem in sorted(found, reverse=True):
            yield Stretch(stem, position, end - position)

    # Adding

    def missing(self, keys: Keys, walk: Walk, end: int, kind: int) -> list[Block | Snapshot]:
        """What a save of the tokens before `end` adds after such a walk: blocks, and a snapshot.

        The rows begin where the walk ended; a shorter block of the same sequence is used again.
        """
        path = [block for block, _ in walk.steps]
        added: list[Block | Snapshot] = []
        for begin, stop in pieces(walk.position, end):
            for a, b in self._cuts(keys, begin, stop):
                there = [x for x in self.beginning(keys, a) if x.end_key == keys[b]]
                block = there[0] if there else self._block(keys, a, b, kind)
                path.append(block)
                if not there:
                    added.append(block)
        if self.state_at(keys, end) is None:
            added.append(self._snapshot(keys, end, path))
        return added

    def _cuts(self, keys: Keys, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """The pieces of rows in one cell, cut where stored blocks of the same tokens end."""
        while begin < end:
            known = (
                begin + len(block.tokens)
                for block in self.beginning(keys, begin)
                if begin + len(block.tokens) < end
                and keys[begin + len(block.tokens)] == block.end_key
            )
            stop = max(known, default=end)
            yield begin, stop
            begin = stop

    def _block(self, keys: Keys, begin: int, end: int, kind: int) -> Block:
        cell_key = keys[cell_start(begin)]
        name = BlockName(shard(cell_key), keys[begin], keys.tokens[begin], keys[end])
        tokens = cast("array[int]", keys.tokens[begin:end])
        stem, size = str(name), self.sizes.of_block(end - begin)
        return Block(stem, cell_key, keys[begin], keys[end], begin, tokens, size, kind)

    def _snapshot(self, keys: Keys, end: int, path: list[Block]) -> Snapshot:
        cell_key = keys[cell_start(end)]
        offset = end - cell_start(end)
        stem = str(SnapshotName(cell_key, offset, keys[end], "0" * 16))
        size = self.sizes.of_snapshot(len(path))
        return Snapshot(stem, cell_key, offset, keys[end], end, tuple(path), size)

    # Making room

    def evict(self, wanted_bytes: int, kept: Sequence[str], now: float) -> int:
        """Delete what the program would delete to free so many bytes; return how many it freed."""
        view = cast("facts.Facts", _Facts(self, now))
        plan = Eviction(view, kept).plan(wanted_bytes)
        for stem in plan.snapshots:
            self.remove_snapshot(stem)
        for stem in plan.blocks:
            self.remove_block(stem)
        return plan.freed_on_disk


def on_disk(size: int) -> int:
    """What a drive gives for a file."""
    return -(-size // DRIVE_BYTES) * DRIVE_BYTES


class _Facts:
    """What `Eviction` asks of a store, and of its names. There are none; all is of one model."""

    def __init__(self, stock: Stock, now: float) -> None:
        self._stock, self._shift = stock, time.time() - now
        self.snapshots = {stem: self._file(x) for stem, x in stock.snapshots.items()}
        self.blocks = {stem: self._file(x) for stem, x in stock.blocks.items()}
        self.tokenizers: dict[str, File] = {}
        self.store = self.names = self

    def all(self, *, certain: bool) -> dict[str, str]:
        """None."""
        del certain
        return {}

    def path(self, kind: str, stem: str) -> Path:
        """A place; there are no files."""
        return Path(kind, stem)

    def names_and_bytes(self, kind: str, directory: str) -> tuple[int, int]:
        """Nothing: only files are counted."""
        del kind, directory
        return 0, 0

    def _file(self, file: Any) -> File:
        used = self._stock.used[file.stem] + self._shift
        return File(file.size, 0, 0, 0, used, on_disk(file.size))

    def block(self, stem: str) -> facts.Block:
        """What the header of a block says."""
        start = self._stock.blocks[stem].start
        return facts.Block("", round(self._stock.sizes.row), start, 1.0, "one")

    def snapshot(self, stem: str) -> facts.Snapshot:
        """What the header of a snapshot says."""
        told = self._stock.snapshots[stem]
        uses = tuple(facts.Use(b.stem, "", b.start, len(b.tokens)) for b in told.blocks)
        return facts.Snapshot(told.position, told.size, 0.0, False, "one", uses)
