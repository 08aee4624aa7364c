"""Hostile files, other users, and what is told to whom; docs/security.md tells of each of these."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import processes
import tiny
from conftest import ROOT
from mlx_promptcache import (
    ForeignStore,
    PromptCache,
    PromptCacheError,
    Runner,
    Sampling,
    StoreError,
    container,
    facts,
    privacy,
    tree,
    uses,
)
from mlx_promptcache.arrays import to_array
from mlx_promptcache.container import Array, pack
from mlx_promptcache.locks import LOCK, LOCK_FILES
from mlx_promptcache.names import NAMES
from mlx_promptcache.store import BLOCKS, QUARANTINE, SNAPSHOTS, TOKENIZERS, Store
from mlx_promptcache.uses import USES
from test_cli import GREEDY, PROMPT, Program, one_line, program, tiny_model
from tiny import digest, random_tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mlx_promptcache.state import State

__all__ = ["program", "tiny_model"]

STRANGER = 54321
ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
ASKED = "--allow-foreign-store"


@pytest.fixture
def another(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes this process one of another user, who may do with files what this one may."""
    me = os.geteuid()
    return lambda: monkeypatch.setattr(os, "geteuid", lambda: me + 1)


def everything(directory: Path) -> dict[str, Any]:
    """All that there is below a directory, with its times: links are looked at, not through."""
    found: dict[str, Any] = {}
    for path in [directory, *sorted(directory.rglob("*"))]:
        status = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(status.st_mode) else b""
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns), follow_symlinks=False)
        found[str(path)] = (status.st_mode, status.st_ino, status.st_mtime_ns, content)
    return found


def modes(directory: Path) -> set[int]:
    paths = [directory, *directory.rglob("*")]
    return {stat.S_IMODE(path.lstat().st_mode) for path in paths}


# Stores of others


def test_a_store_of_another_user_is_a_miss_with_a_notice_and_nothing_is_written(
    program: Program, another: Callable[[], None]
) -> None:
    expected = program.generate("-p", PROMPT)
    before = everything(program.directory)
    another()
    ended = program("generate", *GREEDY, "--json", "-p", PROMPT)
    answer = ended.json
    assert (answer["hit"], answer["saved"]) == ("none", None)
    assert "belongs to another user" in answer["miss_reason"]
    assert answer["tokens"] == expected["tokens"]
    (notice,) = [line for line in ended.err.splitlines() if "store" in line]
    assert notice.startswith("mlx-promptcache: the prompt cache is not used: the store ")
    assert ASKED in notice
    assert everything(program.directory) == before


REFUSED = [
    ("list",), ("verify",), ("show", "few"), ("load", "few"), ("clear", "few", "--yes"),
    ("clear", "--all", "--yes"), ("save", "further", "-p", "x"),
    ("generate", "-p", "x", "--prompt-cache", "few"), ("generate", "-p", "x", "--save-as", "y"),
]  # fmt: skip


def test_commands_refuse_a_store_of_another_user_in_a_sentence_that_names_the_option(
    program: Program, another: Callable[[], None]
) -> None:
    program("save", "few", "-p", PROMPT)
    before = everything(program.directory)
    another()
    for command in REFUSED:
        said = one_line(program(*command))
        assert f"the store {program.directory} belongs to another user" in said
        assert ASKED in said
    assert everything(program.directory) == before


