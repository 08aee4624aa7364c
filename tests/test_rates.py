"""Rates: a prompt is computed where reading it takes longer, and reading is tried again."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import pytest

import tiny
from mlx_promptcache import PromptCache, Runner, places
from mlx_promptcache.files import Reader
from mlx_promptcache.rates import FORGET, LEAST_BYTES, LEAST_TOKENS, WAIT_SECONDS, Rates

if TYPE_CHECKING:
    from pathlib import Path

MB = 1_000_000


@pytest.fixture(autouse=True)
def _nothing_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "user_cache", lambda: tmp_path / "user")


def rates(tmp_path: Path, *, read: float | None, computed: float | None) -> Rates:
    """Rates that were measured once: bytes and tokens a second."""
    found = Rates(tmp_path / "store", "model")
    if read is not None:
        found.note_read(LEAST_BYTES, LEAST_BYTES / read)
    if computed is not None:
        found.note_computed(LEAST_TOKENS, LEAST_TOKENS / computed)
    return found


@pytest.mark.parametrize(
    ("read", "computed", "slower"),
    [
        (1 * MB, 1000.0, True),  # 100 s against 2 s
        (100 * MB, 1000.0, False),  # 1 s against 2 s
        (30 * MB, 1000.0, False),  # 3.3 s against 2 s: not twice as long
        (None, 1000.0, False),
        (1 * MB, None, False),
    ],
)
def test_reading_is_left_alone_where_it_is_known_to_take_much_longer(
    read: float | None, computed: float | None, slower: bool, tmp_path: Path
) -> None:
    known = rates(tmp_path, read=read, computed=computed)
    assert known.reading_is_slower(100 * MB, 2000) is slower


def test_a_wait_that_nobody_notices_is_no_reason(tmp_path: Path) -> None:
    known = rates(tmp_path, read=100 * MB, computed=1e6)
    bytes_read = int(100 * MB * WAIT_SECONDS * 0.9)
    assert not known.reading_is_slower(bytes_read, 10)
    assert known.reading_is_slower(2 * bytes_read, 10)


def test_rates_are_of_one_store_and_one_model(tmp_path: Path) -> None:
    rates(tmp_path, read=1 * MB, computed=1000.0)
    assert not Rates(tmp_path / "other", "model").reading_is_slower(100 * MB, 2000)
    assert not Rates(tmp_path / "store", "another").reading_is_slower(100 * MB, 2000)


def test_reading_is_tried_again_after_it_was_left_alone_some_times(tmp_path: Path) -> None:
    known = rates(tmp_path, read=10 * MB, computed=1000.0)  # 10 s against 2 s
    answers = [known.reading_is_slower(100 * MB, 2000) for _ in range(6)]
    times = sum(10 / FORGET**n > 4 for n in range(6))
    assert answers == [True] * times + [False] * (6 - times)
    assert 0 < times < 6


def test_little_says_nothing(tmp_path: Path) -> None:
    known = Rates(tmp_path / "store", "model")
    known.note_read(LEAST_BYTES - 1, 100.0)
    known.note_computed(LEAST_TOKENS - 1, 1e-6)
    known.note_computed(LEAST_TOKENS, 0.0)
    assert not places.rates_memo().exists()


@pytest.mark.parametrize("text", ["", "[]", "{", '{"read": "x"}', "[" * 100_000, "null"])
def test_a_memo_that_makes_no_sense_is_forgotten(text: str, tmp_path: Path) -> None:
    places.rates_memo().parent.mkdir(parents=True)
    places.rates_memo().write_text(text)
    assert not Rates(tmp_path / "store", "model").reading_is_slower(100 * MB, 2000)
    known = rates(tmp_path, read=1 * MB, computed=1000.0)
    assert known.reading_is_slower(100 * MB, 2000)
    assert len(json.loads(places.rates_memo().read_text())) == 2


def test_a_prompt_in_a_slow_store_is_computed_and_the_miss_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_promptcache.rates.LEAST_BYTES", 1)
    prompt = tiny.random_tokens(600, seed=1)
    model = tiny.plain()

    def runner() -> Runner:
        return Runner(model, None, PromptCache(tmp_path / "store", "plain"))

    first = runner()
    state = first.prefill(prompt)
    assert first.cache is not None
    first.cache.keep(state)
    whole = Reader.read_into

    def slowly(self: Reader, *args: Any) -> int:
        time.sleep(0.2)
        return whole(self, *args)

    monkeypatch.setattr(Reader, "read_into", slowly)
    assert runner().start([*prompt, 1]).cached_tokens == 600  # nothing was known of the store
    run = runner().start([*prompt, 2])
    assert run.cached_tokens == 0
    assert run.match is not None
    assert run.match.reason == "it is stored, but here it is sooner computed than read"
    assert run.match.stored == 600
