"""Working memory: about how much a pass takes while it is computed.

MLX tells of a forward call, which it has built and not evaluated, what arrays it would make of
which others. They are gone through in that order: an array is there from when it is made until the
last that is made of it. MLX itself does better, since it writes over what nobody needs any more,
and worse, since it makes some arrays before others are gone: so this is a size, not a limit.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_promptcache.layers import exchange, live_arrays
from mlx_promptcache.streams import uncompiled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Forward = Callable[[mx.array, list[Any]], tuple[mx.array, Any]]
    Told = dict[str, Any]

log = logging.getLogger("mlx_promptcache")

VIEWS = {  # other looks at the same memory
    "AsStrided", "Broadcast", "Contiguous", "Copy", "ExpandDims", "Flatten", "Reshape", "Slice",
    "Split", "Squeeze", "StopGradient", "Transpose", "Unflatten", "View",
}  # fmt: skip


def working_bytes(forward: Forward, layers: list[Any], count: int) -> int | None:
    """About how many bytes one pass of `count` tokens takes beyond what the layers hold after it.

    The layers are used up. None if MLX, or this model, cannot be asked.
    """
    told = _told(forward, layers, count)
    if told is None:
        return None
    return _most_bytes(told) - sum(map(_nbytes, _of(told, "outputs")))


def is_told(forward: Forward, make_layers: Callable[[], list[Any]]) -> bool:
    """Whether it is worth asking: short passes can be told of, and longer ones are no longer to
    tell. Where a model computes its tokens one by one, a whole pass would take minutes.
    """
    short, longer = (_told(forward, make_layers(), count) for count in (2, 3))
    return short is not None and longer is not None and len(short) == len(longer)


def _told(forward: Forward, layers: list[Any], count: int) -> list[Told] | None:
    """What MLX tells of a pass; None if there is something that it cannot tell of."""
    told: list[Told] = []

    def passing(*arrays: mx.array) -> list[mx.array]:
        given = iter(arrays)
        exchange(layers, lambda _: next(given))
        logits, _ = forward(mx.zeros((1, count), mx.int32), layers)
        return [logits, *live_arrays(layers)]

    try:
        with uncompiled():  # what is compiled cannot be told of
            mx.export_function(told.append, passing, *live_arrays(layers))
    except Exception as exc:  # noqa: BLE001 - a model that evaluates something, or another MLX
        log.debug("what a pass takes cannot be told: %s", exc)
        return None
    return told


def _most_bytes(told: list[Told]) -> int:
    """The most bytes that are there at any time."""
    steps = [step for step in told if step["type"] == "primitive"]
    memory = _memory(steps)
    last = {memory.get(name, name): i for i, name in _named(steps)}
    for name, *_ in _of(told, "outputs"):
        last.pop(memory.get(name, name), None)  # they stay
    held = {array[0]: _nbytes(array) for array in _of(told, "inputs")}
    live = most = sum(held.values())
    for i, step in enumerate(steps):
        for array in step["outputs"]:
            if array[0] not in memory:
                held[array[0]] = _nbytes(array)
                live += held[array[0]]
        most = max(most, live)
        for name in {memory.get(x[0], x[0]) for x in (*step["inputs"], *step["outputs"])}:
            if last.get(name) == i:
                live -= held.pop(name, 0)
    return most


def _memory(steps: list[Told]) -> dict[str, str]:
    """Of every array that is another look at one, the array whose memory it is."""
    memory: dict[str, str] = {}
    for step in steps:
        if step["name"] in VIEWS and step["inputs"]:
            source = step["inputs"][0][0]
            memory.update((array[0], memory.get(source, source)) for array in step["outputs"])
    return memory


def _named(steps: list[Told]) -> Iterator[tuple[int, str]]:
    for i, step in enumerate(steps):
        for array in (*step["inputs"], *step["outputs"]):
            yield i, array[0]


def _of(told: list[Told], kind: str) -> list[Any]:
    return [array for step in told if step["type"] == kind for array in step[kind]]


def _nbytes(array: Any) -> int:
    _, shape, dtype = array
    return int(math.prod(shape) * dtype.size)
