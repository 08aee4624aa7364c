"""Feeding: layers that grow as those of a run do, while nothing is computed.

MLX builds a forward call before it evaluates it, and mlx-lm's cache objects grow while it is built.
So a prompt of zeros is fed, shapes are read, and nothing is ever evaluated.

Building takes time for every layer and pass. Cache objects whose code is known are therefore fed
alone, with rows like those that the model gives them. That is tried before it is believed; where it
does not do what the model does, the whole model is fed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_promptcache.engine import cache as mlx_cache
from mlx_promptcache.layers import (
    ROWS,
    TOKEN_AXIS,
    exchange,
    leaves,
    live_arrays,
    make_layers,
    quantise,
    to_be_quantised,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from mlx_promptcache.fingerprint import KVSettings

    Kind = tuple[tuple[int, ...], mx.Dtype]  # of an array

KNOWN = (mlx_cache.KVCache, mlx_cache.RotatingKVCache, mlx_cache.ChunkedKVCache)
PROBES = (2, 62)  # tokens of two passes: what grows with every 4 or 32 tokens is seen to grow


class Fed:
    """The layers of a model, which is fed with one pass after the other."""

    def __init__(self, model: Any, kv: KVSettings) -> None:
        self.layers = make_layers(model, kv)
        self._model, self._kv = model, kv

    def feed(self, count: int) -> None:
        """One pass of so many tokens, and what a run does with the layers after it."""
        self._pass(count)
        if to_be_quantised(self.layers, self._kv):
            quantise(self.layers, self._kv)
        exchange(self.layers, _blank)  # or each pass would hold on to all before it

    def _pass(self, count: int) -> None:
        self._model(mx.zeros((1, count), mx.int32), cache=self.layers)


class FedAlone(Fed):
    """The layers of a model that are fed without it, as those of `probed` were with it."""

    def __init__(self, model: Any, kv: KVSettings, probed: Fed) -> None:
        super().__init__(model, kv)
        self._rows: dict[str, list[Kind]] = {}
        live = dict(leaves(self.layers))
        for path, layer in leaves(probed.layers):
            if type(layer) in KNOWN and layer.keys is not None:
                self._rows[path] = [_kind(getattr(layer, name)) for name in ROWS]
            else:  # it holds what it will always hold
                vars(live[path]).update(vars(layer))

    def _pass(self, count: int) -> None:
        for path, layer in leaves(self.layers):
            if path not in self._rows:
                continue
            if type(layer) is mlx_cache.ChunkedKVCache:
                layer.maybe_trim_front()  # as the model does before each pass
            layer.update_and_fetch(*(_rows(kind, count) for kind in self._rows[path]))


def feeder(model: Any, kv: KVSettings) -> Callable[[int], Fed]:
    """What makes layers of a model to be fed with so many tokens: alone, if that does what feeding
    the model does. With few tokens it never does: some layers fill up first.
    """
    plain = replace(kv, bits=None)
    probed = Fed(model, plain)
    shapes = _probe(probed)
    classes = {type(layer) for _, layer in leaves(probed.layers)}
    if classes <= {*KNOWN, mlx_cache.ArraysCache}:
        alone = FedAlone(model, plain, probed)
        if _probe(alone) == shapes:
            return lambda n: FedAlone(model, kv, probed) if n > sum(PROBES) else Fed(model, kv)
    return lambda _: Fed(model, kv)


def _probe(fed: Fed) -> list[list[Kind]]:
    """The arrays of the layers after each of the probes."""
    found = []
    for count in PROBES:
        fed.feed(count)
        found.append([_kind(array) for array in live_arrays(fed.layers)])
    return found


def _kind(array: mx.array) -> Kind:
    return array.shape, array.dtype


def _rows(kind: Kind, count: int) -> mx.array:
    """Rows of zeros for so many tokens."""
    shape, dtype = kind
    return mx.zeros((*shape[:TOKEN_AXIS], count, *shape[TOKEN_AXIS + 1 :]), dtype)


def _blank(array: mx.array) -> mx.array:
    """The same with zeros."""
    return mx.zeros(array.shape, array.dtype)
