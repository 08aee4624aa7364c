"""Reading every stored byte, and checking it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from mlx_promptcache import catalog, container, headers
from mlx_promptcache.errors import CacheMiss, DamagedFile, ForeignFile, StoreError
from mlx_promptcache.names import NAMES
from mlx_promptcache.store import BLOCKS, SNAPSHOTS, TOKENIZERS, Store

if TYPE_CHECKING:
    from collections.abc import Sequence


class Damage(NamedTuple):
    """A file that is not what it should be: a block, a snapshot, a tokenizer or a name.

    `certain` if its bytes say so; not if they merely could not be read, or if what is wrong is
    another file.
    """

    kind: str
    stem: str
    reason: str
    certain: bool


@dataclass(frozen=True)
class Report:
    """What was read, and what is wrong with it."""

    files: int
    bytes: int
    damaged: tuple[Damage, ...]
    seconds: float
    closed: int = 0
    """How many files were open to other users, and are closed to them now."""


def verify(store: Store, names: Sequence[str] = ()) -> Report:
    """Read every byte of the files of these names (of all files, if none is given), and check it;
    of all files, too, take from other users what these may do with them.

    The caller holds a lock of the store.

    Raises:
        CacheMiss: there is no such name.
    """
    began = time.monotonic()
    damaged: list[Damage] = []
    if names:
        snapshots, blocks = _files_of(store, names, damaged)
    else:
        named = store.names.all()  # first: others may add, and a name is what comes last
        snapshots, blocks = store.stems(SNAPSHOTS), store.stems(BLOCKS)
        there = set(snapshots)
        damaged += [
            Damage(NAMES, name, "the snapshot that it names is not there", certain=False)
            for name, stem in named.items()
            if stem not in there
        ]
    files = [*((SNAPSHOTS, stem) for stem in snapshots), *((BLOCKS, stem) for stem in blocks)]
    files += [(TOKENIZERS, stem) for stem in (() if names else store.stems(TOKENIZERS))]
    damaged += [found for kind, stem in files if (found := look(store, kind, stem)) is not None]
    total = sum(store.size(kind, stem) for kind, stem in files)
    closed = 0 if names else store.close_files()
    return Report(len(files), total, tuple(damaged), time.monotonic() - began, closed)


def _files_of(
    store: Store, names: Sequence[str], damaged: list[Damage]
) -> tuple[list[str], list[str]]:
    snapshots: dict[str, None] = {}
    blocks: dict[str, None] = {}
    for name in names:
        try:
            stem, header = catalog.find(store, name)
        except DamagedFile as exc:
            damaged.append(Damage(NAMES, name, str(exc), certain=False))
            continue
        snapshots[stem] = None
        blocks.update((ref[0], None) for ref in header.content["refs"])
    return list(snapshots), list(blocks)


def look(store: Store, kind: str, stem: str) -> Damage | None:
    """Read every byte of one file, and say what is wrong with it."""
    try:
        with store.reader(kind, stem) as reader:
            header = reader.header()
            if kind == SNAPSHOTS:
                headers.checked_snapshot(header, stem)
            elif kind == BLOCKS:
                headers.checked_block(header, stem)
            elif header.kind != headers.TOKENIZER:
                raise DamagedFile("it is no tokenizer")
            container.check(reader.read, header.entries.values())
    except ForeignFile:
        return None
    except DamagedFile as exc:
        return Damage(kind, stem, str(exc), certain=True)
    except StoreError as exc:
        return Damage(kind, stem, str(exc), certain=False)
    except CacheMiss:
        return Damage(kind, stem, "it is not there", certain=False)
    if kind == SNAPSHOTS and (wrong := _wrong_ref(store, header)) is not None:
        return Damage(kind, stem, wrong, certain=False)
    return None


def _wrong_ref(store: Store, snapshot: container.Header) -> str | None:
    for stem, digest, _, _ in snapshot.content["refs"]:
        try:
            if headers.block_header(store, stem).digest != digest:
                return "a block that it needs was replaced by another"
        except DamagedFile as exc:
            return f"a block that it needs is damaged: {exc}"
        except CacheMiss:
            return "a block that it needs is not there"
        except StoreError as exc:
            return str(exc)
    return None


def set_aside(store: Store, report: Report) -> int:
    """Move aside what is damaged, and return how many files that were.

    The caller holds the exclusive lock: each is read again, for it may have been mended since.
    """
    moved = 0
    for damage in report.damaged:
        again = look(store, damage.kind, damage.stem) if damage.kind != NAMES else None
        if again is not None and again.certain:
            moved += store.quarantine(damage.kind, damage.stem)
    return moved
