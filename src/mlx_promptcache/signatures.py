"""Who vouches for a file that comes from elsewhere: Ed25519 keys, as ssh-keygen makes them.

A signature is made of the kind of a file, its stem and its seal, and the seal stands for every byte
of the file. It travels in the name of the file, so that nothing is fetched that nobody signed. The
keys that a store trusts stand in its file `trusted_keys`, a line each, as in `authorized_keys`.
RFC 8032 is the signature; RFC 8709 and RFC 4253 the line of a key.
"""

from __future__ import annotations

import base64
import binascii
import os
from typing import TYPE_CHECKING, Any

from mlx_promptcache.errors import SignatureError
from mlx_promptcache.store import TRUSTED_KEYS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

TYPE = "ssh-ed25519"
SIGNATURE_BYTES = 64
PURPOSE = b"mlx_promptcache 1"
LARGEST_KEY_FILE_BYTES = 1 << 20


class Signer:
    """A private key, which signs."""

    def __init__(self, key: Any) -> None:
        self._key = key

    @classmethod
    def load(cls, path: Path) -> Signer:
        """The key of a file without a passphrase, as `ssh-keygen -t ed25519` writes it, or PEM.

        Raises:
            SignatureError: it cannot be read, is no such key, or the package is missing.
        """
        ed25519, serialization = _cryptography()
        data = _read(path)
        load = serialization.load_pem_private_key
        if b"OPENSSH PRIVATE KEY" in data:
            load = serialization.load_ssh_private_key
        try:
            key = load(data, password=None)
        except TypeError as exc:
            raise SignatureError(
                f"the key {path} has a passphrase: make one without, for this purpose alone "
                "(ssh-keygen -t ed25519 -N '' -f FILE)"
            ) from exc
        except Exception as exc:  # cryptography has many, and their texts are not for users
            raise SignatureError(f"{path} is no private key that can be read") from exc
        if not isinstance(key, ed25519.Ed25519PrivateKey):
            raise SignatureError(f"{path} is no Ed25519 key: make one (ssh-keygen -t ed25519)")
        return cls(key)

    def sign(self, kind: str, stem: str, seal: bytes) -> str:
        """The signature of a file, as text that may stand in a file's name."""
        signed: bytes = self._key.sign(_message(kind, stem, seal))
        return _text(signed)


class Trust:
    """Public keys: whoever holds one of their private keys is believed."""

    def __init__(self, keys: Sequence[Any]) -> None:
        self._keys = keys

    @classmethod
    def load(cls, path: Path) -> Trust:
        """The keys of a file, a line each: `ssh-ed25519 AAAA... comment`.

        Raises:
            SignatureError: it cannot be read, a line is no such key, there is none, or the package
                is missing.
        """
        ed25519, _ = _cryptography()
        keys = []
        for line in _read(path).decode("utf-8", "replace").splitlines():
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            if words[0] != TYPE or len(words) < 2:
                raise SignatureError(f"{path}: a line begins with '{TYPE} AAAA...', or with #")
            keys.append(ed25519.Ed25519PublicKey.from_public_bytes(_public(path, words[1])))
        if not keys:
            raise SignatureError(f"{path} has no key: nothing could come from elsewhere")
        return cls(keys)

    @classmethod
    def of(cls, store: Path) -> Trust | None:
        """Whom a store trusts; None if it asks for no signatures. Raises as `load` does."""
        return cls.load(store / TRUSTED_KEYS) if is_asked_for(store) else None

    def accepts(self, kind: str, stem: str, seal: bytes, signature: str | None) -> bool:
        """Whether somebody who is trusted signed this file."""
        signed = _bytes(signature)
        return signed is not None and any(
            _verifies(key, signed, _message(kind, stem, seal)) for key in self._keys
        )


def is_asked_for(store: Path) -> bool:
    """Whether a store takes from elsewhere only what is signed."""
    return os.path.lexists(store / TRUSTED_KEYS)


def _message(kind: str, stem: str, seal: bytes) -> bytes:
    return b"\n".join((PURPOSE, kind.encode(), stem.encode(), seal.hex().encode()))


def _verifies(key: Any, signed: bytes, message: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(signed, message)
    except InvalidSignature:
        return False
    return True


def is_signature(text: str) -> bool:
    """Whether a text is the signature of something."""
    return _bytes(text) is not None


def _text(signed: bytes) -> str:
    return base64.urlsafe_b64encode(signed).decode().rstrip("=")


def _bytes(signature: str | None) -> bytes | None:
    if signature is None:
        return None
    try:
        found = base64.b64decode(signature + "==", altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        return None
    # One signature, one name: what decodes to the same bytes in another way is none.
    return found if len(found) == SIGNATURE_BYTES and _text(found) == signature else None


def _public(path: Path, text: str) -> bytes:
    """The 32 bytes of a public key: its type and the key, each with 4 bytes of length."""
    head = len(TYPE).to_bytes(4, "big") + TYPE.encode() + (32).to_bytes(4, "big")
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        data = b""
    if not data.startswith(head) or len(data) != len(head) + 32:
        raise SignatureError(f"{path}: a line is no Ed25519 key as ssh-keygen writes it")
    return data[len(head) :]


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(LARGEST_KEY_FILE_BYTES)
    except OSError as exc:
        raise SignatureError(f"the key {path} cannot be read: {exc.strerror}") from exc


def _cryptography() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as exc:
        raise SignatureError(
            "signatures need the package cryptography: pip install 'mlx_promptcache[share]'"
        ) from exc
    return ed25519, serialization
