"""From files to a state. Whatever is in a file is checked before a byte of it reaches MLX."""

from __future__ import annotations

import functools
import itertools
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import mlx.core as mx

from mlx_promptcache import arithmetic, container, headers
from mlx_promptcache.ahead import Ahead
from mlx_promptcache.arrays import from_array
from mlx_promptcache.errors import CacheMiss, DamagedFile, PromptCacheError, UnsupportedLayer
from mlx_promptcache.headers import EMBEDDING, LOGITS, RNG
from mlx_promptcache.layers import Layer
from mlx_promptcache.parts import check_block, check_snapshot, in_order, of_layer, opaque_layers
from mlx_promptcache.passes import Lineage, record_of
from mlx_promptcache.quarantine import BadFile
from mlx_promptcache.rows import Planes, Room, Staging, name_of
from mlx_promptcache.sampling import Sampling, fresh_seed
from mlx_promptcache.state import Origin, Ref, Speculation, State, Trail
from mlx_promptcache.store import BLOCKS, SNAPSHOTS
from mlx_promptcache.tree import Keys
from mlx_promptcache.windows import Span

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from mlx_promptcache.blueprint import Blueprint
    from mlx_promptcache.container import Entry, Header
    from mlx_promptcache.finder import Finder, Found
    from mlx_promptcache.windows import Window

    T = TypeVar("T")
    Rooms = Mapping[tuple[str, str], Room]

READERS = 4  # threads that read, check and decompress blocks: all three release the GIL
JOINED_BYTES = 1 << 20  # at once, of a stack: memory that is still in the cache when it is copied
SPARE = 0.15  # what may be in memory of blocks that are read, against the state itself


NONE_KNOWN: Mapping[str, Header] = {}


class _Replaced(CacheMiss):
    """A block is sound, but not the one that a snapshot was made with."""


class _Place(NamedTuple):
    """Where rows of one layer of a stack belong: those of the positions `used`."""

    layer: int
    room: Room
    used: Span


class _Stack(NamedTuple):
    """An array of a block, the rows of some layers, and where they belong."""

    ref: Ref
    block: Header
    entry: Entry
    places: list[_Place]


