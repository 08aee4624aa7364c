"""mlx-lm's own prompt-cache files, written and read.

They are written by mlx-lm itself. They are read here: mlx-lm looks classes up by names from the
file, and checks nothing. The live model makes the objects, the file only fills them, and what comes
of it must be what this model's layers can hold. A file has no tokens and no logits: the tokens come
from whoever imports it, and the logits from feeding the last of them again.
"""

from __future__ import annotations

import json
import math
import tempfile
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx

from mlx_promptcache import engine, exporter
from mlx_promptcache.arrays import dtype_name, from_array
from mlx_promptcache.blueprint import Blueprint
from mlx_promptcache.container import ITEMSIZE, LARGEST_HEADER_BYTES, UNREADABLE, Array
from mlx_promptcache.engine import cache as mlx_cache
from mlx_promptcache.errors import DamagedFile, ForeignFile, UnsupportedLayer
from mlx_promptcache.headers import MOST_NESTED
from mlx_promptcache.layers import (
    TOKEN_AXIS,
    capture,
    check_quantised,
    fill,
    leaves,
    lengths,
    make_layers,
)
from mlx_promptcache.passes import UNKNOWN
from mlx_promptcache.state import State

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from mlx_promptcache.container import Read
    from mlx_promptcache.fingerprint import KVSettings
    from mlx_promptcache.layers import Layer

DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "F16": "float16",
    "BF16": "bfloat16", "U32": "uint32", "I32": "int32", "F32": "float32", "U64": "uint64",
    "I64": "int64",
}  # fmt: skip
MOST_LAYERS = 100_000
LONGEST_TEXT = 200
PIECE_BYTES = 1 << 24


# Writing


def write(
    path: Path, layers: Sequence[Any], metadata: Mapping[str, str], *, replace_file: bool
) -> int:
    """Let mlx-lm write layers to a file, whole or not at all; return its bytes.

    Raises:
        UnsupportedLayer: mlx-lm's files cannot hold such layers.
        StoreError: there is a file of that name, and it is not to be replaced; or the file system
            refuses.
    """
    for where, layer in leaves(layers):
        _check_known(where, layer)
    exporter.write(path, _chunks(path, layers, metadata), replace_file=replace_file)
    return path.stat().st_size


def _chunks(path: Path, layers: Sequence[Any], metadata: Mapping[str, str]) -> Iterator[bytes]:
    """What mlx-lm writes, by way of a file beside that has no name."""
    with tempfile.TemporaryFile(dir=path.parent) as file:
        mlx_cache.save_prompt_cache(file, _unpadded(layers), dict(metadata))
        file.seek(0)
        yield from iter(lambda: file.read(PIECE_BYTES), b"")


def _check_known(where: str, layer: Any) -> None:
    kind = type(layer)
    if getattr(mlx_cache, kind.__name__, None) is not kind:
        raise UnsupportedLayer(
            f"layer {where} is a {kind.__name__}, which mlx-lm's own files cannot hold"
        )


def _unpadded(layers: Sequence[Any]) -> list[Any]:
    """Layers without the room that their buffers have for more rows: it would be written, too."""
    for _, layer in leaves(layers):
        if type(layer) in (mlx_cache.KVCache, mlx_cache.QuantizedKVCache):
            layer.keys, layer.values = layer.keys_and_values()
    return list(layers)


# Reading


