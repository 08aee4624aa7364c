"""Room that is made ahead: it is used where it fits, given back where not, and changes no bit."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import pytest

import processes
import tiny
from mlx_promptcache import PromptCache, Runner, ahead, cli, rows
from mlx_promptcache.ahead import Ahead
from mlx_promptcache.blueprint import Blueprint, Shape
from mlx_promptcache.errors import StoreError
from mlx_promptcache.fingerprint import KVSettings
from mlx_promptcache.streams import of_any_thread
from tiny import random_tokens

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(of_any_thread() is None, reason="room is made ahead on a CPU")
KEYS, VALUES = Shape("float32", (1, 3, 0, 16)), Shape("bfloat16", (1, 3, 0, 24))
TOKENS = random_tokens(600, 3)


def test_room_is_as_large_as_rows_and_padding_need() -> None:
    made = Ahead()
    made.make([KEYS, VALUES, KEYS], 257)
    there = [made.take((1, 3, 512, 64)), made.take((1, 3, 512, 64)), made.take((1, 3, 512, 48))]
    assert [array.dtype for array in there if array is not None] == 3 * [mx.uint8]
    assert made.take((1, 3, 512, 64)) is None
    assert made.take((1, 3, 256, 64)) is None


def test_what_nobody_took_is_given_back() -> None:
    made, before = Ahead(), mx.get_active_memory()
    made.make([KEYS] * 9, 50_000)
    made.wait()
    assert mx.get_active_memory() - before > 9 * 50_000 * 3 * 64
    made.clear()
    assert mx.get_active_memory() == before
    made.make([KEYS], 5)
    made.make([KEYS], 600)  # instead of that
    assert made.take((1, 3, 256, 64)) is None
    assert made.take((1, 3, 768, 64)) is not None


@pytest.mark.parametrize("count", [0, 10**6, 10**18])
def test_no_room_is_made_of_nothing_or_too_much(count: int) -> None:
    made, before = Ahead(), mx.get_active_memory()
    made.make([KEYS] * 3, count)
    made.wait()
    assert mx.get_active_memory() == before


def test_room_is_made_again_and_again_by_as_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[mx.Stream | None] = []

    def noted() -> mx.Stream | None:
        asked.append(of_any_thread())
        return asked[-1]

    monkeypatch.setattr(ahead, "of_any_thread", noted)
    made = Ahead()
    for count in (0, 5, 5, 600):
        made.make([KEYS], count)
    made.clear()
    assert len(asked) == 1  # MLX never ends the thread of a stream


def test_where_there_can_be_no_more_threads_none_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    made = Ahead()
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        made.make([KEYS], 5)
    assert made.take((1, 3, 256, 64)) is None
    made.make([KEYS], 5)
    assert made.take((1, 3, 256, 64)) is not None


def test_beside_an_accelerator_none_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Ahead()
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    made.make([KEYS], 5)
    assert made.take((1, 3, 256, 64)) is None


def test_a_process_may_end_while_room_is_made() -> None:
    code = (
        "import sys\n"
        "from mlx_promptcache.ahead import Ahead\n"
        "from mlx_promptcache.blueprint import Shape\n"
        "Ahead().make([Shape('float32', (1, 8, 0, 64))] * 20, int(sys.argv[1]))\n"
        "print('null')\n"
    )
    for count in (200, 300, 400, 500, 500, 500, 600, 800, 4000):
        assert processes.python(code, str(count)) is None


# In a cache


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of room that was made when rows were there to be put into it."""
    shapes, zeros = [], rows._zeros

    def noted(asked: list[tuple[int, ...]], *given: Any) -> list[mx.array]:
        shapes.extend(asked)
        return zeros(asked, *given)

    monkeypatch.setattr(rows, "_zeros", noted)
    return shapes


def runner_of(store: Path, kind: str = "plain") -> Runner:
    cache = PromptCache(store, "it")
    return Runner(tiny.KINDS[kind](), cache=cache)


def resumed(runner: Runner, *expected: int, tokens: list[int] = TOKENS) -> tuple[int, list[Any]]:
    """How many tokens are there, and the bits of all layers."""
    assert runner.cache is not None
    if expected:
        runner.cache.expect(*expected)
    found = runner.cache.resume(tokens, runner.model)
    assert runner.cache._ahead._made == {}
    layers = found.layers if isinstance(found.layers, list) else []
    arrays: Any = [array for layer in layers for array in (layer.keys, layer.values)]
    return found.match.position, [tiny.bits(a) for a in arrays]


