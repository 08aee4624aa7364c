"""PromptCache: what is stored is found, stored once, and never believed when it is damaged."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import ArraysCache, RotatingKVCache

import processes
import tiny
from mlx_promptcache import PromptCache, Runner, Sampling, State, container, locks
from mlx_promptcache.blueprint import Blueprint
from mlx_promptcache.errors import (
    CacheLocked,
    CacheMiss,
    DamagedFile,
    StoreError,
    UnsupportedLayer,
)
from mlx_promptcache.fingerprint import Fingerprint, KVSettings
from mlx_promptcache.layers import make_layers
from mlx_promptcache.names import NAMES, Names
from mlx_promptcache.store import BLOCKS, SNAPSHOTS, Store
from shim import Fault, Shim
from tiny import bits, digest, random_tokens

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mlx_promptcache.match import Match
    from mlx_promptcache.run import Run

SAMPLED = Sampling(temp=1.0, top_p=0.9, repetition_penalty=1.1, seed=7)
KV8 = KVSettings(8, 32, 0)

every_kind = pytest.mark.parametrize("kind", tiny.KINDS)
main_kinds = pytest.mark.parametrize("kind", ["plain", "rotating", "recurrent", "hybrid"])


@functools.cache
def model_of(kind: str) -> Any:
    return tiny.smallest() if kind == "smallest" else tiny.KINDS[kind]()


@functools.cache
def runner_of(kind: str) -> Runner:
    """A runner without a cache; `with_store` gives it one."""
    return Runner(model_of(kind))


def with_store(kind: str, directory: Path, **more: Any) -> Runner:
    """The runner with a new look at a store, as a new process has it."""
    runner = runner_of(kind)
    runner.cache = PromptCache(directory, kind, **more)
    runner.cache.blueprint = Blueprint.of(runner.model, runner.kv)
    return runner


def cold(kind: str, prompt: Sequence[int], **more: Any) -> State:
    runner = runner_of(kind)
    runner.cache = None
    return runner.prefill(prompt, **more)


def keep(
    kind: str, directory: Path, prompt: Sequence[int], name: str | None = None, **more: Any
) -> State:
    """Prefill a prompt and save its state."""
    runner = with_store(kind, directory)
    state = runner.prefill(prompt, **more)
    assert runner.cache is not None
    if name is None:
        runner.cache.keep(state)
    else:
        runner.cache.save(name, state, sync=False)
    return state


def keep_with(runner: Runner, prompt: Sequence[int]) -> None:
    assert runner.cache is not None
    runner.cache.keep(runner.prefill(prompt, boundaries=(20,)))


def run_of(kind: str, directory: Path, prompt: Sequence[int], **more: Any) -> Run:
    return with_store(kind, directory).start(prompt, **more)


def assert_as_cold(run: Run, kind: str, prompt: Sequence[int]) -> None:
    """The run says what one without a cache says, but for rounding."""
    state, expected = run.state(), cold(kind, prompt)
    assert state.tokens == expected.tokens
    assert state.logits is not None
    assert expected.logits is not None
    assert mx.allclose(state.logits, expected.logits, atol=1e-3)
    assert likeliest(state) == likeliest(expected)


def likeliest(state: State) -> int:
    assert state.logits is not None
    token: Any = mx.argmax(state.logits).item()
    return int(token)


def files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def written_once(directory: Path) -> dict[Path, tuple[int, int, int, bytes]]:
    """Every block and snapshot: that it is the same file, unchanged, and not written again."""
    found = {}
    for path in files(directory):
        if path.suffix == ".safetensors":
            status = path.stat()
            found[path] = (status.st_ino, status.st_mtime_ns, status.st_size, path.read_bytes())
    return found


def size_of(found: dict[Path, tuple[int, int, int, bytes]]) -> int:
    return sum(size for _, _, size, _ in found.values())


def stored_files(directory: Path) -> list[Path]:
    return [*files(directory / BLOCKS), *files(directory / SNAPSHOTS)]


def stored_rows(directory: Path) -> int:
    here = Store(directory)
    return sum(len(here.header(BLOCKS, s).content["tokens"]) for s in here.stems(BLOCKS))


# Names


@every_kind
def test_a_named_state_is_loaded_as_it_was_saved(kind: str, tmp_path: Path) -> None:
    runner = with_store(kind, tmp_path)
    assert runner.cache is not None
    list(runner.generate(random_tokens(60, seed=1), 5, SAMPLED))
    state = runner.state
    saved = runner.cache.save("mine", state)
    assert saved.name == "mine"
    for cache in (runner.cache, PromptCache(tmp_path, kind)):
        assert digest(cache.load("mine")) == digest(state)
        assert digest(cache.load(saved.snapshot)) == digest(state)


def test_a_name_that_is_not_there_is_a_miss_in_words(tmp_path: Path) -> None:
    cache = PromptCache(tmp_path / "store", "plain")
    for _ in range(2):
        with pytest.raises(CacheMiss, match="no state named 'mine'") as error:
            cache.load("mine")
        assert not isinstance(error.value, DamagedFile)
        keep("plain", tmp_path / "store", [1, 2, 3], "yours")


def test_a_name_is_not_given_to_other_tokens_unless_that_is_wanted(tmp_path: Path) -> None:
    first = keep("plain", tmp_path, [1, 2, 3], "mine")
    other = keep("plain", tmp_path, [1, 2, 4], "yours")
    cache = PromptCache(tmp_path, "plain")
    with pytest.raises(StoreError, match="another state named 'mine'"):
        cache.save("mine", other)
    assert digest(cache.load("mine")) == digest(first)
    cache.save("mine", first)  # the same tokens: nothing is lost
    cache.save("mine", other, replace=True)
    assert digest(cache.load("mine")) == digest(other)
    assert digest(cache.load("yours")) == digest(other)
    named = {entry.name: entry.tokens for entry in cache.list() if entry.name}
    assert named == {"mine": 3, "yours": 3}


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "-n", "a/b", "a\\b", "a\nb", "x" * 300])
def test_what_cannot_be_a_name_everywhere_is_refused(name: str, tmp_path: Path) -> None:
    state = keep("plain", tmp_path, [1, 2, 3])
    before = files(tmp_path)
    with pytest.raises(StoreError, match="cannot be a name"):
        PromptCache(tmp_path, "plain").save(name, state)
    assert files(tmp_path) == before


def test_states_of_another_model_are_not_loaded_and_the_miss_says_why(tmp_path: Path) -> None:
    keep("plain", tmp_path, [1, 2, 3], "mine")
    cache = PromptCache(tmp_path, "other weights, say")
    with pytest.raises(CacheMiss, match="'mine' was made with another model; save it again"):
        cache.load("mine")
    match = cache.match([1, 2, 3])
    assert (match.position, match.exact, match.source) == (0, False, None)
    assert match.reason == "what is stored of it was made with another model"
    assert [entry.status for entry in cache.list()] == ["stale"]
    assert cache.resume([1, 2, 3], model_of("plain")) == (None, None, match)


def test_a_salt_is_a_namespace_of_its_own(tmp_path: Path) -> None:
    keep("plain", tmp_path, [1, 2, 3], "mine")
    parts = Fingerprint.of_text("plain").parts
    salted = [PromptCache(tmp_path, Fingerprint({**parts, "salt": s})) for s in ("a", "b")]
    assert salted[0].match([1, 2, 3]).position == 0
    salted[0].save("theirs", Runner(model_of("plain"), None, salted[0]).prefill([1, 2, 3]))
    assert salted[0].match([1, 2, 3]).exact
    match = salted[1].match([1, 2, 3])
    assert match.position == 0
    assert match.reason == "what is stored of it was made with another salt"
    with pytest.raises(CacheMiss, match="another salt"):
        salted[1].load("theirs")
    with pytest.raises(CacheMiss, match="another salt"):
        salted[1].load("mine")
    digests = {c.fingerprint.digest for c in salted} | {Fingerprint.of_text("plain").digest}
    assert len(digests) == 3


def test_a_miss_in_a_store_says_whether_there_is_anything(tmp_path: Path) -> None:
    cache = PromptCache(tmp_path / "store", "plain")
    assert cache.match([1, 2]).reason == "nothing is stored yet"
    assert not (tmp_path / "store").exists()
    keep("plain", tmp_path / "store", [1, 2, 3])
    assert cache.match([7, 8]).reason == "nothing that is stored begins as this prompt does"


# Matches


def test_a_match_says_how_far_and_from_where(tmp_path: Path) -> None:
    whole = random_tokens(600, seed=2)
    keep("plain", tmp_path, whole[:300], "part", boundaries=(100,))
    saved = keep("plain", tmp_path, whole[:560])
    cache = PromptCache(tmp_path, "plain")

    def told(match: Match) -> tuple[int, bool, str | None]:
        return match.position, match.exact, match.source

    unnamed = told(cache.match(whole[:560]))[2]
    assert saved.n_past == 560
    assert told(cache.match(whole[:300])) == (300, True, "part")
    assert told(cache.match(whole[:560])) == (560, True, unnamed)
    assert told(cache.match(whole)) == (560, False, unnamed)
    assert told(cache.match(whole[:559])) == (558, False, "part")
    assert told(cache.match([*whole[:400], 1, 2, 3])) == (400, False, "part")
    position, exact, source = told(cache.match([*whole[:120], 256, 2, 3]))
    assert (position, exact) == (120, False)
    assert source not in {None, "part", unnamed}
    assert told(cache.match([*whole[:40], 256, 2, 3])) == (40, False, None)
    assert told(cache.match(whole[:100])) == (100, True, source)


def test_with_a_limit_no_more_is_matched(tmp_path: Path) -> None:
    runner = with_store("plain", tmp_path / "store")
    prompt = random_tokens(300, 1)
    keep_with(runner, prompt)
    assert runner.cache is not None
    assert runner.cache.match(prompt, limit=120).position == 120
    assert runner.cache.match(prompt).exact


@pytest.mark.parametrize("kind", ["plain", "rotating", "hybrid"])
def test_what_is_added_twice_is_written_once_whatever_its_bits(kind: str, tmp_path: Path) -> None:
    state = cold(kind, random_tokens(300, 1))
    cache = with_store(kind, tmp_path / "store").cache
    assert cache is not None
    first = cache.add(state)
    assert first is not None
    assert first.blocks_written == 2
    before = written_once(cache.directory)
    later = time.time_ns() + 10**12  # what was read would else be of now by the system's own doing
    for path in before:
        os.utime(path, ns=(later, path.stat().st_mtime_ns))
    assert cache.add(with_other_bits(state)) is None
    assert all(path.stat().st_atime_ns < later for path in files(cache.directory / BLOCKS))
    assert written_once(cache.directory) == before


def test_a_cache_with_another_salt_is_the_one_that_has_it_from_the_beginning(
    tmp_path: Path,
) -> None:
    model = tiny.on_disk(tmp_path / "model")
    plain, salted = (Fingerprint.of_model(model, salt=salt) for salt in ("", "s"))
    cache = PromptCache(tmp_path / "store", plain)
    assert cache.with_salt("s").fingerprint.digest == salted.digest
    assert cache.with_salt("s").with_salt("").fingerprint.digest == plain.digest


def test_with_a_limit_no_more_is_resumed(tmp_path: Path) -> None:
    whole = random_tokens(300, seed=2)
    for kind, expected in (("plain", [299, 300, 10, 0]), ("hybrid", [200, 300, 0, 0])):
        keep(kind, tmp_path / kind, whole, boundaries=(200,))
        cache = PromptCache(tmp_path / kind, kind)
        for limit, held in zip([299, 300, 10, 0], expected, strict=True):
            state, _, match = cache.resume(whole, model_of(kind), limit=limit)
            assert (state.n_past if state else 0) == match.position == held
            assert not match.exact


@pytest.mark.parametrize("kind", ["plain", "hybrid"])
def test_nothing_is_found_of_no_tokens(kind: str, tmp_path: Path) -> None:
    for _ in range(2):
        cache = PromptCache(tmp_path, kind)
        match = cache.match([])
        assert (match.position, match.exact, match.source) == (0, False, None)
        assert cache.resume([], model_of(kind)).state is None
        layers, rest = cache.fetch(model_of(kind), [])
        assert (len(layers), rest) == (len(make_layers(model_of(kind), KVSettings())), [])
        keep(kind, tmp_path, [1, 2, 3])


def test_a_match_reads_no_rows(tmp_path: Path) -> None:
    """Every stored byte after the headers is damaged, and a match sees nothing of it."""
    whole = random_tokens(300, seed=2)
    keep("plain", tmp_path, whole)
    here = Store(tmp_path)
    for stem in here.stems(BLOCKS):
        entries = here.header(BLOCKS, stem).entries.values()
        path = here.path(BLOCKS, stem)
        data = bytearray(path.read_bytes())
        for entry in entries:
            data[entry.offset :] = bytes(len(data) - entry.offset)
            break
        path.write_bytes(data)
    assert PromptCache(tmp_path, "plain").match(whole).position == 300


# Stored once


def with_other_bits(state: State) -> State:
    """The state with the last bit of one number of one of its arrays turned."""
    contents = list(state.contents)
    layer = contents[-1]
    arrays = dict(layer.rows or layer.arrays)
    name = next(iter(arrays))
    turned = arrays[name].view(mx.uint32)
    turned = turned.at[..., -1].add(1).view(arrays[name].dtype)
    arrays[name] = turned
    if layer.rows:
        contents[-1] = layer._replace(rows=arrays, padded={})
    else:
        contents[-1] = layer._replace(arrays=arrays)
    return replace(state, contents=tuple(contents))


def test_a_block_that_is_replaced_while_it_is_restored_is_read_anew_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = random_tokens(300, seed=3)
    one = cold("plain", prompt)
    states = {"one": one, "other": with_other_bits(one)}
    for name, state in states.items():
        PromptCache(tmp_path / name, "plain").keep(state)
    replaced = {p.relative_to(tmp_path / "other"): p for p in files(tmp_path / "other" / BLOCKS)}
    for path in files(tmp_path / "one" / SNAPSHOTS):
        path.unlink()
    original, reads = container.read_seal, list[Any]()

    def read_seal(*args: Any) -> bytes:
        if not reads:
            for path, other in replaced.items():
                other.replace(tmp_path / "one" / path)
        reads.append(args)
        return original(*args)

    monkeypatch.setattr(container, "read_seal", read_seal)
    run = run_of("plain", tmp_path / "one", prompt)
    assert len(replaced) == 2
    assert run.cached_tokens == 299
    assert len(reads) > 4  # keys and values of two blocks, after those that were none of them
    last, expected = (state.contents[-1].cut(299) for state in (run.state(), states["other"]))
    assert [bits(rows) for rows in last.rows.values()] == [
        bits(rows) for rows in expected.rows.values()
    ]
    assert caplog.messages == []
    assert files(tmp_path / "one" / "quarantine") == []


@main_kinds
def test_of_two_states_that_differ_in_the_last_bit_each_comes_back(
    kind: str, tmp_path: Path
) -> None:
    prompt = random_tokens(300, seed=3)
    states = [cold(kind, prompt)]
    for _ in range(3):
        states.append(with_other_bits(states[-1]))
    cache = PromptCache(tmp_path, kind)
    for i, state in enumerate(states):
        before = written_once(tmp_path)
        cache.save(str(i), state)
        assert before.items() <= written_once(tmp_path).items()
    assert len({digest(state) for state in states}) == 4
    for look in (cache, PromptCache(tmp_path, kind)):
        for i, state in enumerate(states):
            assert digest(look.load(str(i))) == digest(state)
    assert not cache.verify().damaged
    again = [cache.save(str(i), state) for i, state in enumerate(states)]
    assert [(saved.blocks_written, saved.bytes_written) for saved in again] == [(0, 0)] * 4


@pytest.mark.parametrize("declared", [True, False])
def test_a_hundred_prompts_after_one_prefix_store_its_rows_once(
    declared: bool, tmp_path: Path
) -> None:
    prefix, draw = random_tokens(300, seed=4), random.Random(5)
    needed: set[tuple[int, ...]] = set()
    fed_again = 0
    for number in range(100):
        rest = [draw.randrange(4) for _ in range(draw.randrange(1, 9))]
        prompt = [*prefix, *(random_tokens(300, seed=6) if number == 50 else rest)]
        before = written_once(tmp_path)
        run = run_of("plain", tmp_path, prompt, boundaries=(300,) if declared else ())
        assert run.cached_tokens >= 300 or number == 0
        saved = PromptCache(tmp_path, "plain").keep(run.state())
        after = written_once(tmp_path)
        assert before.items() <= after.items()
        assert saved.bytes_written == size_of(after) - size_of(before)
        # A prompt that is a part of another has no logits yet: its last token is fed again.
        fed_again += bool(run.prefilled_tokens and tuple(prompt) in needed)
        needed |= {tuple(prompt[:n]) for n in range(1, len(prompt) + 1)}
        assert stored_rows(tmp_path) == len(needed) + fed_again
    assert fed_again < 25
    assert not PromptCache(tmp_path, "plain").verify().damaged
    assert run_of("plain", tmp_path, prompt).prefilled_tokens == 0


@pytest.mark.parametrize("kind", ["rotating", "recurrent", "hybrid"])
@pytest.mark.parametrize("declared", [True, False])
def test_where_layers_cannot_be_cut_a_prefix_that_was_kept_is_stored_once_as_well(
    kind: str, declared: bool, tmp_path: Path
) -> None:
    prefix = random_tokens(300, seed=4)
    if not declared:
        keep(kind, tmp_path, prefix)
    for number in range(20):
        before = written_once(tmp_path)
        run = run_of(kind, tmp_path, [*prefix, number, 1, 2], boundaries=(300,) if declared else ())
        assert run.cached_tokens == (0 if declared and number == 0 else 300)
        PromptCache(tmp_path, kind).keep(run.state())
        assert before.items() <= written_once(tmp_path).items()
        assert stored_rows(tmp_path) == 300 + 3 * (number + 1)


def test_a_longer_prompt_stores_only_its_own_rows(tmp_path: Path) -> None:
    whole = random_tokens(700, seed=7)
    for stop in (1, 2, 90, 256, 300, 512, 513, 700):
        before = written_once(tmp_path)
        keep("plain", tmp_path, whole[:stop])
        assert before.items() <= written_once(tmp_path).items()
        assert stored_rows(tmp_path) == stop


@pytest.mark.parametrize("kind", ["plain", "hybrid"])
def test_a_save_that_is_asked_for_mends_what_a_power_cut_left(kind: str, tmp_path: Path) -> None:
    prompt = random_tokens(300, seed=30)
    state = keep(kind, tmp_path, prompt, "prefix")
    runner = with_store(kind, tmp_path)
    read = runner.prefill(prompt)  # it knows the blocks that it came from
    for path in stored_files(tmp_path):
        path.write_bytes(path.read_bytes()[:-20] + bytes(20))  # rows that did not reach the drive
    assert runner.cache is not None
    runner.cache.save("prefix", read)
    runner.cache.save("prefix", state)
    again = with_store(kind, tmp_path).cache
    assert again is not None
    assert again.verify().damaged == ()
    assert digest(again.load("prefix")) == digest(state)


@pytest.mark.parametrize(("function", "directory"), [("open", SNAPSHOTS), ("open", NAMES)])
def test_nothing_is_deleted_while_what_stays_cannot_be_read(
    function: str, directory: str, tmp_path: Path
) -> None:
    prompt = random_tokens(300, seed=31)
    states = {name: keep("plain", tmp_path, prompt[:n], name) for name, n in (("a", 290), ("b", 9))}
    cache = with_store("plain", tmp_path).cache
    assert cache is not None
    with Shim(tmp_path) as shim:
        cache.clear([])
    calls = [c for c in shim.calls if c.function == function and c.path.startswith(directory)]
    assert len(calls) == 2
    before = written_once(tmp_path)
    for call in calls:
        with (
            Shim(tmp_path, Fault(call, errno.EIO, stays=True)) as shim,
            pytest.raises(StoreError, match="cannot be read"),
        ):
            cache.clear(["b"])
        assert shim.met
        assert written_once(tmp_path) == before
    assert digest(cache.load("a")) == digest(states["a"])
    assert digest(cache.load("b")) == digest(states["b"])
    cache.clear(["b"])


def test_saving_a_state_again_writes_nothing(tmp_path: Path) -> None:
    for kind in tiny.KINDS:
        state = keep(kind, tmp_path / kind, random_tokens(60, seed=8), boundaries=(20,))
        before = written_once(tmp_path / kind)
        cache = PromptCache(tmp_path / kind, kind)
        for cached in (state, run_of(kind, tmp_path / kind, state.tokens).state()):
            saved = cache.keep(cached)
            assert (saved.blocks_written, saved.bytes_written) == (0, 0)
        assert written_once(tmp_path / kind) == before


def test_a_boundary_is_kept_as_a_state_of_its_own(tmp_path: Path) -> None:
    prompt = random_tokens(300, seed=9)
    for kind in tiny.KINDS:
        keep(kind, tmp_path / kind, prompt, boundaries=(20, 256, 290))
        for boundary in (20, 256, 290):
            run = run_of(kind, tmp_path / kind, prompt[:boundary])
            assert (run.cached_tokens, run.prefilled_tokens) == (boundary, 0)
            assert_as_cold(run, kind, prompt[:boundary])


def test_a_state_whose_block_was_replaced_by_another_is_a_miss(tmp_path: Path) -> None:
    prompt = random_tokens(300, seed=10)
    state = keep("plain", tmp_path, prompt, "mine")
    other = with_other_bits(state)
    for path in files(tmp_path / BLOCKS):
        path.unlink()
    cache = PromptCache(tmp_path, "plain")
    with pytest.raises(DamagedFile, match="'mine' is damaged"):
        cache.load("mine")
    cache.save("other", other)
    for look in (cache, PromptCache(tmp_path, "plain")):
        with pytest.raises(DamagedFile, match="'mine' is damaged"):
            look.load("mine")
        assert digest(look.load("other")) == digest(other)
    run = run_of("plain", tmp_path, prompt)
    assert run.prefilled_tokens == 0
    assert digest(run.state().contents[-1].rows["keys"]) == digest(other.contents[-1].rows["keys"])


def test_a_run_that_is_kept_more_than_once_stores_only_its_new_rows(tmp_path: Path) -> None:
    runner = with_store("plain", tmp_path)
    assert runner.cache is not None
    run = runner.start(random_tokens(250, seed=10), sampling=SAMPLED)
    runner.cache.keep(run.state())
    for _ in range(4):
        before = written_once(tmp_path)
        list(run.steps(3))
        runner.cache.keep(run.prompt_state())
        saved = runner.cache.save("mine", run.state(), replace=True)
        assert saved.blocks_shared > 0
        assert before.items() <= written_once(tmp_path).items()
        assert stored_rows(tmp_path) == run.state().n_past
    assert digest(runner.cache.load("mine")) == digest(run.state())


def test_rows_whose_blocks_were_deleted_meanwhile_are_written_again(tmp_path: Path) -> None:
    whole = random_tokens(600, seed=10)
    keep("plain", tmp_path, whole[:550])
    run = run_of("plain", tmp_path, whole)
    here = Store(tmp_path)
    for stem in here.stems(BLOCKS)[1:]:
        here.remove(BLOCKS, stem)
    cache = PromptCache(tmp_path, "plain")
    state = run.state()
    cache.save("mine", state)
    assert digest(PromptCache(tmp_path, "plain").load("mine")) == digest(state)


def test_rows_whose_blocks_were_replaced_meanwhile_are_written_again(tmp_path: Path) -> None:
    whole = random_tokens(600, seed=10)
    keep("plain", tmp_path, whole[:550])
    run = run_of("plain", tmp_path, whole)
    shutil.rmtree(tmp_path)
    PromptCache(tmp_path, "plain").keep(with_other_bits(cold("plain", whole[:550])))
    state = run.state()
    PromptCache(tmp_path, "plain").save("mine", state)
    assert digest(PromptCache(tmp_path, "plain").load("mine")) == digest(state)


# Damage


@contextlib.contextmanager
def notices(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """The notices that are given while this lasts."""
    caplog.clear()
    found: list[str] = []
    yield found
    found += [r.getMessage() for r in caplog.records if r.name == "mlx_promptcache"]


def copied(pristine: Path, directory: Path) -> Path:
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(pristine, directory)
    return directory


def flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ (1 << (position % 8))]))


def survives(kind: str, directory: Path, prompt: Sequence[int], expected: list[int]) -> None:
    """A run says what it would without a cache; then it is kept, and the next one hits."""
    runner = with_store(kind, directory)
    run = runner.start(prompt, sampling=Sampling(seed=1))
    assert [step.token for step in run.steps(len(expected))] == expected
    assert runner.cache is not None
    runner.cache.keep(run.prompt_state())
    again = run_of(kind, directory, prompt)
    assert again.prefilled_tokens == 0
    assert likeliest(again.state()) == expected[0]


@pytest.mark.parametrize(
    ("kind", "length", "stride"), [("smallest", 10, 3), ("recurrent", 40, 197), ("hybrid", 40, 197)]
)
def test_one_flipped_byte_anywhere_changes_no_token_and_is_healed(
    kind: str, length: int, stride: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = random_tokens(length, seed=11, vocab=16)
    keep(kind, tmp_path, prompt)
    expected = likeliest(cold(kind, prompt))
    names = stored_files(tmp_path)
    flips = 0
    for path in names:
        whole = path.read_bytes()
        for position in range(0, len(whole), stride):
            flip(path, position)
            with notices(caplog) as found:
                if flips % 10 == 0 or stride > 3:
                    survives(kind, tmp_path, prompt, [expected])
                    for other in set(stored_files(tmp_path)) - set(names):
                        other.unlink()
                else:
                    (step,) = with_store(kind, tmp_path).generate(prompt, 1)
                    assert step.token == expected
            assert found, (path, position)
            assert "cannot be used" in found[0]
            path.write_bytes(whole)
            flips += 1
    assert flips == sum(-(-path.stat().st_size // stride) for path in names) > 50
    assert len(files(tmp_path / "quarantine")) == flips
    assert stored_files(tmp_path) == names


def test_one_flipped_byte_in_a_name_makes_it_a_miss(tmp_path: Path) -> None:
    pristine, damaged = tmp_path / "pristine", tmp_path / "damaged"
    state = keep("smallest", pristine, [1, 2, 3], "mine")
    size = (pristine / "names" / "mine").stat().st_size
    for position in range(size):
        flip(copied(pristine, damaged) / "names" / "mine", position)
        cache = PromptCache(damaged, "smallest")
        with pytest.raises(DamagedFile, match=r"'mine' is (damaged|lost)"):
            cache.load("mine")
        assert run_of("smallest", damaged, [1, 2, 3]).prefilled_tokens == 0
        assert "damaged" in [entry.status for entry in cache.list()]
        assert [damage.kind for damage in cache.verify().damaged] == ["names"]
        cache.save("mine", state)
        assert digest(cache.load("mine")) == digest(state)
        assert not cache.verify().damaged


@pytest.mark.parametrize("kept", [0, 40, -1])
def test_a_state_whose_snapshot_is_damaged_is_whole_again_when_it_is_saved_again(
    kept: int, tmp_path: Path
) -> None:
    """Whoever loads it is told to save it again: that must help."""
    saved = keep("plain", tmp_path, random_tokens(50, 1), "x")
    (snapshot,) = files(tmp_path / SNAPSHOTS)
    snapshot.write_bytes(snapshot.read_bytes()[:kept])
    cache = PromptCache(tmp_path, "plain")
    cache.save("x", saved, sync=False)
    assert digest(cache.load("x")) == digest(saved)


def test_a_state_whose_snapshot_cannot_be_read_is_not_told_to_be_saved(tmp_path: Path) -> None:
    saved = keep("plain", tmp_path, random_tokens(50, 1), "x")
    (snapshot,) = files(tmp_path / SNAPSHOTS)
    snapshot.unlink()
    snapshot.mkdir()
    with pytest.raises(StoreError, match="neither be written nor read"):
        PromptCache(tmp_path, "plain").save("x", saved, sync=False)


def test_a_flipped_byte_in_a_named_state_makes_it_a_miss(tmp_path: Path) -> None:
    pristine, damaged = tmp_path / "pristine", tmp_path / "damaged"
    keep("smallest", pristine, [1, 2, 3], "mine")
    for path in files(pristine):
        if path.suffix == ".safetensors":
            for position in range(0, path.stat().st_size, 37):
                target = copied(pristine, damaged) / path.relative_to(pristine)
                flip(target, position)
                cache = PromptCache(damaged, "smallest")
                assert len(cache.verify().damaged) >= 1
                assert len(cache.verify(["mine"]).damaged) >= 1
                with pytest.raises(DamagedFile, match="'mine' is damaged"):
                    cache.load("mine")


@pytest.mark.parametrize("kind", ["plain", "hybrid"])
def test_truncated_and_empty_files_are_misses(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = random_tokens(300, seed=12)
    pristine, damaged = tmp_path / "pristine", tmp_path / "damaged"
    keep(kind, pristine, prompt, boundaries=(100,))
    expected = likeliest(cold(kind, prompt))
    draw = random.Random(13)
    for path in written_once(pristine):
        size = path.stat().st_size
        for length in [0, 1, 7, 8, 9, 4096, *(draw.randrange(size) for _ in range(3)), size - 1]:
            target = copied(pristine, damaged) / path.relative_to(pristine)
            os.truncate(target, min(length, size - 1))
            with notices(caplog) as found:
                survives(kind, damaged, prompt, [expected])
            assert found or "-100-" in path.name  # the boundary's snapshot is not read


@pytest.mark.parametrize("kind", ["plain", "hybrid"])
def test_files_put_in_the_place_of_others_are_misses(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompt, other = random_tokens(300, seed=14), random_tokens(300, seed=15)
    pristine, damaged = tmp_path / "pristine", tmp_path / "damaged"
    for tokens in (prompt, other, prompt[:90]):
        keep(kind, pristine, tokens)
    expected = likeliest(cold(kind, prompt))
    names = [path.relative_to(pristine) for path in written_once(pristine)]
    noticed = 0
    for i, first in enumerate(names):
        for second in names[:i]:
            copied(pristine, damaged)
            (damaged / first).rename(damaged / "held")
            (damaged / second).rename(damaged / first)
            (damaged / "held").rename(damaged / second)
            assert len(PromptCache(damaged, kind).verify().damaged) >= 2
            with notices(caplog) as found:
                survives(kind, damaged, prompt, [expected])
            noticed += bool(found)
    assert noticed > len(names)


@main_kinds
def test_whatever_files_are_lost_the_rest_is_a_store(kind: str, tmp_path: Path) -> None:
    whole = random_tokens(600, seed=16)
    prompts = [whole[:70], whole[:300], whole, [*whole[:280], 1, 2, 3], [*whole[:70], 4]]
    pristine, rest = tmp_path / "pristine", tmp_path / "rest"
    for prompt in prompts:
        keep(kind, pristine, prompt, boundaries=(70,))
    for seed in range(12):
        draw = random.Random(seed)
        copied(pristine, rest)
        for path in files(rest):
            if draw.random() < 0.3:
                path.unlink()
        if seed % 3 == 0:
            shutil.rmtree(rest / draw.choice([BLOCKS, SNAPSHOTS, "names"]))
        prompt = prompts[seed % len(prompts)]
        run = run_of(kind, rest, prompt)
        assert_as_cold(run, kind, prompt)
        PromptCache(rest, kind).save("mine", run.state())
        assert run_of(kind, rest, prompt).prefilled_tokens == 0
        assert not PromptCache(rest, kind).verify(["mine"]).damaged


def test_files_of_somebody_else_are_passed_over(tmp_path: Path) -> None:
    prompt = random_tokens(300, seed=17)
    keep("plain", tmp_path, prompt, "mine")
    block = next((tmp_path / BLOCKS).rglob("*.safetensors"))
    for name in ("notes.txt", ".DS_Store", "x.safetensors", block.stem[:40] + ".safetensors"):
        for kind in (BLOCKS, SNAPSHOTS):
            shard = tmp_path / kind / block.stem[:2]
            shard.mkdir(exist_ok=True)
            (shard / name).write_bytes(b"not one of ours")
            (tmp_path / kind / name).write_bytes(b"not one of ours")
    (tmp_path / "names" / ".DS_Store").write_bytes(b"\xff\xfe")
    (tmp_path / BLOCKS / "zz").mkdir()
    assert run_of("plain", tmp_path, prompt).prefilled_tokens == 0
    cache = PromptCache(tmp_path, "plain")
    assert cache.load("mine").n_past == 300
    assert {entry.name for entry in cache.list()} >= {"mine"}


@pytest.mark.parametrize(
    "garbage", [b"", b"\xff\xfe\x00", b"{", b"[]\n", b"[1, 2]\n{}\n", b'"text"', b"x" * 5000]
)
def test_garbage_in_the_files_that_are_not_containers_is_no_matter(
    garbage: bytes, tmp_path: Path
) -> None:
    model = tiny.on_disk(tmp_path / "model")
    runner = Runner.load(str(model))
    assert runner.cache is not None
    runner.cache.save("hello", runner.prefill("Hello, world!"))
    assert Runner.load(str(model)).start("Hello, world!").prefilled_tokens == 0
    store = model / "prompt_cache"
    names = {path.name for path in store.iterdir() if path.is_file()}
    assert names == {"lock", "gate", "turn", "uses.jsonl"}
    for name in names:
        (store / name).write_bytes(garbage)
    again = Runner.load(str(model))
    assert again.start("Hello, world!").prefilled_tokens == 0
    assert again.cache is not None
    (entry,) = again.cache.list()
    assert (entry.name, entry.status) == ("hello", "ok")
    assert entry.hits in {0, 1}  # a last line that was cut short takes the next one with it
    assert not again.cache.verify().damaged


@pytest.mark.parametrize("kind", ["plain", "hybrid"])
@pytest.mark.parametrize("what", ["damaged", "lost"])
def test_a_process_that_found_a_file_bad_uses_it_again_after_it_was_healed(
    kind: str, what: str, tmp_path: Path
) -> None:
    prompt = random_tokens(300, seed=18)
    pristine, directory = tmp_path / "pristine", tmp_path / "store"
    seeded = Sampling(seed=1)  # what is kept again has the same name
    PromptCache(pristine, kind).keep(run_of(kind, pristine, prompt, sampling=seeded).state())
    for original in written_once(pristine):
        path = copied(pristine, directory) / original.relative_to(pristine)
        runner = with_store(kind, directory)
        assert runner.cache is not None
        assert runner.start(prompt).prefilled_tokens == 0
        if what == "damaged":
            flip(path, path.stat().st_size // 2)
        else:
            path.unlink()
        run = runner.start(prompt, sampling=seeded)
        assert run.prefilled_tokens > 0
        runner.cache.keep(run.state())
        assert runner.start(prompt).prefilled_tokens == 0
        assert run_of(kind, directory, prompt).prefilled_tokens == 0


def test_damaged_files_are_moved_aside_and_not_deleted(tmp_path: Path) -> None:
    prompt = random_tokens(30, seed=19)
    keep("plain", tmp_path, prompt)
    (block,) = (tmp_path / BLOCKS).rglob("*.safetensors")
    flip(block, 500)
    damaged = block.read_bytes()
    run_of("plain", tmp_path, prompt)
    assert not block.exists()
    (aside,) = (tmp_path / "quarantine").rglob("*.safetensors")
    assert aside.read_bytes() == damaged


@pytest.mark.parametrize("layer", [RotatingKVCache, ArraysCache])
@pytest.mark.parametrize("where", ["that", "this"])
def test_a_state_of_another_release_of_mlx_lm_is_a_miss_with_a_notice(
    layer: Any,
    where: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Layers of that release, or of this one, have an attribute that the others have not."""
    kind = "rotating" if layer is RotatingKVCache else "hybrid"
    prompt = random_tokens(60, seed=20)
    original = layer.__init__
    with_weights = model_of(kind)  # made before anything is patched

    def with_more(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.of_another_release = 3

    def runner() -> Runner:
        return Runner(with_weights, None, PromptCache(tmp_path, kind))

    for writing in (True, False):
        with monkeypatch.context() as patch:
            if writing == (where == "that"):
                patch.setattr(layer, "__init__", with_more)
            if writing:
                keep_with(runner(), prompt)
                continue
            with notices(caplog) as found:
                run = runner().start(prompt)
            assert run.cached_tokens == 0
            expected = "not those of this model" if kind == "rotating" else "of_another_release"
            assert any(expected in notice for notice in found)
            keep_with(runner(), prompt)
            assert runner().start(prompt).prefilled_tokens == 0


def test_a_named_state_that_does_not_fit_is_not_called_damaged(tmp_path: Path) -> None:
    """A release of mlx-lm may keep rows of another shape for the same model."""
    theirs = Runner(tiny.smallest(), None, PromptCache(tmp_path, "the same"))
    assert theirs.cache is not None
    theirs.cache.save("mine", theirs.prefill([1, 2, 3]))
    here = Runner(model_of("plain"), None, PromptCache(tmp_path, "the same"))
    assert here.cache is not None
    with pytest.raises(CacheMiss, match="does not fit") as error:
        here.cache.load("mine")
    assert type(error.value) is CacheMiss
    assert theirs.cache.load("mine").tokens == (1, 2, 3)


# Others at the same time


def saved_by_many(directory: str, writer: int) -> None:
    """What one of several writers does: the same prompts as the others, in another order."""
    whole = random_tokens(330, seed=21)
    prompts = [[*whole[:stop], *range(stop % 7)] for stop in range(30, 330, 30)]
    random.Random(writer).shuffle(prompts)
    runner = Runner(tiny.smallest())
    runner.cache = PromptCache(directory, "smallest")
    for prompt in prompts:
        state = runner.prefill([token % 16 for token in prompt])
        runner.cache.save(f"{writer}-{len(prompt)}", state, sync=False)


CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
import test_cache
test_cache.saved_by_many(sys.argv[2], int(sys.argv[3]))
"""


def assert_whole(directory: Path, writers: int) -> None:
    cache = PromptCache(directory, "smallest")
    report = cache.verify()
    assert report.files > 10
    assert not report.damaged
    entries = [entry for entry in cache.list() if entry.name]
    assert len(entries) == writers * 10
    assert {entry.status for entry in entries} == {"ok"}
    for entry in entries:
        state = cache.load(entry.snapshot)
        expected = cold("smallest", state.tokens)
        assert state.logits is not None
        assert expected.logits is not None
        assert mx.allclose(state.logits, expected.logits, atol=1e-3)
    left = [path for path in files(directory) if path.name.startswith(".tmp")]
    assert left == []


def test_processes_that_save_at_the_same_time_leave_a_whole_store(tmp_path: Path) -> None:
    tests = str(Path(__file__).parent)
    running = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, tests, tmp_path, str(writer)],
            env=processes.environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        for writer in range(2)
    ]
    for process in running:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    assert_whole(tmp_path, 2)


@pytest.mark.parametrize("kind", ["plain", "rotating", "recurrent", "hybrid"])
def test_a_state_of_one_thread_is_saved_by_another(kind: str, tmp_path: Path) -> None:
    cache = PromptCache(tmp_path, kind)
    runner = Runner(tiny.KINDS[kind](), None, cache)
    run = runner.start(random_tokens(300, 1), sampling=Sampling(seed=1))
    ended, _ = run.prompt_state(), list(run.steps(5))
    states = {"prompt": ended, "answer": run.state()}
    failed: list[Exception] = []

    def save() -> None:
        try:
            for name, state in states.items():
                cache.save(name, state)
        except Exception as exc:  # noqa: BLE001 - a thread's own would be lost
            failed.append(exc)

    thread = threading.Thread(target=save)
    thread.start()
    thread.join()
    assert not failed
    for name, state in states.items():
        assert digest(cache.load(name)) == digest(state)


def test_threads_that_save_at_the_same_time_leave_a_whole_store(tmp_path: Path) -> None:
    """MLX runs in one thread; the states are made before, and written by several."""
    whole = [token % 16 for token in random_tokens(330, seed=21)]
    states = [cold("smallest", whole[:stop]) for stop in range(30, 330, 30)]
    for state in states:
        mx.eval([a for layer in state.contents for a in layer.rows.values()])
    ready = threading.Barrier(3)
    failed: list[BaseException] = []

    def write(writer: int) -> None:
        cache = PromptCache(tmp_path, "smallest")
        mine = states[:]
        random.Random(writer).shuffle(mine)
        ready.wait()
        try:
            for state in mine:
                cache.save(f"{writer}-{state.n_past}", state, sync=False)
        except BaseException as exc:  # noqa: BLE001 - told in the test's own thread
            failed.append(exc)

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert_whole(tmp_path, 3)


def test_a_store_that_is_locked_is_a_miss_on_the_way_and_an_error_when_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(locks, "LOCK_SECONDS", 0.05)
    prompt = random_tokens(30, seed=22)
    state = keep("plain", tmp_path, prompt, "mine")
    cache = PromptCache(tmp_path, "plain")
    with (tmp_path / "lock").open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with notices(caplog) as found:
            run = run_of("plain", tmp_path, prompt)
        assert run.cached_tokens == 0
        assert run.match is not None
        assert "in use by another process" in str(run.match.reason)
        assert len(found) == 1
        for ask in (
            lambda: cache.load("mine"),
            lambda: cache.save("other", state),
            lambda: cache.clear(["mine"]),
            cache.list,
        ):
            with pytest.raises(CacheLocked):
                ask()
    assert cache.load("mine").n_past == 30
    with (tmp_path / "lock").open("rb") as reader:
        fcntl.flock(reader, fcntl.LOCK_SH)
        assert cache.load("mine").n_past == 30
        with pytest.raises(CacheLocked):
            cache.clear(["mine"])


# Read only


def everything(directory: Path) -> dict[Path, Any]:
    found: dict[Path, Any] = {}
    for path in [directory, *directory.rglob("*")]:
        status = path.stat()
        used = status.st_atime_ns if path.suffix == ".safetensors" else 0
        times = (status.st_mtime_ns, used)
        content = path.read_bytes() if path.is_file() else b""
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        found[path] = (status.st_ino, status.st_mode, status.st_size, times, content)
    return found


def test_a_read_only_cache_writes_nothing_at_all(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = random_tokens(300, seed=23)
    state = keep("hybrid", tmp_path, whole, "mine", boundaries=(100,))
    keep("hybrid", tmp_path, whole[:100], "damaged")
    for stem in Store(tmp_path).stems(SNAPSHOTS):
        if "-100-" in stem:
            flip(Store(tmp_path).path(SNAPSHOTS, stem), 400)
    before = everything(tmp_path)
    runner = with_store("hybrid", tmp_path, read_only=True)
    cache = runner.cache
    assert cache is not None
    with notices(caplog) as found:
        for prompt in (whole, whole[:100], [*whole, 1], [*whole[:50], 1], [9, 9]):
            assert_as_cold(runner.start(prompt), "hybrid", prompt)
            runner.cache = cache
            cache.match(prompt)
            cache.fetch(model_of("hybrid"), prompt)
    assert "is passed over" in found[0]
    assert digest(cache.load("mine")) == digest(state)
    with pytest.raises(CacheMiss):
        cache.load("damaged")
    assert len(cache.list()) >= 2
    assert cache.verify().damaged
    for name in ("mine", None, "new"):
        with pytest.raises(StoreError, match="read-only"):
            cache.save(name, state, replace=True)
    with pytest.raises(StoreError, match="read-only"):
        cache.clear(["mine"])
    assert everything(tmp_path) == before


def test_a_read_only_cache_makes_no_directory(tmp_path: Path) -> None:
    runner = with_store("plain", tmp_path / "store", read_only=True)
    runner.start([1, 2, 3])
    assert runner.cache is not None
    assert runner.cache.list() == []
    assert not (tmp_path / "store").exists()


# Management


def test_the_list_tells_what_there_is(tmp_path: Path) -> None:
    whole = random_tokens(300, seed=24)
    states = {
        "short": keep("plain", tmp_path, whole[:256], "short"),
        "long": keep("plain", tmp_path, whole, "long"),
    }
    run_of("plain", tmp_path, whole)
    run_of("plain", tmp_path, whole)
    cache = PromptCache(tmp_path, "plain")
    entries = {entry.name: entry for entry in cache.list()}
    assert set(entries) == {"short", "long"}
    for name, entry in entries.items():
        assert (entry.tokens, entry.status, entry.reason) == (states[name].n_past, "ok", None)  # type: ignore[index]
        assert entry.raw_bytes == states[name].nbytes  # type: ignore[index]
        assert entry.last_used >= entry.created > 0
    assert (entries["long"].hits, entries["short"].hits) == (2, 1)  # once to compute the other
    sizes = size_of(written_once(tmp_path))
    assert entries["long"].shared_bytes == entries["short"].shared_bytes > 0
    assert sum(e.bytes for e in entries.values()) + entries["long"].shared_bytes == sizes


def test_what_is_cleared_frees_only_what_nothing_else_uses(tmp_path: Path) -> None:
    whole = random_tokens(300, seed=25)
    short = keep("plain", tmp_path, whole[:256], "short")
    keep("plain", tmp_path, whole, "long")
    cache = PromptCache(tmp_path, "plain")
    before = size_of(written_once(tmp_path))
    with pytest.raises(CacheMiss, match="no state named 'none'"):
        cache.clear(["long", "none"])
    assert cache.load("long").n_past == 300
    plan = cache.clear(["long"])
    after = size_of(written_once(tmp_path))
    assert plan.freed_bytes == before - after > 0
    assert (plan.names, len(plan.snapshots), len(plan.blocks)) == (("long",), 1, 1)
    with pytest.raises(CacheMiss):
        cache.load("long")
    assert digest(cache.load("short")) == digest(short)
    assert cache.match(whole).position == 256
    cache.clear(["short"])
    assert written_once(tmp_path) == {}
    assert cache.list() == []
    assert cache.match(whole).position == 0


def test_a_state_with_two_names_is_cleared_with_the_last_of_them(tmp_path: Path) -> None:
    state = keep("plain", tmp_path, [1, 2, 3], "one")
    cache = PromptCache(tmp_path, "plain")
    cache.save("two", state)
    cache.clear(["one"])
    assert digest(cache.load("two")) == digest(state)
    cache.clear(["two"])
    assert written_once(tmp_path) == {}


def test_a_state_that_is_saved_while_one_looks_is_not_taken_for_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who looks shares the lock with who saves: a name may come after the snapshots were listed."""
    state = keep("plain", tmp_path, random_tokens(40, 1), "x")
    cache = PromptCache(tmp_path, "plain")
    fresh = iter("abcd")
    names = Names.all

    def saved_meanwhile(self: Names) -> dict[str, str]:
        other = replace(state, rng=mx.random.key(ord(name := next(fresh))))
        PromptCache(tmp_path, "plain").save(name, other, sync=False)
        return names(self)

    monkeypatch.setattr(Names, "all", saved_meanwhile)
    assert cache.verify().damaged == ()
    assert {entry.status for entry in cache.list()} == {"ok"}


def test_verify_reads_every_byte_and_names_what_is_wrong(tmp_path: Path) -> None:
    keep("plain", tmp_path, random_tokens(300, seed=26), "mine")
    keep("plain", tmp_path, random_tokens(40, seed=27), "yours")
    cache = PromptCache(tmp_path, "plain")
    whole = cache.verify()
    assert not whole.damaged
    assert whole.bytes == size_of(written_once(tmp_path))
    assert whole.files == len(written_once(tmp_path)) == 5
    flip(Store(tmp_path).path(SNAPSHOTS, Store(tmp_path).names.all()["yours"]), 2000)
    assert [(d.kind, d.reason != "") for d in cache.verify().damaged] == [("snapshots", True)]
    assert not cache.verify(["mine"]).damaged
    assert len(cache.verify(["yours"]).damaged) == 1
    with pytest.raises(CacheMiss):
        cache.verify(["none"])
    assert len(written_once(tmp_path)) == 5


# With mlx-lm's own loop


def theirs(
    kind: str, prompt: Sequence[int], layers: list[Any], count: int
) -> tuple[list[int], list[int]]:
    """Generate with mlx-lm; return the tokens, and those that the layers then hold."""
    fed = mx.array(list(prompt))
    steps = generate_step(fed, model_of(kind), max_tokens=count, prompt_cache=layers)
    tokens = [token for token, _ in steps]
    return tokens, [*prompt, *tokens]


@every_kind
def test_mlx_lm_says_the_same_with_what_was_fetched(kind: str, tmp_path: Path) -> None:
    model, prompt = model_of(kind), random_tokens(90, seed=28)
    straight, _ = theirs(kind, prompt, make_layers(model, KVSettings()), 24)
    cache = PromptCache(tmp_path, kind)
    layers, rest = cache.fetch(model, prompt)
    assert rest == prompt
    first, held = theirs(kind, rest, layers, 12)
    cache.store(model, held, layers)
    assert first == straight[:12]

    follow_up = [*held, *straight[12:14]]
    layers, rest = PromptCache(tmp_path, kind).fetch(model, follow_up)
    assert rest == straight[12:14]
    second, held_now = theirs(kind, rest, layers, 5)
    assert second == straight[14:19]
    assert PromptCache(tmp_path, kind).store(model, follow_up + held_now[2:], layers).snapshot


@every_kind
def test_fetching_leaves_at_least_one_token_to_process(kind: str, tmp_path: Path) -> None:
    model, prompt = model_of(kind), random_tokens(60, seed=28)
    keep(kind, tmp_path, prompt, boundaries=(40,))
    straight, _ = theirs(kind, prompt, make_layers(model, KVSettings()), 5)
    least = 1 if kind in {"plain", "rotating"} else 20
    for tokens, left in [(prompt, least), ([*prompt, 1, 2], 2)]:
        layers, rest = PromptCache(tmp_path, kind).fetch(model, tokens)
        assert len(rest) == left
        assert rest == tokens[-left:]
    layers, rest = PromptCache(tmp_path, kind).fetch(model, prompt)
    assert theirs(kind, rest, layers, 5)[0] == straight


def test_fetched_layers_do_not_change_what_is_fetched_next(tmp_path: Path) -> None:
    model, prompt = model_of("plain"), random_tokens(60, seed=28)
    keep("plain", tmp_path, prompt)
    cache = PromptCache(tmp_path, "plain")
    said = []
    for _ in range(3):
        layers, rest = cache.fetch(model, [*prompt, 7])
        said.append(theirs("plain", rest, layers, 10)[0])
    assert said[0] == said[1] == said[2]


def test_stream_generate_says_the_same_with_a_cache(tmp_path: Path) -> None:
    model, tokenizer, *_ = mlx_lm.load(str(tiny.on_disk(tmp_path / "model")))
    cache = PromptCache(tmp_path / "store", "tiny")
    history = tokenizer.encode("Question: what is two plus two? Answer:")
    plain = [
        r.token for r in mlx_lm.stream_generate(model, tokenizer, mx.array(history), max_tokens=8)
    ]
    for turn in range(3):
        layers, rest = cache.fetch(model, history)
        assert len(rest) == (len(history) if turn == 0 else 1)
        said = [
            r.token
            for r in mlx_lm.stream_generate(
                model, tokenizer, mx.array(rest), max_tokens=8, prompt_cache=layers
            )
        ]
        assert said == plain
        cache.store(model, [*history, *said], layers)
    assert not cache.verify().damaged


def test_what_is_stored_again_is_not_written_again(tmp_path: Path) -> None:
    for kind in tiny.KINDS:
        model, prompt = model_of(kind), random_tokens(40, seed=29)
        before: dict[Path, Any] = {}
        for turn in range(3):
            cache = PromptCache(tmp_path / kind, kind)
            layers = make_layers(model, KVSettings())
            _, held = theirs(kind, prompt, layers, 5)
            cache.store(model, held, layers)
            now = written_once(tmp_path / kind)
            assert turn == 0 or now == before
            before = now


def test_only_new_rows_are_stored_of_layers_that_were_fetched(tmp_path: Path) -> None:
    model, whole = model_of("plain"), random_tokens(400, seed=30)
    cache = PromptCache(tmp_path, "plain")
    for stop in (300, 350, 400):
        before = written_once(tmp_path)
        layers, rest = cache.fetch(model, whole[:stop])
        mx.eval(model(mx.array(rest)[None], cache=layers))
        cache.store(model, whole[:stop], layers)
        assert before.items() <= written_once(tmp_path).items()
        assert stored_rows(tmp_path) == stop


def test_storing_refuses_what_the_layers_do_not_hold(tmp_path: Path) -> None:
    model, prompt = model_of("plain"), random_tokens(40, seed=29)
    layers = make_layers(model, KVSettings())
    mx.eval(model(mx.array(prompt)[None], cache=layers))
    cache = PromptCache(tmp_path, "plain")
    for tokens in (prompt[:-1], [*prompt, 1]):
        with pytest.raises(UnsupportedLayer, match="hold 40: give"):
            cache.store(model, tokens, layers)
    with pytest.raises(UnsupportedLayer):
        cache.store(model, prompt, layers[:1])
    with pytest.raises(UnsupportedLayer):
        cache.store(model_of("nested"), prompt, layers)
    with pytest.raises(UnsupportedLayer):
        cache.store(model, [], layers)
    with pytest.raises(UnsupportedLayer):
        cache.store(model, [], make_layers(model, KVSettings()))
    assert not files(tmp_path)


def test_quantised_layers_are_stored_and_fetched(tmp_path: Path) -> None:
    model, prompt = model_of("plain"), random_tokens(60, seed=31)
    cache = PromptCache(tmp_path, "plain", kv=KV8)

    def said(rest: Sequence[int], layers: list[Any], count: int) -> list[int]:
        steps = generate_step(
            mx.array(list(rest)), model, max_tokens=count, prompt_cache=layers,
            kv_bits=8, kv_group_size=32, quantized_kv_start=0,
        )  # fmt: skip
        return [token for token, _ in steps]

    layers, rest = cache.fetch(model, prompt)
    first = said(rest, layers, 6)
    cache.store(model, [*prompt, *first], layers)
    for look in (cache, PromptCache(tmp_path, "plain", kv=KV8)):
        layers, rest = look.fetch(model, [*prompt, *first, 9])
        assert rest == [9]
        assert len(said(rest, layers, 3)) == 3
    runner = Runner(model, None, cache, kv=KV8)
    assert runner.start([*prompt, *first, 9]).cached_tokens == 66


def test_layers_of_other_kv_settings_are_not_stored(tmp_path: Path) -> None:
    model, prompt = model_of("plain"), random_tokens(60, seed=31)
    layers = make_layers(model, KVSettings())
    mx.eval(model(mx.array(prompt)[None], cache=layers))
    quantised = [layer.to_quantized(32, 8) for layer in layers]
    with pytest.raises(UnsupportedLayer, match="KV"):
        PromptCache(tmp_path, "plain").store(model, prompt, quantised)
    with pytest.raises(UnsupportedLayer, match="KV"):
        PromptCache(tmp_path, "plain", kv=KV8).store(model, prompt, layers)
    with pytest.raises(UnsupportedLayer, match="KV"):
        PromptCache(tmp_path, "plain", kv=KVSettings(4, 32, 0)).store(model, prompt, quantised)


def test_states_take_the_settings_that_they_were_made_with(tmp_path: Path) -> None:
    runner = with_store("plain", tmp_path)
    list(runner.generate([1, 2, 3], 4, SAMPLED))
    assert runner.cache is not None
    runner.cache.save("mine", runner.state)
    loaded = PromptCache(tmp_path, "plain").load("mine")
    assert loaded.sampling == replace(SAMPLED, seed=None)
    assert bits(loaded.rng) == bits(runner.state.rng)
    assert loaded.nbytes == runner.state.nbytes
    assert loaded.tokens == runner.state.tokens
    assert loaded.embedding is not None
    assert runner.state.embedding is not None
    assert bits(loaded.embedding) == bits(runner.state.embedding)


@pytest.mark.parametrize(
    "junk", [{"temp": -1}, {"temp": "hot"}, {"top_k": 2.5}, {"logit_bias": {"seven": 1}}], ids=str
)
def test_a_state_whose_settings_make_no_sense_is_damaged(
    junk: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = random_tokens(40, seed=2)
    with monkeypatch.context() as patch:
        patch.setattr(Sampling, "to_json", lambda self: junk)
        keep("plain", tmp_path, prompt, "hot")
    with pytest.raises(DamagedFile, match="settings make no sense"):
        PromptCache(tmp_path, "plain").load("hot")
    assert_as_cold(run_of("plain", tmp_path, prompt), "plain", prompt)


AT_THE_END = """
import atexit, sys, threading
sys.path.insert(0, sys.argv[1])
from mlx_promptcache import PromptCache, Runner
from tiny import random_tokens, smallest
runner = Runner(smallest(), None, PromptCache(sys.argv[2], "smallest"))
states = [runner.prefill(random_tokens(600, seed=seed, vocab=16)) for seed in (1, 2)]
def save():
    threading.main_thread().join()  # what makes threads is shut down by then
    runner.cache.save("thread", states[0])
threading.Thread(target=save).start()
atexit.register(lambda: runner.cache.save("exit", states[1]))
"""


def test_states_are_saved_while_a_process_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-c", AT_THE_END, str(Path(__file__).parent), str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    cache = PromptCache(tmp_path, "smallest")
    assert [cache.load(name).n_past for name in ("thread", "exit")] == [600, 600]
