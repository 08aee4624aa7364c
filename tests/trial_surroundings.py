"""A directory of a store with a hundred thousand files in it: all still works, and soon enough."""

from __future__ import annotations

import functools
import secrets
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inspection import Inspector, command
from mlx_promptcache.files import SUFFIX
from mlx_promptcache.store import BLOCKS, Store
from outcome import Outcome, parser

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

FILES = 100_000
SLOW_SECONDS = 60.0


class Littered:
    """A store of some states, one directory of which has very many other files in it."""

    def __init__(self, directory: Path, files: int) -> None:
        self.inspector = Inspector(directory, "smallest")
        self.store = Store(directory)
        self.seconds: dict[str, float] = {}
        self.wrong: list[str] = []
        for i, known in enumerate(self.inspector.known):
            self.inspector.cache().save(f"prompt {i}", self.inspector.runner.prefill(known.prompt))
        self.place = self.store.path(BLOCKS, self.store.stems(BLOCKS)[0]).parent
        self._litter(files)

    def _litter(self, files: int) -> None:
        """Half of them are called as ours are, and are empty; the others are somebody else's."""
        start, token = self.place.name[2:4], int(self.place.name[4], 16)
        for i in range(files // 2):
            key, end = start + secrets.token_hex(15), secrets.token_hex(16)
            (self.place / f"{key}-{token + 16 * (i % 16)}-{end}{SUFFIX}").touch()
            (self.place / f"somebody's {i}.txt").touch()

    def timed(self, what: str, call: Callable[[], Any]) -> Any:
        """What a call returns; it is wrong if it takes too long."""
        began = time.monotonic()
        answer = call()
        self.seconds[f"seconds for {what}"] = time.monotonic() - began
        if time.monotonic() - began > SLOW_SECONDS:
            self.wrong.append(f"{what} takes too long")
        return answer

    def look(self) -> None:
        """Use it as it is, and clean it up."""
        there = self.store.directory
        known = self.inspector.known
        for i, prompt in enumerate(known):
            cache = self.inspector.cache()
            said = self.timed("match", functools.partial(cache.match, prompt.prompt))
            self._expect(said.exact, f"prompt {i} is not found")
            self.wrong += self.inspector.wrong_answers(prompt, drawn=False)
        self._expect(self.timed("list", lambda: command("list", there))[0] == 0, "list fails")
        self.timed("verify", lambda: command("verify", there))
        pruned = self.timed("prune", lambda: command("prune", there, "--max-size", "0"))
        self._expect(pruned[0] == 0, f"prune: {pruned[1]}")
        for i in range(len(known)):
            self._expect(self.inspector.load(f"prompt {i}") is not None, f"prompt {i} is lost")
        left = list(self.place.iterdir())
        theirs = [path for path in left if path.suffix == ".txt"]
        self._expect(len(left) - len(theirs) < 20, "what is damaged was not pruned")
        self.seconds["files of others left"] = len(theirs)
        code, out = command("verify", there)
        self._expect(code == 0, out[-200:])

    def _expect(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.wrong.append(otherwise)


def tried(files: int, seed: int) -> Outcome:
    """Fill a directory, and look."""
    with tempfile.TemporaryDirectory() as directory:
        littered = Littered(Path(directory) / "store", files)
        littered.look()
    return Outcome("surroundings", seed, {"files": files, **littered.seconds}, littered.wrong)


def main(arguments: Sequence[str]) -> int:
    """Look, and tell."""
    options = parser("surroundings", __doc__)
    options.add_argument("--files", type=int, default=FILES, help=f"(default {FILES:,})")
    chosen = options.parse_args(arguments)
    return tried(chosen.files, chosen.seed).tell(as_json=chosen.json)
