"""Compression: how many bytes a byte of a state takes on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from mlx_promptcache import headers
from mlx_promptcache.errors import PromptCacheError
from mlx_promptcache.store import BLOCKS, SNAPSHOTS, Store

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlx_promptcache.container import Header
    from mlx_promptcache.fingerprint import KVSettings

MEASURED = {"float32": 0.835, "bfloat16": 0.673, "float16": 0.854}
QUANTISED = {8: 0.90, 4: 0.83}  # by bits; docs/memory.md tells of both
MOST_FILES = 200  # of each kind, the newest: more would say the same


class Ratio(NamedTuple):
    """Bytes on disk for a byte in memory, headers of files included, and where it was measured."""

    value: float
    source: str


def usual(dtype: str, bits: int | None = None) -> Ratio:
    """The ratio of rows of a dtype, or of rows quantised to so many bits, as it was measured with
    SmolLM2; 1 if it was not.
    """
    found = MEASURED.get(dtype) if bits is None else QUANTISED.get(bits)
    what = dtype if bits is None else f"{bits} bits"
    if found is None:
        return Ratio(1.0, f"not measured for {what}")
    return Ratio(found, f"measured with SmolLM2 in {what}")


def of_store(store: Store, kv: KVSettings, row_bytes: int) -> Ratio | None:
    """The ratio of states with such KV settings, whose rows have so many bytes, in a store; None if
    it holds none. A store that cannot be read holds none.
    """
    try:
        with store.shared():
            return _measured(store, str(kv), row_bytes)
    except PromptCacheError:
        return None


def _measured(store: Store, kv: str, row_bytes: int) -> Ratio | None:
    fingerprints, stored, raw = set(), 0, 0
    for header, size in _newest(store, BLOCKS):
        rows = row_bytes * len(header.content["tokens"])
        if header.raw_bytes == rows and headers.fingerprint_parts(header).get("kv") == kv:
            fingerprints.add(header.content["fingerprint"])
            stored, raw = stored + size, raw + rows
    for header, size in _newest(store, SNAPSHOTS):
        if header.content["fingerprint"] in fingerprints:
            stored, raw = stored + size, raw + header.raw_bytes
    return Ratio(stored / raw, "measured in this store") if raw else None


def _newest(store: Store, kind: str) -> Iterator[tuple[Header, int]]:
    read = headers.block_header if kind == BLOCKS else headers.snapshot_header
    files = sorted(store.files(kind).items(), key=lambda item: -item[1].mtime_ns)
    for stem, file in files[:MOST_FILES]:
        try:
            yield read(store, stem), file.size
        except PromptCacheError:
            continue
