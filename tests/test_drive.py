"""A drive after a power cut: what was synced is there, and anything else may be."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from drive import Drive, Files
from shim import Done

if TYPE_CHECKING:
    from pathlib import Path

ALL = 10_000


def outcomes(
    directory: Path, *calls: tuple[str, str] | tuple[str, str, str | bytes]
) -> list[Files]:
    """Every store that a power cut after these calls may leave, without its directories."""
    power = Drive(directory)
    for function, path, *more in calls:
        other = more[0] if more else None
        second = f"{directory}/{other}" if isinstance(other, str) else other
        power.do(Done(function, f"{directory}/{path}", second))
    found: list[Files] = []
    for fate in power.fates(random.Random(1), ALL, 0):
        files: Files = {path: data for path, data in power.after(fate).items() if data is not None}
        if files not in found:
            found.append(files)
    return found


def test_what_was_there_before_stays(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").write_bytes(b"data")
    assert outcomes(tmp_path, ("open", "a/old"), ("stat", "a")) == [{"a/old": b"data"}]


def test_bytes_that_were_not_synced_may_be_lost_in_part_or_zeros(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"")
    found = outcomes(tmp_path, ("create", "f"), ("write", "f", b"ab"), ("write", "f", b"cd"))
    assert sorted(str(files["f"]) for files in found) == sorted(
        str(data) for data in (b"", b"ab", b"abcd", bytes(4))
    )
    synced = (("write", "f", b"ab"), ("fsync", "f"), ("write", "f", b"cd"))
    found = outcomes(tmp_path, *synced)
    assert {files["f"] for files in found} == {b"ab", b"abc", b"abcd", b"ab\0\0"}


def test_a_name_that_was_not_synced_may_be_missing_though_its_bytes_are_not(tmp_path: Path) -> None:
    calls = (("create", "f"), ("write", "f", b"ab"), ("fsync", "f"))
    assert outcomes(tmp_path, *calls) == [{"f": b"ab"}, {}]
    assert outcomes(tmp_path, *calls, ("fsync", "")) == [{"f": b"ab"}]


def test_a_file_is_lost_with_a_directory_that_has_no_name_yet(tmp_path: Path) -> None:
    calls = (("mkdir", "a"), ("create", "a/f"), ("fsync", "a/f"), ("fsync", "a"))
    assert outcomes(tmp_path, *calls) == [{"a/f": b""}, {}]
    assert outcomes(tmp_path, *calls, ("fsync", "")) == [{"a/f": b""}]


def test_changes_to_names_may_be_missing_in_any_order(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(b"x")
    found = outcomes(tmp_path, ("link", "t", "f"), ("unlink", "t"))
    assert sorted(map(sorted, found)) == [[], ["f"], ["f", "t"], ["t"]]


def test_a_name_is_replaced_at_once_or_not_at_all(tmp_path: Path) -> None:
    for name in ("old", "new"):
        (tmp_path / name).write_bytes(name.encode())
    found = outcomes(tmp_path, ("replace", "new", "old"))
    assert found == [{"old": b"new"}, {"new": b"new", "old": b"old"}]


def test_too_many_fates_are_tried_one_by_one_two_by_two_and_drawn(tmp_path: Path) -> None:
    power = Drive(tmp_path)
    for number in range(12):
        power.do(Done("create", f"{tmp_path}/{number}"))
    sizes = [len(fate) for fate in power.fates(random.Random(1), 100, 5)]
    assert len(sizes) == 2 + 12 + 12 + 12 * 11 // 2 + 5
    assert (sizes.count(0), sizes.count(1), sizes.count(2)) == (1, 12, 66)
    assert (sizes.count(12), sizes.count(11)) == (1, 12)
    assert len(list(power.fates(random.Random(1), 5000, 0))) == 1 << 12
