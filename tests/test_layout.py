"""Where the files of a store are: from stems to paths and back, and what stood elsewhere once."""

from __future__ import annotations

import errno
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_promptcache import PromptCache, Runner, container, layout, privacy
from mlx_promptcache.deletion import execute
from mlx_promptcache.errors import StoreError
from mlx_promptcache.eviction import Eviction
from mlx_promptcache.facts import Facts
from mlx_promptcache.files import SUFFIX
from mlx_promptcache.store import BLOCKS, SNAPSHOTS, TOKENIZERS, Store
from mlx_promptcache.tree import BlockName, SnapshotName
from shim import Fault, Shim
from tiny import digest, random_tokens, smallest

FIXED = settings(derandomize=True, deadline=None, max_examples=200)
KEYS = st.text("0123456789abcdef", min_size=32, max_size=32)
IDS = st.text("0123456789abcdef", min_size=16, max_size=16)
BLOCK_STEMS = st.builds(
    lambda shard, a, token, b, variant: str(BlockName(shard, a, token, b, variant)),
    KEYS.map(lambda key: key[:2]), KEYS, st.integers(0, 2**32 - 1), KEYS, st.just("") | IDS,
)  # fmt: skip
SNAPSHOT_STEMS = st.builds(
    lambda g, offset, n, own: str(SnapshotName(g, offset, n, own)),
    KEYS, st.integers(0, 255), KEYS, IDS,
)  # fmt: skip
STEMS = st.one_of(
    st.tuples(st.just(BLOCKS), BLOCK_STEMS),
    st.tuples(st.just(SNAPSHOTS), SNAPSHOT_STEMS),
    st.tuples(st.just(TOKENIZERS), KEYS.map(lambda key: f"{key[:2]}/{key}")),
)


@FIXED
@given(STEMS)
def test_a_path_says_which_stem_it_is_of(named: tuple[str, str]) -> None:
    kind, stem = named
    for path in layout.paths(kind, stem):
        directory, _, name = path.partition("/")
        assert layout.stem(kind, directory, name) == stem
        assert layout.is_directory(kind, directory)
    assert layout.paths(kind, stem)[-1] == f"{stem}{SUFFIX}"
    directory, _, name = layout.paths(kind, stem)[0].partition("/")
    elsewhere = directory[:-1] + ("1" if directory[-1] == "0" else "0")
    assert kind == TOKENIZERS or layout.stem(kind, elsewhere, name) is None
    assert layout.stem(kind, directory, f"{name}x") is None


@FIXED
@given(STEMS)
def test_whatever_begins_a_stem_long_enough_says_its_directory(named: tuple[str, str]) -> None:
    kind, stem = named
    parts = stem.split("-")
    enough = {BLOCKS: 2, SNAPSHOTS: 1, TOKENIZERS: 1}[kind]
    for count in range(enough, len(parts) + 1):
        start = "-".join(parts[:count]) + ("-" if count < len(parts) else "")
        assert set(layout.directories(kind, stem)) <= set(layout.directories(kind, start))


def test_a_block_and_a_snapshot_are_where_the_format_says() -> None:
    key = "a2" + 30 * "0"
    assert layout.directories(BLOCKS, f"3f/{key}-1234567-{key}") == ["3fa27", "3f"]  # 0x12d687
    assert layout.directories(SNAPSHOTS, f"3f/{key}-88-{key}-{16 * '0'}") == ["3f0b", "3f"]


# What stood elsewhere once


@pytest.fixture
def cache(tmp_path: Path) -> PromptCache:
    """Some states, two of which leave a third inside a cell."""
    cache = PromptCache(tmp_path / "store", "smallest")
    runner, prefix = Runner(smallest(), None, cache), random_tokens(300, seed=1, vocab=16)
    cache.save("prefix", runner.prefill(prefix))
    for seed in (2, 3):
        draw = random_tokens(20, seed=seed, vocab=16)
        cache.save(f"question {seed}", runner.prefill(prefix + draw))
    return cache


def as_once(directory: Path) -> None:
    """Move every file to where it stood once."""
    store = Store(directory)
    for kind in (BLOCKS, SNAPSHOTS):
        for stem in store.stems(kind):
            former = directory / kind / f"{stem}{SUFFIX}"
            former.parent.mkdir(exist_ok=True)
            store.path(kind, stem).rename(former)
        for place in (directory / kind).iterdir():
            if len(place.name) > 2:
                place.rmdir()


