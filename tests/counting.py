"""Counts what is asked of the file system below one directory."""

from __future__ import annotations

import os
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

SUFFIX = ".safetensors"


class Counted:
    """While this lasts: the containers that are opened, the directories that are listed, and how
    many names `os.listdir` showed of each.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = str(directory)
        self.opened: list[str] = []
        self.listed: list[str] = []
        self.shown: Counter[str] = Counter()
        self._original: dict[str, Any] = {}

    def __enter__(self) -> Counted:
        for name, notes in (
            ("open", self.opened),
            ("listdir", self.listed),
            ("scandir", self.listed),
        ):
            self._original[name] = getattr(os, name)
            setattr(os, name, self._watching(self._original[name], notes))
        return self

    def __exit__(self, *_: object) -> None:
        for name, original in self._original.items():
            setattr(os, name, original)

    def _watching(self, original: Any, notes: list[str]) -> Any:
        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            text = str(path)
            if text.startswith(self.directory) and (notes is self.listed or text.endswith(SUFFIX)):
                notes.append(text)
            answer = original(path, *args, **kwargs)
            if text.startswith(self.directory) and isinstance(answer, list):
                self.shown[text] += len(answer)
            return answer

        return call
