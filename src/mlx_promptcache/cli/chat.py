"""`chat`: a conversation that goes on tomorrow where it stopped today."""

from __future__ import annotations

import re
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from mlx_promptcache.cli import output
from mlx_promptcache.cli.choices import ModelChoice, SamplingChoice, take
from mlx_promptcache.cli.options import (
    examples,
    max_size_option,
    model_options,
    output_options,
    sampling_options,
)
from mlx_promptcache.cli.terminal import Lines
from mlx_promptcache.errors import PromptCacheError, PromptError
from mlx_promptcache.names import check_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from mlx_promptcache.conversation import Conversation, Exchange
    from mlx_promptcache.run import Progress
    from mlx_promptcache.runner import Runner

    Asking = Callable[[Progress], None]

DEFAULT_MAX_TOKENS = 256  # as mlx_lm.chat
INTERRUPTED = 130
HELP = """\
/undo [N]      take the last exchange back, or the last N
/edit [TEXT]   ask something else in the place of the last question
/retry         answer the last question anew
/branch NAME   go on in a new session, which begins with all that was said
/save NAME     give the state a name, for generate --prompt-cache and load
/stats         tokens held, reused and computed, bytes written
/help          this
/quit          end; so does Ctrl-D. Ctrl-C ends an answer
A line that ends with \\ goes on, and so does a block that begins and ends with \"\"\".
// begins a question with a slash."""


@click.command(
    help=__doc__,
    epilog=examples(
        "chat --session holiday",
        'chat --session holiday --temp 0.7 --system-prompt "Answer in one sentence."',
    ),
)
@click.option("--session", metavar="NAME", help="Go on with this conversation, or begin it.")
@click.option("--system-prompt", help="The system message of a new conversation.")
@model_options
@sampling_options
@max_size_option
@output_options
def command(**options: Any) -> int:
    """Parse, check, talk."""
    choice, asked = take(ModelChoice, options), take(SamplingChoice, options)
    session: str | None = options["session"]
    if session is not None:
        check_name(session)
    asked.sampling()  # what makes no sense is told before the model is looked for
    loaded = choice.begin(needs_store=session is not None)
    from mlx_promptcache.conversation import Conversation

    runner = choice.runner(max_bytes=options["max_size"], loaded=loaded)
    conversation = Conversation(runner, session, system=options["system_prompt"])
    conversation.sample(asked.sampling(conversation.sampling, runner.tokenizer))
    return Talk(runner, conversation, options).run()


