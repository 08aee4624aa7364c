"""Measure `batch` against a loop of `generate`; called by scripts/batch_speed.

Both answer questions after the same few-shot prefix, which is stored before anything counts. The
loop starts a process for each question, as a shell script does; it gets fewer questions, because
it takes longer. Rounds take turns, and every sample is kept. On a busy machine the seconds of the
processor say more than those of a clock: both are told.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from mlx_promptcache import machine

EXAMPLES = Path(__file__).parent.parent / "examples" / "fewshot"
TOKENS = 3  # an answer: the sentiment

Sample = dict[str, float]  # questions a second: of a clock, and of the processor


def questions(count: int, offset: int) -> list[str]:
    """Questions that were not asked before: each has a number of its own."""
    sentences = (EXAMPLES / "sentences.txt").read_text("utf-8").split("\n")
    told = [sentence for sentence in sentences if sentence.strip()]
    return [f"Sentence: {told[i % len(told)]} ({offset + i})\nSentiment:" for i in range(count)]


class Programs:
    """The two programs on one model and one store."""

    def __init__(self, model: str, directory: Path, batch_size: int) -> None:
        self._common = [
            "--prefix-file", str(EXAMPLES / "prefix.txt"), "--ignore-chat-template",
            "-m", model, "--cache-dir", str(directory / "store"), "-n", str(TOKENS), "--temp", "0",
            "--json",
        ]  # fmt: skip
        self._file = directory / "questions.jsonl"
        self._batch_size = str(batch_size)

    def loop(self, asked: list[str]) -> Sample:
        """One process a question."""
        began = _now()
        for question in asked:
            _run("generate", "-p", question, *self._common)
        return _since(began, len(asked))

    def batch(self, asked: list[str]) -> Sample:
        """One process for all."""
        self._file.write_text("".join(json.dumps({"prompt": q}) + "\n" for q in asked), "utf-8")
        began = _now()
        told = _run("batch", str(self._file), "--batch-size", self._batch_size, *self._common)
        sample = _since(began, len(asked))
        if told["answered"] != len(asked) or told["prefilled_tokens"]:
            sys.exit("the batch did not answer all questions from a stored prefix")
        return sample


def _now() -> tuple[float, float]:
    """Seconds of a clock, and of the processor in programs that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter(), used.ru_utime + used.ru_stime


def _since(began: tuple[float, float], count: int) -> Sample:
    clock, processor = (now - then for now, then in zip(_now(), began, strict=True))
    return {"clock": count / clock, "processor": count / processor}


def _run(*arguments: str) -> dict[str, Any]:
    program = [sys.executable, "-m", "mlx_promptcache", *arguments]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr.strip())
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--model", required=True)
    parser.add_argument("--questions", type=int, default=64, help="of a batch")
    parser.add_argument("--looped", type=int, default=6, help="of a loop")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--json", metavar="FILE")
    asked = parser.parse_args()
    samples: dict[str, list[Sample]] = {"loop": [], "batch": []}
    with tempfile.TemporaryDirectory() as name:
        programs = Programs(asked.model, Path(name), asked.batch_size)
        programs.loop(questions(1, 0))  # the prefix, and what is made once on a machine
        for turn in range(1, asked.rounds + 1):
            for program, count in (("loop", asked.looped), ("batch", asked.questions)):
                sample: Sample = getattr(programs, program)(questions(count, turn * 100_000))
                samples[program].append(sample)
                told = ", ".join(f"{rate:.2f} a second of the {c}" for c, rate in sample.items())
                print(f"round {turn}: {program:5} {told}", flush=True)
    ratios = {clock: _ratio(samples, clock) for clock in ("clock", "processor")}
    if asked.json:
        kept = {"machine": machine.description(), "options": vars(asked), "samples": samples}
        Path(asked.json).write_text(json.dumps({**kept, **ratios}, indent=2) + "\n", "utf-8")
    print(f"for the same seconds of the processor: {ratios['processor']:.1f} times as many")
    print(f"batch answers {ratios['clock']:.1f} times as many questions a second as a loop")


def _ratio(samples: dict[str, list[Sample]], clock: str) -> float:
    batch, loop = (median(s[clock] for s in samples[name]) for name in ("batch", "loop"))
    return batch / loop


if __name__ == "__main__":
    main()
