"""Ranks: the processes that compute one model together, and how they agree.

Under `mlx.launch` each process, a rank, holds a part of the model, and every forward call is one of
them all: a rank that makes another call than the others waits for ever. So whatever one rank alone
can know (what its store holds, that a file is damaged, that somebody pressed Ctrl-C) is told to all
before anybody acts on it. All ranks tell at the same points of the program, in messages of one
length: a rank that fails says so in place of its message, wherever the others are.
"""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import os
import sys
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_promptcache.errors import ModelError, RankError

if TYPE_CHECKING:
    from collections.abc import Iterator

STRATEGIES = ("tensor", "pipeline")
WAIT = "MLX_PROMPTCACHE_RANKS_WAIT"
WAIT_SECONDS = 1800.0  # a slow drive or the first look at large weights takes long, too
LONGEST_SECONDS = 1e8  # that the system counts
MOST_VALUES = 3  # of one message
FAILED = -1  # in the place of what a message is about


class Ranks:
    """The ranks of one group, as one of them sees them.

    `strategy` is how mlx-lm splits the model: `tensor` (every layer is split) or `pipeline` (each
    rank has some of the layers). `wait_seconds` is how long one wait for others may take.
    """

    def __init__(self, group: Any, strategy: str, *, wait_seconds: float = WAIT_SECONDS) -> None:
        self._group = group
        self.strategy = strategy
        self.rank: int = group.rank()
        self.size: int = group.size()
        self.wishes_to_end = False
        """Whether this rank wants all to stop generating; it is told with the next token."""
        self.ending = False
        """Whether any rank wanted so when the latest token was drawn: the same on all ranks."""
        self._confessed: BaseException | None = None
        self._wishes: deque[mx.array] = deque()
        self._watchdog = Watchdog(self.name, wait_seconds)

    @classmethod
    def join(cls, strategy: str) -> Ranks:
        """Find the other ranks, which `mlx.launch` has started with this one.

        Raises:
            ValueError: there is no such strategy.
            RankError: there are no others, or they cannot be reached.
        """
        if strategy not in STRATEGIES:
            raise ValueError(f"a model is split by {' or '.join(STRATEGIES)}, not by {strategy!r}")
        seconds = _wait_seconds()
        try:
            with _ended_after(seconds):
                group = mx.distributed.init(strict=True)
        except RuntimeError as exc:
            raise RankError(f"there are no other ranks ({exc}): {_how(strategy)}") from exc
        if group.size() < 2:
            raise RankError(f"there is one rank only: {_how(strategy)}")
        return cls(group, strategy, wait_seconds=seconds)

    def __str__(self) -> str:
        return f"{self.strategy}, {self.name}"

    @property
    def name(self) -> str:
        """What this rank is called."""
        return f"rank {self.rank} of {self.size}"

    @property
    def leads(self) -> bool:
        """Whether this is the rank that draws the tokens and speaks to the user."""
        return self.rank == 0

    def own_name(self, name: str) -> str:
        """What this rank's part of a named state is called: ranks may share a store."""
        return name if self.leads else f"{name}@{self.strategy}-{self.rank}-of-{self.size}"

    def split(self, model: Any) -> None:
        """Keep of a model what this rank computes, through mlx-lm's own code.

        Raises:
            ModelError: mlx-lm cannot split it, or not into so many parts.
        """
        part, method = (
            (model, "shard")
            if self.strategy == "tensor"
            else (getattr(model, "model", None), "pipeline")
        )
        split = getattr(part, method, None)
        if split is None:
            raise ModelError(
                f"mlx-lm cannot split this model by {self.strategy}: try the other of "
                f"{' and '.join(STRATEGIES)}"
            )
        heads = getattr(getattr(model, "args", None), "num_attention_heads", None)
        try:
            if self.strategy == "tensor" and isinstance(heads, int) and heads % self.size:
                raise ValueError(f"it has {heads} attention heads")
            split(self._group)
            model(mx.zeros((1, 1), mx.int32))  # built, and never evaluated: shapes tell
        except Exception as exc:
            raise ModelError(
                f"this model cannot be split by {self.strategy} among {self.size} ranks: "
                f"{' '.join(str(exc).split())}"
            ) from exc

    # To agree

    def told(self, about: str, *values: int) -> list[tuple[int, ...]]:
        """What each rank says `about` something here, by rank.

        Raises:
            RankError: another rank has failed, cannot be reached, or is at another point.
        """
        rows = self._exchanged(_number(about), *values)
        for rank, row in enumerate(rows):
            if row[0] == FAILED:
                raise RankError(
                    f"rank {rank} of {self.size} has failed, and said why: this one was {about}"
                )
        if any(row[0] != rows[0][0] for row in rows):
            raise RankError(f"the ranks are not at the same point: this one was {about}")
        return [row[1 : 1 + len(values)] for row in rows]

    def any(self, about: str, *, value: bool) -> bool:
        """Whether it is so for any rank."""
        return any(row[0] for row in self.told(about, int(value)))

    def same(self, what: str, *values: Any) -> None:
        """Make sure that all ranks have the same.

        Raises:
            RankError: they have not.
        """
        if not self.alike(what, *values):
            raise RankError(f"the ranks were not given the same {what}: give it to all of them")

    def alike(self, what: str, *values: Any) -> bool:
        """Whether all ranks have the same."""
        rows = self.told(f"comparing {what}", _number(repr(values)))
        return all(row == rows[0] for row in rows)

    @contextlib.contextmanager
    def together(self, doing: str) -> Iterator[None]:
        """What all ranks do, each by itself: where one fails, all of them do.

        Raises:
            RankError: another rank has failed.
        """
        try:
            yield
        except RankError:  # all know already
            raise
        except BaseException as exc:
            if exc is not self._confessed:
                self._confessed = exc
                with contextlib.suppress(RankError):
                    self._exchanged(FAILED)
            raise
        self.told(doing)

    def _exchanged(self, *values: int) -> list[tuple[int, ...]]:
        row = [*values, *[0] * (MOST_VALUES + 1 - len(values))]
        with self.waiting():
            rows = mx.distributed.all_gather(mx.array([row], mx.int64), group=self._group)
            told: Any = rows.tolist()
        return [tuple(row) for row in told]

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """While this lasts other ranks are waited for: not for ever.

        Raises:
            RankError: the connection is lost, or whatever MLX says while it computes.
        """
        try:
            with self._watchdog.waiting():
                yield
        except RuntimeError as exc:
            raise RankError(
                f"{self.name} cannot go on ({exc}): another rank may have ended, and said why"
            ) from exc

    # To generate

    def begin(self) -> None:
        """Begin to generate: nothing of before counts."""
        self._wishes.clear()
        self.wishes_to_end = self.ending = False

    def leading(self, token: mx.array) -> mx.array:
        """The token, `[1]`, that rank 0 drew, on all ranks. It is on its way when this returns.

        Logits may differ between ranks in their last bits, and then so may draws. What ranks wish
        is told along with it: a message of its own would wait for the next forward call.
        """
        # The others' own draw is taken into it, times 0: without it MLX would be free to send their
        # message before the forward call, whose messages others wait for.
        drawn = token.astype(mx.int32) * int(self.leads)
        row = mx.concatenate([drawn, mx.array([self.wishes_to_end], mx.int32)])
        both = mx.distributed.all_sum(row, group=self._group)
        # Now, and not with the next forward call: what a pipeline receives depends on nothing, so
        # MLX would be free to wait for it before this is sent.
        with self.waiting():
            mx.async_eval(both)
        self._wishes.append(both[1:])
        return both[:1].astype(token.dtype)

    def hear(self) -> None:
        """Take note of what was told along with the next token, which has just been read.

        Raises:
            RankError: the connection was lost after that token.
        """
        with self.waiting():
            self.ending = bool(self._wishes.popleft().item())


