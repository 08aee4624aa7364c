"""What is promised about time and bytes, and what a report of scripts/bench says about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlx_promptcache.timing import median, ratio

if TYPE_CHECKING:
    from collections.abc import Callable

Json = dict[str, Any]

# The arms of a report, as they are called in tables.
OURS, THEIRS, LLAMA = "mlx-promptcache", "mlx-lm", "llama.cpp"
SAME, LOADING = f"{OURS}, the same prompt", f"{OURS}, importing and loading only"
SAVING_NOTHING = f"{OURS}, saving nothing"
SAVED_RUN = 64  # tokens that a cold run generates


@dataclass(frozen=True)
class Goal:
    """A figure of a report, and how large it may be; how small, if `least`."""

    what: str
    figure: Callable[[Json], float]
    limit: float
    form: str = "{:.3g}"
    least: bool = False

    def reached(self, value: float) -> bool:
        """Whether a value is on the right side."""
        return value >= self.limit if self.least else value <= self.limit

    def written(self, value: float) -> str:
        """A value as people read it."""
        return self.form.format(value)

    @property
    def bound(self) -> str:
        """The limit in words."""
        return f"at {'least' if self.least else 'most'} {self.written(self.limit)}"


GOALS = (
    Goal(
        f"first token of a warm process, against {THEIRS} with its prompt cache file",
        lambda r: ratio(r["warm"][OURS], r["warm"][THEIRS]),
        1 / 8,
    ),
    Goal(
        f"first token of a warm process, against {LLAMA} with its session",
        lambda r: ratio(r["warm"][OURS], r["warm"][LLAMA]),
        1.5,
    ),
    Goal(
        "first token of the same prompt again, beyond importing and loading",
        lambda r: median(r["warm"][SAME]) - median(r["warm"][LOADING]),
        0.1,
        "{:.3f} s",
    ),
    Goal(
        f"a cold process that also saves, against {THEIRS}",
        lambda r: ratio(r["cold"][OURS], r["cold"][THEIRS]),
        1.0,
    ),
    Goal(
        "what saving adds to a cold process",
        lambda r: median(added(r)),
        3.0,
        "{:.1f} %",
    ),
    Goal(
        f"tokens a second, against {THEIRS}",
        lambda r: ratio(r["decoding"][OURS], r["decoding"][THEIRS]),
        1.0,
        least=True,
    ),
    Goal(
        f"restoring in a running process, against {THEIRS}",
        lambda r: ratio(r["restoring"][OURS], r["restoring"][THEIRS]),
        2.0,
    ),
    Goal("stored bytes of float32 rows", lambda r: kept(r, "float32"), 86.0, "{:.1f} %"),
    Goal("stored bytes of bfloat16 rows", lambda r: kept(r, "bfloat16"), 70.0, "{:.1f} %"),
)


@dataclass(frozen=True)
class Verdict:
    """What a report says about a goal."""

    goal: Goal
    value: float

    @property
    def reached(self) -> bool:
        """Whether the goal is reached."""
        return self.goal.reached(self.value)

    @property
    def sentence(self) -> str:
        """One line for a terminal."""
        word = "reached" if self.reached else "MISSED "
        written = self.goal.written(self.value)
        return f"{word}  {written:>8}  ({self.goal.bound})  {self.goal.what}"


def verdicts(report: Json) -> list[Verdict]:
    """Judge every goal whose figures were measured."""
    found = []
    for goal in GOALS:
        try:
            found.append(Verdict(goal, goal.figure(report)))
        except KeyError:  # not measured: another part, or another dtype
            continue
    return found


def added(report: Json) -> list[float]:
    """What saving adds to each process that does, in per cent of what the rest of it takes. The
    processes tell how long they save: whole ones differ by more than that.
    """
    pairs = zip(report["cold"][OURS], report["saving"], strict=True)
    return [100 * saving / (total - saving) for total, saving in pairs]


def kept(report: Json, dtype: str) -> float:
    """Stored bytes in per cent of raw ones."""
    rows = {row["dtype"]: row for row in report["stored"]}
    return 100 * float(rows[dtype]["stored_bytes"]) / float(rows[dtype]["raw_bytes"])
