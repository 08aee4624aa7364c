"""`bench`: measure what the cache is worth on this machine, with this model.

Measures the time from the start of a process to its first token, for prefixes of several lengths:
computed from nothing, and with the prompt cache, of this program and of mlx-lm's own command line.
Programs take turns. Your own store is left alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from mlx_promptcache.cli import output
from mlx_promptcache.cli.choices import model_path
from mlx_promptcache.cli.options import examples, only_model_option
from mlx_promptcache.errors import StoreError

STANDARD_OUTPUT = "-"


def _lengths(
    ctx: click.Context, param: click.Parameter, value: str | None
) -> tuple[int, ...] | None:
    from mlx_promptcache import benchmark

    try:
        return None if value is None else benchmark.lengths_of(value)
    except ValueError as exc:
        raise click.BadParameter(str(exc), ctx, param) from exc


@click.command(
    help=__doc__,
    epilog=examples(
        "bench --short",
        "bench --lengths 64,512 --runs 5 --json bench.json",
        "bench --plot bench",
    ),
)
@only_model_option
@click.option(
    "--lengths",
    callback=_lengths,
    metavar="N,N,...",
    help="Tokens of the prefixes; 64 to 4,096 by default.",
)
@click.option("--runs", type=click.IntRange(1), help="Warm runs of each; 10 by default.")
@click.option("--cold-runs", type=click.IntRange(1), help="Cold runs, which take long; 3.")
@click.option("--short", is_flag=True, help="A quick look: two lengths, three runs, one cold.")
@click.option("--seed", type=int, default=0, show_default=True, help="Chooses the words.")
@click.option(
    "--json", "json_file", metavar="[FILE]", is_flag=False, flag_value=STANDARD_OUTPUT,
    help="Print one JSON object with all samples instead, or write it to this file.",
)  # fmt: skip
@click.option("--plot", metavar="PREFIX", help="Draw them: PREFIX.svg and PREFIX.png.")
@click.option("--quiet", is_flag=True, help="Do not tell how far it is.")
def command(**options: Any) -> int:
    """Parse, measure, write."""
    from mlx_promptcache import benchmark, plots

    for name in (options["json_file"], options["plot"]):
        _check_directory(name)
    if options["plot"]:
        plots.check()  # before measuring, which takes long
    model = model_path(options["model"])
    programs, told = benchmark.programs_of(model), _teller(quiet=options["quiet"])
    report = benchmark.report(model, _settings(options), programs, told)
    if options["json_file"]:
        _write(report, options["json_file"])
    if options["plot"]:
        plots.save(plots.of_lengths(report), options["plot"])
    if options["json_file"] != STANDARD_OUTPUT:
        _print(report)
    return 0


def _check_directory(name: str | None) -> None:
    if name is not None and not Path(name).parent.is_dir():
        raise StoreError(
            f"{name} cannot be written: there is no directory {Path(name).parent}; make it first"
        )


def _settings(options: dict[str, Any]) -> Any:
    from mlx_promptcache import benchmark

    short = options["short"]
    return benchmark.Settings(
        lengths=options["lengths"] or (benchmark.SHORT if short else benchmark.LENGTHS),
        runs=options["runs"] or (3 if short else benchmark.RUNS),
        cold_runs=options["cold_runs"] or (1 if short else benchmark.COLD_RUNS),
        seed=options["seed"],
    )


def _teller(*, quiet: bool) -> Any:
    return lambda line: None if quiet else click.echo(line, err=True)


def _write(report: dict[str, Any], name: str) -> None:
    if name == STANDARD_OUTPUT:
        output.print_json(report)
    else:
        Path(name).write_text(json.dumps(report, indent=1) + "\n", "utf-8")


def _print(report: dict[str, Any]) -> None:
    from mlx_promptcache import benchmark

    machine, versions = report["machine"], report["versions"]
    click.echo(f"{machine['processor']}, {machine['cores']} cores, {machine['system']}")
    click.echo(", ".join(f"{name} {version}" for name, version in versions.items()))
    click.echo(f"{report['model']['name']}: seconds from the start of a process to its first token")
    output.table(*benchmark.table(report))
