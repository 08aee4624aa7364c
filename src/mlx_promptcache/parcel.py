"""A parcel: one file with all that there is of one state, for somebody else's store.

A container like those of a store, of the kind `state`. Its content has the content of a snapshot
and of its blocks, its arrays are theirs, as they are stored. Whoever opens one believes nothing of
it: tokens are hashed again, and every block and the snapshot must come out as they are told.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlx_promptcache import container, headers
from mlx_promptcache.container import UNREADABLE, Header, Packed
from mlx_promptcache.errors import DamagedFile
from mlx_promptcache.fingerprint import PHASES
from mlx_promptcache.tree import (
    CELL,
    ID_DIGITS,
    BlockName,
    Keys,
    SnapshotName,
    cell_start,
    root_key,
    shard,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mlx_promptcache.container import Entry, Json, Read

STATE = "state"
SNAPSHOT_ARRAYS = "snapshot/"
LARGEST_TOKEN = (1 << 32) - 1


def label_of(block: int, array: str) -> str:
    """What an array of a block is called in a parcel."""
    return f"blocks/{block}/{array}"


def head_of(name: str | None, snapshot: Header, blocks: Sequence[Header], notes: Json) -> Packed:
    """The beginning of the file that holds a snapshot and its blocks, in their order: the arrays
    of the blocks follow, and those of the snapshot.
    """
    entries = {
        label_of(i, label): entry
        for i, block in enumerate(blocks)
        for label, entry in block.entries.items()
    }
    entries |= {SNAPSHOT_ARRAYS + label: entry for label, entry in snapshot.entries.items()}
    content = {
        "fingerprint": snapshot.content["fingerprint"],
        "snapshot": snapshot.content,
        "blocks": [block.content for block in blocks],
    }
    told = {"snapshot": snapshot.notes, "blocks": [block.notes for block in blocks]}
    return container.head_of(STATE, content, {**notes, "name": name, **told}, entries)


@dataclass(frozen=True)
class Part:
    """A block or a snapshot of a parcel: its header as it would stand in a file of its own."""

    header: Header
    stem: str

    def packed(self, read: Read) -> Packed:
        """The file of its own, its arrays read through `read` and checked.

        Raises:
            DamagedFile: an array does not agree with its checksum.
        """
        entries = self.header.entries.values()
        return container.repacked(self.header, [container.read_stored(read, e) for e in entries])


@dataclass(frozen=True)
class Parcel:
    """What a parcel says, checked."""

    name: str | None
    fingerprint: str
    parts: Mapping[str, Any]
    """Those of the fingerprint, as the parcel tells them."""
    phase: str
    tokens: tuple[int, ...]
    blocks: tuple[Part, ...]
    snapshot: Part

    @property
    def keys(self) -> Keys:
        """The keys of its tokens."""
        return Keys(root_key(self.fingerprint, self.phase), self.tokens)


def opened(header: Header) -> Parcel:
    """What a file says that was read as a container.

    Raises:
        DamagedFile: it is no parcel, or makes no sense.
    """
    if header.kind != STATE:
        raise DamagedFile(f"it holds no whole state, but a {header.kind[:20]!r}")
    try:
        return _opened(header)
    except UNREADABLE as exc:
        raise DamagedFile("it is not a whole state") from exc


def _opened(header: Header) -> Parcel:
    content, notes = header.content, header.notes
    told, fingerprint = content["snapshot"], content["fingerprint"]
    tokens = _tokens(content["blocks"])
    if not headers.is_key(fingerprint) or told["phase"] not in PHASES:
        raise DamagedFile("it is not a whole state")
    keys = Keys(root_key(fingerprint, told["phase"]), tokens)
    entries = _by_part(header.entries)
    blocks = tuple(_blocks(header, keys, entries))
    snapshot = _snapshot(header, keys, blocks, entries)
    if entries:
        raise DamagedFile("it has arrays that belong to nothing")
    if any(part.header.content["fingerprint"] != fingerprint for part in (*blocks, snapshot)):
        raise DamagedFile("its parts are not of one model")
    name = notes.get("name")
    return Parcel(
        name if isinstance(name, str) else None,
        fingerprint,
        headers.fingerprint_parts(snapshot.header),
        told["phase"],
        tokens,
        blocks,
        snapshot,
    )


def _by_part(entries: Mapping[str, Entry]) -> dict[str, dict[str, Entry]]:
    """The arrays of each part, by what their names begin with. Each is looked at once."""
    found: dict[str, dict[str, Entry]] = {}
    for label, entry in entries.items():
        parts = 1 if label.startswith(SNAPSHOT_ARRAYS) else 2
        own = label.split("/", parts)[-1]
        found.setdefault(label[: len(label) - len(own)], {})[own] = entry
    return found


def _tokens(blocks: Any) -> tuple[int, ...]:
    tokens: list[int] = []
    for block in blocks:
        own = block["tokens"]
        if not isinstance(own, list) or not 0 < len(own) <= CELL:
            raise DamagedFile("a block of it has no tokens")
        tokens += own
    if set(map(type, tokens)) != {int} or min(tokens) < 0 or max(tokens) > LARGEST_TOKEN:
        raise DamagedFile("its tokens are none")
    return tuple(tokens)


def _blocks(header: Header, keys: Keys, entries: dict[str, dict[str, Entry]]) -> Iterator[Part]:
    start, notes = 0, header.notes["blocks"]
    for i, content in enumerate(header.content["blocks"]):
        end = start + len(content["tokens"])
        first = content["tokens"][0]
        name = BlockName(shard(keys[cell_start(start)]), keys[start], first, keys[end])
        own = entries.pop(label_of(i, ""), {})
        part = _part(headers.BLOCK, content, notes[i], own)
        yield Part(headers.checked_block(part, str(name)), str(name))
        start = end


def _snapshot(
    header: Header,
    keys: Keys,
    blocks: Sequence[Part],
    entries: dict[str, dict[str, Entry]],
) -> Part:
    content, n = header.content["snapshot"], len(keys.tokens)
    own = entries.pop(SNAPSHOT_ARRAYS, {})
    part = _part(headers.SNAPSHOT, content, header.notes["snapshot"], own)
    name = SnapshotName(keys[cell_start(n)], n - cell_start(n), keys[n], part.digest[:ID_DIGITS])
    headers.checked_snapshot(part, str(name))
    if content["n_past"] != n or list(map(_named, content["refs"])) != list(map(_name, blocks)):
        raise DamagedFile("its blocks are not those of its snapshot")
    return Part(part, str(name))


def _named(ref: Sequence[Any]) -> tuple[Any, ...]:
    """Which block is meant, whatever variant of it it was in the store that it comes from."""
    name = BlockName.parse(ref[0])
    return name and name[:4], *ref[1:]


def _name(block: Part) -> tuple[Any, ...]:
    content, name = block.header.content, BlockName.parse(block.stem)
    return name and name[:4], block.header.digest, content["start"], len(content["tokens"])


def _part(kind: str, content: Json, notes: Json, entries: Mapping[str, Entry]) -> Header:
    if not isinstance(content, dict) or not isinstance(notes, dict):
        raise DamagedFile("it is not a whole state")
    head = container.head_of(kind, content, notes, entries)
    return Header(kind, content, notes, entries, head.digest, head.size, head.seal)
