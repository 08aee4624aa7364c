"""How much a store may take on its drive."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, NamedTuple

from mlx_promptcache.errors import StoreError

if TYPE_CHECKING:
    from pathlib import Path

MAX_SIZE = "MLX_PROMPTCACHE_MAX_SIZE"
MIN_FREE = "MLX_PROMPTCACHE_MIN_FREE"

MOST_BYTES = 20 * 10**9
SHARE_OF_FREE = 10  # at most a tenth of what would be free without the store
FLOOR_BYTES = 10**9
SHARE_OF_DRIVE = 20  # a small drive is not kept from being used by a floor made for large ones
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
BINARY_UNITS = {"KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30, "TI": 1 << 40}


class Budget(NamedTuple):
    """How many bytes a store may take, and how many must stay free on its drive.

    None stands for the defaults, which depend on the drive: see `limit` and `floor`.
    """

    max_bytes: int | None = None
    min_free: int | None = None

    @classmethod
    def chosen(cls, max_bytes: int | None = None) -> Budget:
        """The one that is given, or that the environment gives.

        Raises:
            StoreError: the environment gives something else than a size.
        """
        if max_bytes is not None and max_bytes < 0:
            raise ValueError(f"max_bytes must not be negative, as {max_bytes} is")
        asked = max_bytes if max_bytes is not None else _from_environment(MAX_SIZE)
        return cls(asked, _from_environment(MIN_FREE))

    def limit(self, drive: Drive, taken: int) -> int:
        """The most bytes that a store which takes `taken` bytes now may take.

        By default 20 GB, or a tenth of what would be free without it, whichever is less.
        """
        if self.max_bytes is not None:
            return self.max_bytes
        return min(MOST_BYTES, (drive.free + taken) // SHARE_OF_FREE)

    def floor(self, drive: Drive) -> int:
        """How many bytes automatic states leave free: by default 1 GB, or a twentieth of the drive,
        whichever is less.
        """
        if self.min_free is not None:
            return self.min_free
        return min(FLOOR_BYTES, drive.size // SHARE_OF_DRIVE)


class Drive(NamedTuple):
    """The drive that a store is on: its bytes, and those that are free to this user."""

    size: int
    free: int

    @classmethod
    def of(cls, directory: Path) -> Drive:
        """Ask the system; where it does not tell, nothing is known to be short."""
        try:
            told = os.statvfs(directory)
        except OSError:
            return cls(MOST_BYTES * SHARE_OF_FREE, MOST_BYTES * SHARE_OF_FREE)
        return cls(told.f_blocks * told.f_frsize, told.f_bavail * told.f_frsize)


def parse_size(text: str) -> int:
    """The bytes of a size such as `20GB`, `500M`, `1.5 GiB` or `1048576`.

    Raises:
        ValueError: it is none.
    """
    found = re.fullmatch(r"(\d{1,20}(?:\.\d+)?)\s*([KMGT]?I?)B?", text.strip().upper())
    units = {**UNITS, **BINARY_UNITS}
    if found is None or found[2] not in units:
        raise ValueError(f"{text!r} is not a size such as 20GB, 500MB or 1GiB")
    return int(float(found[1]) * units[found[2]])


def _from_environment(name: str) -> int | None:
    text = os.environ.get(name, "").strip()
    if not text:
        return None
    try:
        return parse_size(text)
    except ValueError as exc:
        raise StoreError(f"{name}: {exc}") from exc
