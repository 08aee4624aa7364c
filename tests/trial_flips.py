"""Every byte of a small store flipped, every file cut at every length, all files swapped.

After each a new look at the store is taken: list, verify, match, load, and two runs of a tiny
model. The tokens of one must be those of a run without a cache, and the bits of the other, which is
`exact`, too. Three prompts take turns. What is damaged is a miss.
"""

from __future__ import annotations

import itertools
import logging
import random
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import tiny
from mlx_promptcache import CacheMiss, PromptCache, Runner, Sampling
from mlx_promptcache.blueprint import Blueprint
from mlx_promptcache.files import SUFFIX
from outcome import Outcome, parser

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mlx_promptcache.state import State

NAME = "mine"
LENGTH = 10  # tokens: the fewer, the fewer bytes
TOLD = Sampling(seed=1)
GENERATED = 3


class Damage(NamedTuple):
    """What is done to a store: files, and what is in them then."""

    how: str
    what: str
    files: dict[Path, bytes]


class Victim:
    """A small store, and what is said without it."""

    def __init__(self, directory: Path, kind: str) -> None:
        self.directory, self.kind = directory, kind
        self.runner = Runner(tiny.smallest() if kind == "smallest" else tiny.KINDS[kind]())
        stored = tiny.random_tokens(LENGTH, seed=11, vocab=16)
        other = [*stored[:4], *tiny.random_tokens(LENGTH, seed=12, vocab=16)]
        self.blueprint = Blueprint.of(self.runner.model, self.runner.kv)
        self.prompts = [stored, [*stored, 3, 1, 4], other]
        self.expected = [(self._tokens(prompt), self._bits(prompt)) for prompt in self.prompts]
        self.runner.cache = self.cache()
        self.state = self.runner.prefill(stored)
        self.runner.cache.save(NAME, self.state, sync=False)
        self.runner.cache.keep(self.runner.prefill(other))
        self.files = {p: p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}
        self.needed = self._needed()

    def cache(self) -> PromptCache:
        """A new look at the store, as a new process has it."""
        cache = PromptCache(self.directory, self.kind)
        cache.blueprint = self.blueprint
        return cache

    def _tokens(self, prompt: Sequence[int]) -> list[int]:
        return [step.token for step in self.runner.generate(prompt, GENERATED, sampling=TOLD)]

    def _bits(self, prompt: Sequence[int]) -> str:
        return _bits(self.runner.start(prompt, exact=True, sampling=TOLD).state())

    def _needed(self) -> set[Path]:
        """The files without which the named state cannot be had."""
        found = set()
        for path in self.files:
            path.rename(path.with_suffix(".away"))
            try:
                self.cache().load(NAME)
            except CacheMiss:
                found.add(path)
            path.with_suffix(".away").rename(path)
            self._put_back()
        return found

    def damages(self, draw: random.Random) -> Iterator[Damage]:
        """All that is done to it, one after the other."""
        for path, whole in self.files.items():
            for at in range(len(whole)):
                for mask in (0xFF, 1 << draw.randrange(8)):
                    flipped = whole[:at] + bytes([whole[at] ^ mask]) + whole[at + 1 :]
                    yield Damage("flips", f"{path.name} at {at} by {mask}", {path: flipped})
            for length in range(len(whole)):
                yield Damage("cuts", f"{path.name} to {length}", {path: whole[:length]})
        for one, two in itertools.combinations(self.files, 2):
            swapped = {one: self.files[two], two: self.files[one]}
            yield Damage("swaps", f"{one.name} and {two.name}", swapped)

    def harm(self, damage: Damage, turn: int) -> list[str]:
        """Do it, look, and mend it; what went wrong."""
        try:
            return [f"{damage.how} {damage.what}: {wrong}" for wrong in self._looks(damage, turn)]
        except Exception:  # noqa: BLE001 - nothing but misses may come out
            return [f"{damage.how} {damage.what}: {traceback.format_exc(limit=-3)}"]
        finally:
            self._put_back()

    def _looks(self, damage: Damage, turn: int) -> Iterator[str]:
        self._put_back(damage.files)
        changed = {path for path, data in damage.files.items() if data != self.files[path]}
        self.cache().list()
        sound = not self.cache().verify().damaged
        if sound and any(path.suffix == SUFFIX for path in changed):
            yield "verify found nothing"
        yield from self._loads(changed)
        self._put_back(damage.files)  # what was found damaged was moved aside
        one, two = turn % len(self.prompts), (turn + 1) % len(self.prompts)
        self.runner.cache = self.cache()
        self.runner.cache.match(self.prompts[one])
        self.runner.cache = self.cache()
        self._put_back(damage.files)
        if (said := self._tokens(self.prompts[one])) != self.expected[one][0]:
            yield f"{said} was said instead of {self.expected[one][0]}"
        self._put_back(damage.files)
        if self._bits(self.prompts[two]) != self.expected[two][1]:
            yield "an exact run had other bits"

    def _loads(self, changed: set[Path]) -> Iterator[str]:
        try:
            state = self.cache().load(NAME)
        except CacheMiss:
            return
        if changed & self.needed or _bits(state) != _bits(self.state):
            yield "a damaged state was loaded"

    def _put_back(self, damaged: Mapping[Path, bytes] | None = None) -> None:
        """Make every file what it was, or what the damage makes of it."""
        shutil.rmtree(self.directory / "quarantine", ignore_errors=True)
        for path, data in {**self.files, **(damaged or {})}.items():
            if not path.exists() or path.read_bytes() != data:
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(data)


def _bits(state: State) -> str:
    return tiny.digest(state.tokens, state.logits, state.embedding, *_rows(state))


def _rows(state: State) -> list[object]:
    return [array for layer in state.contents for _, array in sorted(layer.rows.items())]


def tried(kind: str, seed: int, every: int) -> Outcome:
    """Every damage, or one of so many, done to a store of this kind."""
    began, wrong = time.monotonic(), []
    counts = {"flips": 0, "cuts": 0, "swaps": 0}
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # a drive would be worn for nothing
    with tempfile.TemporaryDirectory(dir=memory) as directory:
        victim = Victim(Path(directory) / "store", kind)
        size = sum(map(len, victim.files.values()))
        damages = victim.damages(random.Random(seed))
        for damage in itertools.islice(damages, 0, None, every):
            counts[damage.how] += 1
            wrong += victim.harm(damage, sum(counts.values()))
        figures = {"files": len(victim.files), "bytes": size, **counts}
    return Outcome("flips", seed, {**figures, "seconds": time.monotonic() - began}, wrong)


def main(argv: Sequence[str]) -> int:
    """Run the trial and tell what came of it."""
    options = parser("flips", __doc__)
    options.add_argument("--kind", default="smallest", choices=["smallest", *tiny.KINDS])
    options.add_argument("--every", type=int, default=1, help="only one of so many (default all)")
    asked = options.parse_args(argv)
    logging.getLogger("mlx_promptcache").setLevel(logging.CRITICAL)  # notices of each damage
    return tried(asked.kind, asked.seed, asked.every).tell(as_json=asked.json)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
