"""Windows: which positions a layer with a sliding window holds, and where it can be resumed.

A window of `size` rows holds the rows of the last tokens; some also keep the first `keep` rows for
ever (attention sinks). Pure: nothing here knows of arrays or files.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence


class Span(NamedTuple):
    """Positions `[start, stop)`."""

    start: int
    stop: int


class Window(NamedTuple):
    """A window of `size` rows, of which the first `keep` are those of the first tokens."""

    size: int
    keep: int = 0

    def spans(self, n_past: int) -> list[Span]:
        """The positions held at `n_past`, going up: `min(n_past, size)` of them."""
        if n_past <= self.size:
            return [Span(0, n_past)]
        last = Span(n_past - self.size + self.keep, n_past)
        return [Span(0, self.keep), last] if self.keep else [last]

    def deepest(
        self, covered: Sequence[Span], last: int, cut: Callable[[int], int] | None = None
    ) -> int:
        """The deepest position, at most `last`, at which all that the window holds is covered.

        `cut`, if given, lowers a position to one that may be used. 0 if there is none.
        """
        stretches = merged(covered)
        for stretch in reversed(stretches):
            position = min(stretch.stop, last)
            position = cut(position) if cut else position
            if position > stretch.start and all(
                any(s.start <= span.start and span.stop <= s.stop for s in stretches)
                for span in self.spans(position)
            ):
                return position
        return 0


def widest(windows: Iterable[Window]) -> Window:
    """A window that holds whatever any of these does. There must be one."""
    several = list(windows)
    keep = max(window.keep for window in several)
    return Window(max(window.size - window.keep for window in several) + keep, keep)


def merged(spans: Iterable[Span]) -> list[Span]:
    """The same positions in as few spans as possible, going up."""
    whole: list[Span] = []
    for span in sorted(spans):
        if whole and span.start <= whole[-1].stop:
            whole[-1] = Span(whole[-1].start, max(whole[-1].stop, span.stop))
        elif span.start < span.stop:
            whole.append(span)
    return whole
