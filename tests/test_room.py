"""Room for what is to be added: the budget holds, and nothing that matters makes way."""

from __future__ import annotations

import contextlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from test_eviction import files_of, held, runner, size, state_of, store_of, two_after_one_prefix

from mlx_promptcache import PromptCache, Runner, Sampling, budget, room
from mlx_promptcache.budget import MAX_SIZE, MIN_FREE, Drive
from mlx_promptcache.errors import CacheLocked, StoreError
from mlx_promptcache.facts import Facts, forget
from mlx_promptcache.saver import most_bytes
from mlx_promptcache.state import Origin
from mlx_promptcache.store import BLOCKS, SNAPSHOTS, Store
from mlx_promptcache.uses import USES
from tiny import digest, random_tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

KB = 1000


@pytest.fixture
def cache(tmp_path: Path) -> PromptCache:
    return PromptCache(tmp_path / "store", "tiny")


def bounded(cache: PromptCache, max_bytes: int) -> PromptCache:
    return PromptCache(cache.directory, "tiny", max_bytes=max_bytes)


def test_what_a_state_may_take_is_never_less_than_it_takes(cache: PromptCache) -> None:
    cache.directory.mkdir()
    store_of(cache).create()
    for length in (1, 255, 256, 257, 1000):
        before = size(cache)
        state = runner().prefill(random_tokens(length, seed=length, vocab=16), boundaries=(100,))
        cache.save(f"state {length}", state)
        assert size(cache) - before <= most_bytes(state)


def test_what_is_told_of_a_state_counts_too(cache: PromptCache) -> None:
    store_of(cache).create()
    state = runner().prefill(random_tokens(200, seed=1, vocab=16), boundaries=(100, 150))
    notes = ({"role": "user", "content": "x", "notes": "\u65e5\u672c\u8a9e" * 5000},)
    biases = Sampling(logit_bias=dict.fromkeys(range(2000), 0.5))
    for more in (
        replace(state, origin=Origin(messages=notes)),
        replace(state, origin=Origin(text='"\\' * 9000)),
        replace(state, sampling=biases),
    ):
        before = size(cache)
        cache.save("state", more, replace=True)
        assert size(cache) - before <= most_bytes(more)


def test_a_budget_holds_where_what_a_state_stands_on_was_evicted_since(cache: PromptCache) -> None:
    prefix = state_of(1, 2000)
    cache.keep(prefix)
    warm = Runner(runner().model, None, PromptCache(cache.directory, "tiny"))
    longer = warm.prefill([*prefix.tokens, *random_tokens(9, seed=3, vocab=16)])
    cache.prune(0)
    cache.save("mine", state_of(2, 1000))
    most = size(cache) + most_bytes(longer)
    with pytest.raises(StoreError, match="could be evicted"):
        bounded(cache, most).keep(longer)
    bounded(cache, most + most_bytes(prefix)).keep(longer)
    assert most < size(cache) <= most + most_bytes(prefix)


