"""The long trials: each is found by its name, and says what came of it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

import processes
from conftest import ROOT
from outcome import Outcome, parser

if TYPE_CHECKING:
    from collections.abc import Sequence

SCRIPT = ROOT / "scripts" / "trials.py"
HELD = Outcome("faults", 1, {"calls": 1200, "seconds": 1.25})
BROKEN = Outcome("faults", 1, {"calls": 2}, ["a wrong token"] * 30)


def called(*arguments: str) -> subprocess.CompletedProcess[str]:
    command: Sequence[str] = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=processes.environment()
    )


def test_every_trial_is_told_with_what_it_tries() -> None:
    names = {path.stem.removeprefix("trial_") for path in (ROOT / "tests").glob("trial_*.py")}
    asked = called("--help")
    lines = [line.split(maxsplit=1) for line in asked.stdout.splitlines()[2:]]
    assert asked.returncode == 0
    assert {line[0] for line in lines} == names
    assert {len(line) for line in lines} <= {2}


@pytest.mark.parametrize("arguments", [(), ("no-such-trial",)])
def test_a_trial_that_is_not_there_is_wrong_usage(arguments: tuple[str, ...]) -> None:
    done = called(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: scripts/trials NAME")
    assert "Traceback" not in done.stderr


def test_an_outcome_is_one_line_and_its_exit_code_says_whether_all_held(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert HELD.tell(as_json=False) == 0
    assert capsys.readouterr().out == "faults: seed 1: 1,200 calls, 1.2 seconds; 0 wrong\n"
    assert BROKEN.tell(as_json=False) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines == [*["a wrong token"] * 20, "faults: seed 1: 2 calls; 30 wrong"]


def test_an_outcome_as_json_has_all_that_went_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert BROKEN.tell(as_json=True) == 1
    told = json.loads(capsys.readouterr().out)
    assert told == {
        "trial": "faults", "seed": 1, "figures": {"calls": 2}, "wrong": ["a wrong token"] * 30,
    }  # fmt: skip


def test_all_trials_take_a_seed_and_can_answer_in_json() -> None:
    options = parser("faults", "What it tries.").parse_args(["--seed", "7", "--json"])
    assert (options.seed, options.json) == (7, True)
