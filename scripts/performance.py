"""The page docs/performance.md, made of what scripts/bench measured, and of nothing else."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from goals import LLAMA, OURS, SAVED_RUN, SAVING_NOTHING, THEIRS, added, kept, verdicts
from mlx_promptcache import benchmark, plots
from mlx_promptcache.plots import COLOURS, Line, Picture
from mlx_promptcache.timing import median

if TYPE_CHECKING:
    from collections.abc import Sequence

Json = dict[str, Any]

# The page

PAGE = """\
# Performance

How long it takes, and how many bytes. This page is made by `scripts/bench --write` of the figures
in [performance.json](performance.json), which holds every sample: change neither by hand.

{machine}

{versions}

Model: {model}. Prefix: {prefix}. Commit {commit}, {date}, seed {seed}.{short}

## Goals

{goals}

A figure "against" another program is a ratio of medians of one run, in which the programs took
turns (A B C A B C ...), so that whatever else the machine did fell on all of them.

## The first token of a warm process

From the start of a process to the first byte of generated text that arrives on a pipe: importing,
loading the model, restoring, computing the question, drawing a token. The question is another one
in every round. Seconds; rounds: {runs}.

{warm}

All programs get the prompt through the model's chat template. `{theirs}` is `mlx_lm.generate
--prompt-cache-file` with a file from `mlx_lm.cache_prompt`.
{llama_note}

## A cold process

From the start of a process to its end: the whole prompt is computed, and {saved_run} tokens are
generated. Every one has an empty store. Seconds; rounds: {process_runs}.

{cold}

{saving}

## Within a process

{inside}

Decoding is timed from the second token on, after the same prompt. Restoring begins with files that
the system has in memory, and ends with arrays that MLX has evaluated: ours checks every byte
against its checksum and decompresses it. Medians; rounds: {runs}; in brackets the least and the
greatest.

{stored}

## Against the length of the prefix

![Time to the first token against the length of the prefix](performance-lengths.svg)

Seconds from the start of a process to its first token. Medians; warm runs: {warm_runs}, cold
runs: {cold_runs}.

{lengths}

## What the cache of K/V itself is worth

![Time for one token against its position](performance-positions.svg)

One token at a position, when the K/V of all tokens before it are there, and when all of them go
through the model again. Seconds; medians; rounds: {position_runs}.

{positions}

The lines are fits: {fits}.

## To measure it again

```
scripts/bench --write                       # everything, and this page; it took {minutes} minutes
scripts/bench --short                       # a quick look
scripts/bench --parts warm --json out.json  # one part
scripts/bench --from out.json               # judges what was measured before
mlx-promptcache bench --plot out            # cold and warm, with any model, on any machine
```

llama.cpp is measured where there is an environment with `llama-cpp-python` and a GGUF file of the
model: `scripts/bench --llama-python PYTHON --gguf FILE`. `scripts/smollm2.py` names the package
that carries the file.
"""

SAVING = """\
Saving, of the tokenizer as well as of the prompt, takes {seconds}, {share} of the rest.
A script (`saving_child.py`) starts those that save, and counts what passes in the calls that do;
what the system does with the files afterwards is not in it. Whole processes cannot tell: those that
save nothing differ by up to {spread}, the medians of both kinds by {beside}."""
SHORT = """

**A quick look, not a measurement:** a part of the prefix, few rounds. Its figures say that the
script works, and not how fast anything is."""
GIB = 2**30


def document(report: Json) -> str:
    """The text of docs/performance.md."""
    rows, positions = report["lengths"], report["positions"]
    return PAGE.format(
        machine=machine(report["machine"]),
        versions=", ".join(f"{name} {v}" for name, v in report["versions"].items()) + ".",
        model=f"{report['model']['name']}, {report['model']['dtype']}",
        prefix=f"`examples/fewshot/prefix.txt`, {report['stored'][0]['tokens']:,} tokens",
        short=SHORT if report["short"] else "",
        minutes=f"{report['minutes']:.0f}",
        commit=report["commit"] or "unknown",
        date=report["date"],
        seed=report["seed"],
        goals=goals(report),
        theirs=THEIRS,
        llama_note=llama_note(report),
        runs=len(report["warm"][OURS]),
        process_runs=len(report["cold"][THEIRS]),
        warm=samples_table(report["warm"]),
        saved_run=SAVED_RUN,
        cold=samples_table(report["cold"]),
        saving=saving(report),
        inside=inside(report),
        stored=stored(report),
        warm_runs=len(rows[0]["seconds"][OURS]["warm"]),
        cold_runs=len(rows[0]["seconds"][OURS]["cold"]),
        lengths=lengths(report),
        position_runs=len(positions[0]["with"]),
        positions=positions_table(positions),
        fits=fits(positions),
    )


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, the first column to the left."""
    lines = [f"| {' | '.join(heads)} |", f"|---{'|--:' * (len(heads) - 1)}|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def machine(values: Json) -> str:
    """The machine in a sentence."""
    memory = values["memory_bytes"]
    parts = [values["processor"], f"{values['cores']} cores"]
    parts += [f"{memory / GIB:.0f} GiB of memory"] if memory else []
    parts += [values["system"], f"MLX on {device(values['device'])}"]
    preloaded = f"; `{' '.join(values['preloaded'])}` preloaded" if values["preloaded"] else ""
    busy = f" Load average at the start: {values['load']}." if values["load"] is not None else ""
    return f"Machine: {', '.join(parts)}{preloaded}.{busy}"


def device(name: str) -> str:
    """`Device(cpu, 0)` as people say it."""
    found = re.search(r"\w+(?=,)", name)
    return f"the {found[0].upper()}" if found else name


def goals(report: Json) -> str:
    """All goals with what was measured."""
    rows = [
        [v.goal.what, v.goal.written(v.value), v.goal.bound, "yes" if v.reached else "**no**"]
        for v in verdicts(report)
    ]
    return table(["", "measured", "goal", "reached"], rows)


def llama_note(report: Json) -> str:
    """What llama.cpp ran, if it did."""
    if "gguf" not in report:
        return "llama.cpp was not measured."
    size = report["gguf"]["bytes"] / 1e6
    return (
        f"`{LLAMA}` restores its session file through its Python binding, with the weights of\n"
        f"`{report['gguf']['name']}` ({size:.0f} MB; those that MLX reads are "
        f"{report['model']['bytes'] / 1e6:.0f} MB)."
    )


def samples_table(samples: dict[str, list[float]]) -> str:
    """Medians and extremes of arms, in seconds."""
    rows = [
        [name, f"{median(s):.3f}", f"{min(s):.3f}", f"{max(s):.3f}"] for name, s in samples.items()
    ]
    return table(["", "median", "least", "greatest"], rows)


def saving(report: Json) -> str:
    """What saving takes, within processes and by whole ones."""
    spent, share, cold = report["saving"], added(report), report["cold"]
    alike = cold[SAVING_NOTHING]
    return SAVING.format(
        seconds=f"{median(spent):.2f} s ({min(spent):.2f} to {max(spent):.2f})",
        share=f"{median(share):.1f} % ({min(share):.1f} to {max(share):.1f})",
        spread=f"{max(alike) - min(alike):.2f} s",
        beside=f"{abs(median(cold[OURS]) - median(alike)):.2f} s",
    )


def inside(report: Json) -> str:
    """Decoding and restoring."""

    def cell(values: Sequence[float], scale: float) -> str:
        low, high = min(values) * scale, max(values) * scale
        return f"{median(values) * scale:.1f} ({low:.1f} to {high:.1f})"

    decoding, restoring = report["decoding"], report["restoring"]
    rows = [
        ["decoding, tokens a second", *(cell(decoding[p], 1) for p in (OURS, THEIRS))],
        ["restoring, milliseconds", *(cell(restoring[p], 1e3) for p in (OURS, THEIRS))],
    ]
    return table(["", OURS, THEIRS], rows)


def stored(report: Json) -> str:
    """Bytes on disk and in memory."""
    rows = [
        [
            f"{row['dtype']}, {row['tokens']:,} tokens",
            f"{row['raw_bytes'] / 1e6:.1f} MB",
            f"{row['stored_bytes'] / 1e6:.1f} MB",
            f"{kept(report, row['dtype']):.1f} %",
        ]
        for row in report["stored"]
    ]
    return table(["rows of", "in memory", "on disk, headers included", ""], rows)


def lengths(report: Json) -> str:
    """Time to the first token for each length."""
    return table(*benchmark.table(report))


def positions_table(positions: list[Json]) -> str:
    """One token with and without K/V, for each position."""
    rows = []
    for row in positions:
        kept, again = median(row["with"]), median(row["without"])
        rows.append([f"{row['tokens']:,}", f"{kept:.4f}", f"{again:.3f}", f"{again / kept:.0f} x"])
    return table(["position", "with K/V", "without", ""], rows)


def compact(text: str) -> str:
    """JSON with each list of numbers in one line."""
    return re.sub(
        r"\[\s+([-\d.e,\s]+?)\s+\]", lambda m: "[" + re.sub(r"\s+", " ", m[1]) + "]", text
    )


# One token, with K/V and without


@dataclass(frozen=True)
class Fit:
    """`a n^p + b n^q`, where `powers` are p and q."""

    powers: tuple[int, int]
    factors: tuple[float, float]

    def __call__(self, n: float) -> float:
        """The value at n."""
        return sum(f * n**p for f, p in zip(self.factors, self.powers, strict=True))

    def __str__(self) -> str:
        pairs = zip(self.factors, self.powers, strict=True)
        terms = [seconds(factor) + ("", " n", " n²")[power] for factor, power in pairs if factor]
        return " + ".join(terms)


def seconds(value: float) -> str:
    """Seconds with two digits, in a unit that suits them."""
    for unit, scale in (("s", 1), ("ms", 1e3), ("µs", 1e6)):
        if (rounded := float(f"{value * scale:.2g}")) >= 1:
            return f"{rounded:g} {unit}"
    return f"{float(f'{value * 1e9:.2g}'):g} ns"


def fitted(xs: Sequence[float], ys: Sequence[float], powers: tuple[int, int]) -> Fit:
    """The sum of two powers, neither of them negative, with the least relative error."""
    x, y = np.array(xs, float), np.array(ys, float)
    columns = [x**power / y for power in powers]
    both = np.linalg.lstsq(np.stack(columns, 1), np.ones(len(x)), rcond=None)[0]
    if (both < 0).any():  # one of them alone
        alone = [float(column.sum() / (column * column).sum()) for column in columns]
        errors = [float(((f * c - 1) ** 2).sum()) for f, c in zip(alone, columns, strict=True)]
        best = errors.index(min(errors))
        both = [alone[i] if i == best else 0.0 for i in range(2)]
    return Fit(powers, (float(both[0]), float(both[1])))


def fits_of(positions: list[Json]) -> tuple[Fit, Fit]:
    """How one token's time grows with the position, with K/V and without."""
    xs = [row["tokens"] for row in positions]
    kept, again = ([median(row[way]) for row in positions] for way in ("with", "without"))
    return fitted(xs, kept, (0, 1)), fitted(xs, again, (1, 2))


def fits(positions: list[Json]) -> str:
    """Both in a sentence."""
    kept, again = fits_of(positions)
    return f"with K/V {kept}; without, {again}"


def picture_of_positions(report: Json) -> Picture:
    """One token's time against its position: a line, and a parabola."""
    positions = report["positions"]
    xs = [float(row["tokens"]) for row in positions]
    many = [float(x) for x in np.geomspace(min(xs), max(xs), 60)]
    lines = []
    for way, fit, name, colour, mark in zip(
        ("with", "without"),
        fits_of(positions),
        ("with K/V: one token", "without: all tokens again"),
        COLOURS[:2],
        ("o", "s"),
        strict=True,
    ):
        ys = [median(row[way]) for row in positions]
        lines.append(Line(f"{name}\n{fit}", xs, ys, colour, mark, linked=False))
        lines.append(Line("", many, [fit(x) for x in many], colour))
    return Picture(
        "One more token: its time against its position",
        "position n",
        f"seconds, {report['model']['name']}; points are measured, lines fitted to them",
        tuple(lines),
        plots.note(report),
    )
