"""What a person types, or a pipe says: entries of one line or of several."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any

from mlx_promptcache.errors import PromptError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    ReadLine = Callable[[str], str | None]  # a prompt to a line without its end; None at the end

PROMPT, MORE = "> ", ". "
QUOTES = '"""'
ON = "\\"


def entry(read_line: ReadLine) -> str | None:
    """One entry: a line, lines that end with a backslash and the one after, or a block between
    triple quotes. None where there is nothing more; what was begun counts as ended there.
    """
    line = read_line(PROMPT)
    if line is None:
        return None
    if line.lstrip().startswith(QUOTES):
        return _block(line.lstrip()[len(QUOTES) :], read_line)
    lines = []
    while line is not None and line.endswith(ON):
        lines.append(line[: -len(ON)])
        line = read_line(MORE)
    return "\n".join([*lines, line or ""])


def _block(line: str | None, read_line: ReadLine) -> str:
    lines = []
    while line is not None and not line.rstrip().endswith(QUOTES):
        lines.append(line)
        line = read_line(MORE)
    last = "" if line is None else line.rstrip()[: -len(QUOTES)]
    return "\n".join([*lines, last]).strip("\n")


class Lines:
    """Entries from standard input: with line editing on a terminal, as they are from a pipe.

    The history of a terminal is in memory only: no prompt is written to a file of its own.
    """

    def __init__(self, *, interactive: bool) -> None:
        self.interactive = interactive
        self._readline = _readline() if interactive else None

    def remember(self, texts: Iterable[str]) -> None:
        """Let the arrow keys find these."""
        if self._readline is not None:
            for text in texts:
                self._readline.add_history(text)

    def read(self, typed: str = "") -> str | None:
        """The next entry; None at the end. On a terminal with `typed` in its first line already.

        Raises:
            PromptError: it is not UTF-8 text.
            KeyboardInterrupt: Ctrl-C.
        """
        try:
            with self._typing(typed):
                found = entry(self._typed if self.interactive else _piped)
        except UnicodeDecodeError as exc:
            raise PromptError("what was typed is not UTF-8 text") from exc
        if found and found.strip():
            self.remember([found])
        return found

    @contextlib.contextmanager
    def _typing(self, text: str) -> Any:
        if self._readline is None or not text:
            yield
            return
        readline = self._readline

        def begin() -> None:
            readline.insert_text(text)
            readline.set_startup_hook(None)  # for the first line only

        readline.set_startup_hook(begin)
        try:
            yield
        finally:
            readline.set_startup_hook(None)

    @staticmethod
    def _typed(prompt: str) -> str | None:
        try:
            return input(prompt)
        except EOFError:
            return None


def _piped(prompt: str) -> str | None:  # noqa: ARG001 - nobody looks at it
    line = sys.stdin.buffer.readline()
    return line.decode().rstrip("\r\n") if line else None


def _readline() -> Any:
    """The standard library's line editing; None where Python was built without it."""
    try:
        import readline
    except ImportError:
        return None
    with contextlib.suppress(AttributeError):  # other line editors under its name
        readline.set_auto_history(False)  # an entry of several lines is one
    return readline
