"""`import`: take a state from a file into the store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_promptcache import importer, places
from mlx_promptcache.budget import Budget
from mlx_promptcache.cli import output
from mlx_promptcache.cli.choices import ModelChoice, PromptChoice, take
from mlx_promptcache.cli.options import (
    OWN_FORMAT,
    examples,
    file_format_option,
    max_size_option,
    model_options,
    output_options,
    prompt_options,
)
from mlx_promptcache.errors import DamagedFile
from mlx_promptcache.names import check_name
from mlx_promptcache.quarantine import Quarantine

if TYPE_CHECKING:
    from mlx_promptcache.writer import Saved


@click.command(
    help=__doc__,
    epilog=examples(
        "import shots.safetensors",
        "import shots.safetensors --name other --force",
    ),
)
@click.argument("file")
@prompt_options
@click.option("--name", metavar="NAME", help="Its name here; that in the file by default.")
@file_format_option
@model_options
@click.option("--force", is_flag=True, help="Let the name stand for this state from now on.")
@max_size_option
@output_options
def command(**options: Any) -> int:
    """Parse, check, add."""
    choice, path = take(ModelChoice, options), Path(options["file"]).expanduser()
    if options["name"] is not None:
        check_name(options["name"])
    prompts = take(PromptChoice, options)
    if options["file_format"] == OWN_FORMAT:
        if prompts.given:
            raise click.UsageError("this file has its prompt in it: give none")
        saved, tokens = _own(choice, path, options)
    else:
        saved, tokens = _mlx_lms(choice, prompts, path, options)
    if options["as_json"]:
        output.print_json(
            output.saved(saved) | {"tokens": tokens, "format": options["file_format"]}
        )
    else:
        name = saved.name or saved.snapshot
        written = output.size(saved.bytes_written)
        click.echo(output.printable(f"{name}: {tokens} tokens, {written} written"))
    return 0


def _own(choice: ModelChoice, path: Path, options: dict[str, Any]) -> tuple[Saved, int]:
    store, fingerprint = choice.store(), choice.fingerprint()
    if fingerprint is None:
        raise click.UsageError("a state is imported for a model: give --model")
    store.check_writable()
    budget, bad = Budget.chosen(options["max_size"]), Quarantine(store, read_only=False)
    name, force = options["name"], options["force"]
    try:
        added = importer.add(path, store, bad, fingerprint, budget, name=name, replace=force)
    except DamagedFile as exc:
        raise DamagedFile(f"{exc} (if mlx-lm wrote it, say --format mlx-lm)") from exc
    places.remember_store(store.directory)
    return added


def _mlx_lms(
    choice: ModelChoice, prompts: PromptChoice, path: Path, options: dict[str, Any]
) -> tuple[Saved, int]:
    if not prompts.given:
        raise click.UsageError(
            "mlx-lm's files do not have their prompt: give the one that this was made from, with "
            "--prompt-file or -p"
        )
    with importer.reading(path):  # before the model, which takes long
        importer.check_unsigned(choice.store())
    from mlx_promptcache.cli.prompts import origin_of
    from mlx_promptcache.handover import take_over

    runner = choice.runner(max_bytes=options["max_size"], saves=True)
    cache = runner.needed_cache
    state = take_over(runner, path, origin_of(prompts, runner.prompter)[0])
    saved = cache.save(options["name"], state, replace=options["force"])
    places.remember_store(cache.directory)
    return saved, state.n_past
