"""Ctrl-C that lets the current step end, so that what has been computed can be kept."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import FrameType, TracebackType


class Interrupted(Exception):
    """The user pressed Ctrl-C, and a step has ended since."""


class Interrupt:
    """While this is entered, the first Ctrl-C only sets `wanted`; a second one ends at once."""

    def __init__(self) -> None:
        self.wanted = False
        self._before: Any = None

    def __enter__(self) -> Interrupt:
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self.wanted:
            raise KeyboardInterrupt
        self.wanted = True

    def check(self) -> None:
        """Raise Interrupted if the user wants to end."""
        if self.wanted:
            raise Interrupted
