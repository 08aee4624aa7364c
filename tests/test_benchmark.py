"""`mlx-promptcache bench`: texts and questions, the table, and one small run from end to end."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from mlx_lm.utils import load_tokenizer

import processes
import tiny
from mlx_promptcache import benchmark, cli
from mlx_promptcache.errors import MeasuringError

if TYPE_CHECKING:
    from collections.abc import Callable

    from mlx_promptcache.timing import Command


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.on_disk(tmp_path_factory.mktemp("models") / "tiny")


# Texts


@pytest.mark.parametrize("length", [1, 32, 300])
def test_a_text_has_as_many_tokens_as_it_should_have(model: Path, length: int) -> None:
    tokenizer: Any = load_tokenizer(model)
    text = benchmark.text_of(tokenizer, length, seed=0)
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert abs(len(tokens) - length) <= 1 + length // 100  # tokens may join where it was cut
    assert benchmark.text_of(tokenizer, length, seed=0) == text
    assert length == 1 or benchmark.text_of(tokenizer, length, seed=1) != text


def test_questions_are_each_another_one_and_the_same_for_a_seed() -> None:
    count = len(benchmark.ADJECTIVES) * len(benchmark.NOUNS)
    first, again, other = (
        list(itertools.islice(benchmark.questions(seed), count)) for seed in (0, 0, 1)
    )
    assert len(set(first)) == count
    assert first == again
    assert first != other
    assert set(first) == set(other)


def test_a_question_has_the_form_that_is_asked_for() -> None:
    assert next(benchmark.questions(0, "{} {}?")).endswith("?")


@pytest.mark.parametrize(("text", "lengths"), [("64", (64,)), ("512,64,512", (64, 512))])
def test_lengths_are_read_the_shortest_first(text: str, lengths: tuple[int, ...]) -> None:
    assert benchmark.lengths_of(text) == lengths


@pytest.mark.parametrize("text", ["", "64,", "0,64", "-1", "many"])
def test_what_is_no_list_of_lengths_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no list of lengths"):
        benchmark.lengths_of(text)


def test_a_model_is_called_by_its_directory_or_by_its_repo() -> None:
    assert benchmark.model_name(Path("/models/tiny")) == "tiny"
    downloaded = Path("/cache/models--owner--a-model/snapshots/0123abcd")
    assert benchmark.model_name(downloaded) == "owner/a-model"


# For people


def test_the_table_has_medians_and_how_many_times_sooner_a_warm_run_is() -> None:
    seconds = {"ours": {"cold": [4.0, 2.0, 9.0], "warm": [0.5, 0.25]}}
    heads, rows = benchmark.table({"lengths": [{"tokens": 2048, "seconds": seconds}]})
    assert heads == ["tokens", "ours cold", "warm", "cold/warm"]
    assert rows == [["2,048", "4.00 s", "0.38 s", "10.7 x"]]


# The whole of it


class Fake:
    """A program that takes no time; remembers how it was called. Some do not run."""

    def __init__(self, name: str = "fake", *, runs: bool = True) -> None:
        self.name, self.runs = name, runs
        self.calls: list[tuple[str, str, str]] = []

    def prepare(self, prefix: Path, directory: Path) -> None:
        self.calls.append(("prepare", prefix.read_text("utf-8"), directory.name))

    def cold(self, prefix: Path, question: str, directory: Path) -> Command:
        return self._run("cold", question, directory)

    def warm(self, prefix: Path, question: str, directory: Path) -> Command:
        return self._run("warm", question, directory)

    def _run(self, way: str, question: str, directory: Path) -> Command:
        from mlx_promptcache.timing import Command

        self.calls.append((way, question, directory.name))
        source = "print('text')" if self.runs else "raise SystemExit('no such template')"
        return Command((sys.executable, "-S", "-c", source))


def test_warm_runs_start_from_what_the_first_cold_one_left_and_ask_something_else(
    model: Path,
) -> None:
    fake = Fake()
    settings = benchmark.Settings(lengths=(16,), runs=3, cold_runs=2)
    told: list[str] = []
    (row,) = benchmark.lengths(model, settings, [fake], told.append)
    ways = [(way, directory) for way, _, directory in fake.calls]
    assert ways == [
        ("prepare", "warm-up-fake"),
        ("cold", "warm-up-fake"),
        ("warm", "warm-up-fake"),
        ("prepare", "16"),
        ("cold", "16"),
        ("warm", "16"),
        ("cold", "cold-1"),
        ("warm", "16"),
        ("warm", "16"),
    ]
    questions = [question for way, question, _ in fake.calls if way != "prepare"]
    assert len(set(questions)) == len(questions)
    assert {way: len(s) for way, s in row["seconds"]["fake"].items()} == {"cold": 2, "warm": 3}
    assert told[-1] == f"{row['tokens']} tokens: round 3 of 3"


def test_a_program_that_cannot_run_the_model_is_left_out_with_a_notice(model: Path) -> None:
    told: list[str] = []
    settings = benchmark.Settings(lengths=(16,), runs=1, cold_runs=1)
    programs = [Fake(), Fake("other", runs=False)]
    (row,) = benchmark.lengths(model, settings, programs, told.append)
    assert list(row["seconds"]) == ["fake"]
    (notice,) = [line for line in told if "without" in line]
    assert notice.startswith("without other: ")
    assert notice.endswith("no such template")
    with pytest.raises(MeasuringError, match="no such template"):
        benchmark.lengths(model, settings, programs[::-1], told.append)


def test_lengths_beyond_the_context_are_left_out(model: Path) -> None:
    settings = benchmark.Settings(lengths=(16, 2000, 5000), runs=1, cold_runs=1)
    rows = benchmark.lengths(model, settings, [Fake()], lambda line: None)
    assert len(rows) == 1
    with pytest.raises(MeasuringError, match="no room"):
        benchmark.lengths(model, benchmark.Settings(lengths=(5000,)), [Fake()], lambda line: None)


@pytest.fixture(scope="module")
def measured(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, processes.Ended]:
    directory = tmp_path_factory.mktemp("bench")
    few = ("--lengths", "24", "--runs", "2", "--cold-runs", "1", "--seed", "5")
    outputs = ("--json", directory / "out.json", "--plot", directory / "out")
    return directory, processes.run("bench", "-m", model, *few, *outputs)


def test_the_command_writes_every_sample_and_where_it_was_measured(
    measured: tuple[Path, processes.Ended],
) -> None:
    directory, ended = measured
    assert ended.code == 0, ended.err
    report = json.loads((directory / "out.json").read_text("utf-8"))
    assert set(report) == {
        "format", "date", "machine", "versions", "commit", "seed", "model", "lengths",
    }  # fmt: skip
    assert report["seed"] == 5
    assert report["model"]["name"] == "tiny"
    (row,) = report["lengths"]
    for name in ("mlx-promptcache", "mlx-lm"):
        samples = row["seconds"][name]
        assert (len(samples["cold"]), len(samples["warm"])) == (1, 2)
        assert min(samples["cold"] + samples["warm"]) > 0


def test_the_command_prints_the_table_and_draws_it(
    measured: tuple[Path, processes.Ended], model: Path
) -> None:
    directory, ended = measured
    lines = ended.out.splitlines()
    assert lines[-2].split() == [
        "tokens", "mlx-promptcache", "cold", "warm", "cold/warm", "mlx-lm", "cold", "warm",
        "cold/warm",
    ]  # fmt: skip
    assert "mlx-lm" in lines[1]
    assert ended.err.count("round") == 2
    assert sorted(p.name for p in directory.iterdir()) == ["out.json", "out.png", "out.svg"]
    assert not (model / "prompt_cache").exists()  # the user's own store is left alone


REPORT: dict[str, Any] = {
    "machine": {"processor": "a processor", "cores": 2, "system": "a system"},
    "versions": {"mlx": "1"},
    "model": {"name": "tiny"},
    "lengths": [{"tokens": 24, "seconds": {"ours": {"cold": [2.0], "warm": [0.5]}}}],
}


@pytest.fixture
def bench(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """Runs the command without measuring; returns what it prints."""
    monkeypatch.setattr(benchmark, "report", lambda *_: REPORT)

    def run(*arguments: str) -> str:
        assert cli.run(["bench", *arguments, "-m", str(model)]) == 0
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("arguments", [("--json",), ("--json", "-"), ("--json", "--quiet")])
def test_json_without_a_file_is_one_object_instead_of_the_table(
    arguments: tuple[str, ...], bench: Callable[..., str]
) -> None:
    assert json.loads(bench(*arguments)) == REPORT


def test_json_with_a_file_is_the_same_object_beside_the_table(
    bench: Callable[..., str], tmp_path: Path
) -> None:
    assert bench("--json", str(tmp_path / "out.json")) == bench()
    assert json.loads((tmp_path / "out.json").read_text("utf-8")) == REPORT
    assert "4.0 x" in bench()


def test_what_cannot_be_written_is_said_before_anything_is_measured(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "report", None)  # it must not be called
    nowhere = str(tmp_path / "nowhere" / "out")
    for option in ("--json", "--plot"):
        assert cli.run(["bench", "-m", str(model), option, nowhere]) == 1
        assert "cannot be written" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.run(["bench", "-m", str(model), "--plot", str(tmp_path / "out")]) == 1
    assert "matplotlib" in capsys.readouterr().err


def test_wrong_usage_of_bench_is_an_error_of_usage() -> None:
    for wrong in (["--lengths", "many"], ["--runs", "0"], ["--cold-runs", "0"]):
        assert cli.run(["bench", *wrong]) == 2


@pytest.mark.parametrize(
    ("options", "runs", "cold_runs", "lengths"),
    [
        ({}, 10, 3, benchmark.LENGTHS),
        ({"short": True}, 3, 1, benchmark.SHORT),
        ({"short": True, "runs": 7, "lengths": (9,)}, 7, 1, (9,)),
    ],
)
def test_a_short_run_is_short_unless_told_otherwise(
    options: dict[str, Any], runs: int, cold_runs: int, lengths: tuple[int, ...]
) -> None:
    from mlx_promptcache.cli import bench

    given: dict[str, Any] = {
        "short": False, "runs": None, "cold_runs": None, "lengths": None, "seed": 3, **options
    }  # fmt: skip
    expected = benchmark.Settings(lengths, runs, cold_runs, 3)
    assert bench._settings(given) == expected
