"""Answers as they come: as plain text, or as Markdown on a terminal."""

from __future__ import annotations

import sys
import time
from typing import Protocol

import click
from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown

REFRESH_SECONDS = 0.06
FENCES = ("```", "~~~")


class Display(Protocol):
    """Shows one answer."""

    def add(self, text: str) -> None:
        """Show more of it."""

    def finish(self) -> None:
        """Show all of it, and end its line."""


class Nothing:
    """Shows nothing."""

    def add(self, text: str) -> None:
        """Leave it."""

    def finish(self) -> None:
        """Leave it."""


class Plain:
    """Shows the very text."""

    def add(self, text: str) -> None:
        """Print it, at once."""
        if text:
            click.echo(text, nl=False)
            sys.stdout.flush()

    def finish(self) -> None:
        """End the line."""
        click.echo()


class Rendered:
    """Shows Markdown: blocks that have come to their end stay, the last one is drawn anew as it
    grows, the end of it where it is higher than the terminal.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._live = Live(
            console=self._console, auto_refresh=False, transient=True, vertical_overflow="crop"
        )
        self._rest = ""
        self._drawn = 0.0
        self._any = False

    def add(self, text: str) -> None:
        """Render more."""
        self._live.start()
        done, self._rest = split_blocks(self._rest + text)
        if done:
            self._live.update("", refresh=True)
            self._show(done)
        if time.monotonic() - self._drawn >= REFRESH_SECONDS:
            height = max(1, self._console.height - 2)
            self._live.update(Markdown("\n".join(self._rest.splitlines()[-height:])), refresh=True)
            self._drawn = time.monotonic()

    def finish(self) -> None:
        """Render what is left."""
        self._live.update("", refresh=self._live.is_started)
        self._live.stop()
        if self._rest.strip():
            self._show(self._rest)
        self._rest = ""

    def _show(self, block: str) -> None:
        if self._any:
            self._console.print()
        self._console.print(Markdown(block))
        self._any = True


def split_blocks(text: str) -> tuple[str, str]:
    """What cannot change any more, and the rest: the last blank line outside of a fence of code
    stands between them.
    """
    fence, position, end = "", 0, 0
    for line in text.splitlines(keepends=True):
        position += len(line)
        mark = line.strip()[:3]
        if fence:
            fence = "" if mark == fence else fence
        elif mark in FENCES:
            fence = mark
        elif not line.strip() and line.endswith("\n"):
            end = position
    return text[:end].strip("\n"), text[end:]


def display(*, quiet: bool, rendered: bool) -> Display:
    """What shows an answer: nothing if `quiet`, Markdown if `rendered` and the terminal can."""
    if quiet:
        return Nothing()
    console = Console()
    if rendered and console.is_terminal and not console.is_dumb_terminal:
        return Rendered(console)
    return Plain()
