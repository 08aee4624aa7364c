"""What a store holds: lists, and what would be deleted. Needs neither a model nor MLX."""

from __future__ import annotations

import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mlx_promptcache import headers
from mlx_promptcache.container import Header
from mlx_promptcache.errors import CacheMiss, DamagedFile, ForeignFile, PromptCacheError
from mlx_promptcache.store import BLOCKS, SNAPSHOTS, TOKENIZERS, Store
from mlx_promptcache.tree import SnapshotName

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mlx_promptcache.fingerprint import Fingerprint

OK, STALE, DAMAGED = "ok", "stale", "damaged"
STALE_PARTS = ("weights", "config", "text", "format")  # the other parts are chosen from run to run


# Lists


@dataclass(frozen=True)
class Entry:
    """One stored state, as `list` shows it. Sizes in bytes, times in seconds since the epoch."""

    name: str | None
    snapshot: str
    tokens: int
    bytes: int
    shared_bytes: int
    raw_bytes: int
    created: float
    last_used: float
    hits: int
    status: str
    reason: str | None
    stem: str = field(repr=False)


@dataclass(frozen=True)
class _Block:
    """A block's bytes on disk, bytes of one of its rows in memory, and what is wrong with it."""

    bytes: int = 0
    row_bytes: int = 0
    digest: str = ""
    wrong: str | None = None


@dataclass
class _Blocks:
    """Sizes of blocks, and how many snapshots use each."""

    store: Store
    users: Counter[str] = field(default_factory=Counter)
    seen: dict[str, _Block] = field(default_factory=dict)

    def look(self, stem: str) -> _Block:
        """What is known of a block from its header."""
        if stem not in self.seen:
            try:
                header = headers.block_header(self.store, stem)
                tokens = len(header.content["tokens"])
                self.seen[stem] = _Block(header.size, header.raw_bytes // tokens, header.digest)
            except DamagedFile as exc:
                self.seen[stem] = _Block(wrong=f"a block is damaged: {exc}")
            except PromptCacheError:
                self.seen[stem] = _Block(wrong="a block that it needs is not there")
        return self.seen[stem]


def entries(store: Store, fingerprint: Fingerprint | None = None) -> list[Entry]:
    """Every stored state, newest first; stale ones are told by `fingerprint`, if it is given.

    The caller holds a lock of the store, here and below.
    """
    by_stem: dict[str, list[str | None]] = {}
    lost: list[str] = []
    known = store.stems(SNAPSHOTS)
    there = set(known)
    for name, stem in store.names().items():
        if stem in there:
            by_stem.setdefault(stem, []).append(name)
        else:
            lost.append(name)
    found_headers = {stem: _header_or_error(store, stem) for stem in known}
    blocks = _Blocks(store)
    for header in found_headers.values():
        if isinstance(header, Header):
            blocks.users.update({ref[0] for ref in header.content["refs"]})
    hits = Counter(str(use.get("what")) for use in store.uses())
    found = [
        _entry(store, name, stem, found_headers[stem], blocks, hits, fingerprint)
        for stem in known
        for name in by_stem.get(stem, [None])
    ]
    found += [_lost_name(name) for name in lost]
    return sorted(found, key=lambda e: (-e.created, e.name or "", e.stem))


def _header_or_error(store: Store, stem: str) -> Header | PromptCacheError:
    try:
        return headers.snapshot_header(store, stem)
    except PromptCacheError as exc:
        return exc


def _entry(
    store: Store,
    name: str | None,
    stem: str,
    header: Header | PromptCacheError,
    blocks: _Blocks,
    hits: Counter[str],
    fingerprint: Fingerprint | None,
) -> Entry:
    snapshot = stem.rpartition("-")[2]
    size, used = store.size(SNAPSHOTS, stem), store.last_use(SNAPSHOTS, stem)
    if not isinstance(header, Header):
        status = STALE if isinstance(header, ForeignFile) else DAMAGED
        return Entry(
            name, snapshot, 0, size, 0, 0, used, used, hits[snapshot], status, str(header), stem
        )
    own, shared, raw, damage = size, 0, header.raw_bytes, None
    for block, digest, _, rows in header.content["refs"]:
        seen = blocks.look(block)
        damage = damage or seen.wrong
        if damage is None and seen.digest != digest:
            damage = "a block that it needs was replaced by another"
        own += seen.bytes if blocks.users[block] == 1 else 0
        shared += seen.bytes if blocks.users[block] > 1 else 0
        raw += seen.row_bytes * rows
    stale = None if fingerprint is None else _stale(fingerprint, header)
    status, reason = (DAMAGED, damage) if damage else (STALE, stale) if stale else (OK, None)
    created = headers.noted_number(header, "made")
    return Entry(
        name, snapshot, header.content["n_past"], own, shared, raw, created, max(used, created),
        hits[snapshot], status, reason, stem,
    )  # fmt: skip


def _stale(fingerprint: Fingerprint, header: Header) -> str | None:
    parts = headers.fingerprint_parts(header)
    wrong = [name for name in fingerprint.differences(parts) if name in STALE_PARTS]
    if not wrong:
        return None
    return (
        f"made by {fingerprint.explain({**fingerprint.parts, **{n: parts.get(n) for n in wrong}})}"
    )


def _lost_name(name: str) -> Entry:
    return Entry(
        name, "", 0, 0, 0, 0, 0.0, 0.0, 0, DAMAGED, "the snapshot that it names is not there", ""
    )


def find(store: Store, name: str) -> tuple[str, Header]:
    """The stem and the header of the snapshot of a name, or of a snapshot's id.

    Raises:
        CacheMiss: there is none; DamagedFile if it is damaged.
    """
    try:
        stem = store.read_name(name)
    except DamagedFile:
        raise
    except CacheMiss:
        ids = {n.id: str(n) for n in map(SnapshotName.parse, store.stems(SNAPSHOTS)) if n}
        if name not in ids:
            raise
        stem = ids[name]
    try:
        return stem, headers.snapshot_header(store, stem)
    except DamagedFile as exc:
        raise DamagedFile(f"the state {name!r} is damaged: {exc}; save it again") from exc
    except ForeignFile as exc:
        raise ForeignFile(f"the state {name!r} cannot be read: {exc}") from exc
    except CacheMiss:
        raise DamagedFile(
            f"the state {name!r} is lost: its snapshot is not there; save it again"
        ) from None


def named(store: Store, names: Iterable[str]) -> list[Entry]:
    """The entries of these names, or snapshots' ids.

    Raises:
        CacheMiss: there is no such name.
    """
    known = entries(store)
    chosen = []
    for name in (unicodedata.normalize("NFC", name) for name in names):
        matching = [e for e in known if e.name == name] or [e for e in known if e.snapshot == name]
        if not matching:
            raise CacheMiss(f"there is no state named {name!r}; `list` shows those that are")
        chosen += matching
    return chosen


# Deletion


@dataclass(frozen=True)
class Deletion:
    """What would be deleted, in that order: names, snapshots, blocks from the leaf up; with
    everything the tokenizers, too.
    """

    names: tuple[str, ...]
    snapshots: tuple[str, ...]
    blocks: tuple[str, ...]
    freed_bytes: int
    tokenizers: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.names or self.snapshots or self.blocks or self.tokenizers)


