"""A second reader of stores, written from docs/format.md and from nothing else.

It knows nothing of the package, and neither MLX nor safetensors: if it can read a store, then that
page says enough. Whatever is not as the page says is a ValueError.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import zstandard

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    Json = dict[str, Any]

CELL = 256
WIDTH = {
    "bool": 1, "uint8": 1, "int8": 1, "uint16": 2, "int16": 2, "float16": 2, "bfloat16": 2,
    "uint32": 4, "int32": 4, "float32": 4, "uint64": 8, "int64": 8, "float64": 8, "complex64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Array:
    """An array: `items` are its items' bytes, `[*shape, width]`."""

    dtype: str
    items: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """How many items there are, along each axis."""
        return self.items.shape[:-1]

    @property
    def bits(self) -> tuple[str, tuple[int, ...], bytes]:
        """All that it is."""
        return self.dtype, self.shape, self.items.tobytes()


@dataclass(frozen=True)
class Container:
    """A container, checked and read whole."""

    kind: str
    content: Json
    notes: Json
    arrays: dict[str, Array]
    digest: str


@dataclass(frozen=True)
class Stored:
    """A state: by the path of a layer its rows by name, or its attributes; of a window both."""

    tokens: list[int]
    rows: dict[str, dict[str, Array]]
    windows: dict[str, tuple[dict[str, Array], Json]]
    opaque: dict[str, Json]
    arrays: dict[str, Array]
    content: Json
    notes: Json


def _check(sound: bool, what: str) -> None:
    if not sound:
        raise ValueError(what)


def _hash(data: bytes, **more: Any) -> bytes:
    return hashlib.blake2b(data, digest_size=16, **more).digest()


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


# Container


def container(data: bytes) -> Container:
    """Read a container, and check everything that there is to check."""
    (length,) = struct.unpack_from("<Q", data)
    _check(8 + length + 32 <= len(data), "length")
    head, seal = data[: 8 + length], data[8 + length : 40 + length]
    _check(length % 8 == 0 and hashlib.sha256(head).digest() == seal, "seal")
    tensors = json.loads(head[8:])
    metadata = tensors.pop("__metadata__")
    _check((metadata["format"], metadata["version"]) == ("mlx_promptcache", "1"), "version")
    header = json.loads(metadata["header"])
    table = header["arrays"]
    _check(list(tensors) == ["header_sha256", *table], "names of the tensors")
    begin, arrays = 32, {}
    _check(tensors["header_sha256"] == _tensor(0, 32), "the seal's tensor")
    for name, told in table.items():
        end = begin + sum(size for _, size in told["planes"])
        _check(tensors[name] == _tensor(begin, end), f"the tensor of {name}")
        arrays[name] = _array(told, data[8 + length + begin : 8 + length + end])
        begin = end
    _check(8 + length + begin == len(data), "size")
    whole = {name: header[name] for name in ("arrays", "content", "kind")}
    digest = hashlib.sha256(_json(whole)).hexdigest()
    return Container(header["kind"], header["content"], header["notes"], arrays, digest)


def _tensor(begin: int, end: int) -> Json:
    return {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}


def _array(told: Json, stored: bytes) -> Array:
    _check(hashlib.sha256(stored).hexdigest() == told["sha256"], "an array's bytes")
    width, items = WIDTH[told["dtype"]], prod(told["shape"])
    _check(len(told["planes"]) == width, "as many planes as an item has bytes")
    planes, begin = [], 0
    for codec, size in told["planes"]:
        plane = stored[begin : begin + size]
        begin += size
        if codec == "zstd":
            _check(zstandard.frame_content_size(plane) == items, "a frame's content size")
            plane = zstandard.ZstdDecompressor().decompress(plane)
        else:
            _check(codec == "raw", "codec")
        _check(len(plane) == items, "a plane's size")
        planes.append(np.frombuffer(plane, np.uint8))
    dealt = np.stack(planes, axis=-1) if items else np.zeros((0, width), np.uint8)
    return Array(told["dtype"], dealt.reshape(*told["shape"], width))


# Keys


def keys(fingerprint: str, namespace: str, tokens: Sequence[int]) -> list[str]:
    """The keys of all positions."""
    root = bytes.fromhex(fingerprint)
    if namespace:
        root = _hash(root + namespace.encode(), person=b"namespace")
    found, start = [root], root
    for position in range(1, len(tokens) + 1):
        g = (position - 1) // CELL * CELL
        start = found[g]
        found.append(_hash(start + struct.pack(f"<{position - g}I", *tokens[g:position])))
    return [key.hex() for key in found]


# Stores


def _snapshot_file(store: Path, stem: str) -> Path:
    cell, _, name = stem.partition("/")
    directory = f"{cell}{int(name.split('-')[1]) // 8:02x}"
    return store / "snapshots" / directory / f"{name}.safetensors"


def _block_file(store: Path, stem: str) -> Path:
    cell, _, name = stem.partition("/")
    key, token = name.split("-")[:2]
    directory = f"{cell}{key[:2]}{int(token):x}"
    return store / "blocks" / (directory[:4] + directory[-1]) / f"{name}.safetensors"


