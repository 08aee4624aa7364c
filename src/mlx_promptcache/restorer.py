"""From what is found of a prompt to layers that hold it, or to a miss that says why not."""

from __future__ import annotations

import functools
import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from mlx_promptcache.errors import PromptCacheError, UnsupportedLayer
from mlx_promptcache.loader import Loader
from mlx_promptcache.match import Match, Matcher
from mlx_promptcache.quarantine import BadFile
from mlx_promptcache.store import BLOCKS, SNAPSHOTS
from mlx_promptcache.tree import id_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mlx_promptcache.ahead import Ahead
    from mlx_promptcache.blueprint import Blueprint
    from mlx_promptcache.finder import Finder, Found
    from mlx_promptcache.passes import Plan
    from mlx_promptcache.rates import Rates
    from mlx_promptcache.state import Ref, State
    from mlx_promptcache.store import Store

log = logging.getLogger("mlx_promptcache")
SLOWER = "it is stored, but here it is sooner computed than read"


class Resumed(NamedTuple):
    """What a prompt starts from: a state and mlx-lm cache objects filled with it, or neither.

    Where rows are still to be read `layers` is a function that reads them; it returns None if they
    cannot be had after all.
    """

    state: State | None
    layers: list[Any] | Callable[[], list[Any] | None] | None
    match: Match


class Restorer:
    """Reads what a finder finds into the layers of a model, which look as the `blueprint` says.

    With `records` it notes when a state was used, and how long reading took. Rows are put where
    room was made `ahead`, if there is some for them.
    """

    def __init__(
        self, finder: Finder, blueprint: Blueprint, rates: Rates, ahead: Ahead, *, records: bool
    ) -> None:
        self._finder, self._blueprint, self._rates = finder, blueprint, rates
        self._store, self._bad, self._records = finder.store, finder.bad, records
        self._loader = Loader(finder, blueprint, ahead)

    def restore(
        self,
        tokens: Sequence[int],
        model: Any,
        plan: Plan | None,
        limit: int | None,
        *,
        later: bool,
    ) -> Resumed:
        """The longest stored prefix; see `PromptCache.resume`. The store's lock is held."""
        matcher, refused = Matcher(self._finder), None
        before = len(self._bad.told)
        while True:  # each time round there is a file less
            found = self._finder.find(tokens, plan, limit)
            if found.position == 0:
                refused = refused or next(iter(self._bad.told[before:]), None)
                return Resumed(None, None, matcher.match(tokens, found, None, refused, plan))
            stored_bytes = self._stored_bytes(found)
            if self._rates.reading_is_slower(stored_bytes, found.position):
                return Resumed(None, None, Match(0, False, None, SLOWER, found.reached))
            began = time.perf_counter()
            later = later and found.exact and self._blueprint.sliceable
            try:
                state = self._loader.load(found, tokens, rows=not later)
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
            source = self._finder.source(tokens, found)
            if self._records:
                if not later:
                    self._rates.note_read(stored_bytes, time.perf_counter() - began)
                record_use(self._store, source, found.snapshot, state)
            # The rows are in the layers now: nobody else may hold them, or MLX copies them all
            # when the next token is written.
            bare = replace(state, contents=())
            return Resumed(bare, layers, matcher.match(tokens, found, source, refused, plan))

    def _read(self, found: Found, tokens: Sequence[int], model: Any) -> list[Any] | None:
        try:
            with self._store.shared():
                return self._loader.load(found, tokens).layers(model)
        except BadFile:  # that was told, unless others deleted it since
            return None
        except PromptCacheError as exc:
            log.warning("a stored state cannot be used after all: %s", exc)
            return None

    def _stored_bytes(self, found: Found) -> int:
        return sum(self._store.size(BLOCKS, step.stem) for step in found.steps)

    def _pass_over(self, found: Found) -> None:
        for stem in [found.snapshot] if found.snapshot else [s.stem for s in found.steps]:
            self._bad.ignore(stem)


def record_use(store: Store, source: str | None, snapshot: str | None, state: State) -> None:
    """Note that a state was used now: its files, and a line of statistics."""
    touch(store, snapshot, state.trail.refs)
    store.uses.note(
        {
            "when": round(time.time(), 3),
            "what": source and id_of(source),
            "rows": state.n_past,
            "seconds": round(state.trail.seconds_per_token * state.n_past, 3),
        }
    )


def touch(store: Store, snapshot: str | None, refs: Sequence[Ref]) -> None:
    """Note that a snapshot and blocks were used now."""
    if snapshot is not None:
        store.touch(SNAPSHOTS, snapshot)
    for ref in refs:
        store.touch(BLOCKS, ref.stem)
