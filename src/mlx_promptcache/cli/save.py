"""`save`: compute a prompt and keep its state under a name."""

from __future__ import annotations

from typing import Any

import click

from mlx_promptcache.cli import output
from mlx_promptcache.cli.choices import ModelChoice, PromptChoice, RemoteChoice, take
from mlx_promptcache.cli.names import complete_names
from mlx_promptcache.cli.options import (
    examples,
    max_size_option,
    model_options,
    output_options,
    prompt_options,
    remote_options,
    shard_option,
)
from mlx_promptcache.names import check_name


@click.command(
    help=__doc__,
    epilog=examples(
        "save shots --prompt-file few-shot.txt",
        "save shots --prompt-file other.txt --force",
        "save talk --messages chat.json --json",
    ),
)
@click.argument("name", shell_complete=complete_names)
@prompt_options
@model_options
@click.option("--exact", is_flag=True, help="Reuse only the very bits of a run without the cache.")
@click.option("--force", is_flag=True, help="Let the name stand for this state from now on.")
@shard_option
@max_size_option
@remote_options
@output_options
def command(**options: Any) -> int:
    """Parse, check, run."""
    choice, prompts = take(ModelChoice, options), take(PromptChoice, options)
    name: str = check_name(options["name"])
    remote = take(RemoteChoice, options)
    prompts.check_shared(choice.ranks)

    from mlx_promptcache.cli.prompts import origin_of
    from mlx_promptcache.cli.session import Interrupted, Session
    from mlx_promptcache.sampling import Sampling

    runner = choice.runner(max_bytes=options["max_size"], saves=True)
    session = Session(runner, as_json=options["as_json"], quiet=options["quiet"], seed=0)
    cache = runner.needed_cache
    remote.attach(cache)
    prompt = runner.prompter.beginning(origin_of(prompts, runner.prompter)[0])
    if not options["force"] and runner.ranks is None:  # before it is computed, which takes long
        cache.check_free(name, prompt.tokens)
    with session.interrupt:
        try:
            with session.progress() as progress:
                # A key of its own for each save would make another state of each.
                sampling = Sampling(seed=0)
                run = runner.start(
                    prompt, exact=options["exact"], sampling=sampling, progress=progress
                )
        except Interrupted:
            partial = runner.run_in_progress
            if partial is not None and partial.prefilled_tokens:
                session.keep(None, partial.state())
            session.end_together()
            output.error("interrupted: what was computed is kept, without a name")
            return 130
        state = run.state()
        saved = cache.save(name, state, replace=options["force"], exact=options["exact"])
    session.remember()
    answer = {
        **output.saved(saved),
        "tokens": state.n_past,
        "cached_tokens": run.cached_tokens,
        "prefilled_tokens": run.prefilled_tokens,
        "prefill_seconds": run.prefill_seconds,
        "raw_bytes": state.nbytes,
    }
    if options["as_json"]:
        output.print_json(answer)
    else:
        click.echo(
            f"{name}: {state.n_past} tokens ({run.prefilled_tokens} computed in "
            f"{run.prefill_seconds:.1f} s), {output.size(saved.bytes_written)} written of "
            f"{output.size(state.nbytes)} in memory"
        )
    session.finish_sending(name)
    return 0
