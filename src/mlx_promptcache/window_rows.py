"""The rows of windows on their way into blocks: those that they hold, and those of the past."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx

from mlx_promptcache.layers import TOKEN_AXIS, Layer, latest_rows, leaves, window_of
from mlx_promptcache.windows import Span

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

MOST_PASSED_BYTES = 1 << 30


class WindowRows(NamedTuple):
    """The rows of all windows of a model for the positions of `span`, by path and then by name."""

    span: Span
    rows: Mapping[str, Mapping[str, mx.array]]

    @property
    def nbytes(self) -> int:
        """Bytes that they take in memory."""
        return sum(array.nbytes for named in self.rows.values() for array in named.values())

    @property
    def arrays(self) -> list[mx.array]:
        """All the arrays."""
        return [array for named in self.rows.values() for array in named.values()]

    def until(self, stop: int) -> WindowRows:
        """Those before a position."""
        return self.cut(self.span.start, min(stop, self.span.stop))

    def cut(self, start: int, stop: int) -> WindowRows:
        """Those of the positions `[start, stop)`, which must be among these."""
        i, j = start - self.span.start, stop - self.span.start
        rows = {
            path: {name: array[:, :, i:j] for name, array in named.items()}
            for path, named in self.rows.items()
        }
        return WindowRows(Span(start, stop), rows)


def latest(layers: Iterable[Any], n_past: int, count: int) -> WindowRows | None:
    """Copies of the rows of the last `count` tokens, or of fewer where live layers hold fewer;
    None if the model has no windows.
    """
    found: dict[str, tuple[int, dict[str, mx.array]]] = {
        path: latest_rows(layer, n_past, count)
        for path, layer in leaves(layers)
        if window_of(layer, n_past) is not None
    }
    if not found:
        return None
    start = max(begin for begin, _ in found.values())
    rows = {
        path: {name: array[:, :, start - begin :] for name, array in named.items()}
        for path, (begin, named) in found.items()
    }
    return WindowRows(Span(start, n_past), rows)


def held(contents: Iterable[Layer], n_past: int) -> list[WindowRows]:
    """The rows up to `n_past` that all windows among these hold; none if there are no windows."""
    windows = [(layer, layer.window) for layer in contents if layer.window is not None]
    if not windows or n_past == 0:
        return []
    start = max(window.spans(n_past)[-1].start for _, window in windows)
    rows = {
        layer.path: {
            name: array[:, :, array.shape[TOKEN_AXIS] - (n_past - start) :]
            for name, array in layer.rows.items()
        }
        for layer, _ in windows
    }
    return [WindowRows(Span(start, n_past), rows)]


def joined(known: Sequence[WindowRows], begin: int, end: int) -> WindowRows | None:
    """The rows `[start, end)`, for as early a `start`, from `begin` on, as rows are known for.

    Where several know a row, the first of them counts.
    """
    pieces: list[WindowRows] = []
    start = end
    while start > begin:
        reaching = [rows for rows in known if rows.span.start < start <= rows.span.stop]
        if not reaching:
            break
        first = reaching[0].span.start
        pieces.insert(0, reaching[0].cut(max(first, begin), start))
        start = pieces[0].span.start
    if not pieces:
        return None
    rows = {
        path: {
            name: mx.concatenate([piece.rows[path][name] for piece in pieces], TOKEN_AXIS)
            for name in named
        }
        for path, named in pieces[0].rows.items()
    }
    return WindowRows(Span(start, end), rows)


def limited(passed: Sequence[WindowRows]) -> list[WindowRows]:
    """The latest of these, as many as memory is set aside for.

    What is dropped is missing in blocks: a prompt is then not resumed there from rows alone.
    """
    kept: list[WindowRows] = []
    total = 0
    for rows in reversed(passed):
        total += rows.nbytes
        if total > MOST_PASSED_BYTES:
            break
        kept.insert(0, rows)
    return kept
