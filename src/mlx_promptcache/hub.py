"""A remote in a repository of the Hugging Face Hub, where every write is a commit.

What is written is held back until `flush`, and goes as one commit.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from mlx_promptcache.remote import Remote

if TYPE_CHECKING:
    from typing import Any

SCHEME = "hf://"


class HubRemote(Remote):
    """The files of one fingerprint in one repository."""

    def __init__(self, url: str, fingerprint: str) -> None:
        super().__init__(url, fingerprint)
        self._waiting: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def _write(self, path: str, data: bytes) -> None:
        with self._lock:
            self._waiting[f"{self._fs()[1]}/{path}"] = data

    def flush(self) -> None:
        """Commit all that was written."""
        with self._lock:
            waiting, self._waiting = self._waiting, {}
        if not waiting:
            return
        with self._told():
            fs = self._fs()[0]
            places: list[tuple[Any, bytes]] = [
                (fs.resolve_path(path), data) for path, data in waiting.items()
            ]
            from huggingface_hub import CommitOperationAdd

            where = places[0][0]
            fs._api.create_commit(
                repo_id=where.repo_id,
                repo_type=where.repo_type,
                revision=where.revision,
                operations=[CommitOperationAdd(at.path_in_repo, data) for at, data in places],
                commit_message=f"{len(places)} files of prompt caches",
            )
