"""What a store holds: lists, and what would be deleted. Needs neither a model nor MLX."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlx_promptcache import headers
from mlx_promptcache.deletion import Deletion
from mlx_promptcache.errors import CacheMiss, DamagedFile, ForeignFile, PromptCacheError, StoreError
from mlx_promptcache.facts import Facts, Snapshot
from mlx_promptcache.names import no_state
from mlx_promptcache.store import SNAPSHOTS, Store
from mlx_promptcache.tree import SnapshotName, id_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from mlx_promptcache.container import Header
    from mlx_promptcache.facts import Use
    from mlx_promptcache.fingerprint import Fingerprint

PART = re.compile(r"@[a-z]+-[0-9]+-of-[0-9]+$")  # see `Ranks.own_name`
OK, STALE, DAMAGED = "ok", "stale", "damaged"
STALE_PARTS = ("weights", "config", "text", "format")  # the other parts are chosen from run to run


@dataclass(frozen=True, repr=False)
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
    stem: str

    def __repr__(self) -> str:
        label = self.snapshot if self.name is None else f"{self.name!r} ({self.snapshot})"
        kept = self.bytes + self.shared_bytes
        return f"<Entry {label}: {self.tokens:,} tokens, {kept:,} bytes on disk, {self.status}>"


class Catalog:
    """What a store holds, looked at once; with `memo` what was read before is not read again.

    Stale states are told by `fingerprint`, if it is given. The caller holds a lock of the store as
    long as it uses this.
    """

    def __init__(
        self, store: Store, fingerprint: Fingerprint | None = None, memo: Path | None = None
    ) -> None:
        self.store, self.fingerprint = store, fingerprint
        self._take_names(store.names.all())  # first: others may add, and a name is what comes last
        self.facts = Facts(store, memo)
        self._snapshots = {stem: self._look(stem) for stem in self.facts.snapshots}
        self._users = Counter(
            use.stem
            for snapshot in self._snapshots.values()
            if isinstance(snapshot, Snapshot)
            for use in snapshot.uses
        )
        self._stale: dict[str, str | None] = {}
        self._hits: Counter[str] | None = None

    def _look(self, stem: str) -> Snapshot | PromptCacheError:
        try:
            return self.facts.snapshot(stem)
        except PromptCacheError as exc:
            return exc

    def _take_names(self, names: dict[str, str]) -> None:
        self.names = names
        self._names_of: dict[str, list[str | None]] = {}
        for name, stem in names.items():
            self._names_of.setdefault(stem, []).append(name)

    # Lists

    def entries(self, only: Iterable[str] | None = None) -> list[Entry]:
        """Every stored state, newest first; or those of these snapshots only."""
        stems = self._snapshots if only is None else only
        names = self._names_of
        found = [self._entry(name, stem) for stem in stems for name in names.get(stem, [None])]
        if only is None:
            found += [
                _lost_name(n) for n, stem in self.names.items() if stem not in self._snapshots
            ]
        return sorted(found, key=lambda e: (-e.created, e.name or "", e.stem))

    def named(self, names: Iterable[str]) -> list[Entry]:
        """The entries of these names, or snapshots' ids; with a name all ranks' parts of its state.

        Raises:
            CacheMiss: there is no such name.
        """
        chosen = []
        self._read_names_again()
        for name in self._with_parts(unicodedata.normalize("NFC", name) for name in names):
            stem = self.names.get(name)
            if stem is None:
                stems = [s for s in self._snapshots if id_of(s) == name]
                if not stems:
                    raise no_state(name)
                chosen += self.entries(stems)
            elif stem in self._snapshots:
                chosen += [e for e in self.entries([stem]) if e.name == name]
            else:
                chosen.append(_lost_name(name))
        return chosen

    def _with_parts(self, names: Iterable[str]) -> Iterator[str]:
        """These names, and those of other ranks' parts; a rank's own store has its part alone."""
        for name in names:
            parts = [n for n in self.names if PART.sub("", n) == name != n]
            if name in self.names or not parts:
                yield name
            yield from sorted(parts)

    def _entry(self, name: str | None, stem: str) -> Entry:
        told, file, identity = self._snapshots[stem], self.facts.snapshots[stem], id_of(stem)
        if not isinstance(told, Snapshot):
            status = STALE if isinstance(told, ForeignFile) else DAMAGED
            return Entry(
                name, identity, 0, file.size, 0, 0, file.last_use, file.last_use,
                self._hits_of(identity), status, str(told), stem,
            )  # fmt: skip
        own, shared, raw, damage = file.size, 0, told.raw_bytes, None
        for use in told.uses:
            wrong, size, row_bytes = self._used(use)
            damage = damage or wrong
            own += size if self._users[use.stem] == 1 else 0
            shared += size if self._users[use.stem] > 1 else 0
            raw += row_bytes * use.rows
        stale = self._why_stale(told.fingerprint)
        status, reason = (DAMAGED, damage) if damage else (STALE, stale) if stale else (OK, None)
        return Entry(
            name, identity, told.n_past, own, shared, raw, told.made,
            max(file.last_use, told.made), self._hits_of(identity), status, reason, stem,
        )  # fmt: skip

    def _used(self, use: Use) -> tuple[str | None, int, int]:
        """What is wrong with a block, its bytes on disk, and those of one of its rows in memory."""
        try:
            block = self.facts.block(use.stem)
        except DamagedFile as exc:
            return f"a block is damaged: {exc}", 0, 0
        except PromptCacheError:
            return "a block that it needs is not there", 0, 0
        wrong = None
        if block.digest != use.digest:
            wrong = "a block that it needs was replaced by another"
        return wrong, self.facts.blocks[use.stem].size, block.row_bytes

    def _hits_of(self, identity: str) -> int:
        if self._hits is None:
            self._hits = Counter(str(use.get("what")) for use in self.store.uses.all())
        return self._hits[identity]

    def _why_stale(self, parts: str) -> str | None:
        if parts not in self._stale:
            self._stale[parts] = self._wrong_parts(json.loads(parts))
        return self._stale[parts]

    def _wrong_parts(self, parts: dict[str, Any]) -> str | None:
        if self.fingerprint is None:
            return None
        mine = self.fingerprint
        wrong = [name for name in mine.differences(parts) if name in STALE_PARTS]
        if not wrong:
            return None
        return f"made by {mine.explain({**mine.parts, **{n: parts.get(n) for n in wrong}})}"

    # Deletion

    def plan_clear(
        self,
        doomed: Iterable[Entry],
        *,
        everything: bool = False,
        unused: bool = False,
        damaged: bool = False,
    ) -> Deletion:
        """Plan to delete these states and what only they use; or everything that there is.

        With `unused` also the blocks that no state uses, with `damaged` also damaged blocks and
        what was moved aside; everything is that, too, and what crashes left, however young. A
        snapshot that another name stands for stays, and so does every block that another state
        uses.

        Raises:
            StoreError: what stays cannot be read, so that what it uses is not known.
        """
        doomed, facts = list(doomed), self.facts
        if not everything:
            self._read_names_again()
            self._check_readable({e.stem for e in doomed})
        names = sorted(self.names if everything else {e.name for e in doomed if e.name is not None})
        kept_names = {stem for name, stem in self.names.items() if name not in names}
        snapshots = {e.stem for e in doomed if e.stem and e.stem not in kept_names}
        if everything:
            snapshots = set(self._snapshots)
        blocks = self._orphans(snapshots)
        if unused:
            blocks |= self._unused(snapshots)
        if damaged:
            blocks |= {stem: 0 for stem in facts.blocks if self._is_damaged(stem)}
        if everything:
            blocks = {stem: blocks.get(stem, 0) for stem in facts.blocks}
        ordered = sorted(blocks, key=lambda stem: (-blocks[stem], stem))
        tokenizers = facts.tokenizers if everything else {}
        aside = self.store.set_aside() if damaged or everything else {}
        if everything:
            aside |= self.store.leftovers(math.inf)
        files = [facts.snapshots[stem] for stem in snapshots]
        files += [file for file in map(facts.blocks.get, blocks) if file is not None]
        files += [*tokenizers.values(), *aside.values()]
        return Deletion(
            names=tuple(names),
            snapshots=tuple(sorted(snapshots)),
            blocks=tuple(ordered),
            tokenizers=tuple(sorted(tokenizers)),
            leftovers=tuple(sorted(aside)),
            freed_bytes=sum(file.size for file in files),
            freed_on_disk=sum(file.on_disk for file in files),
        )

    def _read_names_again(self) -> None:
        """Read the names again if the files of some could not be read, or are damaged.

        Raises:
            StoreError: they still cannot be read.
        """
        if not all(self.names.values()):
            self._take_names(self.store.names.all(certain=True))

    def _check_readable(self, doomed: set[str]) -> None:
        for stem, told in self._snapshots.items():
            if isinstance(told, StoreError) and stem not in doomed:
                raise StoreError(
                    f"nothing is deleted, since another state may use the same rows: {told}; make "
                    "that file readable first"
                )

    def _orphans(self, doomed: set[str]) -> dict[str, int]:
        """The blocks that only these snapshots use, and where they begin."""
        orphans = {
            use.stem: use.start
            for stem, snapshot in self._snapshots.items()
            if isinstance(snapshot, Snapshot) and stem in doomed
            for use in snapshot.uses
        }
        used = self._used_by_others(doomed)
        return {stem: start for stem, start in orphans.items() if stem not in used}

    def _unused(self, doomed: set[str]) -> dict[str, int]:
        """The blocks that no other snapshot uses, and where they begin; none if that cannot be
        told, because a snapshot that stays cannot be read.
        """
        stay = self._snapshots.keys() - doomed
        if not all(isinstance(self._snapshots[stem], (Snapshot, DamagedFile)) for stem in stay):
            return {}
        unused: dict[str, int] = {}
        for stem in self.facts.blocks.keys() - self._used_by_others(doomed):
            try:
                unused[stem] = self.facts.block(stem).start
            except DamagedFile:
                unused[stem] = 0
            except PromptCacheError:  # of another version, or not to be read for now
                continue
        return unused

    def _used_by_others(self, doomed: set[str]) -> set[str]:
        return {
            use.stem
            for stem, snapshot in self._snapshots.items()
            if isinstance(snapshot, Snapshot) and stem not in doomed
            for use in snapshot.uses
        }

    def _is_damaged(self, block: str) -> bool:
        try:
            self.facts.block(block)
        except DamagedFile:
            return True
        except PromptCacheError:
            return False
        return False


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
        stem = store.names.read(name)
    except DamagedFile:
        raise
    except CacheMiss:
        stems = [stem for stem in store.stems(SNAPSHOTS) if id_of(stem) == name]
        if not any(map(SnapshotName.parse, stems)):
            raise
        stem = stems[0]
    try:
        return stem, headers.snapshot_header(store, stem)
    except DamagedFile as exc:
        raise DamagedFile(f"the state {name!r} is damaged: {exc}; save it again") from exc
    except ForeignFile as exc:
        raise ForeignFile(
            f"the state {name!r} cannot be read: {exc}; take the release that wrote it, or save it "
            "again"
        ) from exc
    except CacheMiss:
        raise DamagedFile(
            f"the state {name!r} is lost: its snapshot is not there; save it again"
        ) from None