def everything(directory: Path) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*"))


def states(cache: PromptCache) -> dict[str, Any]:
    """What a fresh look at a store finds."""
    fresh, store = PromptCache(cache.directory, "smallest"), Store(cache.directory)
    held = {entry.name: fresh.load(str(entry.name)) for entry in fresh.list()}
    return {
        "held": {name: digest(state) for name, state in held.items()},
        "exact": [fresh.match(state.tokens).exact for state in held.values()],
        "in part": fresh.match([*held["question 2"].tokens[:310], 15, 15]).position,
        "list": sorted((entry.name, entry.status, entry.bytes) for entry in fresh.list()),
        "verified": (fresh.verify().files, fresh.verify().damaged),
        "stems": [store.stems(kind) for kind in (BLOCKS, SNAPSHOTS)],
        "files": [{s: f.size for s, f in store.files(k).items()} for k in (BLOCKS, SNAPSHOTS)],
    }


def test_what_stands_where_it_once_did_is_used_as_it_is(cache: PromptCache) -> None:
    expected = states(cache)
    assert expected["exact"] == [True, True, True]
    as_once(cache.directory)
    before = everything(cache.directory)
    assert states(cache) == expected
    assert everything(cache.directory) == before


def test_what_is_added_to_what_stood_there_is_found_beside_it(cache: PromptCache) -> None:
    as_once(cache.directory)
    before = {path: path.stat().st_ino for path in cache.directory.rglob("*.safetensors")}
    warm = Runner(smallest(), None, PromptCache(cache.directory, "smallest"))
    assert warm.cache is not None
    tokens = [*cache.load("question 2").tokens[:310], *random_tokens(9, seed=4, vocab=16)]
    saved = warm.cache.save("another", warm.prefill(tokens))
    assert saved.blocks_shared >= 2
    assert warm.cache.match(tokens).exact
    after = {path: path.stat().st_ino for path in cache.directory.rglob("*.safetensors")}
    assert before.items() < after.items()
    again = warm.cache.save("again", cache.load("question 3"))
    assert again.blocks_written == 0


def test_what_stood_there_goes_as_all_else_does(cache: PromptCache) -> None:
    as_once(cache.directory)
    fresh = PromptCache(cache.directory, "smallest")
    fresh.clear(["question 2"])
    assert sorted(str(entry.name) for entry in fresh.list()) == ["prefix", "question 3"]
    fresh.clear(["question 3", "prefix"])
    left = everything(cache.directory)
    assert [path for path in left if path.startswith((f"{BLOCKS}/", f"{SNAPSHOTS}/"))] == []


def test_a_file_that_is_in_both_places_is_one_and_goes_from_both(cache: PromptCache) -> None:
    expected, store = states(cache), Store(cache.directory)
    for kind in (BLOCKS, SNAPSHOTS):
        for stem in store.stems(kind):
            former = cache.directory / kind / f"{stem}{SUFFIX}"
            former.parent.mkdir(exist_ok=True)
            shutil.copy(store.path(kind, stem), former)
    assert states(cache) == expected
    PromptCache(cache.directory, "smallest").clear(["prefix", "question 2", "question 3"])
    assert list(cache.directory.rglob("*.safetensors")) == []


def test_a_link_where_files_once_were_is_not_followed(cache: PromptCache, tmp_path: Path) -> None:
    expected, store = states(cache), Store(cache.directory)
    stem = store.stems(BLOCKS)[0]
    (tmp_path / "away").mkdir()
    shutil.copy(store.path(BLOCKS, stem), tmp_path / "away")
    (cache.directory / BLOCKS / stem[:2]).symlink_to(tmp_path / "away")
    for path in (tmp_path / "away").iterdir():
        path.chmod(0o644)
    before = [(path, path.stat().st_mode) for path in (tmp_path / "away").iterdir()]
    assert states(cache) == expected
    store.remove(BLOCKS, stem)
    assert not store.exists(BLOCKS, stem)
    assert store.write(BLOCKS, stem, container.pack("block", {}, {}, {}))
    PromptCache(cache.directory, "smallest").clear(["prefix", "question 2", "question 3"])
    assert [(path, path.stat().st_mode) for path in (tmp_path / "away").iterdir()] == before


