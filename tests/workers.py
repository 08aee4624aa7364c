"""Which tests stay together when several processes share them."""

from __future__ import annotations

from typing import Any

from xdist.scheduler import LoadScopeScheduling

ASKED_ONE_BY_ONE = "test_conformance.py"


def unit_of(nodeid: str) -> str:
    """What one process runs, in its order: a module, or all that one architecture is asked.

    The tests of a module share what was made for them. Architectures share next to nothing, and
    there are so many that all processes are busy until the end.
    """
    module, _, test = nodeid.partition("::")
    if not module.endswith(ASKED_ONE_BY_ONE):
        return module
    return test.partition("[")[2].removesuffix("]") or test


class Scheduling(LoadScopeScheduling):  # type: ignore[misc]
    """Gives out whole units, in the order in which they were collected."""

    def __init__(self, config: Any, log: Any) -> None:
        config.option.loadscopereorder = False  # true puts first what has the most tests
        super().__init__(config, log)

    def _split_scope(self, nodeid: str) -> str:
        return unit_of(nodeid)
