"""Pictures: what is drawn, that names do not meet, and that the same figures are the same bytes."""

from __future__ import annotations

import itertools
import sys
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_promptcache import plots
from mlx_promptcache.errors import MeasuringError

if TYPE_CHECKING:
    from pathlib import Path

GAP = 0.1
REPORT: dict[str, Any] = {
    "machine": {"processor": "A processor", "cores": 2},
    "model": {"name": "tiny"},
    "lengths": [
        {
            "tokens": n,
            "seconds": {
                "ours": {"cold": [n / 60, n / 50, n / 10], "warm": [0.5, 0.4]},
                "theirs": {"cold": [n / 40], "warm": [2.0, 3.0, 4.0]},
            },
        }
        for n in (64, 512, 4096)
    ],
}


@given(st.lists(st.floats(0, 1), max_size=8))
def test_names_keep_their_order_and_their_distance(wanted: list[float]) -> None:
    places = plots.spread(wanted, GAP)
    for (one, a), (other, b) in itertools.combinations(zip(wanted, places, strict=True), 2):
        assert abs(a - b) >= GAP - 1e-9
        assert one == other or (one < other) == (a < b)


def test_names_that_do_not_meet_stay_where_they_are() -> None:
    assert plots.spread([0.9, 0.1, 0.5], GAP) == [0.9, 0.1, 0.5]


def test_names_that_meet_share_their_middle() -> None:
    assert plots.spread([0.5, 0.52], GAP) == pytest.approx([0.46, 0.56])


def test_every_program_is_drawn_cold_and_warm_with_its_medians() -> None:
    lines = {line.name: line for line in plots.of_lengths(REPORT).lines}
    assert list(lines) == ["ours, cold", "ours, warm", "theirs, cold", "theirs, warm"]
    assert list(lines["ours, cold"].ys) == [n / 50 for n in (64, 512, 4096)]
    assert list(lines["theirs, warm"].ys) == [3.0, 3.0, 3.0]
    assert lines["ours, cold"].dashed
    assert not lines["ours, warm"].dashed
    assert lines["ours, warm"].colour != lines["theirs, warm"].colour
    assert lines["ours, warm"].mark != lines["theirs, warm"].mark  # for prints in grey


def test_all_points_and_names_are_in_the_figure() -> None:
    figure = plots.draw(plots.of_lengths(REPORT))
    (axes,) = figure.axes
    assert [list(line.get_xdata()) for line in axes.lines] == [[64, 512, 4096]] * 4
    texts = {text.get_text() for text in axes.texts}
    assert texts == {"ours, cold", "ours, warm", "theirs, cold", "theirs, warm"}
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["64", "512", "4,096"]
    width = figure.bbox.width
    for text in axes.texts:  # nothing is cut off
        assert text.get_window_extent().x1 <= width


def test_a_picture_is_written_as_svg_and_png_with_the_same_bytes_each_time(tmp_path: Path) -> None:
    picture = plots.of_lengths(REPORT)
    for name in ("one", "two"):
        svg, png = plots.save(picture, str(tmp_path / name))
        assert svg.read_bytes().startswith(b"<?xml")
        assert png.read_bytes().startswith(b"\x89PNG")
    for kind in ("svg", "png"):
        one, two = (tmp_path / f"{name}.{kind}" for name in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()


def test_without_matplotlib_a_sentence_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MeasuringError, match=r"pip install 'mlx-promptcache\[bench\]'"):
        plots.check()
