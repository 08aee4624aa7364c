"""A report on a store: what is in it, what it saved, what goes next; as data, and as one page.

The page needs nothing but itself: no network, no other file. What comes from the store stands in it
as JSON in which no character ends a script, and is shown as text alone.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections import defaultdict
from dataclasses import asdict
from importlib import resources
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from mlx_promptcache import headers, prefixes, room
from mlx_promptcache.budget import Drive
from mlx_promptcache.catalog import Catalog
from mlx_promptcache.errors import PromptCacheError
from mlx_promptcache.eviction import Eviction
from mlx_promptcache.facts import memo_of
from mlx_promptcache.store import BLOCKS, SNAPSHOTS
from mlx_promptcache.tree import id_of
from mlx_promptcache.version import __version__

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from mlx_promptcache.budget import Budget
    from mlx_promptcache.catalog import Entry
    from mlx_promptcache.facts import Facts, Snapshot
    from mlx_promptcache.fingerprint import Fingerprint
    from mlx_promptcache.store import Store

    Json = dict[str, Any]

HOUR = 3600
LATEST = 253402300800.0  # the year 10000: what says that it is later is no time
MOST_BYTES = 1 << 53  # what JavaScript counts one by one
LONGEST_TEXT = 4000  # characters of a prompt: its begin, and its end, which tells it from others
ESCAPED = str.maketrans({c: f"\\u{ord(c):04x}" for c in "<>&\x7f"})  # with all that is not ASCII
MARK = "{{%s}}"  # where the page takes a part
POLICY = b"default-src 'none'; style-src 'sha256-"  # near the beginning of every page


def gather(
    store: Store,
    budget: Budget,
    fingerprint: Fingerprint | None = None,
    *,
    with_text: bool = False,
) -> Json:
    """All that the report tells, as JSON. Prompts are in it only `with_text`.

    Sizes are bytes, times seconds since the epoch. The caller holds a lock of the store.

    Raises:
        StoreError: the store cannot be read.
    """
    catalog = Catalog(store, fingerprint, memo_of(store))
    entries = catalog.entries()
    snapshots = _snapshots(catalog.facts, entries)
    uses, written = list(_hits(store.uses.all())), store.uses.written_by_day()
    order, why_not = _order(catalog.facts, entries, snapshots)
    states = _states(catalog.facts, entries, snapshots, uses, order)
    if with_text:
        for state, entry in zip(states, entries, strict=True):
            state["text"] = _text(store, entry.stem)
    catalog.facts.keep()
    return {
        "store": _shown(str(store.directory)),
        "version": __version__,
        "made": time.time(),
        "total_bytes": catalog.facts.total_bytes,
        "blocks": len(catalog.facts.blocks),
        "models": [_parts(told) for told in _models(snapshots)],
        "states": states,
        "tree": _tree(catalog.facts, entries),
        "hits": _by_hour(uses),
        "written": {day: n for day, n in written.items() if 0 <= n < MOST_BYTES},
        "budget": _budget(store, budget),
        "next": order,
        "next_unknown": why_not,
        "aside": [
            {"file": _shown(path), "bytes": file.size}
            for path, file in sorted(store.set_aside().items())
        ],
    }


def _snapshots(facts: Facts, entries: Iterable[Entry]) -> dict[str, Snapshot]:
    """What the snapshots say that can be read, newest first."""
    found: dict[str, Snapshot] = {}
    for entry in entries:
        try:
            found[entry.stem] = facts.snapshot(entry.stem)
        except PromptCacheError:
            continue
    return found


def _hits(uses: Iterable[Json]) -> Iterator[tuple[float, str, int, float]]:
    """When, what, how many rows, how many seconds: of the lines that make sense."""
    for use in uses:
        numbers: list[Any] = [use.get(name) for name in ("when", "rows", "seconds")]
        if all(type(n) in {int, float} and 0 <= n < LATEST for n in numbers):
            when, rows, seconds = map(float, numbers)
            yield when, str(use.get("what")), int(rows), seconds


def _by_hour(uses: Iterable[tuple[float, str, int, float]]) -> list[Json]:
    """How many hits there were in each hour that had any."""
    hours: dict[int, tuple[int, int, float]] = {}
    for when, _, rows, seconds in uses:
        hour = int(when // HOUR) * HOUR
        count, all_rows, all_seconds = hours.get(hour, (0, 0, 0.0))
        hours[hour] = (count + 1, all_rows + rows, all_seconds + seconds)
    return [
        {"hour": hour, "hits": count, "tokens": rows, "seconds": round(seconds, 3)}
        for hour, (count, rows, seconds) in sorted(hours.items())
    ]


# States


def _states(
    facts: Facts,
    entries: Sequence[Entry],
    snapshots: Mapping[str, Snapshot],
    uses: Iterable[tuple[float, str, int, float]],
    order: Sequence[Json],
) -> list[Json]:
    """The entries of `list`; with the seconds that it took to compute them, those that they have
    saved, and the place at which each would go.
    """
    saved: dict[str, float] = defaultdict(float)
    for _, identity, _, seconds in uses:
        saved[identity] += seconds
    models = _models(snapshots)
    places = {row["id"]: i for i, row in enumerate(order) if row["kind"] == "snapshot"}
    states = []
    for entry in entries:
        state = asdict(entry)
        del state["stem"]
        snapshot = snapshots.get(entry.stem)
        state["seconds"] = round(_seconds(facts, snapshot), 3) if snapshot else 0.0
        state["saved_seconds"] = round(saved[entry.snapshot], 3)
        state["goes"] = places.get(entry.snapshot)
        state["model"] = models[snapshot.fingerprint] if snapshot else None
        states.append(state)
    return states


def _models(snapshots: Mapping[str, Snapshot]) -> dict[str, int]:
    """What computed the states, by the JSON of its parts: a number for each."""
    return {
        told: i for i, told in enumerate(dict.fromkeys(s.fingerprint for s in snapshots.values()))
    }


def _parts(told: str) -> dict[str, str]:
    return {
        name: part if isinstance(part, str) else json.dumps(part)
        for name, part in json.loads(told).items()
    }


def _shown(path: str) -> str:
    """A path that can be printed, whatever bytes it has."""
    return path.encode("utf-8", "replace").decode()


def _seconds(facts: Facts, snapshot: Snapshot) -> float:
    """How long computing the rows of a state took, as far as that was noted."""
    seconds = 0.0
    for use in snapshot.uses:
        try:
            seconds += use.rows * facts.block(use.stem).seconds_per_token
        except PromptCacheError:
            continue
    return seconds


def _text(store: Store, stem: str) -> str | None:
    try:
        text = headers.text_of(headers.snapshot_header(store, stem).content["origin"])
    except PromptCacheError:
        return None
    if text is None or len(text) <= LONGEST_TEXT:
        return text
    return f"{text[: LONGEST_TEXT // 4]} ... {text[-LONGEST_TEXT * 3 // 4 :]}"


def _tree(facts: Facts, entries: Sequence[Entry]) -> list[Json]:
    """The branches, each with the index of the one before it; states by their index."""
    states = {id(entry): i for i, entry in enumerate(entries)}
    indices: dict[int, int] = {}
    rows: list[Json] = []
    for branch, above in prefixes.walk(prefixes.tree_of(facts, entries)[0]):
        indices[id(branch)] = len(rows)
        rows.append(
            {
                "parent": indices[id(above[-1])] if above else -1,
                "start": branch.start,
                "end": branch.end,
                "blocks": len(branch.blocks),
                "bytes": sum(facts.blocks[stem].size for stem in branch.blocks),
                "states": [states[id(entry)] for entry in branch.states],
            }
        )
    return rows


# What goes next


def _order(
    facts: Facts, entries: Iterable[Entry], snapshots: Mapping[str, Snapshot]
) -> tuple[list[Json], str | None]:
    """All that may be evicted, in order, or why that is not known."""
    users: dict[str, str] = {}
    for entry in entries:
        for use in snapshots[entry.stem].uses if entry.stem in snapshots else ():
            users.setdefault(use.stem, entry.name or entry.snapshot)
    try:
        order = list(Eviction(facts).order())
    except PromptCacheError as exc:
        return [], str(exc)
    freed = accumulate(on_disk for *_, on_disk in order)
    return [
        {
            "kind": kind.removesuffix("s"),
            "id": id_of(stem) if kind == SNAPSHOTS else stem.rpartition("/")[2],
            "of": id_of(stem) if kind == SNAPSHOTS else users.get(stem),
            "end": _end(facts, kind, stem, snapshots),
            "bytes": on_disk,
            "freed_bytes": so_far,
            "last_used": file.last_use,
        }
        for (kind, stem, file, on_disk), so_far in zip(order, freed, strict=True)
    ], None


def _end(facts: Facts, kind: str, stem: str, snapshots: Mapping[str, Snapshot]) -> int | None:
    """The position of a snapshot, or the one at which a block begins."""
    if kind == SNAPSHOTS:
        return snapshots[stem].n_past if stem in snapshots else None
    try:
        return facts.block(stem).start if kind == BLOCKS else None
    except PromptCacheError:
        return None


def _budget(store: Store, budget: Budget) -> Json:
    taken, drive = store.taken(), Drive.of(store.directory)
    known: Json = {
        "taken_bytes": taken,
        "max_bytes": budget.limit(drive, taken),
        "free_bytes": drive.free,
        "least_free_bytes": budget.floor(drive),
    }
    try:
        plan = room.plan_prune(store, budget)
    except PromptCacheError as exc:
        return known | {"prune": None, "reason": str(exc)}
    counts = {kind: len(getattr(plan, kind)) for kind in ("snapshots", "blocks", "leftovers")}
    return known | {"prune": counts | {"freed_bytes": plan.freed_on_disk}, "reason": None}


# The page


def page(report: Json) -> str:
    """The report as one HTML page."""
    script, style = _part("report.js"), _part("report.css")
    html = _part("report.html")
    for name, part in (
        ("style", style),
        ("style hash", _hash(style)),
        ("script", script),
        ("script hash", _hash(script)),
        ("data", json.dumps(report).translate(ESCAPED)),  # last: nothing in it is a mark
    ):
        html = html.replace(MARK % name, part)
    return html


def is_page(path: Path) -> bool:
    """Whether a file is a report, of this release or of an older one. Raises OSError."""
    with path.open("rb") as file:
        return POLICY in file.read(1024)


def _part(name: str) -> str:
    return resources.files("mlx_promptcache").joinpath(name).read_text("utf-8")


def _hash(text: str) -> str:
    """What the page's own policy knows the script by: no other one runs."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
