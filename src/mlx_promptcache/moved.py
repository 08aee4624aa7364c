"""What went from a store to a remote, or back."""

from __future__ import annotations

from typing import NamedTuple


class Moved(NamedTuple):
    """What went from a store to a remote, or back. `shared` files were there already; `refused`
    says why others were not used.
    """

    states: int
    files: int
    bytes: int
    shared: int
    names: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
