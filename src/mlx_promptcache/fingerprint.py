"""What computed a state, as a short text of content: other weights, another fingerprint.

A fingerprint has named parts, so that a miss can say which of them differs. Nothing in it depends
on a path, a date or a machine: a copied model with its copied store still fits.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlx_promptcache import models
from mlx_promptcache.errors import ModelError
from mlx_promptcache.tree import KEY_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

FORMAT = "1"  # of the states, not of the container: raised when old states must not be used
PAGE_BYTES = 4096
PAGES_A_TENSOR = 4
LARGEST_HEADER_BYTES = 100_000_000
HUB_BLOB = re.compile(r"[0-9a-f]{64}")  # large files of the Hub's cache are named by their sha256

PLAIN = ""
QUANTISED = "quantised"
PHASES = (PLAIN, QUANTISED)

PARTS = {
    "weights": "other weights",
    "config": "another configuration of the model",
    "adapter": "another adapter",
    "kv": "other KV cache settings",
    "shard": "another shard of the model",
    "salt": "another salt",
    "format": "another format of states",
    "text": "another model",
}


@dataclass(frozen=True)
class KVSettings:
    """How the K/V are kept, as in mlx-lm: quantised to `bits` from `quantized_start` tokens on."""

    bits: int | None = None
    group_size: int = 64
    quantized_start: int = 5000
    max_size: int | None = None

    @property
    def phases(self) -> tuple[str, ...]:
        """The namespaces that a run's rows can be in: as computed, and quantised."""
        return (PLAIN,) if self.bits is None else PHASES

    def phase_at(self, position: int) -> str:
        """The namespace of the rows that a cold run holds at a position."""
        return PLAIN if self.bits is None or position < self.quantized_start else QUANTISED

    def __str__(self) -> str:
        parts = []
        if self.bits is not None:
            parts.append(f"bits={self.bits} group={self.group_size} start={self.quantized_start}")
        if self.max_size is not None:
            parts.append(f"max={self.max_size}")
        return " ".join(parts) or "plain"


@dataclass(frozen=True)
class Fingerprint:
    """The identity of what computes states: `parts` by name, `digest` of them all."""

    parts: Mapping[str, str]

    @property
    def digest(self) -> str:
        """The key of position 0: as many hexadecimal digits as every key."""
        text = json.dumps(dict(self.parts), sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(text.encode(), digest_size=KEY_BYTES).hexdigest()

    @classmethod
    def of_text(cls, text: str) -> Fingerprint:
        """The fingerprint of a model made in memory: whoever makes it says what it is."""
        return cls({"text": text, "kv": str(KVSettings()), "format": FORMAT})

    @classmethod
    def of_model(
        cls,
        model: Path,
        *,
        adapter: Path | None = None,
        kv: KVSettings | None = None,
        salt: str = "",
        memo: Memo | None = None,
    ) -> Fingerprint:
        """The fingerprint of a model directory, from its content.

        Raises:
            ModelError: the directory holds no model, or a file of it cannot be read.
        """
        memo = memo if memo is not None else Memo()
        try:
            parts = {
                "weights": _weights(model, memo),
                "config": _config(model),
                "adapter": _adapter(adapter, memo) if adapter else "none",
                "kv": str(kv or KVSettings()),
                "shard": "whole",
                "salt": _hash(salt.encode()) if salt else "none",
                "format": FORMAT,
            }
        except OSError as exc:
            raise ModelError(f"the model {model} cannot be read: {exc.strerror}") from exc
        return cls(parts)

    def with_kv(self, kv: KVSettings) -> Fingerprint:
        """The same model with other KV settings."""
        return Fingerprint({**self.parts, "kv": str(kv)})

    def differences(self, parts: Mapping[str, Any]) -> list[str]:
        """The names of the parts that differ from `parts`."""
        return [name for name in PARTS if self.parts.get(name) != parts.get(name)]

    def explain(self, parts: Mapping[str, Any]) -> str:
        """What differs from `parts`, in words: `other weights and another adapter`."""
        return " and ".join(PARTS[name] for name in self.differences(parts)) or "nothing"


class Memo:
    """Remembers the identity of large files by size, mtime, ctime and inode.

    `load` and `save` keep it in one small checksummed file; one that is damaged is forgotten.
    """

    def __init__(self) -> None:
        self.known: dict[str, list[Any]] = {}
        self.changed = False

    def identity(self, path: Path, compute: Callable[[Path], str]) -> str:
        """The identity of a file: remembered, or computed now."""
        status = path.stat()
        stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        name = str(path.absolute())
        row = self.known.get(name)
        if row is not None and row[:-1] == stamp:
            return str(row[-1])
        identity = compute(path)
        self.known[name] = [*stamp, identity]
        self.changed = True
        return identity

    @classmethod
    def load(cls, path: Path) -> Memo:
        """Read a memo; an empty one if there is none, or a damaged one."""
        memo = cls()
        try:
            checksum, _, text = path.read_text("utf-8").partition("\n")
            if checksum == _hash(text.encode()):
                memo.known = json.loads(text)
        except (OSError, ValueError):
            pass
        return memo

    def save(self, path: Path) -> None:
        """Write the memo if it changed. Failing is no matter: it is computed again."""
        if not self.changed:
            return
        text = json.dumps(self.known, separators=(",", ":"))
        temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(fd, "w", encoding="utf-8") as file:
                file.write(f"{_hash(text.encode())}\n{text}")
            temporary.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        self.changed = False


def remembered(
    model: Path,
    memo_file: Path,
    *,
    adapter: Path | None,
    kv: KVSettings,
    salt: str,
    read_only: bool = False,
) -> Fingerprint:
    """The fingerprint of a model directory, with the memo that is kept in `memo_file`.

    Raises:
        ModelError: see `Fingerprint.of_model`.
    """
    memo = Memo.load(memo_file)
    fingerprint = Fingerprint.of_model(model, adapter=adapter, kv=kv, salt=salt, memo=memo)
    if not read_only:
        memo.save(memo_file)
    return fingerprint


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=KEY_BYTES).hexdigest()