def plan_clear(store: Store, doomed: Iterable[Entry], *, everything: bool = False) -> Deletion:
    """Plan to delete these states and what only they use; or everything that there is.

    A snapshot that another name stands for stays, and so does every block that another state uses.
    """
    doomed = list(doomed)
    names = sorted({e.name for e in doomed if e.name is not None})
    if everything:
        names = sorted(store.names())
    kept_names = {stem for name, stem in store.names().items() if name not in names}
    known = store.stems(SNAPSHOTS)
    snapshots = {e.stem for e in doomed if e.stem and e.stem not in kept_names}
    if everything:
        snapshots = set(known)
    used: set[str] = set()
    orphaned: set[str] = set()
    for stem in known:
        header = _header_or_error(store, stem)
        if isinstance(header, Header):
            target = orphaned if stem in snapshots else used
            target.update(ref[0] for ref in header.content["refs"])
    blocks = set(store.stems(BLOCKS)) if everything else orphaned - used
    ordered = sorted(blocks, key=lambda stem: -_start(store, stem))
    freed = sum(store.size(SNAPSHOTS, s) for s in snapshots)
    freed += sum(store.size(BLOCKS, s) for s in blocks)
    tokenizers = tuple(store.stems(TOKENIZERS)) if everything else ()
    freed += sum(store.size(TOKENIZERS, s) for s in tokenizers)
    return Deletion(tuple(names), tuple(sorted(snapshots)), tuple(ordered), freed, tokenizers)


def _start(store: Store, stem: str) -> int:
    try:
        return int(headers.block_header(store, stem).content["start"])
    except PromptCacheError:
        return 0


def execute(store: Store, plan: Deletion) -> int:
    """Delete what the plan says, and return the bytes freed. The caller holds `store.exclusive()`.

    Raises:
        StoreError: the file system refuses; what is left is a valid store.
    """
    for name in plan.names:
        store.remove_name(name)
    freed = sum(store.remove(SNAPSHOTS, stem) for stem in plan.snapshots)
    freed += sum(store.remove(BLOCKS, stem) for stem in plan.blocks)
    return freed + sum(store.remove(TOKENIZERS, stem) for stem in plan.tokenizers)
