"""ShardCache: the states of one rank, reused where all ranks hold them.

A position is proposed, every rank reads its files, and only when all have them the run goes on from
there; else a lower position is proposed, down to nothing. So a file that one rank lacks, or finds
damaged, is a miss for all, and no rank waits for another that computes something else.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

from mlx_promptcache import arithmetic
from mlx_promptcache.cache import PromptCache
from mlx_promptcache.errors import CacheMiss, PromptCacheError
from mlx_promptcache.fingerprint import Fingerprint
from mlx_promptcache.match import Match
from mlx_promptcache.passes import UNKNOWN
from mlx_promptcache.restorer import Resumed

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from mlx_promptcache.fingerprint import KVSettings
    from mlx_promptcache.passes import Plan
    from mlx_promptcache.ranks import Ranks
    from mlx_promptcache.state import State
    from mlx_promptcache.writer import Saved

UNLIKE = "the ranks' machines compute with other bits, and --exact reuses none of them"


class _Agreed(NamedTuple):
    """The deepest position that all ranks say they can go on from, which rank kept it from being
    more, and how many tokens all have stored, whether or not they can go on there.
    """

    position: int
    short: int | None
    stored: int


class ShardCache(PromptCache):
    """The states of this rank's shard of a model; its fingerprint says which shard that is.

    `match`, `resume`, `load`, `save` and `fetch` are calls of all ranks: each makes them at the
    same point. Ranks may share a directory: a named state has a file for every rank, under a name
    of its own (`Ranks.own_name`).
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        fingerprint: Fingerprint | str,
        ranks: Ranks,
        *,
        kv: KVSettings | None = None,
        read_only: bool = False,
        max_bytes: int | None = None,
        allow_foreign: bool = False,
    ) -> None:
        super().__init__(
            directory, _of_shard(fingerprint, ranks), kv=kv, read_only=read_only,
            max_bytes=max_bytes, allow_foreign=allow_foreign,
        )  # fmt: skip
        self.ranks = ranks

    def _other(self, fingerprint: Fingerprint, kv: KVSettings) -> PromptCache:
        return ShardCache(
            self.directory, fingerprint, self.ranks, kv=kv, read_only=self.read_only,
            max_bytes=self.budget.max_bytes, allow_foreign=self._store.allow_foreign,
        )  # fmt: skip

    # By longest prefix

    def match(
        self, tokens: Sequence[int], *, plan: Plan | None = None, limit: int | None = None
    ) -> Match:
        """Say how much of these tokens all ranks have stored; see `PromptCache.match`."""
        own = super().match(tokens, plan=plan, limit=limit)
        agreed = self._agree(tokens, plan, limit)
        if agreed.position == own.position:
            return own
        return Match(agreed.position, False, None, self._why(agreed, own.reason), agreed.stored)

    def resume(
        self,
        tokens: Sequence[int],
        model: Any,
        *,
        plan: Plan | None = None,
        limit: int | None = None,
        later: bool = False,  # noqa: ARG002 - damage that is found later would be found by one rank
    ) -> Resumed:
        """Return the state of the longest prefix of these tokens that all ranks hold, in fresh
        layers; see `PromptCache.resume`.
        """
        if plan is not None and not self.ranks.alike("arithmetic", arithmetic.lineage()):
            return Resumed(None, None, Match(0, False, None, UNLIKE))
        with contextlib.suppress(PromptCacheError):  # that is told where it is looked for
            self.bring(tokens, plan=plan, limit=limit)
        refused, stored = None, len(tokens)
        while True:  # each time round the position is lower
            agreed = self._agree(tokens, plan, limit)
            stored = min(stored, agreed.stored)
            refused = self._why(agreed, refused)
            if agreed.position == 0:
                reason = refused or super().match(tokens, plan=plan).reason
                return Resumed(None, None, Match(0, False, None, reason, stored))
            if agreed.position < len(tokens):
                limit = agreed.position
            own = self.restore(tokens, model, plan=plan, limit=limit)
            got = [row[0] for row in self.ranks.told("reading a prefix", own.match.position)]
            if min(got) == agreed.position:
                reason = own.match.reason or refused
                match = dataclasses.replace(own.match, reason=reason, stored=stored)
                return self._of_one_run(own)._replace(match=match)
            refused = own.match.reason or self._short_of(got.index(min(got)), min(got))
            limit = min(got)

    def expect(self, rows: int | None = None) -> None:
        """Nothing: what is read is not known before all ranks have agreed on it."""

    def _of_one_run(self, own: Resumed) -> Resumed:
        """What was read; where other passes computed the parts of other ranks, what is computed on
        from there is not what a run from nothing computes, and must not be taken for it.
        """
        state = own.state
        assert state is not None  # noqa: S101 - it has tokens
        if self.ranks.alike("what computed a prefix", state.lineage):
            return own
        return own._replace(state=dataclasses.replace(state, lineage=UNKNOWN))

    def _agree(self, tokens: Sequence[int], plan: Plan | None, limit: int | None) -> _Agreed:
        """The deepest position, at most at `limit`, that all ranks say they can go on from."""
        short: int | None = None
        while True:
            mine, stored = self._found(tokens, plan, limit)
            rows = self.ranks.told("looking for a prefix", mine, stored)
            told = [row[0] for row in rows]
            least = min(told)
            if least < max(told):
                short = told.index(least)
            if least in {0, max(told)}:
                return _Agreed(least, short, min(row[1] for row in rows))
            limit = least

    def _found(
        self, tokens: Sequence[int], plan: Plan | None, limit: int | None = None
    ) -> tuple[int, int]:
        """The furthest position of this rank's own, and how much is stored."""
        try:
            with self._store.shared():
                found = self._finder.find(tokens, plan, limit)
        except PromptCacheError:
            return 0, 0
        return found.position, max(found.position, found.reached)

    def _why(self, agreed: _Agreed, before: str | None) -> str | None:
        if agreed.short is None or agreed.short == self.ranks.rank:
            return before
        return self._short_of(agreed.short, agreed.position)

    def _short_of(self, rank: int, position: int) -> str:
        return f"rank {rank} of {self.ranks.size} can go on from {position} tokens of it only"

    # By name

    def check_free(self, name: str, tokens: Sequence[int]) -> None:
        """Raise StoreError if this rank's part of a name stands for a state of other tokens."""
        super().check_free(self.ranks.own_name(name), tokens)

    def snapshot(self, name: str) -> str | None:
        """The id of the snapshot of this rank's part of a name; see `PromptCache.snapshot`."""
        return super().snapshot(self.ranks.own_name(name))

    def load(self, name: str) -> State:
        """Return this rank's part of the state of a name.

        Raises:
            CacheMiss: some rank has none, or it cannot be used, or the ranks' are not of one run;
                it is raised on all ranks.
        """
        state, wrong = None, None
        try:
            state = super().load(self.ranks.own_name(name))
        except PromptCacheError as exc:
            wrong = exc
        got = [row[0] for row in self.ranks.told("loading a state", int(state is not None))]
        if wrong is not None:
            raise wrong
        if not all(got):
            raise CacheMiss(
                f"rank {got.index(0)} of {len(got)} does not have the state {name!r}, or not "
                "whole; save it again"
            )
        assert state is not None  # noqa: S101 - else something was wrong
        if not self.ranks.alike("a state", *identity(state)):
            raise CacheMiss(f"the ranks have other states named {name!r} each; save it again")
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
        """Store a state; see `PromptCache.save`. No rank names it before all have stored it.

        Raises:
            StoreError, CacheLocked: it cannot be stored here.
            RankError: another rank could not store it.
        """
        own = None if name is None else self.ranks.own_name(name)
        with self.ranks.together("saving a state"):
            if name is not None and not replace:
                self.check_free(name, state.tokens)
            saved = super().save(None, state, sync=sync, exact=exact)
        if own is None:
            return saved
        with self.ranks.together("naming a state"):
            self.link(own, saved.snapshot, replace=True)
        return dataclasses.replace(saved, name=name)


def identity(state: State) -> list[Any]:
    """What the parts of one state have in common on all ranks."""
    return [state.tokens, state.rng.tolist(), state.sampling, state.kv, state.speculation]


def _of_shard(fingerprint: Fingerprint | str, ranks: Ranks) -> Fingerprint:
    if isinstance(fingerprint, str):
        fingerprint = Fingerprint.of_text(fingerprint)
    return fingerprint.with_shard(str(ranks))
