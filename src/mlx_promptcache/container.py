"""Arrays and a header to one safetensors file and back. `docs/format.md` describes the bytes.

The file is a safetensors file like any other: 8 bytes of header length, a JSON header, the tensors.
Ours differ in what they hold. Every tensor is 1-D U8. The first, `header_sha256`, is the SHA-256 of
all the bytes before it, so that no byte of the header can change unseen; the others are arrays,
compressed plane by plane. `__metadata__["header"]` is our own header, JSON in a string:

    kind     what this is a file of
    content  what it says; with the arrays it makes the digest
    notes    when and how it was made; not part of the digest
    arrays   for each: dtype, shape, planes (codec and bytes of each), sha256 of the stored bytes
    xxh3     for each array XXH3 of the stored bytes, 128 bits; not part of the digest

SHA-256 says what an array is, to whoever gets it from elsewhere. XXH3, nine times as fast, says
that it is still what was written here; files that lack it are read by their SHA-256.

Nothing in a file is believed before its checksum agrees, nothing is allocated before its size was
compared with the file's, and no class or function is ever looked up by a name from a file.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import xxhash

from mlx_promptcache import codec
from mlx_promptcache.errors import DamagedFile, ForeignFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    Json = dict[str, Any]
    Read = Callable[
        [int, int], bytes
    ]  # (offset, length in bytes) to that many bytes, or fewer at the end
    ReadInto = Callable[[int, memoryview], int]  # the same into memory; how many bytes that were

FORMAT = "mlx_promptcache"
VERSION = "1"

SEAL = "header_sha256"
SEAL_BYTES = 32
LARGEST_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
MOST_DIMENSIONS = 16
LARGEST_GAIN = 1 << 15  # times that an array may be larger in memory than in the file ...
ALWAYS_BYTES = 1 << 26  # ... unless it is smaller than this
FIRST_READ_BYTES = 1 << 14  # most headers come whole with the first read

UNREADABLE = (  # what reading a header of somebody else's may raise
    ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError, MemoryError,
)  # fmt: skip

ITEMSIZE = {
    "bool": 1, "uint8": 1, "int8": 1,
    "uint16": 2, "int16": 2, "float16": 2, "bfloat16": 2,
    "uint32": 4, "int32": 4, "float32": 4,
    "uint64": 8, "int64": 8, "float64": 8, "complex64": 8,
}  # fmt: skip


class Array(NamedTuple):
    """An array outside of MLX: `data` holds the items in C order, least significant byte first."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview

    @property
    def nbytes(self) -> int:
        """Bytes that the array takes in memory."""
        return raw_bytes(self.dtype, self.shape)


class Dealt(NamedTuple):
    """An array outside of MLX: the first byte of every item, then the second, and so on."""

    dtype: str
    shape: tuple[int, ...]
    planes: Sequence[bytes | memoryview]


def raw_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes that an array of this dtype and shape takes in memory."""
    return ITEMSIZE[dtype] * math.prod(shape)


class Entry(NamedTuple):
    """Where an array stands in a file, and what it must be."""

    dtype: str
    shape: tuple[int, ...]
    planes: tuple[tuple[str, int], ...]
    sha256: str
    offset: int  # from the start of the file, in bytes
    stored_bytes: int  # that the array takes in the file
    xxh3: str | None = None  # of the stored bytes, as sha256; None in a file that has none


class Header(NamedTuple):
    """Everything in a file but the arrays' bytes, checked."""

    kind: str
    content: Json
    notes: Json
    entries: Mapping[str, Entry]
    digest: str
    size: int  # of the whole file, in bytes
    seal: bytes  # see `read_seal`

    @property
    def raw_bytes(self) -> int:
        """Bytes that all arrays together take in memory."""
        return sum(raw_bytes(entry.dtype, entry.shape) for entry in self.entries.values())

    @property
    def stored_bytes(self) -> int:
        """Bytes that all arrays together take in the file: its last ones."""
        return sum(entry.stored_bytes for entry in self.entries.values())


