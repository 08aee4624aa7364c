"""mlx-lm's own server, whose prompt cache has a store below it.

Nothing of the server is written anew: its options, its HTTP, its batches and its answers are
mlx-lm's. It is given a prompt cache of ours, and classes derived from its own that say whose a
prompt is, what a model's states are called, and when an answer may end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

from mlx_promptcache import host, models, places
from mlx_promptcache.backlog import Backlog
from mlx_promptcache.blueprint import Blueprint
from mlx_promptcache.cache import PromptCache
from mlx_promptcache.connections import Connections, Ending
from mlx_promptcache.errors import PromptCacheError, PromptError, ServingError, StoreError
from mlx_promptcache.fingerprint import Fingerprint, KVSettings, remembered
from mlx_promptcache.layers import may_be_padded
from mlx_promptcache.limits import full
from mlx_promptcache.namespaces import COMMON, Namespaces
from mlx_promptcache.pair import Pair
from mlx_promptcache.store import Store
from mlx_promptcache.tiers import Below, Tiers, Tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

log = logging.getLogger("mlx_promptcache")
mlx_server: Any = host.server()

STOP_SECONDS = 30.0
LAST_SECONDS = 10.0  # what a pass of a model, and the last states, may take when all else is over


@dataclass(frozen=True)
class Serving:
    """What is added to mlx-lm's server: where states are kept, for whom, and how it ends."""

    cache_dir: str | None = None
    salt: str = ""
    max_bytes: int | None = None
    allow_foreign: bool = False
    namespaces: Namespaces = field(default_factory=Namespaces)
    stop_seconds: float = STOP_SECONDS
    quiet: bool = False
    attach: Callable[[PromptCache], None] = field(default=lambda _cache: None, repr=False)
    announce: Callable[[str, int], None] = field(default=lambda _host, _port: None, repr=False)

    def check(self) -> None:
        """Raise StoreError if the directory that was asked for cannot be a store."""
        if self.cache_dir is not None:
            self._store(Path(self.cache_dir).expanduser()).check()

    def _store(self, directory: Path) -> Store:
        off = places.writing_is_off()
        return Store(directory, allow_foreign=self.allow_foreign, read_only=off)

    def cache(self, model: Path, fingerprint: Fingerprint, kv: KVSettings) -> PromptCache:
        """The prompt cache of a model.

        Raises:
            StoreError: there can be no store.
        """
        directory = places.store_directory(model, self.cache_dir)
        self._store(directory).check()
        cache = PromptCache(
            directory, fingerprint, kv=kv, max_bytes=self.max_bytes,
            allow_foreign=self.allow_foreign,
        )  # fmt: skip
        self.attach(cache)
        return cache


def main(options: Callable[[argparse.ArgumentParser], tuple[argparse.Namespace, Serving]]) -> None:
    """Run mlx-lm's server to its end. `options` is given mlx-lm's own parser, to add to and parse.

    Raises:
        ServingError: the server cannot be started.
        StoreError, ModelError: there is no such store or model.
    """
    chosen: list[Serving] = []

    def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
        arguments, serving = options(parser)
        chosen.append(serving)
        return arguments

    stand_ins = {
        "argparse": SimpleNamespace(ArgumentParser=_parser_with(parse), Namespace=None),
        "ModelProvider": lambda arguments: Provider(arguments, chosen[0]),
        "run": lambda host, port, provider: _run(host, port, provider, chosen[0]),
        "scan_cache_dir": _scan(mlx_server.scan_cache_dir),
    }
    with _replaced(stand_ins):
        mlx_server.main()


def _parser_with(parse: Callable[[Any], argparse.Namespace]) -> type[argparse.ArgumentParser]:
    names = {"parse_args": parse, "parse_args_of": argparse.ArgumentParser.parse_args}
    return type("Parser", (argparse.ArgumentParser,), names)


def _scan(scanned: Callable[[], Any]) -> Callable[[], Any]:
    """What finds downloaded models; none where there is no place that can be looked through."""
    from huggingface_hub.errors import CacheNotFound

    def scan() -> Any:
        try:
            return scanned()
        except (CacheNotFound, OSError, ValueError):
            return SimpleNamespace(repos=())

    return scan


@contextlib.contextmanager
def _replaced(names: dict[str, Any]) -> Iterator[None]:
    """While this lasts mlx-lm's `main` finds these in the place of its own."""
    before = {name: getattr(mlx_server, name) for name in names}
    vars(mlx_server).update(names)
    try:
        yield
    finally:
        vars(mlx_server).update(before)


