"""One array's bytes to fewer bytes and back, losslessly.

The bytes of floating-point numbers compress badly as they stand: sign and exponent repeat, the
mantissa is noise, and the two are interleaved. So the bytes are dealt out into *planes*, the first
byte of every item, then the second, and so on, and each plane is compressed by itself (zstd). A
plane that does not shrink by 1/32, as far as samples of a large one tell, is kept as it is.
Measured on real K/V in `docs/log.md`; the idea is the byte shuffle of Blosc and of HDF5.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import zstandard

from mlx_promptcache.errors import DamagedFile

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

RAW = "raw"
ZSTD = "zstd"

LEVEL = 1  # of what is no number, as text; higher levels were slower and no smaller on K/V
NUMBERS = {
    "strategy": zstandard.STRATEGY_FAST, "min_match": 7, "hash_log": 8, "window_log": 19,
    "chain_log": 6, "search_log": 1, "target_length": 0, "write_content_size": True,
}  # fmt: skip
"""How planes of numbers are compressed. In exponents next to nothing repeats, and they shrink
because some are more frequent than others: a table of 256 places for what repeats gives as few
bytes as that of level 1, and takes two thirds of the time, there and back.
"""
RUN, NO_KIND = 1, 3  # of blocks of a zstd frame: one byte again and again; none that there is
LEAST_BLOCK_BYTES = 1 << 10  # on the average, of what zstd makes: mostly 128 times that ...
SMALL_BLOCKS = 16  # ... and so many that may hold less
LEAST_GAIN = 32  # keep a plane compressed only if it is smaller by 1/32 of itself
SAMPLES = 4  # parts of a plane, none of which shrinks where the whole would not: ...
SAMPLE_BYTES = 1 << 14  # ... trying a whole mantissa in vain takes longer than anything else


class Plane(NamedTuple):
    """The k-th byte of every item of an array: `data` as stored, `codec` says how."""

    codec: str
    data: bytes | memoryview


def encode(raw: bytes | memoryview, itemsize: int) -> list[Plane]:
    """Return the planes of `raw`, least significant byte first, `itemsize` of them.

    `len(raw)` must be a multiple of `itemsize` (bytes per item). The same bytes give the same
    planes as long as the zstd library is the same one.
    """
    items = bytes(raw)
    if itemsize == 0 or len(items) % itemsize:
        raise ValueError(f"{len(items)} bytes are no whole number of items of {itemsize} bytes")
    return compressed([items[k::itemsize] for k in range(itemsize)])


def compressed(dealt: Sequence[bytes | memoryview]) -> list[Plane]:
    """Return the planes of an array whose bytes are dealt out already, as `encode` does."""
    compressor = _compressor(len(dealt))
    return [_encode_plane(plane, compressor) for plane in dealt]


def _compressor(itemsize: int) -> zstandard.ZstdCompressor:
    if itemsize == 1:
        return zstandard.ZstdCompressor(level=LEVEL, write_content_size=True)
    numbers = zstandard.ZstdCompressionParameters(**NUMBERS)
    return zstandard.ZstdCompressor(compression_params=numbers)


def _encode_plane(plane: bytes | memoryview, compressor: zstandard.ZstdCompressor) -> Plane:
    if len(plane) > SAMPLES * SAMPLE_BYTES and not any(
        _shrinks(sample, compressor.compress(sample)) for sample in _samples(plane)
    ):
        return Plane(RAW, plane)
    packed = compressor.compress(plane)
    return Plane(ZSTD, packed) if _shrinks(plane, packed) else Plane(RAW, plane)


def _samples(plane: bytes | memoryview) -> Iterator[bytes | memoryview]:
    """Some parts of a plane, from its beginning to its end."""
    last = len(plane) - SAMPLE_BYTES
    for i in range(SAMPLES):
        begin = last * i // (SAMPLES - 1)
        yield plane[begin : begin + SAMPLE_BYTES]


def _shrinks(plane: bytes | memoryview, packed: bytes) -> bool:
    return len(packed) <= len(plane) - len(plane) // LEAST_GAIN and len(packed) < len(plane)


def decode(planes: Sequence[Plane], nbytes: int) -> memoryview:
    """Return the `nbytes` bytes that `encode` was given.

    Never allocates more than `nbytes` and two planes, whatever the planes claim.

    Raises:
        DamagedFile: the planes do not hold `nbytes` bytes.
    """
    itemsize = len(planes)
    size = plane_bytes(planes, nbytes)
    items = bytearray(nbytes)
    for k, plane in enumerate(planes):
        items[k::itemsize] = decode_plane(plane, size)
    return memoryview(items)


def plane_bytes(planes: Sequence[Plane], nbytes: int) -> int:
    """How many bytes each plane of an array of `nbytes` bytes holds.

    Raises:
        DamagedFile: there are none, or too many.
    """
    if not planes or nbytes % len(planes):
        raise DamagedFile(f"{len(planes)} byte planes cannot hold {nbytes} bytes")
    return nbytes // len(planes)


def decode_plane(plane: Plane, size: int) -> bytes | memoryview:
    """Return the `size` bytes of one plane; allocates no more than that, whatever it claims.

    Raises:
        DamagedFile: it does not hold `size` bytes.
    """
    if plane.codec == RAW and len(plane.data) == size:
        return plane.data
    place = memoryview(bytearray(size))
    decode_into(plane, place)
    return place


def decode_into(plane: Plane, place: memoryview) -> None:
    """Put the bytes of one plane into memory of their size, decompressed there and nowhere else.
    What is there after an error is of no use.

    Raises:
        DamagedFile: it does not hold that many bytes.
    """
    if plane.codec == ZSTD:
        _decompress(plane.data, place)
    elif plane.codec != RAW:
        raise DamagedFile(f"unknown codec {plane.codec[:20]!r}")
    elif len(plane.data) != len(place):
        raise DamagedFile(f"a byte plane holds {len(plane.data)} bytes instead of {len(place)}")
    else:
        place[:] = plane.data


def _decompress(data: bytes | memoryview, place: memoryview) -> None:
    try:
        if zstandard.frame_content_size(data) != len(place):
            raise DamagedFile("a compressed plane states another size than its array has")
        if _frame_bytes(data, len(place) // LEAST_BLOCK_BYTES + SMALL_BLOCKS) != len(data):
            raise DamagedFile("a compressed plane is cut short, or something follows it")
        # Given all of a frame and all the room for it zstd has no memory of its own.
        reader = zstandard.ZstdDecompressor().stream_reader(data)
        if reader.readinto(place) != len(place):
            raise DamagedFile("a compressed plane does not hold what it states")
    except (zstandard.ZstdError, ValueError) as exc:
        raise DamagedFile("a compressed plane cannot be decompressed") from exc


def _frame_bytes(data: bytes | memoryview, most_blocks: int) -> int:
    """Bytes of the zstd frame that these begin with, by the headers of its blocks (RFC 8878,
    section 3.1.1); more than there are if it is cut short.

    Raises:
        DamagedFile: it has more blocks than that, or one of no kind.
    """
    at = zstandard.frame_header_size(data)
    for _ in range(most_blocks):
        header = int.from_bytes(data[at : at + 3], "little")
        last, kind, size = header & 1, header >> 1 & 3, header >> 3
        if kind == NO_KIND:
            break
        at += 3 + (1 if kind == RUN else size)
        if last or at > len(data):
            return at + 4 * zstandard.get_frame_parameters(data).has_checksum
    raise DamagedFile("a compressed plane has blocks that zstd does not make")
