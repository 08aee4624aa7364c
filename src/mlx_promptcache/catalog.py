"""What a store holds: headers checked against their names, lists, plans of deletion, verification.

None of this needs a model or MLX: `list`, `show`, `clear` and `verify` answer at once, also for a
store whose model is gone.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mlx_promptcache import container
from mlx_promptcache.container import Header
from mlx_promptcache.errors import CacheMiss, DamagedFile, PromptCacheError, StoreError
from mlx_promptcache.fingerprint import PHASES, Fingerprint
from mlx_promptcache.store import BLOCKS, SNAPSHOTS, Store
from mlx_promptcache.tree import (
    CELL,
    BlockName,
    Keys,
    SnapshotName,
    cell_end,
    cell_start,
    root_key,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

BLOCK = "block"
SNAPSHOT = "snapshot"
OK, STALE, DAMAGED = "ok", "stale", "damaged"
STALE_PARTS = ("weights", "config", "text", "format")  # the other parts are chosen from run to run


def block_header(store: Store, stem: str) -> Header:
    """Read the header of a block, and check that it is the block that its name says.

    A file that was renamed or swapped with another has sound checksums: its name must agree, too.

    Raises:
        CacheMiss: it is not there; DamagedFile if it is, and is not what it should be.
    """
    with store.reader(BLOCKS, stem) as reader:
        return checked_block(reader.header(), stem)


def checked_block(header: Header, stem: str) -> Header:
    """Return the header if it is that of the block of this name; see `block_header`."""
    name = BlockName.parse(stem)
    content = header.content
    tokens, start = content.get("tokens"), content.get("start")
    sound = (
        header.kind == BLOCK
        and name is not None
        and isinstance(content.get("stacks"), dict)
        and isinstance(tokens, list)
        and 0 < len(tokens) <= CELL
        and all(type(t) is int and 0 <= t < 1 << 32 for t in tokens)
        and type(start) is int
        and start >= 0
        and start + len(tokens) <= cell_end(start)
        and (content.get("start_key"), tokens[0], content.get("end_key")) == name[:3]
    )
    if not sound:
        raise DamagedFile("it is not the block that its name says")
    return header


def snapshot_header(store: Store, stem: str) -> Header:
    """Read the header of a snapshot, and check that it is the snapshot that its name says.

    Raises:
        CacheMiss: it is not there; DamagedFile if it is, and is not what it should be.
    """
    with store.reader(SNAPSHOTS, stem) as reader:
        return checked_snapshot(reader.header(), stem)


def checked_snapshot(header: Header, stem: str) -> Header:
    """Return the header if it is that of the snapshot of this name; see `snapshot_header`."""
    name = SnapshotName.parse(stem)
    content = header.content
    n_past = content.get("n_past")
    sound = (
        header.kind == SNAPSHOT
        and name is not None
        and type(n_past) is int
        and n_past > 0
        and n_past - cell_start(n_past) == name.offset
        and (content.get("cell_key"), content.get("key")) == (name.cell_key, name.key)
        and header.digest.startswith(name.id)
        and _is_key(content.get("fingerprint"))
        and content.get("phase") in PHASES
        and isinstance(content.get("sampling"), dict)
        and isinstance(content.get("origin"), dict)
        and isinstance(content.get("opaque"), dict)
        and isinstance(content.get("refs"), list)
        and all(_is_ref(ref) for ref in content["refs"])
    )
    if not sound or not _follow_one_another(content["refs"], int(str(n_past))):
        raise DamagedFile("it is not the snapshot that its name says")
    return header


def _is_key(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{32}", value) is not None


def _is_ref(ref: Any) -> bool:
    return (
        isinstance(ref, list)
        and [type(x) for x in ref] == [str, str, int, int]
        and BlockName.parse(ref[0]) is not None
        and 0 < ref[3] <= CELL
    )


def _follow_one_another(refs: Sequence[Sequence[Any]], n_past: int) -> bool:
    position = 0
    for _, _, start, rows in refs:
        if start != position:
            return False
        position += rows
    return position == n_past


def tokens_of(store: Store, snapshot: Header) -> list[int]:
    """The tokens of a snapshot, from its blocks, checked against its key.

    Raises:
        CacheMiss: a block is not there; DamagedFile if it is not the one that the snapshot used.
    """
    tokens: list[int] = []
    for stem, digest, start, rows in snapshot.content["refs"]:
        header = block_header(store, stem)
        if header.digest != digest or header.content["start"] != start:
            raise DamagedFile("a block that it needs was replaced by another")
        tokens += header.content["tokens"][:rows]
    if Keys(root_of(snapshot), tokens)[len(tokens)] != snapshot.content["key"]:
        raise DamagedFile("its tokens are not those of its name")
    return tokens


def root_of(snapshot: Header) -> str:
    """The key of position 0 of a snapshot's tokens."""
    return root_key(snapshot.content["fingerprint"], snapshot.content["phase"])


def fingerprint_parts(header: Header) -> Mapping[str, Any]:
    """The parts of the fingerprint that a file was written under."""
    parts = header.notes.get("fingerprint")
    return parts if isinstance(parts, dict) else {}


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
                header = block_header(self.store, stem)
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
    headers = {stem: _header_or_error(store, stem) for stem in known}
    blocks = _Blocks(store)
    for header in headers.values():
        if isinstance(header, Header):
            blocks.users.update({ref[0] for ref in header.content["refs"]})
    hits = Counter(str(use.get("what")) for use in store.uses())
    found = [
        _entry(store, name, stem, headers[stem], blocks, hits, fingerprint)
        for stem in known
        for name in by_stem.get(stem, [None])
    ]
    found += [_lost_name(name) for name in lost]
    return sorted(found, key=lambda e: (-e.created, e.name or "", e.stem))


