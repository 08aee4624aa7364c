"""A store and a remote: what one has and the other lacks goes there, and nothing else.

The names of files are keys of what is in them, so a list of names says what is missing, and a
transfer that was broken off goes on where it was.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections import Counter
from dataclasses import dataclass
from dataclasses import replace as replace_
from typing import TYPE_CHECKING, NamedTuple

from mlx_promptcache import arrivals, catalog, container, exporter, headers, hub
from mlx_promptcache.arrivals import Arrivals, Own, plain_stem, shared_stem
from mlx_promptcache.errors import CacheMiss, PromptCacheError, RemoteError, StoreError
from mlx_promptcache.hub import HubRemote
from mlx_promptcache.names import NAMES
from mlx_promptcache.remote import Remote
from mlx_promptcache.signatures import Trust
from mlx_promptcache.store import BLOCKS, SNAPSHOTS
from mlx_promptcache.tree import ID_DIGITS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from mlx_promptcache.arrivals import Arrival
    from mlx_promptcache.budget import Budget
    from mlx_promptcache.container import Header
    from mlx_promptcache.exporter import Piece
    from mlx_promptcache.quarantine import Quarantine
    from mlx_promptcache.remote import RemoteFile
    from mlx_promptcache.signatures import Signer
    from mlx_promptcache.store import Store

    Told = dict[str, tuple[str, str | None] | None]  # names: a stem, and who signed it
    Progress = Callable[[int, int], None]

log = logging.getLogger("mlx_promptcache")

BATCH_BYTES = 1 << 26  # of blocks that are fetched before they are added, all at once


@dataclass(frozen=True)
class Moved:
    """What went from a store to a remote, or back. `shared` files were there already; `refused`
    says why others were not used.
    """

    states: int
    files: int
    bytes: int
    shared: int
    names: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()


def remote_at(url: str, fingerprint: str) -> Remote:
    """The remote of a URL."""
    return (HubRemote if url.startswith(hub.SCHEME) else Remote)(url, fingerprint)


class _File(NamedTuple):
    """A file that is to be there: its kind, its stem there, and its bytes, checked."""

    kind: str
    stem: str
    read: Callable[[], bytes]


@dataclass(frozen=True)
class _State:
    """A snapshot as it is there, and the files that it needs."""

    stem: str
    files: list[_File]


class _Forms(NamedTuple):
    """One state as it may be there: with blocks that go on after it, or with its own rows alone.
    `whole` are the stems of what is there when `sent` is.
    """

    sent: _State
    whole: set[str]
    stems: set[str]


class Sharing:
    """What goes between one store and one remote, for one fingerprint.

    `signer` signs what goes there. What comes from there must be signed if the store has a file
    `trusted_keys`.
    """

    def __init__(
        self,
        store: Store,
        bad: Quarantine,
        fingerprint: str,
        budget: Budget,
        remote: Remote,
        *,
        signer: Signer | None = None,
    ) -> None:
        self.store, self._bad, self._fingerprint = store, bad, fingerprint
        self._budget, self.remote, self._signer = budget, remote, signer

    # There

    def push(
        self, names: Sequence[str] = (), *, replace: bool = False, progress: Progress | None = None
    ) -> Moved:
        """Bring the states of these names there, and the names; or all states of this fingerprint.

        Of a block that other prompts use, too, only the rows of a state that was asked for go. A
        state that is there in one form or the other is there. A name that stands for something
        else there is left alone unless `replace` is set.

        Raises:
            CacheMiss: there is no such state, or it is damaged.
            RemoteError: the remote cannot be reached, or refuses; what is there by then stays.
            CacheLocked, StoreError: the store cannot be read.
        """
        with self.store.shared():
            named = self.store.names.all()
            chosen = {n: catalog.find(self.store, n)[0] for n in names} or self._all(named)
            states = {stem: self._state(stem, cut=bool(names)) for stem in set(chosen.values())}
        self._check_ours(names, states, chosen)
        there = self._there(states.values())
        forms = self._forms(states, there, cut=bool(names))
        moved = self._send(forms, there, progress)
        told = [
            name
            for name, stem in chosen.items()
            if stem in forms and name in named and self._name(name, forms[stem], replace=replace)
        ]
        self.remote.flush()
        return replace_(moved, names=tuple(sorted(told)))

    def send(self, stems: Iterable[str]) -> Moved:
        """Bring the states of these snapshots there, whole. Raises as `push` does."""
        with self.store.shared():
            states = {stem: self._state(stem, cut=False) for stem in stems}
        there = self._there(states.values())
        return self._send(self._forms(states, there, cut=False), there, None)

    def _all(self, named: dict[str, str]) -> dict[str, str]:
        """All snapshots of the store by their names, or by their own stems."""
        by_stem = {stem: name for name, stem in named.items()}
        return {by_stem.get(stem, stem): stem for stem in self.store.stems(SNAPSHOTS)}

    def _check_ours(
        self, names: Sequence[str], states: dict[str, _State | None], chosen: dict[str, str]
    ) -> None:
        for name in names:
            if states[chosen[name]] is None:
                raise CacheMiss(
                    f"the state {name!r} was made by another model, or with other settings: push "
                    "it with those"
                )

    def _state(self, stem: str, *, cut: bool) -> _State | None:
        """What a state needs there; None if it is another model's, or not whole any more and was
        not asked for.
        """
        try:
            snapshot = headers.snapshot_header(self.store, stem)
            if snapshot.content["fingerprint"] != self._fingerprint:
                return None
            pieces = exporter.pieces(self.store, snapshot, cut=cut)
        except CacheMiss:
            if cut:
                raise
            return None
        own, named = _as_there(snapshot, stem, pieces)

        def read() -> bytes:
            data = exporter.file_of(self.store, SNAPSHOTS, stem, snapshot)
            if own == stem:
                return data
            arrays = data[len(data) - snapshot.stored_bytes :]
            return b"".join(container.repacked(named, [arrays]).chunks)

        files = [
            _File(
                BLOCKS, shared_stem(p.stem, p.header.digest), functools.partial(p.data, self.store)
            )
            for p in pieces
        ]
        return _State(own, [*files, _File(SNAPSHOTS, own, read)])

    def _there(self, states: Iterable[_State | None]) -> set[tuple[str, str]]:
        """What is there in the directories of these states, each by its kind and stem."""
        wanted = {(f.kind, f.stem[:2]) for state in states if state for f in state.files}
        return {
            (kind, file.stem)
            for kind in (BLOCKS, SNAPSHOTS)
            for file in self.remote.files(kind, {shard for k, shard in wanted if k == kind})
            if self._signer is None or file.signature is not None
        }

    def _forms(
        self, states: dict[str, _State | None], there: set[tuple[str, str]], *, cut: bool
    ) -> dict[str, _Forms]:
        """The form in which each state goes: that which is there already, if one is."""
        alike = Counter(stem[:-ID_DIGITS] for kind, stem in there if kind == SNAPSHOTS)
        found = {}
        for stem, state in states.items():
            if state is None:
                continue
            forms = [state]
            if alike[stem[:-ID_DIGITS]] > ((SNAPSHOTS, state.stem) in there):
                forms += self._other_form(stem, cut=not cut)
            whole = [form for form in forms if {(f.kind, f.stem) for f in form.files} <= there]
            sent = next(iter(whole), state)
            stems = {form.stem for form in forms}
            found[stem] = _Forms(sent, {sent.stem, *(form.stem for form in whole)}, stems)
        return found

    def _other_form(self, stem: str, *, cut: bool) -> Iterator[_State]:
        with self.store.shared(), contextlib.suppress(CacheMiss):
            if (state := self._state(stem, cut=cut)) is not None:
                yield state

    def _send(
        self,
        forms: dict[str, _Forms],
        there: set[tuple[str, str]],
        progress: Progress | None,
    ) -> Moved:
        """Write what is not there, blocks first."""
        states = {form.sent.stem: form.sent for form in forms.values()}
        wanted = {(f.kind, f.stem): f for state in states.values() for f in state.files}
        missing = [file for place, file in wanted.items() if place not in there]
        done = 0
        sizes: list[int] = []
        for kind in (BLOCKS, SNAPSHOTS):  # a state is there when all that it needs is
            for batch in _batches([file for file in missing if file.kind == kind]):
                sizes += self.remote.each(self._write, batch)
                self.remote.flush()
                done += len(batch)
                if progress is not None:
                    progress(done, len(missing))
        return Moved(len(forms), len(missing), sum(sizes), len(wanted) - len(missing))

    def _write(self, file: _File) -> int:
        try:
            data = file.read()
        except CacheMiss as exc:  # deleted, or damaged: whoever fetches the state sees a miss
            log.warning("a file is not shared: %s", exc)
            return 0
        self.remote.write(file.kind, file.stem, self._signature(file.kind, file.stem, data), data)
        return len(data)

    def _signature(self, kind: str, stem: str, data: bytes) -> str | None:
        if self._signer is None:
            return None
        seal = container.read_seal(lambda at, count: data[at : at + count], len(data))
        return self._signer.sign(kind, stem, seal)

    def _name(self, name: str, forms: _Forms, *, replace: bool) -> bool:
        """Give the name to a state there, unless it is another's."""
        before = self.remote.name(name)
        stem = forms.sent.stem
        if before is not None and not replace:
            if before[0] not in forms.stems:
                log.warning(
                    "there is another state named %r at %s: it stays (replace it with --force)",
                    name, self.remote.shown,
                )  # fmt: skip
                return False
            stem = before[0] if before[0] in forms.whole else stem
        signer = self._signer
        signature = None if signer is None else signer.sign(NAMES, f"{name} {stem}", b"")
        same = before is not None and before[0] == stem and (before[1] or not signature)
        if replace or not same:
            self.remote.write_name(name, stem, signature)
        return True

    # From there

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
        named: Told = {name: self.remote.name(name) for name in names} or {**self.remote.names()}
        if not any(named.values()):
            self._check_place()
        for name in names:
            if named[name] is None:
                raise CacheMiss(f"there is no state named {name!r} at {self.remote.shown}")
        stems = {told[0] for told in named.values() if told is not None}
        shards = {stem[:2] for stem in stems} if names else None
        there = by_stem(self.remote.files(SNAPSHOTS, shards))
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
        arrivals.forget_parts()
        told_names = self._take_names(came, named, here, names, replace=replace)
        before = max(len(came.used) - came.files, 0)
        return Moved(len(here), came.files, came.bytes, before, told_names, tuple(came.refused))

    def _check_place(self) -> None:
        """Tell a place without states of this model from one that is none at all."""
        if not self.remote.has_models():
            raise RemoteError(
                f"there are no states of any model at {self.remote.shown}: is that the right URL?"
            )
        if not self.remote.files(SNAPSHOTS):
            log.warning(
                "there are states of other models, and none of this one, at %s "
                "(weights and settings are to be the same)", self.remote.shown,
            )  # fmt: skip

    def arrivals(self) -> Arrivals:
        """What files from there go through. Raises SignatureError if trusted keys are no keys."""
        trust = Trust.of(self.store.directory)
        return Arrivals(self.store, self._bad, self._fingerprint, self._budget, trust)

    def _bring(self, came: Arrivals, candidates: Sequence[RemoteFile]) -> str | None:
        """Bring a state here, unless it is; return its stem here, None if it cannot be used."""
        if (own := self._here(candidates[0].stem)) is not None:
            refs = headers.snapshot_header(self.store, own).content["refs"]
            came.used |= {(SNAPSHOTS, own), *((BLOCKS, ref[0]) for ref in refs)}
            return own
        snapshot = came.fetch(self.remote, SNAPSHOTS, candidates)
        return None if snapshot is None else self.complete(came, snapshot)

    def _here(self, stem: str) -> str | None:
        """The stem that a state of there has here; None if it is not here, or not whole."""
        if self.store.exists(SNAPSHOTS, stem) and self._is_whole(stem):
            return stem
        alike = self.store.beginning(SNAPSHOTS, stem[:-ID_DIGITS])
        return next((own for own in alike if stem in self._stems_there(own)), None)

    def _stems_there(self, stem: str) -> set[str]:
        """The stems that a state of the store may have there; none if it is not whole."""
        with contextlib.suppress(PromptCacheError):
            snapshot = headers.snapshot_header(self.store, stem)
            forms = (exporter.pieces(self.store, snapshot, cut=cut) for cut in (False, True))
            return {_as_there(snapshot, stem, pieces)[0] for pieces in forms}
        return set()

    def _is_whole(self, stem: str) -> bool:
        """Whether a snapshot and all its blocks are here."""
        with contextlib.suppress(PromptCacheError):
            refs = headers.snapshot_header(self.store, stem).content["refs"]
            return all(self._has(*ref[:2]) for ref in refs)
        return False

    def _has(self, stem: str, digest: str) -> bool:
        return headers.block_header(self.store, stem).digest == digest

    def complete(self, came: Arrivals, snapshot: Arrival) -> str | None:
        """Bring the blocks of a snapshot here, and then itself; return its stem here."""
        refs = snapshot.header.content["refs"]
        here = {ref[0]: came.local(ref[0], ref[1], ref[3]) for ref in refs}
        lacking = [ref for ref in refs if here[ref[0]] is None]
        there = by_stem(self.remote.files(BLOCKS, {ref[0][:2] for ref in lacking}))
        for batch in _sized([there.get(shared_stem(*ref[:2]), []) for ref in lacking]):
            blocks = self.remote.each(lambda c: came.fetch(self.remote, BLOCKS, c), batch)
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
            blocks = self.remote.each(lambda c: came.fetch(self.remote, BLOCKS, c), batch)
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
        with self.store.adding(), self.store.shared():
            before = None if replace else self._standing_for(name)
            if before is not None and self._are_same(before, stem):
                return
            if before is not None:
                raise StoreError(
                    f"there is another state named {name!r} here: it stays (replace it with "
                    "--force)"
                )
            self.store.names.write(name, stem, sync=True)

    def _standing_for(self, name: str) -> str | None:
        """The state that has a name here; None if nobody can use it, or it is free."""
        try:
            stem = self.store.names.read(name)
        except CacheMiss:
            return None
        return stem if self.store.exists(SNAPSHOTS, stem) else None

    def _are_same(self, one: str, other: str) -> bool:
        return one == other or bool(self._stems_there(one) & self._stems_there(other))


def _as_there(snapshot: Header, stem: str, pieces: Sequence[Piece]) -> tuple[str, Header]:
    """A snapshot as it is there, and its stem: a block has a variant where another has its name,
    which is not so in every store.
    """
    blocks = [(plain_stem(piece.stem), piece.header.digest) for piece in pieces]
    return headers.using(snapshot, stem, blocks)


def by_stem(files: Iterable[RemoteFile]) -> dict[str, list[RemoteFile]]:
    """Files by their stems: other people sign the same file, too."""
    found: dict[str, list[RemoteFile]] = {}
    for file in files:
        found.setdefault(file.stem, []).append(file)
    return found


def _batches(files: Sequence[_File], most: int = 64) -> Iterator[Sequence[_File]]:
    for begin in range(0, len(files), most):
        yield files[begin : begin + most]


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
