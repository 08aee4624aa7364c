"""mlx-lm's cache objects to arrays and back.

A layer's content is its instance attributes: `vars(layer)`. mlx-lm's own `state` property changed
its layout between releases, and some classes can be read through it but not written. So attributes
are taken down by name, whatever the class; only for a few classes more is known: where the rows of
a token are, and how many of them are held (the rest of a buffer is padding, or was trimmed).

Making layers is the model's business: `make_layers` asks the live model, and `fill` only sets
attributes of what it made. No class is ever looked up by a name from a file.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx

from mlx_promptcache.engine import cache as mlx_cache
from mlx_promptcache.errors import NotQuantisable, UnsupportedLayer
from mlx_promptcache.fingerprint import PLAIN
from mlx_promptcache.tree import CELL
from mlx_promptcache.windows import Window

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from mlx_promptcache.fingerprint import KVSettings

TOKEN_AXIS = 2  # of [batch, heads, tokens, head_dim]
SLICEABLE = (mlx_cache.KVCache, mlx_cache.QuantizedKVCache)
ROWS = ("keys", "values")
WINDOW_ATTRIBUTES = {*ROWS, "offset", "max_size", "keep", "_idx"}
NONE: Mapping[str, mx.array] = {}  # a plain one: states can be copied and pickled
HEAP_TYPE = 1 << 9  # CPython's flag of classes that a class statement made


class Layer(NamedTuple):
    """The content of one mlx-lm cache object, taken down.

    `path` is its place among the model's layers (`3`, or `3.0` inside a `CacheList`).

    A sliceable layer has `rows`, arrays of `[batch, heads, n_past, ...]`, and may have `padded`,
    the same in buffers with room for more. A layer with a `window` has the rows of the positions
    that the window holds, in their order, and in `attributes` how they lie in its ring (None: in
    their order). An opaque one has `attributes`, JSON with `{"array": name}` where an array of
    `arrays` belongs.
    """

    path: str
    kind: str
    rows: Mapping[str, mx.array] = NONE
    arrays: Mapping[str, mx.array] = NONE
    attributes: Mapping[str, Any] | None = None
    window: Window | None = None
    padded: Mapping[str, mx.array] = NONE

    @property
    def held(self) -> list[mx.array]:
        """All its arrays."""
        return [*self.rows.values(), *self.arrays.values(), *self.padded.values()]

    @property
    def sliceable(self) -> bool:
        """Whether any prefix of its rows is a valid layer."""
        return self.attributes is None and self.window is None

    @property
    def opaque(self) -> bool:
        """Whether nothing is known of it: then it has no rows."""
        return self.attributes is not None and self.window is None

    def cut(self, position: int) -> Layer:
        """The layer at an earlier position. Only a sliceable layer has one."""
        rows = {name: array[:, :, :position] for name, array in self.rows.items()}
        return Layer(self.path, self.kind, rows)

    @property
    def nbytes(self) -> int:
        """Bytes that the arrays take in memory."""
        return sum(a.nbytes for a in (*self.rows.values(), *self.arrays.values()))


# From live layers


def make_layers(model: Any, kv: KVSettings) -> list[Any]:
    """Empty layers, as the model makes them."""
    return list(mlx_cache.make_prompt_cache(model, max_kv_size=kv.max_size))


def leaves(layers: Iterable[Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every cache object with its path; those inside a `CacheList` one by one.

    A class derived from `CacheList` is one of its own: it may keep more than its list.
    """
    for i, layer in enumerate(layers):
        if type(layer) is mlx_cache.CacheList:
            yield from leaves(layer.caches, f"{prefix}{i}.")
        else:
            yield f"{prefix}{i}", layer


def lengths(layers: Iterable[Any]) -> set[Any]:
    """How many tokens the layers say that they hold: one number where all agree. A model may make
    layers that it never writes to: these do not count, unless all are such.
    """
    said = {layer.offset for _, layer in leaves(layers) if hasattr(layer, "offset")}
    return said - {0} or said


def is_sliceable(layer: Any, n_past: int) -> bool:
    """Whether the layer holds one row for each of `n_past` tokens, and any prefix is valid."""
    return type(layer) in SLICEABLE and layer.keys is not None and layer.offset == n_past


