"""Many processes at one store."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import trial_many
from nursery import Nursery

if TYPE_CHECKING:
    from pathlib import Path

PROCESSES, SECONDS, SEED = 4, 6.0, 1


def test_each_of_many_processes_says_what_it_would_say_alone() -> None:
    """The long form is `scripts/trials many`."""
    outcome = trial_many.tried(PROCESSES, SECONDS, SEED)
    assert outcome.wrong == [], outcome.line()
    assert outcome.figures["deeds"] > PROCESSES


def test_a_process_that_says_nothing_is_told_and_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial_many, "SILENCE", 1.0)
    crowd = trial_many.Crowd(tmp_path / "store", SEED)
    with Nursery("nursery") as nursery:
        monkeypatch.setattr(crowd, "_job", lambda number, seconds: {"what": "stay"})
        crowd.run(nursery, 1, SECONDS)
    assert len(crowd.wrong) == 1
    assert crowd.wrong[0].endswith("was silent for 1.0 seconds")