def _header_or_error(store: Store, stem: str) -> Header | PromptCacheError:
    try:
        return snapshot_header(store, stem)
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
        return Entry(
            name, snapshot, 0, size, 0, 0, used, used, hits[snapshot], DAMAGED, str(header), stem
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
    created = float(header.notes.get("made", 0.0))
    return Entry(
        name, snapshot, header.content["n_past"], own, shared, raw, created, max(used, created),
        hits[snapshot], status, reason, stem,
    )  # fmt: skip


def _stale(fingerprint: Fingerprint, header: Header) -> str | None:
    parts = fingerprint_parts(header)
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
        ids = [stem for stem in store.stems(SNAPSHOTS) if stem.endswith(f"-{name}")]
        if not ids:
            raise
        stem = ids[0]
    try:
        return stem, snapshot_header(store, stem)
    except DamagedFile as exc:
        raise DamagedFile(f"the state {name!r} is damaged: {exc}; save it again") from exc
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
    for name in names:
        matching = [e for e in known if e.name == name] or [e for e in known if e.snapshot == name]
        if not matching:
            raise CacheMiss(f"there is no state named {name!r}; `list` shows those that are")
        chosen += matching
    return chosen


# Deletion


@dataclass(frozen=True)
class Plan:
    """What would be deleted, in that order: names, snapshots, blocks from the leaf up."""

    names: tuple[str, ...]
    snapshots: tuple[str, ...]
    blocks: tuple[str, ...]
    freed_bytes: int

    def __bool__(self) -> bool:
        return bool(self.names or self.snapshots or self.blocks)


def plan_clear(store: Store, doomed: Iterable[Entry], *, everything: bool = False) -> Plan:
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
    return Plan(tuple(names), tuple(sorted(snapshots)), tuple(ordered), freed)


def _start(store: Store, stem: str) -> int:
    try:
        return int(block_header(store, stem).content["start"])
    except PromptCacheError:
        return 0


def execute(store: Store, plan: Plan) -> int:
    """Delete what the plan says, and return the bytes freed. The caller holds `store.exclusive()`.

    Raises:
        StoreError: the file system refuses; what is left is a valid store.
    """
    for name in plan.names:
        store.remove_name(name)
    freed = sum(store.remove(SNAPSHOTS, stem) for stem in plan.snapshots)
    return freed + sum(store.remove(BLOCKS, stem) for stem in plan.blocks)


# Verification


@dataclass(frozen=True)
class Damage:
    """A file that is not what it should be: a block, a snapshot or a name."""

    kind: str
    stem: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What `verify` found."""

    files: int
    bytes: int
    damaged: tuple[Damage, ...]
    seconds: float


def verify(store: Store, names: Sequence[str] = ()) -> Report:
    """Read every byte of the files of these names (of all files, if none is given), and check it.

    Raises:
        CacheMiss: there is no such name.
    """
    began = time.monotonic()
    damaged: list[Damage] = []
    if names:
        snapshots, blocks = _files_of(store, names, damaged)
    else:
        snapshots, blocks = store.stems(SNAPSHOTS), store.stems(BLOCKS)
        there = set(snapshots)
        damaged += [
            Damage("names", name, "the snapshot that it names is not there")
            for name, stem in store.names().items()
            if stem not in there
        ]
    for stem in snapshots:
        _verify_file(store, SNAPSHOTS, stem, damaged)
    for stem in blocks:
        _verify_file(store, BLOCKS, stem, damaged)
    total = sum(store.size(SNAPSHOTS, stem) for stem in snapshots)
    total += sum(store.size(BLOCKS, stem) for stem in blocks)
    files = len(snapshots) + len(blocks)
    return Report(files, total, tuple(damaged), time.monotonic() - began)


def _files_of(
    store: Store, names: Sequence[str], damaged: list[Damage]
) -> tuple[list[str], list[str]]:
    snapshots: dict[str, None] = {}
    blocks: dict[str, None] = {}
    for name in names:
        try:
            stem, header = find(store, name)
        except DamagedFile as exc:
            damaged.append(Damage("names", name, str(exc)))
            continue
        snapshots[stem] = None
        blocks.update((ref[0], None) for ref in header.content["refs"])
    return list(snapshots), list(blocks)


def _verify_file(store: Store, kind: str, stem: str, damaged: list[Damage]) -> None:
    try:
        with store.reader(kind, stem) as reader:
            header = reader.header()
            if kind == SNAPSHOTS:
                _verify_refs(store, checked_snapshot(header, stem))
            else:
                checked_block(header, stem)
            container.check(reader.read, header.entries.values())
    except (DamagedFile, StoreError) as exc:
        damaged.append(Damage(kind, stem, str(exc)))
    except CacheMiss:
        damaged.append(Damage(kind, stem, "it is not there"))


def _verify_refs(store: Store, snapshot: Header) -> None:
    for stem, digest, _, _ in snapshot.content["refs"]:
        try:
            if block_header(store, stem).digest != digest:
                raise DamagedFile("a block that it needs was replaced by another")
        except DamagedFile:
            raise
        except CacheMiss:
            raise DamagedFile("a block that it needs is not there") from None
