"""The codec: bit for bit there and back, and nothing that is stored is believed."""

from __future__ import annotations

import tracemalloc
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_promptcache import codec
from mlx_promptcache.codec import LEAST_GAIN, RAW, ZSTD, Plane, decode, decode_into, encode
from mlx_promptcache.errors import DamagedFile

if TYPE_CHECKING:
    from collections.abc import Callable

FIXED = settings(derandomize=True, deadline=None, max_examples=200)
ITEMSIZES = (1, 2, 4, 8)
DTYPES = ("uint8", "int8", "bool", "float16", "uint16", "float32", "int64", "float64", "complex64")
SLACK_BYTES = 64 << 10  # of tracemalloc's peak: objects, not data


@st.composite
def raw_arrays(draw: st.DrawFn) -> tuple[bytes, int]:
    """The bytes of an array, and the bytes of one of its items."""
    itemsize = draw(st.sampled_from(ITEMSIZES))
    items = draw(st.integers(0, 40) | st.sampled_from([63, 64, 65, 256, 3000]))
    size = items * itemsize
    kind = draw(st.sampled_from(["noise", "constant", "few values", "drawn"]))
    if kind == "constant":
        return bytes([draw(st.integers(0, 255))]) * size, itemsize
    if kind == "drawn":
        short = min(items, 40) * itemsize
        return draw(st.binary(min_size=short, max_size=short)), itemsize
    highest = 256 if kind == "noise" else 3
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    return rng.integers(0, highest, size, np.uint8).tobytes(), itemsize


def noise(size: int, seed: int = 7) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def zstd(data: bytes, *, states_size: bool = True, itemsize: int = 1) -> bytes:
    if itemsize == 1:
        compressor = zstandard.ZstdCompressor(level=1, write_content_size=states_size)
    else:
        numbers = zstandard.ZstdCompressionParameters(
            strategy=zstandard.STRATEGY_FAST, min_match=7, hash_log=8, window_log=19, chain_log=6,
            search_log=1, target_length=0, write_content_size=True,
        )  # fmt: skip
        compressor = zstandard.ZstdCompressor(compression_params=numbers)
    return compressor.compress(data)


def frame(states: int, blocks: int, block_bytes: int) -> bytes:
    """A zstd frame by hand: it states one size, and holds `blocks` runs of a zero."""
    descriptor = 0b1000_0000  # the content size in 4 bytes, a window, no checksum, no dictionary
    window = 7 << 3  # 128 KiB
    head = b"\x28\xb5\x2f\xfd" + bytes([descriptor, window]) + states.to_bytes(4, "little")
    runs = [(block_bytes << 3) | (1 << 1) | (k == blocks - 1) for k in range(blocks)]
    return head + b"".join(run.to_bytes(3, "little") + b"\0" for run in runs)


