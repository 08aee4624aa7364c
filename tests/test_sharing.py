"""Stores that are shared: through a directory, an S3 server and an SFTP server, all real."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import processes
import servers
import tiny
from mlx_promptcache import CacheMiss, PromptCache, Runner, Sampling, container, places
from mlx_promptcache.errors import RemoteError, SignatureError
from mlx_promptcache.names import NAMES
from mlx_promptcache.rates import Rates
from mlx_promptcache.remote import Remote, RemoteFile, without_password
from mlx_promptcache.sharing import Sharing
from mlx_promptcache.signatures import Signer
from mlx_promptcache.store import BLOCKS, SNAPSHOTS, TRUSTED_KEYS, Store
from mlx_promptcache.tree import ID_DIGITS

if TYPE_CHECKING:
    from collections.abc import Iterator

KINDS = ("plain", "hybrid", "rotating")
PROMPT = tiny.random_tokens(600, seed=1)


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A bucket of a server that speaks S3."""
    directory = tmp_path_factory.mktemp("s3")
    with servers.serving("s3", directory) as port, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{servers.HOST}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "me")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        import s3fs

        s3fs.S3FileSystem().mkdir("bucket")
        yield "s3://bucket/caches"


@pytest.fixture(scope="module")
def sftp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A directory of a server that speaks SFTP."""
    directory = tmp_path_factory.mktemp("sftp")
    with servers.serving("sftp", directory) as port:
        yield f"sftp://{servers.USER}:{servers.PASSWORD}@{servers.HOST}:{port}/caches"


@pytest.fixture(params=["file", "s3", "sftp"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place of a test's own, through each of them."""
    if request.param == "file":
        return f"file://{tmp_path}/shared"
    return f"{request.getfixturevalue(request.param)}/{tmp_path.name}"


