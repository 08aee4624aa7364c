"""Processes that are killed in the middle of what they do with a store."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest

import trial_kill
from inspection import leftovers
from known import known
from mlx_promptcache import PromptCache
from mlx_promptcache.store import BLOCKS, Store
from nursery import Nursery
from trial_kill import Patient

KILLS, SEED = 40, 1
MORE_THAN_ALL = 1000  # calls


def test_whoever_comes_after_a_process_that_was_killed_finds_all_well() -> None:
    """The long form is `scripts/trials kill`."""
    outcome = trial_kill.tried(KILLS, SEED, kinds=("smallest", "hybrid"))
    assert outcome.wrong == [], outcome.line()
    assert outcome.figures["kills"] == KILLS
    assert outcome.figures["of these between two deeds"] < KILLS / 4


# What kills, and what looks


@pytest.mark.parametrize("forks", [True, False])
def test_a_nursery_tells_what_its_processes_say_and_how_they_end(forks: bool) -> None:
    with Nursery("nursery", forks=forks) as nursery:
        pid = nursery.start(what="stay")
        assert next(nursery.notes(60))["ready"]
        nursery.kill(pid)
        assert os.WTERMSIG(nursery.wait(pid)[-1]["ended"]) == signal.SIGKILL
        pid = nursery.start(what="end")
        assert nursery.wait(pid)[0] | {"at": 0} == {"pid": pid, "done": True, "at": 0}
        assert "ValueError: fail" in nursery.wait(nursery.start(what="fail"))[0]["wrong"]


def test_a_process_is_killed_at_the_call_that_was_named(tmp_path: Path) -> None:
    """The bytes of a file are half written at some of them."""
    prompts = [[list(k.prompt), list(k.greedy), list(k.drawn)] for k in known("smallest")]
    job: dict[str, Any] = {
        "kind": "smallest",
        "known": prompts,
        "seed": 1,
        "what": "keep",
        "before": 0,
        "budget": trial_kill.BUDGET,
    }
    ended, torn = [], 0
    with Nursery("deeds") as nursery:
        for last in (*range(1, 40, 3), MORE_THAN_ALL):
            store = tmp_path / str(last)
            pid = nursery.start(**job, store=str(store), last=last)
            ended.append(nursery.wait(pid)[-1]["ended"])
            torn += leftovers(store)
    assert set(ended[:-1]) == {signal.SIGKILL}
    assert ended[-1] == 0
    assert torn


@pytest.fixture
def patient(tmp_path: Path) -> Patient:
    """A store with a state that was promised."""
    patient = Patient(tmp_path, "smallest")
    state = patient.inspector.runner.prefill(patient.inspector.known[1].prompt)
    patient.inspector.cache().save("prompt 1", state, sync=False)
    deed = {"what": "save", "prompt": 1, "name": "prompt 1", "said": 0, "exact": False}
    patient.hear({"begin": "save", "deed": deed})
    patient.hear({"end": "save", "answer": "saved"})
    return patient


def found_wrong(patient: Patient) -> list[str]:
    return list(patient.look(random.Random(1)))


def test_nothing_is_wrong_with_a_store_that_is_sound(patient: Patient) -> None:
    assert found_wrong(patient) == []


def test_a_promised_state_that_is_gone_is_wrong(patient: Patient) -> None:
    patient.inspector.cache().clear(["prompt 1"])
    assert found_wrong(patient) == ["'prompt 1' was saved, and is gone"]


def test_a_state_that_was_being_cleared_may_be_gone_or_not(patient: Patient) -> None:
    patient.hear({"begin": "clear", "deed": {"what": "clear", "name": "prompt 1"}})
    assert found_wrong(patient) == []
    patient.hear({"begin": "clear", "deed": {"what": "clear", "name": "prompt 1"}})
    patient.inspector.cache().clear(["prompt 1"])
    assert found_wrong(patient) == []


def test_a_save_for_which_there_was_no_room_changes_no_promise(patient: Patient) -> None:
    deed = {"what": "save", "prompt": 1, "name": "prompt 1", "said": 0, "exact": False}
    patient.hear({"begin": "save", "deed": deed})
    patient.hear({"end": "save", "answer": "no room"})
    assert found_wrong(patient) == []
    patient.inspector.cache().clear(["prompt 1"])
    patient.hear({"begin": "save", "deed": deed})
    patient.hear({"end": "save", "answer": "no room"})
    assert found_wrong(patient) == ["'prompt 1' was saved, and is gone"]


def test_a_promised_name_that_stands_for_another_state_is_wrong(patient: Patient) -> None:
    state = patient.inspector.runner.prefill(patient.inspector.known[2].prompt)
    patient.inspector.cache().save("prompt 1", state, replace=True, sync=False)
    assert [wrong.partition(" of ")[0] for wrong in found_wrong(patient)] == [
        "'prompt 1' stands for none"
    ]


def test_damage_is_wrong(patient: Patient) -> None:
    store = Store(patient.inspector.directory)
    store.path(BLOCKS, store.stems(BLOCKS)[0]).write_bytes(b"")
    verified, *listed = patient.inspector.what_is_wrong()
    assert verified.startswith("verify: ")
    assert "blocks/" in verified
    assert [wrong.partition(": a block")[0] for wrong in listed] == ["list: prompt 1"]


def test_a_lock_that_is_held_is_wrong(patient: Patient) -> None:
    with Store(patient.inspector.directory).shared():
        assert "a lock is held by nobody" in found_wrong(patient)


def test_a_wrong_answer_is_wrong(patient: Patient) -> None:
    first, second = patient.inspector.known[:2]
    assert patient.inspector.wrong_answers(first, drawn=True) == []
    assert patient.inspector.wrong_answers(
        type(first)(first.prompt, second.greedy, first.drawn), drawn=False
    )
    state = PromptCache(patient.inspector.directory, "smallest").load("prompt 1")
    assert patient.inspector.wrong_rest(state, second) == []
    assert patient.inspector.wrong_rest(state, first)
