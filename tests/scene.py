"""A store with three states, of which it is known what they are: what trials begin with, and what
they must find when they end.
"""

from __future__ import annotations

import functools
import shutil
from typing import TYPE_CHECKING, Any

import tiny
from mlx_promptcache import PromptCache, Runner, Sampling, catalog
from mlx_promptcache.names import NAMES
from mlx_promptcache.store import BLOCKS, QUARANTINE, SNAPSHOTS, Store
from tiny import digest, random_tokens

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

KINDS = {"smallest": tiny.smallest, **tiny.KINDS}
FIRST, SECOND, UNNAMED = "first", "second", "unnamed"
STORE = "models/prompt_cache"  # beneath the directory that a shim stands above
GREEDY = Sampling(seed=1)
GENERATED = 6
VOCAB = 16  # that of the smallest model


class Scene:
    """The states `first` and `second`, which share a block; one without a name; and `new`, which
    goes on from `first` and is not stored.
    """

    def __init__(self, kind: str, directory: Path) -> None:
        self.kind, self.base = kind, directory
        self.model: Any = KINDS[kind]()
        draw = functools.partial(random_tokens, vocab=VOCAB)
        prefix = draw(270, seed=1)
        self.prompts = {
            FIRST: prefix,
            SECOND: [*prefix[:260], *draw(9, seed=2)],
            UNNAMED: draw(20, seed=3),
            "new": [*prefix, *draw(12, seed=4)],
            "other": [*prefix[:265], *draw(15, seed=5)],
        }
        cache = PromptCache(directory / STORE, kind)
        runner = Runner(self.model, None, cache)
        self.states, self.ids = {}, {}
        for name in (FIRST, SECOND, UNNAMED):
            self.states[name] = runner.prefill(self.prompts[name])
            saved = cache.save(None if name == UNNAMED else name, self.states[name], sync=False)
            self.ids[name] = saved.snapshot
        self.states["new"] = Runner(self.model).prefill(self.prompts["new"])
        self.digests = {name: digest(state) for name, state in self.states.items()}
        marks = [state.at(mark) for state in self.states.values() for mark in state.marks]
        self.rights = {*self.digests.values(), *map(digest, marks)}
        """What any state of the store may be, to the last bit."""
        self.answers = {name: self.answer(None, name) for name in self.prompts}
        self.files = self._files(directory)
        self.taken = Store(directory / STORE).taken()

    def cache(self, directory: Path) -> PromptCache:
        """A new look at the store in a directory."""
        return PromptCache(directory / STORE, self.kind)

    def copy(self, directory: Path) -> Path:
        """The store as it was in the beginning, in another directory."""
        shutil.copytree(self.base, directory)
        return directory

    def answer(self, directory: Path | None, name: str) -> list[int]:
        """What the model says after a prompt."""
        cache = None if directory is None else self.cache(directory)
        steps = Runner(self.model, None, cache).generate(self.prompts[name], GENERATED, GREEDY)
        return [step.token for step in steps]

    def entries(self, directory: Path) -> set[tuple[str | None, str]]:
        """The name and the snapshot of each state that is told to be well."""
        told = self.cache(directory).list()
        return {(entry.name, entry.snapshot) for entry in told if entry.status == "ok"}

    def _files(self, directory: Path) -> dict[str, dict[str, bytes]]:
        """The files of each state by their paths, and what is in them."""
        store, found = Store(directory / STORE), {}
        for name, identity in self.ids.items():
            stem, header = catalog.find(store, identity)
            paths = [store.path(SNAPSHOTS, stem)]
            paths += [store.path(BLOCKS, ref[0]) for ref in header.content["refs"]]
            paths += [store.directory / NAMES / name] if name != UNNAMED else []
            found[name] = {str(p.relative_to(directory)): p.read_bytes() for p in paths}
        return found

    def lost(self, directory: Path, gone: Collection[str] = ()) -> list[str]:
        """What is wrong with the states that were stored in the beginning, but for those `gone`:
        each is told, and has all its files, byte for byte; and no file is damaged.
        """
        cache = self.cache(directory)
        wrong = [f"{f.kind} {f.stem}: {f.reason}" for f in cache.verify().damaged]
        there = self.entries(directory)
        for name in {FIRST, SECOND, UNNAMED} - set(gone):
            if (None if name == UNNAMED else name, self.ids[name]) not in there:
                wrong.append(f"{name} is not told")
            for path, data in self.files[name].items():
                if not (directory / path).exists() or (directory / path).read_bytes() != data:
                    wrong.append(f"{name} has lost {path}")
        if (cache.directory / QUARANTINE).exists():
            wrong.append("something was moved aside")
        return wrong

    def altered(self, directory: Path, gone: Collection[str] = ()) -> list[str]:
        """Which of the states that were stored in the beginning, but for those `gone`, are loaded
        as something else.
        """
        cache, names = self.cache(directory), {FIRST, SECOND, UNNAMED} - set(gone)
        loaded = {name: digest(cache.load(self.ids[name])) for name in names}
        return [f"{n} is something else" for n in names if loaded[n] != self.digests[n]]


def leftovers(directory: Path) -> int:
    """How many temporary files there are."""
    return sum(1 for path in directory.rglob(".tmp-*"))
