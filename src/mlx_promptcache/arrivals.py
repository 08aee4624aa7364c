"""Files that come from elsewhere: fetched, checked, and added to a store as a save adds them.

What was fetched of a file that did not come whole waits in the user's cache directory, and the rest
is fetched the next time. Nothing is believed of a file: its checksums, its name, its tokens, the
model that computed it and, where a store asks for that, who signed it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import time
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from mlx_promptcache import container, cuts, headers, places, room
from mlx_promptcache.container import Header, Packed
from mlx_promptcache.errors import CacheMiss, DamagedFile, PromptCacheError, SignatureError
from mlx_promptcache.passes import record_of
from mlx_promptcache.store import BLOCKS, SNAPSHOTS
from mlx_promptcache.tree import BlockName
from mlx_promptcache.writer import Writer, variant_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from mlx_promptcache.budget import Budget
    from mlx_promptcache.exporter import Piece
    from mlx_promptcache.quarantine import Quarantine
    from mlx_promptcache.remote import Remote, RemoteFile
    from mlx_promptcache.signatures import Trust
    from mlx_promptcache.store import Store

log = logging.getLogger("mlx_promptcache")

FORGOTTEN_SECONDS = 86400.0  # what did not come whole within a day is fetched anew
LARGEST_FILE_BYTES = 2 * 10**9  # of whatever model: it is held in memory while it is checked


class Arrival(NamedTuple):
    """A whole file, checked. What was fetched waits in `part` until it is added."""

    kind: str
    stem: str
    header: Header
    data: bytes
    part: Path | None

    def settled(self) -> None:
        """It was added: what was fetched is needed no more."""
        _forget(self.part)


class Own(NamedTuple):
    """A block of the store."""

    stem: str
    digest: str


class Arrivals:
    """What comes from one remote into one store, for one fingerprint."""

    def __init__(
        self, store: Store, bad: Quarantine, fingerprint: str, budget: Budget, trust: Trust | None
    ) -> None:
        self._store, self._bad, self._fingerprint = store, bad, fingerprint
        self._budget, self._trust = budget, trust
        self.files = self.bytes = 0
        """That were added."""
        self.refused: list[str] = []
        """Why files were not used, a sentence each."""
        self.used: set[tuple[str, str]] = set()
        """The files of the store, by kind and stem, that what came needs, or would."""
        self._untold: Counter[str] = Counter()

    # There

    def fetch(self, remote: Remote, kind: str, candidates: Sequence[RemoteFile]) -> Arrival | None:
        """The first of these files, which have one stem, that can be used; None if none can.

        Raises:
            RemoteError: the remote cannot be reached.
        """
        wrong = []
        for file in sorted(candidates, key=lambda file: file.signature is None):
            try:
                if self._trust is not None and file.signature is None:
                    raise SignatureError("nobody signed it")
                if not 0 < file.size <= LARGEST_FILE_BYTES:
                    raise DamagedFile(f"it is said to have {file.size} bytes")
                data, part = _whole(remote, file)
            except (DamagedFile, SignatureError) as exc:
                wrong.append(str(exc))
                continue
            try:
                return self._checked(kind, file, data, part)
            except (CacheMiss, SignatureError) as exc:  # damaged, or of another version
                wrong.append(str(exc))
                _forget(part)
        if wrong:
            said = f"a {kind.removesuffix('s')} that came from elsewhere is not used: {wrong[0]}"
            self.refused.append(said)
            self._untold[said] += 1
        return None

    def tell(self) -> None:
        """Say what was not used, each reason once."""
        untold, self._untold = self._untold, Counter()
        for said, count in untold.items():
            log.warning("%s", said if count == 1 else f"{said} ({count} of them)")

    def _checked(self, kind: str, file: RemoteFile, data: bytes, part: Path | None) -> Arrival:
        def read(at: int, count: int) -> bytes:
            return data[at : at + count]

        header = container.read_header(read, len(data))
        if self._trust is not None:
            seal = container.read_seal(read, len(data))
            if not self._trust.accepts(kind, file.stem, seal, file.signature):
                raise SignatureError("nobody who is trusted signed it")
        check = headers.checked_block if kind == BLOCKS else headers.checked_snapshot
        check(header, file.stem)
        if header.content["fingerprint"] != self._fingerprint:
            raise DamagedFile("it is another model's")
        if kind == BLOCKS and shared_stem(file.stem, header.digest) != file.stem:
            raise DamagedFile("it is not what its name says")
        container.check(read, header.entries.values())
        return Arrival(kind, file.stem, header, data, part)

    def trusts(self, kind: str, stem: str, signature: str | None) -> bool:
        """Whether something without bytes, as a name, may be believed."""
        return self._trust is None or self._trust.accepts(kind, stem, b"", signature)

    # Here

    def local(self, stem: str, digest: str, rows: int) -> Own | None:
        """The block of the store that has the rows of this one: the same, or one that goes on
        after them; None if there is none.
        """
        same = (Own(own, there) for own, there in self._like(stem) if there == digest)
        return next(same, None) or self._longer(_named(stem), digest, rows)

    def _longer(self, name: BlockName, digest: str, rows: int) -> Own | None:
        """A block whose first rows are those of one that has this digest, bit for bit."""
        beginning = f"{name.shard}/{name.start_key}-{name.first_token}-"
        for own in self._store.beginning(BLOCKS, beginning):
            with contextlib.suppress(PromptCacheError), self._store.reader(BLOCKS, own) as reader:
                header = headers.checked_block(reader.header(), own)
                if len(header.content["tokens"]) > rows:
                    cut = cuts.first_rows(reader.read, header, rows, name.end_key)
                    if cut.digest == digest:
                        return Own(own, header.digest)
        return None

    def has(self, stem: str) -> bool:
        """Whether the block of a shared stem is in the store."""
        return any(shared_stem(own, digest) == stem for own, digest in self._like(stem))

    def _like(self, stem: str) -> Iterator[tuple[str, str]]:
        """The blocks of the store with the name of this one, each with its digest."""
        for own in self._store.beginning(BLOCKS, plain_stem(stem)):
            with contextlib.suppress(PromptCacheError):
                yield own, headers.block_header(self._store, own).digest

    def add(self, blocks: Iterable[Arrival], kept: Iterable[str] = ()) -> dict[str, str]:
        """Add blocks; return the stems that they have in the store by those that they came with.

        Raises:
            StoreError: there is no room within the budget, or the file system refuses.
            CacheLocked: somebody adds or deletes, and does not come to an end.
        """
        came = list(blocks)
        if not came:
            return {}
        self._store.create()
        with self._adding([len(block.data) for block in came], kept) as writer:
            stems = {block.stem: self._block(writer, block) for block in came}
        for block in came:
            block.settled()
        return stems

    def _block(self, writer: Writer, block: Arrival) -> str:
        packed = Packed([block.data], block.header.digest)
        plain = _named(block.stem)._replace(variant="")
        return writer.block(plain, packed, record_of(block.header))

    def complete(self, snapshot: Arrival, blocks: Sequence[Own]) -> str:
        """Add a snapshot whose rows stand in these blocks of the store, and return its stem there.
        Raises as `add` does.
        """
        stem, packed = _using(snapshot, blocks)
        with self._adding([packed.size], [block.stem for block in blocks]) as writer:
            writer.snapshot(stem, packed)
        self.used.add((SNAPSHOTS, stem))
        snapshot.settled()
        return stem

    @contextlib.contextmanager
    def _adding(self, sizes: Sequence[int], kept: Iterable[str]) -> Iterator[Writer]:
        """What writes files of these sizes, for which there is room then, and is counted after."""
        needed = sum(sizes) + len(sizes) * room.FILE_BYTES
        with self._store.adding():
            room.make(self._store, self._budget, needed, kept=list(kept), asked_for=False)
            with self._store.shared():
                writer = Writer(self._store, self._bad, sync=False)
                yield writer
                self._store.uses.note_write(writer.bytes)
                writer.noted.keep()
                self.files += writer.written + len(writer.snapshots)
                self.bytes += writer.bytes


def _named(stem: str) -> BlockName:
    name = BlockName.parse(stem)
    if name is None:
        raise DamagedFile("it names a block that there cannot be")
    return name


def plain_stem(stem: str) -> str:
    """The stem of a block without its variant, which depends on what else a store has.

    Raises:
        DamagedFile: it is no block's stem.
    """
    return str(_named(stem)._replace(variant=""))


def as_there(snapshot: Header, stem: str, pieces: Sequence[Piece]) -> tuple[str, Header]:
    """A snapshot as it is there, and its stem: a block has a variant where another has its name,
    which is not so in every store.
    """
    blocks = [(plain_stem(piece.stem), piece.header.digest) for piece in pieces]
    return headers.using(snapshot, stem, blocks)


def shared_stem(stem: str, digest: str) -> str:
    """The stem that a block of this digest has where it is shared: its variant's.

    Raises:
        DamagedFile: it is no block's stem.
    """
    return str(_named(stem)._replace(variant=variant_of(digest)))


def _using(snapshot: Arrival, blocks: Iterable[tuple[str, str]]) -> tuple[str, Packed]:
    """The file of a snapshot that uses these blocks, and its own stem. It is the very file that
    came unless a block has another stem here.
    """
    stem, header = headers.using(snapshot.header, snapshot.stem, blocks)
    if stem == snapshot.stem:
        return stem, Packed([snapshot.data], header.digest)
    arrays = snapshot.data[len(snapshot.data) - header.stored_bytes :]
    return stem, container.repacked(header, [arrays])


def _whole(remote: Remote, file: RemoteFile) -> tuple[bytes, Path | None]:
    """The bytes of a file, those first that came before, and where they wait. Raises RemoteError,
    DamagedFile.
    """
    part = places.incoming() / hashlib.sha256(f"{remote.url} {file.path}".encode()).hexdigest()[:32]
    try:
        part.parent.mkdir(0o700, parents=True, exist_ok=True)
        fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError:  # then nothing is kept of what does not come whole
        return _read(remote, file), None
    with os.fdopen(fd, "r+b", buffering=0) as kept:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # another process fetches it, too
            return _read(remote, file), None
        offset = min(kept.seek(0, os.SEEK_END), file.size)
        try:
            for piece in remote.read(file.path, offset, file.size):
                kept.write(piece)
        except OSError as exc:
            raise DamagedFile(f"it cannot be kept here until it is whole: {exc.strerror}") from exc
        whole = kept.seek(0, os.SEEK_END) >= file.size  # before memory is taken for it
        kept.seek(0)
        data = kept.read(file.size) if whole else b""
    if len(data) != file.size:
        _forget(part)
        raise DamagedFile("it is shorter there than it is said to be")
    return data, part


def _read(remote: Remote, file: RemoteFile) -> bytes:
    return b"".join(remote.read(file.path, 0, file.size))


def _forget(part: Path | None) -> None:
    with contextlib.suppress(OSError):
        if part is not None:
            part.unlink(missing_ok=True)


def forget_parts() -> None:
    """Delete what did not come whole within a day. Failing is no matter."""
    before = time.time() - FORGOTTEN_SECONDS
    with contextlib.suppress(OSError):
        for part in places.incoming().iterdir():
            if part.lstat().st_mtime < before:
                part.unlink(missing_ok=True)
