"""`show`: show everything about one stored state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from mlx_promptcache import headers
from mlx_promptcache.catalog import Catalog, find
from mlx_promptcache.cli import output
from mlx_promptcache.cli.choices import ModelChoice, take
from mlx_promptcache.cli.list import entry_json
from mlx_promptcache.cli.names import complete_names
from mlx_promptcache.cli.options import examples, model_options, output_options
from mlx_promptcache.errors import PromptCacheError
from mlx_promptcache.facts import memo_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlx_promptcache.container import Header
    from mlx_promptcache.fingerprint import Fingerprint
    from mlx_promptcache.store import Store


@click.command(
    help=__doc__,
    epilog=examples(
        "show shots",
        "show shots --text",
        "show shots --tokens --json",
    ),
)
@click.argument("name", shell_complete=complete_names)
@model_options
@click.option("--tokens", "with_tokens", is_flag=True, help="Print the token ids alone.")
@click.option("--text", "with_text", is_flag=True, help="Print the prompt's text alone.")
@output_options
def command(**options: Any) -> int:
    """Parse, look, print."""
    choice = take(ModelChoice, options)
    store = choice.store()
    with store.shared():
        stem, header = find(store, options["name"])
        mine = choice.fingerprint()
        found = Catalog(store, mine, memo_of(store)).entries([stem])
        entry = next((e for e in found if e.name == options["name"]), found[0])
        tokens = headers.tokens_of(store, header) if options["with_tokens"] else []
        arrays = _arrays(store, header)
    origin = header.content["origin"]
    answer = entry_json(entry) | {
        "reason": entry.reason or _why_unused(mine, header),
        "fingerprint": dict(headers.fingerprint_parts(header)),
        "versions": _noted(header, "versions", dict),
        "boundaries": _noted(header, "boundaries", list),
        "sampling": header.content["sampling"],
        "text": origin.get("text"),
        "messages": origin.get("messages"),
        "system": origin.get("system"),
        "template": origin.get("template"),
        "blocks": len(header.content["refs"]),
        "arrays": arrays,
    }
    if options["as_json"]:
        output.print_json(answer | ({"token_ids": tokens} if options["with_tokens"] else {}))
    elif options["with_tokens"]:
        click.echo(" ".join(map(str, tokens)))
    elif options["with_text"]:
        click.echo(_text(origin))
    else:
        _print(answer)
    return 0


def _why_unused(mine: Fingerprint | None, header: Header) -> str | None:
    """Why runs with these options do not use a state that is sound."""
    if mine is None or header.content["fingerprint"] == mine.digest:
        return None
    why = mine.explain(headers.fingerprint_parts(header))
    return f"it was made with {why}: runs with the options that it was made with use it"


def _noted(header: Header, name: str, kind: type[Any]) -> Any:
    """What the notes say, which nothing depends on: nothing where it makes no sense."""
    value = header.notes.get(name)
    return value if isinstance(value, kind) else None


def _arrays(store: Store, snapshot: Header) -> list[dict[str, Any]]:
    """What arrays the state has: those of its first block for one token, and the snapshot's own."""
    found: list[dict[str, Any]] = []
    for stem, _, _, _ in snapshot.content["refs"][:1]:
        try:
            block = headers.block_header(store, stem)
        except PromptCacheError:
            continue
        for label, entry in block.entries.items():
            layers = block.content["stacks"][label]
            shape = [*entry.shape[1:3], "tokens", *entry.shape[4:]]
            found.append(
                {"name": label, "layers": len(layers), "dtype": entry.dtype, "shape": shape}
            )
    for name, entry in snapshot.entries.items():
        found.append({"name": name, "layers": 1, "dtype": entry.dtype, "shape": list(entry.shape)})
    return found


def _text(origin: dict[str, Any]) -> str:
    text = headers.text_of(origin)
    return "(this state was made from tokens: no text is known)" if text is None else text


def _print(answer: dict[str, Any]) -> None:
    click.echo("\n".join(map(output.printable, _lines(answer))))


def _lines(answer: dict[str, Any]) -> Iterator[str]:
    yield f"{answer['name'] or '-'}  {answer['snapshot']}  {answer['status']}"
    if answer["reason"]:
        yield f"  reason      {answer['reason']}"
    yield f"  tokens      {answer['tokens']} in {answer['blocks']} blocks"
    yield (
        f"  on disk     {output.size(answer['bytes'])} own, {output.size(answer['shared_bytes'])} "
        f"shared; {output.size(answer['raw_bytes'])} in memory"
    )
    used = f"last used {output.age(answer['last_used'])} ago, {answer['hits']} hits"
    yield f"  made        {output.age(answer['created'])} ago, {used}"
    yield f"  boundaries  {', '.join(map(str, answer['boundaries'] or [])) or '-'}"
    for title in ("fingerprint", "versions", "sampling"):
        yield f"  {title}"
        for name, value in (answer[title] or {}).items():
            yield f"    {name}: {value}"
    yield "  arrays"
    for row in answer["arrays"]:
        yield f"    {row['layers']:4d} x {row['name']}: {row['dtype']} {row['shape']}"
    text = _text(answer)
    shown = text if len(text) <= 200 else f"{text[:100]} ... {text[-100:]}"
    yield f"  text        {shown!r}"
