"""From a store to a parcel: what is stored of one state, in a file for others.

Arrays that a state uses whole are passed on as they are stored, checked and not decompressed. Of a
block that goes on with another prompt the rows of this state are cut out: what was not asked for
does not leave the store.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlx_promptcache import catalog, container, cuts, headers, parcel
from mlx_promptcache.errors import CacheMiss, DamagedFile, StoreError
from mlx_promptcache.files import write_once
from mlx_promptcache.names import check_name
from mlx_promptcache.store import BLOCKS, SNAPSHOTS, Store
from mlx_promptcache.tree import BlockName, Keys, id_of
from mlx_promptcache.version import __version__

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from mlx_promptcache.container import Header


@dataclass(frozen=True)
class Exported:
    """A state that stands in a file of its own."""

    name: str | None
    snapshot: str
    tokens: int
    blocks: int
    bytes: int


@dataclass(frozen=True)
class Piece:
    """A block of the state: its file's stem, or its own file's chunks where it was cut."""

    header: Header
    stem: str
    cut: tuple[bytes | memoryview, ...] | None = None

    def data(self, store: Store) -> bytes:
        """Its file, checked. Raises CacheMiss, DamagedFile, StoreError."""
        if self.cut is not None:
            return b"".join(self.cut)
        return file_of(store, BLOCKS, self.stem, self.header)


def export(store: Store, name: str, path: Path, *, replace_file: bool = False) -> Exported:
    """Write the state of a name, or of a snapshot's id, to a file: whole or not at all.

    Raises:
        CacheMiss: there is no such state, or it is damaged.
        StoreError: there is a file of that name, and it is not to be replaced; or the file system
            refuses.
    """
    with store.shared():
        stem, snapshot = catalog.find(store, name)
        try:
            own = pieces(store, snapshot)
            _, snapshot = naming(snapshot, stem, own)
            named = name_of(store, name)
            notes = {"made": round(time.time(), 3), "version": __version__}
            head = parcel.head_of(named, snapshot, [piece.header for piece in own], notes)
            arrays = _arrays(store, stem, snapshot, own)
            write(path, itertools.chain(head.chunks, arrays), replace_file=replace_file)
        except DamagedFile as exc:
            raise DamagedFile(f"the state {name!r} is damaged: {exc}; save it again") from exc
    size = path.stat().st_size
    n_past = snapshot.content["n_past"]
    return Exported(named, id_of(stem), n_past, len(own), size)


def name_of(store: Store, name: str) -> str | None:
    """A name as it is stored; None if it is the id of a snapshot."""
    try:
        store.names.read(name)
    except CacheMiss:
        return None
    return check_name(name)


def check_free(path: Path) -> None:
    """Raise StoreError if there is something where a file is to be written, or no directory."""
    if path.exists() or path.is_symlink():
        raise StoreError(f"{path} is there already: choose another name, or replace it (--force)")
    if not path.parent.is_dir():
        raise StoreError(f"there is no directory {path.parent}")


def pieces(store: Store, snapshot: Header, *, cut: bool = True) -> list[Piece]:
    """The blocks of a snapshot, each with just the rows that it uses of it; whole unless `cut`.

    Raises:
        DamagedFile: a block is not there, or is not the one that it used.
    """
    blocks = headers.blocks_of(store, snapshot)
    keys = Keys(headers.root_of(snapshot), headers.tokens_in(snapshot, blocks))
    found = []
    for (stem, _, start, rows), header in zip(snapshot.content["refs"], blocks, strict=True):
        if rows == len(header.content["tokens"]) or not cut:
            found.append(Piece(header, stem))
            continue
        with store.reader(BLOCKS, stem) as reader:
            packed = cuts.first_rows(reader.read, header, rows, keys[start + rows])
        found.append(_cut(stem, packed))
    return found


def _cut(stem: str, packed: container.Packed) -> Piece:
    """A block that was cut out of the one of this stem, under its own name."""
    whole = b"".join(packed.chunks)
    header = container.read_header(lambda at, count: whole[at : at + count], len(whole))
    name = BlockName.parse(stem)
    assert name is not None  # noqa: S101 - a block was read by it
    own = name._replace(end_key=header.content["end_key"], variant="")
    return Piece(header, str(own), tuple(packed.chunks))


def naming(snapshot: Header, stem: str, pieces: Sequence[Piece]) -> tuple[str, Header]:
    """The snapshot that uses these very blocks, whole, and its stem."""
    return headers.using(snapshot, stem, [(piece.stem, piece.header.digest) for piece in pieces])


def _arrays(
    store: Store, stem: str, snapshot: Header, pieces: list[Piece]
) -> Iterator[bytes | memoryview]:
    """The stored bytes of all arrays, each checked as it is read."""
    for piece in pieces:
        if piece.cut is not None:
            yield from piece.cut[1:]
        else:
            yield from _stored(store, BLOCKS, piece.stem, piece.header)
    yield from _stored(store, SNAPSHOTS, stem, snapshot)


def file_of(store: Store, kind: str, stem: str, header: Header) -> bytes:
    """A file of the store, if it is the one of this header and sound.

    Raises:
        CacheMiss: it is not there; DamagedFile if it is another, or damaged.
    """
    with store.reader(kind, stem) as reader:
        if reader.header().digest != header.digest:
            raise DamagedFile("it was replaced by another")
        container.check(reader.read, header.entries.values())
        return reader.read(0, reader.size)


def _stored(store: Store, kind: str, stem: str, header: Header) -> Iterator[memoryview]:
    with store.reader(kind, stem) as reader:
        for entry in header.entries.values():
            yield container.read_stored(reader.read, entry)


def write(path: Path, chunks: Iterable[bytes | memoryview], *, replace_file: bool) -> None:
    """Write a file whole or not at all, and sync it.

    Raises:
        StoreError: there is a file of that name, and it is not to be replaced; or the file system
            refuses.
    """
    try:
        if not replace_file:
            check_free(path)
        if not write_once(path, chunks, sync=True, replace=replace_file):
            check_free(path)
    except OSError as exc:
        raise StoreError(f"{path} cannot be written: {exc.strerror}") from exc
