"""scripts/simulate: what is simulated is the program's own store, and the figures keep the laws."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import sys
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import pytest

import tiny
from conftest import ROOT
from mlx_promptcache import PromptCache, Runner, tree
from mlx_promptcache.store import BLOCKS, SNAPSHOTS, Store
from mlx_promptcache.tree import BlockName, Keys, SnapshotName

sys.path.insert(0, str(ROOT / "scripts"))

import simulation
import traffic
from fleet import (
    ALONE,
    BY_KEY,
    BY_SHARD,
    COMPUTED,
    DISK,
    MEMORY,
    RECOMPUTE,
    REMOTE,
    SHARED,
    Figures,
    Machine,
    Place,
    Setup,
)
from simulation import Simulation
from stock import Block, Sizes, Snapshot, Stock, Walk, on_disk
from traffic import Mix, Request, requests, tokens_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

SIZES = Sizes(row=1000.0)
MACHINE = Machine(tokens_per_second=1000.0, restored_per_second=1e9, memory=0)
MIX = Mix(systems=8, shots=4)
ONCE = Mix(chats=0.0, series=0.0)


def run(asked: Sequence[Request], seed: int = 1, **changes: Any) -> Figures:
    setup = Setup(4, MACHINE, Place(), SIZES)
    return Simulation(dataclasses.replace(setup, **changes), seed).run(asked)


def asked(count: int = 250, mix: Mix = MIX, rate: float = 0.2, seed: int = 1) -> list[Request]:
    return requests(mix, count, rate, seed)


def files_of(stock: Stock) -> list[Block | Snapshot]:
    return [*stock.blocks.values(), *stock.snapshots.values()]


# The store that is simulated is the program's


class Kept:
    """A stock that keeps what it is given, as a store does."""

    def __init__(self, root: str) -> None:
        self.stock, self._root, self._now = Stock(SIZES), root, itertools.count()

    def position(self, tokens: Sequence[int]) -> tuple[int, bool]:
        walk = self.walk(tokens)
        return walk.position, walk.state is not None

    def walk(self, tokens: Sequence[int]) -> Walk:
        return self.stock.walk(Keys(self._root, tokens))

    def keep(
        self, tokens: Sequence[int], answer: Sequence[int] = (), *, began: Walk | None = None
    ) -> None:
        """Keep the state at the end of an answer to a prompt, in one save, of a run that began with
        such a walk.
        """
        now, walk = float(next(self._now)), began or self.walk(tokens)
        tokens = [*tokens, *answer]
        keys = Keys(self._root, tokens)
        self.stock.used.update(dict.fromkeys(walk.stems, now))
        self.stock.add(self.stock.missing(keys, walk, len(tokens), 0), now)


def family(draw: random.Random) -> list[list[int]]:
    """Prompts that agree in beginnings of all lengths, some of them with one another's branches."""
    prompts = [[draw.randrange(16) for _ in range(draw.choice([5, 256, 300, 700]))]]
    for _ in range(7):
        taken = draw.choice(prompts)
        kept = taken[: draw.choice([0, len(taken) - 1, len(taken), draw.randrange(len(taken))])]
        prompts.append(kept + [draw.randrange(16) for _ in range(draw.choice([1, 4, 60, 290]))])
    return [*prompts, prompts[0]]


def names(store: Store) -> set[str]:
    """The blocks of a store, whatever computed them."""
    blocks = filter(None, map(BlockName.parse, store.stems(BLOCKS)))
    return {str(name._replace(variant="")) for name in blocks}


@pytest.mark.parametrize("seed", range(4))
def test_a_simulated_store_has_the_names_and_the_matches_of_a_real_one(
    seed: int, tmp_path: Path
) -> None:
    cache = PromptCache(tmp_path, "simulated")
    runner, kept = Runner(tiny.smallest(), None, cache), Kept(cache.fingerprint.digest)
    for prompt in family(random.Random(seed)):
        match = cache.match(prompt)
        assert kept.position(prompt) == (match.position, match.exact)
        cache.keep(runner.prefill(prompt))
        kept.keep(prompt)
        store = Store(tmp_path)
        assert set(kept.stock.blocks) == names(store)
        states = filter(None, map(SnapshotName.parse, store.stems(SNAPSHOTS)))
        ours = map(SnapshotName.parse, kept.stock.snapshots)
        assert {name and name[:3] for name in ours} == {name[:3] for name in states}


