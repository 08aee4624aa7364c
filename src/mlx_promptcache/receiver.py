"""The receiver: states of a remote that a store lacks come here, each with all of its blocks."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING

from mlx_promptcache import exporter, headers
from mlx_promptcache.arrivals import Arrivals, Own, as_there, forget_parts, shared_stem
from mlx_promptcache.errors import CacheMiss, PromptCacheError, RemoteError, StoreError
from mlx_promptcache.moved import Moved
from mlx_promptcache.names import NAMES
from mlx_promptcache.remote import by_stem
from mlx_promptcache.signatures import Trust
from mlx_promptcache.store import BLOCKS, SNAPSHOTS
from mlx_promptcache.tree import ID_DIGITS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from mlx_promptcache.arrivals import Arrival
    from mlx_promptcache.budget import Budget
    from mlx_promptcache.quarantine import Quarantine
    from mlx_promptcache.remote import Remote, RemoteFile
    from mlx_promptcache.store import Store

    Told = dict[str, tuple[str, str | None] | None]  # names: a stem, and who signed it
    Progress = Callable[[int, int], None]

log = logging.getLogger("mlx_promptcache")

BATCH_BYTES = 1 << 26  # of blocks that are fetched before they are added, all at once


class Receiver:
    """What comes from one remote into one store, for one fingerprint. It must be signed if the
    store has a file `trusted_keys`.
    """

    def __init__(
        self, store: Store, bad: Quarantine, fingerprint: str, budget: Budget, remote: Remote
    ) -> None:
        self._store, self._bad, self._fingerprint = store, bad, fingerprint
        self._budget, self._remote = budget, remote

    def pull(
        self, names: Sequence[str] = (), *, replace: bool = False, progress: Progress | None = None
    ) -> Moved:
        """Bring the states of these names here, and the names; or all that is there of this
        fingerprint. A name that stands for another state here is left alone unless `replace` is
        set; one that was asked for is an error then.

        Raises:
            CacheMiss: there is no such name there, or what it stands for cannot be used.
            RemoteError: the remote cannot be reached, or has no states of any model; what is here
                by then stays.
            StoreError, CacheLocked: as those of a save.
        """
        came = self.arrivals()
        named: Told = {name: self._remote.name(name) for name in names} or {**self._remote.names()}
        if not any(named.values()):
            self._check_place()
        for name in names:
            if named[name] is None:
                raise CacheMiss(f"there is no state named {name!r} at {self._remote.shown}")
        stems = {told[0] for told in named.values() if told is not None}
        shards = {stem[:2] for stem in stems} if names else None
        there = by_stem(self._remote.files(SNAPSHOTS, shards))
        wanted = sorted(stems & there.keys()) if names else sorted(there)
        here: dict[str, str] = {}
        try:
            for number, stem in enumerate(wanted):
                if (own := self._bring(came, there[stem])) is not None:
                    here[stem] = own
                if progress is not None:
                    progress(number + 1, len(wanted))
        finally:
            came.tell()
        forget_parts()
        told_names = self._take_names(came, named, here, names, replace=replace)
        before = max(len(came.used) - came.files, 0)
        return Moved(len(here), came.files, came.bytes, before, told_names, tuple(came.refused))

    def _check_place(self) -> None:
        """Tell a place without states of this model from one that is none at all."""
        if not self._remote.has_models():
            raise RemoteError(
                f"there are no states of any model at {self._remote.shown}: is that the right URL?"
            )
        if not self._remote.files(SNAPSHOTS):
            log.warning(
                "there are states of other models, and none of this one, at %s "
                "(weights and settings are to be the same)", self._remote.shown,
            )  # fmt: skip

    def arrivals(self) -> Arrivals:
        """What files from there go through. Raises SignatureError if trusted keys are no keys."""
        trust = Trust.of(self._store.directory)
        return Arrivals(self._store, self._bad, self._fingerprint, self._budget, trust)

    def _bring(self, came: Arrivals, candidates: Sequence[RemoteFile]) -> str | None:
        """Bring a state here, unless it is; return its stem here, None if it cannot be used."""
        if (own := self._here(candidates[0].stem)) is not None:
            refs = headers.snapshot_header(self._store, own).content["refs"]
            came.used |= {(SNAPSHOTS, own), *((BLOCKS, ref[0]) for ref in refs)}
            return own
        snapshot = came.fetch(self._remote, SNAPSHOTS, candidates)
        return None if snapshot is None else self.complete(came, snapshot)

    def _here(self, stem: str) -> str | None:
        """The stem that a state of there has here; None if it is not here, or not whole."""
        if self._store.exists(SNAPSHOTS, stem) and self._is_whole(stem):
            return stem
        alike = self._store.beginning(SNAPSHOTS, stem[:-ID_DIGITS])
        return next((own for own in alike if stem in self._stems_there(own)), None)

    def _stems_there(self, stem: str) -> set[str]:
        """The stems that a state of the store may have there; none if it is not whole."""
        with contextlib.suppress(PromptCacheError):
            snapshot = headers.snapshot_header(self._store, stem)
            forms = (exporter.pieces(self._store, snapshot, cut=cut) for cut in (False, True))
            return {as_there(snapshot, stem, pieces)[0] for pieces in forms}
        return set()

    def _is_whole(self, stem: str) -> bool:
        """Whether a snapshot and all its blocks are here."""
        with contextlib.suppress(PromptCacheError):
            refs = headers.snapshot_header(self._store, stem).content["refs"]
            return all(self._has(*ref[:2]) for ref in refs)
        return False

    def _has(self, stem: str, digest: str) -> bool:
        return headers.block_header(self._store, stem).digest == digest

    def complete(self, came: Arrivals, snapshot: Arrival) -> str | None:
        """Bring the blocks of a snapshot here, and then itself; return its stem here."""
        refs = snapshot.header.content["refs"]
        here = {ref[0]: came.local(ref[0], ref[1], ref[3]) for ref in refs}
        lacking = [ref for ref in refs if here[ref[0]] is None]
        there = by_stem(self._remote.files(BLOCKS, {ref[0][:2] for ref in lacking}))
        for batch in _sized([there.get(shared_stem(*ref[:2]), []) for ref in lacking]):
            blocks = self._remote.each(lambda c: came.fetch(self._remote, BLOCKS, c), batch)
            found = [block for block in blocks if block is not None]
            kept = [own.stem for own in here.values() if own is not None]
            here |= self._as_told(refs, came.add(found, kept))
            if len(found) < len(batch):
                break
        own = [here[ref[0]] for ref in refs]
        whole = [block for block in own if block is not None]
        came.used |= {(BLOCKS, block.stem) for block in whole}
        return came.complete(snapshot, whole) if len(whole) == len(refs) else None

    def bring_blocks(self, came: Arrivals, files: Sequence[RemoteFile]) -> None:
        """Bring blocks here. What cannot be used is left out, with a notice."""
        for batch in _sized([[file] for file in files]):
            blocks = self._remote.each(lambda c: came.fetch(self._remote, BLOCKS, c), batch)
            came.add([block for block in blocks if block is not None])

    def _as_told(self, refs: list[list[str]], added: dict[str, str]) -> dict[str, Own]:
        """What was added, by the stems that a snapshot uses."""
        return {
            ref[0]: Own(added[there], ref[1])
            for ref in refs
            if (there := shared_stem(*ref[:2])) in added
        }

    def _take_names(
        self,
        came: Arrivals,
        named: Told,
        here: dict[str, str],
        asked: Sequence[str],
        *,
        replace: bool,
    ) -> tuple[str, ...]:
        """Take over the names that can be, and return them. Raises CacheMiss if one that was asked
        for cannot.
        """
        told = {name: target for name, target in sorted(named.items()) if target is not None}
        why = {n: self._refusal(came, n, to, here, replace=replace) for n, to in told.items()}
        wrong = {name: reason for name, reason in why.items() if reason is not None}
        for name in sorted(wrong.keys() & set(asked)):
            raise CacheMiss(f"the name {name!r} cannot be taken over: {wrong[name]}")
        came.refused += [f"the name {n!r} was left out: {reason}" for n, reason in wrong.items()]
        for reason in dict.fromkeys(wrong.values()):
            names = [repr(name) for name, its in wrong.items() if its == reason]
            which = f"name {names[0]} was" if len(names) == 1 else f"names {', '.join(names)} were"
            log.warning("the %s left out: %s", which, reason)
        return tuple(name for name in told if name not in wrong)

    def _refusal(
        self,
        came: Arrivals,
        name: str,
        target: tuple[str, str | None],
        here: dict[str, str],
        *,
        replace: bool,
    ) -> str | None:
        """Take over a name, or return why it cannot be."""
        stem, signature = target
        if stem not in here:
            return "no state that can be used is there"
        if not came.trusts(NAMES, f"{name} {stem}", signature):
            return "nobody who is trusted signed it"
        try:
            self._take_name(name, here[stem], replace=replace)
        except StoreError as exc:
            return str(exc)
        return None

    def _take_name(self, name: str, stem: str, *, replace: bool) -> None:
        with self._store.adding(), self._store.shared():
            before = None if replace else self._standing_for(name)
            if before is not None and self._are_same(before, stem):
                return
            if before is not None:
                raise StoreError(
                    f"there is another state named {name!r} here: it stays (replace it with "
                    "--force)"
                )
            self._store.names.write(name, stem, sync=True)

    def _standing_for(self, name: str) -> str | None:
        """The state that has a name here; None if nobody can use it, or it is free."""
        try:
            stem = self._store.names.read(name)
        except CacheMiss:
            return None
        return stem if self._store.exists(SNAPSHOTS, stem) else None

    def _are_same(self, one: str, other: str) -> bool:
        return one == other or bool(self._stems_there(one) & self._stems_there(other))


def _sized(candidates: Sequence[list[RemoteFile]]) -> Iterator[list[list[RemoteFile]]]:
    """Blocks, as many at a time as are not too large together."""
    batch: list[list[RemoteFile]] = []
    size = 0
    for files in candidates:
        size += files[0].size if files else 0
        batch.append(files)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