def to_be_quantised(layers: Iterable[Any], kv: KVSettings) -> bool:
    """Whether `quantise` would replace any of these layers."""
    return any(_is_due(layer, kv) for layer in layers)


def _is_due(layer: Any, kv: KVSettings) -> bool:
    return (
        kv.bits is not None
        and hasattr(layer, "to_quantized")
        and layer.offset >= kv.quantized_start
    )


def quantise(layers: list[Any], kv: KVSettings) -> None:
    """Replace layers by quantised ones where mlx-lm would: in place, after a pass.

    Raises:
        NotQuantisable: mlx-lm cannot quantise this kind of layer, or not so.
    """
    for i, layer in enumerate(layers):
        if _is_due(layer, kv):
            try:
                layers[i] = layer.to_quantized(group_size=kv.group_size, bits=kv.bits)
            except NotImplementedError:
                raise NotQuantisable(
                    f"mlx-lm cannot quantise a {type(layer).__name__}: leave --kv-bits out"
                ) from None
            except ValueError as exc:
                raise NotQuantisable(f"these layers cannot be quantised so: {exc}") from exc


def check_quantised(layers: Iterable[Any], n_past: int, kv: KVSettings) -> None:
    """Raise UnsupportedLayer unless layers of `n_past` tokens are as these settings make them."""
    for path, layer in enumerate(layers):  # those inside others are never quantised
        if type(layer) is mlx_cache.QuantizedKVCache:
            sound = (layer.bits, layer.group_size) == (kv.bits, kv.group_size)
        else:
            sound = not is_sliceable(layer, n_past) or kv.phase_at(n_past) == PLAIN
        if not sound:
            raise UnsupportedLayer(f"layer {path} was made with other KV cache settings than these")


def live_arrays(layers: Iterable[Any]) -> list[mx.array]:
    """All arrays that the layers hold, padding included: what is to be evaluated."""
    found: list[mx.array] = []
    for _, layer in leaves(layers):
        _collect(getattr(layer, "__dict__", layer), found)
    return found


def _collect(value: Any, found: list[mx.array]) -> None:
    if isinstance(value, mx.array):
        found.append(value)
    elif isinstance(value, dict):
        for item in value.values():
            _collect(item, found)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _collect(item, found)


def may_be_padded(layers: Iterable[Any]) -> bool:
    """Whether prompts that mlx-lm pads to one length, to feed them side by side, are computed as
    each would be alone. Rows can be masked; many models' other layers take padding for tokens.
    """
    return all(type(layer) in (mlx_cache.KVCache, mlx_cache.RotatingKVCache) for layer in layers)


def exchange(layers: Iterable[Any], other: Callable[[mx.array], mx.array]) -> None:
    """Put another array in the place of each that the layers hold, in the same order."""
    for _, layer in leaves(layers):
        held = vars(layer)
        held.update({name: _exchanged(value, other) for name, value in held.items()})


def _exchanged(value: Any, other: Callable[[mx.array], mx.array]) -> Any:
    if isinstance(value, mx.array):
        return other(value)
    if isinstance(value, dict):
        return {name: _exchanged(item, other) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_exchanged(item, other) for item in value])
    return value


def let_go(layers: Iterable[Any]) -> None:
    """Let arrays that are parts of larger ones have memory of their own, once they are evaluated.

    Many recurrent layers keep the last rows of what went through a pass: all of it would stay in
    memory as long as these do, or a mark of them. Where mlx-lm knows rows it makes room itself.
    """
    for _, layer in leaves(layers):
        if type(layer) not in {*SLICEABLE, mlx_cache.RotatingKVCache, mlx_cache.ChunkedKVCache}:
            held = getattr(layer, "__dict__", {})
            held.update({name: _apart(value) for name, value in held.items()})


def _apart(value: Any) -> Any:
    if isinstance(value, mx.array):
        return mx.contiguous(value)  # copies only what is a small part of something
    if type(value) in {list, tuple}:
        return type(value)(_apart(item) for item in value)
    return value


