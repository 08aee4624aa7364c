"""Time the few-shot example cold and warm; called by scripts/bench.

Cold and warm runs take turns, so that whatever else the machine does falls on both. Each round has
a store of its own: a cold run fills it, and two warm ones with other questions read it. Medians are
compared. Exit code 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PREFIX = Path(__file__).parent.parent / "examples" / "fewshot" / "prefix.txt"
QUESTIONS = (
    "Sentence: The bread was still warm and the staff sang while they worked.\nSentiment:",
    "Sentence: Nobody answered the phone for three weeks.\nSentiment:",
    "Sentence: The ferry to the island leaves every hour.\nSentiment:",
)
WARM_PROMPT = 1 / 15  # load and prefill of a warm prompt, against the prefill of a cold one


def generate(model: str, store: Path, question: str) -> dict[str, Any]:
    """One run in a process of its own."""
    command = [sys.executable, "-m", "mlx_promptcache", "generate", "--json", "--quiet"]
    command += ["-m", model, "--cache-dir", str(store), "--ignore-chat-template"]
    command += ["--prefix-file", str(PREFIX), "-p", question, "-n", "8", "--temp", "0"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    value: dict[str, Any] = json.loads(done.stdout)
    return value


def measure(model: str, rounds: int) -> dict[str, Any]:
    """Rounds of one cold and two warm runs each."""
    cold: list[dict[str, Any]] = []
    warm: list[dict[str, Any]] = []
    for i in range(rounds):
        with tempfile.TemporaryDirectory() as directory:
            store = Path(directory) / "store"
            cold.append(generate(model, store, QUESTIONS[0]))
            warm += [generate(model, store, question) for question in QUESTIONS[1:]]
        print(f"round {i + 1} of {rounds} done", file=sys.stderr)
    prompt = [run["load_seconds"] + run["prefill_seconds"] for run in warm]
    return {
        "cold_prompt_seconds": [run["prefill_seconds"] for run in cold],
        "warm_prompt_seconds": prompt,
        "cold_ttft_seconds": [run["ttft_seconds"] for run in cold],
        "warm_ttft_seconds": [run["ttft_seconds"] for run in warm],
        "prompt_tokens": cold[0]["prompt_tokens"],
        "warm_prefilled_tokens": max(run["prefilled_tokens"] for run in warm),
    }


def main() -> int:
    """Measure, print a table, and judge."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--runs", type=int, default=5, help="rounds (default 5)")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    figures = measure(options.model, options.runs)
    figures["machine"] = f"{platform.platform()}, {os.cpu_count()} cores"
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", "utf-8")
    median = {k: statistics.median(v) for k, v in figures.items() if k.endswith("_seconds")}
    ratio = median["warm_prompt_seconds"] / median["cold_prompt_seconds"]
    first = median["warm_ttft_seconds"] / median["cold_ttft_seconds"]
    print(f"{figures['machine']}; {options.runs} rounds, medians")
    print(
        f"prompt of {figures['prompt_tokens']} tokens, {figures['warm_prefilled_tokens']} fed warm"
    )
    cold, warm = median["cold_prompt_seconds"], median["warm_prompt_seconds"]
    print(f"load + prefill      cold {cold:7.2f} s   warm {warm:6.2f} s   1/{1 / ratio:.1f}")
    cold, warm = median["cold_ttft_seconds"], median["warm_ttft_seconds"]
    print(f"to the first token  cold {cold:7.2f} s   warm {warm:6.2f} s   1/{1 / first:.1f}")
    reached = ratio <= WARM_PROMPT
    print(f"goal: load + prefill at most 1/15: {'reached' if reached else 'MISSED'}")
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