def _run(host: str, port: int, provider: Provider, serving: Serving) -> None:
    backlog = Backlog()
    provider.tiers = Tiers(provider.cli_args.prompt_cache_size, backlog)
    generator = Generator(provider, provider.tiers)
    ending = Ending(serving.stop_seconds, serving.announce, lambda: provider.failure is not None)
    connections = type("Connections", (Connections,), {"ending": ending})
    handler = type("Handler", (Handler,), {"serving": serving})
    try:
        if provider.is_distributed and generator._rank:
            generator.join()
        else:
            mlx_server._run_http_server(
                host, port, generator, server_class=connections, handler_class=handler
            )
    except OSError as exc:
        raise ServingError(f"cannot listen at {host}:{port}: {exc.strerror or exc}") from exc
    finally:
        _stop(generator, backlog, provider.tiers)
    if provider.failure is not None:
        raise ServingError(f"mlx-lm cannot load the model: {provider.failure}")


def _stop(generator: Generator, backlog: Backlog, tiers: Tiers) -> None:
    """End the threads, when all answers are given or nobody waits for them any more."""
    ending = threading.Thread(target=generator.stop_and_join, daemon=True)
    ending.start()
    ending.join(LAST_SECONDS)
    left = backlog.close(LAST_SECONDS)
    if left:
        log.warning("%d states could not be written in time, and are lost", left)
    if tiers.below is not None:
        tiers.below.finish_sending()


class Provider(mlx_server.ModelProvider):  # type: ignore[misc]
    """Loads models as mlx-lm does, and finds out what their states are called."""

    tiers: Tiers

    def __init__(self, arguments: argparse.Namespace, serving: Serving) -> None:
        super().__init__(arguments)
        self._serving = serving
        self._prompts_at_once: int = arguments.prompt_concurrency
        self.failure: Exception | None = None
        """Why the model that the server was started with cannot be loaded."""
        self.context_length: int | None = None
        """How many tokens the model that is loaded was made for; None where it does not say."""

    def load_default(self) -> None:
        """Load the model that the server was started with."""
        try:
            super().load_default()
        except Exception as exc:  # noqa: BLE001 - whatever mlx-lm says, the server ends with it
            self.failure = exc

    def _load(
        self,
        model_path: str,
        adapter_path: str | None = None,
        draft_model_path: str | None = None,
    ) -> None:
        paths = (model_path, adapter_path, draft_model_path)
        self.tiers.below, self.context_length = None, None
        before = _fingerprint_of_what_is_here(*paths, self._kv)
        super()._load(*paths)
        self.context_length = _context_length(model_path)
        padded = may_be_padded(mlx_server.make_prompt_cache(self.model))
        self.cli_args.prompt_concurrency = self._prompts_at_once if padded else 1
        try:
            self.tiers.below = self._below(*paths, before)
        except (PromptCacheError, ValueError) as exc:
            log.warning("states of %s are kept in memory only: %s", model_path, exc)

    @property
    def _kv(self) -> KVSettings:
        return kv_settings(self.cli_args)

    def _below(
        self, model: str, adapter: str | None, draft: str | None, before: Fingerprint | None
    ) -> Below:
        """Where the states of the model that was loaded now are kept.

        Raises:
            PromptCacheError: they cannot be.
        """
        if self.is_distributed:
            raise StoreError("each of several machines has a part of them")
        fingerprint = _fingerprint(model, adapter, draft, self._kv)
        if before is not None and before.digest != fingerprint.digest:
            raise StoreError("its files changed while it was loaded; start the server again")
        if self._serving.salt:
            fingerprint = fingerprint.with_salt(self._serving.salt)
        whole = self.model if self.draft_model is None else Pair(self.model, self.draft_model)
        cache = self._serving.cache(models.find(model, download=False), fingerprint, self._kv)
        cache.blueprint = Blueprint.of(whole, self._kv)
        if cache.blueprint.cuts_matter:
            raise StoreError("what it computes depends on where prompts are cut")
        return Below(self.model_key, whole, cache)


def _context_length(model: str) -> int | None:
    """The context of a model that is here; None where nothing tells it."""
    try:
        return models.context_length(models.config(models.find(model, download=False)))
    except PromptCacheError:
        return None


def kv_settings(arguments: argparse.Namespace) -> KVSettings:
    """How K/V are kept; older releases of mlx-lm have no choice.

    Raises:
        ValueError: they cannot be kept so.
    """
    if getattr(arguments, "kv_bits", None) is None:
        return KVSettings()
    return KVSettings(arguments.kv_bits, arguments.kv_group_size, arguments.quantized_kv_start)