def capture(layers: Iterable[Any], n_past: int) -> tuple[Layer, ...]:
    """Take down the content of live layers that hold `n_past` tokens.

    The live layers may go on: nothing that they do reaches what was taken down. Padding and trimmed
    rows are left out.

    Raises:
        UnsupportedLayer: an attribute is neither array nor number nor text, an object keeps content
            elsewhere than in attributes, or mlx-lm itself loses rows of such a layer.
    """
    return tuple(capture_one(path, layer, n_past) for path, layer in leaves(layers))


def capture_one(path: str, layer: Any, n_past: int) -> Layer:
    """Take down one live layer; see `capture`."""
    kind = type(layer).__name__
    if type(layer) is mlx_cache.ChunkedKVCache and chunks_lose_rows():
        raise UnsupportedLayer(
            f"layer {path} is a {kind}, which loses rows in this release of mlx-lm: use a newer one"
        )
    if is_sliceable(layer, n_past):
        return Layer(path, kind, {name: a[:, :, :n_past] for name, a in _rows(layer)})
    if (window := window_of(layer, n_past)) is not None:
        return _capture_window(path, layer, n_past, window)
    if not _is_all_attributes(layer):
        raise UnsupportedLayer(f"layer {path} is a {kind}, which keeps more than attributes")
    arrays: dict[str, mx.array] = {}
    held = _held_rows(layer)
    attributes = {
        name: _take_down(value, name, held if name in ROWS else None, arrays, f"{path} ({kind})")
        for name, value in vars(layer).items()
    }
    return Layer(path, kind, {}, arrays, attributes)


def window_of(layer: Any, n_past: int) -> Window | None:
    """The window of a layer that holds `n_past` tokens as a window does; else None."""
    if not _is_window(layer) or layer.keys is None:
        return None
    window = Window(layer.max_size, layer.keep)
    sound = layer.offset == n_past and 0 <= window.keep < window.size
    rows = _in_order(layer, "keys").shape[TOKEN_AXIS]
    return window if sound and rows >= min(n_past, window.size) else None


def _is_window(layer: Any) -> bool:
    """Whether this is the class that is known here: a release that adds to it may mean more."""
    return type(layer) is mlx_cache.RotatingKVCache and vars(layer).keys() == WINDOW_ATTRIBUTES


def _capture_window(path: str, layer: Any, n_past: int, window: Window) -> Layer:
    held = min(n_past, window.size)
    rows = {}
    for name in ROWS:
        ordered = _in_order(layer, name)
        surplus = ordered.shape[TOKEN_AXIS] - held  # more than a window after a long pass
        if surplus:
            kept = ordered[:, :, : window.keep]
            ordered = mx.concatenate([kept, ordered[:, :, window.keep + surplus :]], TOKEN_AXIS)
        rows[name] = ordered
    attributes = {name: value for name, value in vars(layer).items() if name not in ROWS}
    attributes["_idx"] = min(layer._idx, held)
    return Layer(path, type(layer).__name__, rows, {}, attributes, window)


def _in_order(layer: Any, name: str) -> mx.array:
    """The rows of a rotating layer in the order of their positions, without padding."""
    buffer: mx.array = getattr(layer, name)
    length = buffer.shape[TOKEN_AXIS]
    if layer.offset < length:
        return buffer[:, :, : layer.offset]
    if layer._idx == length or length < layer.max_size:
        return buffer
    parts = [
        buffer[:, :, : layer.keep],
        buffer[:, :, layer._idx :],
        buffer[:, :, layer.keep : layer._idx],
    ]
    return mx.concatenate(parts, TOKEN_AXIS)


def latest_rows(layer: Any, n_past: int, count: int) -> tuple[int, dict[str, mx.array]]:
    """The rows of a window for positions `[start, n_past)`, at most `count`, and `start`.

    After a pass of many tokens mlx-lm's buffer holds the rows of all of them, also those that the
    window has moved past. They are copies.
    """
    rows = {name: _in_order(layer, name) for name in ROWS}
    length = rows["keys"].shape[TOKEN_AXIS]
    count = min(count, length if length == n_past else length - layer.keep)
    return n_past - count, {
        name: mx.contiguous(array[:, :, length - count :]) for name, array in rows.items()
    }


