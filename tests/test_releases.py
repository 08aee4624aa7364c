"""scripts/releases: which releases are compared, and what counts as wrong."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest

from conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))

import releases

KNOWN = ["1.0.0", "0.32.2", "0.32.0", "0.31.3", "0.31.1", "0.30.7"]
SOUND = {"wrong": [], "bits": True, "equal tokens": True, "difference": 0.0}


@pytest.mark.parametrize(
    ("version", "older"),
    [("1.0.0", "0.32.2"), ("0.32.2", "0.31.3"), ("0.32.0", "0.31.3"), ("0.31.3", "0.30.7")],
)
def test_the_release_before_is_the_newest_of_the_series_before(version: str, older: str) -> None:
    assert releases.before(version, KNOWN) == older


def one_way(**case: Any) -> list[dict[str, Any]]:
    """Answers of the three parts of one way, the second with a case that is as it should not be."""
    filled: dict[str, Any] = {"versions": {"mlx-lm": "1", "mlx": "2"}, "draws": "a", "cases": []}
    read = {**filled, "sound": True, "cases": [{"case": "plain", **SOUND}]}
    there = copy.deepcopy(read)
    there["cases"][0] |= case
    return [filled, there, read]


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ({}, "ok, same bits"),
        ({"bits": False, "difference": 2e-6}, "ok, same tokens, 2e-06"),
        ({"bits": False, "equal tokens": False}, "ok, other tokens"),
        ({"bits": False, "difference": 3.2}, "read, another model: 3"),
        ({"no cache": "why"}, "no cache"),
    ],
)
def test_what_is_read_as_it_was_written_is_not_wrong(
    case: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert releases.report(one_way(**case)) == []
    printed = capsys.readouterr().out
    assert f"plain  {said} " in printed
    assert ("plain: why" in printed) == ("no cache" in case)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [(["read", "exact"], "WRONG"), (["refused: it is damaged"], "REFUSED")],
)
def test_what_is_refused_or_read_otherwise_is_wrong(
    wrong: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (sentence,) = releases.report(one_way(wrong=wrong))
    assert sentence == f"plain, read by mlx-lm 1 on mlx 2: {', '.join(wrong)}"
    assert f"plain  {said} " in capsys.readouterr().out


def test_a_store_that_a_side_finds_damaged_is_wrong() -> None:
    answers = one_way()
    answers[2]["sound"] = False
    (sentence,) = releases.report(answers)
    assert "damaged or stale" in sentence
