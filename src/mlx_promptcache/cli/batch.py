"""`batch`: many questions after one shared prefix, decoded together; JSON lines in and out."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_promptcache import catalog
from mlx_promptcache.cli import output
from mlx_promptcache.cli.choices import ModelChoice, PromptChoice, SamplingChoice, take
from mlx_promptcache.cli.jsonl import Line, Printed, Written, lines, rows_in_order
from mlx_promptcache.cli.options import (
    examples,
    max_size_option,
    model_options,
    output_options,
    sampling_options,
)
from mlx_promptcache.errors import PromptError

if TYPE_CHECKING:
    from collections.abc import Callable

    from mlx_promptcache.batch import Answer, Batch, Question
    from mlx_promptcache.cli.session import Session
    from mlx_promptcache.prompt import Prompt
    from mlx_promptcache.runner import Runner
    from mlx_promptcache.sampling import Sampling
    from mlx_promptcache.state import Origin

KEY_DIGITS = 16
NO_PROMPT = {"prompt": None, "prompt_file": None}


@click.command(
    help=__doc__,
    epilog=examples(
        "batch --prefix-file few-shot.txt questions.jsonl --output answers.jsonl",
        "batch --prompt-cache shots questions.jsonl --batch-size 8 --json",
    ),
)
@click.argument("file", metavar="FILE.jsonl")
@click.option("--output", metavar="OUT.jsonl", help="Where answers go; a later run goes on there.")
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True,
              help="How many questions are decoded together.")  # fmt: skip
@click.option("--prefix", help="Text before each prompt.")
@click.option("--prefix-file", metavar="FILE", help="The same, from a file.")
@click.option("--system-prompt", help="The system message of each chat.")
@click.option("--messages", metavar="FILE.json", help="Messages before each question.")
@click.option("--ignore-chat-template", is_flag=True, help="Take prompts as plain text.")
@click.option("--prompt-cache", metavar="NAME", help="Go on after the stored prompt of that name.")
@click.option("--prompt-cache-ro", is_flag=True, help="Reuse, but write nothing to the store.")
@model_options
@sampling_options
@max_size_option
@output_options
def command(**options: Any) -> int:
    """Parse, check, answer."""
    choice, prompts = take(ModelChoice, options), take(PromptChoice, {**NO_PROMPT, **options})
    asked, name = take(SamplingChoice, options), options["prompt_cache"]
    given = prompts.messages or prompts.system_prompt or prompts.prefix or prompts.prefix_file
    if name is not None and given is not None:
        raise click.UsageError("--prompt-cache has its own prefix: leave the others out")
    stored = None if name is None else catalog.find(choice.store(), name)[1].content["origin"]
    sampling = asked.sampling()  # what makes no sense is told before the model is looked for
    told = lines(options["file"])
    _check_apart(options["file"], options["output"])
    read_only = options["prompt_cache_ro"]
    loaded = choice.begin(read_only=read_only, needs_store=name is not None)
    from mlx_promptcache.cli.session import Session

    runner = choice.runner(read_only=read_only, max_bytes=options["max_size"], loaded=loaded)
    session = Session(runner, as_json=options["as_json"], quiet=options["quiet"], seed=0)
    sampling = replace(asked.sampling(tokenizer=runner.tokenizer), seed=asked.seed or 0)
    work = Work(session, options, sampling, _base(runner, prompts, stored))
    return work.run(told)


def _check_apart(questions: str, answers: str | None) -> None:
    """Raise UsageError if the answers would be written to the file of the questions."""
    if answers is None or questions == "-":
        return
    with contextlib.suppress(OSError):
        if Path(questions).expanduser().samefile(Path(answers).expanduser()):
            raise click.UsageError("--output is the file of the questions: choose another")


def _base(runner: Runner, prompts: PromptChoice, stored: dict[str, Any] | None) -> Origin:
    """How what stands before every question is made."""
    from mlx_promptcache.state import Origin

    if stored is not None:
        base = Origin.from_json(stored)
        if base.text is None and base.messages is None:
            raise PromptError("this state holds tokens only: no question can be put after them")
        return base
    chat = prompts.chat()
    if chat is not None:
        return Origin(messages=tuple(chat))
    template = runner.prompter.has_template and not prompts.ignore_chat_template
    if prompts.system_prompt is not None and not template:
        raise PromptError(
            "--system-prompt needs a chat template: this model has none, or it is ignored"
        )
    return Origin(prompts.prefix_text(), None, prompts.system_prompt, template)


class Work:
    """One run over one file."""

    def __init__(
        self, session: Session, options: dict[str, Any], sampling: Sampling, base: Origin
    ) -> None:
        self._session, self._runner = session, session.runner
        self._as_json, self._quiet = options["as_json"], options["quiet"]
        self._size, self._stop = options["batch_size"], options["stop"]
        self._limit = options["max_tokens"]
        self._sampling, self._base = sampling, base
        self._path = None if options["output"] is None else Path(options["output"])
        self._skipped = self._failed = 0
        self._answers: list[Answer] = []
        self._interrupted = False

    def run(self, told: list[Line]) -> int:
        """Answer what is not answered yet; return the exit code."""
        from mlx_promptcache.batch import Batch
        from mlx_promptcache.cli.session import Interrupted

        out = Printed(quiet=self._as_json) if self._path is None else Written(self._path)
        began, batch = time.perf_counter(), None
        with self._session.interrupt as interrupt, contextlib.closing(out):
            try:
                missing = self._missing(told, out)
                if missing:
                    with self._session.progress() as progress:
                        batch = Batch(
                            self._runner, self._prefix(), sampling=self._sampling,
                            stop=self._stop, size=self._size, progress=progress,
                        )  # fmt: skip
                    self._keep(batch)
                    hidden = self._quiet or self._as_json or not sys.stdout.isatty()
                    with output.bar("answers", quiet=hidden) as bar:
                        self._answer(batch, missing, told, out, interrupt.check, bar)
            except Interrupted:
                self._interrupted = True
        self._session.remember()
        if self._as_json:
            output.print_json(self._summary(told, out, batch, time.perf_counter() - began))
        return self._code(told, out)

    def _answer(
        self,
        batch: Batch,
        missing: list[tuple[Question, str]],
        told: list[Line],
        out: Printed | Written,
        check: Callable[[], None],
        bar: Callable[[int, int], None],
    ) -> None:
        keys = {question.index: key for question, key in missing}
        bar(len(out.rows), len(told))
        for answer in batch.answers((question for question, _ in missing), each_step=check):
            self._answers.append(answer)
            out.add(
                _named(told[answer.index], keys[answer.index])
                | {
                    "text": answer.text,
                    "tokens": list(answer.tokens),
                    "finish_reason": answer.finish_reason,
                    "prompt_tokens": answer.prompt_tokens,
                    "cached_tokens": answer.cached_tokens,
                }
            )
            bar(len(out.rows), len(told))

    def _missing(self, told: list[Line], out: Printed | Written) -> list[tuple[Question, str]]:
        """The questions without an answer, and their keys. What is no question is told in `out`."""
        there = dict(out.rows)
        if there and max(there) >= len(told):
            raise self._others()
        found = []
        for line in told:
            self._session.interrupt.check()
            try:
                question, key = self._question(line)
            except PromptError as exc:
                question, key = None, _key(line.raw)
                if line.index not in there:
                    out.add(_named(line, key) | {"error": str(exc)})
            if line.index in there:
                self._check_same(there[line.index], line, key)
                self._skipped += 1
            elif question is not None:
                found.append((question, key))
        return found

    def _check_same(self, row: dict[str, Any], line: Line, key: str) -> None:
        if row["key"] != key or row.get("id") != line.id:
            raise self._others()

    def _others(self) -> PromptError:
        return PromptError(
            f"{self._path} answers other questions, or these with other settings: choose another "
            "--output"
        )

    def _question(self, line: Line) -> tuple[Question, str]:
        from mlx_promptcache.batch import question_of

        if line.error is not None:
            raise PromptError(line.error)
        prompt = self._runner.prompter.whole(self._origin(line))
        limit = line.max_tokens if line.max_tokens is not None else self._limit
        question = question_of(self._runner, line.index, prompt, _or_default(limit))
        settings = [self._sampling.to_json(), list(self._stop), question.max_tokens]
        text = json.dumps([self._runner.fingerprint, list(prompt.tokens), settings])
        return question, _key(text.encode())

    def _origin(self, line: Line) -> Origin:
        from mlx_promptcache.prompt import continued
        from mlx_promptcache.state import Origin

        base = self._base
        if line.prompt is not None:
            return continued(base, line.prompt)
        if base.text:
            raise PromptError("messages cannot stand after a prefix of text")
        system = () if base.system is None else ({"role": "system", "content": base.system},)
        return Origin(messages=(*(base.messages or system), *(line.messages or ())))

    def _prefix(self) -> Prompt | None:
        """The tokens that all questions begin with; None where nothing is before them."""
        if not (self._base.text or self._base.messages):
            return None
        return self._runner.prompter.beginning(self._base)

    def _keep(self, batch: Batch) -> None:
        if batch.shared is not None:
            self._session.keep(None, batch.shared.prompt_state())

    def _summary(
        self, told: list[Line], out: Printed | Written, batch: Batch | None, seconds: float
    ) -> dict[str, Any]:
        shared = batch.shared if batch is not None else None
        rows = out.rows
        return {
            "questions": len(told),
            "answered": len(self._answers),
            "skipped": self._skipped,
            "failed": sum("error" in row for row in rows.values()),
            "interrupted": self._interrupted,
            "prefix_tokens": 0 if shared is None else shared.n_past,
            "cached_tokens": 0 if shared is None else shared.cached_tokens,
            "prefilled_tokens": 0 if shared is None else shared.prefilled_tokens,
            "prompt_tokens": sum(a.prompt_tokens for a in self._answers),
            "generation_tokens": sum(len(a.tokens) for a in self._answers),
            "seconds": seconds,
            "questions_per_second": len(self._answers) / seconds if seconds else 0.0,
            "together": batch is not None and batch.together,
            "batch_size": self._size,
            "seed": self._sampling.seed,
            "output": None if self._path is None else str(self._path),
            "answers": list(rows_in_order(rows)) if self._path is None else None,
        }

    def _code(self, told: list[Line], out: Printed | Written) -> int:
        if self._interrupted:
            output.error(f"interrupted: {len(told) - len(out.rows)} questions are left")
            return 130
        failed = sum("error" in row for row in out.rows.values())
        if failed:
            output.error(f"{failed} of {len(told)} lines have no answer: their errors say why")
        return 1 if failed else 0


def _named(line: Line, key: str) -> dict[str, Any]:
    identity = {} if line.id is None else {"id": line.id}
    return {"index": line.index, **identity, "key": key}


def _key(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:KEY_DIGITS]


def _or_default(limit: int | None) -> int:
    from mlx_promptcache.cli.session import DEFAULT_MAX_TOKENS

    return DEFAULT_MAX_TOKENS if limit is None else limit
