"""Measure all that is promised about time and bytes, and judge it; called by scripts/bench.

Processes are timed from their start to the first byte of generated text that arrives on a pipe, or
to their end. Arms take turns, and a figure compares arms of one run. `mlx-promptcache bench`
measures a part of this on any machine; what is added here are the goals, llama.cpp if there is an
environment that has it, and what is measured inside a process. Exit code 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import goals
import performance
from mlx_promptcache import benchmark, plots
from mlx_promptcache.errors import MeasuringError, PromptCacheError
from mlx_promptcache.files import SUFFIX
from mlx_promptcache.programs import MlxLm, Ours
from mlx_promptcache.store import BLOCKS, SNAPSHOTS, TOKENIZERS
from mlx_promptcache.timing import Arm, Command, take_turns, timed

if TYPE_CHECKING:
    from collections.abc import Callable

    from mlx_promptcache.programs import Program

    CommandOf = Callable[[int], Command]  # of a round
    SecondsOf = Callable[[int], float]

ROOT = Path(__file__).parent.parent
PREFIX = ROOT / "examples" / "fewshot" / "prefix.txt"
HERE = Path(__file__).parent
QUESTION = "Sentence: The {} {} is behind the house.\nSentiment:"
PARTS = ("warm", "cold", "decoding", "restoring", "bfloat16", "positions", "lengths")
PLAIN = "--ignore-chat-template"  # so that the answer does not end

# All that `generate` imports and loads, and nothing else.
LOADING = """
import sys
import mlx_promptcache.cli.generate, mlx_promptcache.cli.prompts, mlx_promptcache.cli.session
from mlx_promptcache.runner import Runner
import mlx.core as mx
runner = Runner.load(sys.argv[1], cache_dir=sys.argv[2], read_only=True)
mx.eval(runner.model.parameters())
runner.tokenizer.encode("The end.")
print("loaded", flush=True)
"""

Json = dict[str, Any]


@dataclass(frozen=True)
class LlamaCpp:
    """llama.cpp through its Python binding, in an environment of its own. What the chat template
    puts before and after a prompt is put there here.
    """

    python: str
    gguf: str
    before: str
    after: str
    name: str = "llama.cpp"

    def prepare(self, prefix: Path, directory: Path) -> None:
        """Compute the prefix, and save its session."""
        timed(self._run("keep", prefix, directory))

    def cold(self, prefix: Path, question: str, directory: Path) -> Command:
        """Computes the prompt."""
        return self._run("cold", prefix, directory, question + self.after)

    def warm(self, prefix: Path, question: str, directory: Path) -> Command:
        """Restores the session."""
        return self._run("warm", prefix, directory, question + self.after)

    def _run(self, way: str, prefix: Path, directory: Path, *tail: str) -> Command:
        directory.mkdir(parents=True, exist_ok=True)
        head = directory / "head.txt"
        head.write_text(self.before + prefix.read_text("utf-8"), "utf-8")
        session = directory / "llama.session"
        command = (self.python, str(HERE / "llama_child.py"), way, self.gguf, str(session))
        return Command((*command, str(head), *tail), without=("LD_PRELOAD", "PYTHON"))


class Bench:
    """The measurements, part by part. Each returns what it adds to the report."""

    def __init__(self, model: Path, settings: benchmark.Settings, llama: LlamaCpp | None) -> None:
        self.model, self.settings, self.llama = model, settings, llama
        self.ours, self.theirs = Ours(model), MlxLm(model)
        self.programs: list[Program] = [self.ours, self.theirs]
        if llama:
            self.programs.append(llama)
        self.questions = benchmark.questions(settings.seed, QUESTION)

    def measure(self, part: str, prefix: Path) -> Json:
        """One of PARTS."""
        told(part)
        if part in {"warm", "cold"}:
            with tempfile.TemporaryDirectory() as scratch:
                found: Json = getattr(self, part)(prefix, Path(scratch))
                return found
        if part == "lengths":
            return {part: benchmark.lengths(self.model, self.settings, self.programs, told)}
        if part == "positions":
            lengths = ",".join(map(str, self.settings.lengths))
            return self.inside(part, prefix, self.settings.cold_runs, lengths)
        return self.inside(part, prefix, self.settings.runs)

    def warm(self, prefix: Path, scratch: Path) -> Json:
        """From the start of a process to the first byte of text, when the prefix is kept."""
        ours, theirs, llama = self.ours, self.theirs, self.llama
        same = next(self.questions)
        for program in self.programs:
            program.prepare(prefix, scratch)
        timed(ours.cold(prefix, same, scratch))
        loading = Command((sys.executable, "-c", LOADING, str(self.model), str(scratch / "store")))
        asked = [next(self.questions) for _ in range(self.settings.runs + 1)]
        commands: dict[str, CommandOf] = {
            goals.OURS: lambda i: ours.warm(prefix, asked[i], scratch),
            goals.SAME: lambda _: ours.warm(prefix, same, scratch),
            goals.LOADING: lambda _: loading,
            goals.THEIRS: lambda i: theirs.warm(prefix, asked[i], scratch),
        }
        if llama:
            commands[goals.LLAMA] = lambda i: llama.warm(prefix, asked[i], scratch)

        def first_seconds(command: CommandOf) -> SecondsOf:
            return lambda i: timed(command(i)).first_seconds

        return {"warm": self._turns({name: first_seconds(c) for name, c in commands.items()})}

    def cold(self, prefix: Path, scratch: Path) -> Json:
        """Whole processes that compute the prompt and generate, with and without saving it; and
        what those that save spend on it.
        """
        ours, theirs = self.ours, self.theirs
        text, spent = prefix.read_text("utf-8"), scratch / "spent"
        asked = [next(self.questions) for _ in range(self.settings.runs + 1)]
        saving: list[float] = []

        def generate(i: int, name: str, *more: str) -> Command:
            store = scratch / f"{name}-{i}"
            return ours.generate(prefix, asked[i], store, PLAIN, *more, tokens=goals.SAVED_RUN)

        def saves(i: int) -> float:
            total = timed(watched(generate(i, "kept"), spent)).total_seconds
            check_saved(scratch / f"kept-{i}")
            saving.append(float(spent.read_text("ascii")))
            return total

        def saves_nothing(i: int) -> float:
            return timed(generate(i, "none", "--prompt-cache-ro")).total_seconds

        def mlx_lm(i: int) -> float:
            prompt = (PLAIN, "--prompt", text + asked[i])
            return timed(theirs.generate(*prompt, tokens=goals.SAVED_RUN)).total_seconds

        taken = self._turns(
            {goals.OURS: saves, goals.SAVING_NOTHING: saves_nothing, goals.THEIRS: mlx_lm}
        )
        return {"cold": taken, "saving": saving[1:]}

    def _turns(self, arms: dict[str, SecondsOf]) -> dict[str, list[float]]:
        """The seconds of arms that took turns. The first round does not count: it brings files into
        memory.
        """

        def arm(seconds: SecondsOf) -> Arm[float]:
            return Arm(lambda i: round(seconds(i), 4), self.settings.runs + 1)

        taken = take_turns({name: arm(seconds) for name, seconds in arms.items()}, told)
        return {name: samples[1:] for name, samples in taken.items()}

    def inside(self, part: str, prefix: Path, runs: int, *more: str) -> Json:
        """What is measured within a process."""
        command = [sys.executable, str(HERE / "bench_inside.py"), part, str(self.model)]
        done = subprocess.run(
            [*command, str(prefix), str(runs), *more], stdout=subprocess.PIPE, check=True
        )
        measured: Json = json.loads(done.stdout)
        return measured


def watched(command: Command, spent: Path) -> Command:
    """A run of ours that also writes how many seconds it spent on saving."""
    python, *rest = command.arguments
    assert rest[:2] == ["-m", "mlx_promptcache"]  # whose place the script takes
    child = (python, str(HERE / "saving_child.py"), str(spent), *rest[2:])
    return replace(command, arguments=child)


def check_saved(store: Path) -> None:
    """Whether a run has saved what it should: failing to is a notice, and no error.

    Raises:
        MeasuringError: it has not.
    """
    for kind in (BLOCKS, SNAPSHOTS, TOKENIZERS):
        if not any(store.glob(f"{kind}/**/*{SUFFIX}")):
            raise MeasuringError(f"a run that was to save has kept no {kind}: is the drive full?")


def told(line: str) -> None:
    """Tell how far it is."""
    print(line, file=sys.stderr, flush=True)


def llama_cpp(options: argparse.Namespace) -> LlamaCpp | None:
    """llama.cpp, if it can be run; a notice if not."""
    if not options.llama_python or not options.gguf:
        told("without llama.cpp: give --llama-python PYTHON and --gguf FILE to have it measured")
        return None
    from mlx_lm.utils import load_tokenizer

    tokenizer: Any = load_tokenizer(options.model)
    before = after = ""
    if tokenizer.has_chat_template:
        chat = [{"role": "user", "content": "<prompt>"}]
        rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        before, _, after = rendered.partition("<prompt>")
    return LlamaCpp(options.llama_python, options.gguf, before, after)


def llama_version(python: str) -> str:
    """The release of the binding."""
    asking = "from importlib import metadata; print(metadata.version('llama-cpp-python'))"
    done = subprocess.run([python, "-c", asking], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip()


def measured(options: argparse.Namespace) -> Json:
    """The whole report; written after each part, so that what is measured is not lost."""
    short: bool = options.short
    settings = benchmark.Settings(
        lengths=options.lengths or (benchmark.SHORT if short else benchmark.LENGTHS),
        runs=options.runs or (2 if short else benchmark.RUNS),
        cold_runs=options.cold_runs or (1 if short else benchmark.COLD_RUNS),
        seed=options.seed,
    )
    llama = llama_cpp(options)
    bench = Bench(options.model, settings, llama)
    report = benchmark.surroundings(options.model, settings.seed)
    report["short"] = short
    began = time.monotonic()
    if llama:
        report["versions"]["llama-cpp-python"] = llama_version(llama.python)
        report["gguf"] = {"name": Path(llama.gguf).name, "bytes": Path(llama.gguf).stat().st_size}
    with tempfile.TemporaryDirectory() as scratch:
        prefix = Path(scratch) / "prefix.txt"
        lines = PREFIX.read_text("utf-8").splitlines(keepends=True)
        prefix.write_text("".join(lines[:41] if short else lines), "utf-8")
        for part in options.parts:
            for name, value in bench.measure(part, prefix).items():
                report[name] = report.get(name, []) + value if name == "stored" else value
            report["minutes"] = round((time.monotonic() - began) / 60, 1)
            if options.json:
                write(options.json, report)
    return report


def write(path: Path, report: Json) -> None:
    """Write a report, samples of one arm in one line."""
    text = json.dumps(report, indent=1)
    path.write_text(performance.compact(text) + "\n", "utf-8")


def write_document(report: Json) -> None:
    """Make docs/performance.md, the figures that it is made of, and its pictures.

    Raises:
        MeasuringError: the report has not all that they need; they are as they were.
    """
    docs = ROOT / "docs"
    try:
        page = performance.document(report)
    except KeyError as exc:
        raise MeasuringError(f"this report has no {exc}: measure all parts again") from exc
    write(docs / "performance.json", report)
    (docs / "performance.md").write_text(page, "utf-8")
    plots.save(plots.of_lengths(report), str(docs / "performance-lengths"), kinds=("svg",))
    picture = performance.picture_of_positions(report)
    plots.save(picture, str(docs / "performance-positions"), kinds=("svg",))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="(scripts/bench gives it)")
    parser.add_argument("--runs", type=int, help="rounds of each measurement (10)")
    parser.add_argument("--cold-runs", type=int, help="rounds of what takes long (3)")
    parser.add_argument(
        "--short", action="store_true", help="a quick look: short prompts, 2 rounds"
    )
    parser.add_argument(
        "--lengths", type=benchmark.lengths_of, metavar="N,N,...", help="of prefixes, in tokens"
    )
    parser.add_argument("--seed", type=int, default=0, help="chooses the questions (0)")
    parser.add_argument(
        "--parts", type=lambda value: value.split(","), default=PARTS, metavar="A,B",
        help=f"only these of {','.join(PARTS)}",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="write all samples to this file")
    parser.add_argument(
        "--from", dest="source", type=Path, help="judge such a file, measure nothing"
    )
    parser.add_argument("--write", action="store_true", help="make docs/performance.md")
    parser.add_argument("--llama-python", metavar="PYTHON", help="has llama-cpp-python installed")
    parser.add_argument("--gguf", metavar="FILE", help="the same model, for llama.cpp")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}")
    if options.write and not options.source and set(options.parts) != set(PARTS):
        parser.error("--write needs all parts")
    return options


def main() -> int:
    """Measure or read, print what was found, and judge."""
    options = arguments()
    try:
        if options.write:
            plots.check()  # before measuring, which takes long
        report = json.loads(options.source.read_text()) if options.source else measured(options)
        if options.write:
            write_document(report)
    except PromptCacheError as exc:
        sys.exit(f"scripts/bench: {exc}")
    verdicts = goals.verdicts(report)
    for verdict in verdicts:
        print(verdict.sentence)
    judged = [verdict.goal for verdict in verdicts]
    for goal in goals.GOALS:
        if goal not in judged:
            print(f"not measured: {goal.what}")
    return 0 if all(verdict.reached for verdict in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
