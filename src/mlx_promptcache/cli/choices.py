"""What the options of a command chose: a model and its store, a prompt, sampling, a remote."""

from __future__ import annotations

import functools
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import click

from mlx_promptcache import models, places
from mlx_promptcache.cli import output
from mlx_promptcache.errors import ForeignStore, ModelError, PromptError, UnreadableStore
from mlx_promptcache.fingerprint import Fingerprint, KVSettings, remembered
from mlx_promptcache.store import Store

if TYPE_CHECKING:
    from mlx_promptcache.cache import PromptCache
    from mlx_promptcache.checkpoint import Loaded
    from mlx_promptcache.container import Header
    from mlx_promptcache.ranks import Ranks
    from mlx_promptcache.runner import Runner
    from mlx_promptcache.sampling import Sampling
    from mlx_promptcache.signatures import Signer

T = TypeVar("T")

NO_TEXT = "is not UTF-8 text: convert it first, with iconv for example"
MESSAGES = 'write it as [{"role": "user", "content": "..."}]'


def signer(key_file: str | None) -> Signer | None:
    """The key that signs, if there is one.

    Raises:
        SignatureError: it cannot be read, or is none.
    """
    if key_file is None:
        return None
    from mlx_promptcache.signatures import Signer

    return Signer.load(Path(key_file).expanduser())


class RemoteChoice(NamedTuple):
    """The options of a remote below the store."""

    remote: str | None
    remote_seconds: float
    sign: str | None

    def attach(self, cache: PromptCache | None) -> None:
        """Let a cache use the remote, if there is one.

        Raises:
            SignatureError: the key that is to sign cannot be read.
        """
        if cache is not None and self.remote is not None:
            key = signer(self.sign)
            cache.attach(self.remote, signer=key, seconds=self.remote_seconds)


def model_path(model: str | None, *, download: bool = True) -> Path:
    """The directory of a model, of the demo model if none is given.

    Raises:
        ModelError: there is no such model, or none is chosen.
    """
    if model is not None:
        return models.find(model, download=download)
    demo = places.demo_model()
    if demo is None:
        raise ModelError(
            "no model is chosen: give one with --model PATH_OR_REPO, or in MLX_PROMPTCACHE_MODEL"
        )
    return demo


