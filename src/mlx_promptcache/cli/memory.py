"""`memory`: tell what a context takes in memory and on disk, and what fits this machine.

Nothing is computed and no weights are read: the layers are built, and their shapes tell. The model
must be on this machine; it is not downloaded.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_promptcache import compression
from mlx_promptcache.cli import output
from mlx_promptcache.cli.choices import ModelChoice, take
from mlx_promptcache.cli.options import examples, model_options, output_options, size_of
from mlx_promptcache.errors import PromptCacheError
from mlx_promptcache.fingerprint import PLAIN

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlx_promptcache.compression import Ratio
    from mlx_promptcache.memory import Context, Limit, Memory

UNKNOWN_LENGTH = 4096  # of a context, where a model does not say what it was made for
MOST_TOKENS = 1 << 24  # snapshots on the way are added up one by one
SEVERAL = 4
INTERACTIVE, LOCAL, SERVER = "interactive", "local", "server"


@click.command(
    help=__doc__,
    epilog=examples(
        "memory --context 8192",
        "memory --context 32768 --kv-bits 8 --mode server --memory 16GB",
    ),
)
@model_options
@click.option(
    "--context",
    type=click.IntRange(1, MOST_TOKENS),
    metavar="N",
    help="Tokens of a conversation; by default as many as the model was made for.",
)
@click.option(
    "--mode",
    type=click.Choice([INTERACTIVE, LOCAL, SERVER]),
    default=INTERACTIVE,
    show_default=True,
    help=f"One conversation, {SEVERAL}, or as many as fit.",
)
@click.option(
    "--memory",
    "memory_bytes",
    callback=size_of,
    metavar="16GB",
    help="How much there is for the model; by default what MLX's device has.",
)
@output_options
def command(**options: Any) -> int:
    """Parse, find out, print."""
    choice = take(ModelChoice, options)
    from mlx_promptcache import memory

    path = choice.path(download=False)
    found = memory.Memory.of(
        str(path), choice.adapter_path, kv=choice.kv, draft_model=choice.draft_model
    )
    tokens = options["context"] or found.context_length or UNKNOWN_LENGTH
    given = options["memory_bytes"]
    limit = memory.limit() if given is None else memory.Limit(given, "given")
    context = found.context(tokens)
    answer = {
        "model": str(path),
        **_context(found, context),
        **_fit(found, context, options["mode"], limit),
        "disk": _disk(found, context, choice),
    }
    if options["as_json"]:
        output.print_json(answer)
    else:
        _print(answer)
    return 0


def _context(found: Memory, context: Context) -> dict[str, Any]:
    """What one conversation takes."""
    made_for = found.context_length
    return {
        "context": context.tokens,
        "trained_context": made_for,
        "beyond_trained": made_for is not None and context.tokens > made_for,
        "prefill_step": found.prefill_step,
        "kv": str(found.kv),
        "weights_bytes": found.weights_bytes,
        "layers": [asdict(kind) for kind in context.kinds],
        "layers_bytes": context.layers_bytes,
        "most_layers_bytes": context.most_layers_bytes,
        "kept_bytes": context.kept_bytes,
        "conversation_bytes": context.bytes,
        "bytes_per_token": sum(kind.bytes_per_token for kind in context.kinds),
        "pass_bytes": found.pass_bytes(context.tokens),
    }


def _fit(found: Memory, context: Context, mode: str, limit: Limit | None) -> dict[str, Any]:
    """What all conversations take, and what fits."""
    tokens, count = context.tokens, {INTERACTIVE: 1, LOCAL: SEVERAL}.get(mode)
    most = None if limit is None else found.conversations(tokens, limit.bytes)
    count = count or most or 1
    total = found.bytes(tokens, count)
    longest = None if limit is None else found.longest(limit.bytes, 1 if mode == SERVER else count)
    return {
        "mode": mode,
        "conversations": count,
        "total_bytes": total,
        "memory_bytes": None if limit is None else limit.bytes,
        "memory_source": None if limit is None else limit.source,
        "fits": None if limit is None else total <= limit.bytes,
        "conversations_that_fit": most,
        "longest_context": longest,
        "endless": limit is not None and longest is None,
    }


def _disk(found: Memory, context: Context, choice: ModelChoice) -> dict[str, Any] | None:
    """What the state takes on disk; None if states of this model cannot be kept."""
    if context.raw_bytes is None:
        return None
    quantised = choice.kv.phase_at(context.tokens) != PLAIN
    usual = compression.usual(found.dtype, choice.kv.bits if quantised else None)
    ratio = _measured(found, context.tokens, choice) or usual
    return {
        "raw_bytes": context.raw_bytes,
        "bytes": round(context.raw_bytes * ratio.value),
        "ratio": round(ratio.value, 3),
        "ratio_source": ratio.source,
    }


def _measured(found: Memory, tokens: int, choice: ModelChoice) -> Ratio | None:
    try:
        store = choice.store(read_only=True)
    except PromptCacheError:
        return None
    return compression.of_store(store, choice.kv, found.row_bytes(tokens))


def _print(answer: dict[str, Any]) -> None:
    click.echo(f"{Path(answer['model']).name}: a context of {_sentence(answer)}")
    heads = ("layers", "number", "in memory", "a further token", "of a state")
    output.table(heads, [_row(kind) for kind in answer["layers"]])
    click.echo("\n".join(_lines(answer)))


def _sentence(answer: dict[str, Any]) -> str:
    count = answer["conversations"]
    tokens = "one token" if answer["context"] == 1 else f"{answer['context']:,} tokens"
    several = "one conversation" if count == 1 else f"{count:,} conversations"
    beyond = f"; the model was made for {answer['trained_context']:,}"
    return f"{tokens}, {several}{beyond if answer['beyond_trained'] else ''}"


def _row(kind: dict[str, Any]) -> list[str]:
    state = kind["state_bytes"]
    return [
        kind["kind"],
        f"{kind['count']:,}",
        output.size(kind["bytes"]),
        f"{kind['bytes_per_token']:,.0f} B",
        "-" if state is None else output.size(state),
    ]


def _lines(answer: dict[str, Any]) -> Iterator[str]:
    each = "" if answer["conversations"] == 1 else ", for each conversation"
    size = output.size
    yield f"weights                {size(answer['weights_bytes'])}"
    yield f"layers                 {size(answer['layers_bytes'])}{each}"
    if answer["most_layers_bytes"] > answer["layers_bytes"]:
        yield f"layers, at their most  {size(answer['most_layers_bytes'])}{each}"
    yield f"kept for the store     {size(answer['kept_bytes'])}{each}"
    count = min(answer["prefill_step"], answer["context"])
    yield f"one pass of {count:<10} {_pass(answer['pass_bytes'])}"
    yield f"in all                 {size(answer['total_bytes'])}{_of_memory(answer)}"
    yield f"on disk                {_stored(answer['disk'])}"
    yield from _fitting(answer)


def _pass(count: int | None) -> str:
    return "not known, and not counted" if count is None else f"about {output.size(count)}"


def _of_memory(answer: dict[str, Any]) -> str:
    if answer["fits"] is None:
        return ""
    fits = "fits" if answer["fits"] else "does not fit"
    source = answer["memory_source"]
    return f": {fits} the {output.size(answer['memory_bytes'])} {source}"


def _stored(disk: dict[str, Any] | None) -> str:
    if disk is None:
        return "states of this model cannot be kept"
    about, raw = output.size(disk["bytes"]), output.size(disk["raw_bytes"])
    return f"about {about} ({raw} x {disk['ratio']}, {disk['ratio_source']})"


def _fitting(answer: dict[str, Any]) -> Iterator[str]:
    if answer["memory_bytes"] is None:
        return
    yield f"conversations that fit {answer['conversations_that_fit']:,}"
    longest = "any" if answer["endless"] else f"{answer['longest_context']:,} tokens"
    made_for = answer["trained_context"]
    known = f" (the model was made for {made_for:,})" if made_for else ""
    yield f"longest that fits      {longest}{known}"
