"""Memory: what is said of a context is what a run takes, keeps and stores."""

from __future__ import annotations

import gc
import mmap
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

import architectures
import tiny
from mlx_promptcache import (
    ModelError,
    PromptCache,
    Runner,
    checkpoint,
    machine,
    mapped,
    memory,
    working,
)
from mlx_promptcache.errors import NotQuantisable
from mlx_promptcache.fingerprint import KVSettings
from mlx_promptcache.layers import live_arrays
from mlx_promptcache.memory import Limit, Memory
from mlx_promptcache.store import BLOCKS, SNAPSHOTS, Store
from mlx_promptcache.working import working_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from mlx_promptcache import State

WINDOWED = KVSettings(max_size=48)
CASES: list[tuple[str, KVSettings]] = [
    *((kind, KVSettings()) for kind in tiny.KINDS),
    ("bare", WINDOWED),
    ("plain", KVSettings(8, 32, 200)),
]
each_case = pytest.mark.parametrize(("kind", "kv"), CASES)


def model_of(kind: str) -> Any:
    return tiny.bare() if kind == "bare" else tiny.KINDS[kind]()


def prefilled(model: Any, kv: KVSettings, tokens: int, directory: Path) -> tuple[Runner, State]:
    """A prompt that was computed, with a store to keep it in."""
    runner = Runner(model, None, PromptCache(directory, "it", kv=kv), kv=kv)
    return runner, runner.prefill(tiny.random_tokens(tokens, 1))


def heads(state: State) -> int:
    return sum(array.nbytes for array in (state.logits, state.embedding) if array is not None)


# One conversation


@each_case
def test_a_run_keeps_beside_its_layers_what_is_said(
    kind: str, kv: KVSettings, tmp_path: Path
) -> None:
    model = model_of(kind)
    _, state = prefilled(model, kv, 2200, tmp_path)  # past the first snapshot on the way
    marks = sum(layer.nbytes for mark in state.marks for layer in mark.layers)
    passed = sum(rows.nbytes for rows in state.passed)
    kept = (1 + len(state.marks)) * heads(state) + marks + passed
    assert Memory(model, kv).context(2200).kept_bytes == kept
    assert bool(passed) == (kind in {"rotating", "bare"})
    assert bool(marks) == (kind in {"recurrent", "hybrid", "nested", "chunked"})


@each_case
@pytest.mark.parametrize("tokens", [1, 300, 2200])
def test_files_hold_what_is_said_before_they_are_compressed(
    kind: str, kv: KVSettings, tokens: int, tmp_path: Path
) -> None:
    model = model_of(kind)
    runner, state = prefilled(model, kv, tokens, tmp_path)
    assert runner.cache is not None
    runner.cache.save("it", state, sync=False)
    store = Store(tmp_path)
    raw = sum(store.header(k, s).raw_bytes for k in (BLOCKS, SNAPSHOTS) for s in store.stems(k))
    assert Memory(model, kv).context(tokens).raw_bytes == raw


def test_rows_that_are_dropped_from_memory_are_not_counted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for module in ("memory", "window_rows"):
        monkeypatch.setattr(f"mlx_promptcache.{module}.MOST_PASSED_BYTES", 700_000)
    model = tiny.rotating()
    _, state = prefilled(model, KVSettings(), 2200, tmp_path)
    passed = sum(rows.nbytes for rows in state.passed)
    said = Memory(model).context(2200)
    assert 0 < passed < 700_000
    assert said.kept_bytes == passed + heads(state)


def test_the_layers_are_told_by_their_classes() -> None:
    context = Memory(tiny.hybrid()).context(1000)
    by_name = {kind.kind: kind for kind in context.kinds}
    assert by_name.keys() == {"ArraysCache", "KVCache"}
    rows, arrays = by_name["KVCache"], by_name["ArraysCache"]
    assert (rows.count, arrays.count) == (1, 2)
    assert (rows.bytes, rows.state_bytes) == (1024 * 256, 1000 * 256)
    assert (rows.bytes_per_token, arrays.bytes_per_token) == (256.0, 0.0)
    assert context.layers_bytes == rows.bytes + arrays.bytes


def test_on_the_way_more_may_be_held_than_in_the_end() -> None:
    context = Memory(tiny.plain(), KVSettings(4, 32, 2000)).context(2100)
    assert context.most_layers_bytes == 1536 * 2 * 512
    assert context.layers_bytes < context.most_layers_bytes
    assert context.bytes == context.most_layers_bytes + context.kept_bytes


