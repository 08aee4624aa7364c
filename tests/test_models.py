"""Model directories and repos in the Hugging Face cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import processes
from mlx_promptcache import models
from mlx_promptcache.errors import ModelError

if TYPE_CHECKING:
    from pathlib import Path


def cached_repo(cache: Path) -> Path:
    """A repo in the layout of the Hugging Face cache; returns the directory of its one revision."""
    home, revision = cache / "models--someone--model", "0123456789abcdef0123456789abcdef01234567"
    snapshot = home / "snapshots" / revision
    (home / "blobs").mkdir(parents=True)
    (home / "refs").mkdir()
    snapshot.mkdir(parents=True)
    (home / "refs" / "main").write_text(revision, "utf-8")
    (home / "blobs" / "aa").write_text("{}", "utf-8")
    (snapshot / "config.json").symlink_to("../../blobs/aa")
    return snapshot


FIND = """
import json, sys
from mlx_promptcache import models
try:
    print(json.dumps(str(models.find(sys.argv[1]))))
except models.ModelError as exc:
    print(json.dumps({"error": str(exc)}))
"""


def test_a_repo_that_was_downloaded_is_found_without_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = cached_repo(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert processes.python(FIND, "someone/model") == str(snapshot)
    told = processes.python(FIND, "someone/other")["error"]
    assert "someone/other" in told
    assert "\n" not in told


def test_a_local_directory_is_itself(tmp_path: Path) -> None:
    assert models.find(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("path", ["./nothing", "/no/such/model", "a/b/c", "nothing"])
def test_what_is_neither_directory_nor_repo_is_told(path: str) -> None:
    with pytest.raises(ModelError, match="no model directory"):
        models.find(path)


def test_the_context_is_read_from_wherever_the_configuration_keeps_it() -> None:
    assert models.context_length({"max_position_embeddings": 8192}) == 8192
    assert models.context_length({"text_config": {"max_position_embeddings": 4096}}) == 4096
    assert models.context_length({"n_positions": 1024}) == 1024
    assert models.context_length({"hidden_size": 1}) is None
