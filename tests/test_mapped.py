"""Mapped weights: the same arrays as those that are read, and what happens to a file under them."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx_lm.utils
import pytest

import processes
import tiny
from mlx_promptcache import Runner, checkpoint, engine, mapped
from mlx_promptcache.arrays import memory_of
from mlx_promptcache.errors import StoreError
from mlx_promptcache.mapped import DTYPES, MappedFiles

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.skipif(
    mapped._libc() is None, reason="files are mapped on Linux, for a CPU"
)
PROMPT = tiny.random_tokens(60, seed=1)
LARGE = mapped.LEAST_BYTES


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files are mapped, too, and none of their tensors is copied."""
    monkeypatch.setattr(mapped, "LEAST_BYTES", 0)
    monkeypatch.setattr(mapped, "COPIED_BYTES", 0)


def written(path: Path, tensors: dict[str, tuple[str, list[int]]], padding: int = 0) -> Path:
    """A safetensors file of random bytes, its header longer by some spaces."""
    table, offset = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * DTYPES[dtype].size
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    header = json.dumps({"__metadata__": {"format": "mlx"}, **table}).encode()
    header = header.ljust(-(-len(header) // 8) * 8 + padding)
    data = tiny.random_tokens(offset, seed=3)
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(data))
    return path


def sparse(path: Path, items: int = LARGE // 4) -> Path:
    """A large safetensors file of zeros, which take no room on the drive."""
    row = {"dtype": "F32", "shape": [items], "data_offsets": [0, 4 * items]}
    header = json.dumps({"zeros": row}).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 4 * items)
    return path


def places_of(path: Path) -> list[str]:
    """Where this process has a file in its memory."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line for line in lines if line.endswith(f" {path}")]


def read(path: Path) -> dict[str, mx.array]:
    arrays: Any = mx.load(str(path))
    found: dict[str, mx.array] = arrays
    return found


def mapping_of(path: Path) -> tuple[MappedFiles, Any]:
    files = MappedFiles()
    arrays = files.load(str(path))
    assert files._mapped
    return files, arrays


# The same arrays


@pytest.mark.parametrize("padding", range(8))
def test_tensors_are_those_that_are_read(padding: int, any_size: None, tmp_path: Path) -> None:
    """Wherever in the file they begin: MLX writes headers of any length."""
    tensors = {f"{d}.{n}": (d, [n, 3]) for d in DTYPES for n in (0, 1, 5, 40)}
    tensors |= {"one": ("F32", []), "none": ("BF16", [2, 0, 4]), "last": ("U8", [3])}
    path = written(tmp_path / "model.safetensors", tensors, padding)
    files, found = mapping_of(path)
    expected = read(path)
    assert places_of(path)
    assert {n: tiny.bits(a) for n, a in found.items()} == {
        n: tiny.bits(a) for n, a in expected.items()
    }
    assert not files.changed()


def test_small_tensors_are_copied(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(mapped, "LEAST_BYTES", 0)
    path = written(tmp_path / "model.safetensors", {"norm": ("F32", [60]), "none": ("F32", [0])}, 1)
    files, found = mapping_of(path)
    expected = tiny.bits(read(path)["norm"])
    mx.eval(files.touched())
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert tiny.bits(found["norm"]) == expected


@pytest.mark.parametrize("kind", ["plain", "rotating", "bare", "hybrid"])
def test_a_model_computes_the_same_bits(kind: str, any_size: None, tmp_path: Path) -> None:
    model = tiny.on_disk(tmp_path / "model", kind)
    logits = {}
    for what, read in {"read": mx.load, "mapped": MappedFiles().load}.items():
        loaded, _ = checkpoint.unread(model, None, read)
        logits[what] = tiny.bits(loaded(mx.array([PROMPT])))
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


# What is not mapped


def without_a_table(path: Path) -> None:
    path.write_bytes((2).to_bytes(8, "little") + b"[]" + bytes(100))


def beyond_the_end(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def of_another_length(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"[5, 3]", b"[5, 4]"))


def of_a_rare_type(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"U64"', b'"C64"'))


def of_a_strange_row(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"shape"', b'"shale"'))


def not_there(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def all_but_the_header(path: Path) -> None:
    path.write_bytes((1 << 40).to_bytes(8, "little") + bytes(1000))


DAMAGES: list[Callable[[Path], None]] = [
    without_a_table, beyond_the_end, of_another_length, of_a_rare_type, of_a_strange_row, not_there,
    empty, all_but_the_header,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_not_as_expected_is_left_to_mlx(
    damage: Callable[[Path], None], any_size: None, tmp_path: Path
) -> None:
    """MLX reads it, or says what is wrong: nothing is seen through a mapping."""
    tensors = {"a": ("F32", [5, 3]), "b": ("U64", [2]), "c": ("U8", [1])}
    assert mapping_of(written(tmp_path / "sound.safetensors", tensors))
    path = written(tmp_path / "model.safetensors", tensors)
    damage(path)
    files = MappedFiles()

    def outcome(load: Callable[[str], Any]) -> Any:
        try:
            return {name: tiny.bits(array) for name, array in load(str(path)).items()}
        except (RuntimeError, ValueError) as exc:
            return type(exc), str(exc)

    assert outcome(files.load) == outcome(mx.load)
    assert not files._mapped


def test_small_files_and_other_ways_to_load_are_left_to_mlx(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = written(tmp_path / "model.safetensors", {"a": ("F32", [5, 3])})
    files = MappedFiles()
    assert list(files.load(str(path))) == ["a"]
    assert not files._mapped
    monkeypatch.setattr(mapped, "LEAST_BYTES", 0)
    assert len(files.load(str(path), return_metadata=True)) == 2
    with path.open("rb") as opened:
        assert list(files.load(opened)) == ["a"]
    assert not files._mapped
    assert files.load(str(path))
    assert files._mapped


@pytest.mark.parametrize(
    "foreign", ["another system", "an accelerator", "another malloc", "no ctypes"]
)
def test_files_are_mapped_where_that_is_known_to_work(
    foreign: str, monkeypatch: pytest.MonkeyPatch, any_size: None, tmp_path: Path
) -> None:
    import ctypes

    path = written(tmp_path / "model.safetensors", {"a": ("F32", [5, 3])})
    if foreign == "another system":
        monkeypatch.setattr(sys, "platform", "darwin")
    elif foreign == "an accelerator":
        monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    elif foreign == "another malloc":
        load: Any = ctypes.CDLL
        preloaded = load(None)
        preloaded.malloc = preloaded.calloc
        monkeypatch.setattr(ctypes, "CDLL", lambda name: load(name) if name else preloaded)
    else:
        monkeypatch.setitem(sys.modules, "ctypes", None)
    mapped._libc.cache_clear()
    try:
        files = MappedFiles()
        assert list(files.load(str(path))) == ["a"]
        assert not files._mapped
    finally:
        monkeypatch.undo()
        mapped._libc.cache_clear()


@pytest.mark.parametrize("why", ["copied", "refused", "in pieces"])
def test_where_mapping_fails_files_are_read(
    why: str, monkeypatch: pytest.MonkeyPatch, any_size: None, tmp_path: Path
) -> None:
    path = written(tmp_path / "model.safetensors", {"a": ("F32", [5, 3])})
    if why == "copied":  # a release of MLX that reads into other memory first
        monkeypatch.setattr(mapped, "_left_as_it_is", copied(mapped._left_as_it_is))
    elif why == "refused":
        libc = mapped._libc()
        monkeypatch.setattr(mapped, "_libc", lambda: Refusing(libc))
    else:
        whole = mapped._Shown.readinto
        monkeypatch.setattr(
            mapped._Shown, "readinto", lambda s, m: s.__dict__.update(_bytes=0) or whole(s, m)
        )
    files = MappedFiles()
    expected = tiny.bits(read(path)["a"])
    assert tiny.bits(files.load(str(path))["a"]) == expected
    assert not files._mapped


def copied(left_as_it_is: Callable[..., mx.array]) -> Callable[..., mx.array]:
    first: list[mx.array] = []

    def copy(*args: Any) -> mx.array:
        first.append(left_as_it_is(*args))
        array = first[0] + 0
        mx.eval(array)
        return array

    return copy


class Refusing:
    """A libc whose `mmap` fails."""

    def __init__(self, libc: Any) -> None:
        self.madvise = libc.madvise

    def mmap(self, *_: int) -> int:
        return 2**64 - 1


# The file under it


@pytest.fixture
def zeros(tmp_path: Path) -> Iterator[Path]:
    yield sparse(tmp_path / "model.safetensors")
    assert not places_of(tmp_path / "model.safetensors")


def test_the_memory_is_given_back_with_the_last_tensor(zeros: Path) -> None:
    files, arrays = mapping_of(zeros)
    mx.eval(files.touched())
    half = arrays["zeros"][: LARGE // 8]
    mx.eval(half)
    del arrays
    assert places_of(zeros)
    assert not mx.any(half).item()
    del half
    assert not places_of(zeros)


def test_all_pages_are_touched_once(zeros: Path) -> None:
    """Evaluated, they show all of the file; then they do not hold its memory any more."""
    files, arrays = mapping_of(zeros)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    mx.eval(files.touched())
    touching = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    mx.eval(mx.sum(arrays["zeros"]))
    using = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before - touching
    assert using < touching / 4
    assert files.touched() == []


def test_writing_to_a_tensor_does_not_change_the_file(zeros: Path) -> None:
    _, arrays = mapping_of(zeros)
    mx.eval(arrays)
    memory_of(arrays["zeros"])[-4:] = b"\0\0\x80\x3f"
    assert mx.sum(arrays["zeros"]).item() == 1.0
    assert mx.sum(read(zeros)["zeros"]).item() == 0.0


def test_a_file_that_is_replaced_stays_as_it_was(zeros: Path) -> None:
    files, arrays = mapping_of(zeros)
    other = sparse(zeros.with_name("other"))
    with other.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\x80\x3f")
    other.replace(zeros)
    assert mx.sum(arrays["zeros"]).item() == 0.0
    assert not files.changed()
    zeros.unlink()
    assert not files.changed()


def test_a_file_that_is_written_to_is_noticed(zeros: Path) -> None:
    files, _ = mapping_of(zeros)
    with zeros.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\x80\x3f")
    assert files.changed()


def test_nothing_is_stored_of_weights_that_were_overwritten(any_size: None, tmp_path: Path) -> None:
    """The states would be kept under the fingerprint of those that were there before."""
    model = tiny.on_disk(tmp_path / "model")
    (file,) = model.glob("*.safetensors")
    runner = Runner.load(str(model))
    run = runner.start(PROMPT)
    runner.needed_cache.save("before", run.state())
    data = file.read_bytes()
    os.utime(file, ns=(0, 0))
    file.write_bytes(data)
    state = replace(run.state(), fingerprint="")
    for cache in (runner.needed_cache, runner.needed_cache.with_salt("other")):
        with pytest.raises(StoreError, match=r"were overwritten .*: load the model again$"):
            cache.save("after", state)
    assert [entry.name for entry in runner.needed_cache.list()] == ["before"]
    runner = Runner.load(str(model))
    runner.needed_cache.save("after", runner.start(PROMPT).state())


# Through mlx-lm's own code


def test_only_one_call_reads_otherwise(tmp_path: Path) -> None:
    model = tiny.on_disk(tmp_path / "model")
    asked: list[str] = []
    before = vars(engine.utils()).copy()

    def read(file: str) -> Any:
        asked.append(file)
        return mx.load(file)

    loaded, config = engine.load_model(model, read)
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
