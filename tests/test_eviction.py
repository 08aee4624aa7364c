"""What goes first: leaves before what they stand on, least worth first; never what has a name."""

from __future__ import annotations

import dataclasses
import functools
import os
import random
import shutil
import time
from typing import TYPE_CHECKING

import pytest

from mlx_promptcache import PromptCache, Runner, facts, files
from mlx_promptcache.catalog import Catalog
from mlx_promptcache.errors import ForeignFile
from mlx_promptcache.facts import Facts
from mlx_promptcache.store import BLOCKS, SNAPSHOTS, TOKENIZERS, Store
from tiny import KINDS, digest, random_tokens, smallest

if TYPE_CHECKING:
    from pathlib import Path

    from mlx_promptcache.state import State


@functools.cache
def runner() -> Runner:
    return Runner(smallest())


@functools.cache
def state_of(seed: int, length: int = 300) -> State:
    """A state of tokens of its own."""
    return runner().prefill(random_tokens(length, seed=seed, vocab=16))


@functools.cache
def two_after_one_prefix() -> tuple[State, State]:
    prefix = random_tokens(512, seed=99, vocab=16)
    first, second = ([*prefix, *random_tokens(20, seed=s, vocab=16)] for s in (1, 2))
    return runner().prefill(first), runner().prefill(second)


@pytest.fixture
def cache(tmp_path: Path) -> PromptCache:
    return PromptCache(tmp_path / "store", "tiny")


def store_of(cache: PromptCache) -> Store:
    return Store(cache.directory)


def used(cache: PromptCache, state: State, seconds_ago: float) -> None:
    """Let the files of a state have been used so long ago."""
    store, when = store_of(cache), time.time_ns() - int(seconds_ago * 1e9)
    for kind, stem in files_of(cache, state):
        path = store.path(kind, stem)
        os.utime(path, ns=(when, when))


def files_of(cache: PromptCache, state: State) -> list[tuple[str, str]]:
    """The snapshot of a state, and its blocks."""
    found = Facts(store_of(cache))
    stems = [s for s in found.snapshots if found.snapshot(s).n_past == state.n_past]
    for stem in stems:
        uses = found.snapshot(stem).uses
        tokens: list[int] = []
        for use in uses:
            header = store_of(cache).header(BLOCKS, use.stem)
            tokens += header.content["tokens"][: use.rows]
        if tuple(tokens) == state.tokens:
            return [(SNAPSHOTS, stem), *((BLOCKS, use.stem) for use in uses)]
    raise AssertionError("it is not stored")


def on_disk(cache: PromptCache, state: State) -> int:
    """Bytes on disk of the files of a state, and of the directories that have nothing else."""
    paths = {store_of(cache).path(kind, stem) for kind, stem in files_of(cache, state)}
    alone = {path.parent for path in paths if set(path.parent.iterdir()) <= paths}
    return sum(files.on_disk(path.lstat()) for path in paths | alone)


def held(cache: PromptCache, state: State) -> int:
    """How many tokens of a state are stored."""
    return cache.match(state.tokens).position


def size(cache: PromptCache) -> int:
    return store_of(cache).taken()


def evict_one_file(cache: PromptCache) -> tuple[str, ...]:
    gone = cache.prune(size(cache) - 1)
    return (*gone.snapshots, *gone.blocks)


def test_the_least_recently_used_state_of_a_model_goes_first(cache: PromptCache) -> None:
    states = [state_of(seed) for seed in range(4)]
    for state in states:
        cache.keep(state)
    for state, ago in zip(states, (30, 500, 4000, 70), strict=True):
        used(cache, state, ago)
    oldest, room = files_of(cache, states[2]), on_disk(cache, states[2])
    gone = cache.prune(size(cache) - room)
    assert set(gone.snapshots) | set(gone.blocks) == {stem for _, stem in oldest}
    assert [held(cache, state) for state in states] == [300, 300, 0, 300]
    cache.prune(size(cache) - room)
    assert [held(cache, state) for state in states] == [300, 0, 0, 300]


def test_a_long_path_is_taken_down_from_its_end(cache: PromptCache) -> None:
    state = state_of(5, 1000)
    cache.keep(state)
    snapshot, *blocks = files_of(cache, state)
    for kind, stem in (snapshot, *reversed(blocks)):
        assert evict_one_file(cache) == (stem,), kind
    assert not store_of(cache).stems(BLOCKS)


def test_what_is_left_of_a_path_can_still_be_used(cache: PromptCache) -> None:
    state = state_of(5, 1000)
    cache.keep(state)
    before = held(cache, state)
    evict_one_file(cache)
    evict_one_file(cache)
    assert (before, held(cache, state)) == (1000, 768)


