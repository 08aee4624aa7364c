"""How much a store may take: sizes as people write them, and the defaults of a drive."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_promptcache import PromptCache
from mlx_promptcache.budget import MAX_SIZE, MIN_FREE, Budget, Drive, parse_size
from mlx_promptcache.errors import StoreError

GB = 10**9


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("20GB", 20 * GB), ("500m", 500 * 10**6), ("1.5 GiB", 3 << 29), ("0", 0), ("7B", 7),
        (" 12 kb ", 12_000), ("2TiB", 2 << 40), ("1048576", 1 << 20),
    ],
)  # fmt: skip
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "-1", "1e9", "20XB", "1,5GB", "20GB!", "I", "1iB", "9" * 400]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size such as"):
        parse_size(text)


def test_by_default_a_store_takes_a_tenth_of_what_would_be_free_without_it() -> None:
    budget = Budget()
    assert budget.limit(Drive(1000 * GB, 100 * GB), taken=0) == 10 * GB
    assert budget.limit(Drive(1000 * GB, 90 * GB), taken=10 * GB) == 10 * GB
    assert budget.limit(Drive(1000 * GB, 900 * GB), taken=0) == 20 * GB


def test_by_default_automatic_states_leave_a_gigabyte_or_a_twentieth_of_a_small_drive() -> None:
    assert Budget().floor(Drive(1000 * GB, 0)) == GB
    assert Budget().floor(Drive(8 * GB, 0)) == 400 * 10**6
    assert Budget(min_free=7).floor(Drive(8 * GB, 0)) == 7


def test_what_is_given_comes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MAX_SIZE, "3GB")
    monkeypatch.setenv(MIN_FREE, "1MB")
    assert Budget.chosen() == Budget(3 * GB, 10**6)
    assert Budget.chosen(5) == Budget(5, 10**6)
    assert Budget.chosen(0).limit(Drive(GB, GB), 9) == 0


def test_an_environment_that_makes_no_sense_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(MAX_SIZE, "plenty")
    with pytest.raises(StoreError, match=r"MLX_PROMPTCACHE_MAX_SIZE: 'plenty' is not a size"):
        PromptCache(tmp_path, "tiny")
    with pytest.raises(ValueError, match="must not be negative"):
        PromptCache(tmp_path, "tiny", max_bytes=-1)


def test_a_drive_that_cannot_be_asked_is_not_short(tmp_path: Path) -> None:
    assert Drive.of(tmp_path).free > 0
    drive = Drive.of(tmp_path / "missing")
    assert Budget().limit(drive, 0) == 20 * GB
    assert Budget().floor(drive) < drive.free