def test_a_budget_holds_where_that_is_evicted_while_room_is_made(
    cache: PromptCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = state_of(1, 2000)
    cache.keep(prefix)
    warm = Runner(runner().model, None, PromptCache(cache.directory, "tiny"))
    longer = warm.prefill([*prefix.tokens, *random_tokens(9, seed=3, vocab=16)])
    most = size(cache) + most_bytes(longer)
    make = room.make

    def made_by_two(*args: Any, **kwargs: Any) -> None:
        cache.prune(0)
        make(*args, **kwargs)

    monkeypatch.setattr(room, "make", made_by_two)
    small = bounded(cache, most_bytes(longer) + 30 * KB)
    with pytest.raises(StoreError, match="could be evicted"):
        small.keep(longer)
    bounded(cache, most + most_bytes(prefix)).keep(longer)
    assert held(cache, longer) == longer.n_past


def test_a_budget_holds_over_many_states_and_new_ones_are_kept(cache: PromptCache) -> None:
    most = 3 * most_bytes(state_of(0))
    small = bounded(cache, most)
    for seed in range(8):
        small.keep(state_of(seed))
        assert size(cache) <= most
        assert held(cache, state_of(seed)) == 300
    assert held(cache, state_of(0)) == 0
    assert held(cache, state_of(6)) == 300


def test_a_budget_is_kept_by_a_process_that_knows_nothing_of_those_before(
    cache: PromptCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(10):
        cache.keep(state_of(seed))
    most = 3 * most_bytes(state_of(0))
    assert size(cache) > most
    monkeypatch.setenv(MAX_SIZE, str(most))
    PromptCache(cache.directory, "tiny").keep(state_of(17))
    assert size(cache) <= most
    assert held(cache, state_of(17)) == 300


def test_the_prefix_of_what_is_being_stored_is_not_evicted_for_it(cache: PromptCache) -> None:
    prefix, other = state_of(1, 512), state_of(2, 512)
    cache.keep(prefix)
    for kind, stem in files_of(cache, prefix):
        os.utime(store_of(cache).path(kind, stem), ns=(1, 1))
    cache.keep(other)
    runner().cache = PromptCache(cache.directory, "tiny")
    longer = runner().prefill([*prefix.tokens, *random_tokens(100, seed=3, vocab=16)])
    runner().cache = None
    for kind, stem in files_of(cache, prefix):  # used, but long ago
        os.utime(store_of(cache).path(kind, stem), ns=(1, 1))
    bounded(cache, size(cache) + most_bytes(longer) - 20 * KB).keep(longer)
    assert held(cache, longer) == 612
    assert held(cache, other) < 512


def test_what_does_not_fit_is_refused_in_words_and_nothing_is_deleted(cache: PromptCache) -> None:
    cache.save("mine", state_of(1))
    cache.keep(state_of(2))
    before = size(cache)
    small = bounded(cache, before - 1)
    asks: list[Callable[[], object]] = [
        lambda: small.save("other", state_of(3, 1000)),
        lambda: small.keep(state_of(4)),
    ]
    for ask in asks:
        with pytest.raises(StoreError, match=r"could be evicted: delete states .* --max-size"):
            ask()
    assert size(cache) == before
    assert held(cache, state_of(2)) == 300


def test_a_generation_that_cannot_be_kept_says_what_it_would_have_said(
    cache: PromptCache, caplog: pytest.LogCaptureFixture
) -> None:
    expected = [step.token for step in runner().generate(state_of(1), 5)]
    with pytest.raises(StoreError, match="could be evicted"):
        bounded(cache, 10 * KB).keep(state_of(1))
    assert [step.token for step in runner().generate(state_of(1), 5)] == expected


def test_a_state_with_a_name_is_not_refused_by_a_default(
    cache: PromptCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(MAX_SIZE)
    monkeypatch.setattr(budget, "MOST_BYTES", 10 * KB)
    default = PromptCache(cache.directory, "tiny")
    with pytest.raises(StoreError, match="could be evicted"):
        default.keep(state_of(1))
    default.save("mine", state_of(1))
    default.save("yours", state_of(2))
    assert digest(default.load("mine")) == digest(state_of(1))


def test_automatic_states_leave_something_free_and_named_ones_take_what_there_is(
    cache: PromptCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MIN_FREE, "1GB")
    monkeypatch.setattr(Drive, "of", lambda directory: Drive(10**12, 10**9))
    nearly_full = PromptCache(cache.directory, "tiny")
    with pytest.raises(StoreError, match="only 1,000,000,000 bytes free"):
        nearly_full.keep(state_of(1))
    nearly_full.save("mine", state_of(1))
    assert held(cache, state_of(1)) == 300


def test_a_named_state_that_needs_no_room_waits_for_nobody(
    cache: PromptCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "LOCK_SECONDS", 0.05)
    monkeypatch.setenv(MIN_FREE, "1GB")
    monkeypatch.setattr(Drive, "of", lambda directory: Drive(10**12, 10**9))
    store_of(cache).create()
    nearly_full = PromptCache(cache.directory, "tiny")
    with store_of(cache).shared():
        in_thread(lambda: nearly_full.save("mine", state_of(1)))
    assert held(cache, state_of(1)) == 300


def test_on_a_full_drive_states_without_a_name_make_way_for_one_with_a_name(
    cache: PromptCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.keep(state_of(1))
    cache.save("mine", state_of(2))
    needed = most_bytes(state_of(3))
    monkeypatch.setattr(Drive, "of", lambda directory: Drive(10**12, needed - 1))
    PromptCache(cache.directory, "tiny").save("yours", state_of(3))
    assert held(cache, state_of(1)) < 300
    monkeypatch.setattr(Drive, "of", lambda directory: Drive(10**12, 0))
    PromptCache(cache.directory, "tiny").save("theirs", state_of(4))  # it may need less than that
    assert [held(cache, state_of(seed)) for seed in (2, 3, 4)] == [300] * 3


def test_a_state_that_is_stored_already_is_kept_without_a_turn(
    cache: PromptCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = cache.keep(state_of(1))
    runner().cache = PromptCache(cache.directory, "tiny")
    warm = runner().prefill(list(state_of(1).tokens))
    again = runner().cache
    runner().cache = None
    monkeypatch.setattr(room, "make", lambda *_, **__: pytest.fail("it made room"))
    assert again is not None
    kept = again.keep(warm)
    assert (kept.snapshot, kept.bytes_written) == (saved.snapshot, 0)
    with pytest.raises(pytest.fail.Exception):
        again.keep(state_of(2))


def test_writers_take_turns(cache: PromptCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_promptcache.locks.LOCK_SECONDS", 0.05)
    cache.keep(state_of(1))
    with store_of(cache).adding():
        with pytest.raises(CacheLocked):
            in_thread(lambda: cache.keep(state_of(2)))
        assert held(cache, state_of(1)) == 300
        in_thread(lambda: cache.prune(0))  # who deletes needs no turn
    cache.keep(state_of(2))


def test_a_generation_that_waits_for_readers_gives_up_and_keeps_nothing(
    cache: PromptCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "LOCK_SECONDS", 0.05)
    cache.keep(state_of(1))
    small = bounded(cache, size(cache) + 1)
    with store_of(cache).shared(), pytest.raises(CacheLocked):
        in_thread(lambda: small.keep(state_of(2)))
    assert held(cache, state_of(1)) == 300


def in_thread(task: Callable[[], object]) -> None:
    """Run a task in a thread of its own, which holds none of our locks; raise what it raises."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(task).result()


def test_whoever_makes_room_reads_before_others_have_to_wait(
    cache: PromptCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(4):
        cache.keep(state_of(seed))
    forget(store_of(cache))  # nothing is known of the files
    alone: list[bool] = []
    read: list[bool] = []
    exclusive, original = Store.exclusive, Facts._read

    @contextlib.contextmanager
    def noted(self: Store, *args: Any) -> Iterator[None]:
        with exclusive(self, *args):
            alone.append(True)
            yield
            alone.clear()

    def watched(*args: Any) -> Any:
        read.append(bool(alone))
        return original(*args)

    monkeypatch.setattr(Store, "exclusive", noted)
    monkeypatch.setattr(Facts, "_read", watched)
    bounded(cache, size(cache)).keep(state_of(7))
    cache.prune(0)
    assert read
    assert not any(read)
    assert held(cache, state_of(7)) == 0


# Leftovers


def leave(store: Store, age_seconds: float, kind: str = BLOCKS) -> Path:
    """What a crash leaves behind."""
    path = store.directory / kind / "3f0b" / f".tmp-1-{os.urandom(4).hex()}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * 5000)
    when = time.time() - age_seconds
    os.utime(path, (when, when))
    return path


def test_leftovers_of_crashes_go_by_age_and_nothing_else_does(cache: PromptCache) -> None:
    cache.keep(state_of(1))
    store = store_of(cache)
    young, old = leave(store, 60), leave(store, 7200)
    ahead = leave(store, -7200, SNAPSHOTS)  # the clock was set back since
    others = store.directory / ".tmp-of-somebody"
    others.write_bytes(b"mine")
    told = cache.prune(dry_run=True)
    assert old.exists()
    assert cache.prune() == told
    assert [path.exists() for path in (young, old, ahead, others)] == [True, False, False, True]
    assert sorted(told.leftovers) == sorted(
        path.relative_to(store.directory).as_posix() for path in (old, ahead)
    )
    assert told.freed_bytes == 10_000
    assert held(cache, state_of(1)) == 300


def test_what_was_moved_aside_goes_before_any_state(cache: PromptCache) -> None:
    cache.keep(state_of(1))
    cache.keep(state_of(2))
    store = store_of(cache)
    (_, snapshot), *_ = files_of(cache, state_of(2))
    store.quarantine(SNAPSHOTS, snapshot)
    assert cache.prune().leftovers == ()
    (aside,) = cache.prune(size(cache) - 1).leftovers
    assert aside.startswith("quarantine/snapshots/")
    assert held(cache, state_of(1)) == 300


def test_statistics_that_grew_long_lose_their_older_half(
    cache: PromptCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_of(cache)
    store.create()
    for number in range(20):
        store.uses.note({"what": str(number)})
    monkeypatch.setattr("mlx_promptcache.uses.MOST_STATISTICS_BYTES", 100)
    with store.exclusive():
        store.uses.shorten()
    assert [use["what"] for use in store.uses.all()] == [str(n) for n in range(10, 20)]
    with store.exclusive():
        store.uses.shorten()
        store.uses.shorten()
    assert (store.directory / USES).stat().st_size <= 100


def test_statistics_do_not_grow_without_end_where_nothing_is_added(
    cache: PromptCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_promptcache.uses.MOST_STATISTICS_BYTES", 1000)
    store = store_of(cache)
    store.create()
    for number in range(200):
        store.uses.note({"what": str(number)})
        assert (store.directory / USES).stat().st_size <= 1000
    told = [use["what"] for use in store.uses.all()]
    assert len(told) > 20
    assert told == [str(number) for number in range(200 - len(told), 200)]


def test_what_is_written_is_counted_by_day(cache: PromptCache) -> None:
    saved = cache.keep(state_of(1))
    cache.keep(state_of(1))
    today = time.strftime("%Y-%m-%d", time.gmtime())
    assert store_of(cache).uses.written_by_day() == {today: saved.bytes_written}
    store_of(cache).uses.note({"when": 1e300, "wrote": 3})
    store_of(cache).uses.note({"when": "never", "wrote": 3})
    assert store_of(cache).uses.written_by_day() == {today: saved.bytes_written}


def test_writing_can_be_switched_off_altogether(
    cache: PromptCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.save("mine", state_of(1))
    before = looked_at(cache.directory)
    monkeypatch.setenv("MLX_PROMPTCACHE_READ_ONLY", "1")
    off = PromptCache(cache.directory, "tiny")
    assert digest(off.load("mine")) == digest(state_of(1))
    for ask in (
        lambda: off.save("other", state_of(2)),
        lambda: off.keep(state_of(2)),
        lambda: off.prune(0),
        lambda: off.clear(["mine"]),
    ):
        with pytest.raises(StoreError, match="read-only"):
            ask()
    assert looked_at(cache.directory) == before


def looked_at(directory: Path) -> dict[Path, os.stat_result | None]:
    """All that is there. Looking into a directory may set its atime: of those only the names."""
    return {path: path.stat() if path.is_file() else None for path in directory.rglob("*")}


def test_two_after_one_prefix_are_counted_once(cache: PromptCache) -> None:
    first, second = two_after_one_prefix()
    cache.keep(first)
    one = size(cache)
    cache.keep(second)
    assert size(cache) < one + most_bytes(first) // 2
