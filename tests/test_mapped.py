"""Mapped weights: the same arrays as those that are read, and what happens to a file under them.

Files are as large as those that are mapped, but nearly all of each is a hole, which takes no room.
"""

from __future__ import annotations

import gc
import json
import math
import mmap
import os
import resource
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx_lm.utils
import pytest

import processes
import tiny
from mlx_promptcache import Runner, checkpoint, engine, mapped, unwritten
from mlx_promptcache.arrays import memory_of
from mlx_promptcache.errors import StoreError
from mlx_promptcache.mapped import DTYPES, LEAST_BYTES, MappedFiles

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.skipif(
    mapped._libc() is None, reason="files are mapped on Linux, for a CPU"
)
PROMPT = tiny.random_tokens(60, seed=1)
ONE = b"\0\0\x80\x3f"  # as float32
SPARE = (mapped.HUGE_PAGE + mmap.PAGESIZE) // unwritten.WORD
ITEMS = LEAST_BYTES // 4  # of float32
THREE = {"a": ("F32", [5, 3]), "b": ("U64", [2]), "c": ("U8", [1])}


@pytest.fixture
def none_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors are views, too."""
    monkeypatch.setattr(mapped, "COPIED_BYTES", 0)


def put(path: Path, table: dict[str, Any], data: bytes, padding: int = 0) -> Path:
    """A safetensors file with a header of this table, longer by some spaces, and a hole before the
    data. These are written in small pieces, as which Linux then keeps them in memory.
    """
    for row in table.values():
        row["data_offsets"] = [offset + LEAST_BYTES for offset in row["data_offsets"]]
    header = json.dumps({"__metadata__": {"format": "mlx"}, **table}).encode()
    header = header.ljust(-(-len(header) // 8) * 8 + padding)
    with path.open("wb", buffering=0) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.seek(LEAST_BYTES, os.SEEK_CUR)
        for begin in range(0, len(data), mmap.PAGESIZE):
            file.write(data[begin : begin + mmap.PAGESIZE])
    return path


def written(path: Path, tensors: dict[str, tuple[str, list[int]]], padding: int = 0) -> Path:
    """A file of random tensors."""
    table, offset = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * DTYPES[dtype].size
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    return put(path, table, bytes(tiny.random_tokens(offset, seed=3)), padding)


def large(directory: Path, kind: str = "plain") -> Path:
    """A tiny model in a large file, its tensors at odd addresses."""
    model = tiny.on_disk(directory, kind)
    (file,) = model.glob("*.safetensors")
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    table = json.loads(data[8 : 8 + length])
    table.pop("__metadata__", None)
    put(file, table, data[8 + length :], padding=3)
    return model


@pytest.fixture
def zeros(tmp_path: Path) -> Path:
    """A file with one tensor of `ITEMS` zeros."""
    return zero(tmp_path / "model.safetensors")


def zero(path: Path, items: int = ITEMS) -> Path:
    row = {"dtype": "F32", "shape": [items], "data_offsets": [0, 4 * items]}
    header = json.dumps({"zeros": row}).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 4 * items)
    return path


def is_mapped(path: Path) -> bool:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return any(line.endswith(f" {path}") for line in lines)


def is_given_back(path: Path) -> bool:
    """Whether nothing of a file is mapped any more, as soon as MLX's threads have forgotten it."""
    ends = time.monotonic() + 10
    while is_mapped(path) and time.monotonic() < ends:
        time.sleep(0.01)
    return not is_mapped(path)


def read(path: Path) -> dict[str, mx.array]:
    arrays: Any = mx.load(str(path))
    found: dict[str, mx.array] = arrays
    return found


def load(path: Path) -> tuple[MappedFiles, Any]:
    """The arrays of a file that is mapped."""
    files = MappedFiles()
    arrays = files.load(str(path))
    assert files._mapped
    return files, arrays


def bits(arrays: dict[str, mx.array]) -> dict[str, Any]:
    return {name: tiny.bits(array) for name, array in arrays.items()}


def faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


# The same arrays


@pytest.mark.parametrize("padding", range(8))
def test_tensors_are_those_that_are_read(padding: int, none_copied: None, tmp_path: Path) -> None:
    """Wherever in the file they begin: MLX writes headers of any length."""
    tensors = {f"{d}.{n}": (d, [n, 3]) for d in DTYPES for n in (0, 1, 5, 40)}
    tensors |= {"one": ("F32", []), "none": ("BF16", [2, 0, 4]), "last": ("U8", [3])}
    path = written(tmp_path / "model.safetensors", tensors, padding)
    files, found = load(path)
    assert is_mapped(path)
    assert bits(found) == bits(read(path))
    assert not files.changed()


def test_small_tensors_are_copied(tmp_path: Path) -> None:
    tensors = {"norm": ("F32", [60]), "none": ("F32", [0])}
    path = written(tmp_path / "model.safetensors", tensors, 1)
    _, found = load(path)
    assert is_given_back(path)
    assert bits(found) == bits(read(path))


@pytest.mark.parametrize("kind", ["plain", "rotating", "bare", "hybrid"])
def test_a_model_computes_the_same_bits(kind: str, none_copied: None, tmp_path: Path) -> None:
    model = large(tmp_path / "model", kind)
    files, logits = MappedFiles(), {}
    for what, reader in {"read": mx.load, "mapped": files.load}.items():
        loaded, _ = checkpoint.unread(model, None, reader)
        logits[what] = tiny.bits(loaded(mx.array([PROMPT])))
    assert files._mapped
    assert logits["mapped"] == logits["read"]


def test_the_real_model_is_mapped_and_not_read(real_model: Path) -> None:
    """Its pages are the system's: neither faults nor memory for each of them."""
    (file,) = real_model.glob("*.safetensors")
    found = processes.python(
        "import json, resource, sys\n"
        "from pathlib import Path\n"
        "from mlx_promptcache import checkpoint\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "before = faults()\n"
        "model, _, weights, _ = checkpoint.load(Path(sys.argv[1]), None)\n"
        "weights.wait()\n"
        "maps = Path('/proc/self/maps').read_text()\n"
        "print(json.dumps([faults() - before, sys.argv[2] in maps]))\n",
        real_model, file.resolve(),
    )  # fmt: skip
    pages = file.stat().st_size // os.sysconf("SC_PAGE_SIZE")
    assert found[1]
    assert found[0] < pages / 4


def test_a_file_is_mapped_where_its_huge_pages_can_be(none_copied: None, tmp_path: Path) -> None:
    """A multiple of 2 MiB in the file is one in memory, and it may be kept in such pieces."""
    path = written(tmp_path / "model.safetensors", THREE)
    held = load(path)
    before, after = Path("/proc/self/smaps").read_text().split(f"{path}\n")
    address = before.rpartition("\n")[2].partition("-")[0]
    assert int(address, 16) % (2 << 20) == 0
    flags = next(line for line in after.splitlines() if line.startswith("VmFlags:")).split()
    huge_pages = Path("/sys/kernel/mm/transparent_hugepage").is_dir()
    assert ("hg" if huge_pages else "sr") in flags
    del held


# What is not mapped


def in_header(old: bytes, new: bytes) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with path.open("r+b") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(length)
            assert header.count(old) == 1
            changed = header.replace(old, new).rstrip()
            assert len(changed) <= length
            file.seek(8)
            file.write(changed.ljust(length))

    return change


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def without_a_table(path: Path) -> None:
    with path.open("r+b") as file:
        file.write((2).to_bytes(8, "little") + b"[]")


def with_a_header_of(length: int) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with path.open("r+b") as file:
            file.write(length.to_bytes(8, "little"))

    return change


