"""The programs that are compared: commands that their own parsers understand."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from mlx_lm.generate import setup_arg_parser

from mlx_promptcache import programs
from mlx_promptcache.cli import generate
from mlx_promptcache.errors import MeasuringError

if TYPE_CHECKING:
    from pathlib import Path

    from mlx_promptcache.timing import Command

QUESTION = "\n\nWhich one?"


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    path = tmp_path / "prefix.txt"
    path.write_text("A prefix.", "utf-8")
    return path


def understood_by_us(command: Command) -> dict[str, object]:
    words = list(command.arguments)
    assert words[1:4] == ["-m", "mlx_promptcache", "generate"]
    return generate.command.make_context("generate", words[4:]).params


def understood_by_mlx_lm(command: Command) -> dict[str, object]:
    words = list(command.arguments)
    assert words[1:4] == ["-m", "mlx_lm", "generate"]
    return dict(vars(setup_arg_parser().parse_args(words[4:])))


def test_our_cold_and_warm_runs_are_the_same_command_with_one_store(
    prefix: Path, tmp_path: Path
) -> None:
    ours = programs.Ours(tmp_path / "model")
    cold, warm = (way(prefix, QUESTION, tmp_path) for way in (ours.cold, ours.warm))
    assert cold == warm
    options = understood_by_us(cold)
    assert options["model"] == str(tmp_path / "model")
    assert options["prefix_file"] == str(prefix)
    assert options["prompt"] == QUESTION
    assert options["cache_dir"] == str(tmp_path / "store")
    assert (options["max_tokens"], options["temp"]) == (programs.MAX_TOKENS, 0.0)
    assert not options["no_prompt_cache"]


def test_mlx_lm_gets_the_same_prompt_and_as_many_tokens(prefix: Path, tmp_path: Path) -> None:
    theirs = programs.MlxLm(tmp_path / "model")
    cold = understood_by_mlx_lm(theirs.cold(prefix, QUESTION, tmp_path))
    warm = understood_by_mlx_lm(theirs.warm(prefix, QUESTION, tmp_path))
    assert (cold["prompt"], warm["prompt"]) == ("A prefix." + QUESTION, QUESTION)
    assert cold["prompt_cache_file"] is None
    assert str(warm["prompt_cache_file"]).startswith(str(tmp_path))
    for options in (cold, warm):
        assert options["model"] == str(tmp_path / "model")
        assert (options["max_tokens"], options["temp"]) == (programs.MAX_TOKENS, 0.0)
        assert not options["ignore_chat_template"]


def test_a_prompt_cache_file_that_mlx_lm_cannot_make_is_an_error(
    prefix: Path, tmp_path: Path
) -> None:
    with pytest.raises(MeasuringError, match="cache_prompt failed"):
        programs.MlxLm(tmp_path / "no model").prepare(prefix, tmp_path)
