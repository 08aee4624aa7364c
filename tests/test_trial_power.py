"""Power cuts, a few of each story: `scripts/trials power` tries all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from outcome import some
from scene import Scene
from trial_power import STORIES, Trials

if TYPE_CHECKING:
    from pathlib import Path

SEED, MOST = 1, 10


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene("smallest", tmp_path_factory.mktemp("scene") / "base")


@pytest.mark.parametrize("story", STORIES)
def test_a_power_cut_costs_nothing_that_was_saved(story: str, scene: Scene, tmp_path: Path) -> None:
    trials = Trials(scene, tmp_path, SEED)
    cuts = list(trials.cuts(story, most=16, drawn=0))
    for cut in [*some(cuts, MOST, SEED), *cuts[-3:]]:
        trials.try_(cut)
    assert trials.wrong == []


@pytest.mark.parametrize("story", ["first save", "save, then keep", "first keep, then save"])
def test_what_was_saved_is_on_the_drive_when_the_save_returns(
    story: str, scene: Scene, tmp_path: Path
) -> None:
    cuts = list(Trials(scene, tmp_path, SEED).cuts(story, most=16, drawn=0))
    ends = [cut for cut in cuts if ("new", "new") in cut.there]
    first = ends[0].files
    saved = {path: data for path, data in first.items() if path.endswith(("/new", ".safetensors"))}
    assert len(saved) == 4  # two blocks, a snapshot and a name
    assert all(saved.items() <= cut.files.items() for cut in ends)
