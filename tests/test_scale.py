"""What is counted does not grow with what else is stored: files opened, listings, rows, bytes."""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

import tiny
from counting import Counted
from mlx_promptcache import PromptCache, Runner, Sampling, State, container, names
from mlx_promptcache.blueprint import Blueprint
from mlx_promptcache.catalog import Catalog
from mlx_promptcache.store import BLOCKS, SNAPSHOTS, Store
from mlx_promptcache.tree import CELL
from tiny import random_tokens

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

LONG = 4096
CELLS = LONG // CELL
REF_BYTES = 160  # of one block in a snapshot's header
HEADER_BYTES = 3000
FEW = 4  # directories on a way that happen to be there, and names in them


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner(tiny.smallest())


@pytest.fixture(scope="module")
def long_state(runner: Runner) -> State:
    return runner.prefill(random_tokens(LONG, seed=1, vocab=16))


def keep(directory: Path, runner: Runner, prompt: Sequence[int]) -> None:
    """Prefill what is not stored of a prompt, and save its state."""
    cache = PromptCache(directory, "smallest")
    cache.keep(Runner(runner.model, None, cache).prefill(prompt))


def counted(directory: Path, prompt: Sequence[int]) -> tuple[int, Counted]:
    """How much of a prompt is found, and what that asks of the file system."""
    cache = PromptCache(directory, "smallest", read_only=True)
    with Counted(directory) as count:
        position = cache.match(prompt).position
    return position, count


def opened(count: Counted, kind: str) -> int:
    return len([path for path in count.opened if f"/{kind}/" in path])


def listed(count: Counted, kind: str) -> int:
    return len([path for path in count.listed if f"/{kind}/" in path])


def shown(count: Counted, kind: str) -> int:
    """How many names of files were shown by listings."""
    return sum(names for path, names in count.shown.items() if f"/{kind}/" in path)


def add_others(directory: Path, runner: Runner, tokens: list[int]) -> None:
    """Prompts that leave this one inside one cell, or share nothing with it."""
    for number in range(30):
        draw = random_tokens(12, seed=100 + number, vocab=16)
        keep(directory, runner, tokens[:-100] + draw)
        keep(directory, runner, draw)


@pytest.mark.parametrize("length", [LONG, LONG - 96])
def test_a_look_up_asks_the_same_however_many_other_prompts_are_stored(
    length: int, runner: Runner, long_state: State, tmp_path: Path
) -> None:
    tokens = list(long_state.tokens[:length])
    keep(tmp_path, runner, tokens)
    other_end = tokens[:-20] + [15 - token for token in tokens[-20:]]
    for _ in range(2):
        position, count = counted(tmp_path, tokens)
        assert position == length
        assert (opened(count, BLOCKS), opened(count, SNAPSHOTS)) == (CELLS, 1)
        assert (listed(count, BLOCKS), listed(count, SNAPSHOTS)) == (0, 1)
        position, count = counted(tmp_path, other_end)
        assert position == length - 20
        assert opened(count, BLOCKS) == CELLS
        assert opened(count, SNAPSHOTS) == 0
        assert (listed(count, BLOCKS) <= FEW, shown(count, BLOCKS) <= FEW) == (True, True)
        assert count.listed.count(f"{tmp_path}/{SNAPSHOTS}") <= CELLS
        leaves = [path for path in count.listed if f"/{SNAPSHOTS}/" in path]
        assert max(Counter(leaves).values(), default=0) <= 2  # for the rows, and for the name
        add_others(tmp_path, runner, tokens)


