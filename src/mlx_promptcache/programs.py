"""The programs that are compared, as commands: a prompt computed from nothing, and a kept one.

Each is what its users type. Prompts go through the chat template of the model, in all programs
alike, because mlx_lm.cache_prompt has no other way.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mlx_promptcache.errors import MeasuringError
from mlx_promptcache.timing import Command

if TYPE_CHECKING:
    from pathlib import Path

MAX_TOKENS = 8
SEPARATOR = b"==========\n"  # mlx_lm.generate prints it before and after the text


class Program(Protocol):
    """One of the programs, with one model. `directory` is where it may keep what it needs."""

    @property
    def name(self) -> str:
        """What it is called in tables."""

    def prepare(self, prefix: Path, directory: Path) -> None:
        """Make what warm runs after this prefix start from, if cold runs do not leave it."""

    def cold(self, prefix: Path, question: str, directory: Path) -> Command:
        """A run that computes the whole prompt."""

    def warm(self, prefix: Path, question: str, directory: Path) -> Command:
        """A run that starts from what is kept of the prefix."""


@dataclass(frozen=True)
class Ours:
    """`mlx-promptcache generate`. A cold run keeps what warm ones start from."""

    model: Path
    name: str = "mlx-promptcache"

    def prepare(self, prefix: Path, directory: Path) -> None:
        """Nothing."""

    def cold(self, prefix: Path, question: str, directory: Path) -> Command:
        """Computes the prompt, and keeps it."""
        return self.generate(prefix, question, directory / "store")

    def warm(self, prefix: Path, question: str, directory: Path) -> Command:
        """The same command: it finds what is there."""
        return self.generate(prefix, question, directory / "store")

    def generate(
        self, prefix: Path, question: str, store: Path, *more: str, tokens: int = MAX_TOKENS
    ) -> Command:
        """A run with a store of its own."""
        command = [sys.executable, "-m", "mlx_promptcache", "generate"]
        command += ["-m", str(self.model), "--cache-dir", str(store)]
        command += ["--prefix-file", str(prefix), "-p", question]
        return Command((*command, "-n", str(tokens), "--temp", "0", "--quiet", *more))


@dataclass(frozen=True)
class MlxLm:
    """`mlx_lm.generate`, and `mlx_lm.cache_prompt` for the file that it starts from."""

    model: Path
    name: str = "mlx-lm"

    def prepare(self, prefix: Path, directory: Path) -> None:
        """Let mlx-lm make its prompt cache file.

        Raises:
            MeasuringError: it could not.
        """
        command = [sys.executable, "-m", "mlx_lm", "cache_prompt", "--model", str(self.model)]
        command += ["--prompt", prefix.read_text("utf-8")]
        command += ["--prompt-cache-file", str(_file(directory))]
        done = subprocess.run(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            env=Command(()).environment,
        )  # fmt: skip
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1:] or ["it did not say why"]
            raise MeasuringError(f"mlx_lm.cache_prompt failed: {reason[0]}")

    def cold(self, prefix: Path, question: str, directory: Path) -> Command:  # noqa: ARG002
        """Computes the prompt."""
        return self.generate("--prompt", prefix.read_text("utf-8") + question)

    def warm(self, prefix: Path, question: str, directory: Path) -> Command:  # noqa: ARG002
        """Starts from its file."""
        return self.generate("--prompt-cache-file", str(_file(directory)), "--prompt", question)

    def generate(self, *more: str, tokens: int = MAX_TOKENS) -> Command:
        """A run of its command line."""
        command = [sys.executable, "-m", "mlx_lm", "generate", "--model", str(self.model)]
        return Command((*command, "--max-tokens", str(tokens), "--temp", "0", *more), SEPARATOR)


def _file(directory: Path) -> Path:
    return directory / "prompt_cache.safetensors"