def test_a_store_of_another_user_is_used_where_that_is_asked_for(
    program: Program, another: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    program("save", "few", "-p", PROMPT)
    expected = program.generate("-p", PROMPT)
    another()
    answer = program.generate("-p", PROMPT, ASKED)
    assert (answer["hit"], answer["tokens"]) == ("exact", expected["tokens"])
    assert program("load", "few", ASKED).code == 0
    monkeypatch.setenv("MLX_PROMPTCACHE_ALLOW_FOREIGN_STORE", "1")
    assert program("show", "few").code == 0
    monkeypatch.setenv("MLX_PROMPTCACHE_ALLOW_FOREIGN_STORE", "0")
    assert program("show", "few").code == 1


def test_in_python_a_store_of_another_user_is_a_miss_or_an_error(
    tmp_path: Path, another: Callable[[], None]
) -> None:
    model, tokens = tiny.smallest(), random_tokens(9, seed=1, vocab=16)
    state = Runner(model, None, PromptCache(tmp_path, "m")).prefill(tokens)
    PromptCache(tmp_path, "m").save("few", state)
    another()
    cache = PromptCache(tmp_path, "m")
    assert "belongs to another user" in str(cache.match(tokens).reason)
    assert Runner(model, None, cache).start(tokens).cached_tokens == 0
    assert cache.fetch(model, tokens)[1] == tokens
    for ask in (
        lambda: cache.load("few"), lambda: cache.save("further", state), lambda: cache.keep(state),
        lambda: cache.clear(["few"]), cache.list, cache.verify,
    ):  # fmt: skip
        with pytest.raises(ForeignStore):
            ask()
    allowed = PromptCache(tmp_path, "m", allow_foreign=True)
    assert digest(allowed.load("few")) == digest(state)
    assert allowed.with_kv(tiny_kv()).list() != []


def tiny_kv() -> Any:
    from mlx_promptcache import KVSettings

    return KVSettings(8, 32, 0)


def test_loading_a_model_whose_store_is_another_users_is_no_error(
    tiny_model: Path, tmp_path: Path, another: Callable[[], None]
) -> None:
    store = tmp_path / "store"
    Runner.load(str(tiny_model), cache_dir=str(store)).prefill("Hello")
    before = everything(store)
    another()
    runner = Runner.load(str(tiny_model), cache_dir=str(store))
    state = runner.prefill("Hello, you")
    assert runner.cache is not None
    assert runner.cache.read_only
    with pytest.raises(ForeignStore):
        runner.cache.save("mine", state)
    assert everything(store) == before
    allowed = Runner.load(str(tiny_model), cache_dir=str(store), allow_foreign=True)
    assert allowed.cache is not None
    assert allowed.cache.list() == []


def test_a_list_of_all_stores_passes_over_those_of_other_users(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program("save", "few", "-p", PROMPT)
    program.directory = tmp_path / "second"
    program("save", "further", "-p", PROMPT)
    users = privacy.users

    def some(directory: Any, *, allow_foreign: bool) -> frozenset[int]:
        if Path(directory) == tmp_path / "second" and not allow_foreign:
            raise ForeignStore("it belongs to another user")
        return users(directory, allow_foreign=allow_foreign)

    monkeypatch.setattr(privacy, "users", some)
    ended = program("list", "--all", "--json")
    here = {e["name"] for e in ended.json["entries"] if str(tmp_path) in e["store"]}
    assert here == {"few"}
    assert "belongs to another user" in ended.err
    assert "further" in {
        e["name"] for e in program("list", "--all", "--json", ASKED).json["entries"]
    }


@ROOT_ONLY
@pytest.mark.parametrize("kind", [BLOCKS, SNAPSHOTS, TOKENIZERS, NAMES])
def test_a_file_of_a_third_user_is_passed_over_with_a_reason(kind: str, program: Program) -> None:
    program("save", "few", "-p", PROMPT)
    expected = program.generate("-p", PROMPT)
    given = [p for p in (program.directory / kind).rglob("*") if p.is_file()]
    for path in given:
        os.chown(path, STRANGER, STRANGER)
    ended = program("generate", *GREEDY, "--json", "-p", PROMPT)
    assert ended.json["tokens"] == expected["tokens"]
    if kind == NAMES:
        assert "belongs to another user" in one_line(program("load", "few"))
    else:
        assert "is passed over: a file of the store belongs to another user" in ended.err
        assert (ended.json["hit"] == "exact") == (kind == TOKENIZERS)
    assert all(path.exists() for path in given)


@ROOT_ONLY
def test_in_a_store_of_another_user_both_users_files_count(tmp_path: Path) -> None:
    store = Store(tmp_path / "store", allow_foreign=True)
    store.create()
    for stem in ("3f/3f00-7-9a00", "3f/3f00-7-9a01", "3f/3f00-7-9a02"):
        store.write(BLOCKS, stem, pack("block", {}, {}, {}))
    os.chown(store.directory, STRANGER, STRANGER)
    os.chown(store.path(BLOCKS, "3f/3f00-7-9a01"), STRANGER, STRANGER)
    os.chown(store.path(BLOCKS, "3f/3f00-7-9a02"), STRANGER + 1, STRANGER)
    assert store.header(BLOCKS, "3f/3f00-7-9a00").kind == "block"
    assert store.header(BLOCKS, "3f/3f00-7-9a01").kind == "block"
    with pytest.raises(StoreError, match="belongs to another user"):
        store.header(BLOCKS, "3f/3f00-7-9a02")


@ROOT_ONLY
@pytest.mark.parametrize("parts", [(BLOCKS,), (BLOCKS, "3f3f7")])
def test_a_directory_of_a_third_user_is_not_used(parts: tuple[str, ...], tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.create()
    stem = "3f/3f00-7-9a00"
    store.write(BLOCKS, stem, pack("block", {}, {}, {}))
    os.chown(store.directory.joinpath(*parts), STRANGER, STRANGER)
    assert (store.stems(BLOCKS), store.files(BLOCKS), store.exists(BLOCKS, stem)) == ([], {}, False)
    uses: list[Callable[[], object]] = [
        lambda: store.header(BLOCKS, stem),
        lambda: store.remove(BLOCKS, stem),
        lambda: store.sync([(BLOCKS, stem)]),
    ]
    for use in uses:
        with pytest.raises(StoreError, match="is not used: it belongs to another user"):
            use()


def test_opening_a_store_is_a_handful_of_system_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Store(tmp_path / "store").create()
    calls: list[str] = []
    for name in ("open", "stat", "lstat", "listdir", "scandir", "chmod", "mkdir"):
        watch(monkeypatch, name, calls)
    assert Store(tmp_path / "store").check()
    assert 0 < len(calls) <= 10


def watch(monkeypatch: pytest.MonkeyPatch, name: str, calls: list[str]) -> None:
    original = getattr(os, name)

    def noted(*args: Any, **more: Any) -> Any:
        calls.append(name)
        return original(*args, **more)

    monkeypatch.setattr(os, name, noted)


# Modes


def test_what_others_could_look_into_is_closed_when_a_store_is_opened_and_that_is_told_once(
    program: Program,
) -> None:
    program("save", "few", "-p", PROMPT)
    directories = [program.directory, *(program.directory / n for n in (BLOCKS, SNAPSHOTS, NAMES))]
    for path in directories:
        path.chmod(0o755)
    first, second = program("list"), program("list")
    assert "others could look into the store" in one_notice(first)
    assert second.err == ""
    assert {stat.S_IMODE(path.stat().st_mode) for path in directories} == {0o700}


def one_notice(ended: processes.Ended) -> str:
    assert ended.code == 0
    (line,) = ended.err.splitlines()
    return line


def test_a_python_program_closes_a_store_by_using_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Store(tmp_path / "store").create()
    for read_only, mode in ((True, 0o755), (False, 0o700)):
        (tmp_path / "store").chmod(0o755)
        cache = PromptCache(tmp_path / "store", "m", read_only=read_only)
        assert cache.list() == cache.list() == []
        assert stat.S_IMODE((tmp_path / "store").stat().st_mode) == mode
    assert caplog.text.count("others could look into") == 1


def test_verify_closes_files_that_are_open_to_others(program: Program) -> None:
    program("save", "few", "-p", PROMPT)
    program.generate("-p", PROMPT)
    files = [path for path in program.directory.rglob("*") if path.is_file()]
    for path in files:
        path.chmod(0o644)
    assert program("verify", "--json").json["closed"] == len(files) >= 7
    assert program("verify", "--json").json["closed"] == 0
    assert modes(program.directory) == {0o700, 0o600}


@ROOT_ONLY
def test_the_modes_of_another_users_store_are_left_alone(tmp_path: Path) -> None:
    store = Store(tmp_path / "store", allow_foreign=True)
    store.create()
    store.write(BLOCKS, "3f/3f00-7-9a00", pack("block", {}, {}, {}))
    for path in [store.directory, *store.directory.rglob("*")]:
        os.chown(path, STRANGER, STRANGER)
        path.chmod(0o770)
    assert store.check()
    assert store.close_files() == 0
    assert modes(store.directory) == {0o770}


@pytest.mark.parametrize("umask", [0o022, 0o777])
def test_a_store_is_private_and_usable_whatever_the_umask(umask: int, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    before = os.umask(umask)
    try:
        store = Store(tmp_path / "store")
        store.create()
        store.write(BLOCKS, "3f/3f00-7-9a00", pack("block", {}, {}, {}))
        store.names.write("few", "3f/3f00-7-9a00")
        store.uses.note({"what": "x"})
        assert store.quarantine(BLOCKS, "3f/3f00-7-9a00")
    finally:
        os.umask(before)
    wide = {str(path): modes(path) - {0o700, 0o600} for path in tmp_path.glob("*")}
    assert wide == {str(tmp_path / "store"): set()}


# Links

PLACES = [
    BLOCKS, f"{BLOCKS}/*", f"{SNAPSHOTS}/*", NAMES, TOKENIZERS, QUARANTINE, USES, LOCK,
]  # fmt: skip


def linked(directory: Path, place: str) -> Path:
    """Put a link in the place of what a store has there; return where it leads."""
    away = directory.parent / "elsewhere"
    path = next(iter(directory.glob(place)), directory / place)
    if path.exists():
        path.rename(away)
    else:
        away.mkdir()
    path.symlink_to(away)
    return away


@pytest.mark.parametrize("place", PLACES)
def test_no_link_in_a_store_is_followed(place: str, program: Program) -> None:
    program("save", "few", "-p", PROMPT)
    expected = program.generate("-p", PROMPT)["tokens"]
    away = linked(program.directory, place)
    before = everything(away)
    for command in (
        ("generate", *GREEDY, "--json", "-p", PROMPT), ("generate", *GREEDY, "-p", "Another"),
        ("list",), ("show", "few"), ("verify", "--quarantine"), ("save", "further", "-p", "More"),
        ("clear", "few", "--yes"), ("clear", "--all", "--yes"),
    ):  # fmt: skip
        ended = program(*command)
        assert "should not have happened" not in ended.err
        if "--json" in command:
            assert ended.json["tokens"] == expected
    assert everything(away) == before


def test_damaged_files_are_not_moved_through_a_link(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.create()
    (tmp_path / "away").mkdir()
    (store.directory / QUARANTINE).symlink_to(tmp_path / "away")
    store.write(BLOCKS, "3f/3f00-7-9a00", pack("block", {}, {}, {}))
    assert not store.quarantine(BLOCKS, "3f/3f00-7-9a00")
    assert store.exists(BLOCKS, "3f/3f00-7-9a00")
    assert list((tmp_path / "away").iterdir()) == []


def test_leftovers_are_not_deleted_through_a_link(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.create()
    (tmp_path / "away").mkdir()
    (tmp_path / "away" / ".tmp-mine").write_text("mine")
    (store.directory / BLOCKS / "3f3f7").symlink_to(tmp_path / "away")
    store.clear_traces()
    assert (tmp_path / "away" / ".tmp-mine").read_text() == "mine"


def test_the_directory_of_a_store_may_be_a_link_that_its_user_made(
    program: Program, tmp_path: Path
) -> None:
    (tmp_path / "real").mkdir(0o755)
    program.directory.symlink_to(tmp_path / "real")
    program.generate("-p", PROMPT)
    assert program.generate("-p", PROMPT)["hit"] == "exact"
    assert stat.S_IMODE((tmp_path / "real").stat().st_mode) == 0o700
    assert (tmp_path / "real" / BLOCKS).is_dir()


# What is told to whom

SECRET = "Xyzzy the magpie keeps 4711-0815 silver spoons"


@contextlib.contextmanager
def with_tracebacks(program: Program, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setenv("MLX_PROMPTCACHE_DEBUG", "1")
        yield


def said_by(program: Program, *arguments: Any) -> str:
    """All that a command prints, a traceback too."""
    try:
        ended = program(*arguments)
    except Exception as exc:  # noqa: BLE001 - whatever is shown
        return "".join(traceback.format_exception(exc))
    return ended.err if arguments[0] == "generate" else ended.out + ended.err


def commands_with(secret: str, directory: Path) -> list[tuple[str | Path, ...]]:
    """Commands about a prompt, most of which fail, and none of which has to repeat it."""
    text, chat, broken = directory / "text", directory / "chat.json", directory / "broken.json"
    text.write_text(secret, "utf-8")
    chat.write_text(json.dumps([{"role": "user", "content": secret}] * 2), "utf-8")
    broken.write_text(json.dumps(secret)[:-1], "utf-8")
    return [
        ("generate", *GREEDY, "-p", secret), ("generate", *GREEDY, "--prompt-file", text),
        ("generate", *GREEDY, "-p", secret, "--save-as", "../up"),
        ("generate", *GREEDY, "-p", secret, "--prompt-cache", "nobody"),
        ("generate", *GREEDY, "-p", secret, "--no-prompt-cache", "--save-as", "x"),
        ("generate", *GREEDY, "-p", secret, "--kv-bits", "3"),
        ("generate", *GREEDY, "-p", secret, "--max-kv-size", "-1"),
        ("generate", *GREEDY, "-p", secret, "--top-p", "7"),
        ("generate", *GREEDY, "-p", secret, "--logit-bias", "x"),
        ("generate", *GREEDY, "-p", secret * 200),
        ("generate", *GREEDY, "-p", secret + "\udcff"),
        ("generate", *GREEDY, "-p", "a", *secret.split()), ("save", "x", *secret.split()),
        ("generate", *GREEDY, "--messages", chat, "--prefix", secret),
        ("generate", *GREEDY, "--messages", broken), ("generate", *GREEDY, "--messages", chat),
        ("save", "few", "-p", secret), ("save", "few", "-p", "Other " + secret),
        ("save", "chat", "--messages", chat), ("load", "few", "-n", "0"),
        ("list",), ("verify",), ("verify", "few"), ("clear", "nobody", "--yes"), ("list", "--all"),
    ]  # fmt: skip


def test_no_prompt_stands_anywhere_but_in_states(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "own").mkdir()
    commands = commands_with(SECRET, tmp_path / "own")
    told = [said_by(program, *command) for command in commands]
    with with_tracebacks(program, monkeypatch):
        told += [said_by(program, *command) for command in commands]
    damaged = [path for path in program.directory.rglob("*.safetensors") if path.is_file()]
    for path in damaged:
        with path.open("r+b") as file:
            file.seek(path.stat().st_size // 2)
            file.write(b"\xaa\x55\xaa")
    told += [said_by(program, *command) for command in commands]
    assert any("Traceback" in text for text in told)
    assert any("cannot be used" in text for text in told)
    assert [text for text in told if is_told(text)] == []
    states = [program.directory / kind for kind in (BLOCKS, SNAPSHOTS, QUARANTINE)]
    elsewhere = [
        path
        for path in [*program.directory.rglob("*"), *(tmp_path / "cache").rglob("*")]
        if not any(state in path.parents for state in states)
    ]
    assert {path.name for path in elsewhere} >= {USES, NAMES, "stores.txt", "weights.json"}
    assert [path for path in elsewhere if is_told(path.name)] == []
    assert [p for p in elsewhere if p.is_file() and is_told(p.read_bytes().decode("latin1"))] == []
    kept = b"".join(p.read_bytes() for s in states for p in s.rglob("*") if p.is_file())
    assert is_told(kept.decode("latin1"))  # there it stands on purpose


def is_told(text: str) -> bool:
    return any(word in text for word in ("Xyzzy", "magpie", "4711-0815", "silver spoons"))


def test_a_template_that_repeats_the_messages_is_not_repeated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny.on_disk(tmp_path / "model")
    template = "{{ raise_exception('what is ' + messages[0]['content'] + '?') }}"
    settings = json.loads((model / "tokenizer_config.json").read_text("utf-8"))
    settings["chat_template"] = template
    (model / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    program = Program(model, tmp_path / "store", capsys)
    said = one_line(program("generate", "-p", SECRET))
    assert said == "mlx-promptcache: the chat template refuses these messages"
    assert "what is a?" in one_line(program("generate", "-p", "a"))


# Freeing


def on_disk(directory: Path) -> int:
    return sum(p.lstat().st_blocks * 512 for p in directory.rglob("*") if p.is_file())


def test_what_is_cleared_is_free(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "WORTH_KEEPING", 1)
    program("save", "few", "-p", PROMPT)
    program("save", "further", "-p", "Nothing like it. " * 20)
    program.generate("-p", PROMPT + "and so on")
    program("list")
    assert facts.memo_of(program.store).is_file()
    for rest in (("few",), ("--all",)):
        before = on_disk(program.directory)
        freed = program("clear", *rest, "--yes", "--json").json["freed_bytes"]
        assert freed > 0
        assert before - on_disk(program.directory) >= freed
    left = {path.name for path in program.directory.rglob("*") if not path.is_dir()}
    assert left == set(LOCK_FILES)  # somebody may wait for one: they are empty
    assert on_disk(program.directory) == 0
    assert not facts.memo_of(program.store).exists()


# What files say

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e\r"


def resealed(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Write a container again with other notes, which its digest does not cover."""
    data = path.read_bytes()
    read: Any = lambda offset, length: data[offset : offset + length]  # noqa: E731
    header = container.read_header(read, len(data))
    notes = dict(header.notes)
    change(notes)
    arrays = {name: container.read_array(read, entry) for name, entry in header.entries.items()}
    packed = pack(header.kind, header.content, notes, arrays)
    assert packed.digest == header.digest
    path.write_bytes(b"".join(bytes(chunk) for chunk in packed.chunks))


def evil(notes: dict[str, Any]) -> None:
    notes["fingerprint"] = {**notes.get("fingerprint", {}), EVIL: EVIL, "weights": EVIL}
    notes["versions"] = {EVIL: EVIL}


def nonsense(notes: dict[str, Any]) -> None:
    notes.update(fingerprint=7, versions=[EVIL], boundaries=7, made="x", passes=EVIL, lineage=[])


@pytest.mark.parametrize("change", [evil, nonsense])
def test_no_name_and_no_note_commands_a_terminal(
    change: Callable[[dict[str, Any]], None], program: Program
) -> None:
    program("save", "few", "-p", PROMPT)
    for path in program.directory.rglob("*.safetensors"):
        resealed(path, change)
    for name in (EVIL, "a\nb", "\x1b[2J", "\u202efew"):
        with contextlib.suppress(OSError):
            shutil.copyfile(program.directory / NAMES / "few", program.directory / NAMES / name)
    for command in (
        ("list",), ("show", "few"), ("show", EVIL), ("verify",), ("load", "few", "-n", "0"),
        ("generate", *GREEDY, "-p", PROMPT), ("clear", "few", "--dry-run"),
        ("list", "--json"), ("show", "few", "--json"),
    ):  # fmt: skip
        ended = program(*command)
        assert "should not have happened" not in ended.err
        said = ended.err if command[0] == "generate" else ended.out + ended.err
        for line in said.split("\n"):  # what a model says is passed on as it is
            assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029]", line), command
    assert EVIL not in program("list").out


# Hashes, and files of others


def truncated(packed: bytes) -> str:
    """Half of all positions have the key of another."""
    return f"{hashlib.blake2b(packed, digest_size=1).digest()[0] % 2:032x}"


def test_tokens_are_compared_and_a_hash_alone_is_never_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tree, "_hash", truncated)
    model = tiny.smallest()
    prompts = [[3, *random_tokens(n, seed=n, vocab=16)] for n in (5, 6, 7, 9, 12, 300, 301)]
    for _ in range(2):
        for prompt in prompts:
            expected = state_after(Runner(model), prompt)
            runner = Runner(model, None, PromptCache(tmp_path, "m"))
            assert state_after(runner, prompt) == expected
            assert runner.cache is not None
            with contextlib.suppress(StoreError):
                runner.cache.keep(runner.state)
    assert {stem[:2] for stem in Store(tmp_path).stems(BLOCKS)} <= {"00", tree_root()[:2]}


def tree_root() -> str:
    from mlx_promptcache import Fingerprint, KVSettings

    return Fingerprint.of_text("m").with_kv(KVSettings()).digest


def state_after(runner: Runner, prompt: list[int]) -> list[int]:
    return [step.token for step in runner.generate(prompt, 4, sampling=Sampling(seed=1))]


def kept(directory: Path, fingerprint: str, tokens: list[int], name: str) -> State:
    state = Runner(tiny.smallest(), None, PromptCache(directory, fingerprint)).prefill(tokens)
    PromptCache(directory, fingerprint).save(name, state)
    return state


def test_a_snapshot_that_names_blocks_of_another_model_is_refused(tmp_path: Path) -> None:
    """The forger has two sound models in one store, and lets one's snapshot use the other's rows:
    names, keys, digests and seals are all as they should be.
    """
    tokens = random_tokens(9, seed=1, vocab=16)
    kept(tmp_path, "mine", tokens, "mine")
    store = Store(tmp_path)
    (block,) = store.stems(BLOCKS)
    data = store.path(BLOCKS, block).read_bytes()
    read: Any = lambda offset, length: data[offset : offset + length]  # noqa: E731
    header = container.read_header(read, len(data))
    arrays = {n: zeros(container.read_array(read, e)) for n, e in header.entries.items()}
    content = {**header.content, "fingerprint": "0f" * 16}
    forged = pack("block", content, header.notes, arrays)
    store.path(BLOCKS, block).write_bytes(b"".join(map(bytes, forged.chunks)))
    (snapshot,) = store.stems(SNAPSHOTS)
    point_to(store, snapshot, forged.digest)
    assert PromptCache(tmp_path, "mine", read_only=True).match(tokens).position == 0
    cache = PromptCache(tmp_path, "mine")
    with pytest.raises(PromptCacheError, match="a block of another model"):
        cache.load(cache.list()[0].snapshot)
    assert state_after(Runner(tiny.smallest(), None, cache), tokens) == state_after(
        Runner(tiny.smallest()), tokens
    )


def zeros(array: Array) -> Array:
    return Array(array.dtype, array.shape, bytes(len(array.data)))


def point_to(store: Store, stem: str, digest: str) -> None:
    """Let a snapshot use the one block with this digest, under the name that it then has."""
    path = store.path(SNAPSHOTS, stem)
    data = path.read_bytes()
    read: Any = lambda offset, length: data[offset : offset + length]  # noqa: E731
    header = container.read_header(read, len(data))
    ((block, _, start, rows),) = header.content["refs"]
    content = {**header.content, "refs": [[block, digest, start, rows]]}
    arrays = {n: container.read_array(read, e) for n, e in header.entries.items()}
    forged = pack("snapshot", content, header.notes, arrays)
    path.unlink()
    path = path.with_name(f"{path.stem[:-16]}{forged.digest[:16]}.safetensors")
    path.write_bytes(b"".join(map(bytes, forged.chunks)))


def test_what_somebody_forges_who_can_write_to_the_store_is_believed(tmp_path: Path) -> None:
    """What is not protected against: seals are checksums, and everybody can compute them."""
    tokens = random_tokens(9, seed=1, vocab=16)
    state = kept(tmp_path, "mine", tokens, "mine")
    store = Store(tmp_path)
    (stem,) = store.stems(SNAPSHOTS)
    data = store.path(SNAPSHOTS, stem).read_bytes()
    read: Any = lambda offset, length: data[offset : offset + length]  # noqa: E731
    header = container.read_header(read, len(data))
    arrays = {n: container.read_array(read, e) for n, e in header.entries.items()}
    assert state.logits is not None
    arrays["logits"] = to_array(-state.logits)
    forged = pack("snapshot", header.content, header.notes, arrays)
    name = f"{stem[:-16]}{forged.digest[:16]}"
    store.path(SNAPSHOTS, stem).unlink()
    store.write(SNAPSHOTS, name, forged)
    run = Runner(tiny.smallest(), None, PromptCache(tmp_path, "mine")).start(tokens)
    assert digest(run.state().logits) == digest(-state.logits)


def test_statistics_are_read_from_their_end_however_many_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    store.create()
    for number in range(100):
        store.uses.note({"what": number})
    monkeypatch.setattr(uses, "LARGEST_USES_BYTES", 150)
    numbers = [use["what"] for use in store.uses.all()]
    assert numbers == list(range(100 - len(numbers), 100))
    assert 1 < len(numbers) < 15


@pytest.mark.parametrize("place", [USES, *LOCK_FILES])
def test_a_pipe_in_the_place_of_a_file_of_a_store_is_not_waited_for(
    place: str, tmp_path: Path
) -> None:
    store = Store(tmp_path / "store")
    store.create()
    (store.directory / place).unlink(missing_ok=True)
    os.mkfifo(store.directory / place)
    store.create()
    store.uses.note({"what": "x"})
    assert list(store.uses.all()) == ([] if place == USES else [{"what": "x"}])
    with store.shared():
        pass
    with store.exclusive():
        pass


def test_a_file_system_without_modes_is_no_error_and_no_notice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Store(tmp_path / "store").create()
    (tmp_path / "store").chmod(0o755)

    def refuse(fd: int, mode: int) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    for fchmod in (refuse, lambda fd, mode: None):
        monkeypatch.setattr(os, "fchmod", fchmod)
        assert Store(tmp_path / "store").check()
    assert caplog.text == ""


def test_a_name_that_is_pointed_back_stands_for_what_it_stood_for(tmp_path: Path) -> None:
    """What is not protected against, either: what was sound once is sound."""
    tokens = random_tokens(9, seed=1, vocab=16)
    first = kept(tmp_path, "mine", tokens, "few")
    older = (tmp_path / NAMES / "few").read_bytes()
    cache = PromptCache(tmp_path, "mine")
    second = Runner(tiny.smallest(), None, cache).prefill([*tokens, 1])
    cache.save("few", second, replace=True)
    assert digest(cache.load("few").tokens) == digest(second.tokens)
    (tmp_path / NAMES / "few").write_bytes(older)
    assert digest(cache.load("few")) == digest(first)
    assert cache.match([*tokens, 1]).exact


def test_every_test_that_the_page_names_is_there() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "security.md").read_text("utf-8")))
    sources = [path.read_text("utf-8") for path in (ROOT / "tests").glob("test_*.py")]
    there = set(re.findall(r"^def (test_\w+)\(", "\n".join(sources), re.MULTILINE))
    assert len(named) > 40
    assert named - there == set()
