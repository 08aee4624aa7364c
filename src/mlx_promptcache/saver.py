"""From a state to files: the rows that are not stored yet, then the snapshot, then the name."""

from __future__ import annotations

import functools
import json
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace as replace_
from typing import TYPE_CHECKING, Any, NamedTuple

from mlx_promptcache import arithmetic, container, headers
from mlx_promptcache.parts import known_window_rows, split_rest, split_rows
from mlx_promptcache.passes import PassRecord
from mlx_promptcache.room import FILE_BYTES
from mlx_promptcache.state import Ref, State
from mlx_promptcache.store import BLOCKS
from mlx_promptcache.tree import (
    ID_DIGITS,
    BlockName,
    Keys,
    SnapshotName,
    cell_start,
    id_of,
    pieces,
    shard,
)
from mlx_promptcache.windows import Span, widest
from mlx_promptcache.writer import Saved, Writer, check_free

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from mlx_promptcache.container import Packed
    from mlx_promptcache.finder import Finder
    from mlx_promptcache.synced import Synced

REF_BYTES = 200  # of a block, where a snapshot refers to it
PACKERS = 2  # threads that compress blocks: compressing and hashing release the GIL
ARRAY_BYTES = 600  # of an array, beside its own bytes


def most_bytes(state: State, stored: int | None = None) -> int:
    """The most bytes on disk that saving a state may take: those of what no block has yet, as they
    are in memory, what is told of it, and some for each file.

    The rows of the first `stored` tokens stand in blocks; by default those that it came from.
    """
    n, refs = state.n_past, state.trail.refs
    if stored is None:
        stored = refs[-1].end if refs else 0
    rows = sum(layer.nbytes for layer in state.contents if layer.sliceable)
    rest = state.nbytes - rows + sum(passed.nbytes for passed in state.passed)
    for mark in state.marks:
        heads = (mark.logits, mark.embedding, mark.rng)
        rest += sum(layer.nbytes for layer in mark.layers)
        rest += sum(array.nbytes for array in heads if array is not None)
    snapshots, blocks = 1 + len(state.marks), len(list(pieces(stored, n)))
    told = _told_bytes(state) + (len(refs) + blocks) * REF_BYTES
    rest += told * snapshots + _json_bytes(state.origin.to_json())
    return rows * (n - stored) // max(1, n) + rest + (blocks + snapshots) * FILE_BYTES


def _told_bytes(state: State) -> int:
    """Of a snapshot's header what grows with the model's layers and with the sampling."""
    layers = [layer for layer in state.contents if not layer.sliceable]
    arrays = sum(len(layer.rows) + len(layer.arrays) for layer in layers)
    told = [state.sampling.to_json(), *(dict(layer.attributes or {}) for layer in layers)]
    return _json_bytes(told) + arrays * ARRAY_BYTES


def _json_bytes(value: Any) -> int:
    return len(json.dumps(json.dumps(value)))  # a header is JSON in JSON


class _Piece(NamedTuple):
    """A block that is being made: the positions of its rows, those of which it has the rows of
    windows, too, which passes computed them, and its file.
    """

    span: Span
    windows: Span
    record: PassRecord
    made: Future[Packed]


