"""What a trial came to: a line of text, or JSON."""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Sequence

T = TypeVar("T")

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


def some(all_: Sequence[T], most: int | None, seed: int) -> Sequence[T]:
    """At most so many of these, evenly spread; other seeds choose others. All if `most` is None."""
    if most is None or len(all_) <= most:
        return all_
    first, step = random.Random(seed).random(), len(all_) / most
    return [all_[int((first + number) * step)] for number in range(most)]


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
