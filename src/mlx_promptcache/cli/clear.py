"""`clear`: delete stored states, and what only they use."""

from __future__ import annotations

import re
import sys
import time
from typing import Any

import click

from mlx_promptcache.catalog import DAMAGED, STALE, Catalog, Entry
from mlx_promptcache.cli import output
from mlx_promptcache.cli.choices import ModelChoice, take
from mlx_promptcache.cli.names import complete_names
from mlx_promptcache.cli.options import examples, model_options, output_options
from mlx_promptcache.deletion import Deletion, execute
from mlx_promptcache.errors import PromptCacheError
from mlx_promptcache.facts import forget, memo_of

KINDS = ("stale", "damaged", "unnamed")  # of states; with several each of them is meant
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def _duration(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:  # noqa: ARG001
    if value is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", value.strip())
    if match is None:
        raise click.BadParameter("give a number and a unit: 30d, 12h, 45m")
    return float(match[1]) * UNITS[match[2]]


@click.command(
    help=__doc__,
    epilog=examples(
        "clear shots --yes",
        "clear --unnamed --older-than 30d --dry-run",
        "clear --stale --damaged --yes",
        "clear --all --yes",
    ),
)
@click.argument("names", nargs=-1, shell_complete=complete_names)
@model_options
@click.option("--all", "everything", is_flag=True, help="Everything in the store.")
@click.option("--stale", is_flag=True, help="States that other weights made.")
@click.option("--damaged", is_flag=True, help="States that cannot be restored, and damaged files.")
@click.option(
    "--older-than",
    callback=_duration,
    metavar="30d",
    help="Of these, or of all, what was not used for so long.",
)
@click.option("--unnamed", is_flag=True, help="States without a name, and rows of none.")
@click.option("--dry-run", is_flag=True, help="Show the plan, delete nothing.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@output_options
def command(**options: Any) -> int:
    """Parse, plan, ask, delete."""
    choice = take(ModelChoice, options)
    store = choice.store()
    _check(options)
    if not options["dry_run"]:
        store.check_writable()
    fingerprint = choice.fingerprint() if options["stale"] else None
    if options["stale"] and fingerprint is None:
        raise click.UsageError("--stale needs the model: give --model")
    with store.shared():
        plan = _plan(Catalog(store, fingerprint, memo_of(store)), options)
    if not options["as_json"]:
        click.echo(output.plan(plan, dry_run=options["dry_run"]))
    done = bool(plan) and not options["dry_run"] and _agreed(options)
    freed = 0
    if done:
        with store.exclusive():
            # Others may have written since, and what is deleted does not depend on a memo.
            shown, plan = plan, _plan(Catalog(store, fingerprint), options)
            if not (options["yes"] or _is_within(plan, shown)):
                raise PromptCacheError(
                    "nothing was deleted: the store has changed since this plan was shown; "
                    "look at it again"
                )
            freed = execute(store, plan)
            if options["everything"]:
                store.clear_traces()
                forget(store)
    if options["as_json"]:
        told = done or options["dry_run"]
        output.print_json(
            {
                "removed": output.removed(plan) if told else [],
                "freed_bytes": plan.freed_bytes if options["dry_run"] else freed,
                "dry_run": options["dry_run"],
            }
        )
    elif done:
        click.echo(f"freed {output.size(freed)}")
    return 0


def _check(options: dict[str, Any]) -> None:
    chosen = options["names"] or options["older_than"] is not None
    chosen = chosen or any(options[kind] for kind in KINDS)
    if not (chosen or options["everything"]):
        raise click.UsageError("say what to delete: names, or --all, --stale, --damaged, ...")
    if chosen and options["everything"]:
        raise click.UsageError("--all takes everything: leave out what chooses, or --all")


def _plan(catalog: Catalog, options: dict[str, Any]) -> Deletion:
    doomed = catalog.named(options["names"])
    kinds, age = any(options[kind] for kind in KINDS), options["older_than"]
    if kinds or not options["names"]:
        doomed += [e for e in catalog.entries() if not kinds or _is_meant(e, options)]
    if age is not None:
        doomed = [entry for entry in doomed if time.time() - entry.last_used > age]
    return catalog.plan_clear(
        doomed,
        everything=options["everything"],
        unused=options["unnamed"] and age is None,  # nobody knows how old rows of no state are
        damaged=options["damaged"],
    )


def _is_meant(entry: Entry, options: dict[str, Any]) -> bool:
    return (
        (options["stale"] and entry.status == STALE)
        or (options["damaged"] and entry.status == DAMAGED)
        or (options["unnamed"] and entry.name is None)
    )


def _is_within(plan: Deletion, shown: Deletion) -> bool:
    """Whether a plan deletes no state that was not shown. Of a name that was given to another state
    since, that state was not.
    """
    return set(plan.names) <= set(shown.names) and set(plan.snapshots) <= set(shown.snapshots)


def _agreed(options: dict[str, Any]) -> bool:
    if options["yes"]:
        return True
    if options["as_json"] or not sys.stdin.isatty():
        raise PromptCacheError("nothing was deleted: say --yes to delete without being asked")
    return click.confirm("Delete?", default=False, err=True)
