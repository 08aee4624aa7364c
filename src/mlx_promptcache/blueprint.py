"""What a model's layers look like: files are compared with it before anything is allocated."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx

from mlx_promptcache.arrays import dtype_name
from mlx_promptcache.container import raw_bytes
from mlx_promptcache.errors import NotQuantisable, UnsupportedLayer
from mlx_promptcache.layers import ROWS, TOKEN_AXIS, capture, fill, make_layers, quantise
from mlx_promptcache.tree import CELL

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mlx_promptcache.fingerprint import KVSettings
    from mlx_promptcache.windows import Window

PROBE_TOKENS = 2
LARGEST_UNKNOWN_BYTES = 1 << 26


class Shape(NamedTuple):
    """An array's dtype and shape; a length of 0 stands for any number of tokens."""

    dtype: str
    lengths: tuple[int, ...]


class Blueprint(NamedTuple):
    """What a live model's layers look like: by path, the arrays of its rows, or of its content.

    `rows` has those of windows, too. Files are compared with it before anything is allocated.
    """

    rows: Mapping[str, Mapping[str, Shape]]
    opaque: Mapping[str, Mapping[str, Shape]]
    windows: Mapping[str, Window]
    logits: Shape

    @property
    def sliceable(self) -> bool:
        """Whether every layer is: then any position of what is stored can be resumed."""
        return not self.opaque and not self.windows

    @property
    def sliceable_rows(self) -> list[Shape]:
        """The rows of layers any prefix of which is valid; none where they may be quantised, since
        they are then of one kind or of another.
        """
        if self.quantises:
            return []
        named = (rows for path, rows in self.rows.items() if path not in self.windows)
        return [shape for rows in named for shape in rows.values()]

    @property
    def cuts_matter(self) -> bool:
        """Whether what the model computes depends on where passes are cut, by more than rounding.

        It does where windows keep their first rows (`--max-kv-size`): mlx-lm lets only the first
        tokens of a pass see these, and every token that is fed by itself.
        """
        return any(window.keep for window in self.windows.values())

    @property
    def quantises(self) -> bool:
        """Whether there are layers that may be quantised."""
        return any("keys.0" in rows for rows in self.rows.values())

    @classmethod
    def of(cls, model: Any, kv: KVSettings) -> Blueprint:
        """Read it off a forward call over two tokens that is built, but never evaluated.

        Where layers may be quantised, they may look like either.

        Raises:
            UnsupportedLayer: a layer cannot be taken down, or not be filled with what was.
            NotQuantisable: a layer cannot be quantised as the settings ask for.
        """
        blueprint = cls._of(model, kv, quantised=False)
        return blueprint if kv.bits is None else blueprint | cls._of(model, kv, quantised=True)

    @classmethod
    def _of(cls, model: Any, kv: KVSettings, *, quantised: bool) -> Blueprint:
        layers = make_layers(model, kv)
        tokens = mx.zeros((1, PROBE_TOKENS), mx.int32)
        logits = model(tokens, cache=layers)
        if quantised:
            quantise(layers, replace(kv, quantized_start=0))
        contents = capture(layers, PROBE_TOKENS)
        fill(make_layers(model, kv), contents, PROBE_TOKENS, kv)
        rows: dict[str, dict[str, Shape]] = {}
        opaque: dict[str, dict[str, Shape]] = {}
        windows: dict[str, Window] = {}
        for content in contents:
            path = content.path
            if content.opaque:
                opaque[path] = {name: _shape(a) for name, a in content.arrays.items()}
                continue
            rows[path] = {name: _shape(a, any_tokens=True) for name, a in content.rows.items()}
            if content.window is not None:
                windows[path] = content.window
        if quantised:
            _go_on(model, tokens, layers)
        return cls(rows, opaque, windows, Shape(dtype_name(logits), (logits.shape[-1],)))

    def __or__(self, other: Blueprint) -> Blueprint:
        """What either may look like: the same layers before and after they are quantised."""
        rows, opaque = _merged(self.rows, other.rows), _merged(self.opaque, other.opaque)
        return Blueprint(rows, opaque, {**self.windows, **other.windows}, self.logits)

    def check_rows(self, path: str, name: str, dtype: str, shape: Sequence[int]) -> None:
        """Raise UnsupportedLayer unless this layer has such rows."""
        expected = self.rows.get(path, {}).get(name)
        found = Shape(dtype, (*shape[:TOKEN_AXIS], 0, *shape[TOKEN_AXIS + 1 :]))
        if found != expected:
            raise UnsupportedLayer(f"the rows {name!r} of layer {path} are not those of this model")

    def check_opaque(
        self, path: str, name: str, dtype: str, shape: Sequence[int], n_past: int
    ) -> None:
        """Raise UnsupportedLayer unless this layer can hold such an array at `n_past` tokens."""
        expected = self.opaque.get(path, {}).get(name)
        if path in self.opaque and expected is None:  # some arrays come only after many tokens
            if raw_bytes(dtype, tuple(shape)) <= LARGEST_UNKNOWN_BYTES:
                return
        elif (
            expected is not None
            and dtype == expected.dtype
            and _differs_by_tokens(name, shape, expected.lengths, n_past)
        ):
            return
        raise UnsupportedLayer(f"{name!r} of layer {path} is not of this model")


def _go_on(model: Any, tokens: mx.array, layers: list[Any]) -> None:
    """Call the model once more. Some read their keys as one array, which quantised ones are not:
    without this they would fail in the middle of a long prompt.
    """
    try:
        model(tokens, cache=layers)
    except Exception as exc:
        raise NotQuantisable(
            "mlx-lm cannot go on from quantised layers with this model: leave --kv-bits out"
        ) from exc


def _differs_by_tokens(
    name: str, shape: Sequence[int], expected: Sequence[int], n_past: int
) -> bool:
    """Whether a shape differs at most in its number of tokens, and that is a possible one."""
    if len(shape) != len(expected):
        return False
    axes = [axis for axis in range(len(shape)) if shape[axis] != expected[axis]]
    possible = not axes or (len(axes) == 1 and shape[axes[0]] <= n_past + CELL)
    return possible and (name not in ROWS or axes in ([], [TOKEN_AXIS]))


def _merged(
    a: Mapping[str, Mapping[str, Shape]], b: Mapping[str, Mapping[str, Shape]]
) -> dict[str, dict[str, Shape]]:
    return {path: {**a.get(path, {}), **b.get(path, {})} for path in {**a, **b}}


def _shape(array: mx.array, *, any_tokens: bool = False) -> Shape:
    lengths = list(array.shape)
    if any_tokens:
        lengths[TOKEN_AXIS] = 0
    return Shape(dtype_name(array), tuple(lengths))
