"""What computed a state, as a short text of content: other weights, another fingerprint.

A fingerprint has named parts, so that a miss can say which of them differs. Nothing in it depends
on a path, a date or a machine: a copied model with its copied store still fits.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlx_promptcache import models, places
from mlx_promptcache.errors import ModelError
from mlx_promptcache.memo import write
from mlx_promptcache.tree import KEY_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

FORMAT = "1"  # of the states, not of the container: raised when old states must not be used
PIECE_BYTES = 1 << 24
QUANT_CONFIG = "hf_quant_config.json"  # how weights are quantised, where config.json is silent
HUB_BLOB = re.compile(r"[0-9a-f]{64}")  # large files of the Hub's cache are named by their sha256

BITS = (2, 3, 4, 5, 6, 8)  # what mlx.core.quantize takes
GROUP_SIZES = (32, 64, 128)

PLAIN = ""
QUANTISED = "quantised"
PHASES = (PLAIN, QUANTISED)

WHOLE = "whole"  # the shard of a model that one process runs
LONGEST_SHARD = 60

PARTS = {
    "weights": "other weights",
    "config": "another configuration of the model",
    "adapter": "another adapter",
    "kv": "other KV cache settings",
    "shard": "another shard of the model",
    "salt": "another salt",
    "format": "another format of states",
    "draft": "another draft model, or none",
    "text": "another model",
}


@dataclass(frozen=True)
class KVSettings:
    """How the K/V are kept, as in mlx-lm: quantised to `bits` from `quantized_start` tokens on."""

    bits: int | None = None
    group_size: int = 64
    quantized_start: int = 5000
    max_size: int | None = None

    def __post_init__(self) -> None:
        if self.bits is not None and self.bits not in BITS:
            raise ValueError(f"KV caches can be quantised to {BITS} bits, not to {self.bits}")
        if self.group_size not in GROUP_SIZES:
            raise ValueError(f"groups of KV caches have {GROUP_SIZES} items, not {self.group_size}")
        if self.quantized_start < 0 or (self.max_size is not None and self.max_size < 1):
            raise ValueError(
                "numbers of tokens: --max-kv-size is 1 or more, and --quantized-kv-start 0 or more"
            )

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
        draft: Path | None = None,
        memo: Memo | None = None,
    ) -> Fingerprint:
        """The fingerprint of a model directory, and of its draft model's, from their content.

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
                "shard": WHOLE,
                "salt": _salt(salt),
                "format": FORMAT,
            }
            if draft is not None:
                parts["draft"] = _hash(f"{_weights(draft, memo)} {_config(draft)}".encode())
        except OSError as exc:
            raise ModelError(
                f"the model {model} cannot be read: {exc.strerror}; make its files readable"
            ) from exc
        return cls(parts)

    def with_kv(self, kv: KVSettings) -> Fingerprint:
        """The same model with other KV settings."""
        return Fingerprint({**self.parts, "kv": str(kv)})

    def with_salt(self, salt: str) -> Fingerprint:
        """The same model in another private namespace."""
        return Fingerprint({**self.parts, "salt": _salt(salt)})

    def with_shard(self, shard: str) -> Fingerprint:
        """The part of the model that one of several processes computes."""
        return Fingerprint({**self.parts, "shard": shard})

    def differences(self, parts: Mapping[str, Any]) -> list[str]:
        """The names of the parts that differ from `parts`."""
        return [name for name in PARTS if self.parts.get(name) != parts.get(name)]

    def explain(self, parts: Mapping[str, Any]) -> str:
        """What differs from `parts`, in words: `other weights and another adapter`."""
        return (
            " and ".join(self._told(name, parts) for name in self.differences(parts)) or "nothing"
        )

    def _told(self, name: str, parts: Mapping[str, Any]) -> str:
        if name != "shard":
            return PARTS[name]
        theirs, ours = (str(p.get(name, WHOLE))[:LONGEST_SHARD] for p in (parts, self.parts))
        return f"{PARTS[name]} ({theirs}, and here it is {ours})"


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
            known = json.loads(text) if checksum == _hash(text.encode()) else {}
        except (OSError, ValueError, RecursionError):
            return memo
        if isinstance(known, dict):
            memo.known = {name: row for name, row in known.items() if isinstance(row, list)}
        return memo

    def save(self, path: Path) -> None:
        """Write the memo if it changed. Failing is no matter: it is computed again."""
        if not self.changed:
            return
        there = {name: row for name, row in self.known.items() if os.path.exists(name)}  # noqa: PTH110
        text = json.dumps(there, separators=(",", ":"))
        write(path, f"{_hash(text.encode())}\n{text}")
        self.changed = False


