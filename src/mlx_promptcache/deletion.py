"""What is to be deleted from a store, and deleting it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlx_promptcache.store import BLOCKS, SNAPSHOTS, TOKENIZERS

if TYPE_CHECKING:
    from mlx_promptcache.store import Store


@dataclass(frozen=True)
class Deletion:
    """What would be deleted, in that order: names, snapshots, blocks from the leaf up, tokenizers,
    and leftovers (what crashes left, and what was moved aside), by their paths in the store.

    `freed_bytes` are the sizes of the files, `freed_on_disk` what the drive gave for them, and for
    directories that have nothing else, where that was asked for.
    """

    names: tuple[str, ...] = ()
    snapshots: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()
    freed_bytes: int = 0
    freed_on_disk: int = 0
    tokenizers: tuple[str, ...] = ()
    leftovers: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        kinds = (self.names, self.snapshots, self.blocks, self.tokenizers, self.leftovers)
        return any(kinds)


def execute(store: Store, plan: Deletion) -> int:
    """Delete what the plan says, and return the bytes freed. The caller holds `store.exclusive()`.

    Raises:
        StoreError: the file system refuses; what is left is a valid store.
    """
    for name in plan.names:
        store.names.remove(name)
    freed = sum(store.remove(SNAPSHOTS, stem) for stem in plan.snapshots)
    freed += sum(store.remove(BLOCKS, stem) for stem in plan.blocks)
    freed += sum(store.remove(TOKENIZERS, stem) for stem in plan.tokenizers)
    return freed + sum(store.remove_leftover(path) for path in plan.leftovers)