def test_a_link_where_a_file_is_now_does_not_hide_where_it_once_was(
    cache: PromptCache, tmp_path: Path
) -> None:
    as_once(cache.directory)
    expected, store = states(cache), Store(cache.directory)
    stem = store.stems(BLOCKS)[0]
    (tmp_path / "away").mkdir()
    shutil.copy(store.path(BLOCKS, stem), tmp_path / "away")
    (cache.directory / BLOCKS / layout.directories(BLOCKS, stem)[0]).symlink_to(tmp_path / "away")
    assert states(cache) == expected
    assert store.remove(BLOCKS, stem) > 0
    assert not store.exists(BLOCKS, stem)
    assert len(list((tmp_path / "away").iterdir())) == 1


def test_what_cannot_be_asked_for_is_not_taken_for_deleted(cache: PromptCache) -> None:
    store = Store(cache.directory)
    stem = store.stems(BLOCKS)[0]
    path = store.path(BLOCKS, stem).relative_to(cache.directory).as_posix()
    with Shim(cache.directory) as shim:
        store.path(BLOCKS, stem).lstat()
    call = next(call for call in shim.calls if (call.function, call.path) == ("stat", path))
    with (
        Shim(cache.directory, Fault(call, errno.EIO)),
        pytest.raises(StoreError, match="cannot delete"),
    ):
        store.remove(BLOCKS, stem)
    assert store.exists(BLOCKS, stem)


def test_to_plan_an_eviction_each_directory_is_listed_once(cache: PromptCache) -> None:
    as_once(cache.directory)
    store = Store(cache.directory)
    for name in ("prefix", "question 2", "question 3"):
        store.names.remove(name)
    with Shim(cache.directory) as shim:
        order = list(Eviction(Facts(store)).order())
    listed = Counter(c.path for c in shim.calls if c.function in {"listdir", "scandir"})
    assert len(order) > 2 * len([path for path in listed if "/" in path])
    assert max(listed.values()) == 2  # once for all that is there, once for the plan


# Directories that come and go


def test_directories_that_the_quarantine_left_go_when_all_is_cleared(cache: PromptCache) -> None:
    store = Store(cache.directory)
    for stem in store.stems(BLOCKS):
        assert store.quarantine(BLOCKS, stem)
    (cache.directory / BLOCKS / "somebody's").mkdir()
    store.clear_traces()
    assert [path.name for path in (cache.directory / BLOCKS).iterdir()] == ["somebody's"]


def test_a_write_that_fails_leaves_no_directory(
    cache: PromptCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, before = Store(cache.directory), everything(cache.directory)

    def refuse(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", refuse)
        with pytest.raises(StoreError, match="No space left"):
            store.write(BLOCKS, "3f/3f00-7-9a00", container.pack("block", {}, {}, {}))
    assert everything(cache.directory) == before


def test_a_directory_that_goes_before_a_file_is_written_is_made_again(
    cache: PromptCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, make = Store(cache.directory), privacy.make_directory
    made: list[Path] = []

    def gone(path: str | os.PathLike[str]) -> None:
        make(path)
        if Path(path).name == "3f3f7" and not made:
            made.append(Path(path))
            Path(path).rmdir()

    monkeypatch.setattr(privacy, "make_directory", gone)
    assert store.write(BLOCKS, "3f/3f00-7-9a00", container.pack("block", {}, {}, {}))
    assert made
    assert store.header(BLOCKS, "3f/3f00-7-9a00").kind == "block"


def test_what_evicting_frees_is_what_is_free_then(cache: PromptCache) -> None:
    cache.keep(Runner(smallest()).prefill(random_tokens(280, seed=9, vocab=16)))
    cache.keep(Runner(smallest()).prefill(random_tokens(40, seed=10, vocab=16)))
    store = Store(cache.directory)
    littered = store.path(BLOCKS, Eviction(Facts(store)).plan(1 << 40).blocks[0]).parent
    (littered / ".DS_Store").write_bytes(b"somebody's")
    before, plan = store.taken(), Eviction(Facts(store)).plan(1 << 40)
    with store.exclusive():
        execute(store, plan)
    assert plan.snapshots
    assert plan.freed_on_disk == before - store.taken()
    assert littered.is_dir()