class Watchdog:
    """Ends this process if one wait takes too long: what MLX waits for cannot be broken off."""

    def __init__(self, name: str, seconds: float) -> None:
        self._name, self._seconds = name, seconds
        self._ends: float | None = None
        self._depth = 0
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """While this lasts the clock runs."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        if self._depth == 0:
            self._ends = time.monotonic() + self._seconds
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._ends = None

    def _watch(self) -> None:
        while True:
            time.sleep(min(1.0, self._seconds / 4))
            ends = self._ends
            if ends is not None and time.monotonic() > ends:
                sys.stderr.write(
                    f"mlx-promptcache: {self._name} has waited {self._seconds:g} seconds for the "
                    f"others, and ends; {WAIT} says how long it may take\n"
                )
                sys.stderr.flush()
                os._exit(1)


def _number(text: str) -> int:
    """A number that stands for a text; never `FAILED`."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")


def _wait_seconds() -> float:
    text = os.environ.get(WAIT, "")
    try:
        seconds = float(text or WAIT_SECONDS)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise RankError(f"{WAIT} is {text!r}, which is no number of seconds")
    return seconds


@contextlib.contextmanager
def _ended_after(seconds: float) -> Iterator[None]:
    """End this process, with code 1 and without a word, if this lasts longer: while MLX looks for
    other ranks it lets no thread of Python run, and so no watchdog.
    """
    with open(os.devnull, "wb") as nobody:  # noqa: PTH123 - who reads where that was
        bounded = min(max(seconds, 0.001), LONGEST_SECONDS)
        faulthandler.dump_traceback_later(bounded, exit=True, file=nobody)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()


def _how(strategy: str) -> str:
    return f"start it as mlx.launch -n 2 -- mlx-promptcache ... --shard {strategy}"
