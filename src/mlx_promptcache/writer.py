"""What adds to a store: blocks, then the snapshot that uses them, then its name."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mlx_promptcache import container, headers
from mlx_promptcache.errors import CacheMiss, PromptCacheError, StoreError
from mlx_promptcache.facts import Noted
from mlx_promptcache.passes import record_of
from mlx_promptcache.store import BLOCKS, SNAPSHOTS
from mlx_promptcache.synced import Synced
from mlx_promptcache.tree import ID_DIGITS, SnapshotName, id_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mlx_promptcache.container import Packed
    from mlx_promptcache.passes import PassRecord
    from mlx_promptcache.quarantine import Quarantine
    from mlx_promptcache.store import Store
    from mlx_promptcache.tree import BlockName


@dataclass(frozen=True)
class Saved:
    """What a save wrote. `blocks_shared` were there already; `snapshots` are the stems of all that
    were written, those on the way, too; `refs` are all blocks of the state, as a trail has them.
    """

    name: str | None
    snapshot: str
    blocks_written: int
    blocks_shared: int
    bytes_written: int
    snapshots: tuple[str, ...] = field(default=(), repr=False)
    refs: tuple[Any, ...] = field(default=(), repr=False, compare=False)

    def __add__(self, later: Saved) -> Saved:
        """Two saves of one run, counted together, under the later one's name."""
        return Saved(
            later.name,
            later.snapshot,
            self.blocks_written + later.blocks_written,
            max(self.blocks_shared, later.blocks_shared - self.blocks_written),
            self.bytes_written + later.bytes_written,
            (*self.snapshots, *later.snapshots),
            later.refs,
        )


class Writer:
    """Writes what is not there yet, and counts. The caller holds the shared lock.

    With `sync` everything is on the drive when `finish` returns; what `synced` has is there
    already. With `exact` a block that other passes computed is another one, whatever its bits.
    """

    def __init__(
        self,
        store: Store,
        bad: Quarantine,
        *,
        sync: bool,
        exact: bool = False,
        synced: Synced | None = None,
    ) -> None:
        self._synced = Synced(store) if synced is None else synced
        self._store, self._bad, self._sync, self._exact = store, bad, sync, exact
        self.written = self.shared = self.bytes = 0
        self.snapshots: list[str] = []
        self.noted = Noted(store)
        """What lists will want to know of the files that are written."""

    def block(self, name: BlockName, packed: Packed, record: PassRecord) -> str:
        """Write a block, or find it written; where another has its name, write a variant. Return
        its stem.

        Raises:
            StoreError: the file system refuses.
        """
        identity = f"{packed.digest} {record}" if self._exact else packed.digest
        for stem in (str(name), str(name._replace(variant=variant_of(identity)))):
            for _ in range(2):  # once more, where a damaged file had the name
                if self._store.write(BLOCKS, stem, packed, sync=self._sync):
                    self.written += 1
                    self._wrote(BLOCKS, stem, packed)
                    self._bad.trust(stem)
                    return stem
                try:
                    there = headers.block_header(self._store, stem)
                except PromptCacheError as exc:
                    self._bad.set_aside(BLOCKS, stem, exc)
                    continue
                same_passes = not self._exact or record_of(there) == record
                if there.digest != packed.digest or not same_passes:
                    break
                if self.whole(BLOCKS, stem):
                    self.shared += 1
                    return stem
        raise StoreError("a block can neither be written nor read")

    def snapshot(self, stem: str, packed: Packed) -> None:
        """Write a snapshot, or find it written.

        Raises:
            StoreError: the file system refuses.
        """
        for _ in range(2):  # once more, where a damaged file had the name
            if self._store.write(SNAPSHOTS, stem, packed, sync=self._sync):
                self._wrote(SNAPSHOTS, stem, packed)
                self.snapshots.append(stem)
            elif not self.whole(SNAPSHOTS, stem):
                continue
            self._bad.trust(stem)
            return
        raise StoreError("a snapshot can neither be written nor read")

    def _wrote(self, kind: str, stem: str, packed: Packed) -> None:
        self.bytes += packed.size
        self.noted.add(kind, stem, packed)

    def whole(self, kind: str, stem: str) -> bool:
        """Whether a file that was there before can be relied on, by its header (that of a block
        has been read by who asks). A power cut may have left that and not the rows: what is to be
        on the drive is read to the last byte. One that is damaged is moved aside.
        """
        if (not self._sync and kind == BLOCKS) or (kind, stem) in self._synced:
            return True
        check = headers.checked_block if kind == BLOCKS else headers.checked_snapshot
        try:
            with self._store.reader(kind, stem) as reader:
                header = check(reader.header(), stem)
                if self._sync:
                    container.check(reader.read, header.entries.values())
        except PromptCacheError as exc:
            self._bad.set_aside(kind, stem, exc)
            return False
        return True

    def finish(self, name: str | None, snapshot: str, blocks: Iterable[str]) -> Saved:
        """Let a name stand for what was written, once that is on the drive where it is to be.

        Raises:
            StoreError: the file system refuses.
        """
        if self._sync:
            self._synced.sync([*((BLOCKS, stem) for stem in blocks), (SNAPSHOTS, snapshot)])
        if name is not None:
            self._store.names.write(name, snapshot, sync=self._sync)
        self._store.uses.note_write(self.bytes)
        self.noted.keep()
        snapshots = tuple(self.snapshots)
        return Saved(name, id_of(snapshot), self.written, self.shared, self.bytes, snapshots)


def variant_of(identity: str) -> str:
    """What a block's name ends with where another may have its plain one: made of its digest, or of
    all that makes it another block.
    """
    return hashlib.sha256(identity.encode()).hexdigest()[:ID_DIGITS]


def check_free(store: Store, name: str, key: str) -> None:
    """Whether a name may be given to the state whose tokens have this key.

    Raises:
        StoreError: it cannot be a name, or stands for other tokens.
    """
    try:
        stem = store.names.read(name)
    except CacheMiss:
        return
    there = SnapshotName.parse(stem)
    if there is None or not store.exists(SNAPSHOTS, stem):
        return  # damaged, or lost: the name is of no more use to anybody
    if there.key != key:
        raise StoreError(
            f"there is another state named {name!r}; choose another name, or replace it (--force)"
        )
