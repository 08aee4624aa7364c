"""`prune`, `--max-size`, and what the other commands tell of what goes."""

from __future__ import annotations

import json
import os
import time
from typing import TYPE_CHECKING, Any

import pytest

from mlx_promptcache.store import BLOCKS, QUARANTINE, SNAPSHOTS
from test_cli import GREEDY, PROMPT, Program, one_line, program, tiny_model

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["program", "tiny_model"]  # fixtures

MORE = ("one", "two", "three")


def fill(program: Program) -> None:
    """A state with a name, and three that have none."""
    program("save", "mine", "-p", PROMPT)
    for word in MORE:
        program.generate("-p", f"{word} {PROMPT}")


def on_disk(directory: Path) -> int:
    return sum(
        max(p.lstat().st_size, p.lstat().st_blocks * 512)
        for p in (directory, *directory.rglob("*"))
    )


def files(directory: Path) -> set[Path]:
    return {path for path in directory.rglob("*") if path.is_file()}


def entries(program: Program) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = program("list", "--json").json["entries"]
    return found


def test_prune_leaves_what_has_a_name_and_says_what_went(program: Program) -> None:
    fill(program)
    told = program("prune", "--max-size", "0", "--json").json
    assert set(told) == {
        "removed", "blocks", "tokenizers", "leftovers", "freed_bytes", "taken_bytes", "max_bytes",
        "written_bytes", "dry_run",
    }  # fmt: skip
    assert [entry["name"] for entry in entries(program)] == ["mine"]
    assert told["taken_bytes"] > told["max_bytes"] == 0
    assert (len(told["removed"]), told["tokenizers"], told["dry_run"]) == (3, 1, False)
    again = program("prune", "--max-size", "0")
    assert again.out.splitlines()[0] == "there is nothing to delete"
    assert "the rest has names" in again.out


def test_prune_within_the_budget_deletes_nothing(program: Program) -> None:
    fill(program)
    before = files(program.directory)
    told = program("prune", "--json").json
    assert (told["removed"], told["freed_bytes"], told["max_bytes"]) == ([], 0, 20 * 10**9)
    assert files(program.directory) == before


