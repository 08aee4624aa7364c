"""The store: whole files or none, never written twice, for their owner alone."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import processes
from mlx_promptcache import files as files_module
from mlx_promptcache import locks
from mlx_promptcache import store as store_module
from mlx_promptcache.container import Array, pack, read_array
from mlx_promptcache.errors import CacheLocked, CacheMiss, DamagedFile, PromptCacheError, StoreError
from mlx_promptcache.locks import LOCK, LOCK_FILES
from mlx_promptcache.names import LONGEST_NAME_BYTES, NAMES, check_name
from mlx_promptcache.store import BLOCKS, OURS, QUARANTINE, SNAPSHOTS, Store
from mlx_promptcache.uses import USES
from shim import Call, Fault, Shim

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlx_promptcache.container import Packed

FIXED = settings(derandomize=True, deadline=None, max_examples=200)
STEM = "3f/3f00-7-9a00"
OTHER = "3f/3f00-8-9a01"
PLACE = "blocks/3f3f7"  # the directory of the block STEM
FILE = f"{PLACE}/3f00-7-9a00.safetensors"
LINUX_ONLY = pytest.mark.skipif(sys.platform != "linux", reason="O_NOATIME is Linux's")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "model" / "prompt_cache")
    made.create()
    return made


def packed(text: str = "first", size: int = 100) -> Packed:
    data = np.random.default_rng(size).bytes(size)  # noise: it is stored as it is
    return pack("block", {"text": text}, {}, {"a": Array("uint8", (size,), data)})


def files(directory: Path) -> list[str]:
    """Every file below a directory, temporary ones included, but the lock."""
    paths = (path for path in directory.rglob("*") if not path.is_dir())
    return sorted(
        path.relative_to(directory).as_posix() for path in paths if path.name not in LOCK_FILES
    )


def one_sentence(error: PromptCacheError) -> bool:
    text = str(error)
    return bool(text) and "\n" not in text and "Errno" not in text and not text.endswith(".")


# Private


def test_every_directory_is_0700_and_every_file_0600_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        store = Store(tmp_path / "prompt_cache")
        store.create()
        store.write(BLOCKS, STEM, packed())
        store.write(SNAPSHOTS, OTHER, packed())
        store.names.write("prefix", OTHER)
        store.uses.note({"what": "x"})
        store.write(BLOCKS, OTHER, packed())
        assert store.quarantine(BLOCKS, OTHER)
    finally:
        os.umask(before)
    modes = {
        path.relative_to(tmp_path).as_posix(): stat.S_IMODE(path.stat().st_mode)
        for path in tmp_path.rglob("*")
    }
    wrong = {
        name: oct(mode)
        for name, mode in modes.items()
        if mode != (0o700 if (tmp_path / name).is_dir() else 0o600)
    }
    assert len(modes) >= 14
    assert wrong == {}


# Write once


def test_what_is_written_is_read(store: Store) -> None:
    assert store.write(BLOCKS, STEM, packed(), sync=True)
    assert store.exists(BLOCKS, STEM)
    assert store.size(BLOCKS, STEM) == packed().size
    assert store.header(BLOCKS, STEM).digest == packed().digest
    with store.reader(BLOCKS, STEM) as reader:
        assert reader.size == packed().size
        array = read_array(reader.read, reader.header().entries["a"])
    assert bytes(array.data) == np.random.default_rng(100).bytes(100)
    assert not store.exists(SNAPSHOTS, STEM)


def test_a_file_stands_where_its_stem_says(store: Store) -> None:
    store.write(BLOCKS, STEM, packed())
    assert store.path(BLOCKS, STEM) == store.directory / FILE
    assert files(store.directory) == [FILE]


def test_the_first_writer_wins_and_the_file_is_not_touched_again(store: Store) -> None:
    assert store.write(BLOCKS, STEM, packed("first")) is True
    path = store.path(BLOCKS, STEM)
    before, content = path.stat(), path.read_bytes()
    assert store.write(BLOCKS, STEM, packed("second"), sync=True) is False
    after = path.stat()
    assert path.read_bytes() == content
    assert (after.st_ino, after.st_mtime_ns, after.st_ctime_ns) == (
        before.st_ino,
        before.st_mtime_ns,
        before.st_ctime_ns,
    )
    assert files(store.directory) == [FILE]


def test_of_writers_that_all_saw_the_name_free_one_wins(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "exists", lambda *_, **__: False)
    barrier = threading.Barrier(6)
    won: list[str] = []

    def write(text: str) -> None:
        barrier.wait()
        if store.write(BLOCKS, STEM, packed(text)):
            won.append(text)

    threads = [threading.Thread(target=write, args=(f"writer {k}",)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.header(BLOCKS, STEM).content == {"text": won[0]}
    assert files(store.directory) == [FILE]


def test_nothing_is_written_where_the_name_is_taken(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write(BLOCKS, STEM, packed())
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda *_: pytest.fail("bytes were written in vain"))
        assert not store.write(BLOCKS, STEM, packed("second"))


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP])
def test_a_file_system_without_hard_links_will_do(
    store: Store, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    assert store.write(BLOCKS, STEM, packed("first"))
    assert not store.write(BLOCKS, STEM, packed("second"))
    exists, seen = Path.exists, []

    def at_first_not(path: Path) -> bool:
        seen.append(path)
        return len(seen) > 1 and exists(path)

    monkeypatch.setattr(Path, "exists", at_first_not)
    assert not store.write(BLOCKS, STEM, packed("third"))
    assert len(seen) == 2
    assert store.header(BLOCKS, STEM).content == {"text": "first"}
    assert files(store.directory) == [FILE]


def test_any_other_error_in_giving_the_name_is_told(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(StoreError, match="cannot write"):
        store.write(BLOCKS, STEM, packed())
    assert files(store.directory) == []


def test_what_was_written_before_can_be_brought_to_the_drive(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    synced: list[os.stat_result] = []
    monkeypatch.setattr(store_module, "sync_file", lambda fd: synced.append(os.fstat(fd)))
    monkeypatch.setattr(store_module, "sync_directory", lambda path: synced.append(path.stat()))
    store.write(BLOCKS, STEM, packed())
    assert synced == []
    store.sync([(BLOCKS, STEM)])
    path = store.path(BLOCKS, STEM)
    wanted = {path, *path.parents}  # whoever made the store may have made some of these
    assert synced[0].st_ino == path.stat().st_ino
    assert {(s.st_dev, s.st_ino) for s in synced} == {
        (p.stat().st_dev, p.stat().st_ino) for p in wanted
    }
    path.rename(tmp_path / "elsewhere")
    with pytest.raises(StoreError) as caught:
        store.sync([(BLOCKS, STEM)])
    assert one_sentence(caught.value)
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError):
        store.sync([(BLOCKS, STEM)])


# What cannot be looked at


@pytest.mark.parametrize("kept", sorted(OURS))
def test_a_power_cut_may_leave_any_part_of_a_new_store(kept: str, store: Store) -> None:
    for path in store.directory.iterdir():
        if path.name != kept:
            path.rmdir() if path.is_dir() else path.unlink()
    (store.directory / kept).touch()
    assert store.check()


@pytest.mark.parametrize(
    ("function", "path"),
    [("listdir", "blocks"), ("listdir", PLACE), ("listdir", "names"), ("scandir", PLACE),
     ("stat", FILE)],
)  # fmt: skip
def test_what_cannot_be_looked_at_is_not_taken_for_empty(
    function: str, path: str, store: Store
) -> None:
    store.write(BLOCKS, STEM, packed())
    with Shim(store.directory, Fault(Call(function, path, 1), errno.EIO)) as shim:
        with pytest.raises(StoreError, match="cannot be read: Input/output error") as caught:
            (store.files(BLOCKS), store.stems(BLOCKS), store.names.all())
        assert one_sentence(caught.value)
        assert (list(store.files(BLOCKS)), store.stems(BLOCKS)) == ([STEM], [STEM])
    assert shim.met


def test_what_is_no_directory_of_ours_is_not_looked_into(store: Store) -> None:
    store.write(BLOCKS, STEM, packed())
    (store.directory / BLOCKS / "lost+found").mkdir()
    with Shim(store.directory) as shim:
        assert store.stems(BLOCKS) == list(store.files(BLOCKS)) == [STEM]
    assert {call.path for call in shim.calls if call.function in {"listdir", "scandir"}} == {
        "blocks", PLACE,
    }  # fmt: skip


def test_a_file_that_cannot_be_asked_for_its_size_is_closed_again(store: Store) -> None:
    store.write(BLOCKS, STEM, packed())
    call = Call("fstat", FILE, 1)
    with Shim(store.directory, Fault(call, errno.EIO)) as shim:
        with pytest.raises(StoreError, match="cannot be read") as caught:
            store.header(BLOCKS, STEM)
        assert one_sentence(caught.value)
    assert shim.open == {}


# A write that fails leaves nothing


@pytest.mark.parametrize("after_bytes", [0, 1, 500])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch, after_bytes: int, number: int
) -> None:
    write, left = os.write, after_bytes

    def full(fd: int, data: memoryview) -> int:
        nonlocal left
        if not left:
            raise OSError(number, os.strerror(number))
        written = write(fd, data[:left])
        left -= written
        return written

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(StoreError) as caught:
            store.write(BLOCKS, STEM, packed(size=5000))
        left = min(after_bytes, 3)
        with pytest.raises(StoreError):
            store.names.write("prefix", STEM)
    assert one_sentence(caught.value)
    assert os.strerror(number) in str(caught.value)
    assert files(store.directory) == []
    assert store.write(BLOCKS, STEM, packed())


def test_writes_that_take_a_few_bytes_at_a_time_come_to_an_end(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: write(fd, data[:7]))
        store.write(BLOCKS, STEM, packed())
    assert store.header(BLOCKS, STEM).digest == packed().digest


def test_a_sync_that_fails_leaves_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(files_module, "sync_file", refuse)
    with pytest.raises(StoreError, match="cannot write"):
        store.write(BLOCKS, STEM, packed(), sync=True)
    assert files(store.directory) == []


LIMITED = """
import json, resource, sys
from mlx_promptcache.container import Array, pack
from mlx_promptcache.errors import StoreError
from mlx_promptcache.store import BLOCKS, Store
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
noise = bytes(range(250)) * 400
packed = pack("block", {"n": list(range(2000))}, {}, {"a": Array("uint8", (100000,), noise)})
try:
    Store(sys.argv[1]).write(BLOCKS, sys.argv[2], packed)