@dataclass(frozen=True)
class ModelChoice:
    """The model options of a command."""

    model: str | None
    adapter_path: str | None
    cache_dir: str | None
    kv_bits: int | None
    kv_group_size: int
    quantized_kv_start: int
    max_kv_size: int | None
    draft_model: str | None
    num_draft_tokens: int
    salt: str
    allow_foreign_store: bool
    shard: str | None = None

    def __post_init__(self) -> None:
        try:
            KVSettings(self.kv_bits, self.kv_group_size, self.quantized_kv_start, self.max_kv_size)
        except ValueError as exc:
            raise click.UsageError(str(exc)) from exc

    @property
    def kv(self) -> KVSettings:
        """How K/V are kept."""
        return KVSettings(
            self.kv_bits, self.kv_group_size, self.quantized_kv_start, self.max_kv_size
        )

    def path(self, *, download: bool = True) -> Path:
        """The model's directory.

        Raises:
            ModelError: there is no such model, or none is chosen.
        """
        return model_path(self.model, download=download)

    def store(self, *, download: bool = False, read_only: bool = False) -> Store:
        """The store, checked to be one. Needs no model if `--cache-dir` is given."""
        directory = places.expanded(self.cache_dir) if self.cache_dir else None
        store = Store(
            directory or places.store_directory(self.path(download=download)),
            allow_foreign=self.allow_foreign_store,
            read_only=read_only or places.writing_is_off(),
        )
        store.check()
        return store

    def parts(self, *, download: bool = True) -> tuple[Path | None, Path | None]:
        """The directories of the adapter and of the draft model.

        Raises:
            ModelError: there is no such draft model.
        """
        adapter = Path(self.adapter_path) if self.adapter_path else None
        draft = models.find(self.draft_model, download=download) if self.draft_model else None
        return adapter, draft

    def fingerprint(self) -> Fingerprint | None:
        """The fingerprint of the model, to tell stale states; None where no model is chosen."""
        if self.model is None and self.cache_dir is not None:
            return None
        try:
            return self.certain_fingerprint()
        except ModelError:
            if self.cache_dir is None:
                raise
            return None

    def certain_fingerprint(self, *, download: bool = False) -> Fingerprint:
        """The fingerprint of the model. Raises ModelError if there is none."""
        path, (adapter, draft) = self.path(download=download), self.parts(download=download)
        return remembered(path, adapter=adapter, kv=self.kv, salt=self.salt, draft=draft)

    @functools.cached_property
    def ranks(self) -> Ranks | None:
        """The processes that run the model together; of them the first one speaks.

        Raises:
            RankError: they are wanted, and there are none.
        """
        if self.shard is None:
            return None
        from mlx_promptcache.ranks import Ranks

        ranks = Ranks.join(self.shard)
        output.speak_for(ranks.rank)
        return ranks

    def stored(self, name: str) -> tuple[Store, Header]:
        """The store, and the header of a named state in it: of this rank's part of that.

        Raises:
            CacheMiss: there is none; DamagedFile if it is damaged.
            RankError: another rank has none.
        """
        from mlx_promptcache import catalog

        ranks = self.ranks
        if ranks is None:
            store = self.store()
            return store, catalog.find(store, name)[1]
        with ranks.together("looking for the state"):
            store = self.store()
            return store, catalog.find(store, ranks.own_name(name))[1]

    def begin(
        self,
        *,
        use_cache: bool = True,
        read_only: bool = False,
        needs_store: bool = True,
        saves: bool = False,
    ) -> Loaded | None:
        """Begin to load the model: while its weights are read other things can be imported, and its
        fingerprint was looked for before. What several processes load together is begun by none:
        None.

        Raises:
            ForeignStore: the store is another user's, and there must be one: it `needs_store`.
            UnreadableStore: the store cannot be read, and there must be one.
            StoreError: the store is read-only, and the command `saves` under a name.
        """
        if self.ranks is not None:
            return None
        path, fingerprint = self.path(), None
        models.config(path)  # whether there is a model at all
        if use_cache:
            try:
                # Before the model, which takes long.
                store = self.store(download=True, read_only=read_only)
                if saves:
                    store.check_writable()
            except (ForeignStore, UnreadableStore):
                if needs_store:
                    raise
            fingerprint = self.certain_fingerprint(download=True)
        from mlx_promptcache import checkpoint

        loaded = checkpoint.load(path, Path(self.adapter_path) if self.adapter_path else None)
        return loaded._replace(fingerprint=fingerprint)

    def runner(
        self,
        *,
        read_only: bool = False,
        use_cache: bool = True,
        max_bytes: int | None = None,
        loaded: Loaded | None = None,
        saves: bool = False,
    ) -> Runner:
        """Load the model, which may have been begun. Raises as `begin` does."""
        loaded = loaded or self.begin(use_cache=use_cache, saves=saves)
        from mlx_promptcache.runner import Runner

        return Runner.load(
            str(self.path()),
            self.adapter_path,
            self.kv_bits,
            self.cache_dir,
            kv_group_size=self.kv_group_size,
            quantized_kv_start=self.quantized_kv_start,
            max_kv_size=self.max_kv_size,
            draft_model=self.draft_model,
            num_draft_tokens=self.num_draft_tokens,
            salt=self.salt,
            read_only=read_only,
            use_cache=use_cache,
            max_bytes=max_bytes,
            allow_foreign=self.allow_foreign_store,
            loaded=loaded,
            shard=self.shard,
        )


