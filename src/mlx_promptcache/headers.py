"""The headers of blocks and snapshots, checked against their names and against sense.

A file with sound checksums may have been renamed, swapped with another, or made by somebody who
means harm. What passes here has the types and the sizes that the rest of the program relies on.
"""

from __future__ import annotations

import functools
import math
import re
from typing import TYPE_CHECKING, Any

from mlx_promptcache import container
from mlx_promptcache.errors import DamagedFile
from mlx_promptcache.fingerprint import PHASES
from mlx_promptcache.store import BLOCKS, SNAPSHOTS, Store
from mlx_promptcache.tree import (
    CELL,
    ID_DIGITS,
    BlockName,
    Keys,
    SnapshotName,
    cell_end,
    cell_start,
    root_key,
)
from mlx_promptcache.windows import Span, Window

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from mlx_promptcache.container import Header

BLOCK = "block"
SNAPSHOT = "snapshot"
TOKENIZER = "tokenizer"
KEY = re.compile(r"[0-9a-f]{32}")
DIGEST = re.compile(r"[0-9a-f]{64}")
LAYER_PATH = re.compile(r"(0|[1-9][0-9]{0,5})(\.(0|[1-9][0-9]{0,5}))*")
ROW_LABEL = re.compile(r"(window\.)?(keys|values)(\.[0-9])?/[0-9]{1,4}")
WINDOW = "window."  # begins the labels of the rows of windows
ROW_DIMENSIONS = 5  # [layers, batch, heads, tokens, ...]
ROWS_AXIS = 3
MOST_DRAFT_TOKENS = 1024
MOST_NESTED = 32  # sequences within sequences, in the attributes of a layer
TEXTS = ("text", "system", "earlier")
LOGITS = "logits"
EMBEDDING = "embedding"
RNG = "rng"


def block_header(store: Store, stem: str) -> Header:
    """Read the header of a block.

    Raises:
        CacheMiss: it is not there, or of another version; DamagedFile if it is damaged.
    """
    with store.reader(BLOCKS, stem) as reader:
        return checked_block(reader.header(), stem)


def checked_block(header: Header, stem: str) -> Header:
    """Return the header if it is that of the block of this name.

    Raises:
        DamagedFile: it is not.
    """
    name = BlockName.parse(stem)
    content = header.content
    tokens, start = content.get("tokens"), content.get("start")
    sound = (
        header.kind == BLOCK
        and name is not None
        and isinstance(tokens, list)
        and 0 < len(tokens) <= CELL
        and set(map(type, tokens)) == {int}
        and min(tokens) >= 0
        and max(tokens) < 1 << 32
        and type(start) is int
        and 0 <= start < 1 << 40
        and start + len(tokens) <= cell_end(start)
        and (content.get("start_key"), tokens[0], content.get("end_key")) == name[1:4]
        and is_key(content.get("fingerprint"))
        and type(content.get("complete")) is bool
        and _is_told_window(content.get("window"), start, start + len(tokens))
        and _are_stacks(content.get("stacks"), header, len(tokens))
    )
    if not sound:
        raise DamagedFile("it is not the block that its name says")
    return header


def _is_told_window(window: Any, start: int, end: int) -> bool:
    return window is None or (
        isinstance(window, dict)
        and all(type(window.get(name)) is int for name in ("from", "size", "keep"))
        and start <= window["from"] <= end
        and 0 <= window["keep"] < window["size"] < 1 << 40
    )


def window_span(block: Header) -> Span:
    """The positions for which a block has the rows of windows: none where it has none of them."""
    content = block.content
    end = content["start"] + len(content["tokens"])
    return Span(content["window"]["from"] if content.get("window") else end, end)


def _are_stacks(stacks: Any, header: Header, rows: int) -> bool:
    if not isinstance(stacks, dict) or stacks.keys() != header.entries.keys():
        return False
    span = window_span(header)
    seen: dict[str, set[str]] = {}
    for label, entry in header.entries.items():
        paths, shape = stacks[label], entry.shape
        if (
            ROW_LABEL.fullmatch(label) is None
            or not isinstance(paths, list)
            or not set(map(type, paths)) <= {str}
            or not _are_layer_paths(tuple(paths))
            or len(shape) < ROW_DIMENSIONS
            or (shape[0], shape[ROWS_AXIS])
            != (len(paths), span.stop - span.start if label.startswith(WINDOW) else rows)
        ):
            return False
        there = seen.setdefault(label.partition("/")[0], set())
        if len(there) + len(paths) != len(there | set(paths)):  # a layer has the same rows twice
            return False
        there.update(paths)
    return True


