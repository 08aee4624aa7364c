"""Byte planes: dealt out and joined as numpy does it, compiled or not."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_promptcache import planes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ITEMSIZES = sorted(planes.WORDS)
COUNTS = (0, 1, 7, 4097)


def drawn(itemsize: int, count: int) -> Any:
    """The bytes of items, `[count, itemsize]`."""
    return np.random.default_rng(count).integers(0, 256, (count, itemsize), np.uint8)


def array_of(items: Any) -> mx.array:
    """An array of these items, every second one of a longer one: it is not contiguous."""
    itemsize = items.shape[1]
    long = np.repeat(items, 2, axis=0).view(f"<u{itemsize}").reshape(-1)
    return mx.array(long)[::2] if len(items) else mx.zeros((0,), planes.WORDS[itemsize])


def bytes_of(array: mx.array) -> bytes:
    memory: Any = array
    return bytes(memoryview(memory)) if array.size else b""


def both_ways(itemsize: int) -> None:
    for count in COUNTS:
        items = drawn(itemsize, count)
        dealt = planes.deal(array_of(items), itemsize)
        assert [bytes_of(plane) for plane in dealt] == [
            items[:, k].tobytes() for k in range(itemsize)
        ]
        joined = planes.join(dealt)
        assert joined.dtype == mx.uint8
        assert bytes_of(joined) == items.tobytes()


def parts_of_larger(itemsize: int) -> None:
    """Planes are parts of a larger array where rows are restored."""
    items = drawn(itemsize, 300)
    flat = mx.array(np.ascontiguousarray(items.T).reshape(-1)).reshape(itemsize, -1)
    joined = planes.join([flat[k, 100:250] for k in range(itemsize)])
    assert bytes_of(joined) == items[100:250].tobytes()


def in_another_thread(function: Callable[[], None]) -> None:
    def run() -> None:
        with mx.stream(mx.cpu):
            function()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(run).result()


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The compiled functions that are called, by name."""
    called: list[str] = []
    for name in ("_dealt", "_joined"):
        function = getattr(planes, name)

        def counted(*arrays: mx.array, name: str = name, function: Any = function) -> Any:
            called.append(name)
            return function(*arrays)

        monkeypatch.setattr(planes, name, counted)
    return called


@pytest.mark.parametrize("itemsize", ITEMSIZES)
@pytest.mark.parametrize("what", [both_ways, parts_of_larger])
def test_planes_are_those_of_numpy(what: Callable[[int], None], itemsize: int) -> None:
    what(itemsize)


@pytest.mark.parametrize("itemsize", ITEMSIZES)
@pytest.mark.parametrize("what", [both_ways, parts_of_larger])
def test_in_another_thread_they_are_the_same_and_nothing_is_compiled(
    what: Callable[[int], None], itemsize: int, compiled: Sequence[str]
) -> None:
    in_another_thread(functools.partial(what, itemsize))
    assert compiled == []


@pytest.mark.skipif(mx.default_device() != mx.Device(mx.cpu), reason="only a CPU's are compiled")
def test_in_the_main_thread_they_are_compiled(compiled: Sequence[str]) -> None:
    both_ways(4)
    assert set(compiled) == {"_dealt", "_joined"}


@pytest.mark.skipif(sys.platform != "linux", reason="needs a directory that nobody may write to")
def test_where_the_compiler_may_not_write_nothing_is_compiled() -> None:
    """As where another user's MLX made its directory first."""
    told = """
import mlx.core as mx
from mlx_promptcache import planes
words = mx.arange(5000, dtype=mx.uint32) * 700_001
dealt = planes.deal(words, 4)
assert mx.array_equal(planes.join(dealt).view(mx.uint32), words)
try:
    mx.eval(planes._dealt(words))
except RuntimeError:
    print("refused")
"""
    environment = {**os.environ, "TMPDIR": "/proc"}
    ended = subprocess.run(
        [sys.executable, "-c", told], env=environment, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout) == (0, "refused\n"), ended.stderr


@pytest.mark.parametrize("round_", range(4))
def test_a_process_ends_well_after_another_thread_dealt_and_joined(round_: int) -> None:
    told = """
import threading
import mlx.core as mx
from mlx_promptcache import planes
def run():
    with mx.stream(mx.cpu):
        mx.eval(planes.join(planes.deal(mx.zeros((5000,), mx.uint32), 4)))
threads = [threading.Thread(target=run) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""
    assert subprocess.run([sys.executable, "-c", told], check=False).returncode == 0, round_
