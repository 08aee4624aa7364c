"""Odd surroundings: clocks that jump, stores that move, names in two cases, crowded directories."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import trial_surroundings
from inspection import Inspector, command
from mlx_promptcache import facts
from mlx_promptcache.errors import CacheMiss, StoreError
from mlx_promptcache.names import NAMES
from mlx_promptcache.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable

YEAR = 365 * 86400
FILES = 2000


@pytest.fixture
def inspector(tmp_path: Path) -> Inspector:
    """A store of two states, one of which has a name."""
    inspector = Inspector(tmp_path / "store", "smallest")
    first, second = inspector.known[:2]
    inspector.cache().save("a name", inspector.runner.prefill(first.prompt), sync=False)
    inspector.cache().keep(inspector.runner.prefill(second.prompt))
    return inspector


def assert_sound(inspector: Inspector) -> None:
    assert inspector.what_is_wrong() == []
    for known in inspector.known[:2]:
        assert inspector.wrong_answers(known, drawn=True) == []
    assert inspector.load("a name") is not None


# Clocks


@pytest.mark.parametrize("years", [-40, -1, 1, 40])
def test_a_clock_that_jumps_costs_no_state_that_has_a_name(
    inspector: Inspector, monkeypatch: pytest.MonkeyPatch, years: int
) -> None:
    now, now_ns = time.time, time.time_ns
    monkeypatch.setattr(time, "time", lambda: now() + years * YEAR)
    monkeypatch.setattr(time, "time_ns", lambda: now_ns() + years * YEAR * 10**9)
    assert_sound(inspector)
    third = inspector.known[2]
    inspector.cache().save("later", inspector.runner.prefill(third.prompt), sync=False)
    assert inspector.cache().match(third.prompt).exact
    assert command("list", inspector.directory)[0] == 0
    assert command("prune", inspector.directory, "--max-size", "0")[0] == 0
    assert {entry.name for entry in inspector.cache().list()} == {"a name", "later"}
    assert_sound(inspector)


@pytest.mark.parametrize("seconds", [0, 2**31 + YEAR, 4 * 10**9])
def test_files_of_any_time_are_used_listed_and_pruned(inspector: Inspector, seconds: int) -> None:
    for path in inspector.directory.rglob("*"):
        os.utime(path, (seconds, seconds))
    assert_sound(inspector)
    assert command("show", inspector.directory, "a name")[0] == 0
    assert len(inspector.cache().prune(0).snapshots) == 1
    assert_sound(inspector)


def test_what_was_used_in_the_future_is_not_older_than_a_day(inspector: Inspector) -> None:
    tomorrow = time.time() + 86400
    for path in inspector.directory.rglob("*.safetensors"):
        os.utime(path, (tomorrow, tomorrow))
    assert command("clear", inspector.directory, "--older-than", "1d", "--yes")[0] == 0
    assert len(inspector.cache().list()) == 2


# Places


def test_a_list_tells_of_the_store_that_is_there_and_not_of_the_one_that_was(
    inspector: Inspector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a list remembers is kept under the path of a store."""
    monkeypatch.setattr(facts, "WORTH_KEEPING", 0)
    monkeypatch.setattr(facts, "SETTLED_NS", 0)
    before = command("list", inspector.directory, "--json")
    moved = tmp_path / "elsewhere" / "store"
    moved.parent.mkdir()
    inspector.directory.rename(moved)
    assert command("list", moved, "--json") == before
    other = Inspector(inspector.directory, "smallest")
    other.cache().save("another", other.runner.prefill(other.known[2].prompt), sync=False)
    told = command("list", other.directory)[1]
    assert "another" in told
    assert "a name" not in told
    inspector.directory = moved
    assert_sound(inspector)


# Names in two cases


def test_no_file_of_ours_is_told_from_another_by_its_case(inspector: Inspector) -> None:
    there = [path.relative_to(inspector.directory) for path in inspector.directory.rglob("*")]
    ours = [str(path) for path in there if path.parts[0] != NAMES]
    assert len(ours) > 8
    assert [path for path in ours if path != path.lower()] == []


@pytest.fixture
def folding(inspector: Inspector, monkeypatch: pytest.MonkeyPatch) -> Inspector:
    """The store on a file system to which names in two cases are one. Names alone are folded: no
    other file of ours has a capital letter.
    """
    names = inspector.directory / NAMES
    if sys.version_info < (3, 11) and not (names / "A NAME").exists():
        pytest.skip("pathlib does not call what is patched here")

    def folded(path: Any) -> Any:
        if not isinstance(path, (str, Path)) or Path(path).parent != names:
            return path
        wanted = Path(path).name.casefold()
        there = os.listdir(names)  # noqa: PTH208 - `Path` asks what is patched here
        return next((str(names / n) for n in there if n.casefold() == wanted), path)

    def patched(call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **more: call(*map(folded, args), **more)

    for name in ("open", "stat", "lstat", "replace", "unlink"):
        monkeypatch.setattr(os, name, patched(getattr(os, name)))
    return inspector


def test_where_two_cases_are_one_name_nothing_is_lost_unasked(folding: Inspector) -> None:
    other = folding.runner.prefill(folding.known[2].prompt)
    with pytest.raises(StoreError, match="another state named"):
        folding.cache().save("A Name", other, sync=False)
    assert_sound(folding)
    folding.cache().save("A Name", other, replace=True, sync=False)
    assert folding.cache().load("a name").tokens == folding.known[2].prompt
    assert folding.cache().load("A NAME").tokens == folding.known[2].prompt
    assert list(Store(folding.directory).names.all()) == ["a name"]
    assert folding.what_is_wrong() == []


def test_where_two_cases_are_one_name_it_is_cleared_as_it_is_listed(folding: Inspector) -> None:
    with pytest.raises(CacheMiss, match="`list` shows those that are"):
        folding.cache().clear(["A NAME"])
    assert_sound(folding)
    folding.cache().clear(["a name"])
    assert folding.load("A NAME") is None


# Crowded directories


def test_a_crowded_directory_is_searched_listed_and_pruned() -> None:
    """The long form is `scripts/trials surroundings`."""
    outcome = trial_surroundings.tried(FILES, 1)
    assert outcome.wrong == []
    assert outcome.figures["files of others left"] == FILES // 2
