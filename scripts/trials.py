"""Run one of the long trials; called by scripts/trials.

A trial is a module `tests/trial_<name>.py`. The first line of its docstring says what it tries, and
its `main` takes the other arguments and returns an exit code. `tests/outcome.py` is shared.
"""

from __future__ import annotations

import ast
import importlib
import os
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parent.parent / "tests"
PREFIX = "trial_"
USAGE = 2


def trials() -> dict[str, str]:
    """The trials by name, each with the first line of what it says of itself."""
    paths = sorted(TESTS.glob(f"{PREFIX}*.py"))
    return {path.stem.removeprefix(PREFIX): _first_line(path) for path in paths}


def _first_line(path: Path) -> str:
    said = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    return said.partition("\n")[0]


def usage() -> str:
    """How to call this, and which trials there are."""
    lines = [f"  {name:10} {said}" for name, said in trials().items()]
    return "\n".join(["usage: scripts/trials NAME [--seed N] [--json] ...", "", *lines])


def main(arguments: list[str]) -> int:
    """Run the trial that the first argument names."""
    if not arguments or arguments[0] not in trials():
        asked = bool(arguments) and arguments[0] in {"-h", "--help"}
        print(usage(), file=sys.stdout if asked else sys.stderr)
        return 0 if asked else USAGE
    sys.path.insert(0, str(TESTS))
    with tempfile.TemporaryDirectory() as directory:
        os.environ["XDG_CACHE_HOME"] = directory  # no memo of the user's is touched
        code: int = importlib.import_module(PREFIX + arguments[0]).main(arguments[1:])
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
