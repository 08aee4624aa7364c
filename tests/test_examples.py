"""The pages of examples: every block of theirs is run, as a reader would."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

import processes
import tiny
from conftest import ROOT

if TYPE_CHECKING:
    from pathlib import Path

MARK = "<!-- run: "  # begins a page whose blocks are run
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INSTALLED = re.compile(r"pip install '([^'\[]*)\[([a-z]+)\]'")
MODEL = "path/to/model"
PAGES = [p for p in sorted((ROOT / "docs").glob("*.md")) if p.read_text("utf-8").startswith(MARK)]


@dataclass(frozen=True)
class Example:
    """A block of a page: in which language, and below which line of the page it begins."""

    language: str
    text: str
    line: int

    def run(self, directory: Path, model: Path) -> str:
        """Run it in a process of its own, and return what it prints. It must not complain."""
        text = self.text.replace(MODEL, str(model))
        command = (
            ["bash", "-euo", "pipefail", "-c"] if self.language == "sh" else [sys.executable, "-c"]
        )
        path = f"{directory / 'bin'}:{processes.environment()['PATH']}"
        done = subprocess.run(
            [*command, text], cwd=directory, env=processes.environment(PATH=path), check=False,
            capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, ""), f"line {self.line}: {done.stderr}"
        return done.stdout


def examples(page: Path) -> list[Example]:
    text = page.read_text("utf-8")
    return [
        Example(found[1], found[2], text.count("\n", 0, found.start()) + 1)
        for found in BLOCK.finditer(text)
    ]


@pytest.fixture
def surroundings(tmp_path: Path) -> Path:
    """A directory with the command on its path and nothing else."""
    program = tmp_path / "bin" / "mlx-promptcache"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mlx_promptcache "$@"\n', "utf-8")
    program.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_of_a_page_runs_and_runs_again(page: Path, surroundings: Path) -> None:
    model = tiny.on_disk(surroundings / "model")
    found = examples(page)
    assert found, f"{page.name} has no block of sh or python"
    first, second = ([e.run(surroundings, model) for e in found] for _ in range(2))
    assert all(first)
    assert all(second)
    if page.name == "examples.md":
        check_examples(first, second)


def check_examples(first: list[str], second: list[str]) -> None:
    """What the blocks of docs/examples.md show: the second time they find what the first kept."""
    labels, asked, story, match, loop = zip(first, second, strict=True)
    assert labels[0] == labels[1]
    assert [line.partition("\t")[0] for line in labels[0].splitlines()] == [
        "I lost my keys again.", "The sun came out.",
    ]  # fmt: skip
    assert [said.split()[0] for said in asked] == ["none", "exact"]
    lengths = [int(said.splitlines()[-1].split()[0]) for said in story]
    assert lengths[1] - lengths[0] == 20
    stored = [[int(n) for n in re.findall(r"\d+", said)[:2]] for said in match]
    assert stored[0][0] < stored[1][0] == stored[1][1]
    left = [int(said.split()[0]) for said in loop]
    assert left[0] > left[1] == 1


def test_pages_of_examples_are_found() -> None:
    assert "examples.md" in {page.name for page in PAGES}


def test_a_block_that_fails_or_complains_is_seen(surroundings: Path) -> None:
    for language, text in (
        ("sh", "false\necho done"), ("sh", "echo no >&2"), ("python", "raise SystemExit(3)"),
        ("sh", "mlx-promptcache show nobody --cache-dir store"),
    ):  # fmt: skip
        with pytest.raises(AssertionError, match="line 7"):
            Example(language, text, 7).run(surroundings, surroundings)


def test_what_pages_install_is_this_checkout_and_extras_that_it_has() -> None:
    """No index has the package under its name."""
    extras = re.findall("^([a-z]+) = ", (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    told = [
        found
        for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
        for found in INSTALLED.findall(page.read_text("utf-8"))
    ]
    assert (".", "share") in told
    for what, extra in told:
        assert (what, extra in extras) == (".", True)
