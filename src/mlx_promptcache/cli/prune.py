"""`prune`: make the store fit its budget, and drop what crashes left behind."""

from __future__ import annotations

from typing import Any

import click

from mlx_promptcache import room
from mlx_promptcache.budget import Budget
from mlx_promptcache.cli import output
from mlx_promptcache.cli.choices import ModelChoice, take
from mlx_promptcache.cli.options import examples, max_size_option, model_options, output_options
from mlx_promptcache.deletion import Deletion, execute


@click.command(
    help=__doc__,
    epilog=examples(
        "prune",
        "prune --max-size 5GB --dry-run",
    ),
)
@model_options
@max_size_option
@click.option("--dry-run", is_flag=True, help="Show the plan, delete nothing.")
@output_options
def command(**options: Any) -> int:
    """Parse, plan, delete."""
    store, budget = take(ModelChoice, options).store(), Budget.chosen(options["max_size"])
    dry_run = options["dry_run"]
    if not dry_run:
        store.check_writable()
    if dry_run or not store.check():
        with store.shared():
            taken, plan = store.taken(), room.plan_prune(store, budget)
            freed = plan.freed_bytes
    else:
        looked = room.look(store)
        with store.exclusive():
            taken, plan = store.taken(), room.plan_prune(store, budget, looked)
            freed = execute(store, plan)
            store.uses.shorten()
    limit, left = room.limit(store, budget, taken), taken - plan.freed_on_disk
    if options["as_json"]:
        answer = {"freed_bytes": freed, "taken_bytes": left, "max_bytes": limit}
        rest = {"written_bytes": store.uses.written_by_day(), "dry_run": dry_run}
        output.print_json(plan_json(plan) | answer | rest)
        return 0
    click.echo(output.plan(plan, dry_run=dry_run))
    what = "would take" if dry_run else "takes"
    click.echo(f"the store {what} {output.size(left)} of {output.size(limit)}")
    if left > limit:
        click.echo("the rest has names, or is needed by what has: `clear` deletes it")
    return 0


def plan_json(plan: Deletion) -> dict[str, Any]:
    """What a plan deletes, as JSON: names and snapshots' ids, and how many files of other kinds."""
    return {
        "removed": output.removed(plan),
        "blocks": len(plan.blocks),
        "tokenizers": len(plan.tokenizers),
        "leftovers": len(plan.leftovers),
    }
