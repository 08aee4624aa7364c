"""The power is cut after every call of a save: nothing is wrong, and what was saved is there.

The calls of a few steps are recorded. After each of them the power may be cut, and the drive may
then hold many a store (`drive.py`). Each of these is opened, listed, read whole and looked up in,
its states are loaded, a prompt is answered with it, and the state is saved again: there is never an
error but a `PromptCacheError`, never a wrong token or a wrong bit. What was on the drive before is
there, and so is what a save that had returned was asked to save.
"""

from __future__ import annotations

import hashlib
import logging
import random
import shutil
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import drive
from mlx_promptcache import PromptCacheError
from outcome import Outcome, parser, some
from scene import FIRST, SECOND, STORE, UNNAMED, Scene
from shim import Shim
from tiny import digest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from drive import Files

KINDS = ("smallest", "hybrid")
MOST, DRAWN = 64, 20


@dataclass(frozen=True)
class Step:
    """Something that is done; with `saves` it is a save, of the state of that name, and with
    `gone` the state of that name need not be there from its beginning on.
    """

    does: Callable[[Scene, Path], Any]
    saves: str | None = None
    gone: str | None = None


def save(scene: Scene, directory: Path) -> None:
    """Save a state by name."""
    scene.cache(directory).save("new", scene.states["new"])


def replace(scene: Scene, directory: Path) -> None:
    """Give a name to another state."""
    scene.cache(directory).save(SECOND, scene.states["new"], replace=True)


def keep(scene: Scene, directory: Path) -> None:
    """Keep a state, and leave the syncing to the system."""
    scene.cache(directory).keep(scene.states["new"])


def keep_other(scene: Scene, directory: Path) -> None:
    """Keep another state, that begins as the new one does."""
    scene.cache(directory).keep(scene.states[SECOND])


def clear(scene: Scene, directory: Path) -> None:
    """Delete a state."""
    scene.cache(directory).clear([SECOND])


@dataclass(frozen=True)
class Story:
    """Steps, one after the other, in a store; or where there is none yet."""

    steps: tuple[Step, ...]
    empty: bool = False


SAVES, KEEPS = Step(save, saves="new"), Step(keep)
STORIES = {
    "save": Story((SAVES,)),
    "first save": Story((SAVES,), empty=True),
    "save, then keep": Story((SAVES, Step(keep_other)), empty=True),
    "keep": Story((KEEPS,)),
    "first keep": Story((KEEPS,), empty=True),
    "keep, then save": Story((KEEPS, SAVES)),
    "first keep, then save": Story((KEEPS, SAVES), empty=True),
    "replace": Story((Step(replace, saves=SECOND, gone=SECOND),)),
    "clear, then save": Story((Step(clear, gone=SECOND), SAVES)),
}


@dataclass(frozen=True)
class Cut:
    """What may be on the drive after a power cut, and which states must be there."""

    story: str
    call: int
    files: Files
    there: frozenset[tuple[str, str]]  # names, and whose states they stand for


