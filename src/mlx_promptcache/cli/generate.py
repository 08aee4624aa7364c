"""`generate`: continue a prompt, and reuse what was computed before."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import click

from mlx_promptcache import headers
from mlx_promptcache.cli import output
from mlx_promptcache.cli.choices import (
    ModelChoice,
    PromptChoice,
    RemoteChoice,
    SamplingChoice,
    take,
)
from mlx_promptcache.cli.names import complete_names
from mlx_promptcache.cli.options import (
    examples,
    max_size_option,
    model_options,
    output_options,
    prompt_options,
    remote_options,
    sampling_options,
    shard_option,
)
from mlx_promptcache.errors import CacheMiss, PromptCacheError, UnsupportedLayer
from mlx_promptcache.names import check_name

if TYPE_CHECKING:
    from mlx_promptcache.cli.session import Session
    from mlx_promptcache.prompt import Prompt
    from mlx_promptcache.run import Run
    from mlx_promptcache.runner import Runner

log = logging.getLogger("mlx_promptcache")


@click.command(
    help=__doc__,
    epilog=examples(
        'generate -p "Why is the sky blue?"',
        'generate --prefix-file few-shot.txt -p "Sentence: It rains." -n 3 --temp 0',
        'generate --prompt-cache shots -p "Sentence: It rains."',
        "generate --messages chat.json --save-as answer",
    ),
)
@prompt_options
@model_options
@click.option(
    "--prompt-cache", is_flag=False, flag_value="", metavar="[NAME]",
    shell_complete=complete_names,
    help="Reuse the longest stored prefix and keep this prompt (the default); with a name, go on "
    "after the stored prompt of that name.",
)  # fmt: skip
@click.option("--prompt-cache-ro", is_flag=True, help="Reuse, but write nothing.")
@click.option("--prompt-cache-all", is_flag=True, help="Keep the generated tokens' state, too.")
@click.option(
    "--save-as", metavar="NAME", shell_complete=complete_names,
    help="Name the state at the end of the run.",
)  # fmt: skip
@click.option("--no-prompt-cache", is_flag=True, help="Neither read nor write.")
@click.option("--exact", is_flag=True, help="The very bits of a run without the cache.")
@sampling_options
@shard_option
@max_size_option
@remote_options
@output_options
def command(**options: Any) -> int:
    """Parse, check, run."""
    choice, prompts = take(ModelChoice, options), take(PromptChoice, options)
    asked, remote = take(SamplingChoice, options), take(RemoteChoice, options)
    name: str | None = options["prompt_cache"] or None
    off, read_only = options["no_prompt_cache"], options["prompt_cache_ro"]
    _check(options, name)
    prompts.check_shared(choice.ranks)
    expected = None
    if name is not None:  # before the model, which takes long
        expected = choice.stored(name)[1].content["n_past"]

    asked.sampling()  # what makes no sense is told before the model is looked for
    saves = options["save_as"] is not None
    loaded = choice.begin(
        use_cache=not off, read_only=read_only, needs_store=saves or name is not None, saves=saves
    )
    from mlx_promptcache.cli.session import DEFAULT_MAX_TOKENS, Interrupted, Session

    runner = choice.runner(
        read_only=read_only, use_cache=not off, max_bytes=options["max_size"], loaded=loaded
    )
    remote.attach(runner.cache)
    if runner.cache is not None:  # encoding a prompt takes one core
        runner.cache.expect(expected)
    session = Session(runner, as_json=options["as_json"], quiet=options["quiet"], seed=asked.seed)
    prompt = _prompt(runner, prompts, choice, name)
    sampling = asked._replace(seed=session.seed).sampling(tokenizer=runner.tokenizer)
    limit = DEFAULT_MAX_TOKENS if options["max_tokens"] is None else options["max_tokens"]
    run: Run | None = None
    with session.interrupt:
        try:
            with session.progress() as progress:
                run = runner.start(
                    prompt, exact=options["exact"], sampling=sampling, progress=progress, later=True
                )
            if name is not None and not run.cached_tokens and run.match is not None:
                log.warning("nothing of the state %r is used: %s", name, run.match.reason)
            if limit:
                session.generate(run, limit, options["stop"])
            session.finish_reason = session.finish_reason or "length"
        except Interrupted:
            session.finish_reason = "interrupted"
        failed = _keep(session, run, options)
        session.end_together()
    if session.broken_pipe is not None:
        raise session.broken_pipe
    if options["as_json"]:
        output.print_json(session.answer(run or runner.run_in_progress))
    session.finish_sending()
    if failed is not None:
        raise failed
    return 130 if session.finish_reason == "interrupted" else 0


def _check(options: dict[str, Any], name: str | None) -> None:
    writes = options["save_as"] is not None or options["prompt_cache_all"]
    if options["no_prompt_cache"] and (writes or name is not None or options["prompt_cache_ro"]):
        raise click.UsageError(
            "--no-prompt-cache goes with no other option of the prompt cache: leave it out, or them"
        )
    if options["prompt_cache_ro"] and writes:
        raise click.UsageError("--prompt-cache-ro writes nothing: leave out what saves")
    if options["save_as"] is not None:
        check_name(options["save_as"])


def _prompt(runner: Runner, prompts: PromptChoice, choice: ModelChoice, name: str | None) -> Prompt:
    from mlx_promptcache.cli.prompts import continuation_of, prompt_of
    from mlx_promptcache.state import Origin

    if name is None:
        return prompt_of(prompts, runner.prompter)
    store, header = choice.stored(name)
    origin = Origin.from_json(header.content["origin"])
    tokens: list[int] = []
    if origin.text is None and origin.messages is None:
        try:
            tokens = headers.tokens_of(store, header)
        except CacheMiss as exc:
            raise CacheMiss(f"the state {name!r} is damaged: {exc}; save it again") from exc
    return continuation_of(prompts, runner.prompter, origin, tokens)


def _keep(session: Session, run: Run | None, options: dict[str, Any]) -> PromptCacheError | None:
    """Keep the prompt, and what was generated after it if that is wanted.

    Returns the error of a save that was asked for: the answer comes first.
    """
    exact, name = options["exact"], options["save_as"]
    why_not = session.runner.why_not_kept
    if session.runner.cache is None:
        return UnsupportedLayer(why_not) if name is not None and why_not else None
    if run is None:  # interrupted in the prompt: keep what is computed of it
        partial = session.runner.run_in_progress
        if partial is not None and partial.prefilled_tokens:
            session.keep(None, partial.state(), exact=exact)
        return None
    interrupted = session.finish_reason == "interrupted"
    session.keep(None, run.prompt_state(), exact=exact)
    if options["prompt_cache_all"] or name is not None or (interrupted and session.tokens):
        try:
            session.keep(name, run.state(), exact=exact, onto=options["prompt_cache"])
        except PromptCacheError as exc:
            return exc
    return None
