"""scripts/bench: the goals, the page that is made of figures, and what is committed of both."""

from __future__ import annotations

import copy
import json
import sys
from typing import Any

import pytest

import tiny
from conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))

import bench
import goals
import performance
import saving_child
from goals import LLAMA, LOADING, OURS, SAME, SAVING_NOTHING, THEIRS
from mlx_promptcache import PromptCache, benchmark, cli, plots
from mlx_promptcache.errors import MeasuringError
from mlx_promptcache.programs import Ours
from mlx_promptcache.run import Run
from mlx_promptcache.timing import timed
from mlx_promptcache.tokenizer_store import TokenizerStore

DOCS = ROOT / "docs"
SECONDS = {"cold": [8.0, 6.0], "warm": [0.5]}
REPORT: dict[str, Any] = {
    "machine": {
        "system": "Linux, x86_64", "processor": "A processor", "cores": 2,
        "memory_bytes": 2**34, "preloaded": ["libopenblas.so.0"], "device": "Device(cpu, 0)",
        "load": 0.25,
    },
    "short": False,
    "minutes": 41.7,
    "versions": {"python": "3.11.7", "mlx": "0.32.4"},
    "commit": "0123456789ab",
    "date": "2026-01-01",
    "seed": 0,
    "model": {"name": "tiny", "dtype": "float32", "bytes": 1_000_000},
    "warm": {OURS: [0.5, 0.7, 0.6], SAME: [0.4], LOADING: [0.35], THEIRS: [6.0, 5.0, 7.0]},
    "cold": {OURS: [30.0], SAVING_NOTHING: [29.5, 29.0], THEIRS: [31.0]},
    "saving": [0.5],
    "decoding": {OURS: [14.0], THEIRS: [13.0]},
    "restoring": {OURS: [0.04], THEIRS: [0.03]},
    "stored": [
        {"dtype": "float32", "tokens": 1927, "stored_bytes": 83, "raw_bytes": 100},
        {"dtype": "bfloat16", "tokens": 512, "stored_bytes": 68, "raw_bytes": 100},
    ],
    "lengths": [{"tokens": n, "seconds": {OURS: SECONDS, THEIRS: SECONDS}} for n in (64, 128)],
    "positions": [
        {"tokens": n, "with": [0.06 + 1e-5 * n], "without": [0.013 * n + 1e-6 * n * n]}
        for n in (64, 512, 4096)
    ],
}  # fmt: skip


def report(**parts: Any) -> dict[str, Any]:
    return {**copy.deepcopy(REPORT), **parts}


# The goals

MISSED = {
    f"first token of a warm process, against {THEIRS} with its prompt cache file": (
        "warm", {OURS: [0.9], THEIRS: [7.0], SAME: [0.4], LOADING: [0.4]},
    ),
    f"first token of a warm process, against {LLAMA} with its session": (
        "warm", {OURS: [0.8], THEIRS: [8.0], LLAMA: [0.5], SAME: [0.4], LOADING: [0.4]},
    ),
    "first token of the same prompt again, beyond importing and loading": (
        "warm", {OURS: [0.5], THEIRS: [8.0], SAME: [0.6], LOADING: [0.4]},
    ),
    f"a cold process that also saves, against {THEIRS}": (
        "cold", {OURS: [31.0], SAVING_NOTHING: [31.0], THEIRS: [30.0]},
    ),
    "what saving adds to a cold process": (
        "saving", [1.0],
    ),
    f"tokens a second, against {THEIRS}": ("decoding", {OURS: [13.0], THEIRS: [14.0]}),
    f"restoring in a running process, against {THEIRS}": (
        "restoring", {OURS: [0.09], THEIRS: [0.04]},
    ),
    "stored bytes of float32 rows": (
        "stored", [{"dtype": "float32", "tokens": 1, "stored_bytes": 87, "raw_bytes": 100}],
    ),
    "stored bytes of bfloat16 rows": (
        "stored", [{"dtype": "bfloat16", "tokens": 1, "stored_bytes": 71, "raw_bytes": 100}],
    ),
}  # fmt: skip


