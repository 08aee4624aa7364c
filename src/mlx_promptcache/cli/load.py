"""`load`: restore a state, and go on generating where it stopped."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from mlx_promptcache.cli import output
from mlx_promptcache.cli.choices import ModelChoice, SamplingChoice, take
from mlx_promptcache.cli.names import complete_names
from mlx_promptcache.cli.options import (
    examples,
    max_size_option,
    model_options,
    output_options,
    sampling_options,
    shard_option,
)
from mlx_promptcache.names import check_name

if TYPE_CHECKING:
    from mlx_promptcache.runner import Runner
    from mlx_promptcache.state import State

LIKELIEST = 5


@click.command(
    help=__doc__,
    epilog=examples(
        "load talk",
        "load talk -n 100",
        "load talk -n 50 --temp 0.8 --seed 1 --save-as longer",
    ),
)
@click.argument("name", shell_complete=complete_names)
@model_options
@click.option("--prompt-cache-all", is_flag=True, help="Keep the generated tokens' state.")
@click.option(
    "--save-as", metavar="NAME", shell_complete=complete_names,
    help="Name the state at the end of the run.",
)  # fmt: skip
@sampling_options
@shard_option
@max_size_option
@output_options
def command(**options: Any) -> int:
    """Parse, check, run."""
    choice, asked = take(ModelChoice, options), take(SamplingChoice, options)
    if options["save_as"] is not None:
        check_name(options["save_as"])
    choice.stored(options["name"])  # before the model, which takes long

    from mlx_promptcache.cli.session import Session

    asked.sampling()  # what makes no sense is told before the model is loaded
    saves = options["save_as"] is not None
    runner = choice.runner(max_bytes=options["max_size"], saves=saves)
    cache = runner.needed_cache
    session = Session(runner, as_json=options["as_json"], quiet=options["quiet"], seed=asked.seed)
    began = time.perf_counter()
    state = cache.load(options["name"])
    run = runner.resume(state, asked.sampling(state.sampling, runner.tokenizer))
    run.load_seconds = time.perf_counter() - began
    likeliest = _likeliest(runner, state)
    with session.interrupt:
        if options["max_tokens"]:
            session.generate(run, options["max_tokens"], options["stop"])
            interrupted = session.finish_reason == "interrupted"
            if options["prompt_cache_all"] or options["save_as"] is not None or interrupted:
                session.keep(options["save_as"], run.state(), onto=options["name"])
    session.end_together()
    if session.broken_pipe is not None:
        raise session.broken_pipe
    if options["as_json"]:
        answer = session.answer(run) | {"source": options["name"], "next_tokens": likeliest}
        answer["seed"] = asked.seed
        output.print_json(answer)
    elif not options["max_tokens"]:
        _describe(options["name"], state, likeliest)
    return 130 if session.finish_reason == "interrupted" else 0


def _likeliest(runner: Runner, state: State) -> list[dict[str, Any]]:
    import mlx.core as mx

    if state.logits is None:
        return []
    logits = state.logits.astype(mx.float32)
    logprobs: Any = (logits - mx.logsumexp(logits)).tolist()
    best = sorted(range(len(logprobs)), key=lambda token: -logprobs[token])[:LIKELIEST]
    return [
        {"token": token, "text": runner.tokenizer.decode([token]), "logprob": logprobs[token]}
        for token in best
    ]


def _describe(name: str, state: State, likeliest: list[dict[str, Any]]) -> None:
    click.echo(f"{name}: {state.n_past} tokens, {output.size(state.nbytes)} in memory")
    click.echo(f"sampling: {state.sampling}")
    click.echo("the likeliest next tokens:")
    for row in likeliest:
        click.echo(f"  {row['logprob']:8.3f}  {row['text']!r}")
