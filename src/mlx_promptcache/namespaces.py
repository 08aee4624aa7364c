"""Private namespaces of a server's clients: who asks finds what they asked before, and no more.

What a namespace is called is a hash: no key and no name of a user is kept or written anywhere.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

COMMON = ""
"""The namespace of everybody who has none of their own."""
NAME_BYTES = 32
BEARER = "bearer"


@dataclass(frozen=True)
class Namespaces:
    """How clients are told apart: by API key, by the `user` that a request names, or both.

    Who gives neither shares the common namespace. `salt` is that of the whole server.
    """

    salt: str = ""
    per_key: bool = False
    per_user: bool = False

    def of(self, authorization: str | None, user: object) -> str:
        """The namespace of a request with this `Authorization` header and this `user` field.

        Raises:
            ValueError: the user is no text.
        """
        if self.per_user and not isinstance(user, (str, type(None))):
            raise ValueError("user must be of type str")
        key = _key(authorization) if self.per_key else None
        user = user or None if self.per_user else None
        if key is None and user is None:
            return COMMON
        text = json.dumps([self.salt, key, user])
        return hashlib.blake2b(text.encode(), digest_size=NAME_BYTES).hexdigest()


def _key(authorization: str | None) -> str | None:
    """The key of an `Authorization: Bearer KEY`; whatever else stands there is taken whole."""
    text = (authorization or "").strip()
    scheme, _, key = text.partition(" ")
    return (key.strip() if scheme.lower() == BEARER else text) or None