def test_every_goal_has_a_case_that_misses_it() -> None:
    assert [goal.what for goal in goals.GOALS] == list(MISSED)


def test_good_figures_reach_every_goal_that_was_measured() -> None:
    verdicts = goals.verdicts(report())
    assert all(verdict.reached for verdict in verdicts)
    assert len(verdicts) == len(MISSED) - 1  # there was no llama.cpp


@pytest.mark.parametrize("what", MISSED)
def test_a_figure_on_the_wrong_side_misses_its_goal_alone(what: str) -> None:
    part, figures = MISSED[what]
    verdicts = goals.verdicts(report(**{part: figures}))
    assert [v.goal.what for v in verdicts if not v.reached] == [what]


def test_what_saving_adds_is_told_by_each_process_that_does() -> None:
    cold = {OURS: [10.1, 20.4, 30.9], SAVING_NOTHING: [1.0], THEIRS: [40.0]}
    told = {"cold": cold, "saving": [0.1, 0.4, 0.9]}
    assert goals.added(told) == pytest.approx([1.0, 2.0, 3.0])
    (verdict,) = [v for v in goals.verdicts(told) if "saving adds" in v.goal.what]
    assert verdict.value == pytest.approx(2.0)


def test_a_verdict_is_one_line_with_figure_and_goal() -> None:
    verdicts = goals.verdicts(report(decoding={OURS: [13.0], THEIRS: [14.0]}))
    lines = [v.sentence for v in verdicts]
    assert f"MISSED      0.929  (at least 1)  tokens a second, against {THEIRS}" in lines
    assert lines[0].startswith("reached       0.1  (at most 0.125)")


def test_parts_that_were_not_measured_are_not_judged() -> None:
    assert goals.verdicts({"decoding": REPORT["decoding"]})[0].value > 1
    assert goals.verdicts({}) == []


# The page


def test_the_committed_page_is_what_the_committed_figures_make() -> None:
    figures = json.loads((DOCS / "performance.json").read_text("utf-8"))
    assert (DOCS / "performance.md").read_text("utf-8") == performance.document(figures)


def test_the_committed_figures_are_written_as_the_script_writes_them() -> None:
    text = (DOCS / "performance.json").read_text("utf-8")
    assert performance.compact(json.dumps(json.loads(text), indent=1)) + "\n" == text


def test_the_pictures_of_the_page_are_there() -> None:
    page = performance.document(report())
    for name in ("performance-lengths.svg", "performance-positions.svg"):
        assert f"({name})" in page
        assert (DOCS / name).is_file()


def test_the_page_tells_the_machine_the_samples_and_the_verdicts() -> None:
    page = performance.document(report())
    said = (
        "A processor, 2 cores, 16 GiB of memory, Linux, x86_64, MLX on the CPU; `libopenblas.so.0`",
        "python 3.11.7, mlx 0.32.4",
        "Load average at the start: 0.25",
        "it took 42 minutes",
        "tiny, float32",
        "Commit 0123456789ab, 2026-01-01, seed 0",
        "1,927 tokens",
        f"| {OURS} | 0.600 | 0.500 | 0.700 |",
        "| first token of the same prompt again, beyond importing and loading | 0.050 s |",
        "takes 0.50 s (0.50 to 0.50), 1.7 % (1.7 to 1.7) of the rest",
        "save nothing differ by up to 0.50 s, the medians of both kinds by 0.75 s",
        "| decoding, tokens a second | 14.0 (14.0 to 14.0) | 13.0 (13.0 to 13.0) |",
        "| float32, 1,927 tokens | 0.0 MB | 0.0 MB | 83.0 % |",
        "| 64 | 7.00 s | 0.50 s | 14.0 x |",
        "| 4,096 | 0.1010 | 70.025 | 694 x |",
        "with K/V 60 ms + 10 µs n; without, 13 ms n + 1 µs n²",
        "llama.cpp was not measured",
    )
    assert [words for words in said if words not in page] == []
    assert "**" not in page
    missed = performance.document(report(decoding={OURS: [13.0], THEIRS: [14.0]}))
    assert "| 0.929 | at least 1 | **no** |" in missed