def state(store: Path, name: str) -> Stored:
    """The state of a name, with every file that it needs checked."""
    line = (store / "names" / name).read_text("ascii")
    _check(line.endswith("\n"), "a name's line end")
    stem = line[:-1]
    snapshot = container(_snapshot_file(store, stem).read_bytes())
    content = snapshot.content
    _check(snapshot.kind == "snapshot", "kind")
    tokens: list[int] = []
    blocks = []
    for block_stem, digest, start, rows in content["refs"]:
        block = container(_block_file(store, block_stem).read_bytes())
        _check((block.digest, start) == (digest, len(tokens)), "a block that is referred to")
        blocks.append((block_stem, block, rows))
        tokens += block.content["tokens"][:rows]
    _check(len(tokens) == content["n_past"], "n_past")
    _check_snapshot_name(stem, snapshot, tokens)
    for block_stem, block, _ in blocks:
        _check_block(block_stem, block, content, tokens)
    own = {k: v for k, v in snapshot.arrays.items() if "/" not in k}
    return Stored(
        tokens=tokens,
        rows=_rows([(block, rows) for _, block, rows in blocks]),
        windows=_windows(snapshot, [(block, rows) for _, block, rows in blocks]),
        opaque=_opaque(snapshot),
        arrays=own,
        content=content,
        notes=snapshot.notes,
    )


def _check_snapshot_name(stem: str, snapshot: Container, tokens: Sequence[int]) -> None:
    content, n = snapshot.content, len(tokens)
    known, g = keys(content["fingerprint"], content["phase"], tokens), n - n % CELL
    _check((content["cell_key"], content["key"]) == (known[g], known[n]), "a snapshot's keys")
    named = f"{known[g][:2]}/{known[g]}-{n - g}-{known[n]}-{snapshot.digest[:16]}"
    _check(stem == named, "a snapshot's name")
    parts = _hash(_json(snapshot.notes["fingerprint"])).hex()
    _check(parts == content["fingerprint"], "the fingerprint")


def _check_block(stem: str, block: Container, snapshot: Json, tokens: Sequence[int]) -> None:
    content = block.content
    a, whole = content["start"], content["tokens"]
    b, g = a + len(whole), a - a % CELL
    known = keys(snapshot["fingerprint"], snapshot["phase"], [*tokens[:a], *whole])
    _check(block.kind == "block" and b <= g + CELL, "a block's place")
    _check((content["start_key"], content["end_key"]) == (known[a], known[b]), "a block's keys")
    named = f"{known[g][:2]}/{known[a]}-{whole[0]}-{known[b]}"
    variant = stem.removeprefix(named)
    _check(stem.startswith(named) and (not variant or len(variant) == 17), "a block's name")
    _check(content["fingerprint"] == snapshot["fingerprint"], "a block's fingerprint")


def _rows(blocks: Sequence[tuple[Container, int]]) -> dict[str, dict[str, Array]]:
    parts: dict[tuple[str, str], list[Array]] = {}
    for block, rows in blocks:
        for label, array in block.arrays.items():
            paths = block.content["stacks"][label]
            _check(array.shape[0] == len(paths), "a stack's layers")
            if label.startswith("window."):
                continue
            _check(array.shape[3] == len(block.content["tokens"]), "a stack's rows")
            for path, layer in zip(paths, array.items, strict=True):
                piece = Array(array.dtype, layer[:, :, :rows])
                parts.setdefault((path, label.partition("/")[0]), []).append(piece)
    found: dict[str, dict[str, Array]] = {}
    for (path, name), pieces in parts.items():
        joined = np.concatenate([piece.items for piece in pieces], axis=2)
        found.setdefault(path, {})[name] = Array(pieces[0].dtype, joined)
    return found


def _windows(
    snapshot: Container, blocks: Sequence[tuple[Container, int]]
) -> dict[str, tuple[dict[str, Array], Json]]:
    found: dict[str, tuple[dict[str, Array], Json]] = {}
    n = snapshot.content["n_past"]
    for path, told in snapshot.content["windows"].items():
        size, keep = told["window"]
        held = [*range(n)] if n <= size else [*range(keep), *range(n - size + keep, n)]
        rows = {}
        for name in ("keys", "values"):
            own = snapshot.arrays.get(f"{path}/{name}")
            if own is None:
                one_by_one = _window_rows(path, name, blocks)
                dtype = next(row.dtype for row in one_by_one.values())
                items = np.concatenate([one_by_one[p].items for p in held], axis=2)
                own = Array(dtype, items)
            _check(own.shape[2] == len(held), "a window's rows")
            rows[name] = own
        found[path] = (rows, told["attributes"])
    return found


def _window_rows(path: str, name: str, blocks: Sequence[tuple[Container, int]]) -> dict[int, Array]:
    """The rows of a window that blocks have, by position."""
    found: dict[int, Array] = {}
    for block, used in blocks:
        start, end = block.content["start"], block.content["start"] + used
        begin = block.content["window"]["from"]
        for label, array in block.arrays.items():
            if label.startswith(f"window.{name}/") and path in block.content["stacks"][label]:
                whole = start + len(block.content["tokens"])
                _check(array.shape[3] == whole - begin, "a stack's rows of windows")
                layer = array.items[block.content["stacks"][label].index(path)]
                for p in range(begin, end):
                    found[p] = Array(array.dtype, layer[:, :, p - begin : p - begin + 1])
    return found


def _opaque(snapshot: Container) -> dict[str, Json]:
    used: list[str] = []

    def built(path: str, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        ((form, inside),) = value.items()
        if form == "array":
            used.append(f"{path}/{inside}")
            return snapshot.arrays[used[-1]]
        _check(form in {"tuple", "list"}, "an attribute")
        return (tuple if form == "tuple" else list)(built(path, item) for item in inside)

    layers = {
        path: {name: built(path, value) for name, value in layer["attributes"].items()}
        for path, layer in snapshot.content["opaque"].items()
    }
    windows = snapshot.content["windows"]
    layered = [k for k in snapshot.arrays if "/" in k and k.partition("/")[0] not in windows]
    _check(sorted(used) == sorted(layered), "arrays of layers")
    return layers