def _fingerprint_of_what_is_here(
    model: str, adapter: str | None, draft: str | None, kv: KVSettings
) -> Fingerprint | None:
    """The same, before it is loaded; None if it must be downloaded."""
    try:
        return _fingerprint(model, adapter, draft, kv)
    except PromptCacheError:
        return None


def _fingerprint(model: str, adapter: str | None, draft: str | None, kv: KVSettings) -> Fingerprint:
    return remembered(
        models.find(model, download=False),
        adapter=None if adapter is None else Path(adapter),
        kv=kv,
        draft=None if draft is None else models.find(draft, download=False),
    )


class Generator(mlx_server.ResponseGenerator):  # type: ignore[misc]
    """Computes answers as mlx-lm does. Each prompt says whose it is, an answer ends where the
    model's context does, and its end waits until its state is in the store.
    """

    def _next_request(self, timeout: float | None = None) -> Any:
        self.prompt_cache.release()
        found = super()._next_request(timeout)
        if found is None:
            return None
        queue, *rest = found
        return (_Answer(queue, self.prompt_cache), *rest)

    def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> Any:
        namespace: str = getattr(request, "namespace", COMMON)
        prompt, *rest = super()._tokenize(tokenizer, request, args)
        args.max_tokens = min(args.max_tokens, _room_after(prompt, self.model_provider))
        for part in rest:
            if hasattr(part, "cache_key"):  # the prompt again, with images in it
                part.cache_key = Tokens(part.cache_key, namespace)
        return (Tokens(prompt, namespace), *rest)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Have a request answered.

        Raises:
            Refusal: its prompt cannot be answered.
        """
        try:
            return super().generate(*args, **kwargs)
        except PromptError as exc:
            raise Refusal(str(exc)) from exc


def _room_after(prompt: list[int], provider: Provider) -> int:
    """How many tokens may follow a prompt: at least one.

    Raises:
        PromptError: there is no room for an answer, or nothing to answer.
    """
    if not prompt:  # mlx-lm's generators would stop for good
        raise PromptError("the prompt is empty")
    if provider.context_length is None:
        return sys.maxsize
    if len(prompt) >= provider.context_length:
        raise full(len(prompt), provider.context_length)
    return provider.context_length - len(prompt)


class Refusal(BaseException):
    """A prompt that cannot be answered. No `Exception`: to those mlx-lm's handler answers itself,
    that there is no such page.
    """


class _Answer:
    """The queue that an answer is put in. Its end, a None, comes when the state that mlx-lm inserts
    next is written: who has a whole answer has its state on disk.
    """

    def __init__(self, queue: Any, tiers: Tiers) -> None:
        self._queue, self._tiers = queue, tiers

    def put(self, item: Any) -> None:
        if item is None:
            self._tiers.hold(lambda: self._queue.put(None))
        else:
            self._queue.put(item)


class Handler(mlx_server.APIHandler):  # type: ignore[misc]
    """Answers as mlx-lm does, says whose a request is, and why one is refused."""

    serving: ClassVar[Serving]

    def handle_chat_completions(self) -> Any:
        """The request of a chat."""
        return self._named(super().handle_chat_completions())

    def handle_text_completions(self) -> Any:
        """The request of a text."""
        return self._named(super().handle_text_completions())

    def _named(self, request: Any) -> Any:
        authorization = self.headers.get("Authorization")
        request.namespace = self.serving.namespaces.of(authorization, self.body.get("user"))
        return request

    def handle_completion(self, request: Any, stop_words: list[str]) -> None:
        """Answer a request, or say why its prompt is refused."""
        try:
            super().handle_completion(request, stop_words)
        except Refusal as refusal:
            self._refuse(str(refusal))

    def _refuse(self, sentence: str) -> None:
        """Answer as OpenAI's servers do where a request makes no sense."""
        self._set_completion_headers(400)
        self.end_headers()
        error = {"message": sentence, "type": "invalid_request_error", "param": None, "code": None}
        self.wfile.write(json.dumps({"error": error}).encode())

    def do_POST(self) -> None:  # noqa: N802 - the name is Python's
        """Answer, and be waited for when the server ends."""
        with self.server.answering():
            super().do_POST()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name is Python's
        """Log a request, unless nothing is to be told."""
        if not self.serving.quiet:
            super().log_message(format, *args)
