"""Questions from a file of JSON lines, and answers to one that a later run goes on with."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_promptcache.cli import output
from mlx_promptcache.errors import PromptError

if TYPE_CHECKING:
    from collections.abc import Iterator

    Row = dict[str, Any]

NEEDED = ("index", "key")
BEGINNING = b'{"index": '  # of every answer


@dataclass(frozen=True)
class Line:
    """A line of the input. `error` says in one sentence why it is no question, if it is none."""

    index: int
    raw: bytes
    prompt: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    id: str | int | None = None
    max_tokens: int | None = None
    error: str | None = None


def lines(path: str) -> list[Line]:
    """The lines of a file, or of standard input (`-`), but for empty ones; counted from 0.

    Raises:
        PromptError: it cannot be read.
    """
    try:
        raw = sys.stdin.buffer.read() if path == "-" else Path(path).expanduser().read_bytes()
    except OSError as exc:
        raise PromptError(f"{path} cannot be read: {exc.strerror}") from exc
    return [_line(i, text) for i, text in enumerate(t for t in raw.split(b"\n") if t.strip())]


def _line(index: int, raw: bytes) -> Line:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as exc:
        return Line(index, raw, error=f"it is not JSON: {exc}")
    if not isinstance(value, dict):
        return Line(index, raw, error="it is not a JSON object")
    identity = value.get("id")
    if isinstance(identity, bool) or not isinstance(identity, (str, int, type(None))):
        return Line(index, raw, error="its id is neither a text nor a whole number")
    prompt, messages, limit = (value.get(name) for name in ("prompt", "messages", "max_tokens"))
    wrong = _wrong(prompt, messages, limit)
    if wrong is not None:
        return Line(index, raw, id=identity, error=wrong)
    chat = None if messages is None else tuple(messages)
    return Line(index, raw, prompt, chat, identity, limit)


def _wrong(prompt: Any, messages: Any, limit: Any) -> str | None:
    if (prompt is None) == (messages is None):
        return "it needs a prompt or messages, and not both"
    if prompt is not None and not isinstance(prompt, str):
        return "its prompt is not a text"
    if isinstance(prompt, str) and not _is_text(prompt):
        return "its prompt is not UTF-8 text"
    if messages is not None and not _are_messages(messages):
        return "its messages are not a list of messages, each with a role"
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        return "its max_tokens is not a whole number, 1 or more"
    return None


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can name half a character
        return False
    return True


def _are_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in value)
        and _is_text(json.dumps(value, ensure_ascii=False))
    )


class Printed:
    """Answers on standard output, in the order of the questions, each as soon as it is its turn."""

    def __init__(self, *, quiet: bool) -> None:
        self.rows: dict[int, Row] = {}
        self._next, self._quiet = 0, quiet

    def add(self, row: Row) -> None:
        """Take an answer."""
        self.rows[row["index"]] = row
        while self._next in self.rows:
            if not self._quiet:
                click.echo(_text(self.rows[self._next]))
            self._next += 1

    def close(self) -> None:
        """Nothing is left to be done."""


class Written:
    """Answers in a file, to which those are added that are missing. Others may not write to it.

    While questions are answered the file is in their order; where a run was ended before its time
    there may be answers at the end whose turn it was not. The run that completes the file puts them
    in order.
    """

    def __init__(self, path: Path) -> None:
        self.rows: dict[int, Row] = {}
        self._path = path.expanduser()
        self._order: list[int] = []
        self._waiting: dict[int, Row] = {}
        self._file = self._opened()
        self._next = 0
        try:
            self._take_what_is_there()
        except PromptError:
            self._file.close()
            raise

    def _opened(self) -> Any:
        try:
            file = self._path.open("a+b")
        except OSError as exc:
            raise PromptError(f"{self._path} cannot be written: {exc.strerror}") from exc
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise PromptError(f"somebody else is writing to {self._path}: wait for it") from None
        except OSError:  # a file system that knows no locks
            pass
        return file

    def _take_what_is_there(self) -> None:
        """Read the answers of earlier runs; cut off a last one that is not whole."""
        self._file.seek(0)
        whole = 0
        for raw in self._file.read().splitlines(keepends=True):
            row = _row(raw)
            broken_off = not raw.endswith(b"\n") and raw[: len(BEGINNING)] == BEGINNING[: len(raw)]
            if row is None and broken_off:
                break
            if row is None:
                raise PromptError(
                    f"{self._path} has lines that are no answers: choose another --output"
                )
            whole += len(raw)
            self.rows[row["index"]] = row
            self._order.append(row["index"])
            if not raw.endswith(b"\n"):  # all of it but its end
                self._file.truncate(whole)
                self._file.write(b"\n")
                whole += 1
        self._file.truncate(whole)
        self._file.flush()
        self._advance()

    def add(self, row: Row) -> None:
        """Take an answer, and write it when those before it are written."""
        self.rows[row["index"]] = self._waiting[row["index"]] = row
        self._advance()

    def _advance(self) -> None:
        while self._next in self.rows:
            row = self._waiting.pop(self._next, None)
            if row is not None:
                self._write(row)
            self._next += 1

    def _write(self, row: Row) -> None:
        try:
            self._file.write(_text(row).encode() + b"\n")
            self._file.flush()
        except OSError as exc:
            raise PromptError(f"{self._path} cannot be written: {exc.strerror}") from exc
        self._order.append(row["index"])

    def close(self) -> None:
        """Write what has waited for its turn; put the file in order if it is complete."""
        for index in sorted(self._waiting):
            self._write(self._waiting.pop(index))
        in_order = sorted(set(self._order))
        if self._order != in_order and in_order == list(range(len(in_order))):
            self._put_in_order()
        with contextlib.suppress(OSError):
            os.fsync(self._file.fileno())
        self._file.close()

    def _put_in_order(self) -> None:
        text = "".join(_text(self.rows[index]) + "\n" for index in sorted(self.rows))
        beside = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            beside.write_text(text, "utf-8")
            beside.chmod(self._path.stat().st_mode & 0o777)
            beside.replace(self._path)
        except OSError as exc:
            beside.unlink(missing_ok=True)
            raise PromptError(f"{self._path} cannot be put in order: {exc.strerror}") from exc


def _row(raw: bytes) -> Row | None:
    try:
        row = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not all(name in row for name in NEEDED):
        return None
    index = row["index"]
    return row if isinstance(index, int) and not isinstance(index, bool) and index >= 0 else None


def _text(row: Row) -> str:
    return output.json_text(row)


def rows_in_order(rows: dict[int, Row]) -> Iterator[Row]:
    """The rows, in the order of the questions."""
    return (rows[index] for index in sorted(rows))
