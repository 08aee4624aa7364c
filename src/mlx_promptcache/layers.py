"""mlx-lm's cache objects to arrays and back.

A layer's content is its instance attributes: `vars(layer)`. mlx-lm's own `state` property changed
its layout between releases, and some classes can be read through it but not written. So attributes
are taken down by name, whatever the class; only for a few classes more is known: where the rows of
a token are, and how many of them are held (the rest of a buffer is padding, or was trimmed).

Making layers is the model's business: `make_layers` asks the live model, and `fill` only sets
attributes of what it made. No class is ever looked up by a name from a file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx_lm.models import cache as mlx_cache

from mlx_promptcache.container import ITEMSIZE, Array
from mlx_promptcache.errors import UnsupportedLayer
from mlx_promptcache.fingerprint import PLAIN
from mlx_promptcache.tree import CELL

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from mlx_promptcache.fingerprint import KVSettings

TOKEN_AXIS = 2  # of [batch, heads, tokens, head_dim]
SLICEABLE = (mlx_cache.KVCache, mlx_cache.QuantizedKVCache)
ROWS = ("keys", "values")
PROBE_TOKENS = 2
LARGEST_UNKNOWN_BYTES = 1 << 26


@dataclass(frozen=True)
class Layer:
    """The content of one mlx-lm cache object, taken down.

    `path` is its place among the model's layers (`3`, or `3.0` inside a `CacheList`). A sliceable
    layer has `rows`, arrays of `[batch, heads, n_past, ...]`. An opaque one has `attributes`, JSON
    with `{"array": name}` where an array of `arrays` belongs.
    """

    path: str
    kind: str
    rows: Mapping[str, mx.array] = field(default_factory=dict)
    arrays: Mapping[str, mx.array] = field(default_factory=dict)
    attributes: Mapping[str, Any] | None = None

    @property
    def sliceable(self) -> bool:
        """Whether any prefix of its rows is a valid layer."""
        return self.attributes is None

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
    """Every cache object with its path; those inside a `CacheList` one by one."""
    for i, layer in enumerate(layers):
        if isinstance(layer, mlx_cache.CacheList):
            yield from leaves(layer.caches, f"{prefix}{i}.")
        else:
            yield f"{prefix}{i}", layer


def is_sliceable(layer: Any, n_past: int) -> bool:
    """Whether the layer holds one row for each of `n_past` tokens, and any prefix is valid."""
    return type(layer) in SLICEABLE and layer.keys is not None and layer.offset == n_past


def to_be_quantised(layers: Iterable[Any], kv: KVSettings) -> bool:
    """Whether `quantise` would replace any of these layers."""
    return kv.bits is not None and any(
        hasattr(layer, "to_quantized") and layer.offset >= kv.quantized_start for layer in layers
    )


def quantise(layers: list[Any], kv: KVSettings) -> None:
    """Replace layers by quantised ones where mlx-lm would: in place, after a pass.

    Raises:
        UnsupportedLayer: mlx-lm cannot quantise this kind of layer.
    """
    if kv.bits is None:
        return
    for i, layer in enumerate(layers):
        if hasattr(layer, "to_quantized") and layer.offset >= kv.quantized_start:
            try:
                layers[i] = layer.to_quantized(group_size=kv.group_size, bits=kv.bits)
            except NotImplementedError:
                raise UnsupportedLayer(
                    f"mlx-lm cannot quantise a {type(layer).__name__}: leave --kv-bits out"
                ) from None
            except ValueError as exc:
                raise UnsupportedLayer(f"these layers cannot be quantised so: {exc}") from exc


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
        _collect(vars(layer), found)
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


def capture(layers: Iterable[Any], n_past: int) -> tuple[Layer, ...]:
    """Take down the content of live layers that hold `n_past` tokens.

    The live layers may go on: nothing that they do reaches what was taken down. Padding and trimmed
    rows are left out.

    Raises:
        UnsupportedLayer: an attribute is neither array nor number nor text.
    """
    return tuple(capture_one(path, layer, n_past) for path, layer in leaves(layers))


def capture_one(path: str, layer: Any, n_past: int) -> Layer:
    """Take down one live layer; see `capture`."""
    kind = type(layer).__name__
    if is_sliceable(layer, n_past):
        return Layer(path, kind, {name: a[:, :, :n_past] for name, a in _rows(layer)})
    arrays: dict[str, mx.array] = {}
    held = _held_rows(layer)
    attributes = {
        name: _take_down(value, name, held if name in ROWS else None, arrays, f"{path} ({kind})")
        for name, value in vars(layer).items()
    }
    return Layer(path, kind, {}, arrays, attributes)


def _rows(layer: Any) -> Iterator[tuple[str, mx.array]]:
    for name in ROWS:
        value = getattr(layer, name)
        if isinstance(value, mx.array):
            yield name, value
        else:
            for i, part in enumerate(value):
                yield f"{name}.{i}", part


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
        if not content.sliceable:
            _fill_opaque(layer, content, n_past)
            continue
        if type(layer) not in SLICEABLE:
            raise UnsupportedLayer(f"layer {path} is a {type(layer).__name__} and takes no rows")
        if "keys" not in content.rows and type(layer) is mlx_cache.KVCache:
            layer = mlx_cache.QuantizedKVCache(kv.group_size, kv.bits or 0)
            layers[int(path)] = layer
        _fill_rows(layer, content, n_past)


def _fill_rows(layer: Any, content: Layer, n_past: int) -> None:
    for name in ROWS:
        whole = content.rows.get(name)
        if whole is not None:
            setattr(layer, name, _with_room(whole))
        else:
            parts = [content.rows.get(f"{name}.{i}") for i in range(3)]
            if any(part is None for part in parts):
                raise UnsupportedLayer(f"layer {content.path} has no {name}")
            setattr(layer, name, tuple(_with_room(part) for part in parts if part is not None))
    layer.offset = n_past


def _with_room(rows: mx.array) -> mx.array:
    """The rows in a buffer that ends with its cell, as mlx-lm's own buffers do: the next token
    is then written in place. Always another array object: layers write into theirs.
    """
    missing = -rows.shape[TOKEN_AXIS] % CELL
    if not missing:
        return mx.array(rows)
    shape = list(rows.shape)
    shape[TOKEN_AXIS] = missing
    return mx.concatenate([rows, mx.zeros(shape, rows.dtype)], axis=TOKEN_AXIS)


def _fill_opaque(layer: Any, content: Layer, n_past: int) -> None:
    """Set the attributes that the live layer has, each to a value of its own kind, nothing else."""
    where = f"layer {content.path} ({type(layer).__name__})"
    unknown = vars(layer).keys() - (content.attributes or {}).keys()
    if unknown:
        raise UnsupportedLayer(f"{where} of this mlx-lm has {min(unknown)!r}, which the file lacks")
    for name, value in (content.attributes or {}).items():
        if name not in vars(layer):
            if value is None:  # another release of mlx-lm had it, and did not use it
                continue
            raise UnsupportedLayer(f"{where} of this mlx-lm has no {name!r}")
        built = _build(value, content)
        default = vars(layer)[name]
        if default is not None and built is not None and type(built) is not type(default):
            raise UnsupportedLayer(f"{where} cannot hold a {type(built).__name__} in {name!r}")
        if name == "offset" and built not in {0, n_past}:
            raise UnsupportedLayer(f"{where} does not hold {n_past} tokens")
        setattr(layer, name, built)


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


# What layers look like


@dataclass(frozen=True)
class Shape:
    """An array's dtype and shape; a length of 0 stands for any number of tokens."""

    dtype: str
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Blueprint:
    """What a live model's layers look like: by path, the arrays of its rows, or of its content.

    Files are compared with it before anything is allocated.
    """

    rows: Mapping[str, Mapping[str, Shape]]
    opaque: Mapping[str, Mapping[str, Shape]]
    logits: Shape

    @property
    def sliceable(self) -> bool:
        """Whether every layer is: then any position of what is stored can be resumed."""
        return not self.opaque

    @property
    def quantises(self) -> bool:
        """Whether there are layers that may be quantised."""
        return any("keys.0" in rows for rows in self.rows.values())

    @classmethod
    def of(cls, model: Any, kv: KVSettings) -> Blueprint:
        """Read it off a forward call over two tokens that is built, but never evaluated.

        Where layers may be quantised, they may look like either.

        Raises:
            UnsupportedLayer: they cannot be taken down, or cannot be quantised as `kv` asks.
        """
        blueprint = cls._of(model, kv, quantised=False)
        return blueprint if kv.bits is None else blueprint | cls._of(model, kv, quantised=True)

    @classmethod
    def _of(cls, model: Any, kv: KVSettings, *, quantised: bool) -> Blueprint:
        layers = make_layers(model, kv)
        tokens = mx.zeros((1, PROBE_TOKENS), mx.int32)
        logits = model(tokens, cache=layers)
        if quantised:
            quantise(layers, _from_the_start(kv))
        rows: dict[str, dict[str, Shape]] = {}
        opaque: dict[str, dict[str, Shape]] = {}
        for path, layer in leaves(layers):
            content = capture_one(path, layer, PROBE_TOKENS)
            if content.sliceable:
                rows[path] = {name: _shape(a, any_tokens=True) for name, a in content.rows.items()}
            else:
                opaque[path] = {name: _shape(a) for name, a in content.arrays.items()}
        if quantised:
            _go_on(model, tokens, layers)
        return cls(rows, opaque, Shape(dtype_name(logits), (logits.shape[-1],)))

    def __or__(self, other: Blueprint) -> Blueprint:
        """What either may look like: the same layers before and after they are quantised."""
        rows, opaque = _merged(self.rows, other.rows), _merged(self.opaque, other.opaque)
        return Blueprint(rows, opaque, self.logits)

    def check_rows(self, path: str, name: str, dtype: str, shape: Sequence[int]) -> None:
        """Raise UnsupportedLayer unless this layer has such rows."""
        expected = self.rows.get(path, {}).get(name)
        found = Shape(dtype, (*shape[:TOKEN_AXIS], 0, *shape[TOKEN_AXIS + 1 :]))
        if found != expected:
            raise UnsupportedLayer(f"the rows {name!r} of layer {path} are not those of this model")

    def check_opaque(
        self, path: str, name: str, dtype: str, shape: Sequence[int], n_past: int
    ) -> None:
        """Raise UnsupportedLayer unless this layer can hold such an array at `n_past` tokens."""
        expected = self.opaque.get(path, {}).get(name)
        if path in self.opaque and expected is None:  # some arrays come only after many tokens
            size = ITEMSIZE[dtype]
            for length in shape:
                size *= length
            if size <= LARGEST_UNKNOWN_BYTES:
                return
        elif (
            expected is not None
            and dtype == expected.dtype
            and _differs_by_tokens(name, shape, expected.lengths, n_past)
        ):
            return
        raise UnsupportedLayer(f"{name!r} of layer {path} is not of this model")


