"""The first rows of a stored block, as a block of their own. Needs neither a model nor MLX."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mlx_promptcache import container, headers
from mlx_promptcache.container import ITEMSIZE, Array
from mlx_promptcache.headers import ROWS_AXIS, WINDOW
from mlx_promptcache.passes import record_of

if TYPE_CHECKING:
    from mlx_promptcache.container import Header, Json, Packed, Read


def first_rows(read: Read, block: Header, rows: int, end_key: str) -> Packed:
    """The block that holds the first `rows` rows of another, and its tokens; nothing else of it.

    `end_key` is the key of the position after them. Any first rows of a block are valid by
    themselves. Equal rows give the same digest as long as the zstd library is the same one.

    Raises:
        DamagedFile: an array's bytes are not those that were written.
    """
    start, window = block.content["start"], block.content.get("window")
    end, span = start + rows, headers.window_span(block)
    kept = {label: end - (span.start if _of_window(label) else start) for label in block.entries}
    arrays = {
        label: _cut(container.read_array(read, entry), kept[label])
        for label, entry in block.entries.items()
        if kept[label] > 0
    }
    content = {
        **block.content,
        "end_key": end_key,
        "tokens": block.content["tokens"][:rows],
        "window": window and {**window, "from": min(window["from"], end)},
        "stacks": {label: block.content["stacks"][label] for label in arrays},
    }
    return container.pack(headers.BLOCK, content, _notes(block, end), arrays)


def _of_window(label: str) -> bool:
    return label.startswith(WINDOW)


def _cut(array: Array, rows: int) -> Array:
    """The first rows of an array of `[layers, batch, heads, rows, ...]`."""
    before, after = array.shape[:ROWS_AXIS], array.shape[ROWS_AXIS + 1 :]
    row_bytes = math.prod(after) * ITEMSIZE[array.dtype]
    run, kept = array.shape[ROWS_AXIS] * row_bytes, rows * row_bytes
    data = b"".join(array.data[i * run : i * run + kept] for i in range(math.prod(before)))
    return Array(array.dtype, (*before, rows, *after), data)


def _notes(block: Header, end: int) -> Json:
    """What a block notes, without the passes that began after `end`."""
    record = record_of(block)
    ends = [stop for begin, stop in record.passes if begin < end]
    return {**block.notes, "passes": {**record.to_json(), "ends": ends}}