def test_states_that_cannot_be_kept_have_no_size_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_lm.models.cache import KVCache

    class Closed(KVCache):  # type: ignore[misc]
        """It keeps an object."""

        def __init__(self) -> None:
            super().__init__()
            self.thing = object()

    model = tiny.plain()
    monkeypatch.setattr(type(model), "make_cache", lambda _: [Closed(), Closed()])
    context = Memory(model).context(300)
    assert context.raw_bytes is None
    assert [kind.state_bytes for kind in context.kinds] == [None]
    assert context.layers_bytes == 512 * 2 * 512


# A model on disk


def test_the_weights_are_what_mlx_holds_of_them(tmp_path: Path) -> None:
    path = tiny.on_disk(tmp_path / "model")
    said = Memory.of(str(path)).weights_bytes
    gc.collect()
    before = mx.get_active_memory()
    model, _ = checkpoint.unread(path, None)
    mx.eval(model.parameters())
    assert 0 <= mx.get_active_memory() - before - said < 1000


def test_of_the_weights_only_the_headers_are_read(tmp_path: Path) -> None:
    path = tiny.on_disk(tmp_path / "model")
    weights = path / "model.safetensors"
    whole = Memory.of(str(path)).context(3000)
    length = int.from_bytes(weights.read_bytes()[:8], "little") + 8
    size = weights.stat().st_size
    weights.write_bytes(weights.read_bytes()[:length])
    with weights.open("r+b") as file:
        file.truncate(size)
    mx.synchronize()
    before = mx.get_active_memory()
    assert Memory.of(str(path)).context(3000) == whole
    assert mx.get_active_memory() - before < 10_000


def test_a_model_that_computes_while_it_is_called_reads_no_weights() -> None:
    model = architectures.build("dbrx")
    computed = Memory(model)
    memory.hollow(model)
    parameters: Any = model.parameters()
    assert float(mx.abs(parameters["lm_head"]["weight"]).max()) == 0
    hollow = Memory(model)
    assert hollow.context(1000) == computed.context(1000)
    assert hollow.weights_bytes == computed.weights_bytes
    assert hollow.pass_bytes(1000) is None


def test_zeros_stand_in_for_the_weights_of_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.plain()
    monkeypatch.setattr(checkpoint, "unread", lambda *_: (model, {}))
    Memory.of(str(tiny.on_disk(tmp_path)))
    parameters: Any = model.parameters()
    assert float(mx.abs(parameters["lm_head"]["weight"]).max()) == 0


def test_a_draft_model_takes_its_own(tmp_path: Path) -> None:
    path, draft = tiny.on_disk(tmp_path / "a"), tiny.on_disk(tmp_path / "b")
    alone, both = Memory.of(str(path)), Memory.of(str(path), draft_model=str(draft))
    assert both.weights_bytes == 2 * alone.weights_bytes
    assert both.context(700).layers_bytes == 2 * alone.context(700).layers_bytes
    assert [kind.count for kind in both.context(700).kinds] == [4]


def test_the_context_that_a_model_was_made_for_is_known(tmp_path: Path) -> None:
    assert Memory.of(str(tiny.on_disk(tmp_path))).context_length == 2048


def test_a_model_that_is_not_here_is_not_downloaded() -> None:
    with pytest.raises(ModelError, match="no such repo has been downloaded yet"):
        Memory.of("nobody/nothing")


def test_layers_that_cannot_be_quantised_are_refused(tmp_path: Path) -> None:
    path = tiny.on_disk(tmp_path, "rotating")
    with pytest.raises(NotQuantisable, match="leave --kv-bits out"):
        Memory.of(str(path), kv=KVSettings(8, 32))


# A pass


@pytest.mark.parametrize("kind", ["plain", "rotating", "hybrid", "nested", "chunked"])
def test_what_a_pass_takes_grows_with_the_context_in_a_straight_line(kind: str) -> None:
    found = Memory(tiny.KINDS[kind]())
    near, far, farther = (found.pass_bytes(n * 512) for n in (6, 60, 114))
    assert near is not None
    assert far is not None
    assert farther is not None
    assert 0 < near < far
    assert far - near == farther - far
    assert found.pass_bytes(59 * 512 + 1) == far, "a part of a pass counts as a whole one"
    assert (found.pass_bytes(10) or 0) < near


def test_another_look_at_memory_takes_none_and_keeps_it() -> None:
    """16 bytes, a view of them, 16 more made of that: the first may go then, and 8 more come."""
    a, b, c, d = (
        (name, shape, mx.float32)
        for name, shape in zip("abcd", [(4,), (10, 4), (4,), (2,)], strict=True)
    )
    told = [
        {"type": "inputs", "inputs": [a]},
        {"type": "outputs", "outputs": [d]},
        {"type": "primitive", "name": "Broadcast", "inputs": [a], "outputs": [b]},
        {"type": "primitive", "name": "Exp", "inputs": [b], "outputs": [c]},
        {"type": "primitive", "name": "Slice of its own", "inputs": [c], "outputs": [d]},
    ]
    assert working._most_bytes(told) == 32