def test_blocks_that_begin_among_the_rows_of_others_are_found_as_in_a_real_store(
    tmp_path: Path,
) -> None:
    cache = PromptCache(tmp_path, "simulated")
    runner, kept = Runner(tiny.smallest(), None, cache), Kept(cache.fingerprint.digest)
    long = tiny.random_tokens(65, seed=1, vocab=16)
    cache.keep(runner.prefill(long))
    kept.keep(long)
    short = long[:60]  # its last token goes through the model again: the answer begins at 59
    answer = [step.token for step in runner.generate(short, max_tokens=30)]
    cache.keep(runner.state)
    kept.keep(short, answer)
    again = [*short, *answer, 1]
    assert set(kept.stock.blocks) == names(Store(tmp_path))
    assert kept.position(again) == (cache.match(again).position, False) == (90, False)


def test_a_save_after_an_earlier_one_of_the_same_run_uses_its_blocks_as_in_a_real_store(
    tmp_path: Path,
) -> None:
    cache = PromptCache(tmp_path, "simulated")
    runner, kept = Runner(tiny.smallest(), None, cache), Kept(cache.fingerprint.digest)
    prompt = tiny.random_tokens(300, seed=1, vocab=16)
    began = kept.walk(prompt)
    state = runner.prefill(prompt)
    answer = [step.token for step in runner.generate(state, max_tokens=30)]
    for saved, more in ((state, []), (runner.state, answer)):
        cache.keep(saved)
        kept.keep(prompt, more, began=began)
    assert set(kept.stock.blocks) == names(Store(tmp_path))
    assert len(kept.stock.blocks) == 3


def test_what_is_evicted_goes_leaf_first_and_the_least_recently_used_first() -> None:
    kept = Kept("0" * 32)
    draw = random.Random(1)
    prompts = [[draw.randrange(1 << 16) for _ in range(600)] for _ in range(3)]
    for prompt in prompts:
        kept.keep(prompt)
    kept.keep(prompts[0])  # used again: now the second is the oldest
    kept.stock.evict(1, [], now=10.0)
    assert [kept.position(prompt)[1] for prompt in prompts] == [True, False, True]
    kept.stock.evict(on_disk(SIZES.of_block(88)), [], now=10.0)
    assert [kept.position(prompt)[0] for prompt in prompts] == [600, 512, 600]


def test_what_was_removed_leaves_nothing_behind() -> None:
    kept = Kept("0" * 32)
    for prompt in family(random.Random(9)):
        kept.keep(prompt)
    empty = Stock(SIZES)
    kept.stock.evict(kept.stock.bytes, [], now=100.0)
    assert kept.stock == empty


# Requests


def test_the_same_seed_gives_the_same_requests_and_another_gives_others() -> None:
    assert asked() == asked()
    assert asked() != asked(seed=2)


def test_requests_come_in_order_and_as_often_as_was_asked() -> None:
    times = [request.at for request in asked(4000, rate=2.0)]
    assert times == sorted(times)
    assert len(times) == 4000
    assert len(times) / times[-1] == pytest.approx(2.0, rel=0.15)


def test_requests_come_in_waves() -> None:
    flat, wavy = (
        [r.at for r in asked(4000, dataclasses.replace(ONCE, height=height))] for height in (0, 0.9)
    )

    def most_in_a_tenth(times: list[float]) -> float:
        counts = [0] * 10
        for at in times:
            counts[min(9, int(10 * at / times[-1]))] += 1
        return max(counts) / len(times)

    assert most_in_a_tenth(flat) < 0.12 < 0.15 < most_in_a_tenth(wavy)