class _Tensor(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Contents(NamedTuple):
    """What a file says: of each layer the name of its class and its state, as mlx-lm nests it."""

    classes: list[str]
    states: list[Any]


def read(read: Read, size: int) -> Contents:
    """Read a file of `size` bytes, whose arrays may take as much memory and no more.

    Raises:
        DamagedFile: it is no such file.
        ForeignFile: another release of mlx-lm wrote it, with another layout.
    """
    try:
        tensors, metadata = _header(read, size)
        classes, scalars = _told(metadata)
        arrays = {name: _array(read, tensor) for name, tensor in tensors.items()}
        values = {name: _value(scalars.get(name), array) for name, array in arrays.items()}
        if not scalars.keys() <= values.keys():
            raise DamagedFile("it lacks some of its values")
        states = _nested([(name.split("."), value) for name, value in values.items()])
    except UNREADABLE as exc:
        raise DamagedFile("it is no prompt-cache file of mlx-lm's") from exc
    if not isinstance(states, list) or len(states) != len(classes):
        raise DamagedFile("it does not say of which class each of its layers is")
    return Contents(classes, states)


def _header(read: Read, size: int) -> tuple[dict[str, _Tensor], dict[str, str]]:
    length = int.from_bytes(read(0, 8), "little")
    if size < 8 or length > min(size - 8, LARGEST_HEADER_BYTES):
        raise DamagedFile("it is cut short, or not a safetensors file")
    told = json.loads(read(8, length).decode())
    metadata = told.pop("__metadata__")
    tensors = {name: _tensor(row, 8 + length) for name, row in told.items()}
    ordered = sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes))
    ends = accumulate((tensor.nbytes for tensor in ordered), initial=8 + length)
    if [*(tensor.offset for tensor in ordered), size] != list(ends):
        raise DamagedFile("its tensors overlap, leave holes or do not end with it")
    return tensors, metadata


