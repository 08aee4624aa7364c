"""`export`: write a stored state to a file of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from mlx_promptcache import catalog, exporter
from mlx_promptcache.cli import output
from mlx_promptcache.cli.choices import ModelChoice, take
from mlx_promptcache.cli.options import (
    OWN_FORMAT,
    examples,
    file_format_option,
    model_options,
    output_options,
)
from mlx_promptcache.tree import id_of

STANDARD = "-"


@click.command(
    help=__doc__,
    epilog=examples(
        "export shots shots.safetensors",
        "export shots shots.safetensors --format mlx-lm --force",
    ),
)
@click.argument("name")
@click.argument("file")
@file_format_option
@model_options
@click.option("--force", is_flag=True, help="Replace the file, if there is one.")
@output_options
def command(**options: Any) -> int:
    """Parse, write, tell."""
    choice, path = take(ModelChoice, options), _path(options["file"])
    if not options["force"]:
        exporter.check_free(path)
    exported = _exported(choice, path, options)
    answer = {
        "name": exported.name,
        "snapshot": exported.snapshot,
        "file": str(path),
        "format": options["file_format"],
        "tokens": exported.tokens,
        "blocks": exported.blocks,
        "bytes": exported.bytes,
    }
    if options["as_json"]:
        output.print_json(answer)
    else:
        size = output.size(exported.bytes)
        click.echo(output.printable(f"{path}: {exported.tokens} tokens, {size}"))
    return 0


def _exported(choice: ModelChoice, path: Path, options: dict[str, Any]) -> exporter.Exported:
    name, force = options["name"], options["force"]
    store = choice.store()
    if options["file_format"] == OWN_FORMAT:
        return exporter.export(store, name, path, replace_file=force)
    stem = catalog.find(store, name)[0]  # before the model, which takes long
    from mlx_promptcache.handover import hand_over

    model = choice.model or str(choice.path())
    found = hand_over(choice.runner(read_only=True), name, path, model, replace_file=force)
    named = exporter.name_of(store, name)
    return replace(found, name=named, snapshot=id_of(stem))


def _path(file: str) -> Path:
    if file == STANDARD:
        raise click.UsageError("a state is written to a file, not to standard output")
    return Path(file).expanduser()
