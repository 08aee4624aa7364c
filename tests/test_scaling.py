"""scripts/simulate: the page that is made of figures, and what is committed of both."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))

import scalepage
import scaling
import scenarios
from fleet import ALONE, BY_KEY, BY_SHARD, RECOMPUTE, SHARED

DOCS = ROOT / "docs"


def committed() -> dict[str, Any]:
    report: dict[str, Any] = json.loads((DOCS / "scale.json").read_text("utf-8"))
    return report


def test_the_committed_page_is_what_the_committed_figures_make() -> None:
    assert (DOCS / "scale.md").read_text("utf-8") == scalepage.document(committed())


def test_the_committed_figures_are_written_as_the_script_writes_them() -> None:
    assert scaling.compact(committed()) == (DOCS / "scale.json").read_text("utf-8")


def test_the_committed_figures_are_of_the_constants_that_there_are() -> None:
    """But for those that were measured, which may have been measured again."""
    told = json.loads(json.dumps(scenarios.Scenarios(scaling.COUNT, 1, print).told()))
    report = committed()
    assert told.keys() <= report.keys()
    for name in told.keys() - {"measured", "machine", "sizes"}:
        assert report[name] == told[name], name


def test_the_pictures_of_the_page_are_there() -> None:
    page = scalepage.document(committed())
    for name in scalepage.pictures(committed()):
        assert f"({name}.svg)" in page
        assert (DOCS / f"{name}.svg").is_file()


def test_every_table_is_on_the_page() -> None:
    text = scalepage.TEXT.read_text("utf-8")
    tables = scenarios.Scenarios(1, 1, print).tables
    assert [name for name in tables if f"{{{name}}}" not in text] == []


def test_the_page_tells_the_figures() -> None:
    report = copy.deepcopy(committed())
    row = report["tables"]["fleets"][-1]
    row.update(machines=54_321, computed=0.1234, lists=600.0, gets=0.0, puts=0.0)
    report.update(every_seconds=54.321, seed=77)
    page = scalepage.document(report)
    assert "| 54,321 | shared | " in page
    assert "12.3%" in page
    said = " ".join(page.split())
    assert "each of 54,321 machines is 1,000 a second" in said
    assert "of which 600,000 are lists" in said
    assert "Seed 77" in page


def test_a_page_of_few_requests_says_that_it_is_none_to_rely_on() -> None:
    assert "A quick look" in scalepage.document({**committed(), "count": scaling.SHORT})
    assert "A quick look" not in scalepage.document(committed())


def test_a_picture_has_a_line_for_each_way_and_no_point_at_nothing() -> None:
    drawn = scalepage.pictures(committed())
    fleets, lists = (drawn[name].lines for name in ("scale-fleets", "scale-lists"))
    assert [line.name for line in fleets] == [SHARED, ALONE]
    assert [line.name for line in lists] == [BY_KEY, BY_SHARD]
    assert all(x > 0 for line in (*fleets, *lists) for x in line.xs)
    for line in fleets:
        assert list(line.xs) == list(scenarios.FLEETS)


def test_runs_are_the_same_for_a_seed_and_others_for_another() -> None:
    found = [scaling.simulated(4, seed, ["kinds"])["tables"] for seed in (3, 3, 4)]
    assert found[0] == found[1] != found[2]


def test_the_measured_machine_is_that_of_a_performance_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Medians, and the rate of prefill from 256 tokens on, whatever lengths were measured."""

    def seconds(tokens: int) -> dict[str, Any]:
        start = 30.0 if tokens < 256 else 2.0
        return {"mlx-promptcache": {"cold": [x + tokens / 50 for x in (90, start, 0)]}}

    lengths = (64, 256, 512, 2048, 4096)
    report = {
        "lengths": [{"tokens": n, "seconds": seconds(n)} for n in lengths],
        "stored": [{"tokens": 1000, "stored_bytes": 40_000}, {"tokens": 1, "stored_bytes": 1}],
        "restoring": {"mlx-promptcache": [0.1, 0.5, 0.2]},
        "decoding": {"mlx-promptcache": [14.0, 17.0, 15.0]},
    }
    file = tmp_path / "performance.json"
    file.write_text(json.dumps(report), "utf-8")
    monkeypatch.setattr(scenarios, "PERFORMANCE", file)
    machine, sizes = scenarios.measured()
    assert machine.tokens_per_second == pytest.approx(50)
    assert machine.restored_per_second == pytest.approx(200_000)
    assert machine.decoded_per_second == 15.0
    assert sizes.row == 40


def test_the_committed_performance_report_has_a_machine() -> None:
    machine, sizes = scenarios.measured()
    assert machine.restored_per_second / sizes.row > machine.tokens_per_second > 0


def test_recomputing_asks_nothing_of_a_store() -> None:
    rows = [row for row in committed()["tables"]["fleets"] if row["mode"] == RECOMPUTE]
    assert len(rows) == len(scenarios.FLEETS)
    assert all(row["computed"] == 1 and row["lists"] == row["puts"] == 0 for row in rows)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "nothing"], "there is no table 'nothing': choose of fleets, seeds"),
        (["--from", "nowhere.json"], "there is no file nowhere.json"),
        (["--write", "--short"], "leave --only and --short out"),
    ],
)
def test_wrong_usage_is_one_sentence(
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["simulate", *arguments])
    with pytest.raises(SystemExit) as ended:
        scaling.main()
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_figures_that_were_made_before_make_the_page_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["simulate", "--from", str(DOCS / "scale.json")])
    assert scaling.main() == 0
    assert capsys.readouterr().out == (DOCS / "scale.md").read_text("utf-8")