class Loader:
    """Loads what a `Finder` found. `blueprint` is what the model's layers look like, if known;
    `ahead` is room that is made already.
    """

    def __init__(
        self, finder: Finder, blueprint: Blueprint | None, ahead: Ahead | None = None
    ) -> None:
        self._finder, self._store, self._bad = finder, finder.store, finder.bad
        self._blueprint = blueprint
        self._ahead = Ahead() if ahead is None else ahead

    def load(self, found: Found, tokens: Sequence[int], *, rows: bool = True) -> State:
        """Return the state at `found.position` of these tokens; a snapshot's without `rows` lacks
        what its layers hold.

        Raises:
            BadFile: a file cannot be used, and was set aside; find again.
        """
        if found.snapshot is not None:
            return self.snapshot(found.snapshot, tokens, found.blocks, rows=rows)
        refs = [Ref(step.stem, "", step.start, step.rows) for step in found.steps]
        blocks = self._headers(refs, found.blocks)
        refs = [
            Ref(ref.stem, block.digest, ref.start, ref.rows)
            for ref, block in zip(refs, blocks, strict=True)
        ]
        lineage = Lineage(arithmetic.lineage())
        for ref, block in zip(refs, blocks, strict=True):
            lineage = lineage.along(record_of(block), ref.start, ref.end)
        windows = {} if self._blueprint is None else self._blueprint.windows
        return State(
            tokens=tuple(tokens[: found.position]),
            contents=in_order(self._layers(refs, blocks, found.position, windows)),
            logits=None,
            embedding=None,
            rng=fresh_key(),
            kv=self._finder.kv,
            fingerprint=self._finder.fingerprint.digest,
            lineage=lineage.at(found.position),
            trail=_trail(refs, blocks),
        )

    def snapshot(
        self,
        stem: str,
        tokens: Sequence[int] | None = None,
        known: Mapping[str, Header] = NONE_KNOWN,
        *,
        rows: bool = True,
    ) -> State:
        """Return the state of a snapshot, which must be a prefix of `tokens`, if these are given;
        without `rows` it lacks what its layers hold. The headers of blocks that are `known` by
        their stems are not read again.

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
            blocks = self._headers(refs, known)
            contents = self._contents(header, arrays, refs, blocks) if rows else ()
        except BadFile:
            self._bad.ignore(stem)
            raise
        except UnsupportedLayer as exc:
            raise self._bad.set_aside(SNAPSHOTS, stem, exc) from exc
        held = [
            token
            for ref, block in zip(refs, blocks, strict=True)
            for token in block.content["tokens"][: ref.rows]
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
        speculation = content.get("speculation")
        return State(
            tokens=tuple(held),
            contents=contents,
            logits=arrays.get(LOGITS),
            embedding=arrays.get(EMBEDDING),
            rng=arrays.get(RNG, fresh_key()),
            sampling=sampling,
            kv=self._finder.kv,
            fingerprint=self._finder.fingerprint.digest,
            lineage=str(header.notes.get("lineage")),
            origin=Origin.from_json(content["origin"]),
            speculation=speculation and Speculation.from_json(speculation),
            trail=_trail(refs, blocks),
        )

    def _contents(
        self,
        header: Header,
        arrays: Mapping[str, mx.array],
        refs: Sequence[Ref],
        blocks: Sequence[Header],
    ) -> tuple[Layer, ...]:
        """All layers of a snapshot: from its blocks, and from itself.

        Raises:
            UnsupportedLayer: they lack rows.
        """
        windows, own = headers.windows_of(header), headers.has_window_rows(header)
        from_blocks = self._layers(refs, blocks, header.content["n_past"], {} if own else windows)
        rows = {layer.path: layer.rows for layer in from_blocks}
        held = [
            Layer(
                path,
                told["kind"],
                of_layer(arrays, path) if own else rows.get(path, {}),
                attributes=told["attributes"],
                window=windows[path],
            )
            for path, told in header.content["windows"].items()
        ]
        sliceable = [layer for layer in from_blocks if layer.sliceable]
        return in_order([*sliceable, *held, *opaque_layers(header, arrays)])

    def _snapshot_file(self, stem: str) -> tuple[Header, dict[str, mx.array]]:
        with self._store.reader(SNAPSHOTS, stem) as reader:
            header = headers.checked_snapshot(reader.header(), stem)
            check_snapshot(header, self._blueprint)
            arrays = {
                name: from_array(container.read_array(reader.read, entry))
                for name, entry in header.entries.items()
            }
        return header, arrays

    def _headers(self, refs: Sequence[Ref], known: Mapping[str, Header]) -> list[Header]:
        """The headers of blocks, checked to be those that are meant."""
        unknown = [ref for ref in refs if ref.stem not in known]
        tasks = [(ref, functools.partial(self._header, ref)) for ref in unknown]
        read = iter(list(self._each(tasks)))
        return [self._known(ref, known) if ref.stem in known else next(read) for ref in refs]

    def _header(self, ref: Ref) -> Header:
        return self._checked(ref, headers.block_header(self._store, ref.stem))

    def _known(self, ref: Ref, known: Mapping[str, Header]) -> Header:
        try:
            return self._checked(ref, known[ref.stem])
        except PromptCacheError as exc:
            raise self._unusable(ref, exc) from exc

    def _checked(self, ref: Ref, header: Header) -> Header:
        if header.content["fingerprint"] != self._finder.fingerprint.digest:
            raise DamagedFile("it is a block of another model")
        if header.content["start"] != ref.start or len(header.content["tokens"]) < ref.rows:
            raise _Replaced("a block that is needed is not at its position")
        if ref.digest and header.digest != ref.digest:
            raise _Replaced("a block that is needed was replaced by another")
        check_block(header, self._blueprint)
        return header

    def _each(
        self,
        tasks: Sequence[tuple[Ref, Callable[[], T]]],
        readers: int = READERS,
        meanwhile: Callable[[], Any] = lambda: None,
    ) -> Iterator[T]:
        """What these tasks return, each of which reads a block; some threads, and no more results
        than threads at a time. What is to be done `meanwhile` is done when the first ones are on
        their way. A block that cannot be used is set aside.
        """
        with ThreadPoolExecutor(readers) as pool:
            left = iter(tasks)
            first = itertools.islice(left, readers)
            waiting = deque((ref, pool.submit(task)) for ref, task in first)
            meanwhile()
            while waiting:
                yield self._result(waiting)
                waiting.extend((r, pool.submit(task)) for r, task in itertools.islice(left, 1))

    def _result(self, waiting: deque[tuple[Ref, Future[T]]]) -> T:
        ref, future = waiting.popleft()
        try:
            return future.result()
        except PromptCacheError as exc:
            for _, other in waiting:
                other.cancel()
            raise self._unusable(ref, exc) from exc

    def _unusable(self, ref: Ref, exc: PromptCacheError) -> BadFile:
        """What is raised of a block that cannot be used; one that is damaged is set aside."""
        if isinstance(exc, _Replaced):
            return BadFile(str(exc))
        return self._bad.set_aside(BLOCKS, ref.stem, exc)

    def _layers(
        self,
        refs: Sequence[Ref],
        blocks: Sequence[Header],
        n_past: int,
        windows: Mapping[str, Window],
    ) -> list[Layer]:
        """The layers at `n_past` whose rows stand in blocks: all sliceable ones, and these windows.

        Raises:
            UnsupportedLayer: the blocks lack rows.
        """
        rooms: dict[tuple[str, str], Room] = {}
        for block in blocks:
            for label, entry in block.entries.items():
                name, of_window = name_of(label)
                for path in block.content["stacks"][label]:
                    if (path, name) not in rooms and (not of_window or path in windows):
                        spans = windows[path].spans(n_past) if of_window else [Span(0, n_past)]
                        rooms[path, name] = Room(entry, spans, padded=not of_window)
                    elif (path, name) in rooms:
                        rooms[path, name].check(entry)  # before anything is allocated
        labels = dict.fromkeys(label for block in blocks for label in block.entries)
        stacks = [
            _Stack(ref, block, block.entries[label], _wanting(ref, block, label, rooms))
            for label in labels  # the rooms of one after the other
            for ref, block in zip(refs, blocks, strict=True)
            if label in block.entries
        ]
        stacks = [stack for stack in stacks if stack.places]
        sizes = [container.raw_bytes(stack.entry.dtype, stack.entry.shape) for stack in stacks]
        readers = _readers(sizes)
        staging = Staging(readers, max(sizes, default=0))
        tasks = [(stack.ref, functools.partial(self._read, stack, staging)) for stack in stacks]
        open_rooms = functools.partial(Room.open_beside, rooms.values(), self._ahead)
        for stack, planes in self._each(tasks, readers, open_rooms):
            _put(planes, stack.places, staging)
        Room.open(rooms.values())  # those, too, that no row belongs to
        arrays: dict[str, dict[str, mx.array]] = {}
        for (path, name), room in rooms.items():
            arrays.setdefault(path, {})[name] = room.close()
        return [_layer(path, named, n_past, windows.get(path)) for path, named in arrays.items()]

    def _read(self, stack: _Stack, staging: Staging) -> tuple[_Stack, Planes]:
        """Read the planes of a stack, as the header tells of them that was checked before."""
        with self._store.reader(BLOCKS, stack.ref.stem) as reader:
            if container.read_seal(reader.read, reader.size) != stack.block.seal:
                raise _Replaced("a block that is needed was replaced by another")
            planes = staging.take(stack.entry)
            container.read_planes(reader.read, reader.read_into, stack.entry, planes.memory)
        return stack, planes


def _readers(sizes: Sequence[int]) -> int:
    """How many stacks of these bytes may be in memory at once, on their way into the layers: of a
    small state fewer than of a large one.
    """
    return max(1, min(READERS, int(SPARE * sum(sizes) / max([1, *sizes]))))


def _wanting(ref: Ref, header: Header, label: str, rooms: Rooms) -> list[_Place]:
    """Where the rows of a stack belong: which layers of it have room for them."""
    name, used = name_of(label)[0], _used(ref, header, label)
    paths = enumerate(header.content["stacks"][label])
    there = [_Place(i, rooms[path, name], used) for i, path in paths if (path, name) in rooms]
    return [place for place in there if place.room.wants(used)]


def _used(ref: Ref, header: Header, label: str) -> Span:
    """The positions of the rows of a stack that are used."""
    of_window = name_of(label)[1]
    start = headers.window_span(header).start if of_window else ref.start
    return Span(start, max(start, ref.end))


def _put(planes: Planes, places: Sequence[_Place], staging: Staging) -> None:
    """Put the rows of a stack where there is room for them; nothing else is left of it then.

    While some of its layers are put in their places the next ones are joined, and room is made for
    them, where it is not being made already and these are the first rows of theirs.
    """
    count = max(1, JOINED_BYTES // max(1, planes.layer_bytes))
    end = max((place.layer for place in places), default=-1) + 1
    parts = [
        (begin, [place for place in places if begin <= place.layer < begin + count])
        for begin in range(0, end, count)
    ]

    def joined() -> Iterator[mx.array]:
        for begin, there in parts:
            Room.open(place.room for place in there)
            yield planes.joined(begin, min(begin + count, end))

    for (begin, there), items in zip(parts, _ahead(joined()), strict=True):
        for place in there:
            place.room.put(items, place.layer - begin, place.used)
    staging.give_back(planes)


def _ahead(arrays: Iterable[mx.array]) -> Iterator[mx.array]:
    """Each of these arrays, evaluated, while the next one is being computed."""
    before: mx.array | None = None
    for array in arrays:
        mx.async_eval(array)
        if before is not None:
            mx.eval(before)
            yield before
        before = array
    if before is not None:
        mx.eval(before)
        yield before


def _layer(path: str, arrays: dict[str, mx.array], n_past: int, window: Window | None) -> Layer:
    if window is not None:
        return Layer(path, "", arrays, window=window)
    rows = {name: array[:, :, :n_past] for name, array in arrays.items()}
    return Layer(path, "", rows, padded=arrays)


def _trail(refs: Sequence[Ref], blocks: Sequence[Header]) -> Trail:
    rates = [headers.noted_number(block, "seconds_per_token") for block in blocks]
    seconds = sum(rate * ref.rows for ref, rate in zip(refs, rates, strict=True))
    return Trail(tuple(refs), (), seconds / max(1, refs[-1].end if refs else 0))


def fresh_key() -> mx.array:
    """A key that no other run has."""
    return mx.random.key(fresh_seed(63))
