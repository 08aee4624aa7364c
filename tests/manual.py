"""The page of all commands, made of what they say of themselves: docs/cli.md.

Run by scripts/cli, which prints the page, or writes it with `--write`. A command that is added to
`mlx_promptcache.cli.COMMANDS` is in the page when it is made again.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlx_promptcache import cli

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    Row = tuple[str, str]

DOCUMENT = Path(__file__).parent.parent / "docs" / "cli.md"
SHARED = 3  # commands that have the very same option: then it is told once, at the end
MARK = "\b\n"  # of click: begins lines that stay as they are

INTRODUCTION = """\
# Commands

What `mlx-promptcache COMMAND --help` says, in one page. Made by `scripts/cli --write`; a test
compares it with the commands.

Answers go to standard output, all else to standard error. `--json` prints one JSON object instead.
Exit codes: 0 done; 1 it cannot be done, and one sentence says why; 2 wrong usage; 3 `verify` found
damage; 130 interrupted. `python -m mlx_promptcache` is the same program.

| command | |
|---|---|
"""


def commands() -> dict[str, click.Command]:
    """All commands, by their names."""
    context = click.Context(cli.cli)
    found = {name: cli.cli.get_command(context, name) for name in cli.COMMANDS}
    return {name: command for name, command in found.items() if command is not None}


def examples(command: click.Command) -> list[str]:
    """The lines at the end of a command's help."""
    lines = (command.epilog or "").splitlines()
    return [line.strip() for line in lines if line.strip().startswith(cli.PROGRAM)]


def options(command: click.Command) -> list[Row]:
    """The options of a command as they are typed, and what they say."""
    return [_row(p) for p in command.params if isinstance(p, click.Option) and not p.hidden]


def _row(option: click.Option) -> Row:
    value = "" if option.is_flag else f" {option.metavar or _metavar(option)}"
    typed = ", ".join(f"`{name}{value}`" for name in option.opts)
    told = [option.help or ""]
    if option.show_default:
        told.append(f"(default {option.default})")
    if option.envvar:
        told.append(f"[`{option.envvar}`]")
    return typed, " ".join(told).replace("|", "\\|")


def _metavar(option: click.Option) -> str:
    kind = option.type
    if isinstance(kind, click.Choice):
        return "\\|".join(map(str, kind.choices))
    return {"integer": "N", "integer range": "N", "float": "X"}.get(kind.name, "TEXT")


def document() -> str:
    """The whole page."""
    found = commands()
    counts = Counter(row for command in found.values() for row in options(command))
    shared = {row: None for row, count in counts.items() if count >= SHARED}
    parts = [INTRODUCTION + "".join(f"| [{n}](#{n}) | {t} |\n" for n, t in cli.COMMANDS.items())]
    parts += ["\n".join(_part(name, command, shared)) for name, command in found.items()]
    parts.append("\n".join(["## Shared options", "", *_table(list(shared))]))
    return "\n".join(parts).rstrip("\n") + "\n"


def _part(name: str, command: click.Command, shared: dict[Row, None]) -> Iterator[str]:
    usage = " ".join(command.collect_usage_pieces(click.Context(command, info_name=name)))
    yield f"## {name}\n"
    yield from _paragraphs(command.help or "")
    yield f"```sh\n{cli.PROGRAM} {name} {usage.strip()}\n```\n"
    if lines := examples(command):
        yield "\n".join(["Examples:\n", "```sh", *lines, "```\n"])
    rows = options(command)
    if own := [row for row in rows if row not in shared]:
        yield from _table(own)
    if others := [typed for typed, told in rows if (typed, told) in shared]:
        yield f"And [shared options](#shared-options): {', '.join(others)}.\n"


def _paragraphs(text: str) -> Iterator[str]:
    for paragraph in text.strip("\n").split("\n\n"):
        if paragraph.startswith(MARK):
            yield f"```text\n{paragraph.removeprefix(MARK).rstrip()}\n```\n"
        else:
            yield f"{paragraph.strip()}\n"


def _table(rows: Sequence[Row]) -> list[str]:
    return ["| option | |", "|---|---|", *(f"| {typed} | {told} |" for typed, told in rows), ""]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the page, or write it."""
    parser = argparse.ArgumentParser(prog="scripts/cli", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write docs/{DOCUMENT.name}")
    if parser.parse_args(arguments).write:
        DOCUMENT.write_text(document(), "utf-8")
    else:
        print(document(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