def remembered(
    model: Path,
    *,
    adapter: Path | None = None,
    kv: KVSettings | None = None,
    salt: str = "",
    draft: Path | None = None,
    memo_file: Path | None = None,
) -> Fingerprint:
    """The fingerprint of a model directory; this user's memo keeps the identity of large files.

    Raises:
        ModelError: see `Fingerprint.of_model`.
    """
    memo_file = memo_file or places.weights_memo()
    memo = Memo.load(memo_file)
    fingerprint = Fingerprint.of_model(
        model, adapter=adapter, kv=kv, salt=salt, draft=draft, memo=memo
    )
    memo.save(memo_file)
    return fingerprint


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=KEY_BYTES).hexdigest()


def _salt(salt: str) -> str:
    return _hash(salt.encode()) if salt else "none"


def _weights(model: Path, memo: Memo) -> str:
    files = sorted(model.glob("model*.safetensors"))  # those that mlx-lm loads
    if not files:
        raise ModelError(
            f"{model} holds no model: it has no model*.safetensors; give the directory of a model "
            "in MLX's format"
        )
    text = "\n".join(f"{path.name} {_file(path, memo)}" for path in files)
    return _hash(text.encode())


def _file(path: Path, memo: Memo) -> str:
    blob = path.resolve().name
    if path.is_symlink() and HUB_BLOB.fullmatch(blob):
        return blob
    return memo.identity(path, _whole_file)


def _whole_file(path: Path) -> str:
    """Identity of a file: a hash of all of it, in pieces that threads hash at once.

    Samples would be faster, once: but rows that were trained on, an expert, a patched tensor can
    lie between them, and what is remembered costs nothing the next time.
    """
    size = path.stat().st_size
    with path.open("rb", buffering=0) as file, ThreadPoolExecutor() as pool:

        def piece(offset: int) -> bytes:
            return hashlib.sha256(os.pread(file.fileno(), PIECE_BYTES, offset)).digest()

        digest = hashlib.blake2b(size.to_bytes(8, "little"), digest_size=KEY_BYTES)
        for found in pool.map(piece, range(0, size, PIECE_BYTES)):
            digest.update(found)
    return digest.hexdigest()


def _config(model: Path) -> str:
    """What the model is built from: its configuration, and what mlx-lm reads beside it."""
    settings = models.config(model)
    text = json.dumps(settings, sort_keys=True).encode()
    for name in (QUANT_CONFIG, settings.get("model_file")):
        if isinstance(name, str) and (model / name).is_file():
            text += b"\0" + (model / name).read_bytes()
    return _hash(text)


def _no_adapter(adapter: Path, lacking: str) -> ModelError:
    return ModelError(
        f"{adapter} holds no adapter: it has no {lacking}; give the directory that mlx_lm.lora "
        "wrote"
    )


def _adapter(adapter: Path, memo: Memo) -> str:
    try:
        config = (adapter / "adapter_config.json").read_bytes()
    except OSError:
        raise _no_adapter(adapter, "adapter_config.json") from None
    weights = adapter / "adapters.safetensors"
    if not weights.is_file():
        raise _no_adapter(adapter, "adapters.safetensors")
    return _hash(config + b"\0" + memo.identity(weights, _whole_file).encode())
