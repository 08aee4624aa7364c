"""How much of a prompt is stored, and why not more."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mlx_promptcache import reasons
from mlx_promptcache.errors import PromptCacheError, StoreError
from mlx_promptcache.tree import id_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mlx_promptcache.finder import Finder, Found
    from mlx_promptcache.passes import Plan


@dataclass(frozen=True, repr=False)
class Match:
    """How much of a prompt can be reused: its first `position` tokens.

    `exact` if a whole state stands at the end of the prompt. `source` is the name or the id of the
    deepest snapshot on the way, None if there is none. `reason` says why not more, in a sentence
    without the prompt's text. `stored` is how many tokens of the prompt are stored: more than
    `position` where a model can go on from snapshots only, and none stands there.
    """

    position: int
    exact: bool
    source: str | None
    reason: str | None
    stored: int = 0

    def __repr__(self) -> str:
        whole = ", exact" if self.exact else ""
        source = f" from {self.source!r}" if self.source is not None else ""
        why = f": {self.reason}" if self.reason is not None else ""
        return f"<Match of {self.position:,} tokens{source}{whole}{why}>"


class Matcher:
    """Tells what a finder finds as matches."""

    def __init__(self, finder: Finder) -> None:
        self._finder, self._store, self._bad = finder, finder.store, finder.bad

    def look_up(
        self, tokens: Sequence[int], plan: Plan | None, limit: int | None = None
    ) -> tuple[Match, Found | None]:
        """How much of these tokens is stored; nothing if the store cannot be read."""
        try:
            with self._store.shared():
                before = len(self._bad.told)
                found = self._finder.find(tokens, plan, limit)
                refused = None if found.exact else next(iter(self._bad.told[before:]), None)
                source = self._finder.source(tokens, found)
                return self.match(tokens, found, source, refused, plan), found
        except PromptCacheError as exc:
            return Match(0, False, None, str(exc)), None

    def explained(self, tokens: Sequence[int], plan: Plan | None) -> Match:
        """As `look_up`, with a reason that names the stored state which agrees for the longest: for
        that the headers of all states are looked at, or what lists remember of them.
        """
        match, found = self.look_up(tokens, plan)
        if found is None or match.reason != reasons.differs(None, match.stored):
            return match
        from mlx_promptcache.facts import Facts, memo_of

        with contextlib.suppress(PromptCacheError), self._store.shared():
            facts = Facts(self._store, memo_of(self._store))
            named = set(self._store.names.all().values())
            near = reasons.neighbour(facts, self._finder.root(found.phase), tokens, named)
            facts.keep()
            if near is not None and near.agreed == match.stored:
                ends = near.agreed == near.n_past
                label = self._label(near.stem)
                return replace(match, reason=reasons.differs(label, match.stored, ends=ends))
        return match

    def match(
        self,
        tokens: Sequence[int],
        found: Found,
        source: str | None,
        refused: str | None,
        plan: Plan | None = None,
    ) -> Match:
        """What was found, as a match. `source` is the stem of a snapshot, `refused` why a stored
        state was not used, if one was not.
        """
        stored = max(found.position, found.reached)
        if refused is None:
            refused = reasons.why_not_more(self._finder, tokens, found, plan)
        if stored == 0:
            return Match(0, False, None, refused)
        return Match(found.position, found.exact, source and self._label(source), refused, stored)

    def _label(self, stem: str) -> str:
        name = None
        with contextlib.suppress(StoreError):
            name = self._store.names.of(stem)
        return name or id_of(stem)
