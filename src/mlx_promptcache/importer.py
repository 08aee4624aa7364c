"""From a parcel to a store: a state that was made elsewhere, added as a save adds one.

Everything is checked before anything is written. A block that is stored already, or whose rows are
the first ones of a stored one, is used and not written again; so importing what is there writes a
name at the most.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, NamedTuple

from mlx_promptcache import container, cuts, headers, parcel, room, signatures
from mlx_promptcache.errors import (
    CacheMiss,
    DamagedFile,
    PromptCacheError,
    SignatureError,
    StoreError,
)
from mlx_promptcache.files import Reader
from mlx_promptcache.fingerprint import Fingerprint
from mlx_promptcache.names import check_name
from mlx_promptcache.parcel import Part
from mlx_promptcache.passes import record_of
from mlx_promptcache.store import BLOCKS, SNAPSHOTS, TRUSTED_KEYS, Store
from mlx_promptcache.tree import BlockName
from mlx_promptcache.writer import Saved, Writer, check_free

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from mlx_promptcache.budget import Budget
    from mlx_promptcache.container import Header, Read
    from mlx_promptcache.parcel import Parcel
    from mlx_promptcache.quarantine import Quarantine


class Ref(NamedTuple):
    """A stored block that has the rows of one of a parcel's."""

    stem: str
    digest: str


def add(
    path: Path,
    store: Store,
    bad: Quarantine,
    fingerprint: Fingerprint,
    budget: Budget,
    *,
    name: str | None = None,
    replace: bool = False,
) -> tuple[Saved, int]:
    """Add the state of a parcel to a store, under this name or its own, if it has one. Return what
    was written, and how many tokens the state has.

    Raises:
        CacheMiss: it is another model's; DamagedFile if it is not what was exported.
        StoreError: the name is taken or cannot be one, there is no room within the budget, or the
            file system refuses.
        SignatureError: the store takes signed files alone.
        CacheLocked: somebody adds to the store or deletes from it, and does not come to an end.
    """
    check_unsigned(store)
    with reading(path) as reader:
        with told_of(path):
            found = parcel.opened(reader.header())
            check_fingerprint(found, fingerprint)
            container.check(reader.read, _entries(found))
        name = found.name if name is None else name
        name = None if name is None else check_name(name)
        store.create()
        with store.adding():
            if name is not None and not replace:
                check_free(store, name, found.keys[len(found.tokens)])
            there = list(_there(store, found))
            _make_room(store, budget, reader.size, found, there)
            with store.shared(), told_of(path):
                return _write(store, bad, found, there, reader.read, name), len(found.tokens)


def check_unsigned(store: Store) -> None:
    """Raise SignatureError if a store takes signed files alone: nobody signs what is exported."""
    if signatures.is_asked_for(store.directory):
        raise SignatureError(
            f"the store {store.directory} takes only what is signed (its file {TRUSTED_KEYS}), and "
            "exported files are not: pull the state from a remote that has it signed"
        )


def _make_room(
    store: Store, budget: Budget, size: int, found: Parcel, there: list[Ref | None]
) -> None:
    """Make room for what is not stored yet; for a name alone none is needed."""
    kept = [ref for ref in there if ref is not None]
    if len(kept) == len(there) and store.exists(SNAPSHOTS, _named(found, kept)[0]):
        return
    needed = size + (len(there) + 1) * room.FILE_BYTES
    room.make(store, budget, needed, kept=[ref.stem for ref in kept], asked_for=True)


def check_fingerprint(found: Parcel, mine: Fingerprint) -> None:
    """Raise CacheMiss, with the reason in words, if a state was not made as `mine` says."""
    if found.fingerprint == mine.digest:
        return
    honest = Fingerprint(_texts(found)).digest == found.fingerprint
    wrong = mine.differences(found.parts) if honest else []
    if not wrong:
        raise CacheMiss("it was made by another model: import it with that one (--model)")
    why = mine.explain(found.parts)
    if set(wrong) & {"weights", "config", "text", "format"}:
        raise CacheMiss(f"it was made with {why}: import it with that model (--model)")
    raise CacheMiss(f"it was made with {why}: give the options that it was made with")


