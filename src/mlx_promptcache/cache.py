"""PromptCache: states by name and by longest prefix, on disk.

On the way of a generation (`match`, `resume`, `fetch`) nothing raises for what is on disk: a file
that is damaged is moved aside with a notice (the log `mlx_promptcache`), and the search begins
again without it. An explicit `load` or `save` raises.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_promptcache import headers, places
from mlx_promptcache.ahead import Ahead
from mlx_promptcache.blueprint import Blueprint
from mlx_promptcache.budget import Budget
from mlx_promptcache.errors import (
    CacheMiss,
    DamagedFile,
    NotQuantisable,
    PromptCacheError,
    StoreError,
    UnsupportedLayer,
)
from mlx_promptcache.finder import Finder
from mlx_promptcache.fingerprint import Fingerprint, KVSettings
from mlx_promptcache.layers import make_layers
from mlx_promptcache.lent import Lent
from mlx_promptcache.loader import Loader
from mlx_promptcache.match import Match, Matcher
from mlx_promptcache.names import check_name
from mlx_promptcache.quarantine import BadFile, Quarantine
from mlx_promptcache.rates import Rates
from mlx_promptcache.restorer import Restorer, Resumed, record_use, touch
from mlx_promptcache.state import Origin, Ref, State, Trail
from mlx_promptcache.store import BLOCKS, SNAPSHOTS, Store
from mlx_promptcache.synced import Synced
from mlx_promptcache.tokenizer_store import TokenizerStore
from mlx_promptcache.tree import Keys, id_of

if TYPE_CHECKING:
    import builtins
    import os
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from mlx_promptcache.catalog import Entry
    from mlx_promptcache.container import Header
    from mlx_promptcache.deletion import Deletion
    from mlx_promptcache.exporter import Exported
    from mlx_promptcache.passes import Plan
    from mlx_promptcache.saver import Saver
    from mlx_promptcache.sharing import Sharing
    from mlx_promptcache.signatures import Signer
    from mlx_promptcache.supply import Supply
    from mlx_promptcache.verification import Report
    from mlx_promptcache.writer import Saved

log = logging.getLogger("mlx_promptcache")


class PromptCache:
    """The states of one fingerprint in one store. Making the object touches no file.

    `fingerprint` may be any string, for a model made in memory. A `read_only` cache writes nothing
    at all: no states, no statistics, and damaged files stay where they are; so is every cache where
    the environment has `MLX_PROMPTCACHE_READ_ONLY`. `max_bytes` is what the store may take on disk
    when this cache adds to it (see `Budget`, also for the default). A store that belongs to another
    user is a miss on the way of a generation and an error (ForeignStore) elsewhere, unless
    `allow_foreign` is set.

    Raises:
        StoreError: the environment's `MLX_PROMPTCACHE_MAX_SIZE` is no size.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        fingerprint: Fingerprint | str,
        *,
        kv: KVSettings | None = None,
        read_only: bool = False,
        max_bytes: int | None = None,
        allow_foreign: bool = False,
    ) -> None:
        if isinstance(fingerprint, str):
            fingerprint = Fingerprint.of_text(fingerprint)
        self.kv = kv or KVSettings()
        self.fingerprint = fingerprint.with_kv(self.kv)
        self.read_only = read_only or places.writing_is_off()
        self.budget = Budget.chosen(max_bytes)
        self._blueprint: Blueprint | None = None
        self._store = Store(directory, allow_foreign=allow_foreign, read_only=self.read_only)
        self._bad = Quarantine(self._store, read_only=self.read_only)
        self._finder = Finder(self._store, self.fingerprint, self.kv, self._bad)
        self.supply: Supply | None = None
        """A remote that is asked for what is not here, and gets what is kept; see `attach`."""
        self.checks: list[Callable[[], None]] = []
        """What must hold for a state to be stored: each raises a StoreError where it does not."""
        self._attached: tuple[str, Signer | None, float] | None = None
        self._ahead = Ahead()
        self._synced = Synced(self._store)
        self._lent = Lent(self.kv)

    def __repr__(self) -> str:
        return f"PromptCache({str(self.directory)!r}, {self.fingerprint.digest[:8]})"

    @property
    def directory(self) -> Path:
        """Where the store is."""
        return self._store.directory

    @property
    def blueprint(self) -> Blueprint | None:
        """What the model's layers look like, once that is known: files are compared with it."""
        return self._blueprint

    @blueprint.setter
    def blueprint(self, blueprint: Blueprint | None) -> None:
        self._blueprint = blueprint
        self._finder.quantises = blueprint is None or blueprint.quantises

    @property
    def _cuts_matter(self) -> bool:
        return self._blueprint is not None and self._blueprint.cuts_matter

    def with_kv(self, kv: KVSettings) -> PromptCache:
        """The same store for the same model with other KV settings."""
        return self if kv == self.kv else self._like(self._other(self.fingerprint, kv))

    def with_salt(self, salt: str) -> PromptCache:
        """The same store for the same model in another private namespace."""
        cache = self._other(self.fingerprint.with_salt(salt), self.kv)
        cache.blueprint = self.blueprint
        return self._like(cache)

    def _other(self, fingerprint: Fingerprint, kv: KVSettings) -> PromptCache:
        """A cache of the same kind in the same store."""
        return PromptCache(
            self.directory, fingerprint, kv=kv, read_only=self.read_only,
            max_bytes=self.budget.max_bytes, allow_foreign=self._store.allow_foreign,
        )  # fmt: skip

    def _like(self, other: PromptCache) -> PromptCache:
        """Another cache, with the remote and the checks of this one."""
        other.checks = self.checks
        if self._attached is not None:
            url, signer, seconds = self._attached
            other.attach(url, signer=signer, seconds=seconds)
        return other

    @property
    def rates(self) -> Rates:
        """How fast this machine reads this store, and computes this fingerprint's prompts."""
        return Rates(self.directory, self.fingerprint.digest)

    @property
    def tokenizers(self) -> TokenizerStore:
        """The tokenizers that are kept beside the states."""
        return TokenizerStore(self._store, self._bad, self.budget)

    # By longest prefix

    def match(
        self, tokens: Sequence[int], *, plan: Plan | None = None, limit: int | None = None
    ) -> Match:
        """Say how much of these tokens is stored; reads headers, no K/V.

        With `plan` only what that run's own passes would have computed counts (`--exact`); with
        `limit` at most so many tokens.
        """
        return Matcher(self._finder).look_up(tokens, plan, limit)[0]

    def explain(self, tokens: Sequence[int], *, plan: Plan | None = None) -> Match:
        """As `match`, with a reason that names the stored state which agrees for the longest: for
        that the headers of all states are looked at, or what lists remember of them.
        """
        return Matcher(self._finder).explained(tokens, plan)

    def resume(
        self,
        tokens: Sequence[int],
        model: Any,
        *,
        plan: Plan | None = None,
        limit: int | None = None,
        later: bool = False,
    ) -> Resumed:
        """Return the state of the longest stored prefix of these tokens, in fresh layers.

        The state's own `contents` are empty: they are in the layers. At the whole prompt the state
        has logits; at a shorter prefix it may have none. Its key and its sampling are those of
        another run. With `limit` it holds at most so many tokens. With `later` the rows of an
        exact hit are not read yet, if rows are all that the layers hold: the next token does not
        need them.

        What is damaged, locked, cannot be read or does not fit the model is a miss with a notice.
        """
        try:
            self.bring(tokens, plan=plan, limit=limit)
        except PromptCacheError as exc:
            self._ahead.clear()
            return _unused(exc)
        return self.restore(tokens, model, plan=plan, limit=limit, later=later)

    def restore(
        self,
        tokens: Sequence[int],
        model: Any,
        *,
        plan: Plan | None = None,
        limit: int | None = None,
        later: bool = False,
    ) -> Resumed:
        """As `resume`, of what is here: a remote was asked already, with `bring`."""
        try:
            with self._store.shared():
                if self.blueprint is None:
                    self.blueprint = Blueprint.of(model, self.kv)
                restorer = Restorer(
                    self._finder, self.blueprint, self.rates, self._ahead,
                    records=not self.read_only,
                )  # fmt: skip
                resumed = restorer.restore(tokens, model, plan, limit, later=later)
        except PromptCacheError as exc:
            resumed = _unused(exc)
        if not callable(resumed.layers):  # who reads them later may take it yet
            self._ahead.clear()
        return resumed

    def expect(self, rows: int | None = None) -> None:
        """Begin to make room for a state of so many rows, without a number for as many as the one
        had that was used last: a prefix is mostly asked for again and again. It is worth calling
        where a core has nothing to do before `resume`, in the main thread. No answer changes; it is
        memory that is taken sooner, at most 256 MiB, and in vain where another state is found. Then
        it is given back by `resume`; with `later`, when the rows are read.
        """
        count = self._store.uses.last_rows() if rows is None else rows
        if count and self.blueprint is not None:
            self._ahead.make(self.blueprint.sliceable_rows, count)

    def bring(
        self, tokens: Sequence[int], *, plan: Plan | None = None, limit: int | None = None
    ) -> None:
        """Bring what these tokens could use from a remote that is attached, in bounded time; what
        cannot be had is a notice. Raises StoreError, CacheLocked: the store cannot be read.
        """
        if self.supply is None:
            return
        with self._store.shared():
            found = self._finder.find(tokens, plan, limit)
        goal = tokens if limit is None else tokens[:limit]
        if not found.exact and found.position < len(goal):
            for phase in self.kv.phases:
                self.supply.bring(self._finder.root(phase), goal, found.position)

    # By name

    def load(self, name: str) -> State:
        """Return the state of a name, or of a snapshot's id.

        Raises:
            CacheMiss: there is none, it was made by another model or with other settings, it does
                not fit the model's layers, or it is damaged; `.reason` says which.
        """
        with self._store.shared():
            stem, _ = self._own(name)
            try:
                state = Loader(self._finder, self.blueprint).snapshot(stem)
            except BadFile as exc:
                if isinstance(exc.__cause__, UnsupportedLayer):  # of another release of mlx-lm
                    raise CacheMiss(
                        f"the state {name!r} does not fit: {exc}; save it again"
                    ) from exc
                raise DamagedFile(f"the state {name!r} is damaged: {exc}; save it again") from exc
            if not self.read_only:
                record_use(self._store, stem, stem, state)
            return state

    def origin(self, name: str) -> Origin:
        """How the state of a name, or of a snapshot's id, was made; reads one header.

        Raises:
            CacheMiss: there is none, it is damaged, or it was made by another model or with other
                settings.
        """
        with self._store.shared():
            return Origin.from_json(self._own(name)[1].content["origin"])

    def snapshot(self, name: str) -> str | None:
        """The id of the snapshot that a name stands for; None if the name is free.

        Raises:
            DamagedFile: the name is there, and cannot be read.
        """
        try:
            return id_of(self._store.names.read(name))
        except DamagedFile:
            raise
        except CacheMiss:
            return None

    def check_free(self, name: str, tokens: Sequence[int]) -> None:
        """Raise StoreError if a name stands for a state of other tokens."""
        from mlx_promptcache.writer import check_free

        root = self._finder.root(self.kv.phase_at(len(tokens)))
        check_free(self._store, name, Keys(root, tokens)[len(tokens)])

    def link(self, name: str, other: str, *, replace: bool = False) -> None:
        """Let a name stand for the state of another name, or of a snapshot's id, from now on. No
        row is read, and nothing but the name is written.

        Raises:
            CacheMiss: there is no such state of this model.
            StoreError: the name is taken, and it is not to be replaced; or the file system refuses.
            CacheLocked: somebody deletes, and does not come to an end.
        """
        self._store.allow()
        self._store.check_writable()
        check_name(name)
        with self._store.shared():
            if not replace and self.snapshot(name) is not None:
                raise StoreError(f"there is another state named {name!r}; choose another name")
            stem, header = self._own(other)
            blocks = [(BLOCKS, str(ref[0])) for ref in header.content["refs"]]
            self._synced.sync([*blocks, (SNAPSHOTS, stem)])
            self._store.names.write(name, stem, sync=True)

    def _own(self, name: str) -> tuple[str, Header]:
        """The snapshot of a name or of an id, if it is of this model. Raises CacheMiss."""
        from mlx_promptcache import catalog

        stem, header = catalog.find(self._store, name)
        if header.content["fingerprint"] != self.fingerprint.digest:
            parts = headers.fingerprint_parts(header)
            chosen = not set(self.fingerprint.differences(parts)) & set(catalog.STALE_PARTS)
            advice = "give the options that it was made with" if chosen else "save it again"
            told = self.fingerprint.explain(parts)
            raise CacheMiss(f"the state {name!r} was made with {told}; {advice}")
        return stem, header

    def save(
        self,
        name: str | None,
        state: State,
        *,
        replace: bool = False,
        sync: bool = True,
        exact: bool = False,
    ) -> Saved:
        """Store a state, under a name if one is given.

        Only what is not stored yet is written: blocks of rows, then the snapshot, then the name.
        With `sync` all of it is on the drive when this returns. A name that stands for other tokens
        is an error unless `replace` is set; its state stays, without a name. With `exact`, rows
        that other passes computed are stored again, as this state's own passes did.

        Raises:
            StoreError: the name cannot be one or is taken, there is no room within the budget, or
                the file system refuses.
            CacheLocked: somebody adds to the store or deletes from it, and does not come to an end.
        """
        with self._writing(state, asked_for=True):
            exact = exact or self._cuts_matter
            saver = self._saver(state, exact=exact, sync=sync, synced=self._synced)
            saved = saver.save(name, replace=replace)
        return self._sent(saved)

    def _saver(
        self, state: State, *, exact: bool, sync: bool = False, synced: Synced | None = None
    ) -> Saver:
        from mlx_promptcache.saver import Saver  # an answer does not wait for it

        return Saver(self._finder, state, sync=sync, exact=exact, synced=synced)

    def _sent(self, saved: Saved) -> Saved:
        if self.supply is not None and saved.snapshots:
            self.supply.send(saved.snapshots)
        return saved

    def keep(self, state: State, *, exact: bool = False) -> Saved:
        """Store a state for prompts to come, without a name, and leave the syncing to the system.

        Where a state of the same tokens is stored, that one serves: its logits are the same, and
        its key and sampling are not used by prompts. Raises as `save` does.
        """
        saver = self._saver(state, exact=exact or self._cuts_matter)
        with self._store.shared():
            kept = None if self.read_only else saver.kept()
        if kept is not None:
            return kept
        with self._writing(state):
            saved = saver.save(None, share=True)
        return self._sent(saved)

    @contextlib.contextmanager
    def _writing(self, state: State, *, asked_for: bool = False) -> Iterator[None]:
        self._store.allow()
        self._store.check_writable()
        if not state.contents:
            raise StoreError("this state's rows are in layers: take the state from a run")
        if state.fingerprint not in {"", self.fingerprint.digest}:
            raise StoreError(
                "this state was computed by another model, or with other settings: compute it again"
            )
        for check in self.checks:
            check()
        from mlx_promptcache import room
        from mlx_promptcache.saver import most_bytes

        self._store.create()
        kept, made_for = {ref.stem for ref in state.trail.refs}, 0
        with self._store.adding(), contextlib.ExitStack() as stack:
            # What it stands on may have been evicted since, also while room was made.
            while (needed := most_bytes(state, self._stored(state))) > made_for:
                stack.close()
                room.make(self._store, self.budget, needed, kept=kept, asked_for=asked_for)
                stack.enter_context(self._store.shared())
                made_for = needed
            yield

    def _stored(self, state: State) -> int:
        """How many of a state's first tokens stand in the blocks that it came from."""
        there = itertools.takewhile(
            lambda ref: self._finder.is_there(ref.stem, ref.digest), state.trail.refs
        )
        return max((ref.end for ref in there), default=0)

    # In files of their own

    def export(self, name: str, path: str | os.PathLike[str], *, replace: bool = False) -> Exported:
        """Write the state of a name, or of a snapshot's id, to a file for `import_file`; over
        another file only with `replace`.

        Raises:
            CacheMiss: there is no such state, or it is damaged.
            StoreError: there is such a file, or the file system refuses.
        """
        from mlx_promptcache import exporter

        return exporter.export(self._store, name, Path(path), replace_file=replace)

    def import_file(
        self, path: str | os.PathLike[str], name: str | None = None, *, replace: bool = False
    ) -> Saved:
        """Store the state of a file that `export` wrote, under this name or the one that it had.

        Raises:
            CacheMiss: it was made by another model or with other settings; DamagedFile if it is
                not what was written.
            StoreError, CacheLocked: as `save` does.
        """
        from mlx_promptcache import importer

        self._store.check_writable()
        return importer.add(
            Path(path), self._store, self._bad, self.fingerprint, self.budget,
            name=name, replace=replace,
        )[0]  # fmt: skip

    # Shared with other machines

    def sharing(self, url: str, *, signer: Signer | None = None) -> Sharing:
        """What pushes states to a URL, and pulls them from there; a signer signs what is pushed."""
        from mlx_promptcache.sharing import Sharing, remote_at  # no first token waits for it

        digest = self.fingerprint.digest
        remote = remote_at(url, digest)
        return Sharing(self._store, self._bad, digest, self.budget, remote, signer=signer)

    def attach(self, url: str, *, signer: Signer | None = None, seconds: float = 5.0) -> None:
        """Ask a URL for what is not here, from now on, and send what is kept there, in the
        background. A prompt waits for it at most so many seconds, and no longer than computing
        would take; whatever is wrong with it is a notice. `supply.close()` waits for the rest.
        """
        from mlx_promptcache.supply import Supply

        sharing, digest = self.sharing(url, signer=signer), self.fingerprint.digest
        self._attached = url, signer, seconds
        self.supply = Supply(sharing, digest, seconds=seconds, read_only=self.read_only)

    # For programs that keep mlx-lm's own loop

    def fetch(self, model: Any, tokens: Sequence[int]) -> tuple[list[Any], builtins.list[int]]:
        """Return mlx-lm cache objects that hold the longest stored prefix, and the tokens (at least
        one) that are still to be processed. A model whose states cannot be kept is a miss.

        Raises:
            NotQuantisable: mlx-lm cannot quantise its layers as the settings ask for.
        """
        tokens = [int(token) for token in tokens]
        if not tokens:
            return make_layers(model, self.kv), tokens
        try:
            self.blueprint = Blueprint.of(model, self.kv)
        except NotQuantisable:
            raise
        except UnsupportedLayer as exc:
            log.warning("states of this model cannot be kept: %s", exc)
            return make_layers(model, self.kv), tokens
        if self._cuts_matter:  # and where the caller cuts is not known
            return make_layers(model, self.kv), tokens
        state, layers, _ = self.resume(tokens, model, limit=len(tokens) - 1)
        if state is None or layers is None or callable(layers):
            return make_layers(model, self.kv), tokens
        self._lent.lend(layers, state)
        return layers, tokens[state.n_past :]

    def store(self, model: Any, tokens: Sequence[int], prompt_cache: Sequence[Any]) -> Saved:
        """Store what mlx-lm cache objects hold, for `fetch` to find; no logits, and no name.

        `tokens` are those that the objects hold: all that were fed, which after mlx-lm's loop are
        the prompt and every generated token that went through the model.

        Raises:
            UnsupportedLayer: the objects hold another number of tokens, or cannot be taken down.
            StoreError: the file system refuses.
        """
        self.blueprint = Blueprint.of(model, self.kv)
        return self._added(self.take_down(model, tokens, prompt_cache))

    def _added(self, state: State) -> Saved:
        with self._writing(state):
            saved = self._saver(state, exact=False).save(None)
        return self._sent(saved)

    def take_down(self, model: Any, tokens: Sequence[int], prompt_cache: Sequence[Any]) -> State:
        """The state that mlx-lm cache objects hold, without logits; see `store`. Nothing is
        evaluated, and the objects may go on.

        Raises:
            UnsupportedLayer: the objects hold another number of tokens, or cannot be taken down.
        """
        return self._lent.taken_down(model, tokens, prompt_cache)

    def add(self, state: State) -> Saved | None:
        """Store a state for prompts to come, and only what no run has stored of its tokens: rows
        that are there serve, even if they differ by rounding. None if all of it is there.

        A program that answers many prompts after one prefix would else write the prefix once for
        every width that it was computed in. What serves was used now: it was in somebody's memory.
        Raises as `save` does.
        """
        with self._store.shared():
            found = self._finder.find(state.tokens, limit=state.n_past)
            rows = self._finder.rows(state.tokens, state.phase)
            refs = tuple(Ref(step.stem, digest, step.start, step.rows) for step, digest in rows)
            if not self.read_only:
                touch(self._store, found.snapshot, refs)
        if found.position == state.n_past:
            return None
        return self._added(replace(state, trail=Trail(refs)))

    # Management

    def list(self) -> builtins.list[Entry]:
        """Every state in the store, newest first; those of other models are stale."""
        from mlx_promptcache import catalog

        with self._store.shared():
            return catalog.Catalog(self._store, self.fingerprint).entries()

    def clear(self, names: Iterable[str]) -> Deletion:
        """Delete these names and what only they use; return what was deleted.

        Raises:
            CacheMiss: there is no such name; nothing was deleted.
            CacheLocked: others read or write, and do not come to an end.
            StoreError: the cache is read-only, or the file system refuses.
        """
        from mlx_promptcache import catalog, deletion

        with self._store.exclusive():
            known = catalog.Catalog(self._store)
            plan = known.plan_clear(known.named(names))
            deletion.execute(self._store, plan)
            return plan

    def prune(self, max_bytes: int | None = None, *, dry_run: bool = False) -> Deletion:
        """Delete leftovers of crashes, and evict states without a name until the store takes at
        most `max_bytes` on disk (its budget, if none are given); return what was deleted, or would
        be with `dry_run`.

        What has a name stays, even if the store is too large then.

        Raises:
            CacheLocked: others read or write, and do not come to an end.
            StoreError: the cache is read-only, or the file system refuses.
        """
        from mlx_promptcache import deletion, room

        budget = self.budget if max_bytes is None else Budget.chosen(max_bytes)
        if dry_run:
            with self._store.shared():
                return room.plan_prune(self._store, budget)
        self._store.check_writable()
        looked = room.look(self._store)
        with self._store.exclusive():
            plan = room.plan_prune(self._store, budget, looked)
            deletion.execute(self._store, plan)
            return plan

    def verify(self, names: Sequence[str] = ()) -> Report:
        """Read every byte of these states (of all, if none is named) and check it."""
        from mlx_promptcache import verification

        with self._store.shared():
            return verification.verify(self._store, names)


def _unused(exc: PromptCacheError) -> Resumed:
    log.warning("the prompt cache is not used: %s", exc)
    return Resumed(None, None, Match(0, False, None, str(exc)))
