"""A store against a dictionary; the long form is `scripts/trials model`."""

from __future__ import annotations

import trial_model

STEPS, SEED = 400, 1


def test_a_store_gives_back_what_was_put_in_or_a_miss_that_may_be() -> None:
    outcome = trial_model.tried(STEPS, SEED)
    assert outcome.wrong == []
    assert outcome.figures["steps"] >= STEPS
