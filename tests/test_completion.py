"""Completion in the shells themselves: what a person types, with the key, and what comes of it."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import shutil
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

import processes
from mlx_promptcache import cli
from mlx_promptcache.cli.names import SHELLS
from mlx_promptcache.store import Store

if TYPE_CHECKING:
    from pathlib import Path

STEM = "00/" + "0" * 20
COMMANDS = {
    "bash": ["bash", "--noprofile", "--norc", "-i"],
    "zsh": ["zsh", "-f", "-i"],
    "fish": ["fish", "--no-config", "--interactive"],
}
SET_UP = {
    "bash": 'PS1="> "; bind "set bell-style none"; eval "$(mlx-promptcache completion bash)"',
    "zsh": 'PS1="> "; autoload -U compinit; compinit -D; eval "$(mlx-promptcache completion zsh)"',
    "fish": "mlx-promptcache completion fish | source",
}
SECONDS = 60.0
OWN_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
    "os.execvp(sys.argv[1], sys.argv[1:])"
)
# The command as a shell finds it; but where a person would run it, it shows what it was given.
PROGRAM = """#!/bin/sh
if [ -n "$_MLX_PROMPTCACHE_COMPLETE" ] || [ "$1" = completion ]; then
    exec "{python}" -m mlx_promptcache "$@"
fi
printf 'given:' ; printf ' [%s]' "$@" ; printf '.\\n'
"""


class Typed:
    """A shell on a terminal of its own, and what it shows."""

    def __init__(self, shell: str, directory: Path, store: Path) -> None:
        program = directory / "mlx-promptcache"
        program.write_text(PROGRAM.format(python=sys.executable), "utf-8")
        program.chmod(0o755)
        path = f"{directory}:{os.environ['PATH']}"
        own = processes.environment(
            PATH=path, MLX_PROMPTCACHE_DIR=str(store), TERM="xterm", HOME=str(directory)
        )
        own.pop("LD_PRELOAD", None)
        self._terminal, slave = pty.openpty()
        self._process = subprocess.Popen(
            [sys.executable, "-c", OWN_TERMINAL, *COMMANDS[shell]], stdin=slave, stdout=slave,
            stderr=slave, env=own, cwd=directory, start_new_session=True,
        )  # fmt: skip
        os.close(slave)
        self.line(f"{SET_UP[shell]}; echo set''up")
        self.until("setup")

    def line(self, text: str) -> None:
        os.write(self._terminal, text.encode() + b"\r")

    def until(self, sign: str) -> str:
        """What is shown until a sign is, and a moment longer."""
        shown, end = "", time.monotonic() + SECONDS
        while sign not in shown and time.monotonic() < end:
            if select.select([self._terminal], [], [], 1)[0]:
                shown += os.read(self._terminal, 1 << 16).decode(errors="replace")
        assert sign in shown, shown
        return shown

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._terminal)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store in which there are names, and nothing else."""
    store = Store(tmp_path / "store")
    store.create()
    for name in ("examples for mine", "it's $HOME & more", "plain"):
        store.names.write(name, STEM)
    return store.directory


@pytest.mark.parametrize("shell", SHELLS)
def test_the_key_completes_commands_options_and_names_of_states(
    shell: str, store: Path, tmp_path: Path
) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    typed = Typed(shell, tmp_path, store)
    with contextlib.closing(typed):
        for keys, given in (
            ("ver\t--quar\t", "[verify] [--quarantine]"),
            ("show exa\t--js\t", "[show] [examples for mine] [--json]"),
            ("generate --prompt-cache pla\t-p a", "[generate] [--prompt-cache] [plain] [-p] [a]"),
            ("clear plain it\t", "[clear] [plain] [it's $HOME & more]"),
        ):
            typed.line(f"mlx-promptcache {keys}")
            assert f"given: {given}." in typed.until(".\r\n")


def completed(words: list[str], **more: str) -> list[str]:
    """What bash is told that the last of these words may be."""
    asked = {"COMP_WORDS": "\n".join(words), "COMP_CWORD": str(len(words) - 1)}
    done = processes.run(_MLX_PROMPTCACHE_COMPLETE="bash_complete", **asked, **more)
    assert (done.code, done.err) == (0, "")
    return [line for line in done.out.split("\n") if line]


def test_names_are_those_of_the_store_that_the_words_before_choose(
    store: Path, tmp_path: Path
) -> None:
    Store(tmp_path / "other").create()
    Store(tmp_path / "other").names.write("elsewhere", STEM)
    chosen = ["mlx-promptcache", "show", "--cache-dir", str(tmp_path / "other"), ""]
    assert completed(chosen, MLX_PROMPTCACHE_DIR=str(store)) == ["plain,elsewhere"]
    chosen[3] = str(tmp_path / "none")
    assert completed(chosen) == []
    assert not (tmp_path / "none").exists()
    assert completed(["mlx-promptcache", "show", "-m", "no/such", ""]) == []
    assert completed(["mlx-promptcache", "report", "--output", "pag"]) == ["file,pag"]
    assert completed(["mlx-promptcache", "list", "--cache-dir", "a"]) == ["dir,a"]


def test_commands_are_completed_with_none_of_them_imported() -> None:
    script = (
        "import contextlib, io, json, os, sys\n"
        f"os.environ.update({cli.COMPLETING}='zsh_complete', COMP_WORDS='x ', COMP_CWORD='1')\n"
        "from mlx_promptcache import cli\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "    cli.run([])\n"
        "print(json.dumps([m for m in sys.modules if m.startswith('mlx_promptcache.cli.')]))\n"
    )
    imported = processes.python(script)
    assert set(imported) == {"mlx_promptcache.cli.output", "mlx_promptcache.cli.names"}


def test_names_are_completed_without_mlx(store: Path) -> None:
    script = (
        "import contextlib, io, json, os, sys\n"
        f"os.environ.update({cli.COMPLETING}='fish_complete', COMP_WORDS=sys.argv[1])\n"
        "os.environ.update(COMP_CWORD='', MLX_PROMPTCACHE_DIR=sys.argv[2])\n"
        "from mlx_promptcache import cli\n"
        "said = io.TextIOWrapper(io.BytesIO())\n"
        "with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):\n"
        "    cli.run([])\n"
        "said.seek(0)\n"
        "print(json.dumps([said.read(), 'mlx' in sys.modules]))\n"
    )
    for command in ("show ", "load ", "verify ", "clear ", "save ", "generate --prompt-cache "):
        said, mlx = processes.python(script, f"mlx-promptcache {command}", store)
        assert "plain,examples for mine" in said
        assert not mlx


def test_fish_is_not_given_half_a_name(store: Path) -> None:
    Store(store).names.write("one, two", STEM)
    words = {"COMP_WORDS": "mlx-promptcache show ", "COMP_CWORD": ""}
    asked = {cli.COMPLETING: "fish_complete", "MLX_PROMPTCACHE_DIR": str(store), **words}
    assert "one" not in processes.run(**asked).out


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_is_printed_for_each_shell_and_as_json(
    shell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert f"{cli.COMPLETING}={shell}_complete" in script
    assert cli.run(["completion", shell, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"shell": shell, "script": script}
    assert cli.run(["completion", "tcsh"]) == 2
