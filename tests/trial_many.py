"""Many processes use one store at the same time, and each of them says what it would say alone.

They save, load, generate, list, verify, prune and clear at random, within a budget that is too
small for all of it. Nobody waits without end, no wrong token is said, nothing is found damaged, and
the store is never larger than its budget and one state.
"""

from __future__ import annotations

import contextlib
import random
import tempfile
import threading
import time
from collections import Counter
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deeds import RARE, WEIGHTS
from inspection import Inspector
from mlx_promptcache.store import Store
from nursery import Nursery
from outcome import Outcome, parser

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from nursery import Note

PROCESSES, SECONDS = 8, 120.0
KINDS = ("smallest", "hybrid")  # two models that share a store
BUDGET = 500_000  # bytes: some states have to go for others
ONE_STATE = 100_000  # bytes that adding a state may take
WATCH_SECONDS = 0.02
SILENCE = 60.0  # seconds: whoever says nothing for so long waits for what does not come


class Crowd:
    """Processes that use one store."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.directory, self._draw = directory, random.Random(seed)
        self.inspectors = [Inspector(directory, kind) for kind in KINDS]
        self.deeds: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.longest = 0.0
        self.largest = 0

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

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Look again and again how much the store takes on disk while this lasts."""
        over = threading.Event()
        thread = threading.Thread(target=self._watch, args=(over,))
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
        if self.largest > BUDGET + ONE_STATE:
            self.wrong.append(f"the store took {self.largest:,} bytes of {BUDGET:,}")

    def _watch(self, over: threading.Event) -> None:
        """What is deleted and added while one looks may be counted both: the least of three looks
        is no more than there was at some time.
        """
        store = Store(self.directory)
        while not over.wait(WATCH_SECONDS):
            self.largest = max(self.largest, min(store.taken() for _ in range(3)))

    def _job(self, number: int, seconds: float) -> Note:
        inspector = self.inspectors[number % len(self.inspectors)]
        return {
            "store": str(self.directory),
            "kind": inspector.kind,
            "known": [astuple(known) for known in inspector.known],
            "seed": self._draw.getrandbits(32),
            "budget": BUDGET,
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
        answers = Counter(deed.partition(": ")[2] for deed in self.deeds.elements())
        return {
            "deeds": sum(counted.values()),
            **common,
            "refused for want of room": answers["no room"],
            "bytes at most": self.largest,
            "bytes of budget": BUDGET,
            "seconds for the slowest deed": self.longest,
        }


def tried(processes: int, seconds: float, seed: int) -> Outcome:
    """Let a crowd use a store."""
    with tempfile.TemporaryDirectory() as directory, Nursery("deeds") as nursery:
        crowd = Crowd(Path(directory) / "store", seed)
        with crowd.watched():
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
