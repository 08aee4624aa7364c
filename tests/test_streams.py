"""Streams beside the main thread's own: made once, and as many as there are cores for."""

from __future__ import annotations

import itertools
import os
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import pytest

import processes
from mlx_promptcache import streams


def test_streams_are_made_once() -> None:
    three = streams.beside(3)
    assert streams.beside(2) == three[:2]
    assert streams.beside(3) == three
    assert not any(a == b for a, b in itertools.combinations(three, 2))
    assert all(stream.device == mx.Device(mx.cpu) for stream in three)
    assert mx.default_stream(mx.Device(mx.cpu)) not in three


def test_in_other_threads_there_is_none_to_be_had() -> None:
    here = mx.default_device() == mx.Device(mx.cpu)
    assert streams.in_main_thread_on_cpu() == here
    with ThreadPoolExecutor(1) as pool:
        assert not pool.submit(streams.in_main_thread_on_cpu).result()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_cores_are_those_that_the_process_may_use() -> None:
    assert streams.cores() == len(os.sched_getaffinity(0))
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from mlx_promptcache.streams import cores; print(cores())"
    )
    assert processes.python(code) == 1
