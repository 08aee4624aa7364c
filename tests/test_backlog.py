"""States written behind whoever computes them."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from known import model_of
from mlx_promptcache import PromptCache, Runner, State, StoreError
from mlx_promptcache.backlog import Backlog

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def state() -> State:
    made = Runner(model_of("smallest")).prefill([1, 2, 3])
    mx.eval([array for layer in made.contents for array in layer.rows.values()])
    return made


class Slow:
    """Stands for a prompt cache: each state waits until it may go on."""

    def __init__(self) -> None:
        self.may_go_on = threading.Semaphore(0)
        self.added: list[State] = []
        self.error: Exception | None = None

    def add(self, state: State) -> None:
        assert self.may_go_on.acquire(timeout=10)
        if self.error is not None:
            raise self.error
        self.added.append(state)


def test_what_waits_for_a_state_is_called_when_it_is_in_the_store(tmp_path: Path) -> None:
    backlog, cache = Backlog(), PromptCache(tmp_path / "store", "x")
    seen: list[int] = []
    backlog.write(cache, state(), lambda: seen.append(cache.match([1, 2, 3, 4]).position))
    assert backlog.close(10) == 0
    assert seen == [3]


def test_whoever_brings_more_than_can_be_written_waits() -> None:
    slow: Any = Slow()
    backlog, one = Backlog(most_jobs=2), state()
    brought: list[int] = []

    def bring() -> None:
        for i in range(3):
            backlog.write(slow, one, lambda: None)
            brought.append(i)

    thread = threading.Thread(target=bring)
    thread.start()
    thread.join(0.2)
    assert brought == [0, 1]
    slow.may_go_on.release(3)
    thread.join(10)
    assert brought == [0, 1, 2]
    assert backlog.close(10) == 0


def test_a_state_larger_than_all_that_may_wait_is_written_alone() -> None:
    slow: Any = Slow()
    backlog = Backlog(most_bytes=1)
    slow.may_go_on.release(2)
    for _ in range(2):
        backlog.write(slow, state(), lambda: None)
    assert backlog.close(10) == 0
    assert len(slow.added) == 2


def test_a_failure_is_told_once_until_something_is_written_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    slow: Any = Slow()
    backlog, ended = Backlog(), threading.Semaphore(0)

    def write(error: Exception | None) -> None:
        slow.error = error
        slow.may_go_on.release()
        backlog.write(slow, state(), ended.release)
        assert ended.acquire(timeout=10)

    with caplog.at_level(logging.WARNING, "mlx_promptcache"):
        for error in (StoreError("full"), RuntimeError("odd"), None, StoreError("full again")):
            write(error)
    assert backlog.close(10) == 0
    told = "answers go on, but the prompt cache is not written: "
    assert [record.getMessage() for record in caplog.records] == [
        told + "full",
        told + "full again",
    ]
    assert backlog.failures == 3


def test_what_is_not_written_in_time_is_counted() -> None:
    slow: Any = Slow()
    backlog = Backlog()
    for _ in range(3):
        backlog.write(slow, state(), lambda: None)
    assert backlog.close(0.05) == 3
    slow.may_go_on.release(3)
    assert backlog.close(10) == 0
