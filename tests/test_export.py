"""One state in one file: what leaves a store, what comes into another, and what is refused."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import safetensors

import stored
import tiny
from known import model_of
from mlx_promptcache import PromptCache, Runner, container, cuts
from mlx_promptcache.container import Header
from mlx_promptcache.errors import CacheMiss, DamagedFile, ForeignFile, SignatureError, StoreError
from mlx_promptcache.files import Reader
from mlx_promptcache.fingerprint import Fingerprint, KVSettings
from mlx_promptcache.headers import block_header
from mlx_promptcache.names import NAMES
from mlx_promptcache.room import NoRoom
from mlx_promptcache.store import BLOCKS, SNAPSHOTS, Store
from mlx_promptcache.tree import BlockName, Keys
from tiny import digest, random_tokens

if TYPE_CHECKING:
    from collections.abc import Callable

    from mlx_promptcache.container import Json
    from mlx_promptcache.state import State

LENGTH = 300
SHORTER = 40


def test_a_store_that_asks_for_signatures_takes_no_exported_file(tmp_path: Path) -> None:
    filled(tmp_path).export("few", tmp_path / "few.safetensors")
    other = PromptCache(tmp_path / "other", "plain")
    other.directory.mkdir()
    (other.directory / "trusted_keys").write_text("# nobody\n")
    with pytest.raises(SignatureError, match="takes only what is signed"):
        other.import_file(tmp_path / "few.safetensors")
    assert not other.list()


def filled(directory: Path, kind: str = "smallest", *, name: str = "few") -> PromptCache:
    """A store with a state of `LENGTH` tokens under a name."""
    cache = PromptCache(directory / "here", kind)
    cache.save(name, prefilled(cache, kind, random_tokens(LENGTH, 1, 16)), sync=False)
    return cache


def prefilled(cache: PromptCache | None, kind: str, tokens: list[int]) -> State:
    return Runner(model_of(kind), None, cache).prefill(tokens)


def elsewhere(directory: Path, kind: str = "smallest") -> PromptCache:
    return PromptCache(directory / "there", kind)


def contents(cache: PromptCache) -> dict[str, bytes]:
    """Every container and every name of a store."""
    kinds = (BLOCKS, SNAPSHOTS, NAMES)
    files = [path for kind in kinds for path in (cache.directory / kind).rglob("*")]
    return {
        str(path.relative_to(cache.directory)): path.read_bytes()
        for path in files
        if path.is_file()
    }


def header_of(path: Path) -> Header:
    reader = Reader(path, {os.geteuid()})
    try:
        return reader.header()
    finally:
        reader.close()


# There and back


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_state_comes_out_of_its_file_with_every_bit(kind: str, tmp_path: Path) -> None:
    here, there = filled(tmp_path, kind), elsewhere(tmp_path, kind)
    here.export("few", tmp_path / "few.safetensors")
    there.import_file(tmp_path / "few.safetensors")
    here.blueprint = there.blueprint = Runner(model_of(kind), None, here).cache.blueprint  # type: ignore[union-attr]
    assert digest(there.load("few")) == digest(here.load("few"))
    assert not there.verify().damaged


def test_the_files_of_a_state_that_uses_its_blocks_whole_are_the_very_same(tmp_path: Path) -> None:
    here, there = filled(tmp_path), elsewhere(tmp_path)
    here.export("few", tmp_path / "few.safetensors")
    there.import_file(tmp_path / "few.safetensors")
    assert contents(there) == contents(here)


def test_any_reader_of_safetensors_opens_the_file(tmp_path: Path) -> None:
    filled(tmp_path).export("few", tmp_path / "few.safetensors")
    with safetensors.safe_open(tmp_path / "few.safetensors", "numpy") as file:
        names = set(file.keys())
        assert json.loads(file.metadata()["header"])["kind"] == "state"
    assert {"blocks/0/keys/0", "blocks/1/values/0", "snapshot/logits"} <= names


def test_arrays_are_passed_on_as_they_are_stored(tmp_path: Path) -> None:
    here = filled(tmp_path)
    here.export("few", tmp_path / "few.safetensors")
    store = Store(here.directory)
    stored = [
        store.header(kind, stem) for kind in (BLOCKS, SNAPSHOTS) for stem in store.stems(kind)
    ]
    sums = {entry.sha256 for header in stored for entry in header.entries.values()}
    assert {e.sha256 for e in header_of(tmp_path / "few.safetensors").entries.values()} == sums


def test_the_page_of_the_format_is_enough_to_read_a_parcel(tmp_path: Path) -> None:
    """By the reader that knows nothing of the package."""
    here = filled(tmp_path)
    here.export("few", tmp_path / "few.safetensors")
    theirs = stored.container((tmp_path / "few.safetensors").read_bytes())
    store = Store(here.directory)
    files = {
        one.content["start"]: one
        for one in (
            stored.container(store.path(BLOCKS, stem).read_bytes()) for stem in store.stems(BLOCKS)
        )
    }
    assert theirs.kind == "state"
    for i, content in enumerate(theirs.content["blocks"]):
        block = files[content["start"]]
        assert content == block.content
        assert {name: array.bits for name, array in block.arrays.items()} == {
            name.removeprefix(f"blocks/{i}/"): array.bits
            for name, array in theirs.arrays.items()
            if name.startswith(f"blocks/{i}/")
        }
    digests = [ref[1] for ref in theirs.content["snapshot"]["refs"]]
    assert digests == [files[start].digest for start in sorted(files)]


def test_only_its_owner_may_read_the_file(tmp_path: Path) -> None:
    filled(tmp_path).export("few", tmp_path / "few.safetensors")
    assert stat.S_IMODE((tmp_path / "few.safetensors").stat().st_mode) == 0o600


# What is not the state's


@pytest.mark.parametrize("kind", ["smallest", "rotating"])
def test_rows_of_a_longer_prompt_do_not_leave_with_a_shorter_one(kind: str, tmp_path: Path) -> None:
    here, there = filled(tmp_path, kind), elsewhere(tmp_path, kind)
    tokens = random_tokens(LENGTH, 1, 16)
    here.save("short", prefilled(here, kind, tokens[:SHORTER]), sync=False)
    exported = here.export("short", tmp_path / "short.safetensors")
    assert exported.tokens == SHORTER
    content = header_of(tmp_path / "short.safetensors").content
    assert [t for block in content["blocks"] for t in block["tokens"]] == tokens[:SHORTER]
    there.import_file(tmp_path / "short.safetensors")
    here.blueprint = there.blueprint = Runner(model_of(kind), None, here).cache.blueprint  # type: ignore[union-attr]
    assert digest(there.load("short")) == digest(here.load("short"))
    assert not there.verify().damaged


def test_a_cut_block_says_nothing_of_what_followed(tmp_path: Path) -> None:
    here = filled(tmp_path)
    store, tokens = Store(here.directory), random_tokens(LENGTH, 1, 16)
    stem = next(s for s in store.stems(BLOCKS) if block_header(store, s).content["start"] == 0)
    keys = Keys(here.fingerprint.digest, tokens)
    with store.reader(BLOCKS, stem) as reader:
        packed = cuts.first_rows(reader.read, reader.header(), SHORTER, keys[SHORTER])
    data = b"".join(map(bytes, packed.chunks))
    name = BlockName.parse(stem)
    assert name is not None
    assert name.end_key.encode() not in data
    alone = prefilled(PromptCache(tmp_path / "alone", "smallest"), "smallest", tokens[:SHORTER])
    PromptCache(tmp_path / "alone", "smallest").save("a", alone, sync=False)
    (other,) = Store(tmp_path / "alone").stems(BLOCKS)
    assert block_header(Store(tmp_path / "alone"), other).content.keys() == (
        header_from(data).content.keys()
    )
    assert str(name._replace(end_key=keys[SHORTER])) == other


def header_from(data: bytes) -> Header:
    return container.read_header(lambda offset, count: data[offset : offset + count], len(data))


def test_a_block_is_cut_before_the_rows_of_its_windows_begin(tmp_path: Path) -> None:
    cache = filled(tmp_path, "rotating")
    store = Store(cache.directory)
    stem = next(s for s in store.stems(BLOCKS) if block_header(store, s).content["start"] == 0)
    with store.reader(BLOCKS, stem) as reader:
        header, read = reader.header(), reader.read
        late = header._replace(
            content={**header.content, "window": {**header.content["window"], "from": 100}},
        )
        cut = header_from(b"".join(map(bytes, cuts.first_rows(read, late, 40, "0" * 32).chunks)))
    assert cut.content["window"]["from"] == 40
    assert {label.partition("/")[0] for label in cut.entries} == {"keys", "values"}
    assert {entry.shape[3] for entry in cut.entries.values()} == {40}


# What is there already


@pytest.mark.parametrize("length", [LENGTH, SHORTER])
def test_importing_what_is_stored_writes_nothing_but_the_name(length: int, tmp_path: Path) -> None:
    here = filled(tmp_path)
    state = prefilled(here, "smallest", random_tokens(LENGTH, 1, 16)[:length])
    here.save("mine", state, sync=False)
    here.export("mine", tmp_path / "mine.safetensors")
    before = contents(here)
    saved = here.import_file(tmp_path / "mine.safetensors", "yours")
    assert (saved.blocks_written, saved.bytes_written) == (0, 0)
    assert contents(here) == before | {"names/yours": before["names/mine"]}


def test_blocks_with_other_bits_become_variants(tmp_path: Path) -> None:
    here, there = filled(tmp_path), elsewhere(tmp_path)
    tokens = random_tokens(LENGTH, 1, 16)
    runner = Runner(tiny.smallest(), None, there)
    there.save("other", runner.prefill(tokens, boundaries=[7, 100]), sync=False)
    here.export("few", tmp_path / "few.safetensors")
    saved = there.import_file(tmp_path / "few.safetensors")
    assert saved.blocks_written > 0
    assert digest(there.load("few")) == digest(here.load("few"))
    assert digest(there.load("few")) != digest(there.load("other"))


def test_a_damaged_block_that_is_there_is_moved_aside_and_written_again(tmp_path: Path) -> None:
    here = filled(tmp_path)
    here.export("few", tmp_path / "few.safetensors")
    expected = digest(here.load("few"))
    store = Store(here.directory)
    path = store.path(BLOCKS, store.stems(BLOCKS)[0])
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    again = PromptCache(here.directory, "smallest")
    assert again.import_file(tmp_path / "few.safetensors").blocks_written == 1
    assert digest(again.load("few")) == expected


# Names and files


def test_a_name_comes_with_the_file_unless_another_is_given(tmp_path: Path) -> None:
    here, there = filled(tmp_path), elsewhere(tmp_path)
    here.export("few", tmp_path / "few.safetensors")
    assert there.import_file(tmp_path / "few.safetensors").name == "few"
    assert there.import_file(tmp_path / "few.safetensors", "shots").name == "shots"
    identity = here.list()[0].snapshot
    here.export(identity, tmp_path / "unnamed.safetensors")
    assert there.import_file(tmp_path / "unnamed.safetensors").name is None


def test_a_name_is_the_same_however_its_letters_are_composed(tmp_path: Path) -> None:
    here = filled(tmp_path, name="Gr\u00fc\u00dfe")
    here.export("Gru\u0308\u00dfe", tmp_path / "few.safetensors")
    assert elsewhere(tmp_path).import_file(tmp_path / "few.safetensors").name == "Gr\u00fc\u00dfe"


def test_a_name_that_stands_for_another_state_is_replaced_only_on_request(tmp_path: Path) -> None:
    here, there = filled(tmp_path), elsewhere(tmp_path)
    there.save("few", prefilled(None, "smallest", [1, 2, 3]), sync=False)
    here.export("few", tmp_path / "few.safetensors")
    before = contents(there)
    with pytest.raises(StoreError, match="another state named 'few'"):
        there.import_file(tmp_path / "few.safetensors")
    assert contents(there) == before
    there.import_file(tmp_path / "few.safetensors", replace=True)
    assert there.load("few").n_past == LENGTH


def test_a_file_is_replaced_only_on_request(tmp_path: Path) -> None:
    here, path = filled(tmp_path), tmp_path / "few.safetensors"
    path.write_text("mine")
    with pytest.raises(StoreError, match="is there already"):
        here.export("few", path)
    assert path.read_text() == "mine"
    here.export("few", path, replace=True)
    assert header_of(path).kind == "state"


def test_an_export_that_fails_leaves_nothing(tmp_path: Path) -> None:
    here = filled(tmp_path)
    store = Store(here.directory)
    (snapshot,) = store.stems(SNAPSHOTS)
    path = store.path(SNAPSHOTS, snapshot)
    path.write_bytes(path.read_bytes()[:-1] + b"\0")  # the header is sound
    (tmp_path / "out").mkdir()
    with pytest.raises(DamagedFile, match=r"'few' is damaged: .*save it again"):
        here.export("few", tmp_path / "out" / "few.safetensors")
    assert list((tmp_path / "out").iterdir()) == []


def test_an_import_keeps_to_the_budget(tmp_path: Path) -> None:
    here = filled(tmp_path)
    here.export("few", tmp_path / "few.safetensors")
    there = PromptCache(tmp_path / "there", "smallest", max_bytes=50_000)
    with pytest.raises(NoRoom):
        there.import_file(tmp_path / "few.safetensors")
    assert contents(there) == {}


def test_a_cache_that_is_read_only_takes_nothing_in(tmp_path: Path) -> None:
    filled(tmp_path).export("few", tmp_path / "few.safetensors")
    there = PromptCache(tmp_path / "there", "smallest", read_only=True)
    with pytest.raises(StoreError, match="read-only"):
        there.import_file(tmp_path / "few.safetensors")
    assert not (tmp_path / "there").exists()


# What is refused

MODEL = {"weights": "a", "config": "b", "adapter": "none", "kv": "plain", "salt": "none"}


@pytest.mark.parametrize(
    ("part", "sentence"),
    [
        ("weights", "made with other weights: import it with that model"),
        ("adapter", "made with another adapter: give the options"),
        ("kv", "made with other KV cache settings: give the options"),
        ("salt", "made with another salt: give the options"),
    ],
)
def test_another_models_state_is_refused_with_the_reason(
    part: str, sentence: str, tmp_path: Path
) -> None:
    mine = Fingerprint(MODEL)
    theirs = Fingerprint({**MODEL, part: "bits=8 group=64 start=0"})
    kv = KVSettings(8, 64, 0) if part == "kv" else KVSettings()
    here = PromptCache(tmp_path / "here", theirs, kv=kv)
    here.save("few", replace(prefilled(None, "smallest", [1, 2, 3]), kv=kv), sync=False)
    here.export("few", tmp_path / "few.safetensors")
    with pytest.raises(CacheMiss, match=sentence):
        PromptCache(tmp_path / "there", mine).import_file(tmp_path / "few.safetensors")
    assert not (tmp_path / "there").exists()


def test_parts_that_are_not_those_of_the_fingerprint_explain_nothing(tmp_path: Path) -> None:
    def other(content: Json, notes: Json) -> None:
        notes["snapshot"]["fingerprint"] = {**mine.parts, "salt": "a lie"}

    mine = elsewhere(tmp_path).fingerprint

    here = PromptCache(tmp_path / "here", "theirs")
    here.save("few", prefilled(None, "smallest", [1, 2, 3]), sync=False)
    path = tmp_path / "few.safetensors"
    here.export("few", path)
    resealed(path, other)
    with pytest.raises(CacheMiss, match="made by another model"):
        elsewhere(tmp_path).import_file(path)


def resealed(path: Path, change: Callable[[Json, Json], None]) -> None:
    """Change what a parcel says, and seal it as its writer would have."""
    header = header_of(path)
    arrays = path.read_bytes()[-sum(e.stored_bytes for e in header.entries.values()) :]
    content, notes = json.loads(json.dumps([header.content, header.notes]))
    change(content, notes)
    head = container.head_of(header.kind, content, notes, header.entries)
    path.write_bytes(b"".join([*map(bytes, head.chunks), arrays]))


def other_token(content: Json, notes: Json) -> None:
    content["blocks"][0]["tokens"][5] ^= 1


def other_rows(content: Json, notes: Json) -> None:
    content["blocks"][0]["tokens"].pop()


def no_tokens(content: Json, notes: Json) -> None:
    content["blocks"][0]["tokens"] = []


def negative_token(content: Json, notes: Json) -> None:
    content["blocks"][0]["tokens"][0] = -1


def text_for_a_token(content: Json, notes: Json) -> None:
    content["blocks"][0]["tokens"][0] = "a"


def many_tokens(content: Json, notes: Json) -> None:
    content["blocks"][0]["tokens"] *= 300


def blocks_swapped(content: Json, notes: Json) -> None:
    content["blocks"].reverse()


def a_block_less(content: Json, notes: Json) -> None:
    content["blocks"].pop()


def another_fingerprint(content: Json, notes: Json) -> None:
    content["blocks"][1]["fingerprint"] = "0f" * 16


def no_fingerprint(content: Json, notes: Json) -> None:
    content["fingerprint"] = "../.."


def another_phase(content: Json, notes: Json) -> None:
    content["snapshot"]["phase"] = "quantised"


def another_ref(content: Json, notes: Json) -> None:
    content["snapshot"]["refs"][0][0] = "00/" + "0" * 32 + "-1-" + "0" * 32


def another_length(content: Json, notes: Json) -> None:
    content["snapshot"]["n_past"] -= 1


def no_notes(content: Json, notes: Json) -> None:
    del notes["blocks"]


def notes_of_fewer_blocks(content: Json, notes: Json) -> None:
    notes["blocks"].pop()


def nothing_at_all(content: Json, notes: Json) -> None:
    content.clear()


def numbers_for_parts(content: Json, notes: Json) -> None:
    content.update(snapshot=7, blocks=7)


def test_parts_of_two_models_are_refused_however_well_they_are_sealed(tmp_path: Path) -> None:
    path = tmp_path / "few.safetensors"
    here = PromptCache(tmp_path / "here", "smallest")
    here.save("few", prefilled(None, "smallest", [1, 2, 3]), sync=False)
    here.export("few", path)
    entries = {
        label.removeprefix("blocks/0/"): entry
        for label, entry in header_of(path).entries.items()
        if label.startswith("blocks/0/")
    }

    def forge(content: Json, notes: Json) -> None:
        content["blocks"][0]["fingerprint"] = "0f" * 16
        head = container.head_of("block", content["blocks"][0], {}, entries)
        content["snapshot"]["refs"][0][1] = head.digest

    resealed(path, forge)
    with pytest.raises(DamagedFile, match="not of one model"):
        elsewhere(tmp_path).import_file(path)


@pytest.mark.parametrize(
    "change",
    [
        other_token, other_rows, no_tokens, negative_token, text_for_a_token, many_tokens,
        blocks_swapped, a_block_less, another_fingerprint, no_fingerprint, another_phase,
        another_ref, another_length, no_notes, notes_of_fewer_blocks,
        nothing_at_all, numbers_for_parts,
    ],
)  # fmt: skip
def test_a_parcel_that_contradicts_itself_is_refused_and_nothing_is_written(
    change: Callable[[Json, Json], None], tmp_path: Path
) -> None:
    path = tmp_path / "few.safetensors"
    filled(tmp_path).export("few", path)
    resealed(path, change)
    with pytest.raises(DamagedFile, match=r"few\.safetensors cannot be imported"):
        elsewhere(tmp_path).import_file(path)
    assert not (tmp_path / "there").exists()


def test_every_part_of_a_file_is_covered_by_a_checksum(tmp_path: Path) -> None:
    path = tmp_path / "few.safetensors"
    filled(tmp_path).export("few", path)
    sound = path.read_bytes()
    for at in range(0, len(sound), 97):
        path.write_bytes(sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :])
        with pytest.raises(DamagedFile):
            elsewhere(tmp_path).import_file(path)
    assert not (tmp_path / "there").exists()


def test_a_file_that_is_cut_short_or_no_parcel_is_refused(tmp_path: Path) -> None:
    path, here = tmp_path / "few.safetensors", filled(tmp_path)
    here.export("few", path)
    sound = path.read_bytes()
    store = Store(here.directory)
    block = store.path(BLOCKS, store.stems(BLOCKS)[0]).read_bytes()
    for data in (b"", sound[:7], sound[:5000], sound[:-1], sound + b"\0", block):
        path.write_bytes(data)
        with pytest.raises(DamagedFile):
            elsewhere(tmp_path).import_file(path)


def test_an_array_that_belongs_to_nothing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "few.safetensors"
    filled(tmp_path).export("few", path)
    header = header_of(path)
    arrays = path.read_bytes()[-sum(e.stored_bytes for e in header.entries.values()) :]
    for label in ("blocks/9/keys/0", "more", "blocks/0"):
        first, *rest = header.entries
        names = {first: first} | dict(zip(rest, [*rest[:-1], label], strict=True))
        entries = {names[name]: entry for name, entry in header.entries.items()}
        head = container.head_of(header.kind, header.content, header.notes, entries)
        other = tmp_path / "other.safetensors"
        other.write_bytes(b"".join([*map(bytes, head.chunks), arrays]))
        with pytest.raises(DamagedFile):
            elsewhere(tmp_path).import_file(other)


def test_a_file_of_another_version_is_foreign(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "few.safetensors"
    monkeypatch.setattr(container, "VERSION", "2")
    filled(tmp_path).export("few", path)
    monkeypatch.undo()
    with pytest.raises(CacheMiss, match="format version '2'") as told:
        elsewhere(tmp_path).import_file(path)
    assert isinstance(told.value.__cause__, ForeignFile)


@pytest.mark.parametrize("evil", ["../up", "a\nb", "-x", ".hidden", "\x1b[2J"])
def test_a_name_in_a_file_is_checked_like_any_other(evil: str, tmp_path: Path) -> None:
    path = tmp_path / "few.safetensors"
    filled(tmp_path).export("few", path)
    resealed(path, lambda content, notes: notes.update(name=evil))
    with pytest.raises(StoreError, match="cannot be a name"):
        elsewhere(tmp_path).import_file(path)
    assert elsewhere(tmp_path).import_file(path, "mine").name == "mine"


def test_what_is_no_file_is_told_in_a_sentence(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, sentence in (
        (tmp_path / "none", "none cannot be read: No such file"),
        (tmp_path, "is no file"),
        (tmp_path / "pipe", "is no file"),
    ):
        with pytest.raises(StoreError, match=sentence):
            elsewhere(tmp_path).import_file(path)


def test_a_link_that_the_user_names_is_followed(tmp_path: Path) -> None:
    filled(tmp_path).export("few", tmp_path / "few.safetensors")
    (tmp_path / "link").symlink_to(tmp_path / "few.safetensors")
    assert elsewhere(tmp_path).import_file(tmp_path / "link").name == "few"
