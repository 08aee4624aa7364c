"""Where MLX has loops over vectors, and where it can compile some: for the tests of those that are
compiled here.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import pytest

import processes
from mlx_promptcache import exponentials

if TYPE_CHECKING:
    from pathlib import Path

on_x86 = pytest.mark.skipif(
    mx.default_device() != mx.Device(mx.cpu) or not exponentials.is_x86(),
    reason="MLX has loops of its own on this machine",
)
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="MLX has no compiler here")
LACKS = ("compiler", "place", "leave")


def without(lack: str, directory: Path) -> dict[str, str]:
    """The environment of a process that can compile nothing, for want of one of LACKS."""
    return {
        "compiler": {"PATH": str(directory)},
        "place": {"TMPDIR": "/dev/null"},
        "leave": {"MLX_DISABLE_COMPILE": "1"},
    }[lack]


CHILD = """
import json
import mlx.core as mx
from mlx_promptcache import exponentials, {module} as tried
scores = mx.random.normal((30, 1000))
with exponentials.inferring():
    print(json.dumps([tried.serves(scores), tried._is_the_same()]))
"""


def served_without(lack: str, directory: Path, module: str) -> Any:
    """What a module says there of many scores: whether it serves them, and has MLX's own bits."""
    return processes.python(CHILD.format(module=module), **without(lack, directory))
