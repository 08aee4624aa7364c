"""`push`: bring stored states to a place that others share."""

from __future__ import annotations

from typing import Any

import click

from mlx_promptcache.cli import output, transfer
from mlx_promptcache.cli.choices import ModelChoice, signer, take
from mlx_promptcache.cli.options import (
    examples,
    model_options,
    output_options,
    sign_option,
    url_argument,
)


@click.command(
    help=__doc__,
    epilog=examples(
        "push s3://team/caches shots",
        "push s3://team/caches --sign team",
    ),
)
@url_argument
@click.argument("names", nargs=-1, metavar="[NAME]...")
@model_options
@click.option("--force", is_flag=True, help="Let names there stand for these states from now on.")
@sign_option
@output_options
def command(**options: Any) -> int:
    """Parse, send, tell."""
    choice, names = take(ModelChoice, options), options["names"]
    sharing = transfer.sharing(choice, options["url"], signer=signer(options["sign"]))
    with output.bar("push", quiet=options["quiet"]) as progress:
        moved = sharing.push(names, replace=options["force"], progress=progress)
    transfer.tell(moved, "sent", as_json=options["as_json"])
    return 0
