"""Memory: what a context takes in memory and on disk, and how much of it fits a machine."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

from mlx_promptcache import checkpoint, machine, models
from mlx_promptcache.arrays import dtype_name
from mlx_promptcache.fingerprint import KVSettings
from mlx_promptcache.growth import Growth
from mlx_promptcache.layers import leaves, live_arrays
from mlx_promptcache.pair import Pair
from mlx_promptcache.runner import Runner
from mlx_promptcache.window_rows import MOST_PASSED_BYTES
from mlx_promptcache.working import is_told, working_bytes

if TYPE_CHECKING:
    from mlx_promptcache.growth import Layout

LONGEST = 1 << 24  # tokens: what fits so many is not told from what fits any number
RNG_BYTES = 8


@dataclass(frozen=True)
class Kind:
    """The cache objects of one class: how many; the bytes of their arrays; what each further token
    adds to these; and the bytes of theirs that a state has, None if it cannot be taken down.
    """

    kind: str
    count: int
    bytes: int
    bytes_per_token: float
    state_bytes: int | None


@dataclass(frozen=True)
class Context:
    """What one conversation takes after a prompt of so many tokens, in bytes.

    `layers_bytes` is what mlx-lm's cache objects hold then, and `most_layers_bytes` the most that
    they hold after any pass on the way. `kept_bytes` is what the run keeps for the store: logits,
    snapshots on the way, rows that windows have moved past. `raw_bytes` is what the state's files
    hold before they are compressed, None if states of this model cannot be kept.
    """

    tokens: int
    kinds: tuple[Kind, ...]
    layers_bytes: int
    most_layers_bytes: int
    kept_bytes: int
    raw_bytes: int | None

    @property
    def bytes(self) -> int:
        """All that the conversation takes in memory."""
        return self.most_layers_bytes + self.kept_bytes


class Memory:
    """What a model takes, found out without computing or reading any of its weights.

    `weights_bytes` are those of the model and of its draft model. All other figures are of
    conversations as a `Runner` holds them, which prefills `prefill_step` tokens at a time.
    """

    def __init__(self, model: Any, kv: KVSettings | None = None, draft_model: Any = None) -> None:
        kv = kv or KVSettings()
        runner = Runner(model, kv=kv, draft_model=draft_model)
        whole = model if draft_model is None else Pair(model, draft_model)
        self.prefill_step, self.kv = runner.prefill_step, kv
        self.weights_bytes = sum(map(_weights_bytes, filter(None, (model, draft_model))))
        self.context_length: int | None = None
        """How many tokens the model was made for; None if that is not known."""
        self._growth = Growth(whole, kv, runner.prefill_step)
        self._passes: dict[tuple[int, int], int | None] = {}
        self._besides: dict[int, _Beside] = {}
        self._every = runner.snapshot_every if runner.opaque else LONGEST
        self._forward = runner.forward
        layers = runner.make_layers()
        logits, hidden = runner.forward(mx.zeros((1, 2), mx.int32), layers)
        self._head_bytes = sum(a[0, -1].nbytes for a in (logits, hidden) if a is not None)
        self.dtype = _dtype(layers)
        """Of the rows, before they are quantised."""

    @classmethod
    def of(
        cls,
        path_or_repo: str,
        adapter_path: str | None = None,
        *,
        kv: KVSettings | None = None,
        draft_model: str | None = None,
    ) -> Memory:
        """Read a model's configuration, and the headers of its weights. Nothing is downloaded.

        Raises:
            ModelError: there is no such model here, or mlx-lm cannot load it.
            NotQuantisable: its layers cannot be quantised as `kv` asks for.
        """
        path = models.find(path_or_repo, download=False)
        settings = models.config(path)
        model, _ = checkpoint.unread(path, None if adapter_path is None else Path(adapter_path))
        draft = None
        if draft_model is not None:
            draft, _ = checkpoint.unread(models.find(draft_model, download=False), None)
        for each in filter(None, (model, draft)):
            hollow(each)
        memory = cls(model, kv, draft)
        memory.context_length = models.context_length(settings)
        return memory

    def context(self, tokens: int) -> Context:
        """What one conversation takes after a prompt of so many tokens."""
        if tokens < 1:
            raise ValueError(f"a context has at least one token, not {tokens}")
        layout, later = self._growth.at(tokens), self._growth.at(tokens + self.prefill_step)
        return Context(
            tokens,
            _kinds(layout, later, self.prefill_step),
            _live(layout),
            max(map(_live, self._growth.on_the_way(tokens))),
            self._kept_bytes(tokens),
            self._raw_bytes(tokens),
        )

    def row_bytes(self, tokens: int) -> int:
        """What a block has of each token of such a prompt."""
        rows = sum(held.bytes.rows for held in self._growth.at(tokens))
        return rows // tokens + self._window_row_bytes

    def pass_bytes(self, tokens: int) -> int | None:
        """About what the last pass of such a prompt takes while it is computed, beyond what the
        layers hold after it; None if it cannot be said. Counted as a pass of `prefill_step` tokens,
        or of as many as there are.
        """
        start, settled = (tokens - 1) // self.prefill_step * self.prefill_step, self._growth.settled
        near = self._working(min(start, settled), min(tokens, self.prefill_step))
        if start <= settled or near is None:
            return near
        before = self._working(settled - self.prefill_step, self.prefill_step)
        passes = (start - settled) // self.prefill_step
        return None if before is None else near + passes * (near - before)

    def bytes(self, tokens: int, conversations: int = 1) -> int:
        """All that the model and so many conversations of that length take, of which one is fed."""
        held = conversations * self.context(tokens).bytes
        return self.weights_bytes + held + (self.pass_bytes(tokens) or 0)

    def conversations(self, tokens: int, limit_bytes: int) -> int:
        """How many conversations of that length fit beside the weights."""
        room = limit_bytes - self.bytes(tokens, 0)
        return max(0, room) // self.context(tokens).bytes

    def longest(self, limit_bytes: int, conversations: int = 1) -> int | None:
        """The longest context that fits for each of so many conversations, in whole passes; None if
        there is no end to it.
        """

        def fits(passes: int) -> bool:
            return self.bytes(passes * self.prefill_step, conversations) <= limit_bytes

        low, high = 0, self._growth.settled // self.prefill_step + 1
        while fits(high):
            low, high = high, high * 2
            if high * self.prefill_step > LONGEST:
                return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low * self.prefill_step

    def _working(self, start: int, count: int) -> int | None:
        if not self._is_told:
            return None
        if (start, count) not in self._passes:
            layers = self._growth.layers_at(start)
            self._passes[start, count] = working_bytes(self._forward, layers, count)
        return self._passes[start, count]

    @functools.cached_property
    def _is_told(self) -> bool:
        return is_told(self._forward, lambda: self._growth.layers_at(0))

    # What a run keeps for the store

    def _kept_bytes(self, tokens: int) -> int:
        """The logits at the end, snapshots on the way, and rows that windows have moved past."""
        marks = sum(self._head_bytes + self._beside(at).most for at in self._marks(tokens))
        return self._head_bytes + marks + self._passed(tokens) * self._window_row_bytes

    def _raw_bytes(self, tokens: int) -> int | None:
        layout = self._growth.at(tokens)
        if not all(held.capturable for held in layout):
            return None
        rows = sum(held.bytes.rows for held in layout)
        windows = sum(held.bytes.window for held in layout)
        passed = self._passed(tokens) * self._window_row_bytes
        ends = [*self._marks(tokens), tokens]
        snapshots = sum(self._beside(at).opaque + self._head_bytes + RNG_BYTES for at in ends)
        return rows + max(windows, passed) + snapshots

    def _marks(self, tokens: int) -> range:
        """Where snapshots are taken on the way."""
        return range(self._every, tokens, self._every)

    @functools.cached_property
    def _window_row_bytes(self) -> int:
        """Bytes of what all windows hold of one token."""
        return sum(held.bytes.window for held in self._growth.at(1))

    def _passed(self, tokens: int) -> int:
        """How many tokens' rows are kept of windows: of the latest passes, as many as may be."""
        if not self._window_row_bytes:
            return 0
        most = MOST_PASSED_BYTES // self._window_row_bytes
        last = (tokens - 1) % self.prefill_step + 1
        if last > most:
            return 0
        return min(tokens, last + (most - last) // self.prefill_step * self.prefill_step)

    def _beside(self, tokens: int) -> _Beside:
        """What a snapshot has beside rows that any prefix has."""
        if tokens not in self._besides:
            layout = self._growth.at(tokens)
            opaque = sum(held.bytes.opaque for held in layout)
            windows = sum(held.bytes.window for held in layout)
            self._besides[tokens] = _Beside(opaque, opaque + windows)
        return self._besides[tokens]


class _Beside(NamedTuple):
    opaque: int
    most: int  # windows, too


def _live(layout: Layout) -> int:
    return sum(held.bytes.live for held in layout)


def _kinds(layout: Layout, later: Layout, tokens: int) -> tuple[Kind, ...]:
    """What each class holds, and what `tokens` more add to it."""
    return tuple(_kind(name, layout, later, tokens) for name in Counter(x.kind for x in layout))


def _kind(name: str, layout: Layout, later: Layout, tokens: int) -> Kind:
    pairs = [(now, then) for now, then in zip(layout, later, strict=True) if now.kind == name]
    live = sum(now.bytes.live for now, _ in pairs)
    added = sum(then.bytes.live for _, then in pairs) - live
    known = all(now.capturable for now, _ in pairs)
    state = sum(now.bytes.state for now, _ in pairs) if known else None
    return Kind(name, len(pairs), live, added / tokens, state)


def _dtype(layers: list[Any]) -> str:
    """The dtype of most bytes of rows; where there are none, of all arrays."""
    known = [layer for _, layer in leaves(layers) if getattr(layer, "keys", None) is not None]
    arrays = Counter[str]()
    for array in live_arrays(known or layers):
        arrays[dtype_name(array)] += array.nbytes
    return arrays.most_common(1)[0][0] if arrays else "float32"


def _weights_bytes(model: Any) -> int:
    parameters: Any = tree_flatten(model.parameters())
    return sum(array.nbytes for array in {id(array): array for _, array in parameters}.values())


def hollow(model: Any) -> None:
    """Put zeros in the place of weights, without taking memory for them: should a model evaluate
    something while it is called, none of its weights is read.
    """

    def zeros(array: mx.array) -> mx.array:
        return mx.broadcast_to(mx.array(0, array.dtype), array.shape)

    model.update(tree_map(zeros, model.parameters()))


# The machine


class Limit(NamedTuple):
    """How much memory there is for a model, and who says so."""

    bytes: int
    source: str


def limit() -> Limit | None:
    """The memory that MLX's device has; None if the system does not say."""
    told = mx.device_info()
    for name, source in (
        ("max_recommended_working_set_size", "recommended for the GPU"),
        ("total_memory", "of the GPU"),
    ):
        value = told.get(name)
        if mx.default_device() == mx.Device(mx.gpu) and isinstance(value, int):
            return Limit(value, source)
    found = machine.memory_bytes()
    return None if found is None else Limit(found, "of the machine")
