"""mlx_promptcache: an MLX model runner that keeps the whole inference state on disk.

    from mlx_promptcache import Runner, Sampling

    runner = Runner.load("path-or-repo")
    state = runner.prefill("A long prefix ...")
    runner.cache.save("prefix", state)

Names are imported when they are first used, so that what needs no MLX does not wait for it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from mlx_promptcache.errors import (
    CacheLocked,
    CacheMiss,
    DamagedFile,
    ForeignStore,
    ModelError,
    PromptCacheError,
    PromptError,
    RankError,
    StoreError,
    UnreadableStore,
    UnsupportedLayer,
)
from mlx_promptcache.version import __version__

if TYPE_CHECKING:
    from mlx_promptcache.cache import PromptCache
    from mlx_promptcache.fingerprint import Fingerprint, KVSettings
    from mlx_promptcache.match import Match
    from mlx_promptcache.run import Step
    from mlx_promptcache.runner import Runner
    from mlx_promptcache.sampling import Sampling
    from mlx_promptcache.state import State
    from mlx_promptcache.writer import Saved

_HOMES = {
    "Fingerprint": "fingerprint",
    "KVSettings": "fingerprint",
    "Match": "match",
    "PromptCache": "cache",
    "Runner": "runner",
    "Sampling": "sampling",
    "Saved": "writer",
    "State": "state",
    "Step": "run",
}

__all__ = [
    "CacheLocked",
    "CacheMiss",
    "DamagedFile",
    "Fingerprint",
    "ForeignStore",
    "KVSettings",
    "Match",
    "ModelError",
    "PromptCache",
    "PromptCacheError",
    "PromptError",
    "RankError",
    "Runner",
    "Sampling",
    "Saved",
    "State",
    "Step",
    "StoreError",
    "UnreadableStore",
    "UnsupportedLayer",
    "__version__",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
