"""Every call to the operating system fails in turn: what is stored stays, no token is wrong.

Each call that an action makes beneath the store fails with each error that it can have: once, and
so that every later call that can fails, too. Then either the action was done all the same, or it
said in one line why not, as a `PromptCacheError`; what was stored before is there, bit for bit; the
same action without a fault does what it should; and no file and no descriptor is left behind.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from os import listdir  # a shim replaces the one in `os`
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_promptcache import PromptCache, PromptCacheError, Runner
from mlx_promptcache.catalog import Catalog
from mlx_promptcache.cli.session import Session
from mlx_promptcache.deletion import execute
from mlx_promptcache.names import NAMES
from mlx_promptcache.saver import most_bytes
from mlx_promptcache.store import BLOCKS, SNAPSHOTS, Store
from outcome import Outcome, parser, some
from scene import FIRST, GENERATED, GREEDY, SECOND, STORE, UNNAMED, Scene, leftovers
from shim import Call, Fault, Shim, faults
from tiny import digest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    Does = Callable[[Scene, Path], Any]

KINDS = ("smallest", "hybrid")


@dataclass(frozen=True)
class Action:
    """What is done to a store. `asked` if a user asked for it by name and is to be told when it
    fails: all else goes on without the store. What it returns is `right` in the end.
    """

    does: Does
    asked: bool
    gone: tuple[str, ...] = ()
    empty: bool = field(default=False)  # there is no store in the beginning


def save(scene: Scene, directory: Path) -> str:
    """Save a state by name; what is there by that name then."""
    scene.cache(directory).save("new", scene.states["new"])
    return digest(scene.cache(directory).load("new"))


def replace(scene: Scene, directory: Path) -> str:
    """Give a name to another state."""
    scene.cache(directory).save(SECOND, scene.states["new"], replace=True)
    return digest(scene.cache(directory).load(SECOND))


def keep(scene: Scene, directory: Path) -> None:
    """Keep the state of a prompt as commands do."""
    cache = scene.cache(directory)
    session = Session(Runner(scene.model, None, cache), as_json=True, quiet=True, seed=1)
    session.keep(None, scene.states["new"])


def load(scene: Scene, directory: Path) -> str:
    """Load a state by its name."""
    return digest(scene.cache(directory).load(FIRST))


def load_by_id(scene: Scene, directory: Path) -> str:
    """Load a state that has no name."""
    return digest(scene.cache(directory).load(scene.ids[UNNAMED]))


def generate(name: str) -> Does:
    """Answer a prompt and keep it, as commands do."""

    def does(scene: Scene, directory: Path) -> list[int]:
        runner = Runner(scene.model, None, scene.cache(directory))
        session = Session(runner, as_json=True, quiet=True, seed=1)
        run = runner.start(scene.prompts[name], sampling=GREEDY, later=True)
        session.generate(run, GENERATED, ())
        session.keep(None, run.prompt_state())
        session.keep(None, run.state())
        return session.tokens

    return does


def other_loop(scene: Scene, directory: Path) -> int:
    """What programs do that keep mlx-lm's own loop; how many tokens are still to be processed."""
    cache = scene.cache(directory)
    layers, rest = cache.fetch(scene.model, scene.prompts["new"])
    held = max(int(getattr(layer, "offset", 0)) for layer in layers)  # of the recurrent ones: none
    assert len(rest) + held == len(scene.prompts["new"])
    return 0


def look(scene: Scene, directory: Path) -> None:
    """List, read every byte, and look a prompt up."""
    cache = scene.cache(directory)
    cache.list()
    cache.verify()
    cache.match(scene.prompts["new"])


def clear(scene: Scene, directory: Path) -> list[str]:
    """Delete a state that has a name, if it has; the names that are left."""
    if SECOND in _names(directory):
        scene.cache(directory).clear([SECOND])
    return _names(directory)


def _names(directory: Path) -> list[str]:
    return sorted(listdir(directory / STORE / NAMES))  # noqa: PTH208 - and no shim sees it


def clear_all(scene: Scene, directory: Path) -> int:
    """Delete everything, as the command does; how many files are left."""
    store = Store(directory / STORE)
    with store.exclusive():
        execute(store, Catalog(store).plan_clear([], everything=True))
        store.clear_traces()
    return len(store.stems(BLOCKS) + store.stems(SNAPSHOTS))


def prune(scene: Scene, directory: Path) -> list[str]:
    """Delete whatever has no name; the names that are left."""
    scene.cache(directory).prune(0)
    return _names(directory)


def keep_in_budget(scene: Scene, directory: Path) -> None:
    """Keep a state where another has to go for it."""
    state = scene.states["new"]
    most = scene.taken + most_bytes(state) - 1
    cache = PromptCache(directory / STORE, scene.kind, max_bytes=most)
    session = Session(Runner(scene.model, None, cache), as_json=True, quiet=True, seed=1)
    session.keep(None, state)


