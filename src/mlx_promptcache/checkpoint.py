"""From a model's directory to a model, through mlx-lm's own loading code."""

from __future__ import annotations

import atexit
import contextlib
import importlib
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_promptcache import engine
from mlx_promptcache.errors import ModelError, StoreError
from mlx_promptcache.mapped import MappedFiles
from mlx_promptcache.streams import of_any_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from mlx_promptcache.fingerprint import Fingerprint
    from mlx_promptcache.ranks import Ranks

AT_ONCE = 16  # arrays that are waited for together; fewer leave cores idle, all could not be left


class Weights:
    """The weights of a model, on their way from its files while other things are done."""

    def __init__(self, model: Any, path: Path, files: MappedFiles, *, beside: bool) -> None:
        self._path, self._files = path, files
        self._error: Exception | None = None
        self._leaving = False
        self._thread = threading.Thread(target=self._read, args=(model,), daemon=True)
        if beside:
            self._thread.start()
            atexit.register(self._leave)
        else:
            self._thread.run()

    def _read(self, model: Any) -> None:
        try:
            parameters: Any = tree_flatten(model.parameters())
            arrays = [array for _, array in parameters]
            arrays += self._files.touches(arrays)
            for i in range(0, len(arrays), AT_ONCE):
                if self._leaving:
                    return
                mx.eval(arrays[i : i + AT_ONCE])
        except Exception as exc:  # noqa: BLE001 - whatever it is, `wait` tells of it
            self._error = exc

    def _leave(self) -> None:
        """End the reading: MLX aborts a process that ends while it computes in another thread."""
        self._leaving = True
        self._thread.join()

    def wait(self) -> None:
        """Return when they are there.

        Raises:
            ModelError: they cannot be read.
        """
        if self._thread.ident is not None:
            self._thread.join()
            atexit.unregister(self._leave)
        if self._error is not None:
            why = " ".join(str(self._error).split())
            raise ModelError(
                f"the weights of {self._path} cannot be read: {why}; bring the model again"
            ) from self._error

    def check(self) -> None:
        """Return if they are still what they were.

        Raises:
            StoreError: a file that they are in may have been overwritten in its place.
        """
        if self._files.changed():
            raise StoreError(
                f"the weights of {self._path} may have been overwritten while they were in use: "
                "nothing is stored of what they compute until the model is loaded again"
            )


class Loaded(NamedTuple):
    """A model, its configuration, and its weights, which are being read; and the fingerprint of its
    files from before that, if it was looked for.
    """

    model: Any
    config: Mapping[str, Any]
    weights: Weights
    fingerprint: Fingerprint | None = None


def load(path: Path, adapter: Path | None, *, ranks: Ranks | None = None) -> Loaded:
    """Load a model, with `ranks` the part of it that this one computes; its weights are being read
    when this returns.

    Nothing may be computed with them before they are there.

    Raises:
        ModelError: mlx-lm cannot load it, or not split it.
    """
    # On a GPU what is computed of the weights as they come is computed there, in this thread.
    stream, files = of_any_thread(), MappedFiles()
    with contextlib.nullcontext() if stream is None else mx.stream(stream):
        model, config = unread(path, adapter, files.load)
        if ranks is not None:
            ranks.split(model)
    _keep_in_memory()
    return Loaded(model, config, Weights(model, path, files, beside=stream is not None))


def unread(
    path: Path, adapter: Path | None, read: Callable[..., Any] = mx.load
) -> tuple[Any, Mapping[str, Any]]:
    """A model and its configuration. `read` stands in the place of `mx.load`, which reads no more
    of weights than their headers.

    Raises:
        ModelError: mlx-lm cannot load it.
    """
    try:
        model, config = engine.load_model(path, read)
        if adapter is not None:
            model = engine.utils().load_adapters(model, str(adapter))
            model.eval()
    except Exception as exc:
        raise ModelError(
            f"mlx-lm cannot load {path}: {_why(exc)}; take a model that the installed mlx-lm runs, "
            "or another release of mlx-lm"
        ) from exc
    return model, config


def load_tokenizer(path: Path, config: Mapping[str, Any]) -> Any:
    """The tokenizer of a model, as `mlx_lm.load` makes it.

    Raises:
        ModelError: mlx-lm cannot load it.
    """
    try:
        return _tokenizer(path, config.get("eos_token_id"))
    except Exception as exc:
        raise ModelError(
            f"mlx-lm cannot load the tokenizer of {path}: {_why(exc)}; bring the model again"
        ) from exc


def _why(exc: Exception) -> str:
    return " ".join(str(exc).split()).rstrip(".") or type(exc).__name__


def _tokenizer(path: Path, ends: Any) -> Any:
    wrapper = importlib.import_module("mlx_lm.utils").load_tokenizer(path, eos_token_ids=ends)
    # transformers warns of texts beyond the context, once and only where it encodes; whoever runs a
    # prompt tells it in words of this program's own.
    told = getattr(wrapper, "deprecation_warnings", None)
    if isinstance(told, dict):
        told["sequence-length-is-longer-than-the-specified-maximum"] = True
    return wrapper


def _keep_in_memory() -> None:
    """Let Metal wire as much memory as it recommends: without it large models are slow, and so
    mlx-lm does the same. Elsewhere there is nothing to do.
    """
    recommended = mx.device_info().get("max_recommended_working_set_size")
    if isinstance(recommended, int):
        mx.set_wired_limit(recommended)