def test_a_chat_grows_by_what_was_said() -> None:
    chats: dict[int, list[Request]] = {}
    for request in asked(60, Mix(chats=1.0, series=0.0, turns=4.0)):
        chats.setdefault(request.session, []).append(request)
    turns = [pair for chat in chats.values() for pair in itertools.pairwise(chat)]
    assert turns
    for one, other in turns:
        assert other.prompt[: len(one.prompt) + 1] == (*one.prompt, one.answer)
        held = tokens_of((*one.prompt, one.answer), 1)
        assert tokens_of(other.prompt, 1)[: len(held)] == held


def test_texts_are_shared_as_zipf_says() -> None:
    first = [r.prompt[0][0] for r in asked(6000, Mix(chats=1.0, series=0.0, turns=1.0, systems=5))]
    counts = [first.count(number) for number in sorted(set(first))]
    harmonic = sum(1 / rank for rank in range(1, 6))
    expected = [len(first) / rank / harmonic for rank in range(1, 6)]
    assert counts == pytest.approx(expected, rel=0.1)


# Laws


@pytest.mark.parametrize("mode", [RECOMPUTE, ALONE, SHARED])
def test_every_token_of_every_prompt_comes_from_one_place(mode: str) -> None:
    found = run(asked(), mode=mode)
    tokens = sum(count for request in asked() for _, count in request.prompt)
    assert sum(found.tokens.values()) == tokens
    assert len(found.first_token) == found.requests == 250


def test_the_same_seed_gives_the_same_figures() -> None:
    again = [run(asked(120), affinity=False) for _ in range(2)]
    assert again[0] == again[1]
    assert run(asked(120), seed=2, affinity=False) != again[0]


def test_one_machine_alone_computes_all_where_nothing_repeats() -> None:
    once = asked(60, ONCE)
    cold, alone = (run(once, machines=1, mode=mode) for mode in (RECOMPUTE, ALONE))
    assert alone.tokens == cold.tokens
    assert alone.first_token == pytest.approx(cold.first_token)


def test_without_a_remote_no_byte_moves() -> None:
    found = run(asked(), mode=ALONE)
    assert (found.lists, found.gets, found.puts, found.got, found.put) == (0, 0, 0, 0, 0)
    assert found.tokens[REMOTE] == 0


def test_bytes_are_conserved() -> None:
    setup = Setup(4, MACHINE, Place(), SIZES)
    simulated = Simulation(setup, 1)
    found = simulated.run(asked())
    there = simulated.remote.stock
    files = files_of(there)
    assert found.distinct == sum(file.size for file in files)
    assert found.objects == len(files)
    assert found.put >= found.distinct
    held = [host.stock for host in simulated.hosts.values()]
    stored = sum(file.size for stock in held for file in files_of(stock))
    assert found.written + found.copied == stored  # nothing was evicted
    assert found.copied == found.got > 0
    assert found.put <= found.written


def test_what_is_evicted_is_what_was_stored_and_is_not_there() -> None:
    machine = dataclasses.replace(MACHINE, budget=2_000_000)
    simulated = Simulation(Setup(4, machine, Place(), Sizes(row=4096.0 - 6)), 1)
    found = simulated.run(asked())
    held = [host.stock for host in simulated.hosts.values()]
    assert found.evicted > 0
    assert all(stock.bytes <= machine.budget for stock in held)
    written = found.written + found.copied
    there = sum(file.size for stock in held for file in files_of(stock))
    assert found.evicted >= written - there  # whole pieces of the drive


def test_what_made_others_go_is_stored_itself() -> None:
    state = on_disk(SIZES.of_block(256)) + on_disk(SIZES.of_snapshot(1))
    machine = dataclasses.replace(MACHINE, budget=2 * state)
    same = [
        Request(10.0 * i, 0, ((thing, 256),), (2 << 50, 1), keeps_answer=False)
        for i, thing in enumerate((1, 2, 3, 3))
    ]
    found = run(same, machines=1, mode=ALONE, machine=machine)
    assert found.evicted > 0
    assert found.tokens[DISK] == 256


def test_sharing_reuses_no_less_than_machines_alone() -> None:
    assert run(asked()).reused > run(asked(), mode=ALONE).reused > 0