def test_a_branch_is_found_among_many_in_one_cell_and_few_are_listed(
    runner: Runner, long_state: State, tmp_path: Path
) -> None:
    PromptCache(tmp_path, "smallest").keep(long_state)
    add_others(tmp_path, runner, list(long_state.tokens))
    branch = [*long_state.tokens[: LONG - 100], *random_tokens(12, seed=107, vocab=16)]
    position, count = counted(tmp_path, branch)
    assert position == len(branch)
    assert opened(count, BLOCKS) <= CELLS + 12  # each token may leave another prompt
    assert (listed(count, BLOCKS) <= FEW, shown(count, BLOCKS) <= FEW) == (True, True)
    assert listed(count, SNAPSHOTS) == 1


def test_what_lies_beyond_a_prefix_is_not_listed_to_find_its_end(
    runner: Runner, tmp_path: Path
) -> None:
    prefix = random_tokens(300, seed=4, vocab=16)
    for end in [[], *(random_tokens(12, seed=200 + number, vocab=16) for number in range(40))]:
        keep(tmp_path, runner, prefix + end)
    position, count = counted(tmp_path, prefix + random_tokens(12, seed=7, vocab=16))
    assert position >= len(prefix)
    assert shown(count, SNAPSHOTS) == 1


def test_a_list_opens_each_file_at_most_once_and_lists_each_directory_once(
    runner: Runner, tmp_path: Path
) -> None:
    prefix = random_tokens(300, seed=2, vocab=16)
    for number in range(20):
        keep(tmp_path, runner, [*prefix, *random_tokens(9, seed=number, vocab=16)])
    here = Store(tmp_path)
    with Counted(tmp_path) as count:
        entries = Catalog(here).entries()
    assert len(entries) == len(here.stems(SNAPSHOTS)) == 20
    assert len(count.opened) == len(set(count.opened)) == 20 + len(here.stems(BLOCKS))
    assert len(count.listed) == len(set(count.listed))


def test_a_save_reads_nothing_of_what_it_has_just_written(tmp_path: Path) -> None:
    """Whether blocks have all rows of windows is asked for every snapshot on the way."""
    cache = PromptCache(tmp_path, "rotating")
    runner = Runner(tiny.rotating(), None, cache)
    state = runner.prefill(random_tokens(900, seed=1, vocab=16), boundaries=[100, 300, 500, 700])
    with Counted(tmp_path) as count:
        assert len(cache.save("it", state, sync=False).snapshots) == 5
    assert count.opened == []


def test_an_export_opens_each_block_for_its_header_and_for_its_rows(
    runner: Runner, tmp_path: Path
) -> None:
    keep(tmp_path / "store", runner, random_tokens(900, seed=1, vocab=16))
    cache = PromptCache(tmp_path / "store", "smallest")
    (entry,) = cache.list()
    with Counted(tmp_path) as count:
        cache.export(entry.snapshot, tmp_path / "it.safetensors")
    assert opened(count, BLOCKS) == 2 * len(Store(cache.directory).stems(BLOCKS)) == 8


