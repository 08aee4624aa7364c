"""A place that several machines share, by its URL: a directory, a bucket, a repository.

    <url>/<fingerprint>/
      blocks/3f/<K(a)>-<first token>-<K(b)>-<variant>[.<signature>].safetensors
      snapshots/9a/<K(g)>-<n - g>-<K(n)>-<id>[.<signature>].safetensors
      names/<name>             two lines: the stem of a snapshot, and the signature of that or none

The files are those of a store, byte for byte. A block has the name of its variant always, which is
made of its digest: so whoever sees a name knows the content, two machines that add at once write
the same bytes or different names, and a list of names is enough to know what is missing. Nothing
here believes what it reads.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import queue
import re
import threading
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit, urlunsplit

from mlx_promptcache.errors import RemoteError, StoreError
from mlx_promptcache.files import STEM, SUFFIX, TEMPORARY
from mlx_promptcache.names import NAMES, check_name
from mlx_promptcache.signatures import is_signature

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

log = logging.getLogger("mlx_promptcache")

# Where a file appears whole or not at all whoever writes it, and moving is copying.
OBJECT_STORES = {
    "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss", "hf", "memory",
}  # fmt: skip
IN_THREADS = {"file", "local", "memory", "hf"}  # beside those that are made for many requests
THREADS = 8
PIECE_BYTES = 1 << 22
LARGEST_NAME_FILE_BYTES = 1024
FINGERPRINT = re.compile("/[0-9a-f]{32}/?$")
CHAIN = re.compile(r"::(?=[\w+.-]+://)")


class RemoteFile(NamedTuple):
    """A file of a remote: its stem, who vouches for it, its size in bytes, and where it is."""

    stem: str
    signature: str | None
    size: int
    path: str


class Remote:
    """The files of one fingerprint at one URL. Making the object touches nothing.

    Every method raises RemoteError if the remote cannot be reached or refuses.
    """

    def __init__(self, url: str, fingerprint: str) -> None:
        self.url, self.shown = url, without_password(url)
        self._fingerprint = fingerprint
        self._opened: tuple[Any, str] | None = None

    def __repr__(self) -> str:
        return f"Remote({self.shown!r})"

    @property
    def noted_as(self) -> str:
        """What stands for the URL in files: nothing in it is secret."""
        return f"{self.shown} {hashlib.sha256(self.url.encode()).hexdigest()[:16]}"

    def _fs(self) -> tuple[Any, str]:
        """The file system, and the directory in it."""
        if self._opened is None:
            with self._told():
                from fsspec.core import url_to_fs  # type: ignore[import-untyped]

                fs, root = url_to_fs(self.url)
                self._opened = fs, f"{root.rstrip('/')}/{self._fingerprint}"
        return self._opened

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except RemoteError:
            raise
        except ImportError as exc:
            raise RemoteError(f"{self.shown} needs a package that is not here: {exc}") from exc
        except Exception as exc:  # each file system raises what it likes
            said = (str(exc).strip().splitlines() or [""])[0][:200]
            raise RemoteError(
                f"{self.shown} cannot be reached: {type(exc).__name__}: {said}"
            ) from exc

    @property
    def _protocols(self) -> set[str]:
        """What the file system is called in URLs."""
        protocol = self._fs()[0].protocol
        return {protocol} if isinstance(protocol, str) else set(protocol)

    @property
    def _moves(self) -> bool:
        """Whether a file is written under another name first, and moved when it is whole."""
        return not self._protocols & OBJECT_STORES

    # What is there

    def files(self, kind: str, shards: Iterable[str] | None = None) -> list[RemoteFile]:
        """The files of a kind: all of them, or those in these directories."""
        wanted = None if shards is None else sorted(set(shards))
        fs, root = self._fs()
        place = f"{root}/{kind}"
        if wanted is None:
            listed = self._listed(fs.find, place, detail=True)
            rows = list(listed.values()) if isinstance(listed, dict) else listed
        else:
            rows = [
                row
                for part in self.each(
                    lambda shard: self._listed(fs.ls, f"{place}/{shard}", detail=True), wanted
                )
                for row in part
            ]
        found = [_file(row) for row in rows if row.get("type") == "file"]
        return [
            file
            for file in found
            if file is not None and (wanted is None or file.stem[:2] in wanted)
        ]

    def _listed(self, lists: Any, place: str, **options: Any) -> Any:
        with self._told():
            self._fs()[0].invalidate_cache(place)  # others write, too
            try:
                return lists(place, **options)
            except FileNotFoundError:
                return []

    def has_models(self) -> bool:
        """Whether there are states of any model."""
        fs, root = self._fs()
        rows = self._listed(fs.ls, root.rpartition("/")[0], detail=True)
        return any(FINGERPRINT.search(str(row["name"])) for row in rows)

    def names(self) -> dict[str, tuple[str, str | None]]:
        """Every name, the stem that it stands for, and the signature of that."""
        fs, root = self._fs()
        rows = self._listed(fs.ls, f"{root}/{NAMES}", detail=True)
        paths = [row["name"] for row in rows if row.get("type") == "file"]
        read = self.each(lambda path: (path, self._name(path)), paths)
        return {path.rpartition("/")[2]: told for path, told in read if told is not None}

    def name(self, name: str) -> tuple[str, str | None] | None:
        """What a name stands for; None if there is no such name."""
        return self._name(f"{self._fs()[1]}/{NAMES}/{check_name(name)}")

    def _name(self, path: str) -> tuple[str, str | None] | None:
        with contextlib.suppress(StoreError), self._told():
            check_name(path.rpartition("/")[2])
            try:
                data = self._fs()[0].cat_file(path, start=0, end=LARGEST_NAME_FILE_BYTES)
            except FileNotFoundError:
                return None
            stem, *more = data.decode("ascii", "replace").splitlines() or [""]
            if STEM.fullmatch(stem):
                return stem, next(filter(is_signature, more), None)
        return None

    # From there

    def read(self, path: str, offset: int, size: int) -> Iterator[bytes]:
        """The bytes of a file from `offset` to `size`, in pieces."""
        fs = self._fs()[0]
        while offset < size:
            with self._told():
                piece = fs.cat_file(path, start=offset, end=min(size, offset + PIECE_BYTES))
            if not piece:
                return
            yield piece
            offset += len(piece)

    # To there

    def write(self, kind: str, stem: str, signature: str | None, data: bytes) -> None:
        """Write a file that is not there, whole or not at all."""
        end = f".{signature}{SUFFIX}" if signature else SUFFIX
        self._write(f"{kind}/{stem}{end}", data)

    def flush(self) -> None:
        """Return when all that was written is there."""

    def write_name(self, name: str, stem: str, signature: str | None) -> None:
        """Let a name stand for a stem, whatever it stood for."""
        text = f"{stem}\n{signature or ''}\n"
        self._write(f"{NAMES}/{check_name(name)}", text.encode())

    def _write(self, path: str, data: bytes) -> None:
        fs, root = self._fs()
        target = f"{root}/{path}"
        with self._told():
            if not self._moves:
                fs.pipe_file(target, data)
                return
            directory = target.rpartition("/")[0]
            self._make(directory)
            temporary = f"{directory}/{TEMPORARY}{os.urandom(8).hex()}"
            try:
                fs.pipe_file(temporary, data)
                fs.mv(temporary, target)
            except BaseException:
                with contextlib.suppress(Exception):
                    fs.rm_file(temporary)
                raise

    def _make(self, directory: str) -> None:
        """Make a directory and those above it, while others may make the same ones: some file
        systems look first, and then fail.
        """
        fs = self._fs()[0]
        for rest in range(directory.count("/"), -1, -1):  # each may be made by another meanwhile
            try:
                fs.makedirs(directory, exist_ok=True)
            except OSError:
                if fs.isdir(directory):
                    return
                if not rest:
                    raise
            else:
                return

    def each(self, does: Any, items: Sequence[Any]) -> list[Any]:
        """Do the same with many things, some at once where that can be. The first error ends it."""
        if len(items) < 2 or not self._takes_threads:
            return [does(item) for item in items]
        return _at_once(does, items)

    @property
    def _takes_threads(self) -> bool:
        """Whether several threads may ask at once: others, as SFTP, have one connection, on which
        they may wait for each other without end.
        """
        return bool(self._fs()[0].async_impl or self._protocols & IN_THREADS)


def _at_once(does: Any, items: Sequence[Any]) -> list[Any]:
    """What comes of each of these, in threads; the first error is raised.

    A server may keep a thread waiting for minutes. Neither an error nor Ctrl-C nor the end of the
    process waits for that, as it would for the threads of a ThreadPoolExecutor.
    """
    todo, done = queue.SimpleQueue[tuple[int, Any]](), queue.SimpleQueue[tuple[int, Any, Any]]()
    for each in enumerate(items):
        todo.put(each)
    over = threading.Event()

    def work() -> None:
        while not (over.is_set() or todo.empty()):
            with contextlib.suppress(queue.Empty):  # another thread took the last one
                number, item = todo.get_nowait()
                done.put((number, *_outcome(does, item)))

    for _ in range(min(THREADS, len(items))):
        threading.Thread(target=work, daemon=True).start()
    found: dict[int, Any] = {}
    try:
        while len(found) < len(items):
            number, value, error = done.get()
            if error is not None:
                raise error
            found[number] = value
    finally:
        over.set()
    return [found[number] for number in range(len(items))]


def _outcome(does: Any, item: Any) -> tuple[Any, BaseException | None]:
    try:
        return does(item), None
    except BaseException as exc:  # noqa: BLE001 - it is raised where it is waited for
        return None, exc


def _file(row: dict[str, Any]) -> RemoteFile | None:
    """A file of a listing; None if it is none of ours."""
    path, size = str(row["name"]), row.get("size")
    shard, _, name = path.rpartition("/")
    if not name.endswith(SUFFIX) or type(size) is not int:
        return None
    own, _, signature = name[: -len(SUFFIX)].partition(".")
    stem = f"{shard.rpartition('/')[2]}/{own}"
    if not STEM.fullmatch(stem) or (signature and not is_signature(signature)):
        return None
    return RemoteFile(stem, signature or None, size, path)


def without_password(url: str) -> str:
    """A URL as it may be shown; it may be one that goes through others, as `simplecache::`."""
    return "::".join(map(_without_password, CHAIN.split(url)))


def _without_password(url: str) -> str:
    try:
        parts = urlsplit(url)
    except ValueError:
        return "the remote"
    user, at, host = parts.netloc.rpartition("@")
    return urlunsplit(parts._replace(netloc=f"{user.partition(':')[0]}{at}{host}", query=""))


def by_stem(files: Iterable[RemoteFile]) -> dict[str, list[RemoteFile]]:
    """Files by their stems: other people sign the same file, too."""
    found: dict[str, list[RemoteFile]] = {}
    for file in files:
        found.setdefault(file.stem, []).append(file)
    return found