def test_a_larger_budget_reuses_more() -> None:
    budgets = [2 * 10**5, 10**6, 4 * 10**6, 10**8]
    machines = [dataclasses.replace(MACHINE, budget=budget) for budget in budgets]
    reused = [run(asked(), mode=ALONE, machine=machine).reused for machine in machines]
    assert reused == sorted(reused)
    assert reused[0] < reused[-1] / 2


def test_what_is_in_memory_is_not_read_again() -> None:
    machine = dataclasses.replace(MACHINE, memory=10**9)
    slow, quick = run(asked(), mode=ALONE), run(asked(), mode=ALONE, machine=machine)
    assert slow.tokens[MEMORY] == quick.tokens[DISK] == 0
    assert quick.tokens[MEMORY] == slow.tokens[DISK] > 0
    assert sum(quick.first_token) < sum(slow.first_token)


def test_smaller_cells_are_more_objects_and_compute_no_more() -> None:
    shared = asked(200, Mix(chats=0.0, series=1.0, shots=3))
    near = Place(latency=0.001)  # lists of many cells take long, and what is late is not sent
    small, own, large = (run(shared, cell=cell, place=near) for cell in (64, 256, 1024))
    assert small.tokens[COMPUTED] <= own.tokens[COMPUTED] <= large.tokens[COMPUTED]
    assert small.objects > own.objects > large.objects
    assert tree.CELL == 256


def test_a_remote_that_is_slow_is_let_be_and_nobody_waits_longer_than_computing() -> None:
    quick, slow = (run(asked(), place=Place(latency=x)) for x in (0.001, 3.0))
    cold = run(asked(), mode=ALONE)
    assert slow.late > 0 == quick.late
    assert slow.gets < quick.gets
    assert max(slow.first_token) <= 2 * max(cold.first_token)


def test_a_forgiving_machine_asks_again_after_a_prompt_that_was_computed_sooner() -> None:
    quick = dataclasses.replace(MACHINE, tokens_per_second=10_000.0)
    strict, forgiving = (run(asked(), machine=quick, forgiving=x) for x in (False, True))
    assert 0 < strict.late < forgiving.late
    assert strict.gets < forgiving.gets
    same: dict[str, Any] = {
        "machine": dataclasses.replace(MACHINE, tokens_per_second=2.0),
        "place": Place(9.0),
    }
    late = [run(asked(40), forgiving=x, **same) for x in (False, True)]
    assert late[0].late > 0  # after all of 5 seconds
    assert late[0] == late[1]


@pytest.mark.parametrize(("tokens", "patience"), [(1000, 1.0), (10_000, 5.0)])
def test_a_prompt_waits_as_long_as_computing_takes_and_what_comes_late_is_there_the_next_time(
    tokens: int, patience: float
) -> None:
    """The second machine waits in vain; its next prompt finds what came."""
    place = Place(latency=3.0, to_machine=1e12)
    same = [
        Request(at, machine, ((1, tokens),), (2 << 50, 1), keeps_answer=False)
        for at, machine in ((0.0, 0), (500.0, 1), (1000.0, 1))
    ]
    found = run(same, place=place, machines=2)
    assert found.first_token[1] == pytest.approx(tokens / 1000 + patience)
    assert found.first_token[2] < 0.1
    assert found.late > 0


def test_the_directories_of_a_prompt_are_listed_and_no_others() -> None:
    long = [Request(0.0, 0, ((1 << 50, 5000),), (2 << 50, 1), keeps_answer=False)]
    by_shard, by_key = (
        run(long, place=Place(strangers=10**6), listing=listing) for listing in (BY_SHARD, BY_KEY)
    )
    assert by_key.lists < 100 < by_shard.lists < 10**6 / simulation.PAGE


def test_a_machine_that_sends_what_it_used_again_sends_a_prefix_and_no_question() -> None:
    asked = [
        Request(20.0 * i, i % 2, ((1, 512), ((4 << 40) + i, 30)), (2 << 50, 1), keeps_answer=False)
        for i in range(6)
    ]
    found = run(asked, machines=2, sends_all=False)
    assert found.put == found.distinct == 2 * SIZES.of_block(256)


