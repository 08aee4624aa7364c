"""mlx-lm's prompt cache in memory, with a store below it.

`mlx_lm.server` asks its prompt cache for the nearest state before it computes a prompt, and gives
it states: at the ends of a prompt's parts, and at the end of an answer. Here both go one floor
deeper. What is in memory, for how long, and how much, is mlx-lm's business as before.

All of it runs in the thread that computes; only files are written by another.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, overload

from mlx_promptcache.engine import cache as mlx_cache
from mlx_promptcache.layers import leaves, lengths
from mlx_promptcache.namespaces import COMMON

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import SupportsIndex

    from mlx_promptcache.backlog import Backlog
    from mlx_promptcache.cache import PromptCache
    from mlx_promptcache.state import State

    Layers = list[Any]

log = logging.getLogger("mlx_promptcache")

MOST_NAMESPACES = 64  # whose caches are at hand: anybody may name new ones
MOST_LACKING = 2  # tokens that layers may be behind those of an answer


class Tokens(list[int]):
    """Tokens of a namespace. mlx-lm cuts and extends them on their way from a prompt to the states
    of its answer: the namespace goes with them.
    """

    def __init__(self, tokens: Iterable[int] = (), namespace: str = COMMON) -> None:
        super().__init__(tokens)
        self.namespace = namespace

    @overload
    def __getitem__(self, index: SupportsIndex) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> Tokens: ...
    def __getitem__(self, index: SupportsIndex | slice) -> int | Tokens:
        if isinstance(index, slice):
            return Tokens(super().__getitem__(index), self.namespace)
        return super().__getitem__(index)


@dataclass(frozen=True)
class Below:
    """Where the states of a loaded model are kept. `key` is what mlx-lm calls it, `model` what its
    layers are made by, a draft model's included.
    """

    key: Any
    model: Any
    cache: PromptCache
    _private: OrderedDict[str, PromptCache] = field(default_factory=OrderedDict, compare=False)

    def of(self, tokens: Tokens) -> PromptCache:
        """The cache of the namespace of these tokens: the same one while it is used, for each sends
        to a remote by a thread of its own.
        """
        if not tokens.namespace:
            return self.cache
        cache = self._private.pop(tokens.namespace, None) or self.cache.with_salt(tokens.namespace)
        self._private[tokens.namespace] = cache
        if len(self._private) > MOST_NAMESPACES:
            _closing([self._private.popitem(last=False)[1]])
        return cache

    def finish_sending(self) -> None:
        """Wait until a remote has what was kept, but not longer than was said."""
        for thread in _closing([self.cache, *self._private.values()]):
            thread.join()


class Tiers(mlx_cache.LRUPromptCache):  # type: ignore[misc]
    """The prompt cache of a server. `below` belongs to the model that is loaded now; None if its
    states are not kept.

    Tokens that do not say whose they are belong to nobody: they are neither found nor kept.
    """

    def __init__(self, max_size: int, backlog: Backlog) -> None:
        super().__init__(max_size)
        self.below: Below | None = None
        self._backlog = backlog
        self._held: list[Callable[[], None]] = []
        self._told = False

    # Found

    def fetch_nearest_cache(
        self, model: Any, tokens: Sequence[int]
    ) -> tuple[Layers | None, Sequence[int]]:
        """The layers that hold the longest prefix that is in memory or on disk, None if there is
        none, and the tokens still to be processed: at least one.
        """
        if not isinstance(tokens, Tokens):
            return None, tokens
        layers, rest = self._in_memory(model, tokens)
        return self._on_disk(model, tokens, len(tokens) - len(rest)) or (layers, rest)

    def _in_memory(self, model: Any, tokens: Tokens) -> tuple[Layers | None, Sequence[int]]:
        key = (model, tokens.namespace)
        layers, rest = super().fetch_nearest_cache(key, tokens)
        if rest or not tokens:
            return layers, rest
        # All of it is there: mlx-lm's generators need a token to begin with.
        if mlx_cache.can_trim_prompt_cache(layers):
            mlx_cache.trim_prompt_cache(layers, 1)
            return layers, tokens[-1:]
        layers, rest = super().fetch_nearest_cache(key, tokens[:-1])
        return layers, [*rest, tokens[-1]]

    def _on_disk(
        self, model: Any, tokens: Tokens, held: int
    ) -> tuple[Layers, Sequence[int]] | None:
        """What the store has, if it is more than `held` tokens."""
        last = len(tokens) - 1
        if not self._may_be_kept(model, tokens) or held >= last or self.below is None:
            return None
        cache = self.below.of(tokens)
        try:
            cache.bring(tokens, limit=last)
            if held and cache.match(tokens, limit=last).position <= held:
                return None
            state, layers, _ = cache.restore(tokens, self.below.model, limit=last)
        except Exception as exc:  # noqa: BLE001 - a cache that fails is a miss, whatever it is
            self._tell(f"the prompt cache is not used: {type(exc).__name__}: {exc}")
            return None
        if state is None or not isinstance(layers, list) or state.n_past <= held:
            return None
        return layers, tokens[state.n_past :]

    def _may_be_kept(self, model: Any, tokens: Tokens) -> bool:
        """Whether a store can have these tokens: not if some stand for an image of the prompt."""
        return self.below is not None and self.below.key == model and min(tokens, default=-1) >= 0

    def _tell(self, sentence: str) -> None:
        """Say it, and nothing else of the kind: a model that it is true of makes it true always."""
        if not self._told:
            log.warning("%s", sentence)
        self._told = True

    # Kept

    def insert_cache(
        self,
        model: Any,
        tokens: Sequence[int],
        prompt_cache: Layers,
        *,
        cache_type: str = "assistant",
    ) -> None:
        """Keep the state of these tokens in memory, and have it written below.

        What was given to `hold` before is called when that is done.
        """
        held, self._held = self._held, []
        state = None
        try:
            known = _cut_to(tokens, prompt_cache) if isinstance(tokens, Tokens) else None
            if known is not None:
                key = (model, known.namespace)
                super().insert_cache(key, known, prompt_cache, cache_type=cache_type)
                state = self._state(model, known, prompt_cache)
            if known is not None and state is not None and self.below is not None:
                self._backlog.write(self.below.of(known), state, lambda: _call(held))
        finally:
            if state is None:
                _call(held)

    def _state(self, model: Any, tokens: Tokens, prompt_cache: Layers) -> State | None:
        """The state that these layers hold, evaluated; None if it is not to be written."""
        if not self._may_be_kept(model, tokens) or self.below is None:
            return None
        if self.below.cache.read_only:
            return None
        try:
            state = self.below.cache.take_down(self.below.model, tokens, prompt_cache)
            state.evaluated()
        except Exception as exc:  # noqa: BLE001 - whatever it is, answers must go on
            self._tell(f"a state is not kept: {exc}")
            return None
        return state

    def hold(self, call: Callable[[], None]) -> None:
        """Call this when the next state that is inserted is in the store, or cannot be."""
        self._held.append(call)

    def release(self) -> None:
        """Call what was held now: there is no state to wait for."""
        held, self._held = self._held, []
        _call(held)


def _closing(caches: Iterable[PromptCache]) -> list[threading.Thread]:
    """Threads that wait, each for a bounded time, until what was kept is sent."""
    supplies = [cache.supply for cache in caches if cache.supply is not None]
    threads = [threading.Thread(target=supply.close, daemon=True) for supply in supplies]
    for thread in threads:
        thread.start()
    return threads


def _call(calls: Iterable[Callable[[], None]]) -> None:
    for call in calls:
        call()


def _cut_to(tokens: Tokens, layers: Layers) -> Tokens | None:
    """The tokens that these layers hold; None if that cannot be.

    After speculative decoding, layers may lack the last token that was drawn, and those of a draft
    model one more: all are cut to the shortest. Where mlx-lm could not let layers forget what was
    proposed in vain, they hold something else.
    """
    held = {length for length in lengths(layers) if isinstance(length, int)} - {0}
    if held <= {len(tokens)}:
        return tokens
    shortest = min(*held, len(tokens))
    if not mlx_cache.can_trim_prompt_cache(layers) or len(tokens) - shortest > MOST_LACKING:
        return None
    for _, leaf in leaves(layers):
        leaf.trim(leaf.offset - shortest)
    return tokens[:shortest]