def files(directory: Path, pattern: str = "*") -> list[Path]:
    return sorted(path for path in directory.rglob(pattern) if path.is_file())


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A tiny model computes sooner than a server answers; and what one test finds out about a
    remote is no other's business.
    """
    monkeypatch.setattr(Rates, "computing_seconds", lambda *_: None)
    monkeypatch.setattr(Rates, "reading_is_slower", lambda *_: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


def cache(directory: Path, kind: str = "plain") -> PromptCache:
    return PromptCache(directory, kind)


def runner(directory: Path, kind: str = "plain") -> Runner:
    return Runner(tiny.KINDS[kind](), None, cache=cache(directory, kind))


def saved(directory: Path, kind: str = "plain", name: str = "few-shot") -> str:
    """Save a state, and keep another that leaves it. Return the digest of the first."""
    run = runner(directory, kind)
    assert run.cache is not None
    state = run.prefill(PROMPT)
    run.cache.save(name, state)
    run.cache.keep(run.prefill([*PROMPT[:550], 1, 2, 3]))
    return tiny.digest(run.cache.load(name))


# push and pull


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_pushed_is_pulled_bit_for_bit(kind: str, tmp_path: Path, url: str) -> None:
    expected = saved(tmp_path / "one", kind)
    sent = cache(tmp_path / "one", kind).sharing(url).push()
    came = cache(tmp_path / "two", kind).sharing(url).pull()
    assert sent.files == came.files == len(files(tmp_path / "two", "*.safetensors"))
    assert (came.names, came.refused) == (("few-shot",), ())
    assert tiny.digest(cache(tmp_path / "two", kind).load("few-shot")) == expected
    assert not cache(tmp_path / "two", kind).verify().damaged


def test_only_what_is_missing_travels(tmp_path: Path, url: str) -> None:
    saved(tmp_path / "one")
    one = cache(tmp_path / "one").sharing(url)
    first = one.push()
    again = one.push()
    assert (again.files, again.bytes, again.shared) == (0, 0, first.files)
    two = cache(tmp_path / "two").sharing(url)
    two.pull()
    assert (two.pull().files, two.push().files) == (0, 0)
    run = runner(tmp_path / "two")
    assert run.cache is not None
    run.cache.save("longer", run.prefill([*PROMPT, *range(20)]))
    sent = two.push()
    assert sent.files == 2  # a block of 20 rows and a snapshot
    assert sent.names == ("few-shot", "longer")


@pytest.mark.parametrize("names", [[], ["few-shot"]])
def test_what_was_here_before_a_pull_is_counted(names: list[str], tmp_path: Path) -> None:
    url = f"file://{tmp_path}/shared"
    saved(tmp_path / "one")
    cache(tmp_path / "one").sharing(url).push(names)
    two = cache(tmp_path / "two").sharing(url)
    first, again = two.pull(names), two.pull(names)
    assert (first.shared, again.files) == (0, 0)
    assert again.shared == first.files == len(files(tmp_path / "two", "*.safetensors"))


def test_what_a_pull_had_in_part_is_counted(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/shared"
    saved(tmp_path / "one")
    cache(tmp_path / "one").sharing(url).push()
    two = cache(tmp_path / "two").sharing(url)
    first = two.pull(["few-shot"])
    rest = two.pull()
    assert (rest.shared, rest.files) == (
        first.files,
        len(files(tmp_path / "two", "*.safetensors")) - first.files,
    )


def test_a_state_goes_alone_and_without_rows_of_other_prompts(tmp_path: Path) -> None:
    run = runner(tmp_path / "one")
    assert run.cache is not None
    run.cache.keep(run.prefill([*PROMPT[:300], 77, 78, 79]))
    run.cache.save("beginning", run.prefill(PROMPT[:300]))
    url = f"file://{tmp_path}/shared"
    run.cache.sharing(url).push(["beginning"])
    cache(tmp_path / "two").sharing(url).pull()
    two = cache(tmp_path / "two")
    assert tiny.digest(two.load("beginning")) == tiny.digest(run.cache.load("beginning"))
    assert two.match([*PROMPT[:300], 77, 78, 79]).position == 300
    assert [entry.tokens for entry in two.list()] == [300]


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_that_were_computed_otherwise_here_do_not_matter(kind: str, tmp_path: Path) -> None:
    """Two machines compute the same tokens with other bits: both states stay what they were."""
    url = f"file://{tmp_path}/shared"
    there = saved(tmp_path / "one", kind)
    cache(tmp_path / "one", kind).sharing(url).push(["few-shot"])
    other = Runner(tiny.KINDS[kind](), None, cache=cache(tmp_path / "two", kind), prefill_step=256)
    assert other.cache is not None
    other.cache.save("own", other.prefill(PROMPT, boundaries=(100, 333)))
    own = tiny.digest(other.cache.load("own"))
    other.cache.sharing(url).pull(["few-shot"])
    two = cache(tmp_path / "two", kind)
    assert (tiny.digest(two.load("few-shot")), tiny.digest(two.load("own"))) == (there, own)
    assert own != there
    assert two.sharing(url).pull(["few-shot"]).files == 0


def test_a_name_that_stands_for_something_else_is_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"file://{tmp_path}/shared"
    saved(tmp_path / "one")
    cache(tmp_path / "one").sharing(url).push()
    run = runner(tmp_path / "two")
    assert run.cache is not None
    run.cache.save("few-shot", run.prefill([5, 6, 7]))
    two = run.cache.sharing(url)
    with caplog.at_level(logging.WARNING):
        assert two.push().names == ()
        assert two.pull().names == ()
    assert "another state named 'few-shot'" in caplog.text
    with pytest.raises(CacheMiss, match="another state named 'few-shot'"):
        two.pull(["few-shot"])
    assert list(run.cache.load("few-shot").tokens) == [5, 6, 7]
    two.pull(["few-shot"], replace=True)
    assert list(run.cache.load("few-shot").tokens) == PROMPT


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", [["beginning"], []])
def test_a_state_that_ends_inside_a_block_is_one_state_there_and_here(
    first: list[str], kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Alone it goes with its own rows, and among all states with blocks that go on after it."""
    one, sharing = ends_inside_a_block(tmp_path, kind)
    stem, stored = one._store.names.read("beginning"), files(tmp_path / "one")
    moved = [sharing.push(first), sharing.push([] if first else ["beginning"])]
    assert [push.names for push in moved] == [("beginning",)] * 2
    assert sharing.push(["beginning"]).files == sharing.push().files == 0
    for names in (["beginning"], []):
        came = sharing.pull(names)
        assert (came.files, came.names, came.refused) == (0, ("beginning",), ())
    assert (one._store.names.read("beginning"), files(tmp_path / "one")) == (stem, stored)
    assert not caplog.text
    (there,) = files(tmp_path / "shared", "beginning")
    snapshots = files(tmp_path / "shared", f"{there.read_text().splitlines()[0][3:]}.safetensors")
    assert len(snapshots) == 1
    two = cache(tmp_path / "two", kind)
    for names in (["beginning"], [], ["beginning"]):
        assert two.sharing(f"file://{tmp_path}/shared").pull(names).names == ("beginning",)
    assert two.sharing(f"file://{tmp_path}/shared").push().files == 0
    assert tiny.digest(two.load("beginning")) == tiny.digest(one.load("beginning"))
    assert not caplog.text


def ends_inside_a_block(directory: Path, kind: str = "plain") -> tuple[PromptCache, Sharing]:
    """A store with a state `beginning` of 300 tokens, and a prompt that goes on in its block."""
    run = runner(directory / "one", kind)
    assert run.cache is not None
    run.cache.keep(run.prefill([*PROMPT[:300], 77, 78, 79]))
    run.cache.save("beginning", run.prefill(PROMPT[:300]))
    return run.cache, run.cache.sharing(f"file://{directory}/shared")


