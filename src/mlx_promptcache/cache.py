"""PromptCache: states by name and by longest prefix, on disk.

On the way of a generation (`match`, `resume`, `fetch`) nothing raises for what is on disk: a file
that is damaged is moved aside with a notice (the log `mlx_promptcache`), and the search begins
again without it. An explicit `load` or `save` raises.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
import weakref
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx

from mlx_promptcache import catalog, headers, places, room, verification
from mlx_promptcache.blueprint import Blueprint
from mlx_promptcache.budget import Budget
from mlx_promptcache.deletion import Deletion, execute
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
from mlx_promptcache.layers import capture, check_quantised, leaves, make_layers
from mlx_promptcache.loader import Loader
from mlx_promptcache.passes import UNKNOWN
from mlx_promptcache.quarantine import BadFile, Quarantine
from mlx_promptcache.rates import Rates
from mlx_promptcache.saver import Saved, Saver, most_bytes
from mlx_promptcache.state import Ref, State, Trail
from mlx_promptcache.store import BLOCKS, SNAPSHOTS, Store
from mlx_promptcache.tokenizer_store import TokenizerStore

if TYPE_CHECKING:
    import builtins
    import os
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from mlx_promptcache.finder import Found
    from mlx_promptcache.passes import Plan

log = logging.getLogger("mlx_promptcache")

SLOWER = "it is stored, but here it is sooner computed than read"


@dataclass(frozen=True)
class Match:
    """How much of a prompt can be reused: its first `position` tokens.

    `exact` if a whole state stands at the end of the prompt. `source` is the name or the id of the
    deepest snapshot on the way, None if there is none. `reason` says why not more. `stored` is how
    many tokens of the prompt are stored: more than `position` where a model can go on from
    snapshots only, and none stands there.
    """

    position: int
    exact: bool
    source: str | None
    reason: str | None
    stored: int = 0


class Resumed(NamedTuple):
    """What a prompt starts from: a state and mlx-lm cache objects filled with it, or neither.

    Where rows are still to be read `layers` is a function that reads them; it returns None if they
    cannot be had after all.
    """

    state: State | None
    layers: builtins.list[Any] | Callable[[], builtins.list[Any] | None] | None
    match: Match


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
        self._fetched: weakref.WeakKeyDictionary[Any, State] = weakref.WeakKeyDictionary()

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
        if kv == self.kv:
            return self
        return PromptCache(
            self.directory, self.fingerprint, kv=kv, read_only=self.read_only,
            max_bytes=self.budget.max_bytes, allow_foreign=self._store.allow_foreign,
        )  # fmt: skip

    def with_salt(self, salt: str) -> PromptCache:
        """The same store for the same model in another private namespace."""
        cache = PromptCache(
            self.directory, self.fingerprint.with_salt(salt), kv=self.kv, read_only=self.read_only,
            max_bytes=self.budget.max_bytes, allow_foreign=self._store.allow_foreign,
        )  # fmt: skip
        cache.blueprint = self.blueprint
        return cache

    @property
    def rates(self) -> Rates:
        """How fast this machine reads this store, and computes this fingerprint's prompts."""
        return Rates(self.directory, self.fingerprint.digest)

    @property
    def tokenizers(self) -> TokenizerStore:
        """The tokenizers that are kept beside the states."""
        return TokenizerStore(self._store, self._bad, self.budget)

    def _loader(self) -> Loader:
        return Loader(self._finder, self.blueprint)

    # By longest prefix

    def match(
        self, tokens: Sequence[int], *, plan: Plan | None = None, limit: int | None = None
    ) -> Match:
        """Say how much of these tokens is stored; reads headers, no K/V.

        With `plan` only what that run's own passes would have computed counts (`--exact`); with
        `limit` at most so many tokens.
        """
        try:
            with self._store.shared():
                found = self._finder.find(tokens, plan, limit)
                return self._match(tokens, found, self._finder.source(tokens, found), None)
        except PromptCacheError as exc:
            return Match(0, False, None, str(exc))

    def _match(
        self, tokens: Sequence[int], found: Found, source: str | None, refused: str | None
    ) -> Match:
        stored = max(found.position, found.reached)
        if stored == 0:
            return Match(0, False, None, refused or self._finder.why_none(tokens))
        if refused is None and found.position < min(stored, len(tokens) - 1):
            refused = (
                f"{stored} tokens of it are stored, but this model can only go on from a snapshot, "
                "and none stands there"
            )
        return Match(found.position, found.exact, source and self._label(source), refused, stored)

    def _label(self, stem: str) -> str:
        names: builtins.list[str] = []
        with contextlib.suppress(StoreError):
            names = [name for name, named in self._store.names().items() if named == stem]
        return names[0] if names else stem.rpartition("-")[2]

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
            with self._store.shared():
                return self._resume(tokens, model, plan, limit, later=later)
        except PromptCacheError as exc:
            log.warning("the prompt cache is not used: %s", exc)
            return Resumed(None, None, Match(0, False, None, str(exc)))

    def _resume(
        self,
        tokens: Sequence[int],
        model: Any,
        plan: Plan | None,
        limit: int | None,
        *,
        later: bool,
    ) -> Resumed:
        if self.blueprint is None:
            self.blueprint = Blueprint.of(model, self.kv)
        refused: str | None = None
        while True:  # each time round there is a file less
            found = self._finder.find(tokens, plan, limit)
            if found.position == 0:
                return Resumed(None, None, self._match(tokens, found, None, refused))
            stored_bytes = self._stored_bytes(found)
            if self.rates.reading_is_slower(stored_bytes, found.position):
                return Resumed(None, None, Match(0, False, None, SLOWER, found.reached))
            began = time.perf_counter()
            later = later and found.exact and self.blueprint.sliceable
            try:
                state = self._loader().load(found, tokens, rows=not later)
                layers: Any = (
                    functools.partial(self._read, found, tokens, model)
                    if later
                    else state.layers(model)
                )
            except BadFile as exc:
                refused = exc.reason
                continue
            except UnsupportedLayer as exc:
                refused = f"a stored state does not fit: {exc}"
                log.warning("%s", refused)
                self._pass_over(found)
                continue
            if not (later or self.read_only):
                self.rates.note_read(stored_bytes, time.perf_counter() - began)
            source = self._finder.source(tokens, found)
            self._record_use(source, found.snapshot, state)
            # The rows are in the layers now: nobody else may hold them, or MLX copies them all
            # when the next token is written.
            bare = replace(state, contents=())
            return Resumed(bare, layers, self._match(tokens, found, source, refused))

    def _read(self, found: Found, tokens: Sequence[int], model: Any) -> builtins.list[Any] | None:
        try:
            with self._store.shared():
                return self._loader().load(found, tokens).layers(model)
        except PromptCacheError as exc:
            log.warning("a stored state cannot be used after all: %s", exc)
            return None

    def _stored_bytes(self, found: Found) -> int:
        return sum(self._store.size(BLOCKS, step.stem) for step in found.steps)

    def _pass_over(self, found: Found) -> None:
        for stem in [found.snapshot] if found.snapshot else [s.stem for s in found.steps]:
            self._bad.ignore(stem)

    def _record_use(self, source: str | None, snapshot: str | None, state: State) -> None:
        if self.read_only:
            return
        self._touch(snapshot, state.trail.refs)
        self._store.record_use(
            {
                "when": round(time.time(), 3),
                "what": source and source.rpartition("-")[2],
                "rows": state.n_past,
                "seconds": round(state.trail.seconds_per_token * state.n_past, 3),
            }
        )

    def _touch(self, snapshot: str | None, refs: Sequence[Ref]) -> None:
        if snapshot is not None:
            self._store.touch(SNAPSHOTS, snapshot)
        for ref in refs:
            self._store.touch(BLOCKS, ref.stem)

    # By name

    def load(self, name: str) -> State:
        """Return the state of a name, or of a snapshot's id.

        Raises:
            CacheMiss: there is none, it was made by another model or with other settings, it does
                not fit the model's layers, or it is damaged; `.reason` says which.
        """
        with self._store.shared():
            stem, header = catalog.find(self._store, name)
            if header.content["fingerprint"] != self.fingerprint.digest:
                other = self.fingerprint.explain(headers.fingerprint_parts(header))
                raise CacheMiss(f"the state {name!r} was made with {other}; save it again")
            try:
                state = self._loader().snapshot(stem)
            except BadFile as exc:
                if isinstance(exc.__cause__, UnsupportedLayer):  # of another release of mlx-lm
                    raise CacheMiss(
                        f"the state {name!r} does not fit: {exc}; save it again"
                    ) from exc
                raise DamagedFile(f"the state {name!r} is damaged: {exc}; save it again") from exc
            self._record_use(stem, stem, state)
            return state

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
            saver = Saver(self._finder, state, sync=sync, exact=exact or self._cuts_matter)
            return saver.save(name, replace=replace)

    def keep(self, state: State, *, exact: bool = False) -> Saved:
        """Store a state for prompts to come, without a name, and leave the syncing to the system.

        Where a state of the same tokens is stored, that one serves: its logits are the same, and
        its key and sampling are not used by prompts. Raises as `save` does.
        """
        saver = Saver(self._finder, state, sync=False, exact=exact or self._cuts_matter)
        with self._store.shared():
            kept = None if self.read_only else saver.kept()
        if kept is not None:
            return kept
        with self._writing(state):
            return saver.save(None, share=True)

    @contextlib.contextmanager
    def _writing(self, state: State, *, asked_for: bool = False) -> Iterator[None]:
        self._store.allow()
        if self.read_only:
            raise StoreError("this prompt cache is read-only")
        if not state.contents:
            raise StoreError("this state's rows are in layers: take the state from a run")
        if state.fingerprint not in {"", self.fingerprint.digest}:
            raise StoreError("this state was computed by another model, or with other settings")
        self._store.create()
        with self._store.adding():
            kept = {ref.stem for ref in state.trail.refs}
            needed = most_bytes(state)
            room.make(self._store, self.budget, needed, kept=kept, asked_for=asked_for)
            with self._store.shared():
                yield

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
        for _, layer in leaves(layers):
            self._fetched[layer] = state
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
        state = self.take_down(model, tokens, prompt_cache)
        with self._writing(state):
            return Saver(self._finder, state, sync=False, exact=False).save(None)

    def take_down(self, model: Any, tokens: Sequence[int], prompt_cache: Sequence[Any]) -> State:
        """The state that mlx-lm cache objects hold, without logits; see `store`. Nothing is
        evaluated, and the objects may go on.

        Raises:
            UnsupportedLayer: the objects hold another number of tokens, or cannot be taken down.
        """
        tokens = tuple(int(token) for token in tokens)
        expected = [path for path, _ in leaves(make_layers(model, self.kv))]
        if expected != [path for path, _ in leaves(prompt_cache)]:
            raise UnsupportedLayer("these layers are not those that the model makes")
        offsets = {layer.offset for _, layer in leaves(prompt_cache) if hasattr(layer, "offset")}
        held = offsets - {0} or offsets  # a model may make layers that it never writes to
        if held - {len(tokens)}:
            raise UnsupportedLayer(
                f"{len(tokens)} tokens were given, and the layers hold "
                f"{max(held - {len(tokens)})}: give those that they hold"
            )
        if not tokens:
            raise UnsupportedLayer("no tokens were given: give those that the layers hold")
        check_quantised(prompt_cache, len(tokens), self.kv)
        return State(
            tokens=tokens,
            contents=capture(prompt_cache, len(tokens)),
            logits=None,
            embedding=None,
            rng=mx.random.key(0),  # nothing was drawn: the same layers are the same state
            kv=self.kv,
            lineage=UNKNOWN,
            trail=Trail(self._refs_of(prompt_cache, tokens)),
        )

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
                self._touch(found.snapshot, refs)
        if found.position == state.n_past:
            return None
        state = replace(state, trail=Trail(refs))
        with self._writing(state):
            return Saver(self._finder, state, sync=False, exact=False).save(None)

    def _refs_of(self, prompt_cache: Sequence[Any], tokens: tuple[int, ...]) -> tuple[Ref, ...]:
        """The blocks that these objects came from, if `fetch` made them."""
        first = next((layer for _, layer in leaves(prompt_cache)), None)
        state = self._fetched.get(first) if first is not None else None
        if state is None or tokens[: state.n_past] != state.tokens:
            return ()
        if self.kv.phase_at(state.n_past) != self.kv.phase_at(len(tokens)):  # quantised since
            return ()
        return state.trail.refs

    # Management

    def list(self) -> builtins.list[catalog.Entry]:
        """Every state in the store, newest first; those of other models are stale."""
        with self._store.shared():
            return catalog.Catalog(self._store, self.fingerprint).entries()

    def clear(self, names: Iterable[str]) -> Deletion:
        """Delete these names and what only they use; return what was deleted.

        Raises:
            CacheMiss: there is no such name; nothing was deleted.
            CacheLocked: others read or write, and do not come to an end.
            StoreError: the cache is read-only, or the file system refuses.
        """
        if self.read_only:
            raise StoreError("this prompt cache is read-only")
        with self._store.exclusive():
            known = catalog.Catalog(self._store)
            plan = known.plan_clear(known.named(names))
            execute(self._store, plan)
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
        budget = self.budget if max_bytes is None else Budget.chosen(max_bytes)
        if dry_run:
            with self._store.shared():
                return room.plan_prune(self._store, budget)
        if self.read_only:
            raise StoreError("this prompt cache is read-only")
        with self._store.exclusive():
            plan = room.plan_prune(self._store, budget)
            execute(self._store, plan)
            return plan

    def verify(self, names: Sequence[str] = ()) -> verification.Report:
        """Read every byte of these states (of all, if none is named) and check it."""
        with self._store.shared():
            return verification.verify(self._store, names)