def test_rows_that_two_states_share_stay_for_the_one_that_stays(cache: PromptCache) -> None:
    first, second = two_after_one_prefix()
    cache.keep(first)
    cache.keep(second)
    used(cache, second, 10)
    old = files_of(cache, first)
    os.utime(store_of(cache).path(*old[0]), ns=(1, 1))
    os.utime(store_of(cache).path(*old[-1]), ns=(1, 1))
    assert evict_one_file(cache) == (old[0][1],)
    assert evict_one_file(cache) == (old[-1][1],)
    assert (held(cache, first), held(cache, second)) == (512, 532)


def test_what_has_a_name_stays_with_all_that_it_needs_whatever_the_budget(
    cache: PromptCache,
) -> None:
    first, second = two_after_one_prefix()
    cache.save("mine", first)
    cache.keep(second)
    used(cache, first, 10**6)
    gone = cache.prune(0)
    assert (len(gone.snapshots), len(gone.blocks)) == (1, 1)
    assert digest(PromptCache(cache.directory, "tiny").load("mine")) == digest(first)
    assert not cache.verify().damaged


def test_a_state_whose_name_was_given_to_another_has_none(cache: PromptCache) -> None:
    cache.save("mine", state_of(1))
    cache.save("mine", state_of(2), replace=True)
    cache.prune(0)
    assert (held(cache, state_of(1)), held(cache, state_of(2))) == (0, 300)


