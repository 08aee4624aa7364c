"""`pull`: bring states from a place that others share into the store."""

from __future__ import annotations

from typing import Any

import click

from mlx_promptcache import places
from mlx_promptcache.cli import output, transfer
from mlx_promptcache.cli.choices import ModelChoice, take
from mlx_promptcache.cli.options import (
    examples,
    max_size_option,
    model_options,
    output_options,
    url_argument,
)


@click.command(
    help=__doc__,
    epilog=examples(
        "pull s3://team/caches shots",
        "pull s3://team/caches",
    ),
)
@url_argument
@click.argument("names", nargs=-1, metavar="[NAME]...")
@model_options
@click.option("--force", is_flag=True, help="Let names here stand for those states from now on.")
@max_size_option
@output_options
def command(**options: Any) -> int:
    """Parse, fetch, tell."""
    choice, names = take(ModelChoice, options), options["names"]
    sharing = transfer.sharing(choice, options["url"], max_bytes=options["max_size"])
    sharing.store.check_writable()  # before anything is fetched
    with output.bar("pull", quiet=options["quiet"]) as progress:
        moved = sharing.pull(names, replace=options["force"], progress=progress)
    if moved.states:
        places.remember_store(sharing.store.directory)
    transfer.tell(moved, "fetched", as_json=options["as_json"])
    return 0
