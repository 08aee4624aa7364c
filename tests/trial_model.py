"""A store against a dictionary: it gives back what was put in, or a miss that may be."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from outcome import Outcome, parser
from store_machine import StoreMachine

if TYPE_CHECKING:
    from collections.abc import Sequence

STEPS, LENGTH = 10_000, 50  # in all, and of one store


def tried(steps: int, number: int) -> Outcome:
    """Do at least so many things to stores."""
    began, before, runs = time.monotonic(), StoreMachine.steps, 0
    wrong: list[str] = []
    while not wrong and StoreMachine.steps - before < steps:
        runs += 1
        try:
            _run(steps, number + runs - 1)
        except Exception as exc:  # noqa: BLE001 - told, with the steps that lead to it
            found = getattr(exc, "exceptions", [exc])  # of a group
            wrong += ["\n".join([repr(e), *getattr(e, "__notes__", ())]) for e in found]
    figures = {"steps": StoreMachine.steps - before, "seconds": time.monotonic() - began}
    return Outcome("model", number, figures, wrong)


def _run(steps: int, number: int) -> None:
    chosen = settings(
        max_examples=max(1, steps // LENGTH), stateful_step_count=LENGTH, deadline=None,
        database=None, suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink), print_blob=False,
    )  # fmt: skip
    run_state_machine_as_test(seed(number)(StoreMachine), settings=chosen)


def main(arguments: Sequence[str]) -> int:
    """Do them, and tell."""
    options = parser("model", __doc__)
    options.add_argument("--steps", type=int, default=STEPS, help=f"(default {STEPS:,})")
    chosen = options.parse_args(arguments)
    return tried(chosen.steps, chosen.seed).tell(as_json=chosen.json)
