"""What lists remember: nothing is read twice, and nothing that changed is believed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from counting import Counted
from mlx_promptcache import PromptCache, Runner, cli, container, facts
from mlx_promptcache.catalog import Catalog, Entry, find
from mlx_promptcache.errors import StoreError
from mlx_promptcache.facts import Facts
from mlx_promptcache.store import BLOCKS, SNAPSHOTS, Store
from tiny import random_tokens, smallest

if TYPE_CHECKING:
    from collections.abc import Callable

STATES = 6


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store of six states of two cells each, and a memo that is kept whatever it is worth."""
    monkeypatch.setattr(facts, "WORTH_KEEPING", 1)
    monkeypatch.setattr(facts, "SETTLED_NS", 0)
    for number in range(STATES):
        add(tmp_path / "store", number)
    there = Store(tmp_path / "store")
    facts.forget(there)  # as if others had written it
    return there


def add(directory: Path, number: int) -> None:
    cache = PromptCache(directory, "smallest")
    runner = Runner(smallest(), None, cache)
    prefix = random_tokens(256, seed=1, vocab=16)
    cache.keep(runner.prefill([*prefix, *random_tokens(9, seed=number, vocab=16)]))


def listed(store: Store) -> list[Entry]:
    """A list as the command makes it."""
    catalog = Catalog(store, memo=facts.memo_of(store))
    found = catalog.entries()
    catalog.facts.keep()
    return found


def opened(store: Store, look: Callable[[Store], list[Entry]] = listed) -> int:
    """How many files a list opens; and it says what one without a memo says."""
    expected = Catalog(store).entries()
    with Counted(store.directory) as count:
        assert look(store) == expected
    return len(count.opened)


def test_a_list_opens_each_file_once_and_the_next_list_none(store: Store) -> None:
    assert opened(store) == len(store.stems(SNAPSHOTS)) + len(store.stems(BLOCKS)) == 2 * STATES + 1
    assert opened(store) == 0
    assert facts.memo_of(store).stat().st_mode & 0o777 == 0o600


def test_a_list_reads_what_is_new_and_what_was_used_since(store: Store) -> None:
    listed(store)
    add(store.directory, STATES)
    facts._journal_of(facts.memo_of(store)).forget()
    assert opened(store) == 3  # a block was used, too
    store.touch(SNAPSHOTS, store.stems(SNAPSHOTS)[0])
    assert opened(store) == 1
    assert opened(store) == 0


def test_a_file_that_was_changed_and_dated_back_is_read_again(store: Store) -> None:
    listed(store)
    path = store.path(BLOCKS, next(iter(Catalog(store).facts.blocks)))
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert any(entry.status == "damaged" for entry in listed(store))


@pytest.mark.parametrize("kind", [BLOCKS, SNAPSHOTS])
def test_what_is_gone_is_not_remembered(kind: str, store: Store) -> None:
    whole = listed(store)
    store.remove(kind, max(store.stems(kind), key=lambda s: len(s)))
    after = listed(store)
    if kind == SNAPSHOTS:
        assert len(after) == len(whole) - 1
    else:
        assert any(entry.status == "damaged" for entry in after)


def test_another_block_of_the_same_name_is_told_however_much_is_remembered(store: Store) -> None:
    listed(store)
    stem = longest_block(store)
    with store.reader(BLOCKS, stem) as reader:
        header = reader.header()
        arrays = {k: container.read_array(reader.read, e) for k, e in header.entries.items()}
    store.remove(BLOCKS, stem)
    content = header.content | {"complete": False}
    store.write(BLOCKS, stem, container.pack("block", content, header.notes, arrays))
    assert {entry.reason for entry in listed(store)} == {
        "a block that it needs was replaced by another"
    }


def longest_block(store: Store) -> str:
    """The one that all states share."""
    tokens = {stem: store.header(BLOCKS, stem).content["tokens"] for stem in store.stems(BLOCKS)}
    return max(tokens, key=lambda stem: len(tokens[stem]))


def test_a_damaged_block_that_many_states_share_is_read_once(store: Store) -> None:
    path = store.path(BLOCKS, longest_block(store))
    path.write_bytes(path.read_bytes()[:-1])
    assert opened(store) == 2 * STATES + 1
    assert {entry.status for entry in listed(store)} == {"damaged"}


