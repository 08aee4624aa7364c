"""The loader: whoever reads for it has ended when it ends, however that comes."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

import tiny
from mlx_promptcache import PromptCache, Runner, loader
from mlx_promptcache.rows import Room
from tiny import random_tokens

if TYPE_CHECKING:
    from pathlib import Path

TOKENS = random_tokens(1000, 1, 16)


class Refused(Exception):
    """What a test makes of a restore."""


@pytest.fixture
def cache(tmp_path: Path) -> PromptCache:
    runner = Runner(tiny.smallest())
    runner.cache = PromptCache(tmp_path / "store", "smallest")
    runner.cache.add(runner.prefill(TOKENS))
    return runner.cache


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "ThreadPool" in thread.name]


def refuse(*_: Any) -> None:
    raise Refused


@pytest.mark.parametrize("owner", ["rooms", "rows"])
def test_no_reader_outlives_what_failed(
    owner: str, cache: PromptCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, began, ended = loader.Loader._read, [], []

    def slowly(*given: Any) -> Any:
        began.append(given)
        time.sleep(0.05)
        found = read(*given)
        ended.append(given)
        return found

    before = readers()
    with monkeypatch.context() as patched:
        patched.setattr(loader.Loader, "_read", slowly)
        patched.setattr(*{"rooms": (Room, "open_beside"), "rows": (loader, "_put")}[owner], refuse)
        with pytest.raises(Refused) as held:
            cache.restore(TOKENS, tiny.smallest())
    assert began
    assert len(ended) == len(began)
    assert readers() == before
    del held
    assert cache.restore(TOKENS, tiny.smallest()).match.position == len(TOKENS)


def test_the_first_blocks_are_read_while_room_is_made(
    cache: PromptCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, opened = threading.Event(), []
    read, open_beside = loader.Loader._read, Room.open_beside

    def noted(*given: Any) -> Any:
        began.set()
        return read(*given)

    def waits(*given: Any) -> None:
        opened.append(began.wait(10))
        open_beside(*given)

    monkeypatch.setattr(loader.Loader, "_read", noted)
    monkeypatch.setattr(Room, "open_beside", staticmethod(waits))
    cache.restore(TOKENS, tiny.smallest())
    assert opened == [True]