def _texts(found: Parcel) -> dict[str, str]:
    return {name: str(value) for name, value in found.parts.items()}


@contextlib.contextmanager
def reading(path: Path) -> Iterator[Reader]:
    """A file that the user names, whoever's it is, and through whatever link.

    Raises:
        StoreError: it cannot be read.
    """
    try:
        users = {path.stat().st_uid}
        if not path.is_file():
            raise StoreError(f"{path} is no file")
        reader = Reader(path.resolve(), users)
    except OSError as exc:
        raise StoreError(f"{path} cannot be read: {exc.strerror}") from exc
    except PromptCacheError as exc:
        raise StoreError(f"{path} cannot be read: {exc}") from exc
    with contextlib.closing(reader):
        yield reader


@contextlib.contextmanager
def told_of(path: Path) -> Iterator[None]:
    """Let what is wrong with a file name it."""
    try:
        yield
    except DamagedFile as exc:
        raise DamagedFile(f"{path} cannot be imported: {exc}") from exc
    except CacheMiss as exc:
        raise CacheMiss(f"{path} cannot be imported: {exc}") from exc


def _entries(found: Parcel) -> Iterator[container.Entry]:
    for part in (*found.blocks, found.snapshot):
        yield from part.header.entries.values()


def _there(store: Store, found: Parcel) -> Iterator[Ref | None]:
    """For each block of a parcel the stored one that has its rows, by their names and headers."""
    keys = found.keys
    for block in found.blocks:
        yield _stored(store, block, keys[block.header.content["start"]])


def _stored(store: Store, block: Part, start_key: str) -> Ref | None:
    """The stored block with the rows of this one: the same, or one that goes on after them."""
    tokens = block.header.content["tokens"]
    beginning = f"{block.stem[: len('3f/')]}{start_key}-{tokens[0]}-"
    for stem in store.beginning(BLOCKS, beginning):
        if BlockName.parse(stem) is None:
            continue
        with contextlib.suppress(PromptCacheError), store.reader(BLOCKS, stem) as reader:
            header = headers.checked_block(reader.header(), stem)
            if header.digest == block.header.digest or _begins_with(header, block, reader.read):
                return Ref(stem, header.digest)
    return None


def _begins_with(longer: Header, block: Part, read: Read) -> bool:
    """Whether the first rows of a stored block are those of this one, bit for bit."""
    own = block.header.content
    tokens = longer.content["tokens"]
    if len(tokens) <= len(own["tokens"]) or tokens[: len(own["tokens"])] != own["tokens"]:
        return False
    cut = cuts.first_rows(read, longer, len(own["tokens"]), own["end_key"])
    return cut.digest == block.header.digest


def _write(
    store: Store,
    bad: Quarantine,
    found: Parcel,
    there: list[Ref | None],
    read: Read,
    name: str | None,
) -> Saved:
    """Write what is missing. The caller holds the turn to add, and the shared lock."""
    writer = Writer(store, bad, sync=True)
    refs = []
    for block, ref in zip(found.blocks, there, strict=True):
        if ref is not None and store.exists(BLOCKS, ref.stem) and writer.whole(BLOCKS, ref.stem):
            writer.shared += 1
            refs.append(ref)
        else:
            refs.append(_written(writer, block, read))
    stem, header = _named(found, refs)
    writer.snapshot(stem, Part(header, stem).packed(read))
    return writer.finish(name, stem, [ref.stem for ref in refs])


def _written(writer: Writer, block: Part, read: Read) -> Ref:
    name = BlockName.parse(block.stem)
    assert name is not None  # noqa: S101 - it was made of keys
    packed = block.packed(read)
    return Ref(writer.block(name, packed, record_of(block.header)), packed.digest)


def _named(found: Parcel, refs: list[Ref]) -> tuple[str, Header]:
    """The snapshot that uses these blocks, and its stem."""
    return headers.using(found.snapshot.header, found.snapshot.stem, refs)
