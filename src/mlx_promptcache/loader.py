"""From files to a state. Whatever is in a file is checked before a byte of it reaches MLX."""

from __future__ import annotations

import secrets
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx

from mlx_promptcache import arithmetic, container, headers
from mlx_promptcache.errors import CacheMiss, DamagedFile, PromptCacheError, UnsupportedLayer
from mlx_promptcache.finder import record_of
from mlx_promptcache.layers import from_array
from mlx_promptcache.passes import Lineage
from mlx_promptcache.quarantine import BadFile
from mlx_promptcache.sampling import Sampling
from mlx_promptcache.state import (
    EMBEDDING,
    LOGITS,
    RNG,
    Origin,
    Ref,
    State,
    Trail,
    check_block,
    check_snapshot,
    join_layers,
    join_rows,
    unstack,
)
from mlx_promptcache.store import BLOCKS, SNAPSHOTS
from mlx_promptcache.tree import Keys

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mlx_promptcache.container import Array, Header
    from mlx_promptcache.finder import Finder, Found
    from mlx_promptcache.layers import Blueprint, Layer

READERS = 4  # threads that read, check and decompress blocks: all three release the GIL


class _Block(NamedTuple):
    header: Header
    arrays: Mapping[str, Array]


class _Replaced(CacheMiss):
    """A block is sound, but not the one that a snapshot was made with."""


class Loader:
    """Loads what a `Finder` found. `blueprint` is what the model's layers look like, if known."""

    def __init__(self, finder: Finder, blueprint: Blueprint | None) -> None:
        self._finder, self._store, self._bad = finder, finder.store, finder.bad
        self._blueprint = blueprint

    def load(self, found: Found, tokens: Sequence[int]) -> State:
        """Return the state at `found.position` of these tokens.

        Raises:
            BadFile: a file cannot be used, and was set aside; find again.
        """
        if found.snapshot is not None:
            return self.snapshot(found.snapshot, tokens)
        refs = [Ref(step.stem, "", step.start, step.rows) for step in found.steps]
        blocks = self._blocks(refs)
        refs = [
            Ref(ref.stem, block.header.digest, ref.start, ref.rows)
            for ref, block in zip(refs, blocks, strict=True)
        ]
        lineage = Lineage(arithmetic.lineage())
        for ref, block in zip(refs, blocks, strict=True):
            lineage = lineage.along(record_of(block.header), ref.start, ref.end)
        return State(
            tokens=tuple(tokens[: found.position]),
            contents=join_layers(self._rows(refs, blocks), {}, {}),
            logits=None,
            embedding=None,
            rng=fresh_key(),
            kv=self._finder.kv,
            fingerprint=self._finder.fingerprint.digest,
            lineage=lineage.at(found.position),
            trail=_trail(refs, blocks),
        )

    def snapshot(self, stem: str, tokens: Sequence[int] | None = None) -> State:
        """Return the state of a snapshot, which must be a prefix of `tokens`, if these are given.

        Raises:
            BadFile: a file cannot be used, and was set aside.
        """
        try:
            header, arrays = self._snapshot_file(stem)
        except PromptCacheError as exc:
            raise self._bad.set_aside(SNAPSHOTS, stem, exc) from exc
        content = header.content
        refs = [Ref(*ref) for ref in content["refs"]]
        try:
            blocks = self._blocks(refs)
        except BadFile:
            self._bad.ignore(stem)
            raise
        held = [
            token
            for ref, block in zip(refs, blocks, strict=True)
            for token in block.header.content["tokens"][: ref.rows]
        ]
        key = Keys(self._finder.root(content["phase"]), held)[len(held)]
        if key != content["key"] or (tokens is not None and held != list(tokens[: len(held)])):
            wrong = DamagedFile("its tokens are not those of its name")
            raise self._bad.set_aside(SNAPSHOTS, stem, wrong)
        try:
            sampling = Sampling.from_json(content["sampling"])
        except (TypeError, ValueError):
            wrong = DamagedFile("its sampling settings make no sense")
            raise self._bad.set_aside(SNAPSHOTS, stem, wrong) from None
        return State(
            tokens=tuple(held),
            contents=self._joined(stem, refs, blocks, content, arrays),
            logits=arrays.get(LOGITS),
            embedding=arrays.get(EMBEDDING),
            rng=arrays.get(RNG, fresh_key()),
            sampling=sampling,
            kv=self._finder.kv,
            fingerprint=self._finder.fingerprint.digest,
            lineage=str(header.notes.get("lineage")),
            origin=Origin.from_json(content["origin"]),
            trail=_trail(refs, blocks),
        )

    def _joined(
        self,
        stem: str,
        refs: Sequence[Ref],
        blocks: Sequence[_Block],
        content: Mapping[str, Any],
        arrays: Mapping[str, mx.array],
    ) -> tuple[Layer, ...]:
        try:
            return join_layers(self._rows(refs, blocks), content, arrays)
        except UnsupportedLayer as exc:
            raise self._bad.set_aside(SNAPSHOTS, stem, exc) from exc

    def _snapshot_file(self, stem: str) -> tuple[Header, dict[str, mx.array]]:
        with self._store.reader(SNAPSHOTS, stem) as reader:
            header = headers.checked_snapshot(reader.header(), stem)
            check_snapshot(header, self._blueprint)
            arrays = {
                name: from_array(container.read_array(reader.read, entry))
                for name, entry in header.entries.items()
            }
        return header, arrays

    def _blocks(self, refs: Sequence[Ref]) -> list[_Block]:
        with ThreadPoolExecutor(READERS) as pool:
            futures = [pool.submit(self._block_file, ref) for ref in refs]
            blocks = []
            for ref, future in zip(refs, futures, strict=True):
                try:
                    blocks.append(future.result())
                except PromptCacheError as exc:
                    for other in futures:
                        other.cancel()
                    if isinstance(exc, _Replaced):
                        raise BadFile(str(exc)) from exc
                    raise self._bad.set_aside(BLOCKS, ref.stem, exc) from exc
        return blocks

    def _block_file(self, ref: Ref) -> _Block:
        with self._store.reader(BLOCKS, ref.stem) as reader:
            header = headers.checked_block(reader.header(), ref.stem)
            if header.content["start"] != ref.start or len(header.content["tokens"]) < ref.rows:
                raise DamagedFile("it is not at the position where its name was found")
            if ref.digest and header.digest != ref.digest:
                raise _Replaced("a block that a snapshot needs was replaced by another")
            check_block(header, self._blueprint)
            arrays = {
                label: container.read_array(reader.read, entry)
                for label, entry in header.entries.items()
            }
        return _Block(header, arrays)

    def _rows(
        self, refs: Sequence[Ref], blocks: Sequence[_Block]
    ) -> dict[str, dict[str, mx.array]]:
        return join_rows(
            [
                unstack(block.header, block.arrays, ref.rows)
                for ref, block in zip(refs, blocks, strict=True)
            ]
        )


def _trail(refs: Sequence[Ref], blocks: Sequence[_Block]) -> Trail:
    rates = [headers.noted_number(block.header, "seconds_per_token") for block in blocks]
    seconds = sum(rate * ref.rows for ref, rate in zip(refs, rates, strict=True))
    return Trail(tuple(refs), (), seconds / max(1, refs[-1].end if refs else 0))


def fresh_key() -> mx.array:
    """A key that no other run has."""
    return mx.random.key(secrets.randbits(63))
