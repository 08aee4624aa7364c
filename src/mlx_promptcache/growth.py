"""Growth: how much a model's layers hold after any number of tokens.

Where a prompt is longer than every number that the layers know (the size of a window, where
quantising begins), each further pass adds what the one before it added: from there on it is a
straight line. Three passes must agree on it, or every pass is built.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from mlx_promptcache.errors import UnsupportedLayer
from mlx_promptcache.feeding import feeder
from mlx_promptcache.layers import capture_one, leaves, live_arrays, make_layers
from mlx_promptcache.passes import next_end

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlx_promptcache.feeding import Fed
    from mlx_promptcache.fingerprint import KVSettings

SETTLING = 4  # passes after which windows are full, and what three passes add can be compared


class Bytes(NamedTuple):
    """Bytes that a cache object holds: `live` in all of its arrays, padding included; and those
    that a state takes down: rows of any prefix, rows in a window, or something else.
    """

    live: int = 0
    rows: int = 0
    window: int = 0
    opaque: int = 0

    def later(self, passes: int, before: Bytes, after: Bytes) -> Bytes:
        """What it is so many passes later, if each adds what stands between two others."""
        each = zip(self, before, after, strict=True)
        return Bytes(*(mine + passes * (b - a) for mine, a, b in each))

    @property
    def state(self) -> int:
        """Of what a state takes down."""
        return self.rows + self.window + self.opaque


@dataclass(frozen=True)
class Held:
    """What one cache object holds: its place among the layers, its class, and its bytes. Where it
    is not `capturable` no state can be taken down.
    """

    path: str
    kind: str
    bytes: Bytes
    capturable: bool = True


Layout = tuple[Held, ...]
"""What each cache object of a model holds, in their order."""


class Growth:
    """How the layers of one model grow with a prompt whose passes end at multiples of `step`.

    Nothing is evaluated, unless the model itself evaluates something while it is called.
    """

    def __init__(self, model: Any, kv: KVSettings, step: int) -> None:
        self._make, self._step = feeder(model, kv), step
        known = [kv.quantized_start if kv.bits is not None else 0]
        known += [_largest(layer) for _, layer in leaves(make_layers(model, kv))]
        self._settled = (max(known) // step + SETTLING) * step
        self._layouts: dict[int, Layout] = {}

    def at(self, tokens: int) -> Layout:
        """What each cache object holds after a prompt of so many tokens."""
        if tokens <= self._settled or not self._is_straight():
            return self._measured(tokens)
        passes = (tokens - self._settled) // self._step
        near = self._measured(tokens - passes * self._step)
        before, after = (self._measured(self._settled - i * self._step) for i in (1, 0))
        return tuple(
            Held(x.path, x.kind, x.bytes.later(passes, a.bytes, b.bytes), x.capturable)
            for x, a, b in zip(near, before, after, strict=True)
        )

    def on_the_way(self, tokens: int) -> Iterator[Layout]:
        """What they hold after the passes of such a prompt: of those on the straight line only
        after the last ones.
        """
        last = (tokens - 1) // self._step * self._step
        for position in range(self._step, min(last, self._settled) + 1, self._step):
            yield self.at(position)
        yield from map(self.at, [last, tokens] if last else [tokens])

    def layers_at(self, tokens: int) -> list[Any]:
        """The layers after such a prompt, with nothing in them; new ones at each call."""
        return self._fed(tokens).layers

    @property
    def settled(self) -> int:
        """Where the straight line begins."""
        return self._settled

    def _is_straight(self) -> bool:
        layouts = [self._measured(self._settled - i * self._step) for i in (2, 1, 0)]
        return all(
            b.bytes.later(1, a.bytes, b.bytes) == c.bytes for a, b, c in zip(*layouts, strict=True)
        )

    def _measured(self, tokens: int) -> Layout:
        """What they hold after every pass of such a prompt was built; remembered on the way."""
        if tokens not in self._layouts:
            self._fed(tokens)
        return self._layouts[tokens]

    def _fed(self, tokens: int) -> Fed:
        fed, position = self._make(tokens), 0
        while position < tokens:
            end = next_end(position, tokens, self._step, ())
            fed.feed(end - position)
            position = end
            if position not in self._layouts:
                self._layouts[position] = _layout(fed.layers, position)
        return fed


def _layout(layers: list[Any], tokens: int) -> Layout:
    return tuple(_held(path, layer, tokens) for path, layer in leaves(layers))


def _held(path: str, layer: Any, tokens: int) -> Held:
    kind, live = type(layer).__name__, sum(array.nbytes for array in live_arrays([layer]))
    try:
        content = capture_one(path, layer, tokens)
    except UnsupportedLayer:
        return Held(path, kind, Bytes(live), capturable=False)
    role = "rows" if content.sliceable else "opaque" if content.opaque else "window"
    return Held(path, kind, Bytes(live, **{role: content.nbytes}))


def _largest(layer: Any) -> int:
    """The largest number among a fresh cache object's attributes: where it will change its way."""
    numbers = [value for value in getattr(layer, "__dict__", {}).values() if type(value) is int]
    return max(numbers, default=0)
