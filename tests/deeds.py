"""What a process does with a store, at random: each deed is told when it begins and when it ends,
and what is said by a model is compared with what is known.
"""

from __future__ import annotations

import contextlib
import io
import logging
import random
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from known import ANSWER, DRAWN, GREEDY, Known, model_of
from lastcall import Calls
from mlx_promptcache import PromptCache, Runner, cli
from mlx_promptcache.errors import CacheMiss, DamagedFile, StoreError
from mlx_promptcache.room import NoRoom
from mlx_promptcache.store import BLOCKS, SNAPSHOTS, Store

if TYPE_CHECKING:
    from mlx_promptcache.state import State
    from nursery import Note, Say

COMMON, RARE = 6, 1
WEIGHTS = {
    "save": COMMON, "talk": COMMON, "keep": COMMON, "generate": COMMON, "load": COMMON,
    "clear": COMMON, "prune": RARE, "clear_unnamed": RARE, "clear_all": RARE, "verify": RARE,
    "list": RARE, "export": RARE, "import": COMMON, "harm": 0,
}  # fmt: skip
LATEST = "latest"  # a name that stands for one state after the other


@dataclass(frozen=True)
class Deed:
    """One thing to do: with a prompt, a name, and as many generated tokens as `said`."""

    what: str
    prompt: int
    name: str
    said: int
    exact: bool
    sync: bool


def drawn(draw: random.Random, prompts: int, what: str | None = None) -> Deed:
    """Any deed, or one of a kind."""
    if what is None:
        what = draw.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    prompt, coin = draw.randrange(prompts), [draw.random() < 0.5 for _ in range(3)]
    said = draw.randint(1, ANSWER - 1) if what == "talk" else 0
    return Deed(what, prompt, LATEST if coin[0] else f"prompt {prompt}", said, coin[1], coin[2])


