"""Calls that fail, a few of each action: `scripts/trials faults` tries all of them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

import processes
from conftest import ROOT
from outcome import some
from scene import Scene
from shim import Call, Fault, Shim, faults
from trial_faults import ACTIONS, Trials

if TYPE_CHECKING:
    from pathlib import Path

SEED, MOST = 1, 10


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene("smallest", tmp_path_factory.mktemp("scene") / "base")


@pytest.mark.parametrize("name", ACTIONS)
def test_a_call_that_fails_costs_no_state_and_no_token(
    name: str, scene: Scene, tmp_path: Path
) -> None:
    trials = Trials(scene, tmp_path)
    calls, right = trials.calls(name)
    for fault in some(list(faults(calls)), MOST, SEED):
        trials.try_(name, fault, right)
    assert trials.wrong == []
    assert trials.counts["trials"] == MOST
    assert trials.counts["not met"] <= 1  # threads may come in another order


def test_an_action_that_goes_wrong_is_seen(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = Trials(scene, tmp_path)
    calls, right = trials.calls("load")
    monkeypatch.setattr(scene, "digests", scene.digests | {"first": "another"})
    trials.try_("load", Fault(calls[0], 5), right)
    assert any("something else" in wrong for wrong in trials.wrong)


# The shim

AUDITED = """
import collections, os, sys, json, pathlib, tempfile
sys.path.insert(0, sys.argv[1])
import scene, shim, trial_faults
trial_faults.listdir = lambda path: os.listdir(path)  # seen, too
names = {"open": "open", "os.listdir": "listdir", "os.scandir": "scandir", "os.mkdir": "mkdir",
    "os.rename": "rename", "os.remove": "unlink", "os.rmdir": "rmdir", "os.link": "link",
    "os.chmod": "chmod", "os.utime": "utime", "fcntl.flock": "flock"}
told, watched, place = collections.Counter(), [None], [""]
def hook(event, args):
    if watched[0] is None or event not in names:
        return
    path = args[1] if event in ("os.rename", "os.link") else args[0]
    if event == "fcntl.flock":
        path = watched[0].open.get(path, "")
    if isinstance(path, (str, bytes, os.PathLike)):
        if os.fsdecode(path).startswith(place[0]):
            told[names[event]] += 1
sys.addaudithook(hook)
same = {"create": "open", "replace": "rename", "remove": "unlink"}
seen = collections.Counter()
with tempfile.TemporaryDirectory() as base:
    one = scene.Scene("smallest", pathlib.Path(base) / "base")
    for number, (name, action) in enumerate(trial_faults.ACTIONS.items()):
        if name == "clear all":  # deletes by descriptors, of which nothing is told
            continue
        directory = pathlib.Path(base) / str(number)
        one.copy(directory) if not action.empty else (directory / scene.STORE).parent.mkdir(
            parents=True)
        place[0] = str(directory)
        with shim.Shim(directory) as watched[0]:
            action.does(one, directory)
        for call in watched[0].calls:
            function = same.get(call.function, call.function)
            if function in names.values():
                seen[function] += 1
        watched[0] = None
print(json.dumps([told, seen]))
"""


def test_the_shim_sees_each_call_that_python_tells_of() -> None:
    told, seen = processes.python(AUDITED, ROOT / "tests")
    assert told == seen
    assert min(seen.get(name, 0) for name in ("open", "listdir", "scandir", "link", "flock")) > 9


def test_a_call_fails_once_or_from_then_on(tmp_path: Path) -> None:
    def outcomes(fault: Fault) -> list[bool]:
        with Shim(tmp_path, fault):
            return [made(tmp_path / str(number)) for number in range(3)]

    def made(path: Path) -> bool:
        try:
            path.mkdir()
            path.rmdir()
        except OSError as exc:
            return exc.errno != 28
        return True

    second = Call("mkdir", "1", 1)
    assert outcomes(Fault(second, 28)) == [True, False, True]
    assert outcomes(Fault(second, 28, stays=True)) == [True, False, False]


def test_half_is_written_and_half_is_read(tmp_path: Path) -> None:
    fd = os.open(tmp_path.parent / "elsewhere", os.O_RDWR | os.O_CREAT)
    os.close(fd)
    with Shim(tmp_path, Fault(Call("write", "f", 1), 0)):
        fd = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
        assert [os.write(fd, b"abcd"), os.write(fd, b"cd")] == [2, 2]
        os.close(fd)
    assert (tmp_path / "f").read_bytes() == b"abcd"
    with Shim(tmp_path, Fault(Call("pread", "f", 2), 0)) as shim:
        fd = os.open(tmp_path / "f", os.O_RDONLY)
        assert [os.pread(fd, 4, 0) for _ in range(3)] == [b"abcd", b"ab", b"abcd"]
        assert list(shim.open.values()) == [str(tmp_path / "f")]
        os.close(fd)
    assert shim.open == {}