def test_of_two_models_the_one_that_is_computed_faster_goes_first(tmp_path: Path) -> None:
    slow, fast = PromptCache(tmp_path, "slow"), PromptCache(tmp_path, "fast")
    for cache, seconds in ((slow, 0.5), (fast, 0.0005)):
        trail = state_of(1).trail._replace(seconds_per_token=seconds)
        cache.keep(dataclasses.replace(state_of(1), trail=trail))
        store = store_of(cache)
        now = time.time_ns() - 10**9
        for kind in (BLOCKS, SNAPSHOTS):
            for stem in store.stems(kind):
                os.utime(store.path(kind, stem), ns=(now, now))
    kept = (path for kind in (BLOCKS, SNAPSHOTS) for path in (tmp_path / kind).rglob("*"))
    fast.prune(size(slow) - sum(files.on_disk(path.lstat()) for path in kept) // 2)
    assert (held(slow, state_of(1)), held(fast, state_of(1))) == (300, 0)


def test_the_noise_of_one_measurement_does_not_decide_between_states_of_one_model(
    cache: PromptCache,
) -> None:
    for seed, seconds, ago in ((1, 0.5, 20), (2, 0.001, 10), (3, 0.01, 5)):
        trail = state_of(seed).trail._replace(seconds_per_token=seconds)
        cache.keep(dataclasses.replace(state_of(seed), trail=trail))
        used(cache, state_of(seed), ago)
    cache.prune(size(cache) - on_disk(cache, state_of(1)))
    assert [held(cache, state_of(seed)) for seed in (1, 2, 3)] == [0, 300, 300]


def test_blocks_whose_snapshot_is_gone_are_taken_down_from_the_end_too(cache: PromptCache) -> None:
    state = state_of(5, 1000)
    cache.keep(state)
    (_, snapshot), *blocks = files_of(cache, state)
    store_of(cache).remove(SNAPSHOTS, snapshot)
    for _, stem in blocks:  # as if the first one had been used last of all
        os.utime(store_of(cache).path(BLOCKS, stem), ns=(1, 1))
    assert [evict_one_file(cache) for _ in blocks] == [(s,) for _, s in reversed(blocks)]


def test_a_model_that_resumes_at_snapshots_only_is_worth_its_whole_prompt(tmp_path: Path) -> None:
    recurrent = Runner(KINDS["recurrent"]())
    cache = PromptCache(tmp_path, "recurrent")
    states = [recurrent.prefill(random_tokens(length, seed=length)) for length in (40, 700)]
    for state in states:
        cache.keep(state)
        used(cache, state, 50)
    (_, snapshot), *_ = files_of(cache, states[0])
    assert evict_one_file(cache) == (snapshot,)


def test_damaged_files_go_first_and_files_of_other_versions_stay(cache: PromptCache) -> None:
    for seed in (1, 2):
        cache.keep(state_of(seed))
    store = store_of(cache)
    (_, snapshot), (_, block), *_ = files_of(cache, state_of(1))
    path = store.path(BLOCKS, block)
    path.write_bytes(path.read_bytes()[:-1])
    with store.path(SNAPSHOTS, snapshot).open("r+b") as file:
        text = file.read()
        file.seek(0)
        file.write(text.replace(b"mlx_promptcache", b"mlx_otherscache"))
    gone = evict_one_file(cache)
    assert len(gone) == 1
    assert set(gone) <= {block, snapshot}


def test_a_named_state_that_cannot_be_read_keeps_blocks_that_may_be_its_own(
    cache: PromptCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(store: Store, stem: str) -> None:
        raise ForeignFile("it is of another version")

    cache.keep(runner().prefill(state_of(1).tokens[:200]))  # has blocks of what gets the name
    cache.save("mine", state_of(1))
    cache.keep(state_of(2))
    monkeypatch.setattr("mlx_promptcache.headers.snapshot_header", refuse)
    gone = cache.prune(0)
    monkeypatch.undo()
    assert (len(gone.snapshots), gone.blocks) == (2, ())
    assert digest(PromptCache(cache.directory, "tiny").load("mine")) == digest(state_of(1))
    assert cache.prune(0).blocks  # now it is known which may go
    assert held(cache, state_of(2)) == 0
    assert digest(PromptCache(cache.directory, "tiny").load("mine")) == digest(state_of(1))


def test_a_memo_that_lies_costs_a_named_state_nothing(
    cache: PromptCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(facts, "WORTH_KEEPING", 1)
    monkeypatch.setattr(facts, "SETTLED_NS", 0)
    cache.save("mine", state_of(1))
    cache.keep(state_of(2))
    memo = facts.memo_of(store_of(cache))
    look = Catalog(store_of(cache), memo=memo)
    look.facts.keep()
    known = facts._Known.load(memo)
    known.snapshots = {
        stem: (stamp, told._replace(uses=())) for stem, (stamp, told) in known.snapshots.items()
    }
    known.save(memo)
    assert all(told.uses == () for _, told in facts._Known.load(memo).snapshots.values())
    cache.prune(0)
    assert digest(PromptCache(cache.directory, "tiny").load("mine")) == digest(state_of(1))


def test_a_tokenizer_that_was_not_used_for_long_goes_and_one_that_was_stays(
    cache: PromptCache,
) -> None:
    cache.keep(state_of(1))
    store = store_of(cache)
    packed = store.path(SNAPSHOTS, store.stems(SNAPSHOTS)[0]).read_bytes()
    for stem, ago in (("aa/aa", 10**7), ("bb/bb", 1)):
        path = store.path(TOKENIZERS, stem)
        path.parent.mkdir(parents=True)
        path.write_bytes(packed)
        when = time.time_ns() - ago * 10**9
        os.utime(path, ns=(when, when))
    used(cache, state_of(1), 60)
    gone = cache.prune(size(cache) - 1)
    assert (gone.tokenizers, gone.blocks) == (("aa/aa",), ())


def test_a_state_keeps_rows_whose_neighbours_are_kept_by_a_name(
    cache: PromptCache, tmp_path: Path
) -> None:
    """Two runs cut one prompt differently, and their stores were put together: the later block is
    one file of both, the first rows are not.
    """
    state, named = state_of(7, 600), PromptCache(tmp_path / "other", "tiny")
    named.save("all of it", state)
    cache.keep(runner().prefill(state.tokens[:100]))
    cache.keep(state)
    stored = Store(cache.directory)
    assert len(files_of(cache, state)) == len(files_of(named, state)) + 1  # cut once more
    shared = set(files_of(cache, state)) & set(files_of(named, state))
    assert {kind for kind, _ in shared} == {BLOCKS}
    shutil.copytree(named.directory, cache.directory, dirs_exist_ok=True)
    while evict_one_file(cache):
        assert not cache.verify().damaged
    assert not {stem for _, stem in shared} - set(stored.stems(BLOCKS))
    assert digest(cache.load("all of it")) == digest(state)


@pytest.mark.parametrize("seed", range(6))
def test_whatever_is_stored_names_stay_and_what_is_left_is_whole(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    cache = PromptCache(tmp_path, "tiny")
    trunk = random_tokens(600, seed=seed, vocab=16)
    named: dict[str, State] = {}
    for number in range(8):
        cut = draw.choice([0, 100, 256, 300, 600])
        tokens = [*trunk[:cut], *random_tokens(draw.randrange(1, 300), seed=number, vocab=16)]
        state = runner().prefill(tokens)
        if draw.random() < 0.3:
            named[f"state {number}"] = state
            cache.save(f"state {number}", state)
        else:
            cache.keep(state)
        used(cache, state, draw.randrange(1, 10**5))
    wanted = draw.randrange(0, size(cache))
    told = cache.prune(wanted, dry_run=True)
    before = size(cache)
    assert cache.prune(wanted) == told
    assert size(cache) <= before - told.freed_on_disk
    assert not cache.verify().damaged
    for name, state in named.items():
        assert digest(PromptCache(tmp_path, "tiny").load(name)) == digest(state)
    if size(cache) > wanted:  # all that is left is needed by what has a name
        assert cache.prune(0).freed_bytes == 0
    left = Facts(store_of(cache))
    for stem in left.blocks:  # nothing that is left stands on what is gone
        header = store_of(cache).header(BLOCKS, stem)
        tokens_before = header.content["start"]
        assert tokens_before == 0 or any(
            store_of(cache).header(BLOCKS, other).content["end_key"] == header.content["start_key"]
            or _is_inside(store_of(cache), other, header.content)
            for other in left.blocks
        )


def _is_inside(store: Store, other: str, content: dict[str, object]) -> bool:
    """Whether a block begins among the rows of another."""
    there = store.header(BLOCKS, other).content
    start, at = there["start"], content["start"]
    return bool(start < at < start + len(there["tokens"]))
