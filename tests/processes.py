"""Runs the command line as users do: in processes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one JSON object on standard output."""
        assert self.code == 0, self.err
        value = json.loads(self.out)
        assert isinstance(value, dict)
        return value


def environment(**more: str) -> dict[str, str]:
    """This process's environment without the settings of the program under test."""
    mine = {k: v for k, v in os.environ.items() if not k.startswith("MLX_PROMPTCACHE")}
    return {**mine, "HF_HUB_OFFLINE": "1", **more}


def start(*arguments: str | Path, **more: str) -> subprocess.Popen[str]:
    """Start the program."""
    return subprocess.Popen(
        [sys.executable, "-m", "mlx_promptcache", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**more),
    )


def run(*arguments: str | Path, stdin: str = "", **more: str) -> Ended:
    """Run the program to its end."""
    done = subprocess.run(
        [sys.executable, "-m", "mlx_promptcache", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        env=environment(**more),
        check=False,
        timeout=900,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def python(source: str, *arguments: str | Path, **more: str) -> Any:
    """Run a Python program in a process of its own, and return the JSON that it prints."""
    done = subprocess.run(
        [sys.executable, "-c", source, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment(**more),
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
