"""`list`: list the stored states of a model, newest first."""

from __future__ import annotations

import logging
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import click

from mlx_promptcache import places
from mlx_promptcache.catalog import Catalog, Entry
from mlx_promptcache.cli import drawing, output
from mlx_promptcache.cli.choices import ModelChoice, take
from mlx_promptcache.cli.options import examples, model_options, output_options
from mlx_promptcache.errors import PromptCacheError
from mlx_promptcache.facts import memo_of
from mlx_promptcache.prefixes import join, tree_of
from mlx_promptcache.store import Store

if TYPE_CHECKING:
    from mlx_promptcache.fingerprint import Fingerprint
    from mlx_promptcache.prefixes import Branch

log = logging.getLogger("mlx_promptcache")


@click.command(
    help=__doc__,
    epilog=examples(
        "list",
        "list --all --json",
    ),
)
@model_options
@click.option("--all", "everywhere", is_flag=True, help="Every store that you have written to.")
@click.option("--tree", "as_tree", is_flag=True, help="Draw which prefixes they share.")
@output_options
def command(**options: Any) -> int:
    """Parse, look, print."""
    choice = take(ModelChoice, options)
    shown = Shown(as_tree=options["as_tree"])
    if options["everywhere"]:
        for directory in places.known_stores():
            store = Store(directory, allow_foreign=choice.allow_foreign_store)
            try:
                shown.add(store, None, {"store": str(directory)})
            except (
                PromptCacheError
            ) as exc:  # another user's by now, or not to be read: the others are
                log.warning("%s", exc)
    else:
        shown.add(choice.store(), choice.fingerprint(), {})
    told = {"total_bytes": shown.total_bytes, "blocks": shown.blocks}
    if options["as_tree"]:
        _show_trees(shown.trees, shown.entries, told, as_json=options["as_json"])
    elif options["as_json"]:
        output.print_json({"entries": shown.entries, **told})
    else:
        _print(shown.entries, shown.total_bytes, shown.blocks)
        if shown.written:
            click.echo(_wear(shown.written))
    return 0


class Shown:
    """What is shown of some stores: their states, or what is no part of a tree."""

    def __init__(self, *, as_tree: bool) -> None:
        self._as_tree = as_tree
        self.entries: list[dict[str, Any]] = []
        self.trees: list[tuple[Store, list[Branch]]] = []
        self.total_bytes = self.blocks = 0
        self.written: Counter[str] = Counter()

    def add(self, store: Store, fingerprint: Fingerprint | None, where: dict[str, str]) -> None:
        """Add all of a store. `where` goes to each of its states.

        Raises:
            StoreError, CacheLocked: the store cannot be read; nothing of it is shown.
        """
        store.allow()
        with store.shared():
            catalog = Catalog(store, fingerprint, memo_of(store))
            entries, branches = catalog.entries(), None
            if self._as_tree:
                branches, entries = tree_of(catalog.facts, entries)
                join(branches)
            blocks, total = len(catalog.facts.blocks), catalog.facts.total_bytes
            self.written.update(store.uses.written_by_day())
            catalog.facts.keep()
        self.entries += [entry_json(entry) | where for entry in entries]
        self.trees += [] if branches is None else [(store, branches)]
        self.blocks += blocks
        self.total_bytes += total


def _show_trees(
    trees: list[tuple[Store, list[Branch]]],
    others: list[dict[str, Any]],
    told: dict[str, int],
    *,
    as_json: bool,
) -> None:
    """Show trees, and the states that have no place in one."""
    if as_json:
        nested = [{"store": str(s.directory), "branches": drawing.to_json(b)} for s, b in trees]
        output.print_json({"trees": nested, "others": others, **told})
        return
    for store, branches in trees:
        if len(trees) > 1:
            click.echo(output.printable(f"{store.directory}:"))
        for line in drawing.lines(branches):
            click.echo(output.printable(line))
    for entry in others:
        name = entry["name"] or entry["snapshot"]
        click.echo(output.printable(f"{name}: {entry['status']}: {entry['reason']}"))
    if not any(branches for _, branches in trees) and not others:
        click.echo("nothing is stored")


def entry_json(entry: Entry) -> dict[str, Any]:
    """One stored state as JSON."""
    return {
        "name": entry.name,
        "snapshot": entry.snapshot,
        "tokens": entry.tokens,
        "bytes": entry.bytes,
        "shared_bytes": entry.shared_bytes,
        "raw_bytes": entry.raw_bytes,
        "created": entry.created,
        "last_used": entry.last_used,
        "hits": entry.hits,
        "status": entry.status,
        "reason": entry.reason,
    }


def _wear(written: Counter[str]) -> str:
    """How much was written to the drive, for people."""
    today = time.strftime("%Y-%m-%d", time.gmtime())
    mean = sum(written.values()) / len(written)
    return (
        f"written: {output.size(written[today])} today, "
        f"{output.size(mean)} a day on {len(written)} days of use"
    )


def _print(entries: list[dict[str, Any]], total: int, blocks: int) -> None:
    if not entries:
        click.echo("nothing is stored")
        return
    heads = ["name", "snapshot", "tokens", "own", "shared", "age", "used", "hits", "status"]
    rows = [
        [
            e["name"] or "-",
            e["snapshot"] or "-",
            str(e["tokens"]),
            output.size(e["bytes"]),
            output.size(e["shared_bytes"]),
            output.age(e["created"]),
            output.age(e["last_used"]),
            str(e["hits"]),
            e["status"],
        ]
        for e in entries
    ]
    output.table(heads, rows)
    click.echo(f"{len(entries)} states, {blocks} blocks, {output.size(total)} in all")
    for reason in dict.fromkeys(f"{e['status']}: {e['reason']}" for e in entries if e["reason"]):
        click.echo(output.printable(reason))