def test_a_form_of_a_state_that_lost_a_block_there_is_not_taken_for_the_state(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, sharing = ends_inside_a_block(tmp_path)
    sharing.push(["beginning"])
    for block in files(tmp_path / "shared", "*.safetensors"):
        if BLOCKS in block.parts:
            block.unlink()
    assert sharing.push().names == ("beginning",)
    two = cache(tmp_path / "two")
    assert two.sharing(f"file://{tmp_path}/shared").pull(["beginning"]).names == ("beginning",)
    assert tiny.digest(two.load("beginning")) == tiny.digest(one.load("beginning"))
    assert not caplog.text


def test_rows_that_a_longer_block_here_begins_with_do_not_come(tmp_path: Path) -> None:
    one, sharing = ends_inside_a_block(tmp_path)
    sharing.push(["beginning"])
    run = runner(tmp_path / "two")
    assert run.cache is not None
    run.cache.keep(run.prefill([*PROMPT[:300], 77, 78, 79]))
    came = run.cache.sharing(f"file://{tmp_path}/shared").pull(["beginning"])
    assert came.files == 2  # the last row, which a pass of its own computed, and the snapshot
    assert tiny.digest(run.cache.load("beginning")) == tiny.digest(one.load("beginning"))


def test_a_state_is_the_same_where_its_blocks_have_other_names(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Here others have the plain names of its blocks."""
    url = f"file://{tmp_path}/shared"
    saved(tmp_path / "one")
    cache(tmp_path / "one").sharing(url).push(["few-shot"])
    run = Runner(tiny.plain(), None, cache=cache(tmp_path / "two"), prefill_step=256)
    assert run.cache is not None
    run.cache.save("own", run.prefill(PROMPT, boundaries=(100, 333)))
    two = run.cache.sharing(url)
    two.pull(["few-shot"])
    assert two.push(["few-shot"]).names == ("few-shot",)
    assert two.push(["few-shot"]).files == 0
    assert not caplog.text


def test_a_name_of_the_same_tokens_with_other_rows_is_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"file://{tmp_path}/shared"
    there = saved(tmp_path / "one")
    cache(tmp_path / "one").sharing(url).push(["few-shot"])
    run = Runner(tiny.plain(), None, cache=cache(tmp_path / "two"), prefill_step=256)
    assert run.cache is not None
    run.cache.save("few-shot", run.prefill(PROMPT, boundaries=(100, 333)))
    own, two = tiny.digest(run.cache.load("few-shot")), run.cache.sharing(url)
    with pytest.raises(CacheMiss, match="another state named 'few-shot' here"):
        two.pull(["few-shot"])
    assert (two.pull().names, two.push(["few-shot"]).names) == ((), ())
    assert caplog.text.count("another state named 'few-shot'") == 2
    assert tiny.digest(run.cache.load("few-shot")) == own != there
    two.pull(["few-shot"], replace=True)
    assert tiny.digest(run.cache.load("few-shot")) == there


def test_states_of_another_model_are_neither_sent_nor_seen(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/shared"
    saved(tmp_path / "one")
    other = cache(tmp_path / "one", "bare").sharing(url)
    assert other.push().states == 0
    with pytest.raises(CacheMiss, match="another model"):
        other.push(["few-shot"])
    cache(tmp_path / "one").sharing(url).push()
    assert other.pull().states == 0


def test_a_place_without_states_of_any_model_is_an_error(tmp_path: Path, url: str) -> None:
    two = cache(tmp_path / "two").sharing(url)
    for names in ([], ["few-shot"]):
        with pytest.raises(RemoteError, match="there are no states of any model at"):
            two.pull(names)


def test_a_place_with_states_of_other_models_alone_is_told(
    tmp_path: Path, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path / "one")
    cache(tmp_path / "one").sharing(url).push()
    other = cache(tmp_path / "two", "bare").sharing(url)
    assert other.pull().states == 0
    assert "there are states of other models, and none of this one" in caplog.text
    with pytest.raises(CacheMiss, match="no state named 'few-shot'"):
        other.pull(["few-shot"])


def test_a_pull_that_was_broken_off_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is whole is not fetched again, and what was not whole is fetched from there on."""
    url = f"file://{tmp_path}/shared"
    expected = saved(tmp_path / "one")
    cache(tmp_path / "one").sharing(url).push()
    monkeypatch.setattr("mlx_promptcache.remote.PIECE_BYTES", 10_000)
    whole = Remote.read
    read: list[int] = []

    def breaking(self: Remote, path: str, offset: int, size: int) -> Iterator[bytes]:
        for piece in whole(self, path, offset, size):
            if len(read) == 20:
                raise RemoteError("the line is cut")
            read.append(len(piece))
            yield piece

    monkeypatch.setattr(Remote, "read", breaking)
    two = cache(tmp_path / "two").sharing(url)
    others = threading.enumerate()
    with pytest.raises(RemoteError, match="the line is cut"):
        two.pull()
    for thread in set(threading.enumerate()) - set(others):  # nobody else waits for them
        thread.join()
    before = sum(read)
    monkeypatch.setattr(Remote, "read", whole)
    assert before > 100_000
    rest: list[int] = []

    def counting(self: Remote, path: str, offset: int, size: int) -> Iterator[bytes]:
        for piece in whole(self, path, offset, size):
            rest.append(len(piece))
            yield piece

    monkeypatch.setattr(Remote, "read", counting)
    two.pull()
    total = sum(path.stat().st_size for path in files(tmp_path / "two", "*.safetensors"))
    assert before + sum(rest) == total
    assert tiny.digest(cache(tmp_path / "two").load("few-shot")) == expected


def test_two_machines_push_at_once(tmp_path: Path, url: str) -> None:
    """Real processes, each with a store that the other does not know."""
    program = """
import sys; sys.path.insert(0, sys.argv[4])
import tiny
from mlx_promptcache import PromptCache, Runner
cache = PromptCache(sys.argv[1], "plain")
run = Runner(tiny.KINDS["plain"](), None, cache=cache)
start = int(sys.argv[3])
for i in range(4):
    cache.save(f"{start}-{i}", run.prefill([*tiny.random_tokens(300, seed=1), start, i]))
    print(cache.sharing(sys.argv[2]).push().names)
"""
    tests = str(Path(__file__).parent)
    running = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / str(i)), url, str(i), tests],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=processes.environment(),
        )
        for i in (1, 2)
    ]  # fmt: skip
    for process in running:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err.decode()
    came = cache(tmp_path / "both").sharing(url).pull()
    assert len(came.names) == 8
    assert not came.refused
    run = runner(tmp_path / "both")
    assert run.cache is not None
    for name in came.names:
        assert run.cache.load(name).n_past == 302
    blocks = files(tmp_path / "both" / BLOCKS)
    assert len(blocks) <= 2 + 8 + 1  # the prefix once, but for bits that differ


