"""What lists tell of a store's files: read from each header once, and remembered by who looks.

Files are written once. So what a header said stands while the file's size, times and inode are what
they were, and a list of ten thousand states reads only what is new. The memo is this user's own,
may be lost or damaged at any time, and lists alone believe it: whatever restores or deletes a state
reads its files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from mlx_promptcache import container, headers, memo, places
from mlx_promptcache.container import UNREADABLE
from mlx_promptcache.errors import CacheMiss, PromptCacheError
from mlx_promptcache.files import SETTLED_NS
from mlx_promptcache.journal import Journal
from mlx_promptcache.store import BLOCKS, SNAPSHOTS, TOKENIZERS, Store
from mlx_promptcache.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from mlx_promptcache.container import Header, Packed
    from mlx_promptcache.files import File

    Stamp = tuple[int, ...]
    T = TypeVar("T")

FORMAT = 2  # of the memo
WORTH_KEEPING = 100  # headers: to read fewer takes less time than to write the memo


class Block(NamedTuple):
    """A block's digest, how many bytes one of its rows takes in memory, the position of the first,
    how long computing each took, and of which fingerprint they are.
    """

    digest: str
    row_bytes: int
    start: int
    seconds_per_token: float
    fingerprint: str


class Use(NamedTuple):
    """Rows `[start, start + rows)` of a snapshot: the first ones of a block with this digest."""

    stem: str
    digest: str
    start: int
    rows: int


class Snapshot(NamedTuple):
    """What a snapshot says of itself: `raw_bytes` of its own arrays, `made` in seconds since the
    epoch, `whole` if its layers can be resumed from it alone, `fingerprint` as the JSON of the
    parts.
    """

    n_past: int
    raw_bytes: int
    made: float
    whole: bool
    fingerprint: str
    uses: tuple[Use, ...]


class Facts:
    """One look at a store: its directories are listed once, and each header is read at most once,
    or not at all if `memo` or an `earlier` look knows it.

    The caller holds a lock of the store.
    """

    def __init__(
        self, store: Store, memo: Path | None = None, earlier: Facts | None = None
    ) -> None:
        self.store = store
        self.snapshots = store.files(SNAPSHOTS)
        self.blocks = store.files(BLOCKS)
        self.tokenizers = store.files(TOKENIZERS)
        self._memo, self._journal = memo, None if memo is None else _journal_of(memo)
        self._reads = 0
        self._known: _Known
        if earlier is not None:
            self._known = earlier._known
        else:
            self._known = _Known() if memo is None else _Known.load(memo)
            for noted in () if self._journal is None else self._journal.rows():
                with contextlib.suppress(*UNREADABLE):  # of another release, say
                    self._reads += self._known.take_noted(noted)  # as if they had been read
        self._wrong: dict[str, PromptCacheError] = {}

    @property
    def total_bytes(self) -> int:
        """Bytes of all snapshots, blocks and tokenizers."""
        kinds = (self.snapshots, self.blocks, self.tokenizers)
        return sum(file.size for files in kinds for file in files.values())

    def snapshot(self, stem: str) -> Snapshot:
        """What a snapshot says.

        Raises:
            CacheMiss: it is not there, or of another version; DamagedFile if it is damaged.
            StoreError: it cannot be read.
        """
        return self._fact(SNAPSHOTS, stem, self.snapshots, self._known.snapshots, _snapshot)

    def block(self, stem: str) -> Block:
        """What a block says. Raises as `snapshot` does."""
        return self._fact(BLOCKS, stem, self.blocks, self._known.blocks, _block)

    def _fact(
        self,
        kind: str,
        stem: str,
        files: dict[str, File],
        known: dict[str, tuple[Stamp, T]],
        tell: Callable[[Header, str], T],
    ) -> T:
        if stem not in files:
            raise CacheMiss("a file that is needed is not there")
        if stem in self._wrong:
            raise self._wrong[stem]
        there = known.get(stem)
        if there is not None and there[0] == files[stem].stamp:
            return there[1]
        try:
            fact, files[stem] = self._read(kind, stem, tell)
        except PromptCacheError as exc:
            self._wrong[stem] = exc
            raise
        known[stem] = (files[stem].stamp, fact)
        return fact

    def _read(self, kind: str, stem: str, tell: Callable[[Header, str], T]) -> tuple[T, File]:
        self._reads += 1
        with self.store.reader(kind, stem) as reader:
            fact = tell(reader.header(), stem)
        return fact, reader.file

    def read(self) -> None:
        """Read every header, for a later look to know it."""
        for stem in self.snapshots:
            with contextlib.suppress(PromptCacheError):
                self.snapshot(stem)
        for stem in self.blocks:
            with contextlib.suppress(PromptCacheError):
                self.block(stem)

    def keep(self) -> None:
        """Write the memo, if there is one and it is worth it. Failing is no matter."""
        if self._memo is None or self._journal is None or self._reads < WORTH_KEEPING:
            return
        before = time.time_ns() - SETTLED_NS
        for known, files in (
            (self._known.snapshots, self.snapshots),
            (self._known.blocks, self.blocks),
        ):
            for stem in list(known):
                if stem not in files or files[stem].ctime_ns > before:
                    del known[stem]
        self._known.save(self._memo)
        self._journal.clear()


def _snapshot(header: Header, stem: str) -> Snapshot:
    headers.checked_snapshot(header, stem)
    parts = json.dumps(headers.fingerprint_parts(header), sort_keys=True)
    made = headers.noted_number(header, "made")
    uses = tuple([Use(*ref) for ref in header.content["refs"]])
    whole = bool(header.content["opaque"]) or headers.has_window_rows(header)
    return Snapshot(header.content["n_past"], header.raw_bytes, made, whole, parts, uses)


def _block(header: Header, stem: str) -> Block:
    headers.checked_block(header, stem)
    content = header.content
    return Block(
        header.digest,
        header.raw_bytes // len(content["tokens"]),
        content["start"],
        headers.noted_number(header, "seconds_per_token"),
        content["fingerprint"],
    )


# The memo


def memo_of(store: Store) -> Path:
    """Where this user's memo of a store is, or would be."""
    name = hashlib.sha256(os.fsencode(store.directory.resolve())).hexdigest()[:32]
    return places.list_memos() / name


