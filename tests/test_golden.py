"""Golden files: a store that this version of the format wrote once is read ever after.

`scripts/golden` writes the files. What a file says does not depend on the arithmetic of who reads
it, so every bit of it is compared; the tokens that follow are compared where the arithmetic is that
of the machine that wrote it.
"""

from __future__ import annotations

import ast
import functools
import json
import shutil
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import pytest

import stored
import tiny
from mlx_promptcache import KVSettings, PromptCache, Runner, arithmetic
from test_container import GOLDEN, read_all

if TYPE_CHECKING:
    from mlx_promptcache.state import State

HERE = Path(__file__).parent / "golden"
EXPECTED: dict[str, Any] = json.loads((HERE / "expected.json").read_text("utf-8"))
ARITHMETIC = EXPECTED.pop("arithmetic")

every_name = pytest.mark.parametrize("name", EXPECTED)


@functools.cache
def model_of(kind: str) -> Any:
    return getattr(tiny, kind)()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A copy: reading a store notes that it was used."""
    return Path(shutil.copytree(HERE / "store", tmp_path / "store"))


def runner_of(name: str, directory: Path) -> Runner:
    told = EXPECTED[name]
    kv = KVSettings(**told["kv"])
    cache = PromptCache(directory, f"golden {told['kind']}", kv=kv)
    return Runner(model_of(told["kind"]), None, cache, kv=kv)


def cache_of(name: str, directory: Path) -> PromptCache:
    cache = runner_of(name, directory).cache
    assert cache is not None
    return cache


def loaded(name: str, directory: Path) -> State:
    return cache_of(name, directory).load(name)


def hexadecimal(array: mx.array | None) -> str:
    assert array is not None
    return tiny.bits(array)[2].hex()


def test_there_are_states_of_every_sort() -> None:
    assert {told["kind"] for told in EXPECTED.values()} >= {"smallest", "plain", "rotating"}
    assert {told["kv"]["bits"] for told in EXPECTED.values()} == {None, 4, 8}
    assert max(len(told["tokens"]) for told in EXPECTED.values()) > stored.CELL


def test_the_golden_files_are_small() -> None:
    assert sum(path.stat().st_size for path in HERE.rglob("*") if path.is_file()) < 300_000


def test_the_golden_store_is_listed_whole_and_sound(directory: Path) -> None:
    entries = {}
    for name in EXPECTED:
        cache = cache_of(name, directory)
        assert cache.verify([name]).damaged == ()
        (entries[name],) = [entry for entry in cache.list() if entry.name == name]
    assert {name: entry.status for name, entry in entries.items()} == dict.fromkeys(EXPECTED, "ok")
    assert {name: entry.tokens for name, entry in entries.items()} == {
        name: len(told["tokens"]) for name, told in EXPECTED.items()
    }
    assert cache.verify().damaged == ()
    assert cache.verify().files == len(list(directory.rglob("*.safetensors")))
    assert {entry.name for entry in cache.list()} == {None, *EXPECTED}


@every_name
def test_a_golden_state_is_read_as_it_was_written(name: str, directory: Path) -> None:
    state, told = loaded(name, directory), EXPECTED[name]
    assert list(state.tokens) == told["tokens"]
    assert hexadecimal(state.logits) == told["logits"]
    assert hexadecimal(state.embedding) == told["embedding"]
    assert hexadecimal(state.rng) == told["rng"]
    assert tiny.digest(state) == told["state"]


def went_on(runner: Runner, state: State, count: int) -> tuple[list[int], str]:
    return [step.token for step in runner.generate(state, count)], tiny.digest(runner.state)


@every_name
def test_a_golden_state_goes_on_as_one_that_was_written_now(
    name: str, directory: Path, tmp_path: Path
) -> None:
    state = loaded(name, directory)
    now = cache_of(name, tmp_path / "now")
    now.save(name, state, sync=False)
    again = now.load(name)
    assert tiny.digest(again) == EXPECTED[name]["state"]
    runner = runner_of(name, directory)
    assert went_on(runner, again, 12) == went_on(runner, state, 12)


@every_name
def test_a_golden_state_goes_on_as_it_did(name: str, directory: Path) -> None:
    if arithmetic.lineage() != ARITHMETIC:
        pytest.skip("the golden files were written by other arithmetic (see scripts/golden)")
    told = EXPECTED[name]
    tokens = told["following"]
    runner = runner_of(name, directory)
    assert went_on(runner, loaded(name, directory), len(tokens)) == (tokens, told["end"])


@every_name
def test_prompts_begin_with_what_the_golden_store_has_of_them(name: str, directory: Path) -> None:
    runner, told = runner_of(name, directory), EXPECTED[name]
    tokens, prompt = told["tokens"], told["tokens"][: told["prompt"]]
    for whole in (tokens, prompt, *(tokens[:boundary] for boundary in told["boundaries"])):
        run = runner.start(whole)
        assert (run.cached_tokens, run.prefilled_tokens) == (len(whole), 0)
        assert run.match is not None
        assert run.match.exact
    assert runner.start([*tokens, 1, 2]).cached_tokens == len(tokens)
    other = (tokens[0] + 1) % 16
    assert runner.start([other, *tokens]).cached_tokens == 0


# The format, as its page describes it


def read(name: str) -> stored.Stored:
    return stored.state(HERE / "store", name)


def test_the_second_reader_has_nothing_of_the_package() -> None:
    tree = ast.parse(Path(stored.__file__).read_text("utf-8"))
    imported = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    standard = {"__future__", "collections", "dataclasses", "math", "pathlib", "typing"}
    assert imported - standard == {"hashlib", "json", "numpy", "struct", "zstandard"}


def test_the_page_of_the_format_is_enough_to_read_the_golden_container() -> None:
    theirs = stored.container(GOLDEN.read_bytes())
    assert theirs.kind == "block"
    assert theirs.content["text"] == "Grüße \u2028"
    ours = read_all(GOLDEN.read_bytes())
    assert {name: array.bits for name, array in theirs.arrays.items()} == {
        name: (array.dtype, array.shape, bytes(array.data)) for name, array in ours.items()
    }


@every_name
def test_the_page_of_the_format_is_enough_to_read_a_golden_state(name: str) -> None:
    theirs, told = read(name), EXPECTED[name]
    assert theirs.tokens == told["tokens"]
    assert {key: array.items.tobytes().hex() for key, array in theirs.arrays.items()} == {
        key: told[key] for key in ("logits", "embedding", "rng")
    }
    assert theirs.notes["boundaries"] == [
        position
        for position in (*told["boundaries"], told["prompt"])
        if position < len(told["tokens"])
    ]


@every_name
def test_the_second_reader_finds_what_the_package_finds(name: str, directory: Path) -> None:
    ours, theirs = loaded(name, directory), read(name)
    for layer in ours.contents:
        if layer.sliceable:
            found = {key: array.bits for key, array in theirs.rows.pop(layer.path).items()}
            assert found == {key: tiny.bits(array) for key, array in layer.rows.items()}
        elif layer.window is not None:
            rows, attributes = theirs.windows.pop(layer.path)
            bits = {key: array.bits for key, array in rows.items()}
            assert bits == {key: tiny.bits(array) for key, array in layer.rows.items()}
            assert attributes == layer.attributes
        else:
            assert layer.attributes is not None
            attributes = theirs.opaque.pop(layer.path)
            assert list(attributes) == list(layer.attributes)
            arrays = [array.bits for array in _arrays(list(attributes.values()))]
            assert arrays == [tiny.bits(array) for array in layer.arrays.values()]
            plain = {k: v for k, v in attributes.items() if not _arrays([v])}
            assert plain == {key: _plain(layer.attributes[key]) for key in plain}
    assert (theirs.rows, theirs.windows, theirs.opaque) == ({}, {}, {})
    assert theirs.content["sampling"] == ours.sampling.to_json()


def _arrays(values: list[Any] | tuple[Any, ...]) -> list[stored.Array]:
    found = []
    for value in values:
        if isinstance(value, stored.Array):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _arrays(value)
    return found


def _plain(value: Any) -> Any:
    """An attribute without arrays, as it is in memory."""
    if not isinstance(value, dict):
        return value
    ((form, items),) = value.items()
    return (tuple if form == "tuple" else list)(_plain(item) for item in items)


def test_the_second_reader_notices_every_byte_that_changes() -> None:
    data = min((HERE / "store").rglob("*.safetensors"), key=lambda p: p.stat().st_size).read_bytes()
    stored.container(data)
    for at in range(len(data)):
        altered = bytearray(data)
        altered[at] ^= 0x10
        with pytest.raises((ValueError, struct.error)):
            stored.container(bytes(altered))