def _weights(model: Path, memo: Memo) -> str:
    files = sorted(model.glob("model*.safetensors"))  # those that mlx-lm loads
    if not files:
        raise ModelError(f"{model} holds no model: it has no model*.safetensors")
    text = "\n".join(f"{path.name} {_file(path, memo)}" for path in files)
    return _hash(text.encode())


def _file(path: Path, memo: Memo) -> str:
    blob = path.resolve().name
    if path.is_symlink() and HUB_BLOB.fullmatch(blob):
        return blob
    return memo.identity(path, _safetensors)


def _safetensors(path: Path) -> str:
    """Identity of a safetensors file: its header, and some pages of every tensor.

    Reading all of a large model takes seconds; training and conversion change every tensor.
    """
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    with path.open("rb", buffering=0) as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(LARGEST_HEADER_BYTES, path.stat().st_size):
            raise ModelError(f"{path} is not a safetensors file")
        header = file.read(length)
        digest.update(header)
        for begin, end in _tensors(header, path):
            for offset in _pages(begin, end):
                digest.update(
                    os.pread(file.fileno(), min(PAGE_BYTES, end - offset), 8 + length + offset)
                )
    return digest.hexdigest()


def _tensors(header: bytes, path: Path) -> list[tuple[int, int]]:
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        return sorted(
            (int(e["data_offsets"][0]), int(e["data_offsets"][1])) for e in entries.values()
        )
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as exc:
        raise ModelError(f"{path} is not a safetensors file") from exc


def _pages(begin: int, end: int) -> list[int]:
    """Offsets of pages spread over `[begin, end)`, the first and the last among them."""
    last = max(begin, end - PAGE_BYTES)
    return sorted(
        {begin + (last - begin) * k // (PAGES_A_TENSOR - 1) for k in range(PAGES_A_TENSOR)}
    )


def _config(model: Path) -> str:
    return _hash(json.dumps(models.config(model), sort_keys=True).encode())


def _adapter(adapter: Path, memo: Memo) -> str:
    try:
        config = (adapter / "adapter_config.json").read_bytes()
    except OSError:
        raise ModelError(f"{adapter} holds no adapter: it has no adapter_config.json") from None
    weights = adapter / "adapters.safetensors"
    if not weights.is_file():
        raise ModelError(f"{adapter} holds no adapter: it has no adapters.safetensors")
    return _hash(config + b"\0" + memo.identity(weights, _whole_file).encode())


def _whole_file(path: Path) -> str:
    """Identity of a small file: all of it. An adapter that was trained on differs little."""
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
