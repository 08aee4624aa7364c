"""The sender: states of a store that a remote lacks go there, blocks first.

The names of files are keys of what is in them, so a list of names says what is missing, and a
transfer that was broken off goes on where it was.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from mlx_promptcache import catalog, container, exporter, headers
from mlx_promptcache.arrivals import as_there, shared_stem
from mlx_promptcache.errors import CacheMiss
from mlx_promptcache.moved import Moved
from mlx_promptcache.names import NAMES
from mlx_promptcache.store import BLOCKS, SNAPSHOTS
from mlx_promptcache.tree import ID_DIGITS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from mlx_promptcache.remote import Remote
    from mlx_promptcache.signatures import Signer
    from mlx_promptcache.store import Store

    Progress = Callable[[int, int], None]

log = logging.getLogger("mlx_promptcache")


class _File(NamedTuple):
    """A file that is to be there: its kind, its stem there, and its bytes, checked."""

    kind: str
    stem: str
    read: Callable[[], bytes]


class _State(NamedTuple):
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


class Sender:
    """What goes from one store to one remote, for one fingerprint. A `signer` signs it."""

    def __init__(
        self, store: Store, fingerprint: str, remote: Remote, signer: Signer | None
    ) -> None:
        self._store, self._fingerprint = store, fingerprint
        self._remote, self._signer = remote, signer

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
        with self._store.shared():
            named = self._store.names.all()
            chosen = {n: catalog.find(self._store, n)[0] for n in names} or self._all(named)
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
        self._remote.flush()
        return moved._replace(names=tuple(sorted(told)))

    def send(self, stems: Iterable[str]) -> Moved:
        """Bring the states of these snapshots there, whole. Raises as `push` does."""
        with self._store.shared():
            states = {stem: self._state(stem, cut=False) for stem in stems}
        there = self._there(states.values())
        return self._send(self._forms(states, there, cut=False), there, None)

    def _all(self, named: dict[str, str]) -> dict[str, str]:
        """All snapshots of the store by their names, or by their own stems."""
        by_stem = {stem: name for name, stem in named.items()}
        return {by_stem.get(stem, stem): stem for stem in self._store.stems(SNAPSHOTS)}

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
            snapshot = headers.snapshot_header(self._store, stem)
            if snapshot.content["fingerprint"] != self._fingerprint:
                return None
            pieces = exporter.pieces(self._store, snapshot, cut=cut)
        except CacheMiss:
            if cut:
                raise
            return None
        own, named = as_there(snapshot, stem, pieces)

        def read() -> bytes:
            data = exporter.file_of(self._store, SNAPSHOTS, stem, snapshot)
            if own == stem:
                return data
            arrays = data[len(data) - snapshot.stored_bytes :]
            return b"".join(container.repacked(named, [arrays]).chunks)

        files = [
            _File(
                BLOCKS, shared_stem(p.stem, p.header.digest), functools.partial(p.data, self._store)
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
            for file in self._remote.files(kind, {shard for k, shard in wanted if k == kind})
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
        with self._store.shared(), contextlib.suppress(CacheMiss):
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
                sizes += self._remote.each(self._write, batch)
                self._remote.flush()
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
        self._remote.write(file.kind, file.stem, self._signature(file.kind, file.stem, data), data)
        return len(data)

    def _signature(self, kind: str, stem: str, data: bytes) -> str | None:
        if self._signer is None:
            return None
        seal = container.read_seal(lambda at, count: data[at : at + count], len(data))
        return self._signer.sign(kind, stem, seal)

    def _name(self, name: str, forms: _Forms, *, replace: bool) -> bool:
        """Give the name to a state there, unless it is another's."""
        before = self._remote.name(name)
        stem = forms.sent.stem
        if before is not None and not replace:
            if before[0] not in forms.stems:
                log.warning(
                    "there is another state named %r at %s: it stays (replace it with --force)",
                    name, self._remote.shown,
                )  # fmt: skip
                return False
            stem = before[0] if before[0] in forms.whole else stem
        signer = self._signer
        signature = None if signer is None else signer.sign(NAMES, f"{name} {stem}", b"")
        same = before is not None and before[0] == stem and (before[1] or not signature)
        if replace or not same:
            self._remote.write_name(name, stem, signature)
        return True


def _batches(files: Sequence[_File], most: int = 64) -> Iterator[Sequence[_File]]:
    for begin in range(0, len(files), most):
        yield files[begin : begin + most]
