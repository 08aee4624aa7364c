"""Many processes use one store at the same time, and each of them says what it would say alone.

They save, load, generate, list, verify and clear at random. Nobody waits without end, no wrong
token is said, and nothing is found damaged.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections import Counter
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deeds import RARE, WEIGHTS
from inspection import Inspector
from nursery import Nursery
from outcome import Outcome, parser

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from nursery import Note

PROCESSES, SECONDS = 8, 120.0
KINDS = ("smallest", "hybrid")  # two models that share a store
SILENCE = 60.0  # seconds: whoever says nothing for so long waits for what does not come


class Crowd:
    """Processes that use one store."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.directory, self._draw = directory, random.Random(seed)
        self.inspectors = [Inspector(directory, kind) for kind in KINDS]
        self.deeds: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.longest = 0.0

    def run(self, nursery: Nursery, processes: int, seconds: float) -> None:
        """Let so many processes do what they like for so many seconds."""
        pids = {nursery.start(**self._job(i, seconds)) for i in range(processes)}
        began = dict.fromkeys(pids, time.monotonic())
        busy = set(pids)
        for note in self._notes(nursery):
            self._hear(note, began)
            busy -= {note["pid"]} if "done" in note or "wrong" in note else set()
            silent = [pid for pid in busy if note["at"] - began[pid] > SILENCE]
            if silent or not busy:
                break
        self.wrong += [f"process {pid} was silent for {SILENCE} seconds" for pid in busy]
        for pid in pids:
            if pid in busy:
                nursery.kill(pid)
            nursery.wait(pid)

    def _job(self, number: int, seconds: float) -> Note:
        inspector = self.inspectors[number % len(self.inspectors)]
        return {
            "store": str(self.directory),
            "kind": inspector.kind,
            "known": [astuple(known) for known in inspector.known],
            "seed": self._draw.getrandbits(32),
            "seconds": seconds,
        }

    def _notes(self, nursery: Nursery) -> Iterator[Note]:
        try:
            yield from nursery.notes(SILENCE)
        except TimeoutError:
            return

    def _hear(self, note: Note, began: dict[int, float]) -> None:
        pid = note["pid"]
        if "end" in note:
            self.deeds[f"{note['end']}: {note['answer']}"] += 1
            self.longest = max(self.longest, note["at"] - began[pid])
        began[pid] = max(note["at"], began[pid])
        if told := note.get("wrong") or note.get("notice"):
            self.wrong.append(told)

    def look(self) -> None:
        """See whether all is well when all are gone."""
        self.wrong += self.inspectors[0].what_is_wrong()
        for inspector in self.inspectors:
            for known in inspector.known:
                self.wrong += inspector.wrong_answers(known, drawn=False)
                self.wrong += inspector.wrong_answers(known, drawn=True)

    def figures(self) -> dict[str, Any]:
        """What was counted."""
        counted: Counter[str] = Counter()
        for deed, times in self.deeds.items():
            counted[deed.partition(":")[0]] += times
        common = {what: counted[what] for what, weight in WEIGHTS.items() if weight > RARE}
        slowest = {"seconds for the slowest deed": self.longest}
        return {"deeds": sum(counted.values()), **common, **slowest}


def tried(processes: int, seconds: float, seed: int) -> Outcome:
    """Let a crowd use a store."""
    with tempfile.TemporaryDirectory() as directory, Nursery("deeds") as nursery:
        crowd = Crowd(Path(directory) / "store", seed)
        crowd.run(nursery, processes, seconds)
        crowd.look()
    figures = {"processes": processes, "seconds": seconds, **crowd.figures()}
    return Outcome("many", seed, figures, crowd.wrong)


def main(arguments: Sequence[str]) -> int:
    """Let them, and tell."""
    options = parser("many", __doc__)
    options.add_argument("--processes", type=int, default=PROCESSES, help=f"(default {PROCESSES})")
    options.add_argument("--seconds", type=float, default=SECONDS, help=f"(default {SECONDS:.0f})")
    chosen = options.parse_args(arguments)
    return tried(chosen.processes, chosen.seconds, chosen.seed).tell(as_json=chosen.json)
