"""mlx-lm's prompt cache in memory, a store below it: what is found, where, and what is kept."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache

import tiny
from known import model_of
from mlx_promptcache import Match, PromptCache, tiers
from mlx_promptcache.backlog import Backlog
from mlx_promptcache.blueprint import Blueprint
from mlx_promptcache.fingerprint import KVSettings
from mlx_promptcache.layers import live_arrays, quantise
from mlx_promptcache.supply import Supply
from mlx_promptcache.tiers import Below, Tiers, Tokens

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

KEY = ("a model", None, None)
LONG = tiny.random_tokens(300, 5)


@pytest.fixture
def backlog() -> Iterator[Backlog]:
    made = Backlog()
    yield made
    assert made.close(10) == 0


class Remote(Supply):
    """A remote that has nothing, and tells what was asked of it."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.closed = threading.Event()

    def bring(self, root: str, tokens: Sequence[int], position: int) -> None:
        self.asked.append(position)

    def close(self) -> None:
        self.closed.wait(0.1)  # what is on its way takes a while
        self.closed.set()


def tiers_of(kind: str, directory: Path, backlog: Backlog, max_size: int = 10) -> Tiers:
    """As a server has them that has just begun."""
    model = model_of(kind)
    cache = PromptCache(directory, kind)
    cache.blueprint = Blueprint.of(model, cache.kv)
    tiers = Tiers(max_size, backlog)
    tiers.below = Below(KEY, model, cache)
    return tiers


def fed(model: Any, tokens: list[int], layers: list[Any] | None = None) -> list[Any]:
    layers = layers or make_prompt_cache(model)
    model(mx.array([tokens]), cache=layers)
    mx.eval(live_arrays(layers))
    return layers


def insert(tiers: Tiers, tokens: list[int], namespace: str = "") -> None:
    """Insert a state, and wait until it is written."""
    assert tiers.below is not None
    written = threading.Event()
    tiers.hold(written.set)
    tiers.insert_cache(KEY, Tokens(tokens, namespace), fed(tiers.below.model, tokens))
    assert written.wait(10)


def found(tiers: Tiers, tokens: list[int], namespace: str = "") -> int:
    """How many tokens are found; the rest goes on from there as it would from the beginning."""
    layers, rest = tiers.fetch_nearest_cache(KEY, Tokens(tokens, namespace))
    assert len(rest) > 0
    assert list(tokens[len(tokens) - len(rest) :]) == list(rest)
    if layers is not None and tiers.below is not None:
        model = tiers.below.model
        here = model(mx.array([list(rest)]), cache=layers)[0, -1]
        alone = model(mx.array([tokens]), cache=make_prompt_cache(model))[0, -1]
        assert mx.allclose(here, alone, atol=1e-2)
    return len(tokens) - len(rest)


@pytest.mark.parametrize("kind", ["plain", "rotating", "recurrent", "hybrid", "nested"])
def test_what_was_inserted_is_found_by_the_next_process(
    kind: str, tmp_path: Path, backlog: Backlog
) -> None:
    insert(tiers_of(kind, tmp_path / "store", backlog), LONG[:280])
    assert found(tiers_of(kind, tmp_path / "store", backlog), LONG) == 280


@pytest.mark.parametrize("length", [90, 130])
def test_quantised_layers_are_found_as_they_were(
    length: int, tmp_path: Path, backlog: Backlog
) -> None:
    model, kv = model_of("plain"), KVSettings(bits=8, group_size=32, quantized_start=100)
    cache = PromptCache(tmp_path / "store", "plain", kv=kv)
    cache.blueprint = Blueprint.of(model, kv)
    tiers = Tiers(10, backlog)
    tiers.below = Below(KEY, model, cache)
    layers = fed(model, LONG[:length])
    quantise(layers, kv)
    written = threading.Event()
    tiers.hold(written.set)
    tiers.insert_cache(KEY, Tokens(LONG[:length]), layers)
    assert written.wait(10)
    fresh = Tiers(10, backlog)
    fresh.below = tiers.below
    restored, rest = fresh.fetch_nearest_cache(KEY, Tokens(LONG[: length + 1]))
    assert rest == LONG[length : length + 1]
    assert restored is not None
    assert [type(layer) for layer in restored] == [type(layer) for layer in layers]


def test_a_remote_is_asked_once_for_a_prompt(tmp_path: Path, backlog: Backlog) -> None:
    tiers = tiers_of("plain", tmp_path / "store", backlog)
    insert(tiers, LONG[:100])
    tiers = tiers_of("plain", tmp_path / "store", backlog)
    assert tiers.below is not None
    tiers.below.cache.supply = remote = Remote()
    assert found(tiers, LONG) == 100
    assert remote.asked == [100]