# What comes is not believed


def everything(directory: Path) -> list[Path]:
    return files(directory, "*.safetensors") + files(directory / next(_inside(directory)) / NAMES)


def _inside(directory: Path) -> Iterator[str]:
    yield from (path.name for path in directory.iterdir())


def test_whatever_is_wrong_there_no_wrong_state_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"file://{tmp_path}/shared"
    expected = saved(tmp_path / "one")
    cache(tmp_path / "one").sharing(url).push()
    shutil.copytree(tmp_path / "shared", tmp_path / "pristine")
    tried = 0
    for number, path in enumerate(everything(tmp_path / "pristine")):
        target = tmp_path / "shared" / path.relative_to(tmp_path / "pristine")
        size = path.stat().st_size
        for position in (9, size // 2, size - 1):
            flip(target, position)
            monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"user {number} {position}"))
            two = tmp_path / f"two {number} {position}"
            came = cache(two).sharing(url).pull()
            assert came.refused or NAMES in path.parts
            assert not cache(two).verify().damaged
            for name in came.names:
                assert tiny.digest(cache(two).load(name)) == expected
            shutil.copy(path, target)
            tried += 1
    assert tried > 15


def test_files_that_were_swapped_there_are_refused(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/shared"
    saved(tmp_path / "one")
    cache(tmp_path / "one").sharing(url).push()
    shared = files(tmp_path / "shared", "*.safetensors")
    one, other = [path for path in shared if BLOCKS in path.parts][:2]
    content = one.read_bytes(), other.read_bytes()
    one.write_bytes(content[1])
    other.write_bytes(content[0])
    came = cache(tmp_path / "two").sharing(url).pull()
    assert "not the block that its name says" in came.refused[0]
    assert came.states == 0


@pytest.mark.parametrize("size", [10**20, 10**15, 1 << 33, -5])
def test_a_size_that_no_file_has_is_not_believed(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"file://{tmp_path}/shared"
    saved(tmp_path / "one")
    cache(tmp_path / "one").sharing(url).push()
    listed = Remote.files

    def files_of(*arguments: Any) -> list[RemoteFile]:
        return [file._replace(size=size) for file in listed(*arguments)]

    monkeypatch.setattr(Remote, "files", files_of)
    monkeypatch.setattr(Remote, "read", lambda *_: pytest.fail("it was fetched"))
    came = cache(tmp_path / "two").sharing(url).pull()
    assert (came.states, came.files) == (0, 0)
    assert f"it is said to have {size} bytes" in came.refused[0]


def test_a_file_of_another_version_is_left_out_and_the_others_come(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/shared"
    expected = saved(tmp_path / "one")
    cache(tmp_path / "one").sharing(url).push(["few-shot"])
    (newer,) = snapshots(tmp_path / "shared")
    cache(tmp_path / "one").sharing(url).push()
    data = newer.read_bytes().replace(b'"version":"1"', b'"version":"2"', 1)
    end = 8 + int.from_bytes(data[:8], "little")
    seal = hashlib.sha256(data[:end]).digest()
    newer.write_bytes(data[:end] + seal + data[end + len(seal) :])
    came = cache(tmp_path / "two").sharing(url).pull()
    assert "it has format version '2'" in came.refused[0]
    assert came.states == 1
    shutil.rmtree(tmp_path / "shared")
    cache(tmp_path / "one").sharing(url).push()
    cache(tmp_path / "two").sharing(url).pull()
    assert tiny.digest(cache(tmp_path / "two").load("few-shot")) == expected


def snapshots(directory: Path) -> list[Path]:
    return [path for path in files(directory, "*.safetensors") if SNAPSHOTS in path.parts]


def test_a_snapshot_of_blocks_that_cannot_be_is_refused(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/shared"
    saved(tmp_path / "one")
    cache(tmp_path / "one").sharing(url).push(["few-shot"])
    (sound,) = snapshots(tmp_path / "shared")
    data = sound.read_bytes()
    header = container.read_header(lambda at, count: data[at : at + count], len(data))
    header.content["refs"][0][1] = "\ud800"  # no text that can be encoded
    arrays = data[len(data) - header.stored_bytes :]
    packed = container.repacked(header, [arrays])
    stem = sound.name.partition(".")[0][:-ID_DIGITS] + packed.digest[:ID_DIGITS]
    sound.with_name(f"{stem}.safetensors").write_bytes(b"".join(packed.chunks))
    came = cache(tmp_path / "two").sharing(url).pull()
    assert (came.states, came.names) == (1, ("few-shot",))
    assert "it is not the snapshot that its name says" in came.refused[0]


# Signatures


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two keys, as they are made for ssh: `team` and `other`."""
    directory = tmp_path_factory.mktemp("keys")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ed25519

    for name in ("team", "other"):
        key = ed25519.Ed25519PrivateKey.generate()
        private = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        )
        public = key.public_key().public_bytes(
            serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        )
        (directory / name).write_bytes(private)
        (directory / f"{name}.pub").write_bytes(public + b" a comment\n")
    return directory


def trusting(directory: Path, key: Path) -> Sharing:
    """A store that asks for signatures."""
    Store(directory).create()
    shutil.copy(key, directory / TRUSTED_KEYS)
    return cache(directory).sharing(f"file://{directory.parent}/shared")


def test_what_nobody_signed_is_told_once(
    tmp_path: Path, keys: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = runner(tmp_path / "one")
    assert run.cache is not None
    for i in range(3):
        run.cache.save(str(i), run.prefill([*PROMPT[:20], i]))
    run.cache.sharing(f"file://{tmp_path}/shared").push()
    came = trusting(tmp_path / "two", keys / "team.pub").pull()
    assert [record.getMessage() for record in caplog.records] == [
        "a snapshot that came from elsewhere is not used: nobody signed it (3 of them)",
        "the names '0', '1', '2' were left out: no state that can be used is there",
    ]
    assert (came.states, came.names, len(came.refused)) == (0, (), 6)


def test_a_name_that_was_asked_for_and_refused_ends_a_pull(tmp_path: Path, keys: Path) -> None:
    """The state is here, but nobody signed the name; other names that were asked for come."""
    model = tiny.on_disk(tmp_path / "model")
    place = ("-m", model, "--cache-dir", tmp_path / "store")
    url = f"file://{tmp_path}/shared"
    for name in ("a", "b"):
        assert processes.run("save", name, "-p", f"The {name} sat", *place).code == 0
    processes.run("push", url, "a", *place)
    processes.run("push", url, "b", "--sign", keys / "team", *place)
    shutil.copy(keys / "team.pub", tmp_path / "store" / TRUSTED_KEYS)
    for path in files(tmp_path / "store" / NAMES):
        path.unlink()
    ended = processes.run("pull", url, "a", "b", *place)
    assert (ended.code, ended.out, ended.err.count("\n")) == (1, "", 1)
    assert "the name 'a' cannot be taken over: nobody who is trusted signed it" in ended.err
    assert [name.name for name in files(tmp_path / "store" / NAMES)] == ["b"]


@pytest.mark.parametrize("signer", [None, "other"])
def test_what_nobody_signed_who_is_trusted_is_never_used(
    signer: str | None, tmp_path: Path, keys: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path / "one")
    key = None if signer is None else Signer.load(keys / signer)
    cache(tmp_path / "one").sharing(f"file://{tmp_path}/shared", signer=key).push()
    two = trusting(tmp_path / "two", keys / "team.pub")
    assert two.pull().states == 0
    assert "signed it" in caplog.text
    with pytest.raises(CacheMiss, match="cannot be taken over"):
        two.pull(["few-shot"])
    run = runner(tmp_path / "two")
    assert run.cache is not None
    run.cache.attach(f"file://{tmp_path}/shared")
    assert run.start(PROMPT).cached_tokens == 0
    assert not files(tmp_path / "two" / SNAPSHOTS)


def test_what_somebody_trusted_signed_is_used(tmp_path: Path, keys: Path) -> None:
    expected = saved(tmp_path / "one")
    url = f"file://{tmp_path}/shared"
    cache(tmp_path / "one").sharing(url).push()  # unsigned, which is in nobody's way
    cache(tmp_path / "one").sharing(url, signer=Signer.load(keys / "other")).push()
    team = cache(tmp_path / "one").sharing(url, signer=Signer.load(keys / "team"))
    for path in files(tmp_path / "shared", "*.safetensors"):
        if path.name.count(".") > 1:
            path.unlink()
    team.push(replace=True)
    assert trusting(tmp_path / "two", keys / "team.pub").pull().names == ("few-shot",)
    assert tiny.digest(cache(tmp_path / "two").load("few-shot")) == expected


def test_a_signature_belongs_to_one_file_and_to_one_name(tmp_path: Path, keys: Path) -> None:
    url = f"file://{tmp_path}/shared"
    saved(tmp_path / "one")
    saved(tmp_path / "one", name="other")
    run = runner(tmp_path / "one")
    assert run.cache is not None
    run.cache.save("short", run.prefill(PROMPT[:100]))
    run.cache.sharing(url, signer=Signer.load(keys / "team")).push()
    (names,) = (tmp_path / "shared").glob(f"*/{NAMES}")
    shutil.copy(names / "short", names / "few-shot")
    snapshots = [
        path for path in files(tmp_path / "shared", "*.safetensors") if SNAPSHOTS in path.parts
    ]
    stem = (names / "other").read_text().splitlines()[0]
    (victim,) = [path for path in snapshots if path.name.startswith(stem[3:])]
    wrong = next(p.name.split(".")[1] for p in snapshots if p != victim)
    victim.rename(victim.with_name(f"{victim.name.split('.')[0]}.{wrong}.safetensors"))
    came = trusting(tmp_path / "two", keys / "team.pub").pull()
    assert "few-shot" not in came.names
    assert any(
        "'few-shot' was left out: nobody who is trusted signed it" in r for r in came.refused
    )
    assert any("snapshot" in refused for refused in came.refused)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "has no key"),
        ("# only a comment\n", "has no key"),
        ("ssh-rsa AAAA me\n", "a line begins with"),
        ("ssh-ed25519\n", "a line begins with"),
        ("ssh-ed25519 AAAA me\n", "no Ed25519 key"),
        ("ssh-ed25519 !!! me\n", "no Ed25519 key"),
    ],
)
def test_trusted_keys_that_are_none_let_nothing_in(content: str, said: str, tmp_path: Path) -> None:
    saved(tmp_path / "one")
    cache(tmp_path / "one").sharing(f"file://{tmp_path}/shared").push()
    Store(tmp_path / "two").create()
    (tmp_path / "two" / TRUSTED_KEYS).write_text(content)
    with pytest.raises(SignatureError, match=said):
        cache(tmp_path / "two").sharing(f"file://{tmp_path}/shared").pull()


def test_a_key_that_is_none_is_told_in_a_sentence(tmp_path: Path, keys: Path) -> None:
    (tmp_path / "key").write_text("nothing")
    for path, said in [
        (tmp_path / "key", "no private key"),
        (tmp_path / "missing", "cannot be read"),
        (keys / "team.pub", "no private key"),
    ]:
        with pytest.raises(SignatureError, match=said):
            Signer.load(path)


# Below a store


def test_a_prompt_that_is_there_is_not_computed(tmp_path: Path, url: str) -> None:
    one = runner(tmp_path / "one")
    assert one.cache is not None
    one.cache.attach(url)
    expected = one.start(PROMPT, sampling=Sampling(seed=1))
    one.cache.keep(expected.prompt_state())
    assert one.cache.supply is not None
    one.cache.supply.close()
    two = runner(tmp_path / "two")
    assert two.cache is not None
    two.cache.attach(url)
    run = two.start(PROMPT, sampling=Sampling(seed=1))
    assert (run.cached_tokens, run.prefilled_tokens) == (600, 0)
    assert tiny.digest(run.prompt_state()) == tiny.digest(expected.prompt_state())
    assert two.start([*PROMPT[:580], 1, 2, 3]).cached_tokens == 580


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_of_a_prompt_that_is_there_is_not_computed(kind: str, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/shared"
    saved(tmp_path / "one", kind)
    cache(tmp_path / "one", kind).sharing(url).push()
    two = runner(tmp_path / "two", kind)
    assert two.cache is not None
    two.cache.attach(url)
    prompt = [*PROMPT, *range(30)]
    run = two.start(prompt, sampling=Sampling(seed=1))
    assert (run.cached_tokens, run.prefilled_tokens) == (600, 30)
    local = runner(tmp_path / "one", kind).start(prompt, sampling=Sampling(seed=1))
    assert tiny.digest(run.prompt_state()) == tiny.digest(local.prompt_state())


def test_a_remote_is_not_asked_for_what_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path / "one")
    one = runner(tmp_path / "one")
    assert one.cache is not None
    one.cache.attach(f"file://{tmp_path}/shared")
    asked: list[Any] = []

    def listing(*arguments: Any) -> list[Any]:
        asked.append(arguments)
        return []

    monkeypatch.setattr(Remote, "files", listing)
    assert one.start(PROMPT).prefilled_tokens == 0
    assert one.start([*PROMPT, 1, 2]).prefilled_tokens == 2
    assert not asked


@pytest.fixture
def dead_end() -> Iterator[int]:
    """The port of a server that takes connections and never says anything."""
    with socket.socket() as listening:
        listening.bind((servers.HOST, 0))
        listening.listen()
        yield listening.getsockname()[1]


def test_a_remote_that_says_nothing_costs_its_time_once(
    tmp_path: Path,
    dead_end: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()  # one of another test knows another server
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{servers.HOST}:{dead_end}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "me")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    one = runner(tmp_path / "one")
    assert one.cache is not None
    one.cache.attach("s3://silent/caches", seconds=0.5)
    began = time.monotonic()
    assert one.start(PROMPT).prefilled_tokens == 600
    assert time.monotonic() - began < 30  # not what boto waits: minutes
    assert "took longer than 0.5 s" in caplog.text
    caplog.clear()
    other = runner(tmp_path / "two")
    assert other.cache is not None
    other.cache.attach("s3://silent/caches", seconds=600.0)
    before = threading.active_count()
    assert other.start(PROMPT).prefilled_tokens == 600  # it is known: nobody asks again
    assert threading.active_count() == before
    assert not caplog.text


def test_a_process_does_not_wait_at_its_end_for_a_remote_that_says_nothing(
    tmp_path: Path, dead_end: int
) -> None:
    model = tiny.on_disk(tmp_path / "model")
    told = {"AWS_ENDPOINT_URL": f"http://{servers.HOST}:{dead_end}", "AWS_ACCESS_KEY_ID": "me"}
    process = processes.start(
        "generate", "-m", model, "-p", "The cat sat on the mat. " * 8, "-n", "2",
        "--remote", "s3://silent/caches", "--remote-seconds", "3",
        **told, AWS_SECRET_ACCESS_KEY="secret", XDG_CACHE_HOME=str(tmp_path / "user"),
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=40)  # not what boto waits: minutes
    finally:
        process.kill()
        process.communicate()
    assert (process.returncode, bool(out)) == (0, True)
    assert "took longer than 3.0 s" in err


def test_an_error_in_one_of_many_is_raised_at_once(tmp_path: Path) -> None:
    release, begun = threading.Event(), threading.Event()

    def does(item: int) -> int:
        if item:
            begun.set()
            release.wait()
            return item
        begun.wait()
        raise RemoteError("no")

    remote = Remote(f"file://{tmp_path}", "f" * 32)
    with pytest.raises(RemoteError, match="no"):
        remote.each(does, [0, 1])
    release.set()
    assert remote.each(str, range(100)) == [str(i) for i in range(100)]


def test_a_remote_that_cannot_be_had_is_a_notice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = runner(tmp_path / "one")
    assert one.cache is not None
    one.cache.attach(f"sftp://me:sesame@{servers.HOST}:1/caches")
    assert one.start(PROMPT).prefilled_tokens == 600
    assert "cannot be reached" in caplog.text
    assert "sesame" not in caplog.text
    assert "sftp://me@127.0.0.1:1/caches" in places.remotes_memo().read_text()
    assert "sesame" not in places.remotes_memo().read_text()
    assert one.cache.supply is not None
    one.cache.supply._rates.note_read(1 << 24, 1.0)
    assert "sftp://me@127.0.0.1:1/caches" in places.rates_memo().read_text()
    assert "sesame" not in places.rates_memo().read_text()


def test_whatever_a_remote_makes_of_it_a_prompt_gets_its_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def files_of(*_: Any) -> list[RemoteFile]:
        raise MemoryError("a long list")

    monkeypatch.setattr(Remote, "files", files_of)
    one = runner(tmp_path / "one")
    assert one.cache is not None
    one.cache.attach(f"file://{tmp_path}/shared")
    run = one.start(PROMPT)
    assert run.prefilled_tokens == 600
    assert "cannot be used: MemoryError: a long list: it is let be for a minute" in caplog.text
    caplog.clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another user"))
    one.cache.keep(run.prompt_state())
    assert one.cache.supply is not None
    one.cache.supply.close()
    assert "cannot be used: MemoryError: a long list: it is let be for a minute" in caplog.text


def test_what_never_came_whole_is_forgotten_by_who_never_pulls(tmp_path: Path) -> None:
    saved(tmp_path / "one")
    cache(tmp_path / "one").sharing(f"file://{tmp_path}/shared").push()
    places.incoming().mkdir(parents=True)
    old, young = places.incoming() / "old", places.incoming() / "young"
    for part in (old, young):
        part.write_bytes(b"a part")
    os.utime(old, (0, 0))
    two = runner(tmp_path / "two")
    assert two.cache is not None
    two.cache.attach(f"file://{tmp_path}/shared")
    assert two.start(PROMPT).prefilled_tokens == 0
    assert files(places.incoming()) == [young]


def test_a_remote_that_is_still_at_it_is_not_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a server would have a thread more for each minute that a remote says nothing."""
    asked: list[Any] = []
    done = threading.Event()

    def files_of(*arguments: Any) -> list[RemoteFile]:
        asked.append(arguments)
        done.wait()
        return []

    monkeypatch.setattr(Remote, "files", files_of)
    monkeypatch.setattr("mlx_promptcache.supply.LET_BE_SECONDS", 0.0)
    one = runner(tmp_path / "one")
    assert one.cache is not None
    one.cache.attach(f"file://{tmp_path}/shared", seconds=0.2)
    for _ in range(2):
        assert one.start(PROMPT).prefilled_tokens == 600
    done.set()
    assert len(asked) == 2  # blocks and snapshots, once


def test_what_is_kept_after_a_failure_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def files_of(*_: Any) -> list[RemoteFile]:
        raise RemoteError("not today")

    monkeypatch.setattr("mlx_promptcache.supply.LET_BE_SECONDS", 0.0)
    one = runner(tmp_path / "one")
    assert one.cache is not None
    one.cache.attach(f"file://{tmp_path}/shared")
    supply = one.cache.supply
    assert supply is not None
    with monkeypatch.context() as patch:
        patch.setattr(Remote, "files", files_of)
        one.cache.save("first", one.prefill(PROMPT[:20]))
        while supply._sender is not None and supply._sender.is_alive():
            time.sleep(0.01)
        supply.close()
    one.cache.save("second", one.prefill(PROMPT[20:40]))
    supply.close()
    assert len(snapshots(tmp_path / "shared")) == 1


def test_a_read_only_cache_sends_nothing(tmp_path: Path) -> None:
    saved(tmp_path / "one")
    one = Runner(tiny.plain(), None, cache=PromptCache(tmp_path / "one", "plain", read_only=True))
    assert one.cache is not None
    one.cache.attach(f"file://{tmp_path}/shared")
    one.start(PROMPT)
    assert one.cache.supply is not None
    one.cache.supply.close()
    assert not (tmp_path / "shared").exists()


# On the Hub

HUB = """
import sys; sys.path.insert(0, sys.argv[1])
import json, pathlib, tiny
from mlx_promptcache import PromptCache, Runner
directory, url = pathlib.Path(sys.argv[2]), "hf://datasets/team/caches/states"
cache = PromptCache(directory / "one", "plain")
run = Runner(tiny.plain(), None, cache=cache)
cache.save("few-shot", run.prefill(tiny.random_tokens(600, seed=1)))
sent = [cache.sharing(url).push().files for _ in range(2)]
two = PromptCache(directory / "two", "plain")
names = two.sharing(url).pull().names
same = tiny.digest(two.load("few-shot")) == tiny.digest(cache.load("few-shot"))
print(json.dumps([sent, names, same]))
"""


def test_states_go_to_the_hub_in_few_commits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its real client, and a stand-in for its API."""
    with servers.serving("hub", tmp_path) as port:
        monkeypatch.setenv("HF_ENDPOINT", f"http://{servers.HOST}:{port}")
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        tests = str(Path(__file__).parent)
        told = processes.python(HUB, tests, tmp_path, HF_HUB_OFFLINE="0")
    assert told == [[4, 0], ["few-shot"], True]
    assert (tmp_path / "commits").read_text().split() == ["3", "1", "1"]  # blocks, snapshot, name


# On the command line


def test_the_command_line_shares(tmp_path: Path) -> None:
    model = tiny.on_disk(tmp_path / "model")
    prompt = "The cat sat on the mat, and the dog sat on the cat. " * 8
    remote, url = ("--remote", f"file://{tmp_path}/shared"), f"file://{tmp_path}/shared"

    def run(command: str, *arguments: str, store: str) -> processes.Ended:
        place = ("-m", model, "--cache-dir", tmp_path / store)
        return processes.run(
            command, *arguments, *place, XDG_CACHE_HOME=str(tmp_path / f"{store} user")
        )

    first = run("save", "shots", "-p", prompt, *remote, "--json", store="one").json
    assert first["prefilled_tokens"] > 100
    answer = run(
        "generate", "-p", f"{prompt} More?", "-n", "3", *remote, "--json", store="two"
    ).json
    assert answer["cached_tokens"] >= first["tokens"] - 1
    assert run("pull", url, "shots", "--json", store="two").json["names"] == ["shots"]
    again = run("push", url, "--json", store="two").json
    assert (again["files"], again["names"]) == (0, ["shots"])
    missing = run("pull", url, "nothing", store="two")
    assert (missing.code, missing.err.count("\n")) == (1, 1)
    assert "there is no state named 'nothing' at file://" in missing.err
    nowhere = run("push", "nonsense://x", store="two")
    assert (nowhere.code, nowhere.err.count("\n")) == (1, 1)


def test_a_mistyped_place_ends_a_pull_with_a_sentence(tmp_path: Path) -> None:
    place = ("-m", tiny.on_disk(tmp_path / "model"), "--cache-dir", tmp_path / "store")
    ended = processes.run("pull", f"file://{tmp_path}/nowhere", *place)
    assert (ended.code, ended.out, ended.err.count("\n")) == (1, "", 1)
    assert "there are no states of any model at file://" in ended.err


@pytest.mark.parametrize(
    "words",
    [
        ("push", ""),
        ("pull", " "),
        ("save", "few-shot", "-p", "The cat", "--remote", ""),
        ("serve", "--port", "99999", "--remote", ""),  # no port: it ends in any case
    ],
    ids=lambda words: words[0],
)
def test_an_empty_url_is_no_place(words: tuple[str, ...], tmp_path: Path) -> None:
    """It is a variable of a shell that is not set."""
    place = ("-m", tiny.on_disk(tmp_path / "model"), "--cache-dir", tmp_path / "store")
    with pytest.MonkeyPatch.context() as patch:
        (tmp_path / "here").mkdir()
        patch.chdir(tmp_path / "here")
        ended = processes.run(*words, *place)
    assert (ended.code, ended.out) == (2, "")
    assert "the URL is empty" in ended.err.splitlines()[-1]
    assert not files(tmp_path / "here")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://bucket/a", "s3://bucket/a"),
        ("sftp://me:sesame@host:22/a", "sftp://me@host:22/a"),
        ("https://host/a?token=sesame", "https://host/a"),
        ("simplecache::sftp://me:sesame@[::1]:22/a", "simplecache::sftp://me@[::1]:22/a"),
    ],
)
def test_a_url_is_shown_without_what_is_secret(url: str, shown: str) -> None:
    assert without_password(url) == shown
    assert "sesame" not in repr(Remote(url, "f" * 32))