def test_the_page_of_a_quick_look_says_that_it_is_none_to_rely_on() -> None:
    assert "A quick look, not a measurement" in performance.document(report(short=True))


def test_the_page_tells_what_llama_cpp_ran() -> None:
    warm = {**REPORT["warm"], LLAMA: [0.5]}
    page = performance.document(report(warm=warm, gguf={"name": "m.gguf", "bytes": 98_000_000}))
    assert "`m.gguf` (98 MB; those that MLX reads are 1 MB)" in page
    assert f"| {LLAMA} | 0.500 |" in page


def test_lists_of_numbers_stand_in_one_line_and_mean_the_same() -> None:
    value = {"a": [1.5, 2e-05, -3], "b": [{"c": [1]}], "d": ["x", "y"], "e": []}
    text = performance.compact(json.dumps(value, indent=1))
    assert json.loads(text) == value
    assert '"a": [1.5, 2e-05, -3]' in text


# Fits


def test_a_fit_finds_the_line_and_the_parabola_that_points_lie_on() -> None:
    xs = [64.0, 512.0, 4096.0]
    line = performance.fitted(xs, [0.06 + 1e-5 * x for x in xs], (0, 1))
    assert line.factors == pytest.approx((0.06, 1e-5))
    parabola = performance.fitted(xs, [0.01 * x + 2e-6 * x * x for x in xs], (1, 2))
    assert parabola.factors == pytest.approx((0.01, 2e-6))
    assert parabola(100) == pytest.approx(1.02)


def test_no_part_of_a_fit_is_negative() -> None:
    falling = performance.fitted([1.0, 2.0, 4.0], [3.0, 2.0, 1.0], (0, 1))
    assert falling.factors[1] == 0
    assert falling.factors[0] > 0
    assert str(falling).endswith("s")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.5, "1.5 s"),
        (0.0613, "61 ms"),
        (1.15e-5, "12 µs"),
        (2e-8, "20 ns"),
        (75.0, "75 s"),
        (9.999e-7, "1 µs"),
    ],
)
def test_seconds_have_two_digits_and_a_unit(value: float, text: str) -> None:
    assert performance.seconds(value) == text


def test_the_picture_of_positions_has_points_and_the_lines_fitted_to_them() -> None:
    picture = performance.picture_of_positions(report())
    named = [line for line in picture.lines if line.name]
    assert [list(line.xs) for line in named] == [[64.0, 512.0, 4096.0]] * 2
    assert [line.linked for line in picture.lines] == [False, True, False, True]
    assert [line.name.partition("\n")[2] for line in named] == [
        "60 ms + 10 µs n", "13 ms n + 1 µs n²",
    ]  # fmt: skip
    assert len(plots.draw(picture).axes[0].lines) == 4


# The command


def test_samples_leave_out_the_first_round() -> None:
    order: list[str] = []
    tried: Any = bench.Bench(ROOT, benchmark.Settings(runs=2), None)

    def arm(name: str) -> Any:
        def run(i: int) -> float:
            order.append(f"{name}{i}")
            return len(order)

        return run

    assert tried._turns({name: arm(name) for name in "ab"}) == {"a": [3.0, 5.0], "b": [4.0, 6.0]}
    assert order == ["a0", "b0", "a1", "b1", "a2", "b2"]


