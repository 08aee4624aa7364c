"""The tokens of a vocabulary by their ids, and back, without a dict of all of them.

Making a dict of 49,000 tokens takes longer than looking up all that stands in one prompt without
it: so strings are not looked for among the tokens, but tokens among the strings. Who asks for many,
one by one, gets the dict.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import TYPE_CHECKING, overload

from mlx_promptcache.errors import DamagedFile

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

FEW = 20  # tokens that are asked for one by one: of more, a dict of all takes less time


class TokenTable(Sequence[str]):
    """Tokens in the order of their ids, none of which has a line break in it.

    `text` is UTF-8, a token a line.

    Raises:
        DamagedFile: it is something else.
    """

    def __init__(self, text: bytes) -> None:
        try:
            str(text, "utf-8")
        except UnicodeDecodeError as exc:
            raise DamagedFile(f"its tokens are no text: {exc}") from None
        self.text = text
        self._lines = text.split(b"\n")
        self._asked = 0
        self._ids: dict[bytes, int] | None = None

    @classmethod
    def of(cls, tokens: Iterable[str]) -> TokenTable:
        """The table of these tokens."""
        return cls("\n".join(tokens).encode())

    def __len__(self) -> int:
        return len(self._lines)

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> list[str]: ...
    def __getitem__(self, at: int | slice) -> str | list[str]:
        """The token of an id, or those of several."""
        if isinstance(at, slice):
            return [line.decode() for line in self._lines[at]]
        return self._lines[at].decode()

    def find(self, token: str) -> int | None:
        """The id of a token, None if there is none."""
        line, self._asked = _encoded(token), self._asked + 1
        if self._ids is None and self._asked > FEW:
            self._ids = {known: i for i, known in enumerate(self._lines)}
        if self._ids is not None:
            return self._ids.get(line)
        if b"\n" in line:
            return None
        text = self.text
        if text.startswith(line + b"\n") or text == line:
            return 0
        at = text.find(b"\n" + line + b"\n")
        if at < 0 and text.endswith(b"\n" + line):
            at = len(text) - len(line) - 1
        return None if at < 0 else text.count(b"\n", 0, at) + 1

    def among(self, strings: Collection[str]) -> dict[str, int]:
        """Those of these strings that are tokens, with their ids."""
        wanted = {_encoded(string): string for string in strings}
        lines = self._lines
        ids = compress(range(len(lines)), map(wanted.__contains__, lines))
        return {wanted[lines[i]]: i for i in ids}


def _encoded(string: str) -> bytes:
    """A string as it stands in a table; half of a surrogate pair stands in none."""
    return string.encode("utf-8", "surrogatepass")
