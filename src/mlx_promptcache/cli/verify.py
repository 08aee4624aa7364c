"""`verify`: read every stored byte and check it. Exits with 3 if there is damage."""

from __future__ import annotations

from typing import Any

import click

from mlx_promptcache import verification
from mlx_promptcache.cli import output
from mlx_promptcache.cli.choices import ModelChoice, take
from mlx_promptcache.cli.names import complete_names
from mlx_promptcache.cli.options import examples, model_options, output_options

DAMAGE_FOUND = 3


@click.command(
    help=__doc__,
    epilog=examples(
        "verify",
        "verify shots talk",
        "verify --quarantine",
    ),
)
@click.argument("names", nargs=-1, shell_complete=complete_names)
@model_options
@click.option("--quarantine", is_flag=True, help="Move the damaged files aside.")
@click.option("--dry-run", is_flag=True, help="With --quarantine: show the plan, move nothing.")
@output_options
def command(**options: Any) -> int:
    """Parse, read, report."""
    store = take(ModelChoice, options).store()
    if options["quarantine"] and not options["dry_run"]:
        store.check_writable()  # before reading, which takes long
    with store.shared():
        report = verification.verify(store, options["names"])
    moved = 0
    if options["quarantine"] and options["dry_run"]:
        moved = sum(damage.certain for damage in report.damaged)
    elif options["quarantine"]:
        with store.exclusive():
            moved = verification.set_aside(store, report)
    if options["as_json"]:
        output.print_json(
            {
                "files": report.files,
                "bytes": report.bytes,
                "seconds": report.seconds,
                "damaged": [
                    {"kind": d.kind, "file": d.stem, "reason": d.reason} for d in report.damaged
                ],
                "quarantined": moved,
                "dry_run": options["dry_run"],
                "closed": report.closed,
            }
        )
    else:
        for damage in report.damaged:
            click.echo(f"{damage.kind}/{damage.stem}: {damage.reason}")
        found = f"{len(report.damaged)} damaged" if report.damaged else "all sound"
        done = "would be moved" if options["dry_run"] else "moved"
        aside = f", {moved} {done} aside" if moved else ""
        closed = f", {report.closed} closed to other users" if report.closed else ""
        click.echo(f"{report.files} files, {output.size(report.bytes)}: {found}{aside}{closed}")
    return DAMAGE_FOUND if report.damaged else 0
