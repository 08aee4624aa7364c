"""The container: a safetensors file like any other, in which no byte can change unseen."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import time
import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_promptcache import container
from mlx_promptcache.container import (
    FIRST_READ_BYTES,
    ITEMSIZE,
    SEAL,
    SEAL_BYTES,
    Array,
    check,
    pack,
    read_array,
    read_header,
)
from mlx_promptcache.errors import DamagedFile, ForeignFile

if TYPE_CHECKING:
    from collections.abc import Callable

    from mlx_promptcache.container import Header, Packed, Read, ReadInto

    Json = dict[str, Any]
    Change = Callable[[Json, Json], None]  # of the safetensors header, and of ours within it

FIXED = settings(derandomize=True, deadline=None, max_examples=60)
GOLDEN = Path(__file__).parent / "golden" / "block-v1.safetensors"
GOLDEN_DIGEST = "063d0b2b6f275beba04c3d7c280ba7db7d1fee65e75dd7afb06ee7089d338d97"
SLACK_BYTES = 256 << 10
SLOW_SECONDS = 3.0  # many times what the largest of these files should take


def golden() -> Packed:
    """The golden file: constant planes and tiny ones, so that every zstd library writes it alike.

    Write it anew only where the format gains something: `PYTHONPATH=src python
    tests/test_container.py`. Those of `tests/golden/store` are from before XXH3.
    """
    arrays = {
        "keys/0": Array("bfloat16", (1, 2, 3), bytes(range(12))),
        "values/0": Array("float32", (2, 0, 4), b""),
        "state": Array("float32", (256,), b"\x00\x00\x80\x3f" * 256),
        "rng": Array("uint32", (2,), (7).to_bytes(4, "little") + (11).to_bytes(4, "little")),
        "flag": Array("bool", (), b"\x01"),
    }
    content = {"fingerprint": "0f" * 16, "start": 0, "tokens": [1, 2, 3], "text": "Grüße \u2028"}
    return pack("block", content, {"made": 1700000000.5}, arrays)


def written(packed: Packed) -> bytes:
    return b"".join(bytes(chunk) for chunk in packed.chunks)


def small_file() -> bytes:
    """A file as small as can be that has a raw plane and a compressed one."""
    arrays = {"a": Array("uint16", (2, 20), bytes([1, 2]) * 40), "b": Array("int8", (3,), b"xyz")}
    return written(pack("block", {"n": 1}, {"made": 2.5}, arrays))


def reader(data: bytes) -> Read:
    return lambda offset, length: data[offset : offset + length]


def into_reader(data: bytes) -> ReadInto:
    def read_into(offset: int, memory: memoryview) -> int:
        found = data[offset : offset + len(memory)]
        memory[: len(found)] = found
        return len(found)

    return read_into


def header_of(data: bytes) -> Header:
    return read_header(reader(data), len(data))


def read_all(data: bytes) -> dict[str, Array]:
    read = reader(data)
    return {name: read_array(read, entry) for name, entry in header_of(data).entries.items()}


# There and back


@st.composite
def named_arrays(draw: st.DrawFn) -> dict[str, Array]:
    arrays = {}
    for name in draw(st.lists(st.text(max_size=5), max_size=3, unique=True)):
        if name in {SEAL, "__metadata__"}:
            continue
        dtype = draw(st.sampled_from(sorted(ITEMSIZE)))
        shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
        size = container.raw_bytes(dtype, shape)
        arrays[name] = Array(dtype, shape, draw(st.binary(min_size=size, max_size=size)))
    return arrays


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
json_objects = st.dictionaries(st.text(max_size=5), json_values, max_size=3)


@FIXED
@given(st.text(max_size=5), json_objects, json_objects, named_arrays())
def test_what_is_packed_comes_back(
    kind: str, content: Json, notes: Json, arrays: dict[str, Array]
) -> None:
    packed = pack(kind, content, notes, arrays)
    data = written(packed)
    header = header_of(data)
    assert (header.kind, header.content, header.notes) == (kind, content, notes)
    assert (header.digest, header.size) == (packed.digest, len(data))
    assert header.size == packed.size
    assert header.raw_bytes == sum(array.nbytes for array in arrays.values())
    back = read_all(data)
    assert list(back) == list(arrays)
    for name, array in arrays.items():
        assert (back[name].dtype, back[name].shape) == (array.dtype, array.shape)
        assert bytes(back[name].data) == bytes(array.data)


def test_the_digest_depends_on_kind_content_and_arrays_and_not_on_the_notes() -> None:
    arrays = {"a": Array("uint8", (3,), b"abc")}
    first = pack("block", {"n": 1, "m": 2}, {"made": 1}, arrays).digest
    assert pack("block", {"m": 2, "n": 1}, {"made": 2}, arrays).digest == first
    others = [
        pack("snapshot", {"n": 1, "m": 2}, {}, arrays),
        pack("block", {"n": 1, "m": 3}, {}, arrays),
        pack("block", {"n": 1, "m": 2}, {}, {"a": Array("uint8", (3,), b"abd")}),
        pack("block", {"n": 1, "m": 2}, {}, {"a": Array("int8", (3,), b"abc")}),
        pack("block", {"n": 1, "m": 2}, {}, {"a": Array("uint8", (1, 3), b"abc")}),
        pack("block", {"n": 1, "m": 2}, {}, {"b": Array("uint8", (3,), b"abc")}),
    ]
    assert len({first, *(packed.digest for packed in others)}) == 1 + len(others)


def test_a_header_larger_than_the_first_read_is_read_whole_and_nothing_more() -> None:
    tokens = list(range(40_000))
    data = written(pack("block", {"tokens": tokens}, {}, {"a": Array("uint8", (9,), b"a" * 9)}))
    assert len(data) > 2 * FIRST_READ_BYTES
    reads: list[tuple[int, int]] = []

    def read(offset: int, length: int) -> bytes:
        reads.append((offset, length))
        return data[offset : offset + length]

    assert read_header(read, len(data)).content["tokens"] == tokens
    assert reads == [(0, FIRST_READ_BYTES), (FIRST_READ_BYTES, len(data) - 9 - FIRST_READ_BYTES)]


def test_of_a_file_of_ours_the_quick_checksum_is_compared_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data, hashed = small_file(), []
    entries, sha256 = header_of(data).entries, hashlib.sha256

    def told(*args: bytes) -> Any:
        hashed.append(args)
        return sha256(*args)

    monkeypatch.setattr(hashlib, "sha256", told)
    into = memoryview(bytearray(80))
    container.read_planes(reader(data), into_reader(data), entries["a"], into)
    assert into[:40] == bytes([1]) * 40
    read_array(reader(data), entries["a"])
    assert hashed == []
    check(reader(data), entries.values())
    assert len(hashed) == 2


def test_check_reads_every_array_and_finds_the_one_that_changed() -> None:
    data = small_file()
    entries = header_of(data).entries
    check(reader(data), entries.values())
    altered = data[:-1] + b"?"
    assert header_of(altered).entries == entries
    with pytest.raises(DamagedFile, match="checksum"):
        check(reader(altered), entries.values())


# The safetensors format


def test_any_safetensors_reader_opens_the_file(tmp_path: Path) -> None:
    path = tmp_path / "block.safetensors"
    path.write_bytes(written(golden()))
    tensors = safetensors.numpy.load_file(path)
    assert set(tensors) == {SEAL, "keys/0", "values/0", "state", "rng", "flag"}
    for tensor in tensors.values():
        assert tensor.dtype == np.uint8
        assert tensor.ndim == 1
    with safetensors.safe_open(path, "numpy") as file:
        metadata = file.metadata()
    assert (metadata["format"], metadata["version"]) == ("mlx_promptcache", "1")
    assert json.loads(metadata["header"])["kind"] == "block"


def test_the_tensors_begin_at_a_multiple_of_eight_and_the_seal_is_the_first() -> None:
    data = small_file()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    head = data[: 8 + length]
    assert data[8 + length : 8 + length + SEAL_BYTES] == hashlib.sha256(head).digest()
    tensors = json.loads(head[8:])
    assert list(tensors)[:2] == ["__metadata__", SEAL]
    assert tensors[SEAL] == {"dtype": "U8", "shape": [32], "data_offsets": [0, 32]}


def test_the_golden_file_is_read_as_it_was_written() -> None:
    data = GOLDEN.read_bytes()
    header = header_of(data)
    assert header.digest == GOLDEN_DIGEST
    assert header.content["text"] == "Grüße \u2028"
    assert header.notes == {"made": 1700000000.5}
    arrays = read_all(data)
    assert bytes(arrays["keys/0"].data) == bytes(range(12))
    assert bytes(arrays["state"].data) == b"\x00\x00\x80\x3f" * 256
    assert arrays["values/0"].shape == (2, 0, 4)
    assert arrays["flag"].shape == ()
    assert "zstd" in {name for entry in header.entries.values() for name, _ in entry.planes}


def test_the_format_is_that_of_the_golden_file_byte_for_byte() -> None:
    packed = golden()
    assert packed.digest == GOLDEN_DIGEST
    assert written(packed) == GOLDEN.read_bytes()


# Accidents: no byte changes unseen


@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
def test_every_byte_that_changes_is_noticed(flip: int) -> None:
    data = small_file()
    assert {name for e in header_of(data).entries.values() for name, _ in e.planes} == {
        "raw",
        "zstd",
    }
    for at in range(len(data)):
        altered = bytearray(data)
        altered[at] ^= flip
        with pytest.raises(DamagedFile):
            read_all(bytes(altered))


def test_every_length_to_which_a_file_is_cut_is_noticed() -> None:
    data = small_file()
    for length in range(len(data)):
        with pytest.raises(DamagedFile):
            header_of(data[:length])


def test_a_file_that_is_cut_while_it_is_read_is_noticed() -> None:
    data = small_file()
    entries = header_of(data).entries
    for length in range(len(data)):
        read = reader(data[:length])
        with pytest.raises(DamagedFile):
            check(read, entries.values())
        if length < entries["a"].offset:
            with pytest.raises(DamagedFile):
                read_header(read, len(data))


@pytest.mark.parametrize("extra", [b"\0", b"x" * 100])
def test_bytes_after_the_end_are_noticed(extra: bytes) -> None:
    with pytest.raises(DamagedFile, match="bytes instead of"):
        header_of(small_file() + extra)


@pytest.mark.parametrize("data", [b"", b"\0" * 7, b"\0" * 8, b"\0" * 40, b"\0" * 4096, b"{}" * 50])
def test_what_is_no_safetensors_file_is_damage(data: bytes) -> None:
    with pytest.raises(DamagedFile):
        header_of(data)


def test_a_safetensors_file_of_another_program_is_damage() -> None:
    data = safetensors.numpy.save({"a": np.arange(100, dtype=np.float32)})
    with pytest.raises(DamagedFile):
        header_of(data)


# Malice: headers that are sealed as they should be


def sealed(text: bytes, payload: bytes = b"") -> bytes:
    """A file with this safetensors header, whatever it says, and the right checksum over it."""
    head = len(text).to_bytes(8, "little") + text
    return head + hashlib.sha256(head).digest() + payload


def forged(change: Change) -> bytes:
    """The small file with its headers changed, and sealed again."""
    data = small_file()
    length = int.from_bytes(data[:8], "little")
    outer = json.loads(data[8 : 8 + length])
    inner = json.loads(outer["__metadata__"]["header"])
    change(outer, inner)
    metadata = outer.get("__metadata__")
    if isinstance(metadata, dict) and "header" in metadata:
        metadata["header"] = json.dumps(inner)
    return sealed(json.dumps(outer).encode(), data[8 + length + SEAL_BYTES :])


def refuse(data: bytes) -> None:
    """The header is refused, at once and with no more memory than the file is worth."""
    began = time.monotonic()
    tracemalloc.start()
    try:
        with pytest.raises(DamagedFile):
            header_of(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64 * len(data) + SLACK_BYTES
    assert time.monotonic() - began < SLOW_SECONDS


def test_the_forger_forges_well() -> None:
    def nothing(outer: Json, inner: Json) -> None:
        pass

    assert {name: bytes(a.data) for name, a in read_all(forged(nothing)).items()} == {
        "a": bytes([1, 2]) * 40,
        "b": b"xyz",
    }


@pytest.mark.parametrize("length", [1, 9_999, 1 << 20, 100_000_001, 1 << 40, (1 << 64) - 1])
def test_a_header_that_claims_to_be_longer_than_its_file_is_refused(length: int) -> None:
    data = length.to_bytes(8, "little") + small_file()[8:]
    refuse(data)
    asked = []

    def read(offset: int, length: int) -> bytes:
        asked.append(length)
        return data[offset : offset + length]

    with pytest.raises(DamagedFile):
        read_header(read, len(data))
    assert max(asked) <= max(len(data), FIRST_READ_BYTES)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b" ",
        b"null",
        b"[]",
        b"7",
        b'"header"',
        b"{",
        b"{}",
        b"\xff\xfe\x00",
        b"NaN",
        b"[" * 200_000,
        b'{"__metadata__":' * 50_000,
        b'{"__metadata__":' + b"9" * 100_000 + b"}",
        b'{"__metadata__":null}',
        b'{"__metadata__":[]}',
        b'{"__metadata__":"header"}',
        b'{"__metadata__":{}}',
        b'{"__metadata__":{"format":"mlx_promptcache","version":"1"}}',
    ],
    ids=lambda text: repr(text[:30]),
)
def test_a_header_that_is_no_object_of_ours_is_refused(text: bytes) -> None:
    refuse(sealed(text))


def test_a_header_within_the_header_that_is_no_object_is_refused() -> None:
    for header in ("", "null", "[]", "7", "{", "[" * 100_000, "9" * 10_000, '{"arrays":' * 9_000):

        def change(outer: Json, inner: Json, header: str = header) -> None:
            outer["__metadata__"]["header"] = header

        data = small_file()
        length = int.from_bytes(data[:8], "little")
        outer = json.loads(data[8 : 8 + length])
        change(outer, {})
        refuse(sealed(json.dumps(outer).encode(), data[8 + length + SEAL_BYTES :]))


METADATA = {
    "another format": {"format": "pt"},
    "no format": {"format": None},
    "a version that is a number": {"version": 1},
    "a version that is a list": {"version": [[[]]]},
}


@pytest.mark.parametrize("changes", METADATA.values(), ids=list(METADATA))
def test_another_format_or_version_is_refused(changes: Json) -> None:
    refuse(forged(lambda outer, _: outer["__metadata__"].update(changes)))


def test_another_version_is_told() -> None:
    with pytest.raises(ForeignFile, match="format version '2', and this program reads 1"):
        header_of(forged(lambda outer, _: outer["__metadata__"].update(version="2")))


@pytest.mark.parametrize("key", ["kind", "content", "notes", "arrays"])
def test_a_header_without_one_of_its_keys_is_refused(key: str) -> None:
    refuse(forged(lambda _, inner: inner.pop(key)))


@pytest.mark.parametrize("key", ["dtype", "shape", "planes", "sha256"])
def test_an_array_without_one_of_its_keys_is_refused(key: str) -> None:
    refuse(forged(lambda _, inner: inner["arrays"]["a"].pop(key)))


@pytest.mark.parametrize("value", [None, 7, True, [], {}, ["block"]], ids=repr)
def test_a_kind_that_is_no_text_is_refused(value: object) -> None:
    refuse(forged(lambda _, inner: inner.update(kind=value)))


@pytest.mark.parametrize("value", [None, 7, "text", [], [[]], ["ab"], [["kind", 1]]], ids=repr)
@pytest.mark.parametrize("key", ["content", "notes", "arrays"])
def test_a_part_of_the_header_that_is_no_object_is_refused(key: str, value: object) -> None:
    refuse(forged(lambda _, inner: inner.update({key: value})))


ROWS: dict[str, Json] = {
    "an enormous shape": {"shape": [1 << 60, 1 << 60]},
    "a shape just too large": {"shape": [1 << 45, 2]},
    "a negative length": {"shape": [-2, 20]},
    "two negative lengths": {"shape": [-2, -20]},
    "a length that is true": {"shape": [True, 40]},
    "a length that is a float": {"shape": [2.0, 20]},
    "a length that is infinite": {"shape": [float("inf")]},
    "a length that is no number": {"shape": [float("nan")]},
    "a length that is text": {"shape": ["2", 20]},
    "a length that is a list": {"shape": [[2, 20]]},
    "a shape that is a number": {"shape": 40},
    "no shape": {"shape": None},
    "no planes": {"planes": []},
    "one plane too few": {"planes": [["raw", 80]]},
    "one plane too many": {"planes": [["raw", 40], ["raw", 20], ["raw", 20]]},
    "a plane of a negative size": {"planes": [["raw", 100], ["raw", -20]]},
    "a plane whose size is true": {"planes": [["raw", True], ["raw", 40]]},
    "a plane whose size is a float": {"planes": [["raw", 1e300], ["raw", 40]]},
    "a plane of three parts": {"planes": [["raw", 40, 0], ["raw", 40]]},
    "planes that are text": {"planes": ["ab", "cd"]},
    "planes that are a number": {"planes": 2},
    "enormous planes": {"planes": [["raw", 1 << 62], ["raw", 1 << 62]]},
    "an unknown dtype": {"dtype": "float128"},
    "a dtype of another size": {"dtype": "float32"},
    "a dtype that is a list": {"dtype": ["uint16"]},
    "no dtype": {"dtype": None},
}


@pytest.mark.parametrize("changes", ROWS.values(), ids=list(ROWS))
def test_an_array_that_cannot_be_is_refused(changes: Json) -> None:
    refuse(forged(lambda _, inner: inner["arrays"]["a"].update(changes)))


def test_a_shape_of_very_many_lengths_is_refused_at_once() -> None:
    refuse(forged(lambda _, inner: inner["arrays"]["a"].update(shape=[10**18] * 50_000)))


@pytest.mark.parametrize("dtype", ["uint8", "float64"])
def test_an_array_much_larger_than_its_bytes_can_say_is_refused(dtype: str) -> None:
    """No zstd frame holds more than 128 KiB for each of its blocks of at least 4 bytes."""
    for name in ("raw", "zstd"):

        def change(_: Json, inner: Json, name: str = name) -> None:
            old = inner["arrays"]["b"]["planes"][0][1]
            itemsize = ITEMSIZE[dtype]
            planes = [[name, old]] + [[name, 0]] * (itemsize - 1)
            inner["arrays"]["b"].update(dtype=dtype, shape=[1 << 42], planes=planes)

        refuse(forged(change))


def offsets_changed(name: str, begin: int, end: int) -> Change:
    def change(outer: Json, inner: Json) -> None:
        outer[name]["data_offsets"] = [begin, end]

    return change


def plane_grown(outer: Json, inner: Json) -> None:
    """The last array ends a byte after the file."""
    inner["arrays"]["b"]["planes"] = [["raw", 4]]
    outer["b"]["data_offsets"][1] += 1


def swapped(outer: Json, inner: Json) -> None:
    inner["arrays"] = dict(reversed(inner["arrays"].items()))


def hole_before_last(outer: Json, inner: Json) -> None:
    outer["b"]["data_offsets"] = [n + 1 for n in outer["b"]["data_offsets"]]


def overlapping(outer: Json, inner: Json) -> None:
    """Both arrays stand on the same bytes, and both agree with them."""
    inner["arrays"]["b"] = copy.deepcopy(inner["arrays"]["a"])
    outer["b"] = copy.deepcopy(outer["a"])


LAYOUTS: dict[str, Change] = {
    "tensors overlap": overlapping,
    "there is a hole": hole_before_last,
    "a tensor overruns the file": plane_grown,
    "tensors are swapped": swapped,
    "a tensor stands on the seal": offsets_changed("a", 0, 60),
    "a tensor has a negative offset": offsets_changed("a", -32, 28),
    "an array is not in the table": lambda _, inner: inner["arrays"].pop("b"),
    "an array of the table is not there": lambda outer, _: outer.pop("b"),
    "there is a tensor more": lambda outer, _: outer.update(c=outer["b"]),
    "a tensor has another dtype": lambda outer, _: outer["a"].update(dtype="F32"),
    "a tensor has another shape": lambda outer, _: outer["b"].update(shape=[1, 3]),
    "an offset is a float": lambda outer, _: outer["b"]["data_offsets"].append(3.0),
    "the seal is elsewhere": offsets_changed(SEAL, 32, 64),
    "the seal has another dtype": lambda outer, _: outer[SEAL].update(dtype="I8"),
    "an array is named as the seal is": lambda _, inner: inner["arrays"].update(
        {SEAL: inner["arrays"].pop("b")}
    ),
    "there is no seal": lambda outer, _: outer.pop(SEAL),
    "a tensor has no offsets": lambda outer, _: outer["a"].pop("data_offsets"),
    "a tensor is a list": lambda outer, _: outer.update(a=[]),
}


@pytest.mark.parametrize("change", LAYOUTS.values(), ids=list(LAYOUTS))
def test_a_layout_that_is_not_ours_is_refused(change: Change) -> None:
    refuse(forged(change))


def test_an_array_with_planes_that_do_not_fit_its_shape_is_damage() -> None:
    def change(_: Json, inner: Json) -> None:
        inner["arrays"]["a"]["shape"] = [2, 21]

    with pytest.raises(DamagedFile):
        read_all(forged(change))


def test_an_array_of_an_unknown_codec_is_damage() -> None:
    def change(_: Json, inner: Json) -> None:
        inner["arrays"]["b"]["planes"][0][0] = "pickle"

    with pytest.raises(DamagedFile):
        read_all(forged(change))


@pytest.mark.parametrize("sha256", ["", "0" * 64, None, 7, []], ids=repr)
def test_an_array_with_another_sha256_is_damage_to_whoever_gets_it_from_elsewhere(
    sha256: object,
) -> None:
    data = forged(lambda _, inner: inner["arrays"]["b"].update(sha256=sha256))
    with pytest.raises(DamagedFile, match="checksum"):
        check(reader(data), header_of(data).entries.values())


@pytest.mark.parametrize("xxh3", ["", "0" * 32, 7, []], ids=repr)
def test_an_array_with_another_xxh3_is_damage(xxh3: object) -> None:
    data = forged(lambda _, inner: inner["xxh3"].update(b=xxh3))
    for read in (read_all, lambda data: check(reader(data), header_of(data).entries.values())):
        with pytest.raises(DamagedFile, match="checksum"):
            read(data)


@pytest.mark.parametrize("xxh3", [None, 7, [], "b"], ids=repr)
def test_checksums_that_are_none_are_damage(xxh3: object) -> None:
    with pytest.raises(DamagedFile):
        read_all(forged(lambda _, inner: inner.update(xxh3=xxh3)))


@pytest.mark.parametrize("lacking", [["a"], ["a", "b"]])
@pytest.mark.parametrize("sha256", ["", "0" * 64, None, 7, []], ids=repr)
def test_arrays_without_xxh3_are_read_by_their_sha256(lacking: list[str], sha256: object) -> None:
    def without(_: Json, inner: Json) -> None:
        for name in lacking:
            del inner["xxh3"][name]

    data = forged(without)
    assert read_all(data) == read_all(small_file())
    assert header_of(data).digest == header_of(small_file()).digest

    def forge(outer: Json, inner: Json) -> None:
        without(outer, inner)
        inner["arrays"]["a"].update(sha256=sha256)

    with pytest.raises(DamagedFile, match="checksum"):
        read_all(forged(forge))


@FIXED
@given(st.data())
def test_whatever_a_sealed_header_says_it_is_read_or_damage(data: st.DataObject) -> None:
    def change(outer: Json, inner: Json) -> None:
        places: list[tuple[Any, Any]] = []

        def collect(value: Any) -> None:
            keys = range(len(value)) if isinstance(value, list) else list(value)
            for key in keys:
                places.append((value, key))
                if isinstance(value[key], (dict, list)):
                    collect(value[key])

        collect(outer)
        collect(inner)
        holder, key = data.draw(st.sampled_from(range(len(places))).map(places.__getitem__))
        holder[key] = data.draw(json_values)

    with contextlib.suppress(DamagedFile):
        read_all(forged(change))


if __name__ == "__main__":
    GOLDEN.write_bytes(written(golden()))
    print(golden().digest)
