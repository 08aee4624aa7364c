"""Layers that are lent to mlx-lm's own loop, and the states that come back in them."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_promptcache.errors import UnsupportedLayer
from mlx_promptcache.layers import capture, check_quantised, leaves, lengths, make_layers
from mlx_promptcache.passes import UNKNOWN
from mlx_promptcache.state import State, Trail

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mlx_promptcache.fingerprint import KVSettings
    from mlx_promptcache.state import Ref


class Lent:
    """Which states the layers began as that programs were given."""

    def __init__(self, kv: KVSettings) -> None:
        self._kv = kv
        self._states: weakref.WeakKeyDictionary[Any, State] = weakref.WeakKeyDictionary()

    def lend(self, layers: Sequence[Any], state: State) -> None:
        """Remember what these layers hold, for as long as somebody has them."""
        for _, layer in leaves(layers):
            self._states[layer] = state

    def taken_down(self, model: Any, tokens: Sequence[int], layers: Sequence[Any]) -> State:
        """The state that layers hold, without logits. Nothing is evaluated, and they may go on.

        Raises:
            UnsupportedLayer: they hold another number of tokens, or cannot be taken down.
        """
        held = tuple(int(token) for token in tokens)
        expected = [path for path, _ in leaves(make_layers(model, self._kv))]
        if expected != [path for path, _ in leaves(layers)]:
            raise UnsupportedLayer("these layers are not those that the model makes")
        others = lengths(layers) - {len(held)}
        if others:
            raise UnsupportedLayer(
                f"{len(held)} tokens were given, and the layers hold {max(others)}: give those "
                "that they hold"
            )
        if not held:
            raise UnsupportedLayer("no tokens were given: give those that the layers hold")
        check_quantised(layers, len(held), self._kv)
        return State(
            tokens=held,
            contents=capture(layers, len(held)),
            logits=None,
            embedding=None,
            rng=mx.random.key(0),  # nothing was drawn: the same layers are the same state
            kv=self._kv,
            lineage=UNKNOWN,
            trail=Trail(self._refs_of(layers, held)),
        )

    def _refs_of(self, layers: Sequence[Any], tokens: tuple[int, ...]) -> tuple[Ref, ...]:
        """The blocks that layers came from, if they were lent."""
        first = next((layer for _, layer in leaves(layers)), None)
        state = self._states.get(first) if first is not None else None
        if state is None or tokens[: state.n_past] != state.tokens:
            return ()
        if self._kv.phase_at(state.n_past) != self._kv.phase_at(len(tokens)):  # quantised since
            return ()
        return state.trail.refs
