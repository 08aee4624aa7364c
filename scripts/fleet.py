"""What is simulated, and what comes of it, as values: a fleet, how it is used, and its figures."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mlx_promptcache import tree

if TYPE_CHECKING:
    from stock import Sizes

RECOMPUTE, ALONE, SHARED = "recompute", "alone", "shared"
BY_SHARD, BY_KEY = "by shard", "by key"
MEMORY, DISK, REMOTE, COMPUTED = "memory", "disk", "remote", "computed"


@dataclass(frozen=True)
class Machine:
    """What a machine does in a second, and holds."""

    tokens_per_second: float
    restored_per_second: float  # bytes of blocks, from files that the system has in memory
    disk_per_second: float = 1e9  # bytes, from the drive
    decoded_per_second: float = 10.0  # tokens
    memory: int = 10**9
    budget: int = 20 * 10**9


@dataclass(frozen=True)
class Place:
    """What machines share: an object store. Bytes a second for one machine and for all."""

    latency: float = 0.03
    to_machine: float = 125e6
    to_all: float = 12.5e9
    strangers: int = 0  # objects of each kind that are there before, and of no use


@dataclass(frozen=True)
class Setup:
    """A fleet, and how it is used."""

    machines: int
    machine: Machine
    place: Place
    sizes: Sizes
    mode: str = SHARED
    affinity: bool = True  # the requests of a session go to one machine
    cell: int = tree.CELL
    kinds: int = 1  # of arithmetic: rows of another kind have other bits, and other names
    listing: str = BY_SHARD
    sends_all: bool = True  # or only what a prompt of its own has used again
    forgiving: bool = False  # a remote is not let be where computing was merely quicker


@dataclass
class Figures:
    """What came of a run. Rates are of the time from the first arrival to the last."""

    requests: int = 0
    seconds: float = 0.0
    tokens: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys((MEMORY, DISK, REMOTE, COMPUTED), 0)
    )
    first_token: list[float] = field(default_factory=list)
    written: int = 0  # bytes to drives by saves
    copied: int = 0  # bytes to drives that came from the remote
    evicted: int = 0
    refused: int = 0  # saves for which there was no room
    lists: int = 0
    gets: int = 0
    puts: int = 0
    got: int = 0  # bytes
    put: int = 0  # bytes
    distinct: int = 0  # bytes of different objects in the remote
    objects: int = 0
    late: int = 0  # times that a machine gave the remote up for a minute
    not_worth: int = 0  # times that reading would have taken longer than computing

    @property
    def reused(self) -> float:
        """The part of all tokens that was not computed."""
        return 1 - self.part(COMPUTED)

    def part(self, tier: str) -> float:
        """The part of all tokens that came from there."""
        return self.tokens[tier] / max(1, sum(self.tokens.values()))

    @property
    def median(self) -> float:
        """Seconds to the first token."""
        return statistics.median(self.first_token)

    @property
    def p99(self) -> float:
        """Seconds within which 99 of 100 first tokens came."""
        ordered = sorted(self.first_token)
        return ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]

    @property
    def amplification(self) -> float:
        """Bytes sent for each byte that was not there."""
        return self.put / self.distinct if self.distinct else 1.0
