"""Streams of MLX beside the main thread's own, each of which has a thread of MLX's.

On a CPU MLX computes what is in one stream one after the other, on one core. What does not depend
on each other can be put into several.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from typing import TYPE_CHECKING

import mlx.core as mx

if TYPE_CHECKING:
    from collections.abc import Iterator

_MADE: list[mx.Stream] = []  # for as long as the process lives: MLX never ends one
_UNCOMPILED: list[bool] = []  # while somebody wants nothing compiled


def in_main_thread_on_cpu() -> bool:
    """Whether to compile, and to compute in several streams: in the main thread, and on a CPU,
    where it was measured. A process in which another thread ran something compiled may abort when
    it ends (MLX 0.32.4).
    """
    main = threading.current_thread() is threading.main_thread()
    return main and mx.default_device() == mx.Device(mx.cpu)


def may_compile() -> bool:
    """Whether something compiled is to be used now."""
    return not _UNCOMPILED and in_main_thread_on_cpu()


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """While this lasts nothing is compiled, so that MLX can tell of every operation."""
    _UNCOMPILED.append(True)
    mx.disable_compile()
    try:
        yield
    finally:
        mx.enable_compile()
        _UNCOMPILED.pop()


def beside(count: int) -> list[mx.Stream]:
    """So many streams on the CPU, always the same ones. They are the main thread's."""
    while len(_MADE) < count:
        _MADE.append(mx.new_stream(mx.Device(mx.cpu)))
    return _MADE[:count]


def of_any_thread() -> mx.Stream | None:
    """A new stream on the CPU that any thread may use, one at a time, which MLX has since 0.32.
    None beside a GPU.
    """
    make = getattr(mx, "new_thread_unsafe_stream", None)
    cpu = mx.Device(mx.cpu)
    return make(cpu) if make is not None and mx.default_device() == cpu else None


@functools.cache
def cores() -> int:
    """How many cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1