class Packed(NamedTuple):
    """A file ready to be written: its chunks in order, and the digest of its content."""

    chunks: list[bytes | memoryview]
    digest: str

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return sum(len(chunk) for chunk in self.chunks)

    @property
    def seal(self) -> bytes:
        """The seal of the file: see `read_seal`."""
        return bytes(self.chunks[0][-SEAL_BYTES:])


def pack(kind: str, content: Json, notes: Json, arrays: Mapping[str, Array | Dealt]) -> Packed:
    """Return the file that holds these; `content` and `notes` must be JSON.

    The digest depends on kind, content and arrays, not on the notes.
    """
    table: dict[str, Json] = {}
    quick: dict[str, str] = {}
    payloads: list[bytes | memoryview] = []
    for name, array in arrays.items():
        planes = (
            codec.compressed(array.planes)
            if isinstance(array, Dealt)
            else codec.encode(array.data, ITEMSIZE[array.dtype])
        )
        sha256, xxh3 = hashlib.sha256(), xxhash.xxh3_128()
        for plane in planes:
            sha256.update(plane.data)
            xxh3.update(plane.data)
        quick[name] = xxh3.hexdigest()
        table[name] = {
            "dtype": array.dtype,
            "shape": list(array.shape),
            "planes": [[plane.codec, len(plane.data)] for plane in planes],
            "sha256": sha256.hexdigest(),
        }
        payloads.extend(plane.data for plane in planes)
    head, digest = _sealed(kind, content, notes, table, quick)
    return Packed([head, *payloads], digest)


def head_of(kind: str, content: Json, notes: Json, entries: Mapping[str, Entry]) -> Packed:
    """Return the beginning of the file that holds these arrays as they are stored elsewhere: their
    stored bytes follow, in this order, and nothing else.
    """
    table = {name: _row(entry) for name, entry in entries.items()}
    quick = {name: entry.xxh3 for name, entry in entries.items() if entry.xxh3 is not None}
    head, digest = _sealed(kind, content, notes, table, quick)
    return Packed([head], digest)


def repacked(header: Header, stored: Iterable[bytes | memoryview]) -> Packed:
    """Return the file of a header whose arrays have these stored bytes, in their order."""
    head = head_of(header.kind, header.content, header.notes, header.entries)
    return Packed([*head.chunks, *stored], head.digest)


def _sealed(
    kind: str, content: Json, notes: Json, table: Mapping[str, Json], quick: Mapping[str, str]
) -> tuple[bytes, str]:
    """A file up to its arrays, and the digest of its content."""
    told = {"kind": kind, "content": content, "notes": notes, "arrays": table}
    header = _dumps({**told, "xxh3": quick} if quick else told)
    head = _safetensors_head(header, {name: _stored_bytes(row) for name, row in table.items()})
    return head + hashlib.sha256(head).digest(), _digest(kind, content, table)


def _row(entry: Entry) -> Json:
    return {
        "dtype": entry.dtype,
        "shape": list(entry.shape),
        "planes": [list(plane) for plane in entry.planes],
        "sha256": entry.sha256,
    }


def _safetensors_head(header: str, sizes: Mapping[str, int]) -> bytes:
    metadata = {"format": FORMAT, "version": VERSION, "header": header}
    text = _dumps({"__metadata__": metadata, **_tensors(sizes)}).encode()
    text += b" " * (
        -len(text) % 8
    )  # as safetensors writes it: the tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def _tensors(sizes: Mapping[str, int]) -> Json:
    """The tensors of a file: the seal, then the arrays, with no holes."""
    tensors: Json = {}
    begin = 0
    for name, size in [(SEAL, SEAL_BYTES), *sizes.items()]:
        tensors[name] = {"dtype": "U8", "shape": [size], "data_offsets": [begin, begin + size]}
        begin += size
    return tensors