def test_names_are_read_once_for_many_hits_and_again_when_one_has_changed(
    runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = random_tokens(300, seed=2, vocab=16)
    keep(tmp_path, runner, prompt)
    here = Store(tmp_path)
    (stem,) = here.stems(SNAPSHOTS)
    for number in range(30):
        here.names.write(f"n{number}", stem)
    reads = reads_of_names(monkeypatch)
    cache = PromptCache(tmp_path, "smallest", read_only=True)
    assert [cache.match(prompt).source for _ in range(3)] == ["n0"] * 3
    assert len(reads) == 3 * 30  # they have changed just now
    monkeypatch.setattr(names, "SETTLED_NS", -(1 << 62))  # as if that were long ago
    reads.clear()
    assert [cache.match(prompt).source for _ in range(3)] == ["n0"] * 3
    assert len(reads) == 30
    here.names.write("a", stem)
    assert cache.match(prompt).source == "a"
    here.names.remove("a")
    assert cache.match(prompt).source == "n0"


def reads_of_names(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names whose files are read from now on."""
    read: list[str] = []
    original = names._stem_in

    def watched(name: str, *args: Any) -> str:
        read.append(name)
        return original(name, *args)

    monkeypatch.setattr(names, "_stem_in", watched)
    return read


# A conversation


@pytest.mark.parametrize(("kind", "turns"), [("plain", 50), ("rotating", 20), ("hybrid", 20)])
def test_each_turn_of_a_conversation_writes_its_own_rows_and_its_snapshots(
    kind: str, turns: int, tmp_path: Path
) -> None:
    runner = Runner(tiny.KINDS[kind]())
    blueprint = Blueprint.of(runner.model, runner.kv)
    tokens: list[int] = []
    there: dict[str, tuple[int, int]] = {}
    for turn in range(turns):
        runner.cache = cache = PromptCache(tmp_path, kind)
        cache.blueprint = blueprint
        run = runner.start(
            [*tokens, *random_tokens(9, seed=turn)], sampling=Sampling(temp=1.0, seed=turn)
        )
        saved = cache.keep(run.prompt_state())
        list(run.steps(5))
        saved += cache.keep(run.state())
        assert (run.cached_tokens, run.prefilled_tokens) == (len(tokens), 9)
        tokens = list(run.state().tokens)
        before, there = there, files_of(Store(tmp_path))
        assert before.items() <= there.items()  # nothing is written again
        new = {stem: size for stem, (_, size) in there.items() if stem not in before}
        assert saved.bytes_written == sum(new.values())
        check_turn(Store(tmp_path), new, len(tokens))


def files_of(here: Store) -> dict[str, tuple[int, int]]:
    """The inode and the size of every file, by its stem."""
    found = {**here.files(BLOCKS), **here.files(SNAPSHOTS)}
    return {stem: (file.inode, file.size) for stem, file in found.items()}


def check_turn(here: Store, new: dict[str, int], length: int) -> None:
    """A turn of 14 tokens has two blocks, one more where a cell ends, and two snapshots, which tell
    all blocks before.
    """
    blocks = {s: here.header(BLOCKS, s) for s in new if here.exists(BLOCKS, s)}
    snapshots = {s: here.header(SNAPSHOTS, s) for s in new if here.exists(SNAPSHOTS, s)}
    assert (len(blocks), len(snapshots)) in {(2, 2), (3, 2)}
    assert len(blocks) == 2 or length // CELL > (length - 14) // CELL
    assert sum(len(block.content["tokens"]) for block in blocks.values()) == 14
    for stem, block in blocks.items():
        assert new[stem] <= block.raw_bytes + HEADER_BYTES
    for stem, snapshot in snapshots.items():
        told = REF_BYTES * len(snapshot.content["refs"])
        assert new[stem] <= snapshot.raw_bytes + HEADER_BYTES + told


# Memory


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many stacks are read at once, at most, and into how many places in memory."""
    seen = {"now": 0, "most": 0, "places": 0}
    lock, places = threading.Lock(), set()
    original = container.read_planes

    def read_planes(*args: Any) -> None:
        with lock:
            places.add(id(args[-1].obj))
            seen["now"] += 1
            seen["most"] = max(seen["most"], seen["now"])
            seen["places"] = len(places)
        time.sleep(0.02)
        original(*args)
        with lock:
            seen["now"] -= 1

    monkeypatch.setattr(container, "read_planes", read_planes)
    return seen


@pytest.mark.parametrize(("length", "readers"), [(300, 1), (2048, 2), (LONG, 4)])
def test_the_smaller_a_state_the_fewer_of_its_blocks_are_read_at_once(
    length: int, readers: int, tmp_path: Path, reading: dict[str, int]
) -> None:
    model = tiny.KINDS["plain"]()
    cache = PromptCache(tmp_path, "plain")
    tokens = random_tokens(length, seed=3)
    cache.keep(Runner(model).prefill(tokens))
    state, _, _ = cache.resume(tokens, model)
    assert state is not None
    assert reading == {"now": 0, "most": readers, "places": readers}