except StoreError as exc:
    print(json.dumps(str(exc)))
"""


def test_a_real_limit_of_the_system_is_one_sentence_and_leaves_nothing(store: Store) -> None:
    said = processes.python(LIMITED, store.directory, STEM)
    wrong = f"cannot write to the store {store.directory}: {os.strerror(errno.EFBIG)}; "
    assert said.startswith(wrong)
    assert files(store.directory) == []


KILLED = """
import os, sys
from mlx_promptcache.container import Array, pack
from mlx_promptcache.store import BLOCKS, Store
write = os.write
def last(fd, data):
    write(fd, data[:100])
    os._exit(7)
os.write = last
Store(sys.argv[1]).write(BLOCKS, sys.argv[2], pack("block", {}, {}, {}))
"""


def test_a_writer_that_is_killed_leaves_no_file_that_is_ever_read(store: Store) -> None:
    command = [sys.executable, "-c", KILLED, str(store.directory), STEM]
    done = subprocess.run(command, env=processes.environment(), check=False, timeout=60)
    assert done.returncode == 7
    assert len(files(store.directory)) == 1
    assert store.stems(BLOCKS) == store.beginning(BLOCKS, "3f/") == []
    assert not store.exists(BLOCKS, STEM)
    assert store.write(BLOCKS, STEM, packed())
    assert store.stems(BLOCKS) == [STEM]


# Reading


def test_what_is_not_there_is_a_miss(store: Store) -> None:
    with pytest.raises(CacheMiss) as caught:
        store.header(BLOCKS, STEM)
    assert not isinstance(caught.value, DamagedFile)
    assert store.size(BLOCKS, STEM) == 0
    assert store.last_use(BLOCKS, STEM) == 0


def test_what_is_damaged_says_so(store: Store) -> None:
    store.write(BLOCKS, STEM, packed())
    store.path(BLOCKS, STEM).write_bytes(b"nothing of ours")
    with pytest.raises(DamagedFile):
        store.header(BLOCKS, STEM)


def test_a_read_ends_where_the_file_ends(store: Store) -> None:
    store.write(BLOCKS, STEM, packed())
    data = store.path(BLOCKS, STEM).read_bytes()
    with store.reader(BLOCKS, STEM) as reader:
        assert reader.read(0, 1 << 60) == data
        assert reader.read(len(data) - 3, 10) == data[-3:]
        assert reader.read(len(data), 1) == reader.read(len(data) + 9, 1) == b""
        assert reader.read(5, 0) == reader.read(5, -1) == b""


def test_a_file_that_is_open_stays_whole_when_it_is_deleted(store: Store) -> None:
    store.write(BLOCKS, STEM, packed())
    with store.reader(BLOCKS, STEM) as reader:
        store.remove(BLOCKS, STEM)
        assert reader.header().digest == packed().digest


def test_a_symbolic_link_in_the_place_of_a_file_is_not_followed(
    store: Store, tmp_path: Path
) -> None:
    store.write(BLOCKS, OTHER, packed())
    elsewhere = tmp_path / "elsewhere.safetensors"
    store.path(BLOCKS, OTHER).rename(elsewhere)
    store.path(BLOCKS, STEM).parent.mkdir()
    store.path(BLOCKS, STEM).symlink_to(elsewhere)
    with pytest.raises(StoreError) as caught:
        store.header(BLOCKS, STEM)
    assert one_sentence(caught.value)


def test_nothing_is_written_through_a_symbolic_link(store: Store, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.safetensors"
    store.path(BLOCKS, STEM).parent.mkdir()
    store.path(BLOCKS, STEM).symlink_to(elsewhere)
    assert store.write(BLOCKS, STEM, packed()) is False
    assert not elsewhere.exists()


def test_a_directory_in_the_place_of_a_file_is_an_error_and_no_traceback(store: Store) -> None:
    store.path(BLOCKS, STEM).mkdir(parents=True)
    with pytest.raises(StoreError) as caught:
        store.header(BLOCKS, STEM)
    assert one_sentence(caught.value)


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(store: Store) -> None:
    path = store.path(BLOCKS, STEM)
    path.parent.mkdir()
    os.mkfifo(path)
    os.mkfifo(store.directory / NAMES / "pipe")
    waited: list[Path] = []

    def write_if_somebody_waits() -> None:
        for pipe in (path, store.directory / NAMES / "pipe"):
            with contextlib.suppress(OSError):
                os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
                waited.append(pipe)

    for read in (lambda: store.header(BLOCKS, STEM), lambda: store.names.read("pipe")):
        timer = threading.Timer(5, write_if_somebody_waits)
        timer.start()
        with pytest.raises(StoreError) as caught:
            read()
        timer.cancel()
        timer.join()
        assert one_sentence(caught.value)
    assert waited == []


BAD_STEMS = [
    "", "/", "3f", "3f/", "3f00-7-9a00", "../model", "../../model", "3f/../model", "3f/../../up",
    "/etc/model", "3f//a", "3f/a/b", "3F/a", "gg/a", "3fa/a", "3f/a b", "3f/a.b", "3f/a\n",
    "3f/a\0", "3f/" + "a" * 201, "..", "./a", "~/a",
]  # fmt: skip


@pytest.mark.parametrize("stem", BAD_STEMS, ids=ascii)
def test_no_stem_leads_out_of_the_store(store: Store, stem: str) -> None:
    """Stems stand in files that may come from anywhere, and files are deleted by them."""
    for use in (store.header, store.size, store.last_use, store.touch, store.remove, store.exists):
        with pytest.raises(DamagedFile, match="a file that no store has"):
            use(BLOCKS, stem)
    assert not store.quarantine(BLOCKS, stem)
    with pytest.raises(DamagedFile):
        store.write(BLOCKS, stem, packed())


# Use


def test_touching_sets_the_time_of_last_use_and_never_the_mtime(store: Store) -> None:
    store.write(BLOCKS, STEM, packed())
    path = store.path(BLOCKS, STEM)
    os.utime(path, (1_000_000_000, 1_100_000_000))
    assert store.last_use(BLOCKS, STEM) == 1_100_000_000
    began = time.time()
    store.touch(BLOCKS, STEM)
    assert path.stat().st_mtime_ns == 1_100_000_000 * 10**9
    assert began - 1 <= store.last_use(BLOCKS, STEM) == path.stat().st_atime <= time.time() + 1


def test_touching_what_is_not_there_is_no_matter(store: Store) -> None:
    store.touch(BLOCKS, STEM)
    assert files(store.directory) == []


@LINUX_ONLY
def test_looking_is_not_using(store: Store) -> None:
    store.write(BLOCKS, STEM, packed())
    path = store.path(BLOCKS, STEM)
    os.utime(path, (1_000_000_000, 1_100_000_000))
    with store.reader(BLOCKS, STEM) as reader:
        header = reader.header()
        read_array(reader.read, header.entries["a"])
    assert path.stat().st_atime == 1_000_000_000
    assert store.last_use(BLOCKS, STEM) == 1_100_000_000


def test_looking_is_not_using_where_the_system_has_no_flag_for_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files_module, "NO_ATIME", 0)
    store.write(BLOCKS, STEM, packed())
    path = store.path(BLOCKS, STEM)
    os.utime(path, (1_000_000_000, 1_100_000_000))
    store.header(BLOCKS, STEM)
    assert (path.stat().st_atime, path.stat().st_mtime) == (1_000_000_000, 1_100_000_000)


def test_uses_are_told_in_order_and_broken_lines_are_passed_over(store: Store) -> None:
    assert list(store.uses.all()) == []
    store.uses.note({"what": "a", "rows": 1})
    with (store.directory / USES).open("ab") as file:
        file.write(b'not json\n[1]\n7\n\n\xff\xfe\n"text"\n' + b"[" * 100_000 + b"\n")
        file.write(b"9" * 5000 + b"\nnull\n")
    store.uses.note({"what": "b", "text": "Grüße\n"})
    assert list(store.uses.all()) == [{"what": "a", "rows": 1}, {"what": "b", "text": "Grüße\n"}]


def test_the_rows_of_the_last_use_are_known(store: Store) -> None:
    assert store.uses.last_rows() is None
    store.uses.note({"wrote": 7})
    assert store.uses.last_rows() is None
    for rows in (1, 500):
        store.uses.note({"what": "a", "rows": rows})
    store.uses.note({"wrote": 7})
    assert store.uses.last_rows() == 500
    with (store.directory / USES).open("ab") as file:
        file.write(b'{"rows": "9"}\n{"rows": true}\n{"rows": 9.5}\n[9]\n9\n{"rows": 9')
    assert store.uses.last_rows() == 500
    store.uses.note({"wrote": 7})
    store.uses.note({"rows": -3})
    assert store.uses.last_rows() == 0
    for _ in range(300):
        store.uses.note({"what": 32 * "a"})
    assert store.uses.last_rows() is None  # long ago


def test_a_line_that_was_torn_off_costs_at_most_the_one_after_it(store: Store) -> None:
    store.uses.note({"what": "a"})
    with (store.directory / USES).open("ab") as file:
        file.write(b'{"what": "tor')
    store.uses.note({"what": "b"})
    store.uses.note({"what": "c"})
    assert [use["what"] for use in store.uses.all() if use["what"] != "b"] == ["a", "c"]


def test_a_use_that_cannot_be_recorded_is_no_matter(tmp_path: Path) -> None:
    Store(tmp_path / "missing").uses.note({"what": "a"})
    assert not (tmp_path / "missing").exists()


# Deleting


def test_what_is_removed_is_gone_and_its_bytes_are_told(store: Store) -> None:
    store.write(BLOCKS, STEM, packed())
    store.write(BLOCKS, OTHER, packed())
    assert store.remove(BLOCKS, STEM) == packed().size
    assert store.stems(BLOCKS) == [OTHER]
    assert store.remove(BLOCKS, STEM) == 0
    store.remove(BLOCKS, OTHER)
    assert list((store.directory / BLOCKS).iterdir()) == []


def test_what_is_set_aside_leaves_its_name_to_the_next(store: Store) -> None:
    for text in ("first", "second"):
        assert store.write(BLOCKS, STEM, packed(text))
        assert store.quarantine(BLOCKS, STEM)
        assert not store.exists(BLOCKS, STEM)
    assert store.stems(BLOCKS) == []
    assert len(files(store.directory / QUARANTINE)) == 2
    assert not store.quarantine(BLOCKS, STEM)


def test_traces_are_what_is_no_state(store: Store) -> None:
    store.write(BLOCKS, STEM, packed())
    store.names.write("prefix", STEM)
    store.write(BLOCKS, OTHER, packed())
    store.quarantine(BLOCKS, OTHER)
    store.uses.note({"what": "a"})
    (store.path(BLOCKS, STEM).parent / ".tmp-7-ab").write_bytes(b"half")
    (store.directory / NAMES / ".tmp-7-ab").write_bytes(b"half")
    store.clear_traces()
    assert files(store.directory) == [FILE, "names/prefix"]
    assert not (store.directory / QUARANTINE).exists()
    store.clear_traces()


# Names

GOOD_NAMES = ["a", "prefix", "A b.c_d-e", "7", "Grüße", "日本語", "x" * LONGEST_NAME_BYTES]
BAD_NAMES = [
    "", ".", "..", "...", ".hidden", "-", "-rf", "--all",
    "/", "/etc/passwd", "a/b", "../up", "a/..", "a\\b", "..\\up", "C:",
    "a\nb", "a\0b", "a\tb", "\x7f", "\u200b", "\u2028", "\ud800",
    "*", "a?", "<a>", "a|b", '"',
    "x" * (LONGEST_NAME_BYTES + 1), "é" * (LONGEST_NAME_BYTES // 2 + 1),
]  # fmt: skip


@pytest.mark.parametrize("name", GOOD_NAMES)
def test_a_good_name_stands_for_its_stem(store: Store, name: str) -> None:
    store.names.write(name, STEM, sync=True)
    assert store.names.read(name) == STEM
    assert store.names.all() == {name: STEM}
    store.names.remove(name)
    store.names.remove(name)
    assert store.names.all() == {}


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_a_bad_name_is_refused_before_anything_is_touched(store: Store, name: str) -> None:
    for use in (check_name, store.names.read, store.names.remove):
        with pytest.raises(StoreError, match="cannot be a name"):
            use(name)
    with pytest.raises(StoreError, match="cannot be a name"):
        store.names.write(name, STEM)
    assert files(store.directory) == []


@FIXED
@given(st.text(max_size=12) | st.text("./\\-a\n\0é ", max_size=6))
def test_whatever_is_taken_as_a_name_is_one_file_of_the_directory(name: str) -> None:
    try:
        checked = check_name(name)
    except StoreError:
        return
    directory = Path("names")
    assert checked == unicodedata.normalize("NFC", name) == check_name(checked)
    assert (directory / checked).parent == directory
    assert os.path.normpath(directory / checked) == str(directory / checked)
    assert not checked.startswith((".", "-"))


def test_one_name_may_be_written_in_two_ways(store: Store) -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    store.names.write(decomposed, STEM)
    assert store.names.read(composed) == store.names.read(decomposed) == STEM
    assert store.names.all() == {composed: STEM}
    store.names.remove(decomposed)
    assert store.names.all() == {}


def test_a_name_may_stand_for_another_state_later(store: Store) -> None:
    store.names.write("prefix", STEM)
    store.names.write("prefix", OTHER)
    assert store.names.read("prefix") == OTHER
    assert files(store.directory) == ["names/prefix"]


def test_a_name_that_is_not_there_is_a_miss_that_says_what_to_do(store: Store) -> None:
    with pytest.raises(CacheMiss, match=r"no state named 'prefix'; `list` shows") as caught:
        store.names.read("prefix")
    assert not isinstance(caught.value, DamagedFile)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"\xff\xfe",
        b"../../up\n",
        b"3f-9a",
        b"3F-7-9A\n",
        b"3f-7\n9a",
        b"a" * 300,
        STEM.encode(),
        STEM.encode() + b"\n\n",
    ],
)
def test_a_name_whose_file_is_damaged_says_so(store: Store, content: bytes) -> None:
    store.names.write("sound", STEM)
    (store.directory / NAMES / "prefix").write_bytes(content)
    with pytest.raises(DamagedFile, match="the name 'prefix' is damaged"):
        store.names.read("prefix")
    assert store.names.all() == {"prefix": "", "sound": STEM}


def test_foreign_files_among_the_names_are_listed_as_lost_or_not_at_all(store: Store) -> None:
    for foreign in (".tmp-1-ab", ".DS_Store", "-x", "a:b"):
        (store.directory / NAMES / foreign).write_bytes(b"half")
    (store.directory / NAMES / "directory").mkdir()
    assert store.names.all() == {"directory": ""}


# Lists


def test_foreign_files_are_not_stems(store: Store) -> None:
    store.write(BLOCKS, STEM, packed())
    shard = store.path(BLOCKS, STEM).parent
    foreign = (
        ".DS_Store",
        ".tmp-17-00ab",
        "README",
        "3f00-8-9a01.json",
        "3f00-7",
        "GG.safetensors",
        "._x.safetensors",
    )
    for name in foreign:
        (shard / name).write_bytes(b"x")
    (store.directory / BLOCKS / "9a").write_bytes(b"a file, not a directory")
    (store.directory / BLOCKS / ".DS_Store").write_bytes(b"x")
    (store.directory / BLOCKS / "long").mkdir()
    (store.directory / BLOCKS / "long" / "long.safetensors").write_bytes(b"x")
    assert store.stems(BLOCKS) == [STEM]
    assert store.stems(SNAPSHOTS) == []
    assert store.beginning(BLOCKS, "3f/3f00-7-") == [STEM]
    assert store.beginning(BLOCKS, "9a/9a-7-") == store.beginning(BLOCKS, "00/") == []


def test_beginning_finds_those_that_begin_so_in_order(store: Store) -> None:
    names = ["3f00-23-9a00", "3f00-7-9a00", "3f00-7-9a01", "3f00-70-9a00", "3f01-7-9a00"]
    stems = [*(f"3f/{name}" for name in names), "40/4000-7-9a00"]
    for stem in reversed(stems):
        for kind in (BLOCKS, SNAPSHOTS):
            store.write(kind, stem, packed())
    assert store.stems(BLOCKS) == store.stems(SNAPSHOTS) == stems
    assert store.beginning(BLOCKS, "3f/3f00-7-") == stems[1:3]
    assert store.beginning(SNAPSHOTS, "3f/") == stems[:5]
    assert store.beginning(SNAPSHOTS, "3f/3f00-") == stems[:4]
    assert store.beginning(SNAPSHOTS, "3f/3f00-7-9a00") == stems[1:2]


# What is a store


def test_a_store_that_is_not_there_is_no_store_and_no_error(tmp_path: Path) -> None:
    store = Store(tmp_path / "missing")
    assert store.check() is False
    assert store.stems(BLOCKS) == []
    assert store.names.all() == {}
    with store.shared(), store.exclusive():
        assert not store.directory.exists()


def test_an_empty_directory_may_become_a_store(tmp_path: Path) -> None:
    assert Store(tmp_path).check() is False
    tmp_path.chmod(0o755)
    Store(tmp_path).create()
    assert Store(tmp_path).check() is True
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700
    Store(tmp_path).create()


@pytest.mark.parametrize("half", [LOCK, USES, BLOCKS, SNAPSHOTS])
def test_a_store_of_which_only_a_part_is_left_is_a_store(tmp_path: Path, half: str) -> None:
    store = Store(tmp_path / "store")
    store.create()
    (store.directory / USES).touch()
    for path in store.directory.iterdir():
        if path.name != half:
            path.rmdir() if path.is_dir() else path.unlink()
    assert store.check() is True


def test_a_directory_of_other_things_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(StoreError, match="is not a store of prompt caches") as caught:
        Store(tmp_path).check()
    assert one_sentence(caught.value)


def test_no_store_is_made_in_a_directory_of_other_things(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(StoreError, match="is not a store of prompt caches"):
        Store(tmp_path).create()
    assert files(tmp_path) == ["thesis.tex"]
    assert not (tmp_path / BLOCKS).exists()


def test_a_file_is_no_store(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("mine")
    with pytest.raises(StoreError, match="is a file") as caught:
        Store(path).check()
    assert one_sentence(caught.value)
    with pytest.raises(StoreError) as caught:
        Store(path).create()
    assert one_sentence(caught.value)
    assert path.read_text() == "mine"


def test_a_store_that_is_copied_elsewhere_is_the_same_store(store: Store, tmp_path: Path) -> None:
    store.write(BLOCKS, STEM, packed())
    store.write(SNAPSHOTS, OTHER, packed("snapshot"))
    store.names.write("prefix", OTHER)
    copied = Store(tmp_path / "elsewhere")
    shutil.copytree(store.directory, copied.directory)
    shutil.rmtree(store.directory)
    assert copied.check()
    assert copied.names.all() == {"prefix": OTHER}
    assert copied.header(SNAPSHOTS, OTHER).content == {"text": "snapshot"}
    assert copied.stems(BLOCKS) == [STEM]
    (copied.directory / LOCK).unlink()
    with copied.shared():
        assert copied.header(BLOCKS, STEM).digest == packed().digest
    with copied.exclusive():
        assert (copied.directory / LOCK).is_file()
        assert stat.S_IMODE((copied.directory / LOCK).stat().st_mode) == 0o600


# Locks, between processes

HOLDING = """
import sys
from mlx_promptcache.store import Store
with getattr(Store(sys.argv[1]), sys.argv[2])():
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def held_elsewhere(store: Store, how: str) -> Iterator[subprocess.Popen[str]]:
    """Another process holds the store's lock, until the end or until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(store.directory), how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=processes.environment(),
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()
        process.wait(timeout=60)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "LOCK_SECONDS", 0.05)


@pytest.mark.usefixtures("impatient")
def test_readers_and_writers_share_the_lock_and_who_deletes_waits(store: Store) -> None:
    with held_elsewhere(store, "shared"):
        with store.shared():
            assert store.write(BLOCKS, STEM, packed())
        with pytest.raises(CacheLocked), store.exclusive():
            pytest.fail("two processes hold what only one may hold")
    with store.exclusive():
        assert store.remove(BLOCKS, STEM)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("how", ["shared", "exclusive"])
def test_who_deletes_is_alone(store: Store, how: str) -> None:
    with (
        held_elsewhere(store, "exclusive"),
        pytest.raises(CacheLocked, match="in use by another process; try again") as caught,
        getattr(store, how)(),
    ):
        pytest.fail("two processes hold what only one may hold")
    assert one_sentence(caught.value)
    with getattr(store, how)():
        pass


@pytest.mark.usefixtures("impatient")
def test_the_lock_of_a_process_that_was_killed_is_free(store: Store) -> None:
    with held_elsewhere(store, "exclusive") as process:
        process.kill()
        process.wait(timeout=60)
        with store.exclusive():
            pass


def test_who_waits_long_enough_gets_the_lock(store: Store) -> None:
    with held_elsewhere(store, "exclusive") as process:
        assert process.stdin is not None
        timer = threading.Timer(0.2, process.stdin.close)
        timer.start()
        began = time.monotonic()
        with store.exclusive():
            assert time.monotonic() - began > 0.1
        timer.join()


def test_the_lock_is_given_back_when_something_goes_wrong(store: Store) -> None:
    with pytest.raises(ZeroDivisionError), store.exclusive():
        raise ZeroDivisionError
    with held_elsewhere(store, "exclusive"):
        pass


def test_what_goes_wrong_without_a_lock_file_is_told_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(CacheMiss) as caught, Store(tmp_path / "missing").shared():
        raise CacheMiss("no such name")
    assert caught.value.__context__ is None


def test_statistics_are_one_object_a_line(store: Store) -> None:
    for k in range(3):
        store.uses.note({"k": k})
    lines = (store.directory / USES).read_text("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"k": 0}, {"k": 1}, {"k": 2}]
