"""A store seen by a process that comes after others: is it whole, and is what it says true?"""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from known import ANSWER, DRAWN, GREEDY, Known, known, model_of
from mlx_promptcache import PromptCache, Runner, cli
from mlx_promptcache.blueprint import Blueprint
from mlx_promptcache.errors import CacheLocked, CacheMiss
from mlx_promptcache.files import TEMPORARY
from mlx_promptcache.store import Store

if TYPE_CHECKING:
    from mlx_promptcache.state import State


class Inspector:
    """Looks at the store of one kind of model, each time as a new process would."""

    def __init__(self, directory: Path, kind: str) -> None:
        self.directory, self.kind = directory, kind
        self.known = known(kind)
        self._runner = Runner(model_of(kind))

    @property
    def runner(self) -> Runner:
        """The model with a new look at the store."""
        cache = PromptCache(self.directory, self.kind)
        cache.blueprint = Blueprint.of(self._runner.model, self._runner.kv)
        self._runner.cache = cache
        return self._runner

    def cache(self) -> PromptCache:
        """A new look at the store."""
        cache = self.runner.cache
        assert cache is not None
        return cache

    def what_is_wrong(self) -> list[str]:
        """What no process may leave behind: locks, damage, states that cannot be used."""
        return [*self._locks(), *self._damage(), *self._entries()]

    def _locks(self) -> list[str]:
        try:
            with Store(self.directory).exclusive(0):
                return []
        except CacheLocked:
            return ["a lock is held by nobody"]

    def _damage(self) -> list[str]:
        code, out = command("verify", self.directory)
        return [] if code == 0 else [f"verify: {out.strip()}"]

    def _entries(self) -> list[str]:
        code, out = command("list", self.directory, "--json")
        if code != 0:
            return [f"list: {out}"]
        entries: list[dict[str, Any]] = json.loads(out)["entries"]
        bad = [f"list: {e['name']}: {e['reason']}" for e in entries if e["status"] != "ok"]
        hidden = [f"list shows {e['name']}" for e in entries if TEMPORARY in (e["name"] or "")]
        return bad + hidden

    def wrong_answers(self, prompt: Known, *, drawn: bool) -> list[str]:
        """What is said after a prompt with the store, if it is not what is said without."""
        sampling = DRAWN if drawn else GREEDY
        steps = self.runner.generate(prompt.prompt, ANSWER, sampling, exact=drawn)
        said = tuple(step.token for step in steps)
        if said == prompt.said(drawn=drawn):
            return []
        return [f"{said} after {len(prompt.prompt)} tokens, not {prompt.said(drawn=drawn)}"]

    def load(self, name: str) -> State | None:
        """The state of a name; None if there is none."""
        try:
            return self.cache().load(name)
        except CacheMiss:
            return None

    def wrong_rest(self, state: State, prompt: Known) -> list[str]:
        """What is said after a state of a prompt, if it is not what is known."""
        expected = prompt.after(state)
        said = tuple(step.token for step in self.runner.generate(state, ANSWER))
        if expected is not None and said[: len(expected)] == expected:
            return []
        return [f"{said} after a loaded state of {len(state.tokens)} tokens, not {expected}"]


def leftovers(store: Path) -> int:
    """How many half-written files there are."""
    return sum(1 for _ in store.rglob(f"{TEMPORARY}*"))


def command(name: str, store: Path, *more: str) -> tuple[int, str]:
    """Run a command that needs no model: its exit code, and what it prints."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = cli.run([name, "--cache-dir", str(store), *more])
    return code, said.getvalue()
