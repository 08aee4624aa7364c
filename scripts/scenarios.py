"""What is simulated for docs/scale.md: one table of figures for each question that is asked."""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fleet import (
    ALONE,
    BY_KEY,
    BY_SHARD,
    COMPUTED,
    DISK,
    MEMORY,
    RECOMPUTE,
    REMOTE,
    SHARED,
    Figures,
    Machine,
    Place,
    Setup,
)
from simulation import Simulation
from stock import Sizes
from traffic import Mix, Request, requests

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Row = dict[str, Any]

PERFORMANCE = Path(__file__).parents[1] / "docs" / "performance.json"
EVERY_SECONDS = 60.0  # a machine is asked something, on average
BUSIEST = 100  # machines; larger fleets are asked as much as this one, by more people
FLEETS = (1, 10, 100, 1000, 10_000)
FLEET = 100


def measured() -> tuple[Machine, Sizes]:
    """A machine and the sizes of rows as docs/performance.json has them."""
    told = json.loads(PERFORMANCE.read_text("utf-8"))
    rows = told["stored"][0]
    first, *_, last = [row for row in told["lengths"] if row["tokens"] >= 256]
    cold = [statistics.median(x["seconds"]["mlx-promptcache"]["cold"]) for x in (first, last)]
    restoring = statistics.median(told["restoring"]["mlx-promptcache"])
    decoding = statistics.median(told["decoding"]["mlx-promptcache"])
    machine = Machine(
        tokens_per_second=(last["tokens"] - first["tokens"]) / (cold[1] - cold[0]),
        restored_per_second=rows["stored_bytes"] / restoring,
        decoded_per_second=decoding,
    )
    return machine, Sizes(row=rows["stored_bytes"] / rows["tokens"])


