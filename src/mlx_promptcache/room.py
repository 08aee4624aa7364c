"""Room in a store: for what is to be added to it, and back within its budget."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from mlx_promptcache.budget import Drive
from mlx_promptcache.deletion import Deletion, execute
from mlx_promptcache.errors import StoreError
from mlx_promptcache.eviction import Eviction
from mlx_promptcache.facts import Facts, memo_of

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from mlx_promptcache.budget import Budget
    from mlx_promptcache.files import File
    from mlx_promptcache.store import Store

FILE_BYTES = 16384  # of a file beside its arrays: header, directory, the drive's whole blocks
SPARE = 20  # a twentieth of the budget more is freed, so that not every save has to evict
LOCK_SECONDS = 5.0  # a generation does not wait longer for others to stop reading


class NoRoom(StoreError):
    """What is to be added does not fit the budget, whatever is evicted. Nothing was deleted."""


def make(
    store: Store,
    budget: Budget,
    needed_bytes: int,
    *,
    kept: Collection[str] = (),
    asked_for: bool,
) -> None:
    """Evict what must go so that so many bytes more can be written. `kept` are stems that stay.

    What was `asked_for` by name is bound by a budget that was chosen, not by the defaults. The
    caller holds `store.adding()`, and no other lock.

    Raises:
        NoRoom: even then there would be none.
        CacheLocked: others read or write, and do not come to an end.
    """
    taken, drive = store.taken(), Drive.of(store.directory)
    most = budget.limit(drive, taken)
    over = taken + needed_bytes - most
    # What was asked for may take the last byte of the drive, and may turn out to need less.
    short = needed_bytes - drive.free + (0 if asked_for else budget.floor(drive))
    if max(over, short) <= 0:
        return
    optional = asked_for and budget.max_bytes is None
    looked = look(store)
    with store.exclusive(LOCK_SECONDS):
        lacking = max(over, short)
        plan = _plan(store, lacking, most // SPARE, kept, looked)
        freed = plan.freed_on_disk
        if freed >= lacking or optional or (asked_for and freed >= over):
            execute(store, plan)
            store.uses.shorten()
            return
    if over > plan.freed_on_disk:
        raise NoRoom(
            f"it may take {needed_bytes:,} bytes, the store takes {taken:,} of the {most:,} that "
            f"it may take, and at most {plan.freed_on_disk:,} could be evicted: delete states that "
            "are not needed (`clear`), or choose a larger --max-size"
        )
    raise NoRoom(f"the drive has only {drive.free:,} bytes free: make room on it")


def limit(store: Store, budget: Budget, taken: int) -> int:
    """The most bytes on disk that a store may take, which takes `taken` now."""
    return budget.limit(Drive.of(store.directory), taken)


def look(store: Store) -> Facts:
    """Read what a plan is made of, while others may still read and write: of many files that takes
    long, and whoever holds the lock alone lets all others wait. The caller holds no lock.
    """
    with store.shared():
        facts = Facts(store, memo_of(store))
        facts.read()
        facts.keep()
    return facts


def _plan(
    store: Store, lacking: int, spare: int, kept: Collection[str], looked: Facts | None
) -> Deletion:
    """What to delete to free `lacking` bytes, and some to spare; what is no state goes first."""
    rest = store.leftovers(time.time())
    if _on_disk(rest) < lacking:
        rest |= store.set_aside()
    states = Deletion()
    if (freed := _on_disk(rest)) < lacking:
        facts = Facts(store, memo_of(store), looked)
        states = Eviction(facts, kept).plan(lacking - freed + spare)
        facts.keep()
    return replace(
        states,
        leftovers=tuple(rest),
        freed_bytes=states.freed_bytes + sum(file.size for file in rest.values()),
        freed_on_disk=states.freed_on_disk + freed,
    )


def _on_disk(files: Mapping[str, File]) -> int:
    return sum(file.on_disk for file in files.values())


def plan_prune(store: Store, budget: Budget, looked: Facts | None = None) -> Deletion:
    """What `prune` would delete: leftovers of crashes, and what is over the budget. What was
    `looked` at before is not read again.

    The caller holds a lock of the store.
    """
    taken, drive = store.taken(), Drive.of(store.directory)
    over = taken - budget.limit(drive, taken)
    short = 0 if budget.max_bytes is not None else budget.floor(drive) - drive.free
    return _plan(store, max(0, over, short), 0, (), looked)
