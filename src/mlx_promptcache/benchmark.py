"""Time to the first token against the length of a prefix, cold and warm, program by program."""

from __future__ import annotations

import datetime
import itertools
import random
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_promptcache import machine, models
from mlx_promptcache.errors import MeasuringError
from mlx_promptcache.programs import MlxLm, Ours
from mlx_promptcache.timing import Arm, median, take_turns, timed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from mlx_promptcache.programs import Program
    from mlx_promptcache.timing import Timed

FORMAT = 1  # of the JSON
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
SHORT = (64, 512)
RUNS, COLD_RUNS = 10, 3
ROOM = 256  # tokens of the context that are left for template, question and answer

QUESTION = "\n\nWrite one sentence about the {} {}."
ADJECTIVES = ("old", "quiet", "green", "narrow", "cheerful", "distant", "wooden", "early", "clever")
NOUNS = ("bridge", "garden", "teacher", "river", "letter", "kitchen", "village", "machine", "song")
VERBS = ("follows", "remembers", "describes", "repairs", "watches", "surprises", "joins", "keeps")


@dataclass(frozen=True)
class Settings:
    """What is measured: prefixes of these lengths in tokens, `runs` times warm and, as that takes
    long, `cold_runs` times cold. `seed` chooses the words.
    """

    lengths: tuple[int, ...] = LENGTHS
    runs: int = RUNS
    cold_runs: int = COLD_RUNS
    seed: int = 0


def lengths_of(text: str) -> tuple[int, ...]:
    """The lengths in a text such as `64,512`, the shortest first.

    Raises:
        ValueError: that is not what the text is.
    """
    try:
        lengths = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        lengths = (0,)
    if lengths[0] < 1:
        raise ValueError(f"{text!r} is no list of lengths, such as 64,512")
    return lengths


def report(
    model: Path,
    settings: Settings,
    programs: Sequence[Program],
    told: Callable[[str], None],
) -> dict[str, Any]:
    """Measure, and return all samples with what they were measured on; `told` hears of progress.

    Raises:
        MeasuringError: a program failed, or no length fits into the model's context.
    """
    around = surroundings(model, settings.seed)  # before the machine is busy with this
    return {**around, "lengths": lengths(model, settings, programs, told)}


def programs_of(model: Path) -> list[Program]:
    """The programs that can be compared wherever this package runs."""
    return [Ours(model), MlxLm(model)]


def surroundings(model: Path, seed: int) -> dict[str, Any]:
    """What figures depend on besides the code that is measured, and which code that is."""
    import mlx.core as mx

    config = models.config(model)
    weights = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    return {
        "format": FORMAT,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": {**machine.description(), "device": str(mx.default_device())},
        "versions": machine.versions(),
        "commit": machine.commit(),
        "seed": seed,
        "model": {
            "name": model_name(model),
            "dtype": config.get("torch_dtype") or config.get("dtype"),
            "bytes": weights,
        },
    }


def model_name(model: Path) -> str:
    """The name of a model's directory, or of the repo that it is a download of."""
    path = model.resolve()
    if path.parent.name == "snapshots":  # the cache of Hugging Face: models--owner--name/snapshots/
        return path.parent.parent.name.removeprefix("models--").replace("--", "/")
    return path.name


def lengths(
    model: Path,
    settings: Settings,
    programs: Sequence[Program],
    told: Callable[[str], None],
) -> list[dict[str, Any]]:
    """The samples, in seconds, for each length: `{"tokens": n, "seconds": {program: {"cold": [],
    "warm": []}}}`. Programs that cannot run this model are left out, but for the first one.
    """
    from mlx_lm.utils import load_tokenizer

    tokenizer = load_tokenizer(model)
    asked = questions(settings.seed)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for length in _that_fit(model, settings.lengths):
            directory = Path(scratch) / str(length)
            directory.mkdir()
            prefix = directory / "prefix.txt"
            prefix.write_text(text_of(tokenizer, length, settings.seed), "utf-8")
            if not rows:
                programs = _that_run(programs, prefix, Path(scratch), asked, told)
            tokens = len(tokenizer.encode(prefix.read_text("utf-8"), add_special_tokens=False))

            def told_of(line: str, tokens: int = tokens) -> None:
                told(f"{tokens} tokens: {line}")

            for program in programs:
                program.prepare(prefix, directory)
            arms = _arms(programs, prefix, directory, asked, settings)
            rows.append({"tokens": tokens, "seconds": _samples(take_turns(arms, told_of))})
            shutil.rmtree(directory)  # long prefixes take much space
    return rows


