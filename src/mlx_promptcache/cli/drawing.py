"""A tree of stored prefixes as lines of text, and as JSON."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from mlx_promptcache.cli import output
from mlx_promptcache.prefixes import walk

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mlx_promptcache.catalog import Entry
    from mlx_promptcache.prefixes import Branch


class _Marks(NamedTuple):
    fork: str
    last: str
    goes_on: str
    nothing: str
    state: str


LINES = _Marks("├─ ", "└─ ", "│  ", "   ", "•")
PLAIN = _Marks("|- ", "`- ", "|  ", "   ", "*")


def lines(branches: Sequence[Branch]) -> Iterator[str]:
    """A tree as text: what the tokens of a branch are, then the states on it, then its forks."""
    marks = LINES if _can_show(LINES) else PLAIN
    margins: dict[int, str] = {}  # of what stands below a branch
    last = {id(branch.branches[-1]) for branch, _ in walk(branches) if branch.branches}
    for branch, above in walk(branches):
        margin = margins[id(above[-1])] if above else ""
        ended = id(branch) in last
        mark = "" if not above else marks.last if ended else marks.fork
        margins[id(branch)] = margin + (
            "" if not above else marks.nothing if ended else marks.goes_on
        )
        yield f"{margin}{mark}{_branch(branch)}"
        if not _is_simple(branch):
            beside = margins[id(branch)] + (marks.goes_on if branch.branches else marks.nothing)
            yield from (f"{beside}{marks.state} {_at(state)}" for state in branch.states)


def _can_show(marks: _Marks) -> bool:
    try:
        "".join(marks).encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _is_simple(branch: Branch) -> bool:
    """Whether one line says all: one state, or none, at the very end."""
    return len(branch.states) <= 1 and all(state.tokens == branch.end for state in branch.states)


def _branch(branch: Branch) -> str:
    count = branch.end - branch.start
    told = [_count(count, "token"), output.size(branch.bytes), _count(branch.hits, "hit")]
    if branch.states and _is_simple(branch):
        told.append(_label(branch.states[0]))
    return "  ".join(told)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _label(state: Entry) -> str:
    status = "" if state.status == "ok" else f" ({state.status})"
    return f"{state.name or state.snapshot}{status}"


def _at(state: Entry) -> str:
    return f"at {state.tokens:,}: {_label(state)}, {_count(state.hits, 'hit')}"


def to_json(branches: Sequence[Branch]) -> list[dict[str, Any]]:
    """A tree as JSON, its branches nested."""
    told: dict[int, dict[str, Any]] = {}
    roots: list[dict[str, Any]] = []
    deepest = 0
    for branch, above in walk(branches):
        told[id(branch)] = {
            "from": branch.start,
            "to": branch.end,
            "tokens": branch.end - branch.start,
            "bytes": branch.bytes,
            "hits": branch.hits,
            "states": [_state(state) for state in branch.states],
            "branches": [],
        }
        (told[id(above[-1])]["branches"] if above else roots).append(told[id(branch)])
        deepest = max(deepest, len(above))
    sys.setrecursionlimit(max(sys.getrecursionlimit(), 4 * deepest + 1000))  # whoever writes it
    return roots


def _state(state: Entry) -> dict[str, Any]:
    return {
        "name": state.name,
        "snapshot": state.snapshot,
        "tokens": state.tokens,
        "hits": state.hits,
        "status": state.status,
        "reason": state.reason,
    }