@functools.lru_cache  # the blocks of a model all tell the same ones
def _are_layer_paths(paths: tuple[str, ...]) -> bool:
    return all(map(LAYER_PATH.fullmatch, paths))


def snapshot_header(store: Store, stem: str) -> Header:
    """Read the header of a snapshot.

    Raises:
        CacheMiss: it is not there, or of another version; DamagedFile if it is damaged.
    """
    with store.reader(SNAPSHOTS, stem) as reader:
        return checked_snapshot(reader.header(), stem)


def checked_snapshot(header: Header, stem: str) -> Header:
    """Return the header if it is that of the snapshot of this name.

    Raises:
        DamagedFile: it is not.
    """
    name = SnapshotName.parse(stem)
    content = header.content
    n_past, refs = content.get("n_past"), content.get("refs")
    sound = (
        header.kind == SNAPSHOT
        and name is not None
        and type(n_past) is int
        and 0 < n_past < 1 << 40
        and n_past - cell_start(n_past) == name.offset
        and (content.get("cell_key"), content.get("key")) == (name.cell_key, name.key)
        and header.digest.startswith(name.id)
        and is_key(content.get("fingerprint"))
        and content.get("phase") in PHASES
        and isinstance(refs, list)
        and all(map(_is_ref, refs))
        and _follow_one_another(refs, n_past)
        and isinstance(content.get("sampling"), dict)
        and _is_origin(content.get("origin"))
        and _is_speculation(content.get("speculation"), n_past)
        and _are_layers(content.get("opaque"), content.get("windows"), header)
    )
    if not sound:
        raise DamagedFile("it is not the snapshot that its name says")
    return header


def is_key(value: Any) -> bool:
    """Whether it is written as keys and fingerprints are."""
    return isinstance(value, str) and KEY.fullmatch(value) is not None


def _is_ref(ref: Any) -> bool:
    return (
        isinstance(ref, list)
        and [type(part) for part in ref] == [str, str, int, int]
        and BlockName.parse(ref[0]) is not None
        and DIGEST.fullmatch(ref[1]) is not None
        and 0 < ref[3] <= CELL
    )


def _follow_one_another(refs: Sequence[Sequence[Any]], n_past: int) -> bool:
    position = 0
    for _, _, start, rows in refs:
        if start != position:
            return False
        position += rows
    return position == n_past


def _is_origin(origin: Any) -> bool:
    if not isinstance(origin, dict):
        return False
    messages = origin.get("messages")
    return all(isinstance(origin.get(name), (str, type(None))) for name in TEXTS) and (
        messages is None
        or (isinstance(messages, list) and all(isinstance(message, dict) for message in messages))
    )


def _are_layers(opaque: Any, windows: Any, header: Header) -> bool:
    """Whether opaque layers and windows are told as such, and refer to just the arrays that there
    are. The rows of windows are in the snapshot all or not at all.
    """
    if not all(map(_is_told_layers, (opaque, windows))) or opaque.keys() & windows.keys():
        return False
    if not all(_is_size_and_keep(told.get("window")) for told in windows.values()):
        return False
    arrays = sorted(
        f"{path}/{name}" for path, told in opaque.items() for name in _arrays_in(told["attributes"])
    )
    rows = sorted(f"{path}/{name}" for path in windows for name in ("keys", "values"))
    named = sorted(name for name in header.entries if "/" in name)
    return named in (arrays, sorted(arrays + rows))


def _is_speculation(value: Any, n_past: int) -> bool:
    if value is None:
        return True
    if not isinstance(value, dict) or not isinstance(value.get("key"), list):
        return False
    if not isinstance(value.get("lineage"), str):
        return False
    numbers = [value.get("start"), value.get("draft_tokens"), *value["key"]]
    return (
        len(numbers) == 4
        and all(type(n) is int and 0 <= n < 1 << 32 for n in numbers)
        and numbers[0] < n_past
        and numbers[1] <= MOST_DRAFT_TOKENS
    )