def _is_all_attributes(layer: Any) -> bool:
    """Whether there is nothing of an object but its `__dict__`: no slots, no list or dict within,
    as in a class that is derived from one, such as MLX's `Module`.
    """
    classes = type(layer).__mro__[:-1]
    slots = any(vars(one).get("__slots__") for one in classes)
    return not slots and bool(classes) and all(one.__flags__ & HEAP_TYPE for one in classes)


def _rows(layer: Any) -> Iterator[tuple[str, mx.array]]:
    for name in ROWS:
        value = getattr(layer, name)
        if isinstance(value, mx.array):
            yield name, value
        else:
            for i, part in enumerate(value):
                yield f"{name}.{i}", part


@functools.cache
def chunks_lose_rows() -> bool:
    """Whether this mlx-lm counts a chunk's padding when it drops the oldest rows, as 0.31 does.

    Rows that are still needed go with them, and which ones depends on where passes ended: another
    release would go on from such a state as from no run of its own. Nothing is evaluated.
    """
    layer, row = mlx_cache.ChunkedKVCache(2), mx.zeros((1, 1, 1, 1))
    layer.update_and_fetch(row, row)
    layer.maybe_trim_front()
    return bool(layer.start_position)


def _held_rows(layer: Any) -> int | None:
    """How many rows of an opaque layer's buffers are content; None where all are."""
    if type(layer) in {mlx_cache.RotatingKVCache, *SLICEABLE}:
        return int(layer.offset)
    if type(layer) is mlx_cache.ChunkedKVCache:
        return int(layer.offset - layer.start_position)
    return None


def _take_down(
    value: Any, name: str, held: int | None, arrays: dict[str, mx.array], where: str
) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, mx.array):
        if held is not None and value.ndim > TOKEN_AXIS and held < value.shape[TOKEN_AXIS]:
            value = value[:, :, :held]
        arrays[name] = mx.array(value)  # another object: the live one may be written in place
        return {"array": name}
    if isinstance(value, (list, tuple)):
        items = [
            _take_down(item, f"{name}.{i}", held, arrays, where) for i, item in enumerate(value)
        ]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    raise UnsupportedLayer(
        f"layer {where} keeps a {type(value).__name__} in {name!r}, which cannot be taken down"
    )


# To live layers


def fill(layers: list[Any], contents: Sequence[Layer], n_past: int, kv: KVSettings) -> None:
    """Fill empty layers, in place, so that they hold `n_past` tokens.

    The contents stay as they are, whatever is done with the layers afterwards.

    Raises:
        UnsupportedLayer: the contents are not those of such layers.
    """
    by_path = {content.path: content for content in contents}
    live = dict(leaves(layers))
    if by_path.keys() != live.keys():
        raise UnsupportedLayer(
            f"it has {len(by_path)} layers, and this model has {len(live)} of its own"
        )
    for path, layer in live.items():
        content = by_path[path]
        if content.window is not None:
            _fill_window(layer, content, content.window, n_past)
            continue
        if content.opaque:
            if type(layer) is mlx_cache.KVCache and "bits" in (content.attributes or {}):
                layer = layers[int(path)] = _quantised_layer(kv)  # quantised before it was written
            _fill_opaque(layer, content, n_past)
            continue
        if type(layer) not in SLICEABLE:
            raise UnsupportedLayer(f"layer {path} is a {type(layer).__name__} and takes no rows")
        if "keys" not in content.rows and type(layer) is mlx_cache.KVCache:
            layer = layers[int(path)] = _quantised_layer(kv)
        _fill_rows(layer, content, n_past)


def _quantised_layer(kv: KVSettings) -> Any:
    return mlx_cache.QuantizedKVCache(kv.group_size, kv.bits or 0)


def _fill_rows(layer: Any, content: Layer, n_past: int) -> None:
    for name in ROWS:
        if name in content.rows:
            setattr(layer, name, _with_room(content, name))
        else:
            parts = [f"{name}.{i}" for i in range(3)]
            if not content.rows.keys() >= set(parts):
                raise UnsupportedLayer(f"layer {content.path} has no {name}")
            setattr(layer, name, tuple(_with_room(content, part) for part in parts))
    layer.offset = n_past


