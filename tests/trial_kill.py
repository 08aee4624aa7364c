"""Processes that use a store are killed in the middle; whoever comes next finds all well.

Half of them are killed at a call to the file system, its bytes half written; the others some time
after a deed began. After each the store is looked at as the next process would.
"""

from __future__ import annotations

import itertools
import random
import tempfile
import time
from collections import Counter
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deeds import WEIGHTS
from inspection import Inspector, command, leftovers
from nursery import Nursery
from outcome import Outcome, parser

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from nursery import Note

KILLS = 1000
KINDS = ("smallest", "rotating", "hybrid")
SURE_SECONDS = 60.0  # no deed takes so long
CHANGING = [what for what in WEIGHTS if what not in {"list", "verify"}]
MANY_CALLS = 60  # that change something: about as many as a deed makes
BUDGET = 400_000  # bytes: some states have to go for others
WAIT = 1.2  # times as long as a deed takes: some of them have just ended

Promise = tuple[int, int, bool] | None
"""A prompt, how many tokens of its answer, and whether they were drawn; None for no state."""


class Patient:
    """A store whose users are killed, and what was promised of it: what a name may stand for."""

    def __init__(self, directory: Path, kind: str) -> None:
        self.inspector = Inspector(directory, kind)
        self.names: dict[str, set[Promise]] = {}
        self.harmed = False
        self._touched: set[str] = set()  # names, since it was looked at last
        self._latest: dict[str, Any] = {}
        self._old: set[Promise] = set()  # what its name stood for

    def hear(self, note: Note) -> None:
        """Take down what a deed that began may change, and what one that ended has changed."""
        if "begin" in note:
            self._begun(note["deed"])
            self._latest = note["deed"]
        elif "end" in note:
            self._ended(self._latest, note["answer"])

    def _begun(self, deed: dict[str, Any]) -> None:
        what, name = deed["what"], deed["name"]
        self._touched.add(name)
        self._old = set(self.names.get(name, {None}))
        if what in {"save", "talk", "import"}:
            self.names.setdefault(name, {None}).add(_promise(deed))
        elif what == "clear":
            self.names.setdefault(name, {None}).add(None)
        elif what in {"clear_all", "harm"}:
            self._touched.update(self.names)
            for promises in self.names.values():
                promises.add(None)
        self.harmed |= what == "harm"

    def _ended(self, deed: dict[str, Any], answer: str) -> None:
        what, name = deed["what"], deed["name"]
        if answer == "saved":
            self.names[name] = {_promise(deed)}
        elif answer in {"taken", "no room"}:
            self.names[name] = self._old
        elif what == "clear":
            self.names[name] = {None}
        elif what == "clear_all":
            self.names = {}

    def look(self, draw: random.Random) -> Iterator[str]:
        """What is wrong with it."""
        if self.harmed:
            yield from self._mended()
        yield from self.inspector.what_is_wrong()
        known = self.inspector.known
        yield from self.inspector.wrong_answers(draw.choice(known), drawn=draw.random() < 0.5)
        others = sorted(set(self.names) - self._touched)
        for name in [*sorted(self._touched & set(self.names)), *others[: draw.randint(0, 2)]]:
            yield from self._named(name)
        self._touched = set()

    def _mended(self) -> Iterator[str]:
        """Damage that was done on purpose is moved aside, and what it took with it is cleared."""
        command("verify", self.inspector.directory, "--quarantine")
        code, out = command("clear", self.inspector.directory, "--damaged", "--yes")
        if code:
            yield f"clear --damaged: {out}"
        self.harmed = False

    def _named(self, name: str) -> Iterator[str]:
        state, promises = self.inspector.load(name), self.names[name]
        if state is None:
            if None not in promises:
                yield f"{name!r} was saved, and is gone"
            self.names[name] = {None}
            return
        for promise in promises - {None}:
            assert promise is not None
            prompt, said, drawn = promise
            known = self.inspector.known[prompt]
            tokens = (*known.prompt, *known.said(drawn=drawn)[:said])
            if state.tokens == tokens and (not said or drawn == (state.sampling.temp > 0)):
                self.names[name] = {promise}
                yield from self.inspector.wrong_rest(state, known)
                return
        yield f"{name!r} stands for none of {promises}"


def _promise(deed: dict[str, Any]) -> Promise:
    return deed["prompt"], deed["said"], deed["exact"] and deed["what"] == "talk"


