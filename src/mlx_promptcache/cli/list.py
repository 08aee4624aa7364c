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
from mlx_promptcache.cli.options import ModelChoice, examples, model_options, output_options, take
from mlx_promptcache.errors import ForeignStore
from mlx_promptcache.facts import memo_of
from mlx_promptcache.prefixes import join, tree_of
from mlx_promptcache.store import Store

if TYPE_CHECKING:
    from collections.abc import Iterator

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
    if options["everywhere"]:
        found = [(store, None) for store in _known(choice)]
    else:
        store = choice.store()
        found = [(store, choice.fingerprint())]  # type: ignore[list-item]
    entries: list[dict[str, Any]] = []
    trees: list[tuple[Store, list[Branch]]] = []
    total = blocks = 0
    written: Counter[str] = Counter()
    for store, fingerprint in found:
        with store.shared():
            catalog = Catalog(store, fingerprint, memo_of(store))
            where = {"store": str(store.directory)} if options["everywhere"] else {}
            shown = catalog.entries()
            if options["as_tree"]:
                branches, shown = tree_of(catalog.facts, shown)
                join(branches)
                trees.append((store, branches))
            entries += [entry_json(entry) | where for entry in shown]
            blocks += len(catalog.facts.blocks)
            total += catalog.facts.total_bytes
            written.update(store.written_by_day())
            catalog.facts.keep()
    if options["as_tree"]:
        told = {"total_bytes": total, "blocks": blocks}
        _show_trees(trees, entries, told, as_json=options["as_json"])
    elif options["as_json"]:
        output.print_json({"entries": entries, "total_bytes": total, "blocks": blocks})
    else:
        _print(entries, total, blocks)
        if written:
            click.echo(_wear(written))
    return 0


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


def _known(choice: ModelChoice) -> Iterator[Store]:
    """The stores that this user has written to, without those that are another user's by now."""
    for directory in places.known_stores():
        store = Store(directory, allow_foreign=choice.allow_foreign_store)
        try:
            store.allow()
        except ForeignStore as exc:
            log.warning("%s", exc)
        else:
            yield store


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