def test_a_dry_run_shows_the_very_plan_that_runs(program: Program) -> None:
    fill(program)
    limit = str(on_disk(program.directory) * 2 // 3)
    before = files(program.directory)
    told = program("prune", "--max-size", limit, "--dry-run", "--json").json
    assert files(program.directory) == before
    assert told["freed_bytes"] > 0
    done = program("prune", "--max-size", limit, "--json").json
    assert done == told | {"dry_run": False}
    gone = before - files(program.directory)
    assert len(gone) == len(told["removed"]) + told["blocks"] + told["tokenizers"]
    assert on_disk(program.directory) <= int(limit)


def test_prune_of_a_store_that_is_not_there_makes_none(program: Program) -> None:
    assert program("prune", "--json").json["freed_bytes"] == 0
    assert not program.directory.exists()


@pytest.mark.parametrize("command", ["prune", "generate", "save", "load"])
def test_what_is_no_size_is_wrong_usage(program: Program, command: str) -> None:
    names = ["mine"] if command in {"save", "load"} else []
    ended = program(command, *names, "--max-size", "lots")
    assert ended.code == 2
    assert "'lots' is not a size such as 20GB" in ended.err


def test_generate_keeps_the_budget_and_its_answer(program: Program) -> None:
    program.generate("-p", PROMPT)
    limit = 3 * on_disk(program.directory)
    for word in MORE:
        answer = program.generate("-p", f"{word} {PROMPT}", "--max-size", str(limit))
        assert answer["saved"] is not None
        assert on_disk(program.directory) <= limit
    assert len(entries(program)) < 1 + len(MORE)
    ended = program("generate", *GREEDY, "-p", "so small " + PROMPT, "--max-size", "1kB")
    assert (ended.code, ended.out != "") == (0, True)
    assert "the prompt was not kept: it may take" in ended.err


def test_a_save_that_does_not_fit_says_what_to_do(program: Program) -> None:
    ended = program("save", "mine", "-p", PROMPT, "--max-size", "1kB")
    assert "delete states that are not needed (`clear`), or choose a larger --max-size" in one_line(
        ended
    )
    assert entries(program) == []


def test_writing_can_be_switched_off(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    program.generate("-p", PROMPT)
    before = {path: path.stat().st_mtime_ns for path in files(program.directory)}
    monkeypatch.setenv("MLX_PROMPTCACHE_READ_ONLY", "1")
    assert program.generate("-p", PROMPT)["hit"] == "exact"
    assert program.generate("-p", "other " + PROMPT)["saved"] is None
    assert "read-only" in one_line(program("save", "mine", "-p", PROMPT))
    assert {path: path.stat().st_mtime_ns for path in files(program.directory)} == before


@pytest.mark.parametrize(
    "command",
    [
        ("prune", "--max-size", "0"), ("clear", "mine", "--yes"), ("clear", "--all", "--yes"),
        ("verify", "--quarantine"), ("save", "other", "-p", PROMPT),
        ("generate", *GREEDY, "-p", PROMPT, "--save-as", "other"),
        ("load", "mine", "-n", "2", "--save-as", "other"), ("pull", "file:///nowhere"),
        ("import", "state.safetensors"), ("import", __file__, "--format", "mlx-lm", "-p", PROMPT),
    ],
)  # fmt: skip
def test_where_writing_is_off_whatever_would_delete_or_name_is_refused_at_once(
    command: tuple[str, ...], program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(program)
    block = program.store.path(BLOCKS, program.store.stems(BLOCKS)[-1])
    block.write_bytes(block.read_bytes()[:-1])  # something for `verify`, and for nobody else
    before = {path: path.read_bytes() for path in files(program.directory)}
    monkeypatch.setenv("MLX_PROMPTCACHE_READ_ONLY", "1")
    assert "read-only: unset MLX_PROMPTCACHE_READ_ONLY" in one_line(program(*command))
    assert {path: path.read_bytes() for path in files(program.directory)} == before


def test_where_writing_is_off_plans_and_reports_are_still_shown(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(program)
    before = files(program.directory)
    monkeypatch.setenv("MLX_PROMPTCACHE_READ_ONLY", "1")
    assert program("prune", "--max-size", "0", "--dry-run", "--json").json["freed_bytes"] > 0
    assert program("clear", "mine", "--dry-run", "--json").json["freed_bytes"] > 0
    assert program("verify", "--quarantine", "--dry-run").code == 0
    assert files(program.directory) == before


def test_what_was_written_is_told_by_day(program: Program) -> None:
    saved = program.generate("-p", PROMPT)["saved"]
    days = program("prune", "--dry-run", "--json").json["written_bytes"]
    assert list(days) == [time.strftime("%Y-%m-%d", time.gmtime())]
    assert days.popitem()[1] >= saved["bytes_written"]
    assert "written: " in program("list").out


def test_clear_unnamed_takes_rows_that_no_state_has(program: Program) -> None:
    fill(program)
    for stem in program.store.stems(SNAPSHOTS):
        if stem != program.store.names.read("mine"):
            program.store.remove(SNAPSHOTS, stem)
    told = program("clear", "--unnamed", "--dry-run", "--json").json
    done = program("clear", "--unnamed", "--yes", "--json").json
    assert done["freed_bytes"] == told["freed_bytes"] > 0
    needed = {
        ref[0]
        for ref in program.store.header(SNAPSHOTS, program.store.stems(SNAPSHOTS)[0]).content[
            "refs"
        ]
    }
    assert set(program.store.stems(BLOCKS)) == needed
    assert program("load", "mine", "-n", "2").code == 0


def test_clear_damaged_takes_damaged_blocks_and_what_was_moved_aside(program: Program) -> None:
    fill(program)
    blocks = program.store.stems(BLOCKS)
    path = program.store.path(BLOCKS, blocks[0])
    path.write_bytes(path.read_bytes()[:100])
    program.store.quarantine(BLOCKS, blocks[1])
    told = program("clear", "--damaged", "--dry-run", "--json").json
    assert program("clear", "--damaged", "--yes", "--json").json["removed"] == told["removed"]
    assert not path.exists()
    assert files(program.directory / QUARANTINE) == set()
    assert program("verify").code == 0


def test_verify_shows_what_it_would_move_aside(program: Program) -> None:
    fill(program)
    path = program.store.path(BLOCKS, program.store.stems(BLOCKS)[0])
    path.write_bytes(path.read_bytes()[:-1])
    before = files(program.directory)
    ended = program("verify", "--quarantine", "--dry-run")
    assert (ended.code, "1 would be moved aside" in ended.out) == (3, True)
    assert files(program.directory) == before
    told = json.loads(program("verify", "--quarantine", "--dry-run", "--json").out)
    assert json.loads(program("verify", "--quarantine", "--json").out)["quarantined"] == 1
    assert (told["quarantined"], told["dry_run"]) == (1, True)


def test_leftovers_of_crashes_are_counted_and_pruned(program: Program) -> None:
    fill(program)
    left = program.directory / BLOCKS / "3f3f7" / ".tmp-1-abc"
    left.parent.mkdir(exist_ok=True)
    left.write_bytes(b"x" * 9000)
    os.utime(left, (1, 1))
    assert program("prune", "--json").json["leftovers"] == 1
    assert not left.exists()


def test_clear_all_takes_what_crashes_left_just_now_and_says_so(program: Program) -> None:
    fill(program)
    assert program("clear", "--all", "--yes").code == 0
    left = program.directory / SNAPSHOTS / "3f0b" / ".tmp-1-abc"
    left.parent.mkdir(exist_ok=True)
    left.write_bytes(b"tokens of a prompt")
    told = program("clear", "--all", "--dry-run")
    assert "would delete: 1 leftovers, 18 B" in told.out
    assert left.exists()
    assert program("clear", "--all", "--yes", "--json").json["freed_bytes"] == 18
    assert not left.exists()


class Terminal:
    """Standard input where somebody sits."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("asked", "meanwhile"),
    [
        (("--all",), ("save", "new", "-p", "so new")),
        (("--unnamed",), ("generate", *GREEDY, "-p", "so new")),
        (("mine",), ("save", "mine", "-p", "so new", "--force")),
    ],
)
def test_what_was_stored_while_somebody_was_asked_is_not_deleted(
    asked: tuple[str, ...],
    meanwhile: tuple[str, ...],
    program: Program,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fill(program)
    monkeypatch.setattr("sys.stdin", Terminal())
    told: list[dict[str, Any]] = []

    def confirm(*_: Any, **__: Any) -> bool:
        assert program(*meanwhile).code == 0
        told.extend(entries(program))
        return True

    monkeypatch.setattr("click.confirm", confirm)
    ended = program("clear", *asked)
    assert (ended.code, "changed since this plan was shown; look at it again" in ended.err) == (
        1,
        True,
    )
    assert [e["snapshot"] for e in entries(program)] == [e["snapshot"] for e in told]
    monkeypatch.setattr("click.confirm", lambda *_, **__: True)
    assert program("clear", *asked).code == 0
    assert len(entries(program)) < len(told)


def test_an_age_narrows_what_else_is_chosen_and_adds_nothing(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    long_ago = time.time() - 7200
    with monkeypatch.context() as then:
        then.setattr("time.time", lambda: long_ago)
        old = program.generate("-p", "so old " + PROMPT)["saved"]["snapshot"]
        program("save", "ancient", "-p", "so ancient " + PROMPT)
    for stem in program.store.stems(SNAPSHOTS):
        os.utime(program.store.path(SNAPSHOTS, stem), (long_ago, long_ago))
    fill(program)
    plan = ("--dry-run", "--json", "--older-than", "1h")
    assert program("clear", "--unnamed", *plan).json["removed"] == [old]
    assert program("clear", "mine", *plan).json["removed"] == []
    assert program("clear", "ancient", *plan).json["removed"][0] == "ancient"
    assert len(program("clear", *plan).json["removed"]) == 3  # a name, and two snapshots


def test_clear_all_goes_with_nothing_that_chooses(program: Program) -> None:
    for chosen in (("--older-than", "30d"), ("--unnamed",), ("--stale",), ("mine",)):
        ended = program("clear", "--all", *chosen, "--yes")
        assert (ended.code, "leave out what chooses, or --all" in ended.err) == (2, True)