def test_kinds_of_arithmetic_send_the_same_rows_again() -> None:
    same = [Request(0.1 * i, i, ((1, 600),), (2 << 50, 1), keeps_answer=False) for i in range(4)]
    alike, unlike = (run(same, kinds=kinds) for kinds in (1, 4))
    assert alike.distinct < unlike.distinct


# Oracles


def popular(count: int, things: int, seed: int) -> list[Request]:
    """Independent requests for prompts of one cell, as popular as Zipf says."""
    draw = random.Random(seed)
    weights = [1 / (rank + 1) for rank in range(things)]
    chosen = draw.choices(range(things), weights, k=count)
    return [
        Request(10.0 * i, i, ((thing, 256),), (2 << 50, 1), keeps_answer=False)
        for i, thing in enumerate(chosen)
    ]


def che(things: int, room: float) -> float:
    """The hit rate of an LRU cache with so many places, as Che's approximation has it."""
    total = sum(1 / rank for rank in range(1, things + 1))
    rates = [1 / rank / total for rank in range(1, things + 1)]

    def held(time: float) -> float:
        return sum(1 - math.exp(-rate * time) for rate in rates)

    low, high = 0.0, 1e9
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if held(middle) < room else (low, middle)
    return sum(rate * (1 - math.exp(-rate * low)) for rate in rates)


def least_recently_used(asked: Sequence[Request], room: int) -> float:
    """The hit rate of a plain LRU cache."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for request in asked:
        thing = request.prompt[0][0]
        hits += thing in cache
        cache.pop(thing, None)
        cache[thing] = None
        if len(cache) > room:
            cache.popitem(last=False)
    return hits / len(asked)


@pytest.mark.parametrize("room", [10, 40])
def test_the_hit_rate_of_one_machine_is_that_of_an_lru_cache(room: int) -> None:
    things = 100
    sizes = Sizes(row=64.0, snapshot=0)
    state = on_disk(sizes.of_block(256)) + on_disk(sizes.of_snapshot(1))
    machine = dataclasses.replace(MACHINE, budget=room * state)
    requested = popular(2500, things, seed=3)
    found = run(requested, machines=1, mode=ALONE, machine=machine, sizes=sizes)
    assert found.reused == pytest.approx(least_recently_used(requested, room), abs=0.04)
    assert found.reused == pytest.approx(che(things, room), abs=0.05)


@pytest.mark.parametrize(
    ("apart", "computing", "sending"), [(0.0, 12, 12), (0.3, 4, 1), (5.0, 1, 1)]
)
def test_whoever_comes_before_a_new_prefix_is_there_computes_and_sends_it(
    apart: float, computing: int, sending: int
) -> None:
    """A prefix of 1,000 tokens takes a second, and is there soon after. Whoever is done later than
    that need not send it.
    """
    place = Place(latency=0.001, to_machine=1e12, to_all=1e15)
    herd = [
        Request(apart * i, i, ((1, 1000),), (2 << 50, 1), keeps_answer=False) for i in range(12)
    ]
    found = run(herd, machines=12, place=place)
    brought = 1000 * (12 - computing)
    assert found.tokens == {MEMORY: 0, DISK: 0, REMOTE: brought, COMPUTED: 1000 * computing}
    assert found.put == sending * found.distinct
    assert found.amplification == sending


# A machine's files


def test_a_block_is_as_large_as_its_rows_and_its_header() -> None:
    keys = Keys("0" * 32, list(range(300)))
    stock = Stock(SIZES)
    blocks = stock.missing(keys, stock.walk(keys), 300, 0)
    sizes = [(type(file), file.size) for file in blocks]
    assert sizes == [
        (Block, SIZES.of_block(256)),
        (Block, SIZES.of_block(44)),
        (Snapshot, SIZES.of_snapshot(2)),
    ]
    stock.add(blocks, now=0.0)
    assert stock.missing(keys, stock.walk(keys), 300, 0) == []


def test_the_numbers_of_shared_texts_are_not_those_of_others() -> None:
    drawn = asked(400)
    shared = {r.prompt[0] for r in drawn if len(r.prompt) > 1}
    own = [t for r in drawn for t in (*r.prompt[1:], r.answer) if t != traffic.HEADER]
    assert shared.isdisjoint(own)