def _digest(kind: str, content: Json, table: Mapping[str, Json]) -> str:
    text = _SORTED.encode({"kind": kind, "content": content, "arrays": table})
    return hashlib.sha256(text.encode()).hexdigest()


_SORTED = json.JSONEncoder(separators=(",", ":"), sort_keys=True)


def _dumps(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def read_header(read: Read, size: int) -> Header:
    """Return the header of a file of `size` bytes, read through `read`; reads no array.

    Raises:
        DamagedFile: this is not a file of ours, or not the one that was written.
        ForeignFile: another version of this program wrote it.
    """
    head, seal = _read_head(read, size)
    if hashlib.sha256(head).digest() != seal:
        raise DamagedFile("its header does not agree with its checksum")
    try:
        return _parse(head, seal, size)
    except UNREADABLE as exc:
        raise DamagedFile("its header is not one of ours") from exc


def read_seal(read: Read, size: int) -> bytes:
    """Return the seal of a file, 32 bytes: once the file was checked it stands for every byte.

    Raises:
        DamagedFile: the file is cut short.
    """
    return _read_head(read, size)[1]


def _read_head(read: Read, size: int) -> tuple[bytes, bytes]:
    first = read(0, FIRST_READ_BYTES)
    length = int.from_bytes(first[:8], "little")
    if len(first) < 8 or length > min(size - 8 - SEAL_BYTES, LARGEST_HEADER_BYTES):
        raise DamagedFile("it is cut short, or not a safetensors file")
    end = 8 + length + SEAL_BYTES
    if len(first) < end:
        first += read(len(first), end - len(first))
    if len(first) < end:
        raise DamagedFile("it is cut short")
    return first[: 8 + length], first[8 + length : end]


def _parse(head: bytes, seal: bytes, size: int) -> Header:
    tensors = json.loads(head[8:].decode())
    metadata = tensors.pop("__metadata__")
    if metadata["format"] != FORMAT:
        raise DamagedFile("it is a safetensors file, but not one of ours")
    if not isinstance(metadata["version"], str):
        raise DamagedFile("it has no version")
    if metadata["version"] != VERSION:
        raise ForeignFile(
            f"it has format version {metadata['version'][:20]!r}, and this program reads {VERSION}"
        )
    header = json.loads(metadata["header"])
    kind, table = header["kind"], header["arrays"]
    content, notes, quick = header["content"], header["notes"], header.get("xxh3", {})
    if not isinstance(kind, str) or not isinstance(content, dict) or not isinstance(notes, dict):
        raise DamagedFile("its header is not one of ours")
    offset = len(head) + SEAL_BYTES
    entries: dict[str, Entry] = {}
    for name, row in table.items():
        entries[name] = _entry(row, offset, quick.get(name))
        offset += entries[name].stored_bytes
    if offset != size:
        raise DamagedFile(f"it has {size} bytes instead of {offset}")
    if not _are_tensors(tensors, {name: entry.stored_bytes for name, entry in entries.items()}):
        raise DamagedFile("its tensors are not those of its header, overlap or leave holes")
    return Header(kind, content, notes, entries, _digest(kind, content, table), size, seal)


def _are_tensors(told: Json, sizes: Mapping[str, int]) -> bool:
    """Whether these are the tensors of a file, and not merely equal to them, as `1.0` is to 1."""
    return told == _tensors(sizes) and all(
        type(n) is int for row in told.values() for n in (*row["shape"], *row["data_offsets"])
    )


def _stored_bytes(row: Json) -> int:
    return sum(size for _, size in row["planes"])


def _entry(row: Json, offset: int, xxh3: Any) -> Entry:
    dtype, shape, planes = row["dtype"], tuple(row["shape"]), tuple(map(_plane, row["planes"]))
    if len(shape) > MOST_DIMENSIONS:
        raise DamagedFile("an array has too many dimensions")
    sizes = [size for _, size in planes]
    for n in (*shape, *sizes):
        if type(n) is not int or n < 0:
            raise DamagedFile("the size of an array is none")
    stored_bytes = sum(sizes)
    possible = max(ALWAYS_BYTES, LARGEST_GAIN * stored_bytes)
    if len(planes) != ITEMSIZE[dtype] or raw_bytes(dtype, shape) > possible:
        raise DamagedFile("an array's size is not possible")
    quick = None if xxh3 is None else str(xxh3)
    return Entry(dtype, shape, planes, str(row["sha256"]), offset, stored_bytes, quick)


def _plane(row: Iterable[Any]) -> tuple[str, int]:
    name, size = row
    return str(name), size


def read_stored(read: Read, entry: Entry) -> memoryview:
    """Return the stored bytes of one array, checked against all checksums that there are of them.

    Raises:
        DamagedFile: they are not the bytes that were written.
    """
    stored = read(entry.offset, entry.stored_bytes)
    _check([stored], hashlib.sha256(), entry.sha256)
    if entry.xxh3 is not None:
        _check([stored], xxhash.xxh3_128(), entry.xxh3)
    return memoryview(stored)


def _check_quickly(stored: Sequence[bytes | memoryview], entry: Entry) -> None:
    """Compare all stored bytes of an array with the checksum that takes least time.

    Raises:
        DamagedFile: they are not the bytes that were written.
    """
    if entry.xxh3 is not None:
        _check(stored, xxhash.xxh3_128(), entry.xxh3)
    else:
        _check(stored, hashlib.sha256(), entry.sha256)


def _check(stored: Sequence[bytes | memoryview], checksum: Any, told: str) -> None:
    for part in stored:
        checksum.update(part)
    if checksum.hexdigest() != told:
        raise DamagedFile("an array does not agree with its checksum")


def _planes(read: Read, entry: Entry) -> list[codec.Plane]:
    stored = memoryview(read(entry.offset, entry.stored_bytes))
    _check_quickly([stored], entry)
    planes, begin = [], 0
    for name, size in entry.planes:
        planes.append(codec.Plane(name, stored[begin : begin + size]))
        begin += size
    return planes


def read_planes(read: Read, read_into: ReadInto, entry: Entry, into: memoryview) -> None:
    """Put the planes of one array into memory, one after the other: the first byte of every item,
    then the second. As `read_array`, for whoever can put them together better than this.

    `into` has as many bytes as the array. What is in it after an error is of no use.

    Raises:
        DamagedFile: its bytes are not those that were written.
    """
    size, offset = len(into) // len(entry.planes), entry.offset
    stored: list[bytes | memoryview] = []
    packed: list[tuple[memoryview, codec.Plane]] = []
    for k, (name, length) in enumerate(entry.planes):
        place = into[k * size : (k + 1) * size]
        if name == codec.RAW and length == size:
            count = read_into(offset, place)
            stored.append(place)
        else:
            data = read(offset, length)
            count = len(data)
            stored.append(data)
            packed.append((place, codec.Plane(name, data)))
        if count != length:
            raise DamagedFile("it is cut short")
        offset += length
    _check_quickly(stored, entry)
    for place, plane in packed:
        codec.decode_into(plane, place)


def read_array(read: Read, entry: Entry) -> Array:
    """Return one array, checked and decompressed.

    The caller has compared `entry.dtype` and `entry.shape` with what it expects: as many bytes as
    they say are allocated here.

    Raises:
        DamagedFile: its bytes are not those that were written.
    """
    planes = _planes(read, entry)
    data = codec.decode(planes, raw_bytes(entry.dtype, entry.shape))
    return Array(entry.dtype, entry.shape, data)


def check(read: Read, entries: Iterable[Entry]) -> None:
    """Read every stored byte of these arrays and compare all checksums; decompress nothing.

    Raises:
        DamagedFile: an array's bytes are not those that were written.
    """
    for entry in entries:
        read_stored(read, entry)