def _with_room(content: Layer, name: str) -> mx.array:
    """Rows in a buffer that ends with its cell, as mlx-lm's own buffers do: the next token is then
    written in place. Always another array object: layers write into theirs.
    """
    if name in content.padded:
        return mx.array(content.padded[name])
    rows = content.rows[name]
    missing = -rows.shape[TOKEN_AXIS] % CELL
    if not missing:
        return mx.array(rows)
    shape = list(rows.shape)
    shape[TOKEN_AXIS] = missing
    return mx.concatenate([rows, mx.zeros(shape, rows.dtype)], axis=TOKEN_AXIS)


def _fill_window(layer: Any, content: Layer, window: Window, n_past: int) -> None:
    """Lay the rows of a window where they were in its ring, or in the order of their positions."""
    held = min(n_past, window.size)
    if not _is_window(layer) or any(
        name not in content.rows or content.rows[name].shape[TOKEN_AXIS] != held for name in ROWS
    ):
        raise UnsupportedLayer(f"layer {content.path} holds no such window")
    if content.attributes is None:
        layer.offset, layer._idx = n_past, held
    else:
        _fill_opaque(layer, content, n_past)
    turned = layer._idx != held  # only a full ring is
    if (
        (layer.max_size, layer.keep, layer.offset) != (*window, n_past)
        or (turned and held < window.size)
        or not min(window.keep, held) <= layer._idx <= held
    ):
        raise UnsupportedLayer(f"layer {content.path} does not hold such a window")
    turn = window.keep + held - layer._idx  # where the ring's first row is in the order
    for name in ROWS:
        rows = content.rows[name]
        if turned:
            parts = [rows[:, :, : window.keep], rows[:, :, turn:], rows[:, :, window.keep : turn]]
            rows = mx.concatenate(parts, TOKEN_AXIS)
        setattr(layer, name, mx.array(rows))


def _fill_opaque(layer: Any, content: Layer, n_past: int) -> None:
    """Set the attributes that the live layer has, each to a value of its own kind, nothing else."""
    where = f"layer {content.path} ({type(layer).__name__})"
    unknown = vars(layer).keys() - (content.attributes or {}).keys() - content.rows.keys()
    if unknown:
        raise UnsupportedLayer(f"{where} of this mlx-lm has {min(unknown)!r}, which the file lacks")
    for name, value in (content.attributes or {}).items():
        if name not in vars(layer):
            if value is None:  # another release of mlx-lm had it, and did not use it
                continue
            raise UnsupportedLayer(f"{where} of this mlx-lm has no {name!r}")
        built = _build(value, content)
        default = vars(layer)[name]
        if not _fits(built, default):
            raise UnsupportedLayer(f"{where} cannot hold a {type(built).__name__} in {name!r}")
        if _are_slots(default) and len(built or ()) != len(default):
            raise UnsupportedLayer(f"{where} has {len(default)} places in {name!r}")
        if name == "offset" and not isinstance(built, mx.array) and built not in {0, n_past}:
            raise UnsupportedLayer(f"{where} does not hold {n_past} tokens")
        setattr(layer, name, built)


def _fits(built: Any, default: Any) -> bool:
    """Whether an attribute that is made as `default` may come to be this. None may come to be
    anything, and a number another one, or an array of them.
    """
    if default is None or built is None or type(built) is type(default):
        return True
    return _is_number(default) and (_is_number(built) or isinstance(built, mx.array))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _are_slots(value: Any) -> bool:
    """Whether it is a list of places to be filled, whose number is the model's."""
    return isinstance(value, (list, tuple)) and bool(value) and all(x is None for x in value)


def _build(value: Any, content: Layer) -> Any:
    if not isinstance(value, dict):
        return value
    array = content.arrays.get(str(value.get("array")))
    if array is not None:
        return mx.array(array)
    for name, sequence in (("tuple", tuple), ("list", list)):
        if isinstance(value.get(name), list):
            return sequence(_build(item, content) for item in value[name])
    raise UnsupportedLayer(f"layer {content.path} has an attribute that makes no sense")