class Worker:
    """Does deeds in one process, with one look at the store."""

    def __init__(self, job: Note, say: Say) -> None:
        self.say, self.directory = say, Path(job["store"])
        self.draw = random.Random(job["seed"])
        self.known = [Known(*map(tuple, row)) for row in job["known"]]
        self.budget: int = job["budget"]
        self.cache = PromptCache(self.directory, job["kind"], max_bytes=self.budget)
        self.runner = Runner(model_of(job["kind"]), cache=self.cache)
        self.calls: Calls | None = None
        log = logging.getLogger("mlx_promptcache")
        log.handlers, log.propagate = [_Told(say)], False

    def do(self, deed: Deed, last: int = 0) -> None:
        """Do one deed; it is not survived if it makes `last` calls to the file system."""
        self.say(begin=deed.what, deed=asdict(deed))
        if self.calls is not None:
            self.calls.begin(last)
        answer = getattr(self, f"_{deed.what}")(deed)
        calls = 0 if self.calls is None else self.calls.count
        if self.calls is not None:
            self.calls.begin()
        self.say(end=deed.what, answer=answer, calls=calls)

    def _prompt(self, deed: Deed) -> State:
        return self.runner.prefill(self.known[deed.prompt].prompt, exact=deed.exact)

    def _save(self, deed: Deed) -> str:
        try:
            return self._saved(deed, self._prompt(deed), replace=deed.name == LATEST)
        except StoreError as exc:
            self._expect("another state named" in str(exc), f"a save failed: {exc}")
            return "taken"

    def _saved(self, deed: Deed, state: State, *, replace: bool) -> str:
        try:
            self.cache.save(deed.name, state, replace=replace, sync=deed.sync, exact=deed.exact)
        except NoRoom:
            return "no room"
        return "saved"

    def _kept(self, deed: Deed, state: State) -> str:
        try:
            self.cache.keep(state, exact=deed.exact)
        except NoRoom:
            return "no room"
        return "kept"

    def _talk(self, deed: Deed) -> str:
        sampling = DRAWN if deed.exact else GREEDY
        known = self.known[deed.prompt]
        steps = self.runner.generate(known.prompt, deed.said, sampling, exact=deed.exact)
        said = tuple(step.token for step in steps)
        self._expect(said == known.said(drawn=deed.exact)[: deed.said], f"{said} after {deed}")
        return self._saved(deed, self.runner.state, replace=True)

    def _keep(self, deed: Deed) -> str:
        return self._kept(deed, self._prompt(deed))

    def _generate(self, deed: Deed) -> str:
        known = self.known[deed.prompt]
        sampling = DRAWN if deed.exact else GREEDY
        run = self.runner.start(known.prompt, exact=deed.exact, sampling=sampling, later=True)
        said = tuple(step.token for step in run.steps(ANSWER))
        self._expect(said == known.said(drawn=deed.exact), f"{said} after {deed}")
        kept = self._kept(deed, run.prompt_state())
        return self._kept(deed, run.state()) if deed.sync else kept

    def _export(self, deed: Deed) -> str:
        """Write a state to the file of its name, in place of what was there."""
        try:
            self.cache.export(deed.name, self._file(deed.name), replace=True)
        except DamagedFile:
            raise
        except CacheMiss:
            return "miss"
        return "exported"

    def _import(self, deed: Deed) -> str:
        """Take a prompt's state from a file, made in another store."""
        made_by = self.cache.fingerprint.digest[:8]  # a crowd has several models in one store
        path = self._file(f"of prompt {deed.prompt} {made_by}")
        if not path.exists():
            with tempfile.TemporaryDirectory() as elsewhere:
                other = PromptCache(elsewhere, self.cache.fingerprint)
                other.save(
                    "made", Runner(self.runner.model).prefill(self.known[deed.prompt].prompt)
                )
                other.export("made", path, replace=True)
        try:
            self.cache.import_file(path, deed.name, replace=deed.name == LATEST)
        except NoRoom:
            return "no room"
        except StoreError as exc:
            self._expect("another state named" in str(exc), f"an import failed: {exc}")
            return "taken"
        return "saved"

    def _file(self, name: str) -> Path:
        """A file beside the store."""
        return self.directory.with_name(f"{self.directory.name} {name}.safetensors")

    def _load(self, deed: Deed) -> str:
        try:
            state = self.cache.load(deed.name)
        except DamagedFile:
            raise
        except CacheMiss:
            return "miss"
        expected = {known.after(state) for known in self.known} - {None}
        said = tuple(step.token for step in self.runner.generate(state, ANSWER))
        self._expect(
            any(e is not None and said[: len(e)] == e for e in expected),
            f"{said} after {len(state.tokens)} tokens named {deed.name}",
        )
        return "loaded"

    def _clear(self, deed: Deed) -> str:
        try:
            self.cache.clear([deed.name])
        except CacheMiss:
            return "miss"
        return "cleared"

    def _prune(self, deed: Deed) -> str:
        return self._command("prune", "--max-size", str(self.budget // (1 + deed.sync)))

    def _clear_unnamed(self, deed: Deed) -> str:
        return self._command("clear", "--unnamed", "--yes")

    def _clear_all(self, deed: Deed) -> str:
        return self._command("clear", "--all", "--yes")

    def _list(self, deed: Deed) -> str:
        return self._command("list")

    def _verify(self, deed: Deed) -> str:
        return self._command("verify")

    def _command(self, *arguments: str) -> str:
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = cli.run([*arguments, "--cache-dir", str(self.directory)])
        self._expect(code == 0, f"{' '.join(arguments)} ended with {code}: {said.getvalue()}")
        return "done"

    def _harm(self, deed: Deed) -> str:
        """Damage a file and use what is stored, so that the file is moved aside."""
        store = Store(self.directory)
        files = [
            store.path(kind, stem) for kind in (BLOCKS, SNAPSHOTS) for stem in store.stems(kind)
        ]
        for path in self.draw.sample(files, min(2, len(files))):
            data = bytearray(path.read_bytes())
            data[self.draw.randrange(len(data))] ^= 1
            path.write_bytes(data)
        return self._generate(deed)

    def _expect(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.say(wrong=otherwise)


class _Told(logging.Handler):
    """Tells of every notice."""

    def __init__(self, say: Say) -> None:
        super().__init__(logging.WARNING)
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        self._say(notice=record.getMessage())


def work(job: Note, say: Say) -> None:
    """Do what a job says: some deeds, or all that there is time for."""
    worker = Worker(job, say)
    prompts = len(worker.known)
    say(ready=True)
    if "last" in job:
        for _ in range(job["before"]):
            worker.do(drawn(worker.draw, prompts))
        worker.calls = Calls(job["store"])
        worker.do(drawn(worker.draw, prompts, job["what"]), job["last"])
        return
    until = time.monotonic() + job["seconds"]
    while time.monotonic() < until:
        worker.do(drawn(worker.draw, prompts, job.get("what")))
    say(done=True)
