"""What users are told when something is wrong: one line, that says what is and what to do."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

import pytest

from mlx_promptcache.errors import StoreError
from mlx_promptcache.store import Store
from shim import Call, Fault, Shim
from test_cli import GREEDY, PROMPT, Program, damage, one_line, program, tiny_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Before = Callable[[Program, Path], None]

__all__ = ["program", "tiny_model"]  # fixtures

# What is typed (in a directory with a few files), what is wrong with it, and what to do.
MISTAKES = [
    ("generate -p a -m none", "no model directory", "OWNER/NAME"),
    ("generate -p a -m empty", "config.json", "directory of a model"),
    ("generate -p a -m broken", "is not JSON", "bring the model again"),
    ("generate -p a -m weightless", "model*.safetensors", "directory of a model"),
    ("generate -p a -m a//b", "no model directory", "OWNER/NAME"),
    ("generate -p a --adapter-path empty", "holds no adapter", "mlx_lm.lora"),
    ("generate --prompt-file none.txt", "cannot be read", "path of a text file"),
    ("generate --prompt-file binary", "not UTF-8", "convert it"),
    ("generate --messages binary", "not UTF-8", "convert it"),
    ("generate --messages words.txt", "not JSON", '[{"role"'),
    ("generate --messages number.json", "no list of messages", '[{"role"'),
    ("generate", "prompt is empty", "--prompt"),
    ("load nobody", "no state named 'nobody'", "`list`"),
    ("save .hidden -p a", "cannot be a name", "begin with a letter"),
    ("save few -p a --system-prompt b --ignore-chat-template", "chat template", "into the prompt"),
    ("list --cache-dir words.txt", "is a file", "another --cache-dir"),
    ("list --cache-dir letters", "not a store", "another --cache-dir"),
    ("save few -p a --max-size 1", "it may take", "`clear`"),
    ("report --output none/page.html", "cannot be written", "--output"),
    ("bench --plot none/page", "no directory", "make it first"),
]
# The same of what no command line can be: these are told with the usage, by click.
MISUSES = [
    ("generate a prompt", "-p"),
    ("generate -p a --prompt-file words.txt", "not both"),
    ("generate --messages a --prefix b", "into the messages"),
    ("generate -p a --no-prompt-cache --save-as b", "leave it out"),
    ("generate -p a --max-kv-size 0", "--max-kv-size is 1 or more"),
    ("generate -p a --kv-bits 7", "quantised to"),
    ("prune --max-size much", "20GB"),
    ("clear", "--all"),
    ("clear --older-than soon", "30d"),
    ("report --open --json", "leave out"),
]


@pytest.fixture
def typed(program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    """A program in a directory with what mistakes are made with, and an empty store."""
    for name in ("empty", "broken", "weightless", "letters"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken" / "config.json").write_text("{", "utf-8")
    shutil.copy(program.model / "config.json", tmp_path / "weightless")
    (tmp_path / "letters" / "letter.txt").write_text("Dear", "utf-8")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "words.txt").write_text("words", "utf-8")
    (tmp_path / "number.json").write_text("7", "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLX_PROMPTCACHE_MODEL", str(program.model))
    monkeypatch.setenv("MLX_PROMPTCACHE_DIR", str(program.directory))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    program.store.create()
    return program


def as_typed(program: Program, line: str, code: int) -> str:
    """What a command line says on standard error."""
    from mlx_promptcache import cli

    assert cli.run(line.split()) == code
    out, err = program._capture.readouterr()
    assert out == ""
    return err


@pytest.mark.parametrize(("line", "wrong", "to_do"), MISTAKES)
def test_a_mistake_is_told_in_one_line_that_says_what_to_do(
    line: str, wrong: str, to_do: str, typed: Program
) -> None:
    (said,) = as_typed(typed, line, 1).splitlines()
    assert said.startswith("mlx-promptcache: ")
    assert wrong in said
    assert to_do in said


def test_a_repo_that_was_not_downloaded_is_told_with_two_ways_out(
    typed: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLX_PROMPTCACHE_DIR")
    (said,) = as_typed(typed, "list -m no/such", 1).splitlines()
    assert "has been downloaded yet" in said
    assert "`generate` downloads it" in said
    assert "--cache-dir" in said


@pytest.mark.parametrize(("line", "to_do"), MISUSES)
def test_wrong_usage_is_told_with_what_to_write_instead(
    line: str, to_do: str, typed: Program
) -> None:
    said = as_typed(typed, line, 2)
    assert said.startswith("Usage: mlx-promptcache ")
    assert to_do in said.splitlines()[-1]


@pytest.mark.parametrize(
    ("errno", "to_do"), [(13, "a --cache-dir that you may use"), (28, "make room there"), (5, "")]
)
def test_what_a_file_system_refuses_is_told_with_what_to_do_where_that_is_known(
    errno: int, to_do: str, tmp_path: Path
) -> None:
    store = Store(tmp_path / "store")
    with (
        Shim(tmp_path, Fault(Call("mkdir", "store", 1), errno)) as shim,
        pytest.raises(StoreError) as caught,
    ):
        store.create()
    assert shim.met
    said = str(caught.value)
    assert os.strerror(errno) in said
    assert to_do in said if to_do else said.endswith(os.strerror(errno))


def test_a_damaged_name_is_told_with_two_ways_out(program: Program) -> None:
    program("save", "few", "-p", PROMPT)
    (program.directory / "names" / "few").write_bytes(b"\xff")
    said = one_line(program("load", "few"))
    assert "damaged" in said
    assert "save it again" in said
    assert "`clear`" in said
    assert program("save", "few", "-p", PROMPT, "--force").code == 0  # the one
    (program.directory / "names" / "few").write_bytes(b"\xff")
    assert program("clear", "few", "--yes").code == 0  # and the other


def test_a_damaged_state_is_told_with_what_to_do(program: Program) -> None:
    program("save", "few", "-p", PROMPT)
    damage(program.store.path("snapshots", program.store.stems("snapshots")[0]))
    assert "save it again" in one_line(program("load", "few"))
    assert program("save", "few", "-p", PROMPT, "--force").code == 0
    assert program("load", "few").code == 0


def test_a_read_only_cache_says_how_it_is_made_another(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_PROMPTCACHE_READ_ONLY", "1")
    assert "unset MLX_PROMPTCACHE_READ_ONLY" in one_line(program("save", "few", "-p", PROMPT))
    assert program("generate", *GREEDY, "-p", PROMPT).code == 0
