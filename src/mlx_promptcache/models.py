"""Model directories: where a model is, and what its configuration says. Loads nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from mlx_promptcache import places
from mlx_promptcache.errors import ModelError

FILES = [
    "*.json",
    "model*.safetensors",
    "*.py",
    "tokenizer.model",
    "*.tiktoken",
    "*.txt",
    "*.jinja",
]
AGAIN = "bring the model again"
CONTEXT_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "n_ctx",
    "model_max_length",
)


def find(path_or_repo: str, *, download: bool = True) -> Path:
    """The directory of a model: a local one, or a Hugging Face repo's, downloaded if need be.

    Raises:
        ModelError: there is no such directory, and no such repo that can be reached.
        StoreError: it begins with `~`, and there is no such home directory.
    """
    path = places.expanded(path_or_repo)
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"{path_or_repo} is a file: give the directory that holds the model")
    if path.is_absolute() or path_or_repo.startswith((".", "~")) or path_or_repo.count("/") != 1:
        raise ModelError(
            f"there is no model directory {path_or_repo}: give one that is there, or a Hugging "
            "Face repo as OWNER/NAME"
        )
    return _from_hub(path_or_repo, download=download)


def _from_hub(repo: str, *, download: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(repo, allow_patterns=FILES, local_files_only=True))
    except HFValidationError as exc:
        raise ModelError(
            f"{repo!r} is neither a directory nor the name of a repo: give a directory that is "
            "there, or a Hugging Face repo as OWNER/NAME"
        ) from exc
    except Exception:  # noqa: BLE001, S110 - not there yet, or not whole: whatever it is, download
        pass
    if not download:
        raise ModelError(
            f"there is no directory {repo}, and no such repo has been downloaded yet: `generate` "
            "downloads it, and --cache-dir names a store without a model"
        )
    try:
        return Path(snapshot_download(repo, allow_patterns=FILES))
    except Exception as exc:
        raise ModelError(
            f"there is no directory {repo}, and the Hugging Face repo of that name cannot be had: "
            f"{type(exc).__name__}; check its name and the network"
        ) from exc


def config(model: Path) -> dict[str, Any]:
    """The model's `config.json`.

    Raises:
        ModelError: it is not there, or is not a JSON object.
    """
    try:
        value = json.loads((model / "config.json").read_bytes())
    except OSError:
        raise ModelError(
            f"{model} holds no model: it has no config.json; give the directory of a model in "
            "MLX's format"
        ) from None
    except (ValueError, RecursionError):
        raise ModelError(f"{model / 'config.json'} is not JSON: {AGAIN}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{model / 'config.json'} is not a JSON object: {AGAIN}")
    return value


def context_length(settings: dict[str, Any]) -> int | None:
    """How many tokens the model was made for; None where its configuration does not say."""
    for part in (settings, settings.get("text_config")):
        for key in CONTEXT_KEYS if isinstance(part, dict) else ():
            length = part.get(key)  # type: ignore[union-attr]
            if isinstance(length, int) and length > 0:
                return max(length, _scaled(part))
    return None


def _scaled(settings: Any) -> int:
    """The context that a scaled rotary embedding reaches; 0 where there is none."""
    scaling = settings.get("rope_scaling") or settings.get("rope_parameters")
    if not isinstance(scaling, dict):
        return 0
    original, factor = scaling.get("original_max_position_embeddings"), scaling.get("factor")
    if not isinstance(original, int) or not isinstance(factor, (int, float)):
        return 0
    if not math.isfinite(factor):
        return 0
    return int(original * factor)