@pytest.mark.parametrize("damage", ["cut", "changed", "emptied", "of another version"])
def test_a_damaged_memo_is_forgotten(
    damage: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed(store)
    memo = facts.memo_of(store)
    data = memo.read_bytes()
    if damage == "of another version":
        monkeypatch.setattr(facts, "__version__", "0.0.0")
    else:
        changed = data.replace(b'"blocks"', b'"blorks"')
        memo.write_bytes({"cut": data[:-9], "changed": changed, "emptied": b""}[damage])
    assert opened(store) == 2 * STATES + 1
    assert opened(store) == 0


def test_damage_is_not_remembered(store: Store) -> None:
    path = store.path(SNAPSHOTS, store.stems(SNAPSHOTS)[0])
    path.write_bytes(path.read_bytes()[:-1])
    assert opened(store) == 2 * STATES + 1
    assert opened(store) == 1


def test_a_file_written_a_moment_ago_is_not_remembered(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(facts, "SETTLED_NS", 3_600_000_000_000)
    assert opened(store) == opened(store) == 2 * STATES + 1


def test_few_files_are_not_worth_a_memo(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "WORTH_KEEPING", 2 * STATES + 2)
    listed(store)
    assert not facts.memo_of(store).exists()


def test_what_is_cleared_whole_leaves_no_memo(store: Store) -> None:
    listed(store)
    assert facts.memo_of(store).exists()
    arguments = ["clear", "--all", "--yes", "--cache-dir", str(store.directory)]
    assert cli.run(arguments) == cli.DONE
    assert not facts.memo_of(store).exists()
    assert listed(store) == []
    facts.forget(store)


def test_a_memo_that_cannot_be_written_is_no_matter(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise PermissionError(13, "Permission denied")

    expected = Catalog(store).entries()
    catalog = Catalog(store, memo=facts.memo_of(store))
    assert catalog.entries() == expected
    monkeypatch.setattr(Path, "mkdir", refuse)
    catalog.facts.keep()
    assert not facts.memo_of(store).exists()


def test_a_system_that_notes_every_reading_lets_the_memo_stand(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_promptcache.files.NO_ATIME", 0)
    listed(store)
    with Counted(store.directory) as count:
        listed(store)
    assert count.opened == []


# What writers note


def test_a_list_opens_nothing_that_this_user_wrote_since_but_what_was_used(store: Store) -> None:
    listed(store)
    for number in range(STATES, 2 * STATES):
        add(store.directory, number)
    assert 1 <= opened(store) < STATES  # blocks that others used since, of 2 * STATES new files
    assert opened(store) == 0


def test_already_the_first_list_opens_little(store: Store) -> None:
    for number in range(STATES, 2 * STATES):
        add(store.directory, number)
    assert opened(store) <= 3 * STATES  # those of others, and those that were used since
    assert not facts._journal_of(facts.memo_of(store))._path.exists()
    assert opened(store) == 0


def test_what_was_noted_and_changed_since_is_read(store: Store) -> None:
    listed(store)
    add(store.directory, STATES)
    new = Facts(store).snapshots.keys() - Facts(store, facts.memo_of(store))._known.snapshots.keys()
    assert new == set()  # it was noted
    newest = max(Facts(store).snapshots.items(), key=lambda item: item[1].ctime_ns)[0]
    path = store.path(SNAPSHOTS, newest)
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    assert [entry.stem for entry in listed(store) if entry.status == "damaged"] == [newest]


def test_what_is_cleared_whole_leaves_no_journal(store: Store) -> None:
    add(store.directory, STATES)
    journal = facts._journal_of(facts.memo_of(store))._path
    assert journal.stat().st_mode & 0o777 == 0o600
    arguments = ["clear", "--all", "--yes", "--cache-dir", str(store.directory)]
    assert cli.run(arguments) == cli.DONE
    assert not journal.exists()


def test_a_journal_that_cannot_be_written_stops_no_save(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    before = len(store.stems(SNAPSHOTS))
    add(store.directory, STATES)
    assert len(store.stems(SNAPSHOTS)) == before + 1


EMPTY: dict[str, list[object]] = {"fingerprints": [], "used": [], "blocks": [], "snapshots": []}


@pytest.mark.parametrize(
    "rows",
    [
        None, 7, "text", [], {}, {**EMPTY, "blocks": [["a"]]}, {**EMPTY, "snapshots": [[1] * 12]},
        {**EMPTY, "blocks": [["a", 1, 2, 3, 4, "digest", 1, 0, 0.0, 5]]},
    ],
)  # fmt: skip
def test_nonsense_in_a_journal_is_passed_over(rows: object, store: Store) -> None:
    journal = facts._journal_of(facts.memo_of(store))
    for row in (rows, [rows], [facts._version(), rows], ["another version", EMPTY]):
        journal.append(row)
    add(store.directory, STATES)
    journal.append([facts._version(), rows])
    assert opened(store) <= 2 * STATES + 3
    assert opened(store) == 0


def test_what_was_noted_of_files_of_another_format_is_not_believed(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed(store)
    add(store.directory, STATES)
    monkeypatch.setattr(container, "VERSION", "77")
    assert {entry.status for entry in listed(store)} == {"stale"}


def test_whoever_has_no_directory_of_their_own_saves_all_the_same(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> Path:
        raise StoreError("there is no home directory")

    monkeypatch.setattr("mlx_promptcache.places.user_cache", none)
    before = len(store.stems(SNAPSHOTS))
    add(store.directory, STATES)
    assert len(store.stems(SNAPSHOTS)) == before + 1


def test_to_clear_a_name_no_block_of_another_state_is_read(store: Store) -> None:
    cache = PromptCache(store.directory, "smallest")
    state = Runner(smallest(), None, cache).prefill(random_tokens(9, seed=70, vocab=16))
    cache.save("mine", state, sync=False)
    with Counted(store.directory) as count:
        catalog = Catalog(store)
        plan = catalog.plan_clear(catalog.named(["mine"]))
    assert (len(plan.snapshots), len(plan.blocks)) == (1, 1)
    assert len(count.opened) == len(set(count.opened)) == len(store.stems(SNAPSHOTS)) + 1


def test_what_is_found_by_name_is_all_that_is_read(store: Store) -> None:
    cache = PromptCache(store.directory, "smallest")
    state = Runner(smallest(), None, cache).prefill(random_tokens(9, seed=70, vocab=16))
    saved = cache.save("mine", state, sync=False)
    for name in ("mine", saved.snapshot):
        with Counted(store.directory) as count:
            find(store, name)
        assert len(count.opened) == 1
