"""What a trial came to: a line of text, or JSON."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, field
from typing import Any

MOST_TOLD = 20  # of what went wrong: the first ones are enough to look for the reason


@dataclass(frozen=True)
class Outcome:
    """The figures of a trial, and each thing that went wrong as a sentence."""

    trial: str
    seed: int
    figures: dict[str, Any]
    wrong: list[str] = field(default_factory=list)

    def line(self) -> str:
        """One line of text."""
        figures = ", ".join(f"{_told(value)} {name}" for name, value in self.figures.items())
        return f"{self.trial}: seed {self.seed}: {figures}; {len(self.wrong)} wrong"

    def tell(self, *, as_json: bool) -> int:
        """Print it, and return the exit code."""
        if as_json:
            print(json.dumps(asdict(self)))
        else:
            print("\n".join([*self.wrong[:MOST_TOLD], self.line()]))
        return int(bool(self.wrong))


def _told(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def parser(trial: str, said: str | None) -> argparse.ArgumentParser:
    """The options that all trials have; `said` is the docstring of the module."""
    made = argparse.ArgumentParser(prog=f"scripts/trials {trial}", description=said)
    made.add_argument("--seed", type=int, default=1, help="of all that is drawn (default 1)")
    made.add_argument("--json", action="store_true", help="print the outcome as JSON")
    return made