@dataclass(frozen=True)
class PromptChoice:
    """The prompt options of a command, files and standard input not yet read."""

    prompt: str | None
    prompt_file: str | None
    system_prompt: str | None
    messages: str | None
    ignore_chat_template: bool
    prefix: str | None
    prefix_file: str | None

    def __post_init__(self) -> None:
        for one, other in (("prompt", "prompt_file"), ("prefix", "prefix_file")):
            if getattr(self, one) is not None and getattr(self, other) is not None:
                flags = [f"--{name.replace('_', '-')}" for name in (one, other)]
                raise click.UsageError(f"give {flags[0]} or {flags[1]}, not both")
        if self.messages is not None and (self.prefix is not None or self.prefix_file is not None):
            raise click.UsageError(
                "--prefix stands before a prompt of text: put it into the messages instead"
            )
        for text in (self.prompt, self.prefix, self.system_prompt):
            if text is not None and not _is_text(text):
                raise click.UsageError(f"a prompt on the command line {NO_TEXT}")

    @property
    def given(self) -> bool:
        """Whether there is a prompt at all."""
        texts = (self.prompt, self.prompt_file, self.messages, self.prefix, self.prefix_file)
        return any(text is not None for text in texts)

    def text(self) -> str:
        """The prompt itself."""
        if self.prompt == "-":
            try:
                return sys.stdin.buffer.read().decode()
            except UnicodeDecodeError as exc:
                raise PromptError(f"standard input {NO_TEXT}") from exc
        return self.prompt if self.prompt is not None else _file(self.prompt_file)

    def check_shared(self, ranks: Ranks | None) -> None:
        """Raise UsageError if one of several processes cannot read this prompt."""
        if ranks is not None and self.prompt == "-":
            raise click.UsageError(
                "mlx.launch never ends its processes' standard input: give --prompt-file"
            )

    def prefix_text(self) -> str:
        """What stands before the prompt."""
        return self.prefix if self.prefix is not None else _file(self.prefix_file)

    def chat(self) -> list[dict[str, Any]] | None:
        """The messages, with those that other options add."""
        if self.messages is None:
            return None
        try:
            chat = json.loads(_file(self.messages))
        except (ValueError, RecursionError) as exc:
            raise PromptError(f"{self.messages} is not JSON ({exc}): {MESSAGES}") from exc
        if not isinstance(chat, list) or not all(
            isinstance(m, dict) and isinstance(m.get("role"), str) for m in chat
        ):
            raise PromptError(f"{self.messages} is no list of messages with roles: {MESSAGES}")
        if self.system_prompt is not None:
            chat.insert(0, {"role": "system", "content": self.system_prompt})
        if text := self.text():
            chat.append({"role": "user", "content": text})
        return chat


class SamplingChoice(NamedTuple):
    """The sampling options of a command, by the names of `Sampling`; None if not given."""

    temp: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    min_tokens_to_keep: int | None
    xtc_probability: float | None
    xtc_threshold: float | None
    logit_bias: dict[int, float] | None
    repetition_penalty: float | None
    repetition_context_size: int | None
    presence_penalty: float | None
    presence_context_size: int | None
    frequency_penalty: float | None
    frequency_context_size: int | None
    seed: int | None

    def sampling(self, base: Sampling | None = None, tokenizer: Any = None) -> Sampling:
        """What is asked for; what is not comes from `base`, but for the seed.

        XTC that is asked for spares the tokenizer's line ends and end tokens, as mlx_lm.generate's.

        Raises:
            UsageError: it makes no sense.
        """
        from mlx_promptcache.sampling import Sampling

        given = {name: value for name, value in self._asdict().items() if value is not None}
        if self.xtc_probability and tokenizer is not None:
            ends = [*tokenizer.encode("\n"), *tokenizer.eos_token_ids]
            given["xtc_special_tokens"] = ends
        try:
            return replace(base or Sampling(), **{**given, "seed": self.seed})
        except ValueError as exc:
            raise click.UsageError(str(exc)) from exc


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes that were no text came in as lone surrogates
        return False
    return True


def _file(name: str | None) -> str:
    if name is None:
        return ""
    try:
        return places.expanded(name).read_text("utf-8")
    except OSError as exc:
        raise PromptError(
            f"{name} cannot be read: {exc.strerror}; give the path of a text file"
        ) from exc
    except UnicodeDecodeError as exc:
        raise PromptError(f"{name} {NO_TEXT}") from exc


def take(kind: type[T], options: dict[str, Any]) -> T:
    """Take the options that belong to one of the choices above out of all of a command's."""
    names = [name for name in kind.__annotations__ if name in options]
    return kind(**{name: options.pop(name) for name in names})