def test_rows_are_put_where_room_was_made_for_them(
    made: list[tuple[int, ...]], tmp_path: Path
) -> None:
    runner = runner_of(tmp_path)
    assert runner.cache is not None
    runner.cache.keep(runner.prefill(TOKENS))
    expected = resumed(runner)
    assert expected[0] == 600
    count = len(made)
    assert count == 2 * len(runner.model.layers)
    assert resumed(runner, 513) == expected  # padded, as many
    assert len(made) == count
    assert resumed(runner, 512) == expected
    assert len(made) == 2 * count
    assert resumed(runner, 600, tokens=TOKENS[:40])[0] == 39
    assert resumed(runner, 600, tokens=[1, *TOKENS])[0] == 0


def test_what_is_expected_is_what_was_used_last(
    made: list[tuple[int, ...]], tmp_path: Path
) -> None:
    runner = runner_of(tmp_path)
    assert runner.cache is not None
    runner.cache.expect()  # of an empty store
    assert runner.cache._ahead._made == {}
    runner.cache.keep(runner.prefill(TOKENS))
    resumed(runner, tokens=TOKENS[:300])
    made.clear()
    runner.cache.expect()
    resumed(runner, tokens=TOKENS[:301])
    assert made == []


def test_an_exact_hit_whose_rows_come_later_has_its_room(
    made: list[tuple[int, ...]], tmp_path: Path
) -> None:
    runner = runner_of(tmp_path)
    assert runner.cache is not None
    runner.cache.save("it", runner.prefill(TOKENS))
    runner.cache.expect(600)
    later = runner.cache.resume(TOKENS, runner.model, later=True).layers
    assert callable(later)
    assert made == []
    assert later() is not None
    assert made == []
    assert runner.cache._ahead._made == {}


def test_rows_that_are_read_elsewhere_need_none(tmp_path: Path) -> None:
    runner = runner_of(tmp_path)
    assert runner.cache is not None
    runner.cache.save("it", runner.prefill(TOKENS))
    runner.cache.expect(600)
    later: Any = runner.cache.resume(TOKENS, runner.model, later=True).layers
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(later).result() is not None
    assert runner.cache._ahead._made == {}


def test_where_a_remote_fails_none_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise StoreError("it cannot be read")

    runner = runner_of(tmp_path)
    monkeypatch.setattr(PromptCache, "bring", fails)
    assert resumed(runner, 600)[0] == 0


def test_rows_of_windows_and_of_layers_that_may_be_quantised_are_not_expected() -> None:
    def shapes(kind: str, kv: KVSettings) -> int:
        return len(Blueprint.of(tiny.KINDS[kind](), kv).sliceable_rows)

    layers = len(tiny.plain().layers)
    assert shapes("plain", KVSettings()) == 2 * layers
    assert shapes("plain", KVSettings(bits=8, group_size=32)) == 0
    assert 0 <= shapes("rotating", KVSettings()) < 2 * layers


@pytest.mark.parametrize("named", [True, False])
def test_generate_expects_the_named_state_or_the_last_one(
    *, named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, expect = [], PromptCache.expect

    def noted(cache: PromptCache, rows: int | None = None) -> None:
        expected.append(rows)
        expect(cache, rows)
        expected.append(sum(map(len, cache._ahead._made.values())))

    model, store = tiny.on_disk(tmp_path / "model"), tmp_path / "store"
    asked = ["-m", str(model), "--cache-dir", str(store), "--quiet", "-n", "1"]
    assert cli.run(["save", "it", "-p", "one and one and one", *asked[:-2]]) == 0
    assert cli.run(["generate", "-p", "one and one", *asked]) == 0
    monkeypatch.setattr(PromptCache, "expect", noted)
    name = ["--prompt-cache", "it"] if named else []
    assert cli.run(["generate", "-p", "and two", *name, *asked]) == 0
    held = PromptCache(store, Runner.load(str(model), cache_dir=str(store)).cache.fingerprint)  # type: ignore[union-attr]
    assert expected == [held.load("it").n_past if named else None, 2 * len(tiny.plain().layers)]
