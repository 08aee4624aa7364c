"""The page docs/scale.md and its pictures, made of what scripts/simulate found, and of that alone.

Its text stands in scalepage.md.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fleet import ALONE, BY_KEY, BY_SHARD, RECOMPUTE, SHARED
from mlx_promptcache.plots import COLOURS, MARKS, Line, Picture
from simulation import PAGE, THREADS
from traffic import HEADER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

Json = dict[str, Any]
TIERS = ("memory", "disk", "remote", "computed")

NUMBERS = ("No", "One", "Two", "Three", "Four")
WIDTH = 100
READS = 5500  # a second, of one prefix of Amazon's
LISTS = 3  # of the first directory, for each prompt
LISTED = 17  # directories that a prompt of 4,096 tokens lists
TEXT = Path(__file__).with_suffix(".md")
SHORT = "\n**A quick look, not figures to rely on**: too few requests.\n"


def document(report: Json) -> str:
    """The text of docs/scale.md."""
    tables = report["tables"]
    fleets = tables["fleets"]
    modes = {mode: [row for row in fleets if row["mode"] == mode] for mode in (ALONE, SHARED)}
    last, wandering = modes[SHARED][-1], tables["affinity"]
    rate = last["machines"] / report["every_seconds"]
    row = report["sizes"]["row"]
    machine, place = report["machine"], report["place"]
    values = {
        **_constants(report),
        **{name: _table(name, rows) for name, rows in tables.items()},
        "requests": _table("requests", modes[SHARED]),
        "shared_first": modes[SHARED][0]["computed"],
        "shared_last": last["computed"],
        "alone_first": modes[ALONE][0]["computed"],
        "alone_last": modes[ALONE][-1]["computed"],
        "most": last["machines"],
        "rate": rate,
        "per_second": rate * (last["lists"] + last["gets"] + last["puts"]),
        "lists_second": rate * last["lists"],
        "got_second": rate * last["got"] / 1e9,
        "put_second": rate * last["put"] / 1e9,
        "ratio": last["put"] / max(1, last["got"]),
        "written": last["written"] / 1e6,
        "got_times": wandering[3]["got"] / max(1, wandering[2]["got"]),
        "line_tokens": place["to_machine"] / row,
        "budget_cost": _cost(tables["budgets"], ALONE),
        "budget_cost_shared": _cost(tables["budgets"], SHARED),
        "restored_tokens": machine["restored_per_second"] / row,
        **_sending(tables["sending"]),
        "pages_shard": 1e7 / 256 / PAGE,
        "pages_all": LISTED * 1e7 / 256 / PAGE,
        "seconds_all": LISTED * 1e7 / 256 / PAGE / THREADS * place["latency"],
        "no_remote": f"{wandering[0]['computed']:.1%}",
        "hot": READS / LISTS,
        "hot_machines": READS / LISTS * report["every_seconds"],
    }
    text = TEXT.read_text("utf-8").format_map(values)
    return "\n\n".join(_wrapped(part) for part in text.rstrip().split("\n\n")) + "\n"


def _wrapped(part: str) -> str:
    """A paragraph, or each point of a list, in lines of one length; anything else as it is."""
    if part.startswith(("|", "#", "!", "`")):
        return part
    points = re.split(r"\n(?=\* |\d\. )", part)
    return "\n".join(_filled(" ".join(point.split())) for point in points)


def _filled(point: str) -> str:
    head = re.match(r"(\* |\d\. )?", point)
    indent = " " * len(head[0]) if head else ""
    return textwrap.fill(
        point, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _sending(rows: Sequence[Json]) -> Json:
    """What it saves and costs to send only what was used again: rows in turn all, again."""
    stays, stays_again, wanders, wanders_again = rows
    return {
        "sent_less": 1 - stays_again["put"] / max(1, stays["put"]),
        "sent_cost": 100 * (stays_again["computed"] - stays["computed"]),
        "wander_cost": 100 * (wanders_again["computed"] - wanders["computed"]),
    }


def _cost(rows: Sequence[Json], mode: str) -> float:
    """How many points less are reused with 1 GB than with 8."""
    computed = {row["budget"]: row["computed"] for row in rows if row["mode"] == mode}
    return 100.0 * float(computed[10**9] - computed[8 * 10**9])


def _constants(report: Json) -> Json:
    machine, place, mix = report["machine"], report["place"], report["mix"]
    lengths = {
        name: f"{mix[name][0]:,}"
        for name in ("system", "message", "reply", "prefix", "question", "document")
    }
    numbers = ("chats", "series", "systems", "shots", "zipf", "turns", "questions", "waves")
    return {
        **{name: mix[name] for name in (*numbers, "thinking", "pause")},
        **lengths,
        "documents": 1 - mix["chats"] - mix["series"],
        "four": NUMBERS[HEADER[1]],
        "measured": report["measured"],
        "seed": report["seed"],
        "count": report["count"],
        "fleet_count": 4 * report["count"],
        "fleet": report["machines"],
        "busiest": report["busiest"],
        "minutes": report["minutes"],
        "short": SHORT if report["count"] < 1000 else "",
        "tokens_per_second": machine["tokens_per_second"],
        "row": report["sizes"]["row"],
        "restored": machine["restored_per_second"] / 1e6,
        "decoded": machine["decoded_per_second"],
        "drive": machine["disk_per_second"] / 1e9,
        "budget": machine["budget"] / 1e9,
        "memory": machine["memory"] / 1e9,
        "latency": place["latency"] * 1e3,
        "to_machine": place["to_machine"] * 8 / 1e6,
        "to_all": place["to_all"] * 8 / 1e9,
        "page": PAGE,
    }


# Tables

Column = tuple[str, "Callable[[Json], str]"]


def _share(name: str) -> Column:
    return name, lambda row: f"{row[name]:.1%}"


def _megabytes(head: str, name: str) -> Column:
    return head, lambda row: f"{row[name] / 1e6:.1f}"


def _number(head: str, name: str, form: str = ",") -> Column:
    return head, lambda row: format(row[name], form)


FROM = tuple(_share(name) for name in TIERS)
FIRST = (_number("median, s", "median", ".2f"), _number("p99, s", "p99", ".1f"))
LATE = _number("late", "late")
MODE = "", lambda row: row["mode"]
ASKED = (
    _number("lists", "lists", ",.1f"),
    _number("gets", "gets", ".2f"),
    _number("puts", "puts", ".2f"),
    _megabytes("MB got", "got"),
    _megabytes("MB put", "put"),
)
SENT = "sent/new", lambda row: f"{row['amplification']:.2f}"
STAYS = "sessions", lambda row: "stay" if row["affinity"] else "wander"
MACHINES = _number("machines", "machines")


def _changed(row: Json) -> str:
    """What was changed of a place."""
    if "latency" in row:
        return f"{row['latency'] * 1e3:.0f} ms a request"
    if "to_machine" in row:
        return f"{row['to_machine'] * 8 / 1e6:,.0f} Mbit/s to a machine"
    return f"{row['to_all'] * 8 / 1e9:g} Gbit/s to all"


COLUMNS: dict[str, tuple[Column, ...]] = {
    "fleets": (MACHINES, MODE, *FROM, *FIRST),
    "seeds": (_number("seed", "seed"), *FROM, *FIRST, _number("lists", "lists", ".1f")),
    "requests": (MACHINES, *ASKED, _number("objects", "objects"), SENT, LATE),
    "sending": (
        STAYS, ("sent", lambda row: "all" if row["sends_all"] else "used again"), *FROM, *FIRST,
        _number("puts", "puts", ".2f"), _megabytes("MB got", "got"), _megabytes("MB put", "put"),
    ),
    "affinity": (
        STAYS,
        MODE, *FROM, *FIRST, _megabytes("MB got", "got"),
    ),
    "budgets": (
        ("budget", lambda row: f"{row['budget'] / 1e9:g} GB"),
        MODE, _share("disk"), _share("remote"), _share("computed"), *FIRST,
        _megabytes("MB evicted", "evicted"), _megabytes("MB got", "got"),
    ),
    "cells": (_number("cell", "cell"), _share("remote"), _share("computed"), *FIRST, *ASKED,
              _number("objects", "objects")),
    "places": (("changed", _changed), _share("remote"), _share("computed"), *FIRST, LATE,
               _number("not worth it", "not_worth")),
    "speeds": (
        ("tokens a second", lambda row: f"{row['faster']} x"),
        ("", lambda row: "forgiving" if row["forgiving"] else row["mode"]),
        *FROM, *FIRST, LATE, _number("not worth it", "not_worth"),
    ),
    "lists": (
        _number("strangers", "strangers"), ("lists", lambda row: row["listing"]),
        _number("pages a prompt", "lists", ",.1f"), _share("remote"), _share("computed"), *FIRST,
        LATE,
    ),
    "herds": (
        MACHINES, ("within", lambda row: f"{row['within']:.0f} s"),
        _share("remote"), _share("computed"), *FIRST, _megabytes("MB got", "got"),
        _megabytes("MB put", "put"), SENT,
    ),
    "kinds": (
        _number("kinds", "kinds"), _share("remote"), _share("computed"),
        _megabytes("MB put", "put"), _number("objects", "objects"), SENT,
    ),
}  # fmt: skip


def _table(name: str, rows: Sequence[Json]) -> str:
    columns = COLUMNS[name]
    lines = [[head for head, _ in columns], ["---", *["--:"] * (len(columns) - 1)]]
    lines += [[tell(row) for _, tell in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# Pictures


def pictures(report: Json) -> dict[str, Picture]:
    """The pictures, by their names."""
    tables, said = report["tables"], f"Simulated, seed {report['seed']}"
    return {
        "scale-fleets": Picture(
            "Tokens that have to be computed",
            "machines that share",
            "percent of all prompt tokens",
            tuple(_lines(tables["fleets"], "mode", (SHARED, ALONE), "machines", _percent)),
            f"{said}. The lower the better; without a cache it is 100.",
        ),
        "scale-lists": Picture(
            "The first token, with other objects in the store",
            "objects of each kind that are of no use",
            f"seconds, median; {report['machines']} machines",
            tuple(_lines(tables["lists"], "listing", (BY_KEY, BY_SHARD), "strangers", _median)),
            f"{said}. The lower the better; without a cache it is {_cold(report):.1f} s.",
        ),
    }


def _percent(row: Json) -> float:
    return 100.0 * float(row["computed"])


def _median(row: Json) -> float:
    return float(row["median"])


def _cold(report: Json) -> float:
    """The median without a cache, of the same requests as the lists."""
    rows = report["tables"]["speeds"]
    return next(float(r["median"]) for r in rows if r["faster"] == 1 and r["mode"] == RECOMPUTE)


def _lines(
    rows: Sequence[Json], by: str, names: Iterable[str], x: str, y: Callable[[Json], float]
) -> Iterable[Line]:
    for i, name in enumerate(names):
        chosen = [row for row in rows if row[by] == name and row[x] > 0]
        points = [row[x] for row in chosen], [y(row) for row in chosen]
        yield Line(name, *points, colour=COLOURS[i], mark=MARKS[i])