def test_what_a_process_spends_on_saving_is_counted_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    now = [0.0]

    def takes(seconds: float) -> Any:
        def call(*_: Any, **__: Any) -> None:
            now[0] += seconds

        return call

    later: list[Any] = []

    def tokenizer(_: Any, __: Any, whole: Any, *, keeps: bool) -> None:
        takes(0.3)()
        whole()
        takes(0.7)()
        later.append(whole)

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr(TokenizerStore, "tokenizer", tokenizer)
    monkeypatch.setattr(Run, "prompt_state", takes(20))
    monkeypatch.setattr(PromptCache, "keep", takes(300))

    def run() -> None:
        everything: Any = object()
        takes(4000)()
        TokenizerStore.tokenizer(everything, tmp_path, takes(50_000), keeps=True)
        Run.prompt_state(everything)
        PromptCache.keep(everything, everything)
        later[0]()
        raise SystemExit(0)

    monkeypatch.setattr(cli, "main", run)
    monkeypatch.setattr(sys, "argv", ["saving_child.py", str(tmp_path / "spent"), "generate"])
    with pytest.raises(SystemExit):
        saving_child.main()
    assert sys.argv == ["saving_child.py", "generate"]
    assert float((tmp_path / "spent").read_text()) == pytest.approx(321)


def test_a_run_that_should_save_and_does_not_is_no_measurement(tmp_path: Any) -> None:
    model, prefix = tiny.on_disk(tmp_path / "model"), tmp_path / "prefix.txt"
    prefix.write_text("The cat sat on the mat. " * 8)
    full = Ours(model).generate(prefix, "Why?", tmp_path / "full", "--max-size", "1K", tokens=1)
    timed(full)
    with pytest.raises(MeasuringError, match="has kept no"):
        bench.check_saved(tmp_path / "full")


def test_a_report_that_lacks_figures_leaves_the_page_as_it_is(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    old = {name: value for name, value in REPORT.items() if name != "saving"}
    with pytest.raises(MeasuringError, match="this report has no 'saving'"):
        bench.write_document(old)
    assert not list((tmp_path / "docs").iterdir())


def test_a_process_that_saves_tells_how_long_it_does(tmp_path: Any) -> None:
    model, prefix = tiny.on_disk(tmp_path / "model"), tmp_path / "prefix.txt"
    prefix.write_text("The cat sat on the mat. " * 8)
    command = Ours(model).generate(prefix, "Why?", tmp_path / "store", "--temp", "1", tokens=2)
    done = timed(bench.watched(command, tmp_path / "spent"))
    assert 0 < float((tmp_path / "spent").read_text()) < done.total_seconds
    assert list((tmp_path / "store").glob("blocks/*/*.safetensors"))
    bench.check_saved(tmp_path / "store")


def test_llama_cpp_sees_the_prompt_as_the_template_has_it_and_not_our_libraries(
    tmp_path: Any,
) -> None:
    prefix = tmp_path / "prefix.txt"
    prefix.write_text("A prefix.", "utf-8")
    llama = bench.LlamaCpp("python", "m.gguf", "<user>", "<end>")
    cold = llama.cold(prefix, " Why?", tmp_path / "new")
    warm = llama.warm(prefix, " Why?", tmp_path / "new")
    assert (tmp_path / "new" / "head.txt").read_text() == "<user>A prefix."
    assert cold.arguments[-1] == warm.arguments[-1] == " Why?<end>"
    assert (cold.arguments[2], warm.arguments[2]) == ("cold", "warm")
    assert "LD_PRELOAD" in warm.without


@pytest.mark.parametrize(
    "wrong", [["--parts", "warm,nothing"], ["--write", "--parts", "warm"], ["--lengths", "x"]]
)
def test_wrong_usage_of_the_script_is_refused(
    wrong: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.py", "--model", "m", *wrong])
    with pytest.raises(SystemExit) as ended:
        bench.arguments()
    assert ended.value.code == 2
    assert capsys.readouterr().err


def test_figures_that_were_measured_before_are_judged_again(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for decoding, code in (([14.0], 0), ([12.0], 1)):
        file = tmp_path / "report.json"
        bench.write(file, report(decoding={OURS: decoding, THEIRS: [13.0]}))
        monkeypatch.setattr(sys, "argv", ["bench.py", "--model", "m", "--from", str(file)])
        assert bench.main() == code
        said = capsys.readouterr().out
        assert ("MISSED" in said) == bool(code)
        others = [line for line in said.splitlines() if line.startswith("not measured")]
        assert len(others) == 1
        assert others[0].endswith(
            f"first token of a warm process, against {LLAMA} with its session"
        )