DAMAGES: dict[str, Callable[[Path], None]] = {
    "cut short": cut_short,
    "no table": without_a_table,
    "not there": Path.unlink,
    "empty": lambda path: os.truncate(path, 0),
    "header beyond the end": with_a_header_of(1 << 40),
    "header of the wrong length": with_a_header_of(40),
    "other shape": in_header(b"[5, 3]", b"[5, 4]"),
    "shape below zero": in_header(b"[5, 3]", b"[-5, -3]"),
    "shape beyond all": in_header(b"[5, 3]", b"[1e400]"),
    "nothing, many times": in_header(b"[5, 3]", b"[4294967296,0]"),
    "begins after its end": in_header(
        f"[{LEAST_BYTES}, {LEAST_BYTES + 60}]".encode(), b"[1000, 940]"
    ),
    "rare type": in_header(b'"U64"', b'"C64"'),
    "strange row": in_header(b'"shape": [5, 3]', b'"shale": [5, 3]'),
    "row of text": in_header(b'"shape": [5, 3]', b'"shape": "5 3"'),
}


def outcome(load: Callable[[str], Any], path: Path) -> Any:
    try:
        found: dict[str, mx.array] = load(str(path))
    except (RuntimeError, ValueError) as exc:
        return type(exc), str(exc)
    return {name: array.shape for name, array in found.items()}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_not_as_expected_is_left_to_mlx(damage: str, tmp_path: Path) -> None:
    """MLX reads it, or says what is wrong: nothing is seen through a mapping."""
    path = written(tmp_path / "model.safetensors", THREE, padding=16)
    load(path)
    DAMAGES[damage](path)
    files = MappedFiles()
    assert outcome(files.load, path) == outcome(mx.load, path)
    assert not files._mapped
    assert is_given_back(path)


def test_small_files_and_other_ways_to_load_are_left_to_mlx(tmp_path: Path) -> None:
    path, files = written(tmp_path / "model.safetensors", THREE), MappedFiles()
    assert len(files.load(str(path), return_metadata=True)) == 2
    with path.open("rb") as opened:
        assert set(files.load(opened)) == set(THREE)
    assert list(files.load(str(zero(tmp_path / "small.safetensors", ITEMS - 100)))) == ["zeros"]
    path.rename(tmp_path / "model.bin")
    with pytest.raises(ValueError, match="Unknown file format"):
        files.load(str(tmp_path / "model.bin"))
    assert not files._mapped


def test_a_file_beyond_the_length_of_an_array_is_left_to_mlx(tmp_path: Path) -> None:
    path, files = written(tmp_path / "model.safetensors", THREE), MappedFiles()
    os.truncate(path, (mapped.MOST_ITEMS + 1) * unwritten.WORD)
    assert bits(files.load(str(path))) == bits(read(path))
    assert not files._mapped


