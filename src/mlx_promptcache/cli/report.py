"""`report`: write a page about the store: what is in it, what it saved, what goes next.

The page is one HTML file that needs no network. It shows names, sizes and times, and no prompts
unless they are asked for.
"""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Any

import click

from mlx_promptcache import report
from mlx_promptcache.budget import Budget
from mlx_promptcache.cli import output
from mlx_promptcache.cli.choices import ModelChoice, take
from mlx_promptcache.cli.names import complete_files
from mlx_promptcache.cli.options import examples, max_size_option, model_options, output_options
from mlx_promptcache.errors import StoreError
from mlx_promptcache.files import write_once

STANDARD_OUTPUT = "-"
DEFAULT = "mlx-promptcache-report.html"


@click.command(
    help=__doc__,
    epilog=examples(
        "report --open",
        "report --output store.html",
        "report --json",
    ),
)
@model_options
@max_size_option
@click.option(
    "--output", "file", metavar="FILE.html", default=DEFAULT, show_default=True,
    shell_complete=complete_files,
    help="Where the page is written, in the place of an older one; - is standard output.",
)  # fmt: skip
@click.option("--open", "shown", is_flag=True, help="Open the page in the browser.")
@click.option(
    "--text", "with_text", is_flag=True, help="Show prompts, too: mind who sees the page."
)
@output_options
def command(**options: Any) -> int:
    """Parse, look, write."""
    choice = take(ModelChoice, options)
    store, budget = choice.store(), Budget.chosen(options["max_size"])
    file, shown = options["file"], options["shown"]
    if shown and (options["as_json"] or file == STANDARD_OUTPUT):
        raise click.UsageError("--open needs a file: leave out --json and --output -")
    fingerprint = choice.fingerprint()
    with store.shared():
        found = report.gather(store, budget, fingerprint, with_text=options["with_text"])
    if options["as_json"]:
        output.print_json(found)
    elif file == STANDARD_OUTPUT:
        click.echo(report.page(found), nl=False)
    else:
        path = Path(file).expanduser().absolute()
        _write(path, report.page(found))
        click.echo(output.printable(str(path)))
        if shown and not webbrowser.open(path.as_uri()):
            raise StoreError(f"no browser could be started: open {path} in one")
    return 0


def _write(path: Path, page: str) -> None:
    """Write a page that only its owner can read, whole or not at all."""
    try:
        if path.exists() and not path.is_file():  # a pipe, or a device
            path.write_text(page, "utf-8")
        elif path.exists() and path.stat().st_size and not report.is_page(path):
            raise StoreError(f"{path} is there, and no report: choose another file with --output")
        else:
            write_once(path, [page.encode()], sync=False, replace=True)
    except OSError as exc:
        raise StoreError(
            f"{path} cannot be written: {exc.strerror}; choose another file with --output"
        ) from exc