def _tensor(row: Any, base: int) -> _Tensor:
    dtype, shape, (begin, end) = DTYPES[row["dtype"]], tuple(row["shape"]), row["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise DamagedFile("the size of a tensor is none")
    if end - begin != ITEMSIZE[dtype] * math.prod(shape):
        raise DamagedFile("a tensor's bytes are not those of its shape")
    return _Tensor(dtype, shape, base + begin, end - begin)


def _told(metadata: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    """The classes of the layers, and which arrays stand for something else."""
    if "1.0" not in metadata:  # older ones have a name there
        raise ForeignFile(
            "this release of mlx-lm did not write it: make it again with mlx-lm "
            f"{engine.version()}, or leave --format out if `export` wrote it"
        )
    classes = list(_numbered(metadata, "1.{}"))
    positions = _numbered(metadata, "2.{}.0", first=1)
    kinds = _numbered(metadata, "2.{}.1", first=1)
    return classes, dict(zip(positions, kinds, strict=True))


def _numbered(metadata: Mapping[str, str], name: str, first: int = 0) -> Iterator[str]:
    for i in range(first, MOST_LAYERS):
        value = metadata.get(name.format(i))
        if value is None:
            return
        yield str(value)


def _array(read: Read, tensor: _Tensor) -> mx.array:
    data = read(tensor.offset, tensor.nbytes)
    if len(data) != tensor.nbytes:
        raise DamagedFile("it is cut short")
    return from_array(Array(tensor.dtype, tensor.shape, data))


def _value(kind: str | None, array: mx.array) -> Any:
    """What an array stands for: mlx-lm writes numbers, texts and None as arrays, too."""
    if kind is None:
        return array
    if kind == "none" and not array.size:
        return None
    if kind == "scalar" and array.size == 1:
        return array.item()
    if kind == "string" and array.size <= LONGEST_TEXT:
        codes: Any = array.tolist()
        return "".join(map(chr, codes))
    raise DamagedFile("a value of it makes no sense")


def _nested(items: list[tuple[list[str], Any]], depth: int = MOST_NESTED) -> Any:
    """Values by their paths as the lists that they were taken from."""
    if len(items) == 1 and not items[0][0]:
        return items[0][1]
    groups: dict[int, list[tuple[list[str], Any]]] = {}
    for path, value in items:
        if not path or depth == 0:
            raise DamagedFile("its arrays are not in order")
        groups.setdefault(int(path[0]), []).append((path[1:], value))
    if sorted(groups) != list(range(len(groups))):
        raise DamagedFile("its arrays are not in order")
    return [_nested(groups[i], depth - 1) for i in range(len(groups))]


# To a state


def filled(contents: Contents, model: Any, kv: KVSettings) -> list[Any]:
    """The model's own layers with what a file says of them; not yet compared with anything.

    Raises:
        UnsupportedLayer: they are not such layers.
    """
    layers = make_layers(model, kv)
    if len(layers) != len(contents.classes):
        raise UnsupportedLayer(
            f"it has {len(contents.classes)} layers, and this model has {len(layers)}"
        )
    told = zip(layers, contents.classes, contents.states, strict=True)
    return [_filled(str(i), *one, kv) for i, one in enumerate(told)]


def _filled(where: str, layer: Any, told: str, state: Any, kv: KVSettings) -> Any:
    if told == "QuantizedKVCache" and type(layer) is mlx_cache.KVCache and kv.bits is not None:
        layer = mlx_cache.QuantizedKVCache(kv.group_size, kv.bits)
    kind = type(layer).__name__
    if told != kind:
        hint = ": give the --kv-bits that it was made with" if told == "QuantizedKVCache" else ""
        raise UnsupportedLayer(
            f"layer {where} is a {told[:LONGEST_TEXT]!r} in it, and a {kind} in this model{hint}"
        )
    try:
        if type(layer) is mlx_cache.CacheList:
            parts = zip(layer.caches, state, strict=True)
            inner = [
                _filled(f"{where}.{i}", one, name, part, kv)
                for i, (one, (part, name)) in enumerate(parts)
            ]
            layer.caches = type(layer.caches)(inner)
        else:
            layer.state = state
    except UNREADABLE as exc:
        raise UnsupportedLayer(f"layer {where} ({kind}) cannot hold what it says") from exc
    return layer


def held(layers: Sequence[Any]) -> int | None:
    """How many tokens the layers hold; None where none of them counts.

    Raises:
        UnsupportedLayer: they do not agree.
    """
    numbers = lengths(layers)
    if not all(type(number) is int for number in numbers):
        raise UnsupportedLayer("its layers do not say how many tokens they hold")
    if len(numbers) > 1:
        raise UnsupportedLayer("its layers hold different numbers of tokens")
    return next(iter(numbers), None)


def state_of(layers: Sequence[Any], tokens: Sequence[int], model: Any, kv: KVSettings) -> State:
    """The state of layers that a file filled, without logits; it holds these tokens.

    Raises:
        UnsupportedLayer: they are not what this model's layers can hold of so many tokens.
    """
    n = len(tokens)
    try:
        contents = capture(layers, n)
        _check(contents, Blueprint.of(model, kv), n)
        check_quantised(layers, n, kv)
        fill(make_layers(model, kv), contents, n, kv)
    except UNREADABLE as exc:
        raise UnsupportedLayer("its layers make no sense") from exc
    return State(
        tokens=tuple(tokens),
        contents=contents,
        logits=None,
        embedding=None,
        rng=mx.random.key(0),  # nothing was drawn: the same layers are the same state
        kv=kv,
        lineage=UNKNOWN,
    )


def _check(contents: Sequence[Layer], blueprint: Blueprint, n_past: int) -> None:
    for layer in contents:
        if layer.opaque != (layer.path in blueprint.opaque):
            raise UnsupportedLayer(f"layer {layer.path} is not one of this model")
        if layer.opaque:
            for name, array in layer.arrays.items():
                blueprint.check_opaque(layer.path, name, dtype_name(array), array.shape, n_past)
            continue
        if layer.window != blueprint.windows.get(layer.path):
            raise UnsupportedLayer(f"layer {layer.path} has another window than this model's")
        rows = n_past if layer.window is None else min(n_past, layer.window.size)
        for name, array in layer.rows.items():
            blueprint.check_rows(layer.path, name, dtype_name(array), array.shape)
            if array.shape[TOKEN_AXIS] != rows:
                raise UnsupportedLayer(f"layer {layer.path} lacks rows")