def _that_fit(model: Path, lengths: Sequence[int]) -> list[int]:
    context = models.context_length(models.config(model))
    fitting = [n for n in lengths if context is None or n + ROOM <= context]
    if not fitting:
        raise MeasuringError(
            f"the model's context of {context} tokens has no room for a prefix: take another model"
        )
    return fitting


def _that_run(
    programs: Sequence[Program],
    prefix: Path,
    scratch: Path,
    asked: Iterator[str],
    told: Callable[[str], None],
) -> list[Program]:
    """The programs that can run this model, each run once, cold and warm: so nobody pays for the
    disk later, or for what is computed once on a machine. The first one must run.
    """
    running: list[Program] = []
    for program in programs:
        directory = scratch / f"warm-up-{program.name}"
        directory.mkdir()
        try:
            program.prepare(prefix, directory)
            timed(program.cold(prefix, next(asked), directory))
            timed(program.warm(prefix, next(asked), directory))
        except MeasuringError as exc:
            if not running:
                raise
            told(f"without {program.name}: {exc}")
        else:
            running.append(program)
    return running


def _arms(
    programs: Sequence[Program],
    prefix: Path,
    directory: Path,
    asked: Iterator[str],
    settings: Settings,
) -> dict[str, Arm[Timed]]:
    """A cold and a warm arm of each program. Each cold run has a directory of its own; warm ones
    start from what the first one left, or from what was prepared.
    """
    arms: dict[str, Arm[Timed]] = {}
    for program in programs:

        def cold(i: int, program: Program = program) -> Timed:
            own = directory if i == 0 else directory / f"cold-{i}"
            return timed(program.cold(prefix, next(asked), own))

        def warm(i: int, program: Program = program) -> Timed:  # noqa: ARG001 - all start alike
            return timed(program.warm(prefix, next(asked), directory))

        arms[f"{program.name} cold"] = Arm(cold, settings.cold_runs)
        arms[f"{program.name} warm"] = Arm(warm, settings.runs)
    return arms


def _samples(taken: dict[str, list[Timed]]) -> dict[str, dict[str, list[float]]]:
    samples: dict[str, dict[str, list[float]]] = {}
    for name, runs in taken.items():
        program, _, way = name.rpartition(" ")
        samples.setdefault(program, {})[way] = [round(run.first_seconds, 4) for run in runs]
    return samples


# Texts


def questions(seed: int, form: str = QUESTION) -> Iterator[str]:
    """Questions of one sentence, each another one, in an order that the seed shuffles."""
    pairs = list(itertools.product(ADJECTIVES, NOUNS))
    random.Random(seed).shuffle(pairs)  # noqa: S311
    return itertools.cycle([form.format(adjective, noun) for adjective, noun in pairs])


def text_of(tokenizer: Any, length: int, seed: int) -> str:
    """A text of simple sentences, cut to so many tokens; where tokens join otherwise, to about as
    many.
    """
    draw = random.Random(seed)  # noqa: S311
    sentences = (
        f"The {draw.choice(ADJECTIVES)} {draw.choice(NOUNS)} {draw.choice(VERBS)} "
        f"the {draw.choice(ADJECTIVES)} {draw.choice(NOUNS)}."
        for _ in range(length // 8 + 1)  # seven words and a full stop are eight tokens or more
    )
    tokens = tokenizer.encode(" ".join(sentences), add_special_tokens=False)
    return str(tokenizer.decode(tokens[:length]))


# For people


def table(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: medians, and how many times sooner a warm run is than a cold one."""
    names = list(report["lengths"][0]["seconds"])
    heads = ["tokens"]
    for name in names:
        heads += [f"{name} cold", "warm", "cold/warm"]
    rows = []
    for row in report["lengths"]:
        cells = [f"{row['tokens']:,}"]
        for name in names:
            cold, warm = (median(row["seconds"][name][way]) for way in ("cold", "warm"))
            cells += [f"{cold:.2f} s", f"{warm:.2f} s", f"{cold / warm:.1f} x"]
        rows.append(cells)
    return heads, rows