def test_at_the_end_what_is_on_its_way_to_a_remote_is_waited_for(
    tmp_path: Path, backlog: Backlog
) -> None:
    below = tiers_of("plain", tmp_path / "store", backlog).below
    assert below is not None
    caches = [below.of(Tokens(LONG, namespace)) for namespace in ("", "mine", "yours")]
    remotes = [Remote() for _ in caches]
    for cache, remote in zip(caches, remotes, strict=True):
        cache.supply = remote
    below.finish_sending()
    assert [remote.closed.is_set() for remote in remotes] == [True] * 3


def test_the_cache_of_a_namespace_is_made_once_while_it_is_used(
    tmp_path: Path, backlog: Backlog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiers, "MOST_NAMESPACES", 2)
    below = tiers_of("plain", tmp_path / "store", backlog).below
    assert below is not None
    first, second = (below.of(Tokens(LONG, namespace)) for namespace in ("mine", "yours"))
    assert first is below.of(Tokens(LONG, "mine")) is not second
    second.supply = remote = Remote()
    below.of(Tokens(LONG, "theirs"))  # there is no room for three
    assert remote.closed.wait(10)
    assert first is below.of(Tokens(LONG, "mine"))
    assert second is not below.of(Tokens(LONG, "yours"))


def test_the_deeper_of_memory_and_disk_wins(tmp_path: Path, backlog: Backlog) -> None:
    first, second = (tiers_of("plain", tmp_path / "store", backlog) for _ in range(2))
    insert(first, LONG[:100])
    insert(second, LONG[:200])
    assert found(first, LONG) == 200
    second.below = None
    assert found(second, LONG) == 200
    assert found(second, LONG[:150]) == 149