class Scenarios:
    """The tables, by name. `count` requests in each run, and four times as many for fleets."""

    def __init__(self, count: int, seed: int, says: Callable[[str], None]) -> None:
        self._count, self._seed, self._says = count, seed, says
        machine, sizes = measured()
        self._setup = Setup(FLEET, machine, Place(), sizes)
        self.tables: dict[str, Callable[[], Iterator[Row]]] = {
            "fleets": self._fleets,
            "seeds": self._seeds,
            "affinity": self._affinity,
            "sending": self._sending,
            "budgets": self._budgets,
            "cells": self._cells,
            "places": self._places,
            "speeds": self._speeds,
            "lists": self._lists,
            "herds": self._herds,
            "kinds": self._kinds,
        }

    def told(self) -> Row:
        """The constants of all runs."""
        setup = dataclasses.asdict(self._setup)
        rates = {"every_seconds": EVERY_SECONDS, "busiest": BUSIEST}
        performance = json.loads(PERFORMANCE.read_text("utf-8"))
        measured = f"{performance['date']}, commit {performance['commit']}"
        run = {"count": self._count, "seed": self._seed, "measured": measured}
        return {**run, **rates, **setup, "mix": vars(Mix())}

    def _asked(self, machines: int, *, seed: int | None = None, times: int = 1) -> list[Request]:
        rate = min(machines, BUSIEST) / EVERY_SECONDS
        return requests(Mix(), times * self._count, rate, seed or self._seed)

    def _run(self, asked: list[Request], label: Row, **changes: Any) -> Row:
        self._says(", ".join(f"{name} {value}" for name, value in label.items()))
        setup = dataclasses.replace(self._setup, **changes)
        return {**label, **told(Simulation(setup, self._seed).run(asked))}

    def _machine(self, **changes: Any) -> Machine:
        return dataclasses.replace(self._setup.machine, **changes)

    def _fleets(self) -> Iterator[Row]:
        for machines in FLEETS:
            asked = self._asked(machines, times=4)
            for mode in (RECOMPUTE, ALONE, SHARED):
                label = {"machines": machines, "mode": mode}
                yield self._run(asked, label, machines=machines, mode=mode)

    def _seeds(self) -> Iterator[Row]:
        for seed in range(self._seed, self._seed + 3):
            yield self._run(self._asked(FLEET, seed=seed), {"seed": seed})

    def _affinity(self) -> Iterator[Row]:
        asked = self._asked(FLEET)
        for mode in (ALONE, SHARED):
            for affinity in (True, False):
                label = {"mode": mode, "affinity": affinity}
                yield self._run(asked, label, mode=mode, affinity=affinity)

    def _sending(self) -> Iterator[Row]:
        asked = self._asked(FLEET)
        for affinity in (True, False):
            for sends_all in (True, False):
                label = {"affinity": affinity, "sends_all": sends_all}
                yield self._run(asked, label, affinity=affinity, sends_all=sends_all)

    def _budgets(self) -> Iterator[Row]:
        asked = self._asked(10)
        for budget in (5 * 10**8, 10**9, 2 * 10**9, 4 * 10**9, 8 * 10**9):
            machine = self._machine(budget=budget, memory=0)
            for mode in (ALONE, SHARED):
                label = {"budget": budget, "mode": mode}
                yield self._run(asked, label, machines=10, machine=machine, mode=mode)

    def _cells(self) -> Iterator[Row]:
        asked = self._asked(FLEET)
        for cell in (64, 128, 256, 512, 1024, 2048, 4096):
            yield self._run(asked, {"cell": cell}, cell=cell)

    def _places(self) -> Iterator[Row]:
        asked = self._asked(FLEET)
        changes: list[dict[str, float]] = [{"latency": x} for x in (0.005, 0.02, 0.05, 0.2)]
        changes += [{"to_machine": x} for x in (1.25e6, 12.5e6, 125e6, 1.25e9)]
        changes += [{"to_all": x} for x in (12.5e6, 125e6)]
        for change in changes:
            place = dataclasses.replace(self._setup.place, **change)  # type: ignore[arg-type]
            yield self._run(asked, change, place=place)

    def _speeds(self) -> Iterator[Row]:
        asked = self._asked(FLEET)
        for faster in (1, 10, 30, 100):
            rate = self._setup.machine.tokens_per_second * faster
            decoded = self._setup.machine.decoded_per_second * faster
            machine = self._machine(tokens_per_second=rate, decoded_per_second=decoded)
            for mode, forgiving in ((RECOMPUTE, False), (SHARED, False), (SHARED, True)):
                label = {"faster": faster, "mode": mode, "forgiving": forgiving}
                yield self._run(asked, label, machine=machine, mode=mode, forgiving=forgiving)

    def _lists(self) -> Iterator[Row]:
        asked = self._asked(FLEET)
        for strangers in (0, 10**5, 10**6, 10**7, 10**8):
            place = dataclasses.replace(self._setup.place, strangers=strangers)
            for listing in (BY_SHARD, BY_KEY):
                label = {"strangers": strangers, "listing": listing}
                yield self._run(asked, label, place=place, listing=listing)

    def _herds(self) -> Iterator[Row]:
        """All machines ask for one new prefix, each with its own question, within some time."""
        for machines in (10, 100, 1000):
            for within in (1.0, 60.0):
                herd = [
                    Request(within * i / machines, i, ((1, 2048), (2 + i, 40)), (1 << 60, 1), False)
                    for i in range(machines)
                ]
                label = {"machines": machines, "within": within}
                yield self._run(herd, label, machines=machines)

    def _kinds(self) -> Iterator[Row]:
        asked = self._asked(FLEET)
        for kinds in (1, 2, 4):
            label = {"kinds": kinds}
            yield self._run(asked, label, kinds=kinds, affinity=False)


def told(found: Figures) -> Row:
    """The figures of a run, for a table."""
    per = 1 / max(1, found.requests)
    return {
        "requests": found.requests,
        "seconds": round(found.seconds, 1),
        **{tier: round(found.part(tier), 4) for tier in (MEMORY, DISK, REMOTE, COMPUTED)},
        "median": round(found.median, 3),
        "p99": round(found.p99, 2),
        "lists": round(found.lists * per, 2),
        "gets": round(found.gets * per, 2),
        "puts": round(found.puts * per, 2),
        "got": round(found.got * per),
        "put": round(found.put * per),
        "written": round(found.written * per),
        "copied": round(found.copied * per),
        "evicted": round(found.evicted * per),
        "amplification": round(found.amplification, 3),
        "objects": found.objects,
        "late": found.late,
        "not_worth": found.not_worth,
        "refused": found.refused,
    }
