"""What commands say of themselves: help, examples that are true, and the page of all of it."""

from __future__ import annotations

import json
import shlex
import webbrowser
from typing import TYPE_CHECKING

import click
import pytest

import manual
from mlx_promptcache import cli
from test_cli import PROMPT, tiny_model

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["tiny_model"]  # a fixture

# Those that run here, in an order in which each finds what it needs. The others are parsed.
RUN = (
    "completion", "save", "generate", "load", "list", "show", "verify", "prune", "report", "clear",
)  # fmt: skip


@pytest.fixture
def surroundings(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files that the examples speak of, and a model that is chosen."""
    chat = [{"role": "user", "content": "cat"}]
    (tmp_path / "few-shot.txt").write_text(PROMPT, "utf-8")
    (tmp_path / "other.txt").write_text(f"other {PROMPT}", "utf-8")
    (tmp_path / "chat.json").write_text(json.dumps(chat), "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLX_PROMPTCACHE_MODEL", str(tiny_model))
    monkeypatch.setenv("MLX_PROMPTCACHE_DIR", str(tmp_path / "store"))
    monkeypatch.setattr(webbrowser, "open", lambda _: True)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_examples_that_can_be_typed(name: str) -> None:
    command = manual.commands()[name]
    lines = manual.examples(command)
    assert lines, f"give cli/{name}.py an epilog=examples(...): see cli/options.py"
    for line in lines:
        program, called, *words = shlex.split(line)
        assert (program, called) == (cli.PROGRAM, name)
        command.make_context(name, words)


@pytest.mark.usefixtures("surroundings")
def test_examples_do_what_they_say(capsys: pytest.CaptureFixture[str]) -> None:
    for name in RUN:
        for line in manual.examples(manual.commands()[name]):
            code = cli.run(shlex.split(line)[1:])
            assert (code, capsys.readouterr().err) == (0, ""), line


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_itself_and_each_of_its_options(name: str) -> None:
    command = manual.commands()[name]
    assert (command.help or "").startswith(f"`{name}`: ")
    without = [p.name for p in command.params if isinstance(p, click.Option) and not p.help]
    assert without == []
    if name != "serve":  # whose options are those of mlx-lm's parser
        assert {"--json", "--quiet"} <= {opt for param in command.params for opt in param.opts}


def test_the_page_says_what_the_commands_say() -> None:
    text = manual.DOCUMENT.read_text("utf-8")
    assert text == manual.document(), "run scripts/cli --write"
    for name, command in manual.commands().items():
        assert f"## {name}\n" in text
        for line in manual.examples(command):
            assert line in text
        assert all(typed in text for typed, _ in manual.options(command))


def test_the_page_is_printed_or_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(manual, "DOCUMENT", tmp_path / "cli.md")
    assert manual.main([]) == manual.main(["--write"]) == 0
    assert manual.DOCUMENT.read_text("utf-8") == capsys.readouterr().out


def test_a_command_that_is_added_is_in_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    epilog = "\b\nExamples:\n  mlx-promptcache hum --loud"
    loud = click.Option(["--loud"], is_flag=True, help="So that all can hear.")
    hum = click.Command("hum", params=[loud], help="`hum`: a tune.", epilog=epilog)
    found = {**manual.commands(), "hum": hum}
    monkeypatch.setattr(manual, "commands", lambda: found)
    text = manual.document()
    for line in ("## hum", "`hum`: a tune.", "mlx-promptcache hum --loud", "| `--loud` | So that"):
        assert line in text
