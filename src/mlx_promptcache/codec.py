"""One array's bytes to fewer bytes and back, losslessly.

The bytes of floating-point numbers compress badly as they stand: sign and exponent repeat, the
mantissa is noise, and the two are interleaved. So the bytes are dealt out into *planes*, the first
byte of every item, then the second, and so on, and each plane is compressed by itself (zstd,
level 1). A plane that does not shrink by 1/64 is kept as it is. Measured on real K/V in
`docs/design.md`; the idea is the byte shuffle of Blosc and of HDF5.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import zstandard

from mlx_promptcache.errors import DamagedFile

if TYPE_CHECKING:
    from collections.abc import Sequence

RAW = "raw"
ZSTD = "zstd"

LEVEL = 1  # higher levels were slower and no smaller on K/V
LEAST_GAIN = 64  # keep a plane compressed only if it is smaller by 1/64 of itself


class Plane(NamedTuple):
    """The k-th byte of every item of an array: `data` as stored, `codec` says how."""

    codec: str
    data: bytes | memoryview


def encode(raw: bytes | memoryview, itemsize: int) -> list[Plane]:
    """Return the planes of `raw`, least significant byte first, `itemsize` of them.

    `len(raw)` must be a multiple of `itemsize` (bytes per item). The same bytes give the same
    planes as long as the zstd library is the same one.
    """
    items = np.frombuffer(raw, np.uint8).reshape(-1, itemsize)
    compressor = zstandard.ZstdCompressor(level=LEVEL, write_content_size=True)
    return [_encode_plane(np.ascontiguousarray(items[:, k]), compressor) for k in range(itemsize)]


def _encode_plane(plane: np.ndarray, compressor: zstandard.ZstdCompressor) -> Plane:
    data = plane.data
    packed = compressor.compress(data)
    if len(packed) <= plane.size - plane.size // LEAST_GAIN and len(packed) < plane.size:
        return Plane(ZSTD, packed)
    return Plane(RAW, data.tobytes())


def decode(planes: Sequence[Plane], nbytes: int) -> memoryview:
    """Return the `nbytes` bytes that `encode` was given.

    Never allocates more than `nbytes` and one plane, whatever the planes claim.

    Raises:
        DamagedFile: the planes do not hold `nbytes` bytes.
    """
    itemsize = len(planes)
    if itemsize == 0 or nbytes % itemsize:
        raise DamagedFile(f"{itemsize} byte planes cannot hold {nbytes} bytes")
    items = np.empty((nbytes // itemsize, itemsize), np.uint8)
    for k, plane in enumerate(planes):
        items[:, k] = np.frombuffer(_decode_plane(plane, nbytes // itemsize), np.uint8)
    return items.reshape(-1).data


def _decode_plane(plane: Plane, size: int) -> bytes | memoryview:
    if plane.codec == RAW:
        data = plane.data
    elif plane.codec == ZSTD:
        data = _decompress(plane.data, size)
    else:
        raise DamagedFile(f"unknown codec {plane.codec!r}")
    if len(data) != size:
        raise DamagedFile(f"a byte plane holds {len(data)} bytes instead of {size}")
    return data


def _decompress(data: bytes | memoryview, size: int) -> bytes:
    # The frame states its size, and zstandard allocates what it states: ask before, not after.
    try:
        if zstandard.frame_content_size(data) != size:
            raise DamagedFile("a compressed plane states another size than its array has")
        return zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
    except (zstandard.ZstdError, ValueError) as exc:
        raise DamagedFile("a compressed plane cannot be decompressed") from exc
