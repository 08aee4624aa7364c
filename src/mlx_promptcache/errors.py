"""What can go wrong, as a tree.

PromptCacheError
├── CacheMiss            what was asked for is not to be had: no such name, stale, damaged
│   ├── DamagedFile      a file whose content is not what was written
│   └── ForeignFile      a sound file of another version of the format
├── CacheLocked          another process holds the store's lock
├── StoreError           the file system said no: disk full, no permission
│   ├── ForeignStore     a store that belongs to another user
│   └── UnreadableStore  a store that cannot be looked into
├── UnsupportedLayer     a layer that cannot be captured, or filled from this file
│   └── NotQuantisable   a layer that mlx-lm cannot quantise as it was asked to
├── ModelError           no such model, or not one that mlx-lm can load
├── RemoteError          a place that is shared cannot be reached, or says no
├── SignatureError       a key that cannot be read, or a state that nobody signed who is trusted
├── PromptError          a prompt that cannot be run: empty, or longer than the context
├── ServingError         a server that cannot be started
├── RankError            another process of a distributed run failed, or cannot be reached
└── MeasuringError       a program that was to be measured did not do its work

Each message is one sentence that says what is wrong and, where there is something, what to do.
Only an explicit request raises them: on the generating path each is a miss and a notice.
"""

from __future__ import annotations


class PromptCacheError(Exception):
    """The root of the tree: every error that this package raises on purpose."""


class CacheMiss(PromptCacheError):
    """The state that was asked for cannot be used; `reason` says why in one sentence."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class DamagedFile(CacheMiss):
    """A file of the store fails its checks: truncated, altered, or not ours at all."""


class ForeignFile(CacheMiss):
    """A file of another version of the format: not for this program, and not to be touched."""


class CacheLocked(PromptCacheError):
    """The store's lock was not to be had in time."""


class StoreError(PromptCacheError):
    """The file system refused: disk full, no permission, not a directory."""


class ForeignStore(StoreError):
    """The store belongs to another user, and it was not said that it may be used."""


class UnreadableStore(StoreError):
    """There may be a store, but the file system does not let us look into it."""


class UnsupportedLayer(PromptCacheError):
    """A layer's content does not fit this model's layers, or cannot be taken down at all."""


class NotQuantisable(UnsupportedLayer):
    """mlx-lm cannot quantise such a layer, or not with these settings."""


class ModelError(PromptCacheError):
    """There is no such model, or it cannot be loaded."""


class RemoteError(PromptCacheError):
    """A place that is shared cannot be reached, refuses, or is too slow."""


class SignatureError(PromptCacheError):
    """A key cannot be read, or what came is not signed by anybody who is trusted."""


class PromptError(PromptCacheError):
    """The prompt cannot be run as it is."""


class ServingError(PromptCacheError):
    """The server cannot be started: no address to listen at, another mlx-lm, no model."""


class RankError(PromptCacheError):
    """Another rank has failed, cannot be reached, or was given something else than this one."""


class MeasuringError(PromptCacheError):
    """A program that was to be measured failed, or something that measuring needs is not there."""
