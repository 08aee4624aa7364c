"""`match`: say how much of a prompt would be reused, from where, and why not more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from mlx_promptcache import models
from mlx_promptcache.cli import output
from mlx_promptcache.cli.choices import ModelChoice, PromptChoice, take
from mlx_promptcache.cli.options import examples, model_options, output_options, prompt_options

if TYPE_CHECKING:
    from mlx_promptcache.cache import PromptCache
    from mlx_promptcache.match import Match
    from mlx_promptcache.prompt import Prompt

BEFORE, AFTER = 8, 8  # tokens that are shown around the place where a prompt leaves what is stored


@click.command(
    help=__doc__,
    epilog=examples(
        'match -p "Why is the sky blue?"',
        'match --prefix-file few-shot.txt -p "Sentence: ..." --json',
    ),
)
@prompt_options
@model_options
@click.option("--exact", is_flag=True, help="As a run with --exact would.")
@output_options
def command(**options: Any) -> int:
    """Parse, look, tell. Loads no weights, and writes nothing."""
    choice, prompts = take(ModelChoice, options), take(PromptChoice, options)
    path = choice.path(download=False)
    models.config(path)  # whether there is a model at all
    choice.store(read_only=True)

    from mlx_promptcache.cli.prompts import prompt_of
    from mlx_promptcache.prompt import Prompter

    cache = _cache(choice)
    tokenizer = _tokenizer(cache, choice)
    prompt = prompt_of(prompts, Prompter(tokenizer))
    match = _match(cache, choice, prompt, exact=options["exact"])
    leaves = match.stored if match.stored < len(prompt.tokens) else None
    answer = {
        "prompt_tokens": len(prompt.tokens),
        "cached_tokens": match.position,
        "stored_tokens": match.stored,
        "hit": "exact" if match.exact else "prefix" if match.position else "none",
        "source": match.source,
        "reason": match.reason,
        "differs_at": leaves,
        "text": None if leaves is None else _around(tokenizer, prompt, leaves),
    }
    if options["as_json"]:
        output.print_json(answer)
    else:
        _print(answer)
    return 0


def _cache(choice: ModelChoice) -> PromptCache:
    from mlx_promptcache import places
    from mlx_promptcache.cache import PromptCache

    return PromptCache(
        places.store_directory(choice.path(download=False), choice.cache_dir),
        choice.certain_fingerprint(),
        kv=choice.kv,
        read_only=True,
        allow_foreign=choice.allow_foreign_store,
    )


def _tokenizer(cache: PromptCache, choice: ModelChoice) -> Any:
    """The tokenizer that is kept, or the model's own; without its weights."""
    path = choice.path(download=False)

    def whole() -> Any:
        from mlx_promptcache.checkpoint import load_tokenizer

        return load_tokenizer(path, models.config(path))

    return cache.tokenizers.tokenizer(path, whole, keeps=False)


def _match(cache: PromptCache, choice: ModelChoice, prompt: Prompt, *, exact: bool) -> Match:
    from mlx_promptcache import arithmetic
    from mlx_promptcache.passes import Plan
    from mlx_promptcache.runner import PREFILL_STEP

    plain = None if exact else cache.explain(prompt.tokens)
    if plain is not None and (plain.position or not plain.stored or choice.max_kv_size is None):
        return plain
    # Windows that keep their first rows are reused as with --exact always.
    length, boundaries = len(prompt.tokens), prompt.boundaries
    plan = Plan(arithmetic.lineage(), length, PREFILL_STEP, boundaries)
    return cache.explain(prompt.tokens, plan=plan)


def _around(tokenizer: Any, prompt: Prompt, at: int) -> list[str]:
    """The user's own text before and after a token, for a person to see where that is."""
    tokens = list(prompt.tokens)
    return [
        str(tokenizer.decode(part))
        for part in (tokens[max(0, at - BEFORE) : at], tokens[at : at + AFTER])
    ]


def _print(answer: dict[str, Any]) -> None:
    source = f", from {answer['source']}" if answer["source"] else ""
    whole = ", and no pass of the model is needed" if answer["hit"] == "exact" else ""
    click.echo(
        output.printable(
            f"{answer['cached_tokens']:,} of {answer['prompt_tokens']:,} tokens would be "
            f"reused{source}{whole}"
        )
    )
    if answer["reason"] is None:
        return
    where = ""
    if answer["text"] is not None and answer["stored_tokens"]:
        before, after = answer["text"]
        where = f" (after {before!r}, at {after!r})"
    click.echo(output.printable(f"why not more: {answer['reason']}{where}"))