ACTIONS = {
    "save": Action(save, asked=True),
    "first save": Action(save, asked=True, gone=(FIRST, SECOND, UNNAMED), empty=True),
    "replace": Action(replace, asked=True, gone=(SECOND,)),
    "keep": Action(keep, asked=False),
    "first keep": Action(keep, asked=False, gone=(FIRST, SECOND, UNNAMED), empty=True),
    "load": Action(load, asked=True),
    "load by id": Action(load_by_id, asked=True),
    "generate, prefix": Action(generate("other"), asked=False),
    "generate, exact": Action(generate(FIRST), asked=False),
    "fetch": Action(other_loop, asked=False),
    "look": Action(look, asked=True),
    "clear": Action(clear, asked=True, gone=(SECOND,)),
    "prune": Action(prune, asked=True, gone=(UNNAMED,)),
    "keep in a budget": Action(keep_in_budget, asked=False, gone=(UNNAMED,)),
    "clear all": Action(clear_all, asked=True, gone=(FIRST, SECOND, UNNAMED)),
}


class Notices(logging.Handler):
    """What the log said."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


class Trials:
    """Trials of one scene. `wrong` are sentences; `counts` is how the trials ended."""

    def __init__(self, scene: Scene, directory: Path) -> None:
        self.scene, self._directory = scene, directory
        self.wrong: list[str] = []
        self.counts: Counter[str] = Counter()
        self.most_left = 0
        self._number = 0

    def calls(self, name: str) -> tuple[list[Call], Any]:
        """The calls that an action makes where none fails, and what it returns then."""
        directory = self._begin(ACTIONS[name])
        with Shim(directory) as shim:
            right = ACTIONS[name].does(self.scene, directory)
        shutil.rmtree(directory)
        return shim.calls, right

    def _begin(self, action: Action) -> Path:
        self._number += 1
        directory = self._directory / str(self._number)
        if action.empty:
            (directory / STORE).parent.mkdir(parents=True)
            return directory
        return self.scene.copy(directory)

    def try_(self, name: str, fault: Fault, right: Any) -> None:
        """Let one call of an action fail, and look at what came of it."""
        action = ACTIONS[name]
        directory = self._begin(action)
        found = self._found(action, directory, fault, right)
        self.wrong += [f"{self.scene.kind}, {name}, {fault}: {what}" for what in found]
        shutil.rmtree(directory)

    def _found(self, action: Action, directory: Path, fault: Fault, right: Any) -> Iterable[str]:
        notices = Notices()
        log = logging.getLogger("mlx_promptcache")
        log.addHandler(notices)
        log.propagate = False
        shim = Shim(directory, fault)
        try:
            with shim:
                came = action.does(self.scene, directory)
        except PromptCacheError as exc:
            self.counts["told"] += 1
            notices.lines.append(str(exc))
            if not action.asked:
                yield f"raised: {exc}"
        except Exception as exc:  # noqa: BLE001 - that there is none is what is tried
            yield f"{type(exc).__name__}: {exc}"
        else:
            self.counts["done, with a notice" if notices.lines else "done"] += 1
            if came != right:
                yield f"came to {came}"
        finally:
            log.removeHandler(notices)
        self.counts["trials"] += 1
        self.counts["not met"] += not shim.met
        yield from (f"says {line!r}" for line in notices.lines if not _is_clear(line))
        yield from (f"left open: {path}" for path in shim.open.values())
        yield from self._after(action, directory, right)

    def _after(self, action: Action, directory: Path, right: Any) -> Iterable[str]:
        """What is wrong with the store after a fault, and with the same action without one."""
        try:
            yield from self.scene.lost(directory, action.gone)
            left = leftovers(directory)
            self.most_left = max(self.most_left, left)
            if action.does(self.scene, directory) != right:
                yield "then came to something else"
            yield from (f"then {what}" for what in self.scene.lost(directory, action.gone))
            yield from (f"then {what}" for what in self.scene.altered(directory, action.gone))
            if leftovers(directory) > left:
                yield "left another temporary file behind"
        except Exception as exc:  # noqa: BLE001 - that there is none is what is tried
            yield f"then {type(exc).__name__}: {exc}"


def _is_clear(line: str) -> bool:
    return bool(line) and "\n" not in line and "None" not in line and "Errno" not in line


def main(arguments: list[str]) -> int:
    """Every call of every action, with every error."""
    options = _parser().parse_args(arguments)
    began = time.perf_counter()
    figures: Counter[str] = Counter()
    wrong: list[str] = []
    most_left = 0
    with tempfile.TemporaryDirectory() as base:
        for kind in options.kind or KINDS:
            trials = Trials(Scene(kind, Path(base) / kind), Path(base))
            for name in options.action or ACTIONS:
                calls, right = trials.calls(name)
                figures["calls"] += len(calls)
                for fault in some(list(faults(calls)), options.most, options.seed):
                    trials.try_(name, fault, right)
            figures += trials.counts
            wrong += trials.wrong
            most_left = max(most_left, trials.most_left)
    told: dict[str, Any] = {**figures, "temporary files left at most": most_left}
    told["seconds"] = time.perf_counter() - began
    return Outcome("faults", options.seed, told, wrong).tell(as_json=options.json)


def _parser() -> Any:
    made = parser("faults", __doc__)
    made.add_argument("--kind", action="append", choices=list(KINDS), help="of model (default all)")
    made.add_argument("--action", action="append", choices=list(ACTIONS), help="(default all)")
    made.add_argument("--most", type=int, help="faults an action, evenly spread (default all)")
    return made
