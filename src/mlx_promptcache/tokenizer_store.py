"""Tokenizers in a store: made by transformers once, kept as what they came to; in parts if excerpts
can be made of it, or else as the JSON of the Rust tokenizer.

`tokenizers/3f/<key>.safetensors`, a container like any other; the key is a hash of the files of the
model's directory that a tokenizer is made from, and of the releases that made it. Losing the file
costs seconds.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import importlib.util
import json
import logging
import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_promptcache import arithmetic, container
from mlx_promptcache.container import Array
from mlx_promptcache.errors import CacheMiss, DamagedFile, ForeignStore, PromptCacheError
from mlx_promptcache.excerpts import DTYPES, FRAME, Excerpts, Parts, rust_of, taken_apart
from mlx_promptcache.headers import TOKENIZER
from mlx_promptcache.store import TOKENIZERS
from mlx_promptcache.tokenizer import Facts, Tokenizer, wrapped
from mlx_promptcache.tokenizer_trial import agrees, facts_of, outlines_of
from mlx_promptcache.tree import KEY_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import TypeAlias

    from mlx_promptcache.budget import Budget
    from mlx_promptcache.quarantine import Quarantine
    from mlx_promptcache.store import Store
    from mlx_promptcache.tokenizer import Rust

    Form: TypeAlias = Parts | str  # of a tokenizer: taken apart, or the JSON of the whole

log = logging.getLogger("mlx_promptcache")

ARRAY = "tokenizer.json"
MERGES = '"merges":['  # no text that has a quote in it, and no token: these are numbered
FORMAT = 4  # raised when what is kept means something else
FILES = (
    "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "*.jsonl",
    "additional_chat_templates/*.jinja",
)  # fmt: skip
VERSION = re.compile(rb"^__version__ = [\"']([^\"']+)", re.MULTILINE)
LARGEST_BYTES = 1 << 28


class TokenizerStore:
    """The tokenizers of one store."""

    def __init__(self, store: Store, bad: Quarantine, budget: Budget) -> None:
        self._store, self._bad, self._budget = store, bad, budget

    def tokenizer(self, model: Path, whole: Callable[[], Any], *, keeps: bool) -> Any:
        """The tokenizer of a model, wrapped as mlx-lm wraps it.

        `whole` makes the whole one, for what the kept one does not know, or if none is kept; then,
        with `keeps`, it is kept. Failing to keep it is no matter.
        """
        stem = _stem_or_none(model)
        kept = None if stem is None else self._load(stem, whole)
        if kept is not None:
            return kept
        with _no_garbage():
            tokenizer = whole()
            # Files that were replaced meanwhile are not what it was made from.
            if keeps and stem is not None and stem == _stem_or_none(model):
                self._keep(stem, tokenizer)
        return tokenizer

    def _load(self, stem: str, whole: Callable[[], Any]) -> Any:
        try:
            with self._store.reader(TOKENIZERS, stem) as reader:
                header = reader.header()
                facts, entries = _checked(header)
                arrays = {
                    name: container.read_array(reader.read, entry)
                    for name, entry in entries.items()
                }
            damaged = functools.partial(self._bad.set_aside, TOKENIZERS, stem)
            rust = _rust(_form_of(arrays), facts)
            tokenizer = wrapped(Tokenizer(rust, facts, whole, damaged), facts)
        except ForeignStore:  # every prompt is told so
            return None
        except PromptCacheError as exc:
            if isinstance(exc, DamagedFile) or not isinstance(exc, CacheMiss):
                self._bad.set_aside(TOKENIZERS, stem, exc)
        except Exception as exc:  # noqa: BLE001 - whatever another release does otherwise
            log.debug("the tokenizer that is kept cannot be used: %s", exc)
        else:
            if not self._bad.read_only:
                self._store.touch(TOKENIZERS, stem)
            return tokenizer
        return None

    def _keep(self, stem: str, wrapper: Any) -> None:
        try:
            facts = facts_of(wrapper)
            if facts is None:
                return
            facts = facts._replace(outlines=outlines_of(wrapper, facts))
            for form in _forms(wrapper.backend_tokenizer.to_str()):
                if _stands(form, facts, wrapper):
                    self._write(stem, facts, form)
                    return
            log.debug("this tokenizer is not kept: what would be kept of it differs")
        except Exception as exc:  # noqa: BLE001 - it is a convenience
            log.debug("this tokenizer is not kept: %s", exc)

    def _write(self, stem: str, facts: Facts, form: Form) -> None:
        from mlx_promptcache import room

        arrays = form.arrays() if isinstance(form, Parts) else _array_of(form)
        notes = {"made": round(time.time(), 3), "versions": arithmetic.versions()}
        packed = container.pack(TOKENIZER, facts._asdict(), notes, arrays)
        self._store.create()
        with self._store.adding():
            needed = packed.size + room.FILE_BYTES
            room.make(self._store, self._budget, needed, asked_for=False)
            with self._store.shared():
                self._store.write(TOKENIZERS, stem, packed)


@contextlib.contextmanager
def _no_garbage() -> Iterator[None]:
    """Look for no garbage: a tokenizer is a hundred thousand objects that stay, and transformers
    as many.
    """
    looked = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if looked:
            gc.enable()


def _forms(text: str) -> Iterator[Form]:
    """What may be kept of a tokenizer of this JSON, the best first."""
    told = json.loads(text)
    parts = _parts_of(told)
    if parts is not None:
        yield parts
    yield _shortened(text, told)


def _stands(form: Form, facts: Facts, whole: Any) -> bool:
    """Whether this form of a tokenizer does what the whole one does."""
    try:
        rust = _rust(form, facts)
        kept = Tokenizer(rust, facts, lambda: whole, _refuse)
        same = agrees(wrapped(kept, facts), whole, kept.expect)
    except (DamagedFile, LookupError, TypeError, ValueError) as exc:
        log.debug("this form of the tokenizer is none: %s", exc)
        return False
    # Of few tokens no excerpt was made: the parts were not tried.
    return same and not (isinstance(rust, Excerpts) and not rust.made)


def _shortened(text: str, told: dict[str, Any]) -> str:
    """A tokenizer's JSON, which tells this, with its merges as `"a b"`, which is read a third
    faster than as `["a", "b"]`, if that says the same of all of them. The rest is left as it is:
    writing all of it takes as long as making the tokenizer.
    """
    before, found, _ = text.rpartition(MERGES)
    merges = told["model"].get("merges")
    last = [*told][-1], [*told["model"]][-1]
    # As Rust writes it: nothing comes after the merges.
    if not found or last != ("model", "merges"):
        return text
    if not all(type(pair) is list for pair in merges):
        return text
    short = [" ".join(pair) for pair in merges]
    lines = "\n".join(["", *short])
    # Not if a token has a space, nor if it would read as the comment that may begin such lists.
    if lines.count(" ") != len(short) or "\n#version" in lines:
        return text
    return f"{before}{MERGES}{json.dumps(short, ensure_ascii=False)[1:]}}}}}"


def _parts_of(told: dict[str, Any]) -> Parts | None:
    """The parts of a tokenizer, if there can be excerpts of it."""
    try:
        return taken_apart(told)
    except (LookupError, TypeError, ValueError) as exc:
        log.debug("no excerpts are made of this tokenizer: %s", exc)
        return None


def _form_of(arrays: dict[str, Array]) -> Form:
    if FRAME in arrays:
        return Parts.of_arrays(arrays)
    try:
        return str(arrays[ARRAY].data, "utf-8")
    except UnicodeDecodeError as exc:
        raise DamagedFile(f"its tokenizer is no text: {exc}") from None


def _array_of(text: str) -> dict[str, Array]:
    data = text.encode()
    return {ARRAY: Array("uint8", (len(data),), data)}


def _rust(form: Form, facts: Facts) -> Rust:
    """What is kept of a tokenizer as what encodes.

    Raises:
        DamagedFile: it is none.
    """
    splits = facts.splits_special_tokens
    if isinstance(form, Parts):
        return Excerpts(form, splits_special_tokens=splits)
    return rust_of(form, splits_special_tokens=splits)


def _refuse(exc: DamagedFile) -> None:
    raise exc


def _checked(header: container.Header) -> tuple[Facts, dict[str, container.Entry]]:
    names = DTYPES if FRAME in header.entries else {ARRAY: "uint8"}
    entries = {name: header.entries.get(name) for name in names}
    found = {name: entry for name, entry in entries.items() if entry is not None}
    if header.kind != TOKENIZER or len(found) < len(names):
        raise DamagedFile("it is no tokenizer")
    if any(e.dtype != names[name] or len(e.shape) != 1 for name, e in found.items()):
        raise DamagedFile("it is no tokenizer")
    if any(container.raw_bytes(e.dtype, e.shape) > LARGEST_BYTES for e in found.values()):
        raise DamagedFile("it is too large")
    try:
        return Facts.from_json(header.content), found
    except TypeError:
        raise DamagedFile("what it says of a tokenizer makes no sense") from None


def _stem_or_none(model: Path) -> str | None:
    try:
        return stem_of(model)
    except (OSError, ValueError) as exc:
        log.debug("the tokenizer's files cannot be told apart: %s", exc)
        return None


def stem_of(model: Path) -> str:
    """Where the tokenizer of a model directory is kept: a hash of all that it is made from."""
    digest = hashlib.blake2b(f"{FORMAT} {_releases()}".encode(), digest_size=KEY_BYTES)
    for path in _files(model):
        data = hashlib.sha256(path.read_bytes()).digest()
        digest.update(os.fsencode(path.relative_to(model)) + b"\0" + data)
    key = digest.hexdigest()
    return f"{key[:2]}/{key}"


def _files(model: Path) -> Iterator[Path]:
    found = {path for pattern in FILES for path in model.glob(pattern)}
    yield from sorted(path for path in found if path.is_file())


def _releases() -> str:
    import tokenizers

    return f"{arithmetic.versions()['mlx-lm']} {tokenizers.__version__} {_transformers()}"


def _transformers() -> str:
    """The release of transformers that is installed, read off its source: importing takes long."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        return "none"
    with contextlib.suppress(OSError):
        found = VERSION.search(Path(spec.origin).read_bytes())
        if found:
            return found[1].decode()
    from importlib import metadata

    return metadata.version("transformers")
