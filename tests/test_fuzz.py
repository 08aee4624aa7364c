"""Hostile inputs for everything that reads files: the short form of `scripts/trials fuzz`."""

from __future__ import annotations

import importlib.util
import random
from typing import TYPE_CHECKING

import pytest

import trial_fuzz
from trial_fuzz import changed, seeds, try_one

if TYPE_CHECKING:
    from collections.abc import Iterator

INPUTS = 6_000
SEED = 1


@pytest.fixture(autouse=True)
def _own_store(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield
    trial_fuzz.forget()


def test_every_seed_is_read() -> None:
    refused = {data[:1] for data in seeds() if try_one(data)}
    assert refused <= {b"\x06", b"\x07"}  # a stem is no name of a user's, a statistic no stem
    assert {data[0] for data in seeds()} >= {0, 1, 2, 5, 6, 7, 8}


def test_whatever_is_read_is_read_or_refused_in_a_sentence() -> None:
    draw, known = random.Random(SEED), seeds()
    refused = sum(try_one(changed(draw.choice(known), draw)) for _ in range(INPUTS))
    assert INPUTS // 4 < refused < INPUTS * 9 // 10


def test_the_trial_says_what_it_lacks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert trial_fuzz.main([]) == 2
    assert "pip install '.[fuzz]'" in capsys.readouterr().err
