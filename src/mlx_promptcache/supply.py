"""A remote below a store: what a prompt could use is brought before it is computed, and what was
kept is sent behind.

Nobody waits for it longer than computing would take, or than was said; a remote that is dead or
slow is let be for a while, by other processes, too. Files that come late are there the next time.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import queue
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

from mlx_promptcache import arrivals, memo, places
from mlx_promptcache.errors import PromptCacheError, RemoteError
from mlx_promptcache.rates import Rates
from mlx_promptcache.remote import by_stem
from mlx_promptcache.store import BLOCKS, SNAPSHOTS
from mlx_promptcache.tree import (
    BlockName,
    Keys,
    SnapshotName,
    Stretch,
    cell_end,
    cell_start,
    longest_match,
    shard,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from mlx_promptcache.moved import Moved
    from mlx_promptcache.remote import RemoteFile
    from mlx_promptcache.sharing import Sharing

log = logging.getLogger("mlx_promptcache")

SECONDS = 5.0  # that a prompt waits at the most, and that a process waits at its end
LET_BE_SECONDS = 60.0  # after it could not be reached, or was too slow
LEAST_TOKENS = 16  # that bringing must save: fewer are computed sooner
TRIED_PARTS = 2  # blocks that a prompt may use in part, of those that begin as it goes on


class _Wanted(NamedTuple):
    """What a prompt could use of a remote, up to `position` tokens."""

    position: int
    blocks: list[RemoteFile]
    snapshot: RemoteFile | None


class Supply:
    """What one store gets from one remote, and what it sends there, within `seconds` each time.

    Nothing here raises a PromptCacheError: each is a notice.
    """

    def __init__(
        self, sharing: Sharing, fingerprint: str, *, seconds: float = SECONDS, read_only: bool
    ) -> None:
        self._sharing, self._seconds, self._read_only = sharing, seconds, read_only
        self._shown = sharing.remote.shown
        self._rates = Rates(sharing.remote.noted_as, fingerprint)
        self._waiting: queue.SimpleQueue[Callable[[], Moved] | None] = queue.SimpleQueue()
        self._sender: threading.Thread | None = None
        self._bringer: threading.Thread | None = None

    # Before

    def bring(self, root: str, tokens: Sequence[int], position: int) -> None:
        """Bring what these tokens could use beyond `position`, which is here already; wait for it
        no longer than computing would take.
        """
        missing = len(tokens) - position
        if missing < LEAST_TOKENS or self._is_let_be():
            return
        if self._bringer is not None and self._bringer.is_alive():  # what is late may never come
            return
        seconds = min(self._seconds, self._rates.computing_seconds(missing) or math.inf)
        failed: list[PromptCacheError] = []

        def work() -> None:
            try:
                self._bring(Keys(root, tokens), position)
            except Exception as exc:  # noqa: BLE001 - it may say anything
                failed.append(self._told(exc))

        self._bringer = threading.Thread(target=work, daemon=True)  # nobody waits for it at the end
        self._bringer.start()
        self._bringer.join(seconds)
        if self._bringer.is_alive():
            self._let_be(f"{self._shown} took longer than {seconds:.1f} s")
        elif failed:
            self._failed(failed[0])

    def _bring(self, keys: Keys, position: int) -> None:
        wanted = self._wanted(keys)
        if wanted.position < position + LEAST_TOKENS:
            return
        came = self._sharing.receiver.arrivals()
        lacking = [file for file in wanted.blocks if not came.has(file.stem)]
        size = sum(file.size for file in lacking)
        if self._rates.reading_is_slower(size, wanted.position - position):
            return
        began = time.perf_counter()
        try:
            self._sharing.receiver.bring_blocks(came, lacking)
            self._rates.note_read(size, time.perf_counter() - began)
            if wanted.snapshot is not None:
                snapshot = came.fetch(self._sharing.remote, SNAPSHOTS, [wanted.snapshot])
                if snapshot is not None:
                    self._sharing.receiver.complete(came, snapshot)
        finally:
            came.tell()
            arrivals.forget_parts()

    def _wanted(self, keys: Keys) -> _Wanted:
        """The way through a prompt by the names of what is there, and the deepest snapshot."""
        n = len(keys.tokens)
        shards = {shard(keys[start]) for start in range(0, n + 1, cell_end(0))}
        remote = self._sharing.remote
        there = remote.each(lambda kind: remote.files(kind, shards), [BLOCKS, SNAPSHOTS])
        blocks = _Blocks(keys, there[0])
        steps = longest_match(blocks.ways_on, goal=n)
        reached = steps[-1].end if steps else 0
        parts = blocks.in_part(reached)
        chosen = [blocks.files[step.stem][0] for step in steps] + parts
        deepest = [
            (name.offset + start, files[0])
            for stem, files in by_stem(there[1]).items()
            if (name := SnapshotName.parse(stem)) is not None
            and (start := blocks.cells.get(name.cell_key)) is not None
            and start + name.offset <= n
            and keys[start + name.offset] == name.key
        ]
        at, snapshot = max(deepest, key=lambda found: found[0], default=(0, None))
        goal = min(n, reached + (cell_end(0) if parts else 0))
        return _Wanted(max(goal, at), chosen, snapshot)

    # Behind

    def send(self, stems: tuple[str, ...]) -> None:
        """Send the states of these snapshots, some time later."""
        self._later(functools.partial(self._sharing.sender.send, stems))

    def send_name(self, name: str) -> None:
        """Send the state of a name, and the name, some time later."""
        self._later(functools.partial(self._sharing.push, [name]))

    def _later(self, work: Callable[[], Moved]) -> None:
        if self._read_only or self._is_let_be():
            return
        self._waiting.put(work)
        if self._sender is None or not self._sender.is_alive():
            self._sender = threading.Thread(target=self._send_all, daemon=True)
            self._sender.start()

    def _send_all(self) -> None:
        while (work := self._waiting.get()) is not None or not self._waiting.empty():
            try:
                if work is not None:  # else a sender before this one failed, and did not hear it
                    work()
            except Exception as exc:  # noqa: BLE001 - it may say anything
                self._failed(self._told(exc))
                return

    def close(self) -> None:
        """Wait until all is sent, but not longer than was said."""
        sender, self._sender = self._sender, None
        if sender is None:
            return
        self._waiting.put(None)
        sender.join(self._seconds)
        if sender.is_alive():
            log.warning("not all was sent to %s in time: `push` sends the rest", self._shown)

    # Remotes that are let be

    def _told(self, exc: Exception) -> PromptCacheError:
        """An error, as users are told of it."""
        if isinstance(exc, PromptCacheError):
            return exc
        return RemoteError(f"{self._shown} cannot be used: {type(exc).__name__}: {exc}")

    def _failed(self, exc: PromptCacheError) -> None:
        if isinstance(exc, RemoteError):
            self._let_be(str(exc))
        else:
            log.warning("what is shared is not used: %s", exc)

    def _let_be(self, why: str) -> None:
        log.warning("%s: it is let be for a minute", why)
        known = {url: until for url, until in _let_be_until().items() if until > time.time()}
        known[self._sharing.remote.noted_as] = time.time() + LET_BE_SECONDS
        memo.write(places.remotes_memo(), json.dumps(known))

    def _is_let_be(self) -> bool:
        until = _let_be_until().get(self._sharing.remote.noted_as, 0.0)
        return 0 < until - time.time() <= LET_BE_SECONDS  # the clock may be set


class _Blocks:
    """The blocks of a remote that a prompt may meet, found by their names."""

    def __init__(self, keys: Keys, files: Sequence[RemoteFile]) -> None:
        self._keys = keys
        self.files = by_stem(files)
        self.cells = {keys[p]: p for p in range(0, len(keys.tokens) + 1, cell_end(0))}
        self._names: dict[tuple[str, int], list[BlockName]] = {}
        for stem in self.files:
            if (name := BlockName.parse(stem)) is not None:
                self._names.setdefault((name.start_key, name.first_token), []).append(name)

    def _at(self, position: int) -> list[BlockName]:
        if position >= len(self._keys.tokens):
            return []
        return self._names.get((self._keys[position], self._keys.tokens[position]), [])

    def ways_on(self, position: int) -> Iterator[Stretch]:
        """The blocks that go on through the prompt, whole, the longest first."""
        names = self._at(position)
        if not names:
            return
        last = min(cell_end(cell_start(position)), len(self._keys.tokens))
        ends = {self._keys[end]: end for end in range(position + 1, last + 1)}
        found = [(ends[name.end_key], str(name)) for name in names if name.end_key in ends]
        for end, stem in sorted(found, reverse=True):
            yield Stretch(stem, position, end - position)

    def in_part(self, position: int) -> list[RemoteFile]:
        """The smallest blocks that begin where the whole ones end, and may agree in part."""
        found = [self.files[str(name)][0] for name in self._at(position)]
        return sorted(found, key=lambda file: file.size)[:TRIED_PARTS]


def _let_be_until() -> dict[str, float]:
    try:
        known = json.loads(places.remotes_memo().read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {k: v for k, v in known.items() if isinstance(v, float) and math.isfinite(v)}
