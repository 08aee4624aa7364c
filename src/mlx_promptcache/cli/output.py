"""What users see: answers on standard output, everything else on standard error."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from mlx_promptcache.tree import id_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from mlx_promptcache.deletion import Deletion
    from mlx_promptcache.writer import Saved

# Some terminals obey those, too; the last are bytes of paths that are no text.
CONTROLS = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff]")
PROGRAM = "mlx-promptcache"
STARTED = time.time()  # a fallback: the process is a few hundredths of a second older

_speaker = PROGRAM


def debug() -> bool:
    """Whether tracebacks are wanted."""
    return os.environ.get("MLX_PROMPTCACHE_DEBUG", "") not in {"", "0"}


def error(sentence: str) -> None:
    """Say what is wrong, in one line."""
    click.echo(f"{_speaker}: {printable(' '.join(sentence.split()))}", err=True)


def printable(text: str) -> str:
    """A text that may come from a file, with whatever could command a terminal escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class _Notice(logging.Formatter):
    """A notice as one line that commands no terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(f"{_speaker}: {' '.join(record.getMessage().split())}")


def set_up_notices(*, quiet: bool) -> None:
    """Show the package's notices on standard error, unless they are not wanted."""
    log = logging.getLogger("mlx_promptcache")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Notice())
    log.handlers = [handler]
    log.propagate = False
    log.setLevel(logging.CRITICAL if quiet else logging.WARNING)


@contextlib.contextmanager
def bar(what: str, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A function that shows how much of something is done, on a terminal and nowhere else."""
    if quiet or not sys.stderr.isatty():
        yield lambda done, total: None  # noqa: ARG005
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Rest

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), Rest())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(what, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


def speak_for(rank: int) -> None:
    """Of several processes of one run only the first one answers; notices tell whose they are."""
    global _speaker
    if rank:
        _speaker = f"{PROGRAM} (rank {rank})"
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123 - to the end


def print_json(value: dict[str, Any]) -> None:
    """Print one JSON object."""
    click.echo(json_text(value))


def json_text(value: dict[str, Any]) -> str:
    """One JSON object in one line that commands no terminal."""
    text = json.dumps(value, ensure_ascii=False)  # that escapes what is below a space, and no more
    return CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print columns, the first to the left and the others to the right."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(heads, *rows, strict=True)]
    lines = []
    for row in (heads, *rows):
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    click.echo("\n".join(lines))


def plan(plan: Deletion, *, dry_run: bool) -> str:
    """What would be deleted, or is, for people."""
    if not plan:
        return "there is nothing to delete"
    counts = [
        (len(plan.names), "names"),
        (len(plan.snapshots), "snapshots"),
        (len(plan.blocks), "blocks"),
        (len(plan.tokenizers), "tokenizers"),
        (len(plan.leftovers), "leftovers"),
    ]
    told = ", ".join(f"{count} {what}" for count, what in counts if count)
    names = f" ({', '.join(plan.names)})" if plan.names else ""
    what = "would delete" if dry_run else "to delete"
    return f"{what}: {told}, {size(plan.freed_bytes)}{names}"


def removed(plan: Deletion) -> list[str]:
    """The names that a plan deletes, and the ids of its snapshots, as JSON."""
    return [*plan.names, *map(id_of, plan.snapshots)]


def saved(saved: Saved) -> dict[str, Any]:
    """What a save wrote, as JSON."""
    return {
        "name": saved.name,
        "snapshot": saved.snapshot,
        "blocks_written": saved.blocks_written,
        "blocks_shared": saved.blocks_shared,
        "bytes_written": saved.bytes_written,
    }


def size(count: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def age(then: float) -> str:
    """How long ago, for people."""
    if not then:
        return "-"
    seconds = max(0.0, time.time() - then)
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def process_seconds() -> float:
    """Seconds since this process started."""
    try:
        with open("/proc/self/stat", "rb") as file:  # noqa: PTH123 - the one file of its kind
            ticks = int(file.read().rpartition(b")")[2].split()[19])  # field 22: starttime
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError):
        return time.time() - STARTED
