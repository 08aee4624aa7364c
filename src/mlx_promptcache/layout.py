"""Where a store keeps the file of a stem: in directories that are listed in no time.

    stem of a block      xx / K(a) - first token - K(b) [- variant]
    its file       blocks/xxyyz/ K(a) - first token - K(b) [- variant] .safetensors

    stem of a snapshot   xx / K(g) - (n - g) - K(n) - id
    its file   snapshots/xxyy/ K(g) - (n - g) - K(n) - id .safetensors

Of a block `yy` are the first digits of `K(a)`, and `z` is the last hexadecimal digit of the first
token: so the directory with the ways on from a position is known before it is looked for, and has
few others in it, however many prompts leave one prefix, at one position or at many. Of a snapshot
`yy` is an eighth of `n - g`: the snapshots before a position are in other directories than most of
those after it. Every other stem is a path as it stands, as all stems once were: files of blocks and
snapshots that are there count, too.
"""

from __future__ import annotations

import re

from mlx_promptcache.files import STEM, SUFFIX

BLOCKS = "blocks"
SNAPSHOTS = "snapshots"
DIGITS = "0123456789abcdef"
NEIGHBOURS = 8  # positions whose snapshots are in one directory
_SHARD = re.compile(r"[0-9a-f]{2}")
_DIRECTORY = {BLOCKS: re.compile(r"[0-9a-f]{5}"), SNAPSHOTS: re.compile(r"[0-9a-f]{4}")}
_GROUPS = tuple(f"{i:02x}" for i in range(256 // NEIGHBOURS))


def directories(kind: str, start: str) -> list[str]:
    """The directories of all stems that begin with `start`, which ends at one of their dashes: of a
    block's it has the first token, of a snapshot's the key of the cell. Those of snapshots are in
    the order of their positions. The last one is where all files of the cell once were.
    """
    shard, _, name = start.partition("/")
    if kind not in _DIRECTORY:
        return [shard]
    first, _, rest = name.partition("-")
    second, _, _ = rest.partition("-")
    number = int(second) if second.isdecimal() else 0
    if kind == BLOCKS:
        return [f"{shard}{first[:2]:0<2}{digit(number)}", shard]
    if rest:
        return [shard + _GROUPS[number // NEIGHBOURS % len(_GROUPS)], shard]
    return [*(shard + group for group in _GROUPS), shard]


def digit(first_token: int) -> str:
    """What the directories of blocks with this first token end with."""
    return DIGITS[first_token % 16]


def paths(kind: str, stem: str) -> list[str]:
    """Where the file of a stem may be, below the directory of its kind: the first one is where it
    is written.
    """
    name = stem.partition("/")[2] + SUFFIX
    return [f"{directory}/{name}" for directory in directories(kind, stem)]


def is_directory(kind: str, name: str) -> bool:
    """Whether files of a kind may be in a directory of this name."""
    return any(form.fullmatch(name) for form in (_DIRECTORY.get(kind, _SHARD), _SHARD))


def stem(kind: str, place: str, name: str) -> str | None:
    """The stem of a file of this name in this directory; None if it has none, or another place."""
    found = f"{place[:2]}/{name.removesuffix(SUFFIX)}"
    if STEM.fullmatch(found) and f"{place}/{name}" in paths(kind, found):
        return found
    return None
