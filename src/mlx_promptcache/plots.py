"""Pictures of figures: lines on logarithmic axes, each with its name at its end.

Colours differ in lightness as well as in hue, and every line has a mark of its own, so that a print
in grey can be read. Needs matplotlib, which comes with the extra `bench`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_promptcache.errors import MeasuringError
from mlx_promptcache.timing import median

if TYPE_CHECKING:
    from collections.abc import Sequence

# In this order for the programs of a report.
COLOURS = ("#10305a", "#c4501b", "#87929b")
MARKS = ("o", "s", "^")
INK = "#333333"
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "mlx-promptcache",  # the same picture has the same bytes
    "svg.fonttype": "path",
}
LEAST_GAP = 0.052  # between two names, as a part of the height


@dataclass(frozen=True)
class Line:
    """Points that belong together: with a mark at each if it has one, and linked or not."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    colour: str = COLOURS[0]
    mark: str = ""
    dashed: bool = False
    linked: bool = True


@dataclass(frozen=True)
class Picture:
    """What a figure shows: a title, what the axes are, the lines, and a note below. The name of the
    vertical axis stands under the title.
    """

    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    note: str = ""


def of_lengths(report: dict[str, Any]) -> Picture:
    """Time to the first token against the length of the prefix, every program cold and warm."""
    rows = report["lengths"]
    lines = [
        Line(
            f"{name}, {way}",
            [row["tokens"] for row in rows],
            [median(row["seconds"][name][way]) for row in rows],
            colour=COLOURS[i % len(COLOURS)],
            mark=MARKS[i % len(MARKS)],
            dashed=way == "cold",
        )
        for i, name in enumerate(rows[0]["seconds"])
        for way in ("cold", "warm")
    ]
    return Picture(
        "From the start of a process to its first token",
        "tokens of the prefix",
        f"seconds, {report['model']['name']}",
        tuple(lines),
        note(report),
    )


def note(report: dict[str, Any]) -> str:
    """Where the figures of a picture are from."""
    machine = report["machine"]
    return f"{machine['processor']}, {machine['cores']} cores. Medians; the lower the better."


def save(picture: Picture, prefix: str, *, kinds: Sequence[str] = ("svg", "png")) -> list[Path]:
    """Write a picture in each of these kinds: `<prefix>.svg` and `<prefix>.png`.

    Raises:
        MeasuringError: matplotlib is not installed.
    """
    figure = draw(picture)
    paths = [Path(f"{prefix}.{kind}") for kind in kinds]
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        for path in paths:
            undated = {"Date": None, "Creator": None} if path.suffix == ".svg" else None
            figure.savefig(path, metadata=undated, dpi=160)
    return paths


def draw(picture: Picture) -> Any:
    """The matplotlib figure. No window opens, whatever backend the user has chosen.

    Raises:
        MeasuringError: matplotlib is not installed.
    """
    check()
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.8, 5.0))
        axes = figure.add_axes((0.065, 0.15, 0.675, 0.70))
        for i, line in enumerate(picture.lines):  # the first is on top
            _draw_line(axes, line, 3 + len(picture.lines) - i)
        _set_axes(axes, picture)
        _write_names(axes, picture.lines)
        figure.text(0.015, 0.955, picture.title, fontsize=13, fontweight="bold", va="center")
        figure.text(0.015, 0.905, picture.y_label, fontsize=10, va="center")
        figure.text(0.015, 0.025, picture.note, fontsize=8, color="#666666")
        # Fonts are looked up when a figure is drawn.
        figure.canvas.draw()
    return figure


def check() -> None:
    """Find out whether pictures can be drawn.

    Raises:
        MeasuringError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl  # noqa: F401
    except ImportError as exc:
        raise MeasuringError(
            "pictures need matplotlib: pip install 'mlx-promptcache[bench]', or leave --plot out"
        ) from exc


def _draw_line(axes: Any, line: Line, zorder: int) -> None:
    axes.plot(
        line.xs,
        line.ys,
        color=line.colour,
        linewidth=1.8 if line.linked else 0.0,
        linestyle=(0, (4, 2)) if line.dashed else "-",
        marker=line.mark or None,
        markersize=5.5,
        markerfacecolor="white" if line.dashed else line.colour,
        markeredgewidth=1.3,
        zorder=zorder,
    )


def _set_axes(axes: Any, picture: Picture) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel(picture.x_label)
    ticks = sorted({x for line in picture.lines if line.mark for x in line.xs})
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=3)


def _write_names(axes: Any, lines: Sequence[Line]) -> None:
    """Write each name to the right of its line's end, moved up or down where two would meet."""
    named = [line for line in lines if line.name]
    wanted = [float(_height(axes, line.ys[-1])) for line in named]
    for line, at, height in zip(named, wanted, spread(wanted, LEAST_GAP), strict=True):
        end = _width(axes, line.xs[-1])
        axes.annotate(
            line.name, (end, at), (1.045, height), xycoords="axes fraction",
            textcoords="axes fraction", va="center", color=line.colour, annotation_clip=False,
            fontweight="normal" if line.dashed else "bold", fontsize=9,
            arrowprops={"arrowstyle": "-", "color": line.colour, "linewidth": 0.6,
                        "shrinkA": 3, "shrinkB": 5, "relpos": (0.0, 0.5)},
        )  # fmt: skip


def _height(axes: Any, y: float) -> float:
    return float(axes.transAxes.inverted().transform(axes.transData.transform((1, y)))[1])


def _width(axes: Any, x: float) -> float:
    return float(axes.transAxes.inverted().transform(axes.transData.transform((x, 1)))[0])


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Places near those that are wanted, in the same order, and none nearer to another than `gap`.

    Places that would meet share the middle of what they want.
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    groups: list[list[int]] = []
    for i in order:
        groups.append([i])
        while len(groups) > 1 and _meet(groups[-2], groups[-1], wanted, gap):
            groups[-2:] = [groups[-2] + groups[-1]]
    places = [0.0] * len(wanted)
    for group in groups:
        for i, place in zip(group, _around(group, wanted, gap), strict=True):
            places[i] = place
    return places


def _meet(one: list[int], other: list[int], wanted: Sequence[float], gap: float) -> bool:
    return _around(other, wanted, gap)[0] - _around(one, wanted, gap)[-1] < gap


def _around(group: list[int], wanted: Sequence[float], gap: float) -> list[float]:
    middle = sum(wanted[i] for i in group) / len(group)
    return [middle + gap * (k - (len(group) - 1) / 2) for k in range(len(group))]
