"""A journal: what was added is read, and nothing that is not whole."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import pytest

from mlx_promptcache import journal
from mlx_promptcache.journal import Journal

if TYPE_CHECKING:
    from pathlib import Path

ROWS = [{"a": [1, "\u00e9\n"]}, [], "text", {"b": None}]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Of a journal with some rows, each added by another object."""
    path = tmp_path / "deep" / "journal"
    for row in ROWS:
        Journal(path).append(row)
    return path


def test_rows_come_back_in_their_order(path: Path) -> None:
    assert list(Journal(path).rows()) == ROWS
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_there_are_none_where_there_is_no_journal(tmp_path: Path) -> None:
    none = Journal(tmp_path / "none")
    assert list(none.rows()) == []
    none.clear()
    none.forget()


def test_a_row_that_is_changed_or_cut_is_passed_over(path: Path) -> None:
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for position in range(len(whole)):
        data = bytearray(whole)
        data[position] ^= 1 << position % 8
        path.write_bytes(data)
        rows = list(Journal(path).rows())
        number = len(whole[: position + 1].splitlines()) - 1
        rest = [row for i, row in enumerate(ROWS) if i != number]
        joined = whole[position : position + 1] == b"\n"  # two lines are one then
        assert rows == ([r for i, r in enumerate(rest) if i != number] if joined else rest)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        count = sum(len(b"".join(lines[: i + 1])) <= length for i in range(len(lines)))
        assert list(Journal(path).rows()) == ROWS[:count]


def test_what_another_version_wrote_is_passed_over(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "__version__", "0.0.0")
    assert list(Journal(path).rows()) == []


def test_clearing_deletes_what_was_read_and_nothing_else(path: Path) -> None:
    read = Journal(path)
    assert list(read.rows()) == ROWS
    Journal(path).append("later")
    read.clear()
    assert list(read.rows()) == [*ROWS, "later"]
    read.clear()
    assert not path.exists()


def test_it_does_not_grow_without_end(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "MOST_BYTES", path.stat().st_size + 1)
    for _ in range(3):
        Journal(path).append("more")
    assert list(Journal(path).rows()) == [*ROWS, "more"]


def test_who_begins_a_journal_deletes_those_that_nobody_added_to_for_a_month(
    tmp_path: Path,
) -> None:
    names = ("old.new", "young.new", "old")
    for name in names:
        Journal(tmp_path / name).append("row")
    month = time.time() - journal.FORGOTTEN_SECONDS
    for name, when in zip(names, (month - 60, month + 60, month - 60), strict=True):
        os.utime(tmp_path / name, (when, when))
    Journal(tmp_path / "young.new").append("row")
    assert {path.name for path in tmp_path.iterdir()} == set(names)
    Journal(tmp_path / "another.new").append("row")
    assert {path.name for path in tmp_path.iterdir()} == {"young.new", "old", "another.new"}


def test_no_link_is_followed(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("")
    path.unlink()
    path.symlink_to(target)
    Journal(path).append("row")
    assert target.read_text() == ""