def peak_bytes(call: Callable[[], object]) -> int:
    """The most that Python, numpy and zstandard allocated during a call."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# There and back


@FIXED
@given(raw_arrays())
def test_what_is_encoded_comes_back_bit_for_bit(array: tuple[bytes, int]) -> None:
    raw, itemsize = array
    planes = encode(raw, itemsize)
    assert len(planes) == itemsize
    assert bytes(decode(planes, len(raw))) == raw


@pytest.mark.parametrize("itemsize", ITEMSIZES)
@pytest.mark.parametrize("items", [0, 1])
def test_no_item_and_one_item_come_back(itemsize: int, items: int) -> None:
    raw = noise(items * itemsize)
    assert bytes(decode(encode(raw, itemsize), len(raw))) == raw


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_comes_back(dtype: str) -> None:
    array = np.arange(1000).astype(dtype).reshape(10, 100)
    planes = encode(array.tobytes(), array.dtype.itemsize)
    back = np.frombuffer(decode(planes, array.nbytes), dtype).reshape(array.shape)
    assert back.tobytes() == array.tobytes()


def test_nan_payloads_infinities_and_the_sign_of_zero_are_kept() -> None:
    bits = np.array(
        [0x7FC00000, 0x7FC0BEEF, 0xFFC00001, 0x7F800001, 0x7F800000, 0x80000000, 0, 1], np.uint32
    )
    raw = np.tile(bits, 50).tobytes()
    assert bytes(decode(encode(raw, 4), len(raw))) == raw


def test_planes_that_lie_in_one_larger_buffer_come_back() -> None:
    raw = np.arange(4096, dtype=np.uint32).tobytes()
    planes = encode(raw, 4)
    buffer = memoryview(b"".join(bytes(plane.data) for plane in planes))
    views, begin = [], 0
    for plane in planes:
        views.append(Plane(plane.codec, buffer[begin : begin + len(plane.data)]))
        begin += len(plane.data)
    assert {plane.codec for plane in planes} == {RAW, ZSTD} or begin < len(raw)
    assert bytes(decode(views, len(raw))) == raw


def test_the_least_significant_byte_makes_the_first_plane() -> None:
    planes = encode(bytes([1, 2, 3, 4, 5, 6]), 2)
    assert [bytes(plane.data) for plane in planes] == [bytes([1, 3, 5]), bytes([2, 4, 6])]


def test_the_same_bytes_give_the_same_planes() -> None:
    raw = np.linspace(-1, 1, 5000, dtype=np.float32).tobytes()
    assert encode(raw, 4) == encode(raw, 4)


# What is compressed and what is not


@FIXED
@given(raw_arrays())
def test_a_plane_is_compressed_just_where_it_shrinks_by_a_sixty_fourth(
    array: tuple[bytes, int],
) -> None:
    raw, itemsize = array
    for k, plane in enumerate(encode(raw, itemsize)):
        part = raw[k::itemsize]
        packed = zstd(part, itemsize=itemsize)
        shrinks = len(packed) < len(part) and len(packed) <= len(part) - len(part) // LEAST_GAIN
        assert plane == (Plane(ZSTD, packed) if shrinks else Plane(RAW, part))


def test_a_plane_that_shrinks_by_less_than_a_sixty_fourth_is_kept_raw() -> None:
    size = 512 << 10  # zstd decides for each block of 128 KiB, the codec for the whole plane
    least = size // LEAST_GAIN
    for constant, codec_name in ((least // 2, RAW), (2 * least, ZSTD)):
        part = noise(size - constant) + bytes(constant)
        gain = size - len(zstd(part))
        assert 0 < gain < 3 * least
        assert (gain >= least) == (codec_name == ZSTD)
        (plane,) = encode(part, 1)
        assert plane.codec == codec_name


def test_a_plane_that_would_be_as_long_as_before_is_kept_raw() -> None:
    short = [bytes(n - k) + bytes(range(k)) for n in range(1, 64) for k in range(n)]
    level = [part for part in short if len(zstd(part)) == len(part)]
    assert level
    for part in level:
        assert encode(part, 1) == [Plane(RAW, part)]


def test_noise_takes_no_byte_more_than_before() -> None:
    raw = noise(1 << 16)
    planes = encode(raw, 4)
    assert {plane.codec for plane in planes} == {RAW}
    assert sum(len(plane.data) for plane in planes) == len(raw)


def test_constant_data_nearly_vanishes() -> None:
    planes = encode(b"\x3f\x80" * 50_000, 2)
    assert sum(len(plane.data) for plane in planes) < 100


def test_bfloat16_like_keys_shrink_by_a_quarter() -> None:
    values = np.random.default_rng(3).normal(0, 2, 64 * 1024).astype(np.float32)
    raw = (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    planes = encode(raw, 2)
    assert [plane.codec for plane in planes] == [RAW, ZSTD]  # the mantissa is noise
    assert sum(len(plane.data) for plane in planes) < 0.75 * len(raw)


@pytest.mark.parametrize("bits", [16, 32])
def test_exponents_take_hardly_more_bytes_than_with_the_level_of_text(bits: int) -> None:
    """As those of K/V do: values of each of 64 channels have a size of their own."""
    rng = np.random.default_rng(5)
    values = rng.normal(0, np.exp(rng.normal(0, 1, 64)), (20_000, 64)).astype(np.float32)
    raw = (values.view(np.uint32) >> (32 - bits)).astype(f"<u{bits // 8}").tobytes()
    exponents = encode(raw, bits // 8)[-1]
    level_1 = zstd(raw[bits // 8 - 1 :: bits // 8])
    assert exponents.codec == ZSTD
    assert len(exponents.data) < 1.01 * len(level_1) < 0.5 * values.size


# Hostile planes


@pytest.mark.parametrize(
    ("planes", "nbytes"),
    [
        ([], 0),
        ([], 4),
        ([Plane(RAW, b"abc")], 2),
        ([Plane(RAW, b"a")], 2),
        ([Plane(RAW, b"")], 1),
        ([Plane(RAW, b"a")], 0),
        ([Plane(RAW, b"ab"), Plane(RAW, b"a")], 4),
        ([Plane(RAW, b"ab"), Plane(RAW, b"ab")], 3),
        ([Plane(RAW, b"a"), Plane(RAW, b"a")], 3),
        ([Plane(ZSTD, zstd(b"a" * 100))], 99),
        ([Plane(ZSTD, zstd(b"a" * 100))], 101),
    ],
)
def test_planes_of_another_length_are_damage(planes: list[Plane], nbytes: int) -> None:
    with pytest.raises(DamagedFile):
        decode(planes, nbytes)


@pytest.mark.parametrize("name", ["", "RAW", "lz4", "zstd ", "pickle", "raw\0"])
def test_an_unknown_codec_is_damage(name: str) -> None:
    with pytest.raises(DamagedFile, match="unknown codec"):
        decode([Plane(name, b"ab")], 2)


def test_a_frame_that_is_cut_short_is_damage_wherever_it_is_cut() -> None:
    packed = zstd(b"promptcache " * 100)
    for length in range(len(packed)):
        with pytest.raises(DamagedFile):
            decode([Plane(ZSTD, packed[:length])], 1200)


@pytest.mark.parametrize("extra", [b"\0", b"x", b"\0" * 100, zstd(b""), zstd(b"more")])
def test_anything_after_a_frame_is_damage(extra: bytes) -> None:
    with pytest.raises(DamagedFile):
        decode([Plane(ZSTD, zstd(b"a" * 100) + extra)], 100)


def test_two_frames_are_damage_also_where_together_they_have_the_right_size() -> None:
    with pytest.raises(DamagedFile):
        decode([Plane(ZSTD, zstd(b"a" * 50) + zstd(b"a" * 50))], 100)


def test_a_frame_that_does_not_state_its_size_is_damage() -> None:
    packed = zstd(b"a" * 100, states_size=False)
    assert zstandard.ZstdDecompressor().decompress(packed, max_output_size=100) == b"a" * 100
    with pytest.raises(DamagedFile, match="another size"):
        decode([Plane(ZSTD, packed)], 100)


def test_a_frame_made_by_hand_is_a_frame() -> None:
    assert bytes(decode([Plane(ZSTD, frame(300, 3, 100))], 300)) == bytes(300)


def test_a_frame_that_states_a_huge_size_is_not_given_it() -> None:
    bomb = Plane(ZSTD, frame((1 << 32) - 1, 1, 100))

    def refused() -> None:
        with pytest.raises(DamagedFile, match="another size"):
            decode([bomb], 100)

    assert peak_bytes(refused) < SLACK_BYTES


def test_a_frame_that_holds_more_than_it_states_is_stopped() -> None:
    bomb = Plane(ZSTD, frame(1000, 2000, 128 << 10))  # 250 MiB in 8 KB

    def refused() -> None:
        with pytest.raises(DamagedFile):
            decode([bomb], 1000)

    assert peak_bytes(refused) < SLACK_BYTES


def test_a_frame_that_states_nothing_and_holds_something_is_damage() -> None:
    with pytest.raises(DamagedFile):
        decode([Plane(ZSTD, frame(0, 1, 100))], 0)
    assert not len(decode([Plane(ZSTD, zstd(b""))], 0))


BLOCK_BYTES = 128 << 10  # the most that a block of a frame holds


@pytest.mark.parametrize("has_checksum", [False, True])
@pytest.mark.parametrize("size", [1, 1000, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 1 << 20])
@pytest.mark.parametrize("kind", ["noise", "zeros", "text", "all of them"])
def test_frames_of_all_kinds_of_blocks_are_read_to_their_end(
    kind: str, size: int, has_checksum: bool
) -> None:
    kinds = {"noise": noise(size), "zeros": bytes(size), "text": (b"promptcache " * size)[:size]}
    raw = kinds.get(kind) or b"".join(kinds.values())
    packed = zstandard.ZstdCompressor(write_checksum=has_checksum).compress(raw)
    place = memoryview(bytearray(len(raw)))
    decode_into(Plane(ZSTD, packed), place)
    assert place == raw
    for wrong in (packed[:-1], packed + b"\x28", packed[:-4], packed + b"\x28\xb5\x2f\xfd"):
        with pytest.raises(DamagedFile):
            decode_into(Plane(ZSTD, wrong), place)


def block(kind: int, data: bytes, size: int, *, last: bool = False) -> bytes:
    return (size << 3 | kind << 1 | last).to_bytes(3, "little") + data


def test_a_block_of_no_kind_is_damage_however_much_came_before_it() -> None:
    """zstd would go through such a frame bit by bit, and not come to its end."""
    head = b"\x28\xb5\x2f\xfd\x80\x00" + (100 << 10).to_bytes(4, "little")  # a window of 1 KiB
    enough = head + block(1, b"x", 1 << 10) * 100
    more = block(1, b"y", 1 << 10) * 9
    for rest in (b"", more):
        with pytest.raises(DamagedFile):
            decode([Plane(ZSTD, enough + rest + block(3, b"", 0, last=True))], 100 << 10)
    sound = enough + block(0, b"", 0, last=True)
    assert bytes(decode([Plane(ZSTD, sound)], 100 << 10)) == b"x" * (100 << 10)


def test_a_frame_of_many_blocks_of_nothing_is_refused_before_the_last() -> None:
    head = frame(1000, 1, 1000)[:10]
    nothing, last = block(0, b"", 0), block(1, b"\0", 1000, last=True)
    assert bytes(decode([Plane(ZSTD, head + nothing * 9 + last)], 1000)) == bytes(1000)
    with pytest.raises(DamagedFile, match="blocks that zstd does not make"):
        decode([Plane(ZSTD, head + nothing * 10_000 + last)], 1000)


def test_decompressing_takes_no_memory_beside_where_it_goes() -> None:
    raw = bytes(1 << 24)
    place, plane = memoryview(bytearray(raw)), Plane(ZSTD, zstd(raw))
    assert peak_bytes(lambda: decode_into(plane, place)) < SLACK_BYTES


def test_a_frame_that_holds_less_than_it_states_is_damage() -> None:
    with pytest.raises(DamagedFile):
        decode([Plane(ZSTD, frame(1000, 1, 100))], 1000)


def test_decoding_allocates_the_array_and_two_planes() -> None:
    raw = bytes(8 << 20)
    planes = encode(raw, 8)
    assert peak_bytes(lambda: decode(planes, len(raw))) < len(raw) + len(raw) // 4 + SLACK_BYTES


@FIXED
@given(
    st.lists(
        st.builds(
            Plane,
            st.sampled_from([RAW, ZSTD, "other"]),
            st.binary(max_size=20) | st.binary(max_size=20).map(zstd),
        ),
        max_size=4,
    ),
    st.integers(0, 80),
)
def test_whatever_the_planes_are_it_is_the_right_size_or_damage(
    planes: list[Plane], nbytes: int
) -> None:
    try:
        data = decode(planes, nbytes)
    except DamagedFile:
        return
    assert len(data) == nbytes
    assert len(planes) in range(1, nbytes + 2)


@FIXED
@given(st.data())
def test_an_altered_frame_is_the_right_size_or_damage(data: st.DataObject) -> None:
    packed = bytearray(zstd(b"the quick brown fox " * 20))
    for _ in range(data.draw(st.integers(1, 3))):
        packed[data.draw(st.integers(0, len(packed) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        decoded = decode([Plane(ZSTD, bytes(packed))], 400)
    except DamagedFile:
        return
    assert len(decoded) == 400


def test_the_level_is_the_one_that_was_measured() -> None:
    assert (codec.LEVEL, LEAST_GAIN) == (1, 32)


class Counting:
    """A compressor that counts the bytes that it is given."""

    given = 0
    original = zstandard.ZstdCompressor

    def __init__(self, **settings: Any) -> None:
        self._compressor = Counting.original(**settings)

    def compress(self, data: bytes) -> bytes:
        Counting.given += len(data)
        packed: bytes = self._compressor.compress(data)
        return packed


def test_of_large_planes_that_do_not_shrink_only_samples_are_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    size = 1 << 20
    monkeypatch.setattr(Counting, "given", 0)
    monkeypatch.setattr(zstandard, "ZstdCompressor", Counting)
    assert encode(noise(2 * size), 2) == [
        Plane(RAW, noise(2 * size)[0::2]),
        Plane(RAW, noise(2 * size)[1::2]),
    ]
    assert 0 < Counting.given <= size // 4


@pytest.mark.parametrize("at", range(codec.SAMPLES))
def test_one_sample_that_shrinks_is_enough_to_try_the_whole(at: int) -> None:
    part = 1 << 18
    parts = [noise(part) for _ in range(codec.SAMPLES)]
    parts[at] = bytes(part)
    (plane,) = encode(b"".join(parts), 1)
    assert plane.codec == ZSTD
    assert bytes(decode([plane], part * codec.SAMPLES)) == b"".join(parts)
