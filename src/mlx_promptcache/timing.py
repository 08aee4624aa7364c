"""Timing programs: from the start of a process to the first byte of its text, turn by turn."""

from __future__ import annotations

import os
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Generic, TypeVar

from mlx_promptcache.errors import MeasuringError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

T = TypeVar("T")

ENOUGH = 65536  # bytes to read at once


@dataclass(frozen=True)
class Command:
    """A program to start. Its text is what comes after `marker` and before the next one; all of its
    output if there is no marker. `without` names variables that its environment does not have.
    """

    arguments: tuple[str, ...]
    marker: bytes = b""
    without: tuple[str, ...] = ()

    def text(self, said: bytes) -> bytes:
        """The text in all that the program has said so far."""
        if not self.marker:
            return said
        return said.partition(self.marker)[2].partition(self.marker)[0]

    @property
    def environment(self) -> dict[str, str]:
        """That of this process, without settings of models and stores, and off the Hub."""
        left_out = ("MLX_PROMPTCACHE", *self.without)
        kept = {k: v for k, v in os.environ.items() if not k.startswith(left_out)}
        return {**kept, "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Timed:
    """How long a process took, from its start: to the first byte of its text, and to its end."""

    first_seconds: float
    total_seconds: float
    text: str


def timed(command: Command) -> Timed:
    """Run a program to its end, and time it.

    Raises:
        MeasuringError: it failed, or there was no text.
    """
    with tempfile.TemporaryFile() as complaints:
        said, first, total, code = _run(command, complaints)
        complaints.seek(0)
        lines = complaints.read().decode(errors="replace").strip().splitlines()
    if code:
        reason = lines[-1] if lines else "it did not say why"
        raise MeasuringError(f"{_name(command)} ended with exit code {code}: {reason}")
    text = command.text(said).decode(errors="replace")
    if first is None or not text.strip():
        raise MeasuringError(
            f"{_name(command)} generated no text, so there is no first token to be timed"
        )
    return Timed(first, total, text)


def _run(command: Command, complaints: IO[bytes]) -> tuple[bytes, float | None, float, int]:
    said, first = b"", None
    began = time.perf_counter()
    with subprocess.Popen(
        command.arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=complaints,
        env=command.environment,
    ) as process:  # fmt: skip
        assert process.stdout is not None  # noqa: S101 - it was asked for
        try:
            while chunk := os.read(process.stdout.fileno(), ENOUGH):
                said += chunk
                if first is None and command.text(said):
                    first = time.perf_counter() - began
            code = process.wait()
        except BaseException:
            process.kill()
            raise
        return said, first, time.perf_counter() - began, code


def _name(command: Command) -> str:
    """The program without its long arguments."""
    words = [word for word in command.arguments[:4] if len(word) < 80]
    return " ".join(words)


@dataclass(frozen=True)
class Arm(Generic[T]):
    """One of several things that take turns: it is run with the number of the round, in the first
    `runs` of them.
    """

    run: Callable[[int], T]
    runs: int


def take_turns(arms: Mapping[str, Arm[T]], told: Callable[[str], None]) -> dict[str, list[T]]:
    """Run A B C A B C ..., so that whatever else the machine does falls on all alike.

    `told` hears of each round that is done.
    """
    results: dict[str, list[T]] = {name: [] for name in arms}
    rounds = max((arm.runs for arm in arms.values()), default=0)
    for i in range(rounds):
        for name, arm in arms.items():
            if i < arm.runs:
                results[name].append(arm.run(i))
        told(f"round {i + 1} of {rounds}")
    return results


def median(samples: Sequence[float]) -> float:
    """The middle one; between the two in the middle where their number is even."""
    return float(statistics.median(samples))


def ratio(one: Sequence[float], other: Sequence[float]) -> float:
    """The median of one against the median of the other."""
    return median(one) / median(other)