def _differs_by_tokens(
    name: str, shape: Sequence[int], expected: Sequence[int], n_past: int
) -> bool:
    """Whether a shape differs at most in its number of tokens, and that is a possible one."""
    if len(shape) != len(expected):
        return False
    axes = [axis for axis in range(len(shape)) if shape[axis] != expected[axis]]
    possible = not axes or (len(axes) == 1 and shape[axes[0]] <= n_past + CELL)
    return possible and (name not in ROWS or axes in ([], [TOKEN_AXIS]))


def _merged(
    a: Mapping[str, Mapping[str, Shape]], b: Mapping[str, Mapping[str, Shape]]
) -> dict[str, dict[str, Shape]]:
    return {path: {**a.get(path, {}), **b.get(path, {})} for path in {**a, **b}}


def _go_on(model: Any, tokens: mx.array, layers: list[Any]) -> None:
    """Call the model once more. Some read their keys as one array, which quantised ones are not:
    without this they would fail in the middle of a long prompt.
    """
    try:
        model(tokens, cache=layers)
    except Exception as exc:
        raise UnsupportedLayer(
            "mlx-lm cannot go on from quantised layers with this model: leave --kv-bits out"
        ) from exc


def _from_the_start(kv: KVSettings) -> KVSettings:
    return type(kv)(kv.bits, kv.group_size, 0, kv.max_size)


def _shape(array: mx.array, *, any_tokens: bool = False) -> Shape:
    lengths = list(array.shape)
    if any_tokens:
        lengths[TOKEN_AXIS] = 0
    return Shape(dtype_name(array), tuple(lengths))


# Arrays


def dtype_name(array: mx.array) -> str:
    """The dtype's name as files keep it: `bfloat16`, `float32`, `bool`, ..."""
    return str(array.dtype).removeprefix("mlx.core.").rstrip("_")


def to_array(array: mx.array) -> Array:
    """Copy an array out of MLX."""
    flat: Any = mx.contiguous(array).reshape(-1)
    raw = bytes(memoryview(flat.view(mx.uint8))) if array.size else b""
    return Array(dtype_name(array), tuple(array.shape), raw)


def from_array(array: Array) -> mx.array:
    """Copy an array into MLX."""
    dtype: mx.Dtype = getattr(mx, "bool_" if array.dtype == "bool" else array.dtype)
    if not array.nbytes:
        return mx.zeros(array.shape, dtype)
    raw: Any = memoryview(array.data)
    return mx.array(raw).view(dtype).reshape(array.shape)