def test_nothing_is_read_that_memory_has_as_well(
    tmp_path: Path, backlog: Backlog, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiers = tiers_of("plain", tmp_path / "store", backlog)
    insert(tiers, LONG[:100])
    asked: list[int] = []
    restore = PromptCache.restore

    def counted(*args: Any, **kwargs: Any) -> Any:
        asked.append(1)
        return restore(*args, **kwargs)

    monkeypatch.setattr(PromptCache, "restore", counted)
    assert (found(tiers, LONG), asked) == (100, [])
    assert found(tiers_of("plain", tmp_path / "store", backlog), LONG) == 100
    assert asked == [1]


def test_memory_serves_where_the_disk_does_not_keep_its_word(
    tmp_path: Path, backlog: Backlog, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiers = tiers_of("plain", tmp_path / "store", backlog)
    insert(tiers, LONG[:50])
    tiers.below, below = None, tiers.below
    tiers.insert_cache(KEY, Tokens(LONG[:100]), fed(model_of("plain"), LONG[:100]))
    tiers.below = below
    monkeypatch.setattr(PromptCache, "match", lambda *_, **__: Match(200, False, None, None))
    assert found(tiers, LONG) == 100


def test_what_memory_let_go_of_is_still_on_disk(tmp_path: Path, backlog: Backlog) -> None:
    tiers = tiers_of("plain", tmp_path / "store", backlog, max_size=1)
    for seed in (1, 2):
        insert(tiers, tiny.random_tokens(90, seed))
    assert len(tiers) == 1
    assert found(tiers, [*tiny.random_tokens(90, 1), 3]) == 90


@pytest.mark.parametrize("kind", ["plain", "recurrent"])
def test_a_prompt_that_is_there_whole_leaves_a_token_to_begin_with(
    kind: str, tmp_path: Path, backlog: Backlog
) -> None:
    tiers = tiers_of(kind, tmp_path / "store", backlog)
    insert(tiers, LONG[:60])
    insert(tiers, LONG[:80])
    assert found(tiers, LONG[:80]) == (79 if kind == "plain" else 60)


def test_namespaces_find_nothing_of_each_other_in_memory_or_on_disk(
    tmp_path: Path, backlog: Backlog
) -> None:
    tiers = tiers_of("plain", tmp_path / "store", backlog)
    insert(tiers, LONG[:90], "one")
    fresh = tiers_of("plain", tmp_path / "store", backlog)
    for each in (tiers, fresh):
        assert found(each, LONG, "one") == 90
        assert found(each, LONG, "other") == found(each, LONG) == 0
    tiers.below = None  # what is in memory
    assert found(tiers, LONG, "one") == 90
    assert found(tiers, LONG, "other") == found(tiers, LONG) == 0


def test_tokens_keep_their_namespace_however_they_are_cut() -> None:
    tokens = Tokens([1, 2, 3], "one")
    parts = [tokens[:2], tokens[:], tokens[1:]]
    parts[0] += [4]
    parts[1].append(5)
    assert parts == [[1, 2, 4], [1, 2, 3, 5], [2, 3]]
    assert {part.namespace for part in parts} == {"one"}
    assert tokens[0] == 1


def test_tokens_that_do_not_say_whose_they_are_are_neither_found_nor_kept(
    tmp_path: Path, backlog: Backlog
) -> None:
    tiers = tiers_of("plain", tmp_path / "store", backlog)
    calls: list[int] = []
    tiers.hold(lambda: calls.append(1))
    tiers.insert_cache(KEY, LONG[:50], fed(model_of("plain"), LONG[:50]))
    assert (len(tiers), calls) == (0, [1])
    insert(tiers, LONG[:50])
    assert tiers.fetch_nearest_cache(KEY, LONG) == (None, LONG)


def test_states_of_images_stay_in_memory(tmp_path: Path, backlog: Backlog) -> None:
    tiers, calls = tiers_of("plain", tmp_path / "store", backlog), []
    tiers.hold(lambda: calls.append(1))
    image = Tokens([1, -7, -7, 2])
    tiers.insert_cache(KEY, image, fed(model_of("plain"), [1, 2, 2, 2]))
    assert (len(tiers), calls) == (1, [1])
    assert tiers.fetch_nearest_cache(KEY, [*image, 3])[1] == [1, -7, -7, 2, 3]  # a plain list
    assert len(tiers.fetch_nearest_cache(KEY, Tokens([*image, 3]))[1]) == 1
    assert not (tmp_path / "store").exists()


def test_another_model_than_the_one_that_is_loaded_has_memory_only(
    tmp_path: Path, backlog: Backlog
) -> None:
    tiers = tiers_of("plain", tmp_path / "store", backlog)
    insert(tiers, LONG[:50])
    layers, rest = tiers.fetch_nearest_cache("another", Tokens(LONG))
    assert (layers, len(rest)) == (None, len(LONG))
    tiers.insert_cache("another", Tokens(LONG[:99]), fed(model_of("plain"), LONG[:99]))
    assert found(tiers_of("plain", tmp_path / "store", backlog), LONG) == 50


def test_layers_that_lack_the_last_tokens_are_kept_as_what_they_hold(
    tmp_path: Path, backlog: Backlog
) -> None:
    model = model_of("plain")
    tiers = tiers_of("plain", tmp_path / "store", backlog)
    layers = fed(model, LONG[:50])
    layers[1].trim(1)  # as those of a draft model
    tiers.insert_cache(KEY, Tokens(LONG[:51]), layers)
    assert [layer.offset for layer in layers] == [49, 49]
    assert found(tiers, LONG) == 49


def test_layers_that_hold_something_else_are_not_kept(tmp_path: Path, backlog: Backlog) -> None:
    tiers = tiers_of("plain", tmp_path / "store", backlog)
    calls: list[int] = []
    tiers.hold(lambda: calls.append(1))
    tiers.insert_cache(KEY, Tokens(LONG[:50]), fed(model_of("plain"), LONG[:30]))
    assert (len(tiers), calls) == (0, [1])


def test_a_shared_prefix_is_written_once_whatever_passes_computed_it(
    tmp_path: Path, backlog: Backlog
) -> None:
    model, cache = model_of("plain"), PromptCache(tmp_path / "store", "plain")
    tiers = tiers_of("plain", tmp_path / "store", backlog)
    insert(tiers, LONG[:280])
    before = {path: path.stat().st_size for path in cache.directory.rglob("blocks/*/*")}
    layers = fed(model, LONG[100:280], fed(model, LONG[:100]))
    more = fed(model, [7, 8], layers)
    written = threading.Event()
    fresh = tiers_of("plain", tmp_path / "store", backlog)
    fresh.hold(written.set)
    fresh.insert_cache(KEY, Tokens([*LONG[:280], 7, 8]), more)
    assert written.wait(10)
    after = {path: path.stat().st_size for path in cache.directory.rglob("blocks/*/*")}
    assert before.items() <= after.items()
    assert len(after) == len(before) + 1


def test_a_store_that_is_in_nobodys_way_when_it_fails(
    tmp_path: Path, backlog: Backlog, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    tiers = tiers_of("plain", tmp_path / "store", backlog)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("broken")

    monkeypatch.setattr(PromptCache, "restore", fail)
    assert found(tiers, LONG) == 0
    assert "the prompt cache is not used: RuntimeError: broken" in caplog.text