@pytest.mark.parametrize(
    "foreign",
    ["system", "metal", "cuda", "device", "malloc", "no ctypes", "no glibc", "cache", "heap"],
)
def test_files_are_mapped_where_that_is_known_to_work(
    foreign: str, zeros: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ctypes

    libc: Any = ctypes.CDLL
    if foreign == "system":
        monkeypatch.setattr(sys, "platform", "darwin")
    elif foreign in ("metal", "cuda"):
        monkeypatch.setattr(getattr(mx, foreign), "is_available", lambda: True)
    elif foreign == "device":
        monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    elif foreign == "malloc":
        preloaded = libc(None)
        preloaded.malloc = preloaded.calloc
        monkeypatch.setattr(ctypes, "CDLL", lambda name: libc(name) if name else preloaded)
    elif foreign == "no ctypes":
        monkeypatch.setitem(sys.modules, "ctypes", None)
    elif foreign == "no glibc":
        monkeypatch.setattr(ctypes, "CDLL", lambda name: Musl() if name else libc(None))
    elif foreign == "cache":
        before = mx.set_cache_limit(1 << 30)
    else:
        Low.break_at = 1 << 62
        monkeypatch.setattr(mapped, "_libc", lambda known=mapped._libc(): Low(known))  # noqa: B008
    if foreign not in ("cache", "heap"):
        mapped._libc.cache_clear()
    files = MappedFiles()
    try:
        found = files.load(str(zeros))
    finally:
        monkeypatch.undo()
        mapped._libc.cache_clear()
        if foreign == "cache":
            mx.set_cache_limit(before)
    assert list(found) == ["zeros"]
    assert not files._mapped


class Musl:
    """Another C library under glibc's name."""

    def __init__(self) -> None:
        import ctypes

        self.malloc: Any = ctypes.CDLL(None).malloc


class Low:
    """A libc in which the heap ends at an address, or `mmap` gives one."""

    break_at, mapped_at = 0, 0

    def __init__(self, libc: Any) -> None:
        self.madvise = libc.madvise

    def sbrk(self, _: int) -> int:
        return self.break_at

    def mmap(self, *_: int) -> int:
        return self.mapped_at


def test_a_heap_that_grew_by_large_pieces_is_left_alone(zeros: Path) -> None:
    """glibc can be told to take all memory from it, and does not unmap what is freed there."""
    found = processes.python(
        "import json, sys\n"
        "from mlx_promptcache.mapped import MappedFiles\n"
        "files = MappedFiles()\n"
        "names = list(files.load(sys.argv[1]))\n"
        "print(json.dumps([names, len(files._mapped)]))\n",
        zeros, MALLOC_MMAP_THRESHOLD_=str(1 << 30),
    )  # fmt: skip
    assert found == [["zeros"], 0]


@pytest.mark.parametrize("why", ["copied", "refused", "in pieces", "no room", "no mapping"])
def test_where_mapping_fails_files_are_read(
    why: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = written(tmp_path / "model.safetensors", THREE)
    expected, whole = bits(read(path)), unwritten.unwritten
    if why == "copied":  # a release of MLX that reads into other memory first
        monkeypatch.setattr(mapped, "unwritten", copying(whole))
    elif why == "refused":
        Low.break_at, Low.mapped_at = 0, 2**64 - 1
        monkeypatch.setattr(mapped, "_libc", lambda known=mapped._libc(): Low(known))  # noqa: B008
    elif why == "in pieces":
        readinto = unwritten._Shown.readinto
        monkeypatch.setattr(
            unwritten._Shown, "readinto", lambda s, m: s.__dict__.update(_bytes=0) or readinto(s, m)
        )
    elif why == "no room":
        monkeypatch.setattr(mapped, "unwritten", lambda words, show: whole(words - SPARE, show))
    else:
        monkeypatch.setattr(mmap, "mmap", lambda *_: (_ for _ in ()).throw(OSError()))
    files = MappedFiles()
    assert bits(files.load(str(path))) == expected
    assert not files._mapped
    assert is_given_back(path)


def copying(left_as_it_is: Callable[..., mx.array]) -> Callable[..., mx.array]:
    def copied(*args: Any) -> mx.array:
        first = left_as_it_is(*args)
        array = first + 0
        mx.eval(array, first)
        return array

    return copied


def test_an_array_that_could_not_be_used_is_freed_at_once(
    zeros: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no")

    monkeypatch.setattr(mapped._Mapping, "_map", fail)
    gc.disable()
    try:
        before = mx.get_active_memory()
        MappedFiles().load(str(zeros))
        assert mx.get_active_memory() - before < LEAST_BYTES / 2
    finally:
        gc.enable()


# The file under it


def test_the_memory_is_given_back_with_the_last_tensor(zeros: Path) -> None:
    files, arrays = load(zeros)
    mx.eval(files.touches(arrays.values()))
    half = arrays["zeros"][: ITEMS // 2]
    mx.eval(half)
    del arrays
    assert is_mapped(zeros)
    assert not mx.any(half).item()
    del half
    assert is_given_back(zeros)


def test_what_is_used_is_shown_before_and_nothing_else(tmp_path: Path) -> None:
    """What mlx-lm leaves out of a file is not read."""
    tensors = {"used": ("U8", [4 << 20]), "left": ("U8", [4 << 20])}
    files, arrays = load(written(tmp_path / "model.safetensors", tensors, padding=3))
    mx.eval(list(arrays.values()))
    touches = files.touches([arrays["used"], mx.zeros((3,))])
    assert files.touches(arrays.values()) == []
    taken = {"touching": [*touches], "used": [arrays["used"]], "left": [arrays["left"]]}
    found = {}
    for what, those in taken.items():
        before = faults()
        mx.eval([mx.max(array) for array in those])
        found[what] = faults() - before
    windows = (4 << 20) // mapped.SHOWN_BYTES
    assert found["used"] < windows / 4 < windows / 2 < min(found["touching"], found["left"])


def test_writing_to_a_tensor_does_not_change_the_file(zeros: Path) -> None:
    _, arrays = load(zeros)
    mx.eval(arrays)
    memory_of(arrays["zeros"])[-4:] = ONE
    assert mx.sum(arrays["zeros"]).item() == 1.0
    assert mx.sum(read(zeros)["zeros"]).item() == 0.0


def write_one(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(ONE)


def test_a_file_that_is_replaced_stays_as_it_was(zeros: Path) -> None:
    files, arrays = load(zeros)
    other = zero(zeros.with_name("other"))
    write_one(other)
    other.replace(zeros)
    assert mx.sum(arrays["zeros"]).item() == 0.0
    assert not files.changed()
    zeros.unlink()
    assert not files.changed()


def write_at_the_same_time(path: Path) -> None:
    before = path.stat()
    write_one(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def lengthen(path: Path) -> None:
    os.truncate(path, path.stat().st_size + 1)


@pytest.mark.parametrize("write", [write_one, write_at_the_same_time, lengthen])
def test_a_file_that_is_written_to_is_noticed(
    write: Callable[[Path], None], zeros: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the process has gone to another directory since."""
    files = MappedFiles()
    monkeypatch.chdir(zeros.parent)
    files.load(zeros.name)
    monkeypatch.chdir("/")
    assert not files.changed()
    write(zeros)
    assert files.changed()


def test_nothing_is_stored_of_weights_that_were_overwritten(tmp_path: Path) -> None:
    """The states would be kept under the fingerprint of those that were there before."""
    model = large(tmp_path / "model")
    (file,) = model.glob("*.safetensors")
    runner = Runner.load(str(model))
    run = runner.start(PROMPT)
    runner.needed_cache.save("before", run.state())
    os.utime(file, ns=(0, 0))
    state = replace(run.state(), fingerprint="")
    for cache in (runner.needed_cache, runner.needed_cache.with_salt("other")):
        with pytest.raises(StoreError, match=r"may have been overwritten .* is loaded again$"):
            cache.save("after", state)
    assert [entry.name for entry in runner.needed_cache.list()] == ["before"]
    runner = Runner.load(str(model))
    runner.needed_cache.save("after", runner.start(PROMPT).state())


# Through mlx-lm's own code


def test_only_one_call_reads_otherwise(tmp_path: Path) -> None:
    model = tiny.on_disk(tmp_path / "model")
    asked: list[str] = []
    before = vars(engine.utils()).copy()

    def reader(file: str) -> Any:
        asked.append(file)
        return mx.load(file)

    loaded, config = engine.load_model(model, reader)
    assert [Path(file).parent for file in asked] == [model]
    assert vars(engine.utils()) == before
    assert engine.utils().mx is mlx_lm.utils.mx is mx
    assert config == mlx_lm.utils.load_model(model, lazy=True)[1]
    assert len(asked) == 1
    assert loaded


def test_a_loader_of_another_form_reads_as_it_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A release of mlx-lm may load by other means."""
    model = shutil.copytree(tiny.on_disk(tmp_path / "model"), tmp_path / "copy")

    class Loader:
        def __call__(self, path: Path, **options: Any) -> Any:
            return path, options

    monkeypatch.setattr(engine.utils(), "load_model", Loader())
    assert engine.load_model(model, mx.load) == (model, {"lazy": True})
