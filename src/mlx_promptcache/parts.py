"""The parts of a state: what blocks hold of it, what a snapshot holds, and how these are joined."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlx_promptcache.arrays import to_array
from mlx_promptcache.blueprint import LARGEST_UNKNOWN_BYTES, Blueprint, Shape
from mlx_promptcache.container import raw_bytes
from mlx_promptcache.errors import UnsupportedLayer
from mlx_promptcache.headers import EMBEDDING, LOGITS, RNG, WINDOW, window_span, windows_of
from mlx_promptcache.layers import TOKEN_AXIS, Layer
from mlx_promptcache.rows import name_of, stacked
from mlx_promptcache.window_rows import held, joined
from mlx_promptcache.windows import widest

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import mlx.core as mx

    from mlx_promptcache.container import Array, Dealt, Header
    from mlx_promptcache.state import State
    from mlx_promptcache.window_rows import WindowRows

# Splitting


def known_window_rows(state: State) -> list[WindowRows]:
    """All rows of windows that a state has: those that its layers and those of its marks hold, and
    those that have passed.
    """
    marks = [rows for mark in state.marks for rows in held(mark.layers, mark.position)]
    return [*held(state.contents, state.n_past), *marks, *state.passed]


def split_rows(
    state: State, known: Sequence[WindowRows], begin: int, end: int
) -> tuple[dict[str, Dealt], dict[str, list[str]], dict[str, int] | None]:
    """The rows `[begin, end)` as arrays, of which layers each array is a stack, and what a block
    says of windows: from which position on it has their rows. None if there are no windows.
    """
    arrays, stacks = stacked(
        (layer.path, name, array[:, :, begin:end])
        for layer in state.contents
        if layer.sliceable
        for name, array in layer.rows.items()
    )
    windows = [layer.window for layer in state.contents if layer.window is not None]
    if not windows:
        return arrays, stacks, None
    rows = joined(known, begin, end)
    if rows is not None:
        parts = [(path, name, a) for path, named in rows.rows.items() for name, a in named.items()]
        window_arrays, window_stacks = stacked(parts, WINDOW)
        arrays, stacks = {**arrays, **window_arrays}, {**stacks, **window_stacks}
    window = widest(windows)
    start = end if rows is None else rows.span.start
    return arrays, stacks, {"from": start, "size": window.size, "keep": window.keep}


def split_rest(state: State, *, windows: bool) -> tuple[dict[str, Array], dict[str, Any]]:
    """What a snapshot holds of a state: arrays, and JSON for what is not an array.

    With `windows` the rows of windows are among the arrays: the blocks lack some of them.
    """
    arrays: dict[str, Array] = {}
    told: dict[str, dict[str, Any]] = {"opaque": {}, "windows": {}}
    for layer in state.contents:
        if layer.sliceable:
            continue
        told["opaque" if layer.opaque else "windows"][layer.path] = _told(layer)
        own = {**layer.arrays, **(layer.rows if windows else {})}
        for name, array in own.items():
            arrays[f"{layer.path}/{name}"] = to_array(array)
    for name, value in ((LOGITS, state.logits), (EMBEDDING, state.embedding), (RNG, state.rng)):
        if value is not None:
            arrays[name] = to_array(value)
    return arrays, {
        **told,
        "sampling": state.sampling.to_json(),
        "origin": state.origin.to_json(),
        "speculation": None if state.speculation is None else state.speculation.to_json(),
    }


def _told(layer: Layer) -> dict[str, Any]:
    value: dict[str, Any] = {"kind": layer.kind, "attributes": layer.attributes}
    if layer.window is not None:
        value["window"] = list(layer.window)
    return value


# Joining


def check_block(header: Header, blueprint: Blueprint | None) -> None:
    """Compare what a block says it holds with the model's layers.

    Raises:
        UnsupportedLayer: they do not agree.
    """
    if blueprint is None:
        return
    told: set[str] = set()
    for label, entry in header.entries.items():
        name, _ = name_of(label)
        for path in header.content["stacks"][label]:
            blueprint.check_rows(path, name, entry.dtype, entry.shape[1:])
            told.add(path)
    span = window_span(header)
    lacking = set() if span.start < span.stop else set(blueprint.windows)
    if told != blueprint.rows.keys() - lacking:
        raise UnsupportedLayer("it does not hold the layers of this model")


def check_snapshot(header: Header, blueprint: Blueprint | None) -> None:
    """Compare what a snapshot says it holds with what the model's layers can hold.

    Raises:
        UnsupportedLayer: they do not agree.
    """
    content = header.content
    windows = windows_of(header)
    if blueprint is not None and (
        set(content["opaque"]) != set(blueprint.opaque) or windows != blueprint.windows
    ):
        raise UnsupportedLayer("it has opaque layers that are not those of this model")
    if blueprint is not None and _unknown_bytes(header, blueprint) > LARGEST_UNKNOWN_BYTES:
        raise UnsupportedLayer("it has more in its layers than this model can have")
    for name, entry in header.entries.items():
        path, _, array = name.partition("/")
        if path in windows and blueprint is not None:
            blueprint.check_rows(path, array, entry.dtype, entry.shape)
            if entry.shape[TOKEN_AXIS] != min(content["n_past"], windows[path].size):
                raise UnsupportedLayer(f"it lacks rows of the window of layer {path}")
        elif array and blueprint is not None:
            blueprint.check_opaque(path, array, entry.dtype, entry.shape, content["n_past"])
        elif not array and not _is_head(Shape(entry.dtype, entry.shape), name, blueprint):
            raise UnsupportedLayer(f"its {name} cannot be those of this model")


def _unknown_bytes(header: Header, blueprint: Blueprint) -> int:
    """Bytes of the arrays of opaque layers that the blueprint does not know."""
    total = 0
    for name, entry in header.entries.items():
        path, _, array = name.partition("/")
        if array and array not in blueprint.opaque.get(path, {}) and path not in blueprint.windows:
            total += raw_bytes(entry.dtype, entry.shape)
    return total


def _is_head(shape: Shape, name: str, blueprint: Blueprint | None) -> bool:
    if name == RNG:
        return shape == Shape("uint32", (2,))
    if name == LOGITS and blueprint is not None:
        return shape == blueprint.logits
    return name in {LOGITS, EMBEDDING} and len(shape.lengths) == 1 and shape.lengths[0] > 0


def opaque_layers(header: Header, arrays: Mapping[str, mx.array]) -> list[Layer]:
    """The opaque layers of a snapshot."""
    return [
        Layer(path, told["kind"], {}, of_layer(arrays, path), told["attributes"])
        for path, told in header.content["opaque"].items()
    ]


def of_layer(arrays: Mapping[str, mx.array], path: str) -> dict[str, mx.array]:
    """The arrays of a snapshot that belong to one layer, by their names there."""
    return {
        name.partition("/")[2]: array
        for name, array in arrays.items()
        if name.startswith(path + "/")
    }


def in_order(layers: Iterable[Layer]) -> tuple[Layer, ...]:
    """Layers in the order of their paths."""
    return tuple(sorted(layers, key=lambda layer: _order(layer.path)))


def _order(path: str) -> tuple[int, ...]:
    return tuple(int(part) for part in path.split("."))