class Trials:
    """Trials of one scene. `wrong` are sentences."""

    def __init__(self, scene: Scene, directory: Path, seed: int) -> None:
        self.scene, self._directory = scene, directory
        self._draw = random.Random(seed)
        self.wrong: list[str] = []
        self.counts: Counter[str] = Counter()

    def cuts(self, name: str, most: int, drawn: int) -> Iterator[Cut]:
        """Every store that a power cut in a story may leave, once for all that must be there.
        `most` and `drawn` are those of `Drive.fates`.
        """
        story, directory = STORIES[name], self._directory / "told"
        if story.empty:
            (directory / STORE).parent.mkdir(parents=True)
        else:
            self.scene.copy(directory)
        there = set() if story.empty else {(FIRST, FIRST), (SECOND, SECOND), ("", UNNAMED)}
        power, seen = drive.Drive(directory), set[str]()
        for step in story.steps:
            there = {(name, state) for name, state in there if name != step.gone}
            with Shim(directory) as shim:
                step.does(self.scene, directory)
            last = len(shim.done) - 1
            for number, done in enumerate(shim.done):
                power.do(done)
                if number == last and step.saves is not None:
                    there.add((step.saves, "new"))
                for fate in power.fates(self._draw, most, drawn):
                    self.counts["cuts"] += 1
                    cut = Cut(name, number, power.after(fate), frozenset(there))
                    if (known := _identity(cut)) not in seen:
                        seen.add(known)
                        yield cut
            self.counts["calls"] += len(shim.done)
        shutil.rmtree(directory)

    def try_(self, cut: Cut) -> None:
        """Look at a store after a power cut."""
        self.counts["stores"] += 1
        directory = self._directory / "after"
        drive.write(cut.files, directory)
        where = f"{self.scene.kind}, {cut.story}, after call {cut.call + 1}"
        try:
            self.wrong += [f"{where}: {what}" for what in self._found(cut, directory)]
        except Exception as exc:  # noqa: BLE001 - that there is none is what is tried
            self.wrong.append(f"{where}: {type(exc).__name__}: {exc}")
        shutil.rmtree(directory)

    def _found(self, cut: Cut, directory: Path) -> Iterable[str]:
        scene, cache = self.scene, self.scene.cache(directory)
        self.counts["stores with damage"] += bool(cache.verify().damaged)
        told = cache.list()
        cache.match(scene.prompts["new"])
        rights = scene.rights
        for name in {entry.name or entry.snapshot for entry in told}:
            loaded = self._loaded(directory, name)
            if loaded is not None and loaded not in rights:
                yield f"{name} is loaded as something else"
        for name, state in cut.there:
            if self._loaded(directory, name or scene.ids[UNNAMED]) != scene.digests[state]:
                yield f"{state} is not there"
        for prompt in ("other", "new"):
            if scene.answer(directory, prompt) != scene.answers[prompt]:
                yield f"a wrong answer to {prompt}"
        cache = scene.cache(directory)
        cache.save("new", scene.states["new"], replace=True)
        if self._loaded(directory, "new") != scene.digests["new"]:
            yield "what is saved again is not there"

    def _loaded(self, directory: Path, name: str) -> str | None:
        try:
            return digest(self.scene.cache(directory).load(name))
        except PromptCacheError:
            return None


def _identity(cut: Cut) -> str:
    text = hashlib.sha256(repr(sorted(cut.there)).encode())
    for path, data in sorted(cut.files.items()):
        known = b"" if data is None else hashlib.sha256(data).digest()
        text.update(repr((path, known)).encode())
    return text.hexdigest()


def main(arguments: list[str]) -> int:
    """Every cut of every story."""
    options = _parser().parse_args(arguments)
    logging.getLogger("mlx_promptcache").setLevel(logging.CRITICAL)
    began = time.perf_counter()
    figures: Counter[str] = Counter()
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as base:
        for kind in options.kind or KINDS:
            scene = Scene(kind, Path(base) / kind)
            trials = Trials(scene, Path(base), options.seed)
            for story in options.story or STORIES:
                cuts = list(trials.cuts(story, options.most, options.drawn))
                for cut in some(cuts, options.stores, options.seed):
                    trials.try_(cut)
            figures += trials.counts
            wrong += trials.wrong
    told: dict[str, Any] = {**figures, "seconds": time.perf_counter() - began}
    return Outcome("power", options.seed, told, wrong).tell(as_json=options.json)


def _parser() -> Any:
    made = parser("power", __doc__)
    made.add_argument("--kind", action="append", choices=list(KINDS), help="of model (default all)")
    made.add_argument("--story", action="append", choices=list(STORIES), help="(default all)")
    said = "try all fates where these are at most so many (default %(default)s)"
    made.add_argument("--most", type=int, default=MOST, help=said)
    said = "else draw so many, beside each one and each two lost (default %(default)s)"
    made.add_argument("--drawn", type=int, default=DRAWN, help=said)
    made.add_argument("--stores", type=int, help="stores a story, evenly spread (default all)")
    return made