def forget(store: Store) -> None:
    """Delete this user's memo of a store, and its journal. Failing is no matter."""
    with contextlib.suppress(OSError):
        memo_of(store).unlink()
    _journal_of(memo_of(store)).forget()


class Noted:
    """Facts of files that are being written, for lists to come: what else would read them all?

    A file that changes within the same tick of the system's clock keeps its times, and whoever
    believes the memo would not notice: lists, and the choice of what is evicted first.
    """

    def __init__(self, store: Store) -> None:
        self._store, self._known = store, _Known()

    def add(self, kind: str, stem: str, packed: Packed) -> None:
        """Note the facts of a block or a snapshot that was written just now."""
        file, first = self._store.file(kind, stem), packed.chunks[0]
        if file is None:
            return
        with contextlib.suppress(PromptCacheError):
            header = container.read_header(
                lambda at, length: bytes(first[at : at + length]), packed.size
            )
            if kind == BLOCKS:
                self._known.blocks[stem] = (file.stamp, _block(header, stem))
            else:
                self._known.snapshots[stem] = (file.stamp, _snapshot(header, stem))

    def keep(self) -> None:
        """Write down what was noted. Failing is no matter."""
        if self._known.blocks or self._known.snapshots:
            with contextlib.suppress(PromptCacheError):  # this user may have no directory for it
                _journal_of(memo_of(self._store)).append([_version(), self._known.rows()])
            self._known = _Known()


def _journal_of(memo: Path) -> Journal:
    return Journal(memo.with_name(f"{memo.name}.new"))


class _Known:
    """What was read before, by stem, with the stamp of the file that it was read from."""

    def __init__(self) -> None:
        self.blocks: dict[str, tuple[Stamp, Block]] = {}
        self.snapshots: dict[str, tuple[Stamp, Snapshot]] = {}

    @classmethod
    def load(cls, path: Path) -> _Known:
        """Read a memo; an empty one if there is none, or it is damaged, or another version's."""
        known = cls()
        try:
            checksum, _, text = path.read_text("ascii").partition("\n")
            if checksum == _checksum(text):
                known.take(json.loads(text))
        except (OSError, *UNREADABLE):
            return cls()
        return known

    def take_noted(self, row: Any) -> int:
        """Take what a writer noted, and return of how many files that is; none if it was noted by
        another version.
        """
        version, rows = row
        return self.take(rows) if version == _version() else 0

    def take(self, rows: dict[str, Any]) -> int:
        """Take what `rows` gave, and return of how many files that is."""
        parts, used = rows["fingerprints"], rows["used"]
        for stem, *stamp, digest, row_bytes, start, seconds, fingerprint in rows["blocks"]:
            block = Block(digest, row_bytes, start, seconds, parts[fingerprint])
            self.blocks[stem] = (tuple(stamp), block)
        for stem, *stamp, n_past, raw, made, whole, fingerprint, refs, counts in rows["snapshots"]:
            uses = _uses([used[i] for i in refs], counts)
            snapshot = Snapshot(n_past, raw, made, whole, parts[fingerprint], uses)
            self.snapshots[stem] = (tuple(stamp), snapshot)
        return len(rows["blocks"]) + len(rows["snapshots"])

    def save(self, path: Path) -> None:
        """Write the memo."""
        text = json.dumps(self.rows())
        memo.write(path, f"{_checksum(text)}\n{text}")

    def rows(self) -> dict[str, Any]:
        """All of it as JSON. What many snapshots share is there once."""
        parts: dict[str, int] = {}
        used: dict[tuple[str, str], int] = {}
        snapshots = [
            [
                stem,
                *stamp,
                *fact[:4],
                parts.setdefault(fact.fingerprint, len(parts)),
                [used.setdefault(use[:2], len(used)) for use in fact.uses],
                [use.rows for use in fact.uses],
            ]
            for stem, (stamp, fact) in self.snapshots.items()
        ]
        blocks = [
            [stem, *stamp, *fact[:4], parts.setdefault(fact.fingerprint, len(parts))]
            for stem, (stamp, fact) in self.blocks.items()
        ]
        shared = {"fingerprints": list(parts), "used": list(used)}
        return {**shared, "snapshots": snapshots, "blocks": blocks}


def _uses(blocks: Sequence[tuple[str, str]], counts: Sequence[int]) -> tuple[Use, ...]:
    starts = accumulate(counts, initial=0)
    return tuple(
        [Use(*block, start, n) for block, start, n in zip(blocks, starts, counts, strict=False)]
    )


def _version() -> str:
    """Of what is remembered, and of the files that it was read from: others are told to be such."""
    return f"{FORMAT}.{container.VERSION}"


def _checksum(text: str) -> str:
    return hashlib.sha256(f"{__version__} {_version()}\n{text}".encode()).hexdigest()