def test_the_straight_line_of_a_pass_is_what_is_told_of_it() -> None:
    """Beyond all windows it is not asked for, but added up."""
    found = Memory(tiny.rotating())
    layers = found._growth.layers_at(19 * 512)
    assert found.pass_bytes(20 * 512) == working_bytes(found._forward, layers, 512)


def test_a_pass_takes_about_what_is_said() -> None:
    model, tokens = tiny.plain(), 4096
    runner = Runner(model)
    most = []

    def measure(_held: int, _all: int) -> None:
        most.append(mx.get_peak_memory())
        mx.reset_peak_memory()

    gc.collect()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    runner.start([1] * tokens, progress=measure)
    taken = most[-1] - before - Memory(model).context(tokens).layers_bytes
    said = Memory(model).pass_bytes(tokens)
    assert said is not None
    assert said / 3 < taken < said * 3


@pytest.mark.parametrize("name", ["qwen3_next", "mamba"])
def test_where_a_pass_cannot_be_told_nothing_is_said(name: str) -> None:
    """MLX cannot tell of one, and the other computes its tokens one by one."""
    assert Memory(architectures.build(name)).pass_bytes(1000) is None


# What fits


def test_the_longest_context_fits_and_one_more_pass_does_not() -> None:
    found = Memory(tiny.plain())
    for count in (1, 4):
        for limit in (30_000_000, 90_000_000):
            longest = found.longest(limit, count)
            assert longest is not None
            assert longest % 512 == 0
            assert found.bytes(longest, count) <= limit < found.bytes(longest + 512, count)


def test_a_context_has_tokens() -> None:
    with pytest.raises(ValueError, match="at least one token, not 0"):
        Memory(tiny.plain()).context(0)


def test_where_nothing_fits_the_longest_is_none_at_all() -> None:
    found = Memory(tiny.plain())
    assert found.longest(found.weights_bytes) == 0
    assert found.conversations(1000, found.weights_bytes - 1) == 0


def test_layers_that_do_not_grow_have_no_longest_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "LONGEST", 1 << 16)
    found = Memory(tiny.recurrent())
    assert found.longest(1 << 40) is None
    longest = found.longest(found.bytes(10_000))
    assert longest is not None, "snapshots on the way do grow"
    assert longest < 1 << 16


def test_as_many_conversations_fit_as_the_bytes_say() -> None:
    found = Memory(tiny.plain())
    count = found.conversations(1000, 30_000_000)
    assert count > 1
    assert found.bytes(1000, count) <= 30_000_000 < found.bytes(1000, count + 1)


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({"max_recommended_working_set_size": 12, "memory_size": 16}, (12, "recommended for")),
        ({"total_memory": 24, "free_memory": 20}, (24, "of the GPU")),
        ({"device_name": "a"}, (99, "of the machine")),
    ],
)
def test_a_gpu_says_how_much_there_is(
    told: dict[str, Any], expected: tuple[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mx, "device_info", lambda: told)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(machine, "memory_bytes", lambda: 99)
    found = memory.limit()
    assert found is not None
    assert found.bytes == expected[0]
    assert expected[1] in found.source


def test_without_a_gpu_it_is_the_memory_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "device_info", lambda: {"total_memory": 24})
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    monkeypatch.setattr(machine, "memory_bytes", lambda: 99)
    assert memory.limit() == Limit(99, "of the machine")
    monkeypatch.setattr(machine, "memory_bytes", lambda: None)
    assert memory.limit() is None


# The real model


@pytest.mark.real
def test_of_the_real_model_it_is_what_mlx_holds_after_a_real_prompt(real_model: Path) -> None:
    gc.collect()
    before = mx.get_active_memory()
    found = Memory.of(str(real_model))
    context = found.context(270)
    assert mx.get_active_memory() - before < 100_000
    runner = Runner.load(str(real_model), use_cache=False)
    mx.eval(runner.model.parameters())
    weights = mx.get_active_memory() - before
    parameters: Any = tree_flatten(runner.model.parameters())
    sizes = [array.nbytes for _, array in parameters]
    twice = sum(size for size in sizes if size <= mapped.COPIED_BYTES)  # of a file that is mapped
    around = mapped.HUGE_PAGE + mmap.PAGESIZE  # that nobody touches
    assert 0 <= weights - found.weights_bytes < 100_000 + twice + around
    run = runner.start(list(range(1000, 1270)))
    assert sum(array.nbytes for array in live_arrays(run._layers)) == context.layers_bytes
    beside = mx.get_active_memory() - before - weights - context.layers_bytes
    assert context.kept_bytes <= beside < context.kept_bytes + 2_000_000
