"""Where MLX has loops over vectors, and where it can compile some: for the tests of those that are
compiled here.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import mlx.core as mx
import pytest

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