class Saver:
    """One save of one state.

    With `sync` everything is on the drive when it returns; what `synced` has is there already. With
    `exact` rows that are stored as other passes computed them are stored again, as this state's own
    passes did.
    """

    def __init__(
        self,
        finder: Finder,
        state: State,
        *,
        sync: bool,
        exact: bool,
        synced: Synced | None = None,
    ) -> None:
        self._finder, self._store = finder, finder.store
        self._state, self._sync, self._exact = state, sync, exact
        self._writer = Writer(finder.store, finder.bad, sync=sync, exact=exact, synced=synced)
        self._keys = Keys(finder.root(state.phase), state.tokens)
        self._window_rows = known_window_rows(state)
        self._spans: dict[str, Span] = {}

    def save(self, name: str | None, *, replace: bool = False, share: bool = False) -> Saved:
        """Write what is missing. The caller holds the shared lock.

        With `share` a snapshot of the same tokens serves, whatever its key and sampling.

        Raises:
            StoreError: the name is taken or cannot be one, or the file system refuses.
        """
        if name is not None and not replace:
            check_free(self._store, name, self._keys[self._state.n_past])
        state = self._state
        refs = self._rows()
        for earlier in (state.at(mark) for mark in state.marks if mark.position < state.n_past):
            if earlier.phase != state.phase:  # its rows were quantised since: they are others
                self._count(Saver(self._finder, earlier, sync=self._sync, exact=self._exact))
            elif self._snapshot_there(earlier, refs) is None:
                self._snapshot(earlier, refs)
        stem = self._snapshot_there(state, refs) if share else None
        if stem is None:
            stem = self._snapshot(state, refs)
        saved = self._writer.finish(name, stem, [ref.stem for ref in refs])
        return replace_(saved, refs=tuple(refs))

    def kept(self) -> Saved | None:
        """What there is if all of the state is stored already, for prompts to find; else None.

        The caller holds the shared lock.
        """
        state, refs = self._state, self._state.trail.refs
        if not refs or refs[-1].end < state.n_past:
            return None
        if not all(self._finder.is_there(ref.stem, ref.digest) for ref in refs):
            return None
        marks = [state.at(mark) for mark in state.marks if mark.position < state.n_past]
        if not all(self._snapshot_there(mark, list(refs)) for mark in marks):
            return None
        stem = self._snapshot_there(state, list(refs))
        return Saved(None, id_of(stem), 0, len(refs), 0, refs=refs) if stem else None

    def _count(self, other: Saver) -> None:
        saved = other.save(None, share=True)
        self._writer.written += saved.blocks_written
        self._writer.shared += saved.blocks_shared
        self._writer.bytes += saved.bytes_written
        self._writer.snapshots += saved.snapshots

    def _snapshot_there(self, state: State, refs: list[Ref]) -> str | None:
        lineage = state.lineage if self._exact else None
        digests = {ref.stem: ref.digest for ref in refs}
        return self._finder.snapshot_at(self._keys, state.n_past, lineage, digests)

    def _rows(self) -> list[Ref]:
        """Store the rows that no block has, and return the blocks of all rows."""
        state = self._state
        refs: list[Ref] = []
        for ref in state.trail.refs:
            # Deleted, replaced or damaged since: write these rows again.
            if not self._finder.is_there(ref.stem, ref.digest) or not self._writer.whole(
                BLOCKS, ref.stem
            ):
                break
            refs.append(ref)
        self._writer.shared += len(refs)
        spans: list[Span] = []
        for begin, end in pieces(refs[-1].end if refs else 0, state.n_past):
            while (stop := self._stored_piece(begin, end)) is not None:
                spans.append(Span(begin, stop))
                begin = stop
            if begin < end:
                spans.append(Span(begin, end))
        return [*refs, *self._blocks(spans)]

    def _blocks(self, spans: Sequence[Span]) -> Iterator[Ref]:
        """Store the rows of these positions, a block each. While one is compressed the rows of the
        next one are copied out of the layers; more than two would take too much memory.
        """
        with ThreadPoolExecutor(PACKERS) as pool:
            waiting: deque[_Piece] = deque()
            for span in spans:
                if len(waiting) == PACKERS:
                    yield self._written(waiting.popleft())
                waiting.append(self._piece(span, pool))
            while waiting:
                yield self._written(waiting.popleft())

    def _shard(self, position: int) -> str:
        return shard(self._keys[cell_start(position)])

    def _stored_piece(self, begin: int, end: int) -> int | None:
        """Where the longest stored block that begins at `begin`, and has no tokens but these, ends.

        An earlier save of the same sequence may have ended inside this cell: its rows are not
        written again.
        """
        keys, tokens = self._keys, self._state.tokens
        if begin >= end:
            return None
        stems = self._store.beginning(
            BLOCKS, f"{self._shard(begin)}/{keys[begin]}-{tokens[begin]}-"
        )
        if not stems:
            return None
        known = {keys[stop]: stop for stop in range(begin + 1, end)}
        names = [name for name in map(BlockName.parse, stems) if name is not None]
        return max((known[n.end_key] for n in names if n.end_key in known), default=None)

    def _piece(self, span: Span, pool: ThreadPoolExecutor) -> _Piece:
        """Copy rows out of the layers, and have a thread make the file of their block: of MLX it
        needs nothing but memory that nobody writes to.
        """
        state, keys, (begin, end) = self._state, self._keys, span
        arrays, stacks, window = split_rows(state, self._window_rows, begin, end)
        record = PassRecord.of(state.trail.passes, begin, end)
        content = {
            "fingerprint": self._finder.fingerprint.digest,
            "start": begin,
            "start_key": keys[begin],
            "end_key": keys[end],
            "tokens": list(state.tokens[begin:end]),
            "complete": not any(layer.opaque for layer in state.contents),
            "window": window,
            "stacks": stacks,
        }
        notes = self._notes() | {"passes": record.to_json()}
        pack = functools.partial(container.pack, headers.BLOCK, content, notes, arrays)
        windows = Span(end if window is None else window["from"], end)
        return _Piece(span, windows, record, _begun(pool, pack))

    def _written(self, piece: _Piece) -> Ref:
        keys, (begin, end) = self._keys, piece.span
        packed = piece.made.result()
        name = BlockName(self._shard(begin), keys[begin], self._state.tokens[begin], keys[end])
        stem = self._writer.block(name, packed, piece.record)
        self._spans[stem] = piece.windows
        return Ref(stem, packed.digest, begin, end - begin)

    def _snapshot(self, state: State, refs: list[Ref]) -> str:
        n, keys = state.n_past, self._keys
        in_blocks = self._windows_in_blocks(state, refs)
        arrays, rest = split_rest(state, windows=not in_blocks)
        content = {
            "fingerprint": self._finder.fingerprint.digest,
            "phase": state.phase,
            "n_past": n,
            "cell_key": keys[cell_start(n)],
            "key": keys[n],
            "refs": [
                [ref.stem, ref.digest, ref.start, min(ref.end, n) - ref.start]
                for ref in refs
                if ref.start < n
            ],
            **rest,
        }
        notes = self._notes() | {
            "lineage": state.lineage,
            "boundaries": [mark.position for mark in state.marks],
        }
        packed = container.pack(headers.SNAPSHOT, content, notes, arrays)
        name = str(
            SnapshotName(keys[cell_start(n)], n - cell_start(n), keys[n], packed.digest[:ID_DIGITS])
        )
        self._writer.snapshot(name, packed)
        return name

    def _windows_in_blocks(self, state: State, refs: Sequence[Ref]) -> bool:
        """Whether these blocks have all the rows that the windows of a state hold."""
        windows = [layer.window for layer in state.contents if layer.window is not None]
        if not windows:
            return True
        spans = [(self._window_span(ref.stem), ref.end) for ref in refs]
        covered = [Span(span.start, min(span.stop, end)) for span, end in spans]
        n = state.n_past
        return widest(windows).deepest(covered, n) == n

    def _window_span(self, stem: str) -> Span:
        """The positions for which a block has the rows of windows. What this save wrote it knows;
        other headers are read once, however many snapshots are taken on the way.
        """
        if stem not in self._spans:
            self._spans[stem] = headers.window_span(headers.block_header(self._store, stem))
        return self._spans[stem]

    def _notes(self) -> dict[str, Any]:
        return {
            "made": round(time.time(), 3),
            "fingerprint": dict(self._finder.fingerprint.parts),
            "versions": arithmetic.versions(),
            "seconds_per_token": round(self._state.trail.seconds_per_token, 6),
        }


def _begun(pool: ThreadPoolExecutor, pack: Callable[[], Packed]) -> Future[Packed]:
    """What a thread of the pool makes; or this one, where no more are to be had: states are also
    saved while a process ends, and where a user's threads are all in use.
    """
    try:
        return pool.submit(pack)
    except RuntimeError:
        made: Future[Packed] = Future()
        made.set_result(pack())
        return made