class Talk:
    """A conversation at a terminal, or in a pipe."""

    def __init__(self, runner: Runner, conversation: Conversation, options: dict[str, Any]) -> None:
        self._runner, self._conversation = runner, conversation
        self._as_json, self._quiet = options["as_json"], options["quiet"]
        limit = options["max_tokens"]
        self._limit: int = DEFAULT_MAX_TOKENS if limit is None else limit
        self._stop: tuple[str, ...] = options["stop"]
        interactive = sys.stdin.isatty() and sys.stdout.isatty() and not self._as_json
        self._lines = Lines(interactive=interactive)
        self._restored = conversation.n_past
        self._code = 0
        self._commands: dict[str, Callable[[str], object]] = {
            "/undo": self._undo,
            "/edit": self._edit,
            "/retry": self._retry,
            "/branch": self._branch,
            "/save": self._save,
            "/stats": self._stats,
            "/help": lambda _: click.echo(HELP, err=True),
        }

    def run(self) -> int:
        """Talk to the end of the input; return the exit code."""
        self._greet()
        self._lines.remember(self._conversation.questions)
        while (said := self._read()) is not None:
            try:
                if not self._take(said.strip()):
                    break
            except PromptCacheError as exc:
                output.error(str(exc))
                self._fail(1)
            if self._code == INTERRUPTED:
                break
        if self._as_json:
            output.print_json(self._told())
        return self._code

    def _read(self, typed: str = "") -> str | None:
        while True:
            try:
                said = self._lines.read(typed)
            except KeyboardInterrupt:
                if not self._lines.interactive:
                    raise
                click.echo()
                self._say("Ctrl-D or /quit ends")
                if typed:  # it was not to be changed after all
                    return None
                continue
            except PromptError as exc:
                output.error(str(exc))
                self._fail(1)
                continue
            if said is None and self._lines.interactive:
                click.echo()
            return said

    def _take(self, said: str) -> bool:
        """Do what was said; return whether there shall be more."""
        if said == "/quit":
            return False
        if said.startswith("//"):
            said = said[1:]
        elif said.startswith("/"):
            name, _, rest = said.partition(" ")
            if name not in self._commands:
                raise PromptError(
                    f"there is no command {name}: /help tells those that are, and // begins a "
                    "question with a slash"
                )
            self._commands[name](rest.strip())
            return True
        if said:
            self._answer(lambda progress: self._conversation.ask(said, progress=progress))
        return True

    # Commands

    def _undo(self, rest: str) -> None:
        if rest and not re.fullmatch("0*[1-9][0-9]{0,8}", rest):
            raise PromptError("/undo takes a number of exchanges, such as /undo 2")
        taken = self._conversation.undo(int(rest or 1))
        left = len(self._conversation.questions)
        self._say(f"{taken} taken back, {left} left, {self._conversation.n_past} tokens held")

    def _edit(self, rest: str) -> None:
        questions = self._conversation.questions
        if not questions:
            raise PromptError("nothing was asked yet")
        if not rest and self._lines.interactive:
            rest = (self._read(questions[-1]) or "").strip()
        if not rest:
            raise PromptError("nothing was changed: /edit TEXT asks this text instead")
        self._answer(lambda progress: self._conversation.edit(rest, progress=progress))

    def _retry(self, rest: str) -> None:  # noqa: ARG002
        if self._conversation.sampling.temp == 0 and not self._conversation.unanswered:
            self._say("at temperature 0 the answer is the same: choose another with --temp")
        self._answer(lambda progress: self._conversation.retry(progress=progress))

    def _branch(self, rest: str) -> None:
        self._conversation.branch(rest)
        self._say(f"this is the session {rest} now")

    def _save(self, rest: str) -> None:
        self._conversation.save(rest)
        self._say(f"the state is named {rest}")

    def _stats(self, rest: str) -> None:  # noqa: ARG002
        talk, done = self._conversation, self._conversation.exchanges
        of = f" of {talk.context_length}" if talk.context_length else ""
        seconds = sum(e.generation_seconds for e in done)
        timed = sum(e.generation_tokens - 1 for e in done)
        rows = [
            ("session", talk.session or "none"),
            ("exchanges", f"{len(talk.questions)}, {len(done)} of them now"),
            ("tokens held", f"{talk.n_past}{of}"),
            ("restored", f"{self._restored} tokens"),
            ("reused", f"{sum(e.cached_tokens for e in done)} tokens"),
            ("prefilled", f"{sum(e.prefilled_tokens for e in done)} tokens"),
            ("generated", f"{sum(e.generation_tokens for e in done)} tokens"),
            ("speed", f"{timed / seconds:.1f} tokens/s" if seconds else "-"),
            ("written", output.size(sum(e.bytes_written for e in done))),
        ]
        for name, value in rows:
            click.echo(f"{name:12}{output.printable(value)}", err=True)

    # Answers

    def _answer(self, asking: Asking) -> None:
        from mlx_promptcache.cli.markdown import display
        from mlx_promptcache.cli.session import Interrupted, Session

        session = Session(self._runner, as_json=self._as_json, quiet=self._quiet, seed=None)
        shown = display(quiet=self._as_json, rendered=self._lines.interactive)
        with session.interrupt:
            try:
                with session.progress() as progress:
                    asking(progress)
            except Interrupted:
                self._say("interrupted: the question is taken back")
                return self._stopped()
            try:
                for step in self._conversation.answer(self._limit, self._stop):
                    shown.add(step.text)
                    if session.interrupt.wanted:
                        break
                shown.finish()
            finally:  # also when whoever reads has seen enough
                exchange = self._conversation.keep()
        session.remember()
        self._tell_end(exchange)
        return None if not session.interrupt.wanted else self._stopped()

    def _tell_end(self, exchange: Exchange | None) -> None:
        talk = self._conversation
        if exchange is None or exchange.finish_reason == "interrupted":
            self._say("interrupted: what was said is kept" if exchange else "interrupted")
        elif exchange.finish_reason == "length":
            full = talk.context_length is not None and talk.n_past >= talk.context_length
            why = "the model's context is full" if full else f"--max-tokens is {self._limit}"
            self._say(f"the answer ends here: {why}")

    def _stopped(self) -> None:
        if not self._lines.interactive:
            self._fail(INTERRUPTED)

    def _fail(self, code: int) -> None:
        """A script is told at its end; a person was told already."""
        if not self._lines.interactive:
            self._code = code

    # Words

    def _say(self, sentence: str) -> None:
        if not self._quiet:
            click.echo(f"({output.printable(sentence)})", err=True)

    def _greet(self) -> None:
        talk = self._conversation
        if talk.messages and talk.session is not None and talk.questions:
            count = len(talk.questions)
            exchanges = "1 exchange" if count == 1 else f"{count} exchanges"
            self._say(f"session {talk.session}: {exchanges}, {talk.n_past} tokens held")
        if self._lines.interactive:
            self._say("/help tells the commands, Ctrl-D ends")
        if talk.unanswered:
            self._say("the last question has no answer: /retry answers it, another replaces it")

    def _told(self) -> dict[str, Any]:
        talk = self._conversation
        return {
            "session": talk.session,
            "tokens": talk.n_past,
            "context_length": talk.context_length,
            "restored_tokens": self._restored,
            "messages": [dict(message) for message in talk.messages],
            "exchanges": [
                {**asdict(e), "generation_tps": e.tokens_per_second} for e in talk.exchanges
            ],
        }
