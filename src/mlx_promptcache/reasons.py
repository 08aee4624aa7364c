"""Why no more of a prompt can be reused, in a sentence. Needs neither a model nor MLX."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, NamedTuple

from mlx_promptcache import headers
from mlx_promptcache.errors import PromptCacheError
from mlx_promptcache.tree import BlockName, Keys, agreeing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mlx_promptcache.facts import Facts, Snapshot, Use
    from mlx_promptcache.finder import Finder, Found
    from mlx_promptcache.passes import Plan
    from mlx_promptcache.store import Store

MOST_READ = 256  # blocks that are looked into to find where a prompt leaves the others


class Neighbour(NamedTuple):
    """A stored state that agrees with a prompt for longer than the others: for its first `agreed`
    tokens of `n_past`.
    """

    stem: str
    agreed: int
    n_past: int


def why_not_more(
    finder: Finder, tokens: Sequence[int], found: Found, plan: Plan | None = None
) -> str | None:
    """Why no more was found; None if all was. The prompt is not repeated: this ends up in logs."""
    if found.exact:
        return None
    stored = max(found.position, found.reached)
    if plan is not None and (there := finder.find(tokens)).reached > max(stored, found.position):
        return (
            f"{there.reached:,} tokens of it are stored, but other passes, another machine or "
            "another release computed them: a run that is to be exact computes them itself"
        )
    if stored == 0:
        return finder.why_none(tokens)
    if found.position < min(stored, len(tokens) - 1):
        return _between(found, stored, plan)
    if stored == len(tokens):
        return "all of it is stored, but its last token has to be computed again for what follows"
    return differs(None, stored)


def _between(found: Found, stored: int, plan: Plan | None) -> str:
    """Why a run goes on at a position before the end of what is stored."""
    nearest = f"the nearest at or before it stands at token {found.position:,}"
    if plan is not None:
        return (
            f"{stored:,} tokens of it are stored, but a run that is to be exact goes on only where "
            f"its own passes end: {nearest}"
        )
    where = nearest if found.position else "none stands there"
    return (
        f"{stored:,} tokens of it are stored, but this model can only go on from a snapshot, and "
        f"{where}"
    )


def differs(label: str | None, at: int, *, ends: bool = False) -> str:
    """That a prompt leaves a stored state at a token, or goes on where that one ends."""
    other = "what is stored" if label is None else repr(label)
    if ends:
        return f"{other} ends at token {at:,}, and what follows is not stored"
    return f"it differs from {other} at token {at:,}"


def neighbour(facts: Facts, root: str, tokens: Sequence[int], named: set[str]) -> Neighbour | None:
    """The stored state that agrees with these tokens for the longest; one that is `named` before
    others, and then the one that was used last. Reads the headers of few blocks.
    """
    keys, rows = _Known(root, tokens), _Rows(facts.store, tokens)
    chains = {stem: told.uses for stem in facts.snapshots if (told := _told(facts, stem))}
    last = {stem: _last_agreeing(keys, uses) for stem, uses in chains.items()}
    agreed = {stem: use.start + rows.of(use) for stem, use in last.items() if use is not None}
    if not agreed:
        return None
    best = max(agreed, key=lambda s: (agreed[s], s in named, facts.snapshots[s].last_use))
    return Neighbour(best, agreed[best], sum(use.rows for use in chains[best]))


class _Rows:
    """How many rows of blocks agree with a prompt; the header of each is read once."""

    def __init__(self, store: Store, tokens: Sequence[int]) -> None:
        self._store, self._tokens = store, tokens
        self._known: dict[str, int] = {}
        self._reads = 0

    def of(self, use: Use) -> int:
        """How many of the rows that a state uses of a block agree, from its beginning on."""
        if use.stem not in self._known:
            self._known[use.stem] = self._look(use)
        return min(use.rows, self._known[use.stem])

    def _look(self, use: Use) -> int:
        name, wanted = BlockName.parse(use.stem), list(self._tokens[use.start :])
        if name is None or wanted[:1] != [name.first_token]:
            return 0
        if self._reads == MOST_READ:
            return 1
        self._reads += 1
        try:
            return agreeing(headers.block_header(self._store, use.stem).content["tokens"], wanted)
        except PromptCacheError:
            return 0


def _told(facts: Facts, stem: str) -> Snapshot | None:
    with contextlib.suppress(PromptCacheError):
        return facts.snapshot(stem)
    return None


class _Known:
    """The keys of a prompt, each computed once."""

    def __init__(self, root: str, tokens: Sequence[int]) -> None:
        self._keys, self._known = Keys(root, tokens), {0: root}

    def __getitem__(self, position: int) -> str | None:
        if position > len(self._keys.tokens):
            return None
        if position not in self._known:
            self._known[position] = self._keys[position]
        return self._known[position]


def _last_agreeing(keys: _Known, uses: Sequence[Use]) -> Use | None:
    """The last block of a state before which all tokens agree: the keys say so."""
    low, high = 0, len(uses)
    while low < high:
        middle = (low + high) // 2
        name = BlockName.parse(uses[middle].stem)
        if name is not None and name.start_key == keys[uses[middle].start]:
            low = middle + 1
        else:
            high = middle
    return uses[low - 1] if low else None
