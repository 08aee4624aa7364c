"""The machine, the versions and the commit, as they stand beside figures."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_promptcache
import processes
from mlx_promptcache import machine

SOURCE = Path(mlx_promptcache.__file__).parent


def git(*words: str | Path) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    done = subprocess.run(
        ["git", *identity, *map(str, words)], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def commit_of(checkout: Path) -> str | None:
    """What a copy of the package says, run by itself."""
    asked = f"import sys, json; sys.path.insert(0, {str(checkout / 'src')!r})\n"
    asked += "from mlx_promptcache import machine; print(json.dumps(machine.commit()))"
    done = subprocess.run(
        [sys.executable, "-c", asked], capture_output=True, text=True, check=True,
        env=processes.environment(PYTHONPATH=""),
    )  # fmt: skip
    value: str | None = json.loads(done.stdout)
    return value


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with this package in src, committed."""
    git("init", "-q", tmp_path)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(SOURCE, tmp_path / "src" / SOURCE.name, ignore=ignored)
    (tmp_path / ".gitignore").write_text("__pycache__\n")
    git("-C", tmp_path, "add", ".")
    git("-C", tmp_path, "commit", "-q", "-m", "all")
    return tmp_path


def test_the_machine_is_described_in_words_and_numbers() -> None:
    told = machine.description()
    assert set(told) == {"system", "processor", "cores", "memory_bytes", "preloaded", "load"}
    assert told["cores"] >= 1
    assert told["processor"]
    assert told["memory_bytes"] > 2**28
    assert json.loads(json.dumps(told)) == told


def test_preloaded_libraries_are_told_without_their_directories(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libopenblas.so.0:libother.so")
    assert machine.description()["preloaded"] == ["libopenblas.so.0", "libother.so"]


def test_where_proc_is_not_there_the_system_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", nothing)
    monkeypatch.setattr(machine, "_said", lambda *command: f"said by {command[0]}")
    assert machine.processor() == "said by sysctl"
    monkeypatch.setattr(machine, "_said", lambda *command: None)
    assert machine.processor() == platform.machine()


def test_versions_are_those_of_what_does_the_work() -> None:
    assert set(machine.versions()) == {"python", "mlx", "mlx-lm", "mlx-promptcache", "numpy"}


def test_the_commit_is_that_of_the_checkout_with_a_mark_if_files_differ(checkout: Path) -> None:
    head = git("-C", checkout, "rev-parse", "--short=12", "HEAD")
    (checkout / "notes.txt").write_text("not part of the program")
    assert commit_of(checkout) == head
    (checkout / "src" / SOURCE.name / "version.py").write_text('__version__ = "0"\n')
    assert commit_of(checkout) == f"{head}+"


def test_an_installed_copy_has_no_commit_even_inside_another_repository(checkout: Path) -> None:
    git("-C", checkout, "rm", "-q", "-r", "--cached", "src")
    git("-C", checkout, "commit", "-q", "-m", "nothing of it")
    assert commit_of(checkout) is None


def test_a_program_that_is_not_there_says_nothing() -> None:
    assert machine._said("no-such-program-at-all") is None
    assert machine._said(sys.executable, "-c", "import sys; sys.exit(1)") is None
    assert machine._said(sys.executable, "-c", "print('yes')") == "yes"
