"""States written behind whoever computes them, by a thread of their own, in their order."""

from __future__ import annotations

import logging
import threading
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx

from mlx_promptcache.errors import PromptCacheError

if TYPE_CHECKING:
    from collections.abc import Callable

    from mlx_promptcache.cache import PromptCache
    from mlx_promptcache.state import State

log = logging.getLogger("mlx_promptcache")

MOST_JOBS = 64
MOST_BYTES = 4 << 30  # of states that wait: memory that others may need


class _Job(NamedTuple):
    """A state on its way to a store, and what is to be done when it is there, or cannot be."""

    cache: PromptCache
    state: State
    then: Callable[[], None]


class Backlog:
    """Writes states. All their arrays must be evaluated: the thread that writes has a stream of
    its own, on the CPU, and computes nothing that another thread began.

    Whoever brings more than it can write waits: a slow drive must not fill the memory.
    """

    def __init__(self, *, most_jobs: int = MOST_JOBS, most_bytes: int = MOST_BYTES) -> None:
        self.failures = 0
        """How many states could not be written."""
        self._most_jobs, self._most_bytes = most_jobs, most_bytes
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._told = False
        self._thread = threading.Thread(target=self._run, name="prompt cache writer", daemon=True)
        self._thread.start()

    def write(self, cache: PromptCache, state: State, then: Callable[[], None]) -> None:
        """Have a state written into a store, and `then` called by the thread that wrote it; also
        if it could not be written, which is told once. Waits while too much is waiting.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._has_room(state))
            self._jobs.append(_Job(cache, state, then))
            self._changed.notify_all()

    def _has_room(self, state: State) -> bool:
        waiting = sum(job.state.nbytes for job in self._jobs)
        fits = waiting + state.nbytes <= self._most_bytes and len(self._jobs) < self._most_jobs
        return fits or not self._jobs

    def close(self, seconds: float) -> int:
        """Write what is waiting, for at most so long; return how many states were not written."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(max(0.0, seconds))
        return len(self._jobs)

    def _run(self) -> None:
        with mx.stream(mx.cpu):
            while self._wait_for_a_job():
                self._do(self._jobs[0])  # it stays in the queue, and nowhere else, until it is done
                with self._changed:
                    self._jobs.popleft()
                    self._changed.notify_all()

    def _wait_for_a_job(self) -> bool:
        """Whether there is one, or none will come."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._closed)
            return bool(self._jobs)

    def _do(self, job: _Job) -> None:
        try:
            job.cache.add(job.state)
            self._told = False
        except PromptCacheError as exc:
            self._tell(str(exc))
        except Exception as exc:  # noqa: BLE001 - whatever it is, answers must go on
            self._tell(f"{type(exc).__name__}: {exc}")
        finally:
            job.then()

    def _tell(self, why: str) -> None:
        """Say why nothing is written: once, until something is written again."""
        self.failures += 1
        if not self._told:
            log.warning("answers go on, but the prompt cache is not written: %s", why)
        self._told = True