def _is_told_layers(layers: Any) -> bool:
    return isinstance(layers, dict) and all(
        LAYER_PATH.fullmatch(path)
        and isinstance(told, dict)
        and isinstance(told.get("kind"), str)
        and isinstance(told.get("attributes"), dict)
        for path, told in layers.items()
    )


def _is_size_and_keep(window: Any) -> bool:
    return (
        isinstance(window, list)
        and [type(n) for n in window] == [int, int]
        and 0 <= window[1] < window[0] < 1 << 40
    )


def windows_of(snapshot: Header) -> dict[str, Window]:
    """The windows of a snapshot, by the paths of their layers."""
    return {p: Window(*told["window"]) for p, told in snapshot.content["windows"].items()}


def has_window_rows(snapshot: Header) -> bool:
    """Whether the rows of windows are in the snapshot itself; else they are in its blocks."""
    return any(f"{path}/keys" in snapshot.entries for path in snapshot.content["windows"])


def _arrays_in(value: Any, depth: int = MOST_NESTED) -> list[str]:
    if depth == 0:
        raise DamagedFile("the attributes of a layer are nested too deep")
    if isinstance(value, dict):
        if isinstance(value.get("array"), str):
            return [value["array"]]
        return [name for item in value.values() for name in _arrays_in(item, depth - 1)]
    if isinstance(value, list):
        return [name for item in value for name in _arrays_in(item, depth - 1)]
    return []


def using(snapshot: Header, stem: str, blocks: Iterable[tuple[str, str]]) -> tuple[str, Header]:
    """A snapshot whose rows stand in these blocks instead, told by stem and digest; and its stem.
    With its own blocks it is what it was.
    """
    refs = [[*block, *ref[2:]] for block, ref in zip(blocks, snapshot.content["refs"], strict=True)]
    content = {**snapshot.content, "refs": refs}
    head = container.head_of(snapshot.kind, content, snapshot.notes, snapshot.entries)
    own = f"{stem[:-ID_DIGITS]}{head.digest[:ID_DIGITS]}"
    return own, snapshot._replace(content=content, digest=head.digest)


def blocks_of(store: Store, snapshot: Header) -> list[Header]:
    """The headers of a snapshot's blocks.

    Raises:
        CacheMiss: a block is not there; DamagedFile if it is not the one that the snapshot used.
    """
    found = []
    for stem, digest, start, _ in snapshot.content["refs"]:
        header = block_header(store, stem)
        if header.digest != digest or header.content["start"] != start:
            raise DamagedFile("a block that it needs was replaced by another")
        found.append(header)
    return found


def tokens_in(snapshot: Header, blocks: Iterable[Header]) -> list[int]:
    """The tokens of a snapshot, from its blocks.

    Raises:
        DamagedFile: they are not those of its key.
    """
    tokens: list[int] = []
    for block, ref in zip(blocks, snapshot.content["refs"], strict=True):
        tokens += block.content["tokens"][: ref[3]]
    if Keys(root_of(snapshot), tokens)[len(tokens)] != snapshot.content["key"]:
        raise DamagedFile("its tokens are not those of its name")
    return tokens


def tokens_of(store: Store, snapshot: Header) -> list[int]:
    """The tokens of a snapshot, from the store. Raises as `blocks_of` and `tokens_in`."""
    return tokens_in(snapshot, blocks_of(store, snapshot))


def text_of(origin: Mapping[str, Any]) -> str | None:
    """The prompt that a snapshot tells: its text, or its messages; None if it was made from
    tokens.
    """
    if origin.get("messages") is not None:
        return "\n".join(f"{m.get('role')}: {m.get('content')}" for m in origin["messages"])
    text: str | None = origin.get("text")
    return text


def root_of(snapshot: Header) -> str:
    """The key of position 0 of a snapshot's tokens."""
    return root_key(snapshot.content["fingerprint"], snapshot.content["phase"])


def fingerprint_parts(header: Header) -> Mapping[str, Any]:
    """The parts of the fingerprint that a file was written under."""
    parts = header.notes.get("fingerprint")
    return parts if isinstance(parts, dict) else {}


def noted_number(header: Header, name: str) -> float:
    """A number of the notes, which nothing depends on: 0 where it makes no sense."""
    value = header.notes.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return 0.0
    try:
        number = float(value)
    except OverflowError:
        return 0.0
    return number if math.isfinite(number) else 0.0
