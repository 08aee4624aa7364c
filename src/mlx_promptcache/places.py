"""Where things are on this machine: the user's cache directory, the demo model, a model's store."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from mlx_promptcache import memo
from mlx_promptcache.errors import StoreError

log = logging.getLogger("mlx_promptcache")

STORE = "prompt_cache"
READ_ONLY = "MLX_PROMPTCACHE_READ_ONLY"
DEMO_MODEL = "SmolLM2-135M-Instruct"


def user_cache() -> Path:
    """The directory of this program among the user's caches; it need not exist.

    Raises:
        StoreError: this user has no home directory.
    """
    if sys.platform == "darwin":
        return expanded("~") / "Library" / "Caches" / "mlx_promptcache"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else expanded("~") / ".cache") / "mlx_promptcache"


def expanded(path: str) -> Path:
    """A path that a user gave, which may begin with `~`.

    Raises:
        StoreError: that user has no home directory.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        sentence = f"there is no home directory for {path!r}: give the path whole, or set HOME"
        raise StoreError(sentence) from None


def demo_model() -> Path | None:
    """The model that `scripts/demo` brings, if it is there."""
    path = user_cache() / "demo" / DEMO_MODEL
    return path if (path / "config.json").is_file() else None


def model_store(model: Path) -> Path:
    """The store beside a model's weights."""
    return model / STORE


def user_store(model: Path) -> Path:
    """The store of a model whose own directory cannot be written."""
    return (
        user_cache() / "stores" / str(model.resolve()).strip(os.sep).replace(os.sep, "--") / STORE
    )


def writing_is_off() -> bool:
    """Whether the user wants nothing to be written to any store."""
    return os.environ.get(READ_ONLY, "") not in {"", "0"}


def is_writable(directory: Path) -> bool:
    """Whether files can be made in this directory, or in the nearest one above that exists."""
    while not directory.exists():
        directory = directory.parent
    return directory.is_dir() and os.access(directory, os.W_OK | os.X_OK)


def store_directory(model: Path, cache_dir: str | None = None) -> Path:
    """The store of a model: the one given, or the one beside it, or the user's own if that one
    cannot be written, with a notice.
    """
    if cache_dir is not None:
        return expanded(cache_dir)
    beside = model_store(model)
    if is_writable(beside):
        return beside
    other = user_store(model)
    log.warning("%s cannot be written: prompt caches are kept in %s", model, other)
    return other


def known_stores() -> list[Path]:
    """Every store that this user has written to and that is still there."""
    try:
        lines = _stores_file().read_text("utf-8", "surrogateescape").split("\n")
    except OSError:
        return []
    return [Path(line) for line in dict.fromkeys(lines) if os.path.isdir(line)]  # noqa: PTH112


def remember_store(directory: Path) -> None:
    """Note that this user has written to a store, and forget stores that are gone."""
    path, known = directory.resolve(), known_stores()
    if path in known:
        return
    memo.write(_stores_file(), "".join(f"{line}\n" for line in [*known, path]))


def weights_memo() -> Path:
    """Where the identities of weight files are remembered, for this user on this machine."""
    return user_cache() / "weights.json"


def rates_memo() -> Path:
    """Where it is remembered how fast this machine reads and computes."""
    return user_cache() / "rates.json"


def list_memos() -> Path:
    """Where it is remembered what the lists of stores read, for this user on this machine."""
    return user_cache() / "lists"


def incoming() -> Path:
    """Where files that come from elsewhere are until they are whole."""
    return user_cache() / "incoming"


def remotes_memo() -> Path:
    """Where it is remembered which remotes could not be reached, and until when they are let be."""
    return user_cache() / "remotes.json"


def _stores_file() -> Path:
    return user_cache() / "stores.txt"
