"""Simulate fleets and make the page docs/scale.md; called by scripts/simulate."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import scalepage
from mlx_promptcache import plots
from scenarios import Scenarios

if TYPE_CHECKING:
    from scenarios import Row

DOCS = Path(__file__).parents[1] / "docs"
COUNT, SHORT = 1000, 60


def simulated(count: int, seed: int, only: list[str]) -> Row:
    """The figures of all tables, or of some."""

    def says(what: str) -> None:
        print(what, file=sys.stderr, flush=True)

    scenarios = Scenarios(count, seed, says)
    began = time.process_time()
    chosen = only or list(scenarios.tables)
    tables = {name: list(scenarios.tables[name]()) for name in chosen}
    spent = round((time.process_time() - began) / 60, 1)
    return {"format": 1, "minutes": spent, **scenarios.told(), "tables": tables}


def compact(report: Row) -> str:
    """JSON with one line for each run."""
    tables = {
        name: "[\n  " + ",\n  ".join(json.dumps(row) for row in rows) + "\n ]"
        for name, rows in report["tables"].items()
    }
    rest = {key: value for key, value in report.items() if key != "tables"}
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in rest.items()]
    inside = ",\n ".join(f"{json.dumps(name)}: {rows}" for name, rows in tables.items())
    return "{\n" + ",\n".join(lines) + ',\n "tables": {\n ' + inside + "\n }\n}\n"


def write(report: Row) -> None:
    """Make the page, its figures and its pictures."""
    (DOCS / "scale.json").write_text(compact(report), "utf-8")
    (DOCS / "scale.md").write_text(scalepage.document(report), "utf-8")
    for name, picture in scalepage.pictures(report).items():
        plots.save(picture, str(DOCS / name), kinds=["svg"])


def main() -> int:
    """Simulate, and print or write what came of it."""
    parser = argparse.ArgumentParser(prog="scripts/simulate", description=__doc__)
    parser.add_argument("--short", action="store_true", help="few requests: a quick look")
    parser.add_argument("--seed", type=int, default=1, help="(default 1)")
    parser.add_argument("--only", nargs="+", metavar="TABLE", default=[], help="some tables alone")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--write", action="store_true", help="make docs/scale.json and its page")
    parser.add_argument("--from", dest="figures", type=Path, help="figures that were made before")
    options = parser.parse_args()
    if options.write and (options.only or options.short):
        parser.error("--write makes the page of a whole run: leave --only and --short out")
    names = list(Scenarios(0, 0, print).tables)
    if unknown := sorted(set(options.only) - set(names)):
        parser.error(f"there is no table {unknown[0]!r}: choose of {', '.join(names)}")
    if options.figures and not options.figures.is_file():
        parser.error(f"there is no file {options.figures}")
    if options.figures:
        report = json.loads(options.figures.read_text("utf-8"))
    else:
        report = simulated(SHORT if options.short else COUNT, options.seed, options.only)
    if options.json:
        options.json.write_text(compact(report), "utf-8")
    if options.write:
        write(report)
    else:
        print(compact(report) if options.only else scalepage.document(report), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