class Executioner:
    """Kills one process after the other, and counts."""

    def __init__(self, nursery: Nursery, seed: int) -> None:
        self.nursery, self.draw = nursery, random.Random(seed)
        self.wrong: list[str] = []
        self.by_deed: Counter[str] = Counter()
        self.at_calls = self.at_moments = self.between = self.leftovers = 0
        self._calls: dict[str, int] = {}  # that a deed makes at most
        self._seconds: dict[str, float] = {}

    def kill_one(self, patient: Patient) -> None:
        """Kill one process that uses this store, and look at what is left."""
        job = {
            "store": str(patient.inspector.directory),
            "kind": patient.inspector.kind,
            "known": [astuple(known) for known in patient.inspector.known],
            "seed": self.draw.getrandbits(32),
            "budget": BUDGET,
        }
        notes = self._at_a_call(job) if self.draw.random() < 0.5 else self._at_a_moment(job)
        for note in notes:
            patient.hear(note)
            if "wrong" in note or ("notice" in note and not patient.harmed):
                self.wrong.append(f"{job['kind']}: {note.get('wrong') or note['notice']}")
        self.wrong += [
            f"{job['kind']}: after {_deeds(notes)}: {w}" for w in patient.look(self.draw)
        ]
        self.leftovers = max(self.leftovers, leftovers(patient.inspector.directory))

    def _at_a_call(self, job: dict[str, Any]) -> list[Note]:
        what = self.draw.choice(CHANGING)
        last = self.draw.randint(1, self._calls.get(what, MANY_CALLS) + 1)
        before = self.draw.randint(0, 2)
        pid = self.nursery.start(**job, what=what, last=last, before=before)
        notes = self.nursery.wait(pid, SURE_SECONDS)
        if notes[-1]["ended"] == 0:
            self._calls[what] = max(self._calls.get(what, 0), notes[-2].get("calls", 0))
        else:
            self.at_calls += 1
            self.by_deed[what] += 1
        return notes

    def _at_a_moment(self, job: dict[str, Any]) -> list[Note]:
        before, notes = self.draw.randint(0, 3), []
        pid = self.nursery.start(**job, seconds=SURE_SECONDS)
        for note in self.nursery.notes(SURE_SECONDS):
            notes.append(note)
            if "wrong" in note or ("begin" in note and not before):
                break
            before -= "begin" in note
        lasts = self._seconds.get(note.get("begin", ""), 0.03)
        time.sleep(self.draw.uniform(0, WAIT * lasts))
        self.nursery.kill(pid)
        notes += self.nursery.wait(pid, SURE_SECONDS)
        self._learn(notes)
        self.at_moments += 1
        if "begin" in notes[-2]:
            self.by_deed[notes[-2]["begin"]] += 1
        else:
            self.between += 1
        return notes

    def _learn(self, notes: Sequence[Note]) -> None:
        for begun, ended in itertools.pairwise(notes):
            if "begin" in begun and "end" in ended:
                self._seconds[begun["begin"]] = ended["at"] - begun["at"]

    def figures(self) -> dict[str, Any]:
        """What was counted."""
        return {
            "kills": self.at_calls + self.at_moments,
            "at a call": self.at_calls,
            "at a moment": self.at_moments,
            "of these between two deeds": self.between,
            "half-written files at most": self.leftovers,
            "kinds of deeds": len(self.by_deed),
        }


def _deeds(notes: Sequence[Note]) -> str:
    return " ".join(note["begin"] for note in notes if "begin" in note)


def tried(kills: int, seed: int, kinds: Sequence[str] = KINDS) -> Outcome:
    """Kill so many processes."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as directory, Nursery("deeds") as nursery:
        patients = [Patient(Path(directory) / kind, kind) for kind in kinds]
        executioner = Executioner(nursery, seed)
        while executioner.at_calls + executioner.at_moments < kills:
            executioner.kill_one(executioner.draw.choice(patients))
    figures = executioner.figures() | {"seconds": time.monotonic() - began}
    return Outcome("kill", seed, figures, executioner.wrong)


def main(arguments: Sequence[str]) -> int:
    """Kill, and tell."""
    options = parser("kill", __doc__)
    options.add_argument("--kills", type=int, default=KILLS, help=f"(default {KILLS:,})")
    chosen = options.parse_args(arguments)
    return tried(chosen.kills, chosen.seed).tell(as_json=chosen.json)
