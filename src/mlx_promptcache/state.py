"""The state: all that the next token needs, as a value; how it is split into files, and joined.

A state belongs to the end of its tokens. Its logits are those after the last token, so that an
exact hit samples its first token with no forward pass; its key is the one that the next draw
splits.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_promptcache.errors import UnsupportedLayer
from mlx_promptcache.fingerprint import PLAIN, QUANTISED, KVSettings
from mlx_promptcache.layers import (
    TOKEN_AXIS,
    Blueprint,
    Layer,
    Shape,
    fill,
    from_array,
    make_layers,
    to_array,
)
from mlx_promptcache.sampling import Sampling

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mlx_promptcache.container import Array, Header
    from mlx_promptcache.passes import Pass

LOGITS = "logits"
EMBEDDING = "embedding"
RNG = "rng"


@dataclass(frozen=True)
class Origin:
    """How a prompt was made, so that a continuation can be rendered whole.

    `text` for a prompt that is text (inside a user message after `system` where `template` is
    set), else `messages`. Neither where only tokens were given. An `open` text has not been closed:
    what comes next goes on with it, inside its message.
    """

    text: str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    system: str | None = None
    template: bool = False
    open: bool = False

    def to_json(self) -> dict[str, Any]:
        """The origin as JSON."""
        messages = None if self.messages is None else [dict(m) for m in self.messages]
        return {
            "text": self.text,
            "messages": messages,
            "system": self.system,
            "template": self.template,
            "open": self.open,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Origin:
        """The origin from JSON."""
        messages = value.get("messages")
        return cls(
            value.get("text"),
            None if messages is None else tuple(messages),
            value.get("system"),
            bool(value.get("template")),
            bool(value.get("open")),
        )


@dataclass(frozen=True)
class Ref:
    """Rows `[start, start + rows)` as the first rows of a stored block."""

    stem: str
    digest: str
    start: int
    rows: int

    @property
    def end(self) -> int:
        """The position after the rows."""
        return self.start + self.rows


@dataclass(frozen=True)
class Trail:
    """Where a state's rows came from: first from stored blocks, then from passes of its own."""

    refs: tuple[Ref, ...] = ()
    passes: tuple[Pass, ...] = ()
    seconds_per_token: float = 0.0

    @property
    def stored(self) -> int:
        """The position up to which the rows stand in blocks."""
        return self.refs[-1].end if self.refs else 0


@dataclass(frozen=True)
class Mark:
    """A position on the way to a state where a snapshot was taken; its rows are the state's."""

    position: int
    layers: tuple[Layer, ...]  # the opaque ones
    logits: mx.array | None
    embedding: mx.array | None
    rng: mx.array
    lineage: str
    trail: Trail | None = (
        None  # its own, where its rows were quantised since: `layers` are then all
    )


@dataclass(frozen=True, eq=False)
class State:
    """All that the next token needs, at one position of a token sequence. A value: nothing that is
    done with it changes it.
    """

    tokens: tuple[int, ...]
    contents: tuple[Layer, ...] = field(repr=False)
    logits: mx.array | None = field(repr=False)
    """`[vocab]`, after the last token; None if the state came from a program that kept none."""
    embedding: mx.array | None = field(repr=False)
    """`[hidden]`, the final hidden state of the last token; None where it cannot be read."""
    rng: mx.array = field(repr=False)
    """The key, `[2]` of uint32, that the next draw splits."""
    sampling: Sampling = field(default_factory=Sampling)
    kv: KVSettings = field(default_factory=KVSettings, repr=False)
    lineage: str = field(default="", repr=False)
    fingerprint: str = field(default="", repr=False)
    """Of what computed it; empty where that is not known."""
    origin: Origin = field(default_factory=Origin, repr=False)
    marks: tuple[Mark, ...] = field(default=(), repr=False)
    trail: Trail = field(default_factory=Trail, repr=False)

    @property
    def n_past(self) -> int:
        """How many tokens' rows are held: all of them."""
        return len(self.tokens)

    @property
    def nbytes(self) -> int:
        """Bytes that the state takes in memory."""
        rest = [a for a in (self.logits, self.embedding, self.rng) if a is not None]
        return sum(layer.nbytes for layer in self.contents) + sum(a.nbytes for a in rest)

    @property
    def phase(self) -> str:
        """The namespace that its rows belong to."""
        quantised = any("keys" not in x.rows for x in self.contents if x.sliceable)
        return QUANTISED if quantised else PLAIN

    def layers(self, model: Any) -> list[Any]:
        """Fresh mlx-lm cache objects with this content, for `prompt_cache=` of mlx-lm.

        They may be generated into; the state stays as it is.

        Raises:
            UnsupportedLayer: this is not a state of this model.
        """
        layers = make_layers(model, self.kv)
        fill(layers, self.contents, self.n_past, self.kv)
        return layers

    def at(self, mark: Mark) -> State:
        """The state at one of its marks."""
        rows = {x.path: x.cut(mark.position) for x in self.contents if x.sliceable}
        own = {x.path: x for x in mark.layers}
        return replace(
            self,
            tokens=self.tokens[: mark.position],
            contents=tuple(own.get(x.path) or rows[x.path] for x in self.contents),
            trail=mark.trail or self.trail,
            logits=mark.logits,
            embedding=mark.embedding,
            rng=mark.rng,
            lineage=mark.lineage,
            origin=Origin(),
            marks=(),
        )


# Splitting


def split_rows(state: State, begin: int, end: int) -> tuple[dict[str, Array], dict[str, list[str]]]:
    """The sliceable rows `[begin, end)` as arrays, and which layers each array is a stack of.

    Layers whose rows are alike are stacked along a new first axis, in the model's order: fewer and
    larger arrays.
    """
    groups: dict[tuple[str, str, tuple[int, ...]], list[tuple[str, mx.array]]] = {}
    for layer in state.contents:
        for name, array in layer.rows.items():
            part = array[:, :, begin:end]
            groups.setdefault((name, str(part.dtype), tuple(part.shape)), []).append(
                (layer.path, part)
            )
    arrays: dict[str, Array] = {}
    stacks: dict[str, list[str]] = {}
    for (name, _, _), members in groups.items():
        label = f"{name}/{sum(1 for other in stacks if other.startswith(name + '/'))}"
        arrays[label] = to_array(mx.stack([part for _, part in members]))
        stacks[label] = [path for path, _ in members]
    return arrays, stacks


def split_rest(state: State) -> tuple[dict[str, Array], dict[str, Any]]:
    """What a snapshot holds of a state: arrays, and JSON for what is not an array."""
    arrays: dict[str, Array] = {}
    opaque: dict[str, Any] = {}
    for layer in state.contents:
        if not layer.sliceable:
            opaque[layer.path] = {"kind": layer.kind, "attributes": layer.attributes}
            for name, array in layer.arrays.items():
                arrays[f"{layer.path}/{name}"] = to_array(array)
    for name, value in ((LOGITS, state.logits), (EMBEDDING, state.embedding), (RNG, state.rng)):
        if value is not None:
            arrays[name] = to_array(value)
    return arrays, {
        "opaque": opaque,
        "sampling": state.sampling.to_json(),
        "origin": state.origin.to_json(),
    }


# Joining


def check_block(header: Header, blueprint: Blueprint | None) -> None:
    """Compare what a block says it holds with the model's layers.

    Raises:
        UnsupportedLayer: they do not agree.
    """
    if blueprint is None:
        return
    held: set[str] = set()
    for label, entry in header.entries.items():
        name = label.partition("/")[0]
        for path in header.content["stacks"][label]:
            blueprint.check_rows(path, name, entry.dtype, entry.shape[1:])
            held.add(path)
    if held != set(blueprint.rows):
        raise UnsupportedLayer("it does not hold the layers of this model")


def unstack(
    header: Header, arrays: Mapping[str, Array], rows: int
) -> dict[tuple[str, str], mx.array]:
    """The first `rows` rows of a block's arrays, by path and name."""
    found: dict[tuple[str, str], mx.array] = {}
    for label, array in arrays.items():
        stack = from_array(array)
        name = label.partition("/")[0]
        for i, path in enumerate(header.content["stacks"][label]):
            found[path, name] = stack[i, :, :, :rows]
    return found


def join_rows(
    parts: Sequence[Mapping[tuple[str, str], mx.array]],
) -> dict[str, dict[str, mx.array]]:
    """The rows of blocks that follow one another, by path and then by name.

    Raises:
        UnsupportedLayer: the blocks do not hold the same layers.
    """
    joined: dict[str, dict[str, mx.array]] = {}
    for path, name in parts[0] if parts else ():
        try:
            arrays = [part[path, name] for part in parts]
        except KeyError:
            raise UnsupportedLayer("the blocks do not hold the same layers") from None
        joined.setdefault(path, {})[name] = (
            arrays[0] if len(arrays) == 1 else mx.concatenate(arrays, axis=TOKEN_AXIS)
        )
    return joined


def check_snapshot(header: Header, blueprint: Blueprint | None) -> None:
    """Compare what a snapshot says it holds with what the model's layers can hold.

    Raises:
        UnsupportedLayer: they do not agree.
    """
    content = header.content
    if blueprint is not None and set(content["opaque"]) != set(blueprint.opaque):
        raise UnsupportedLayer("it has opaque layers that are not those of this model")
    for name, entry in header.entries.items():
        path, _, array = name.partition("/")
        if array and blueprint is not None:
            blueprint.check_opaque(path, array, entry.dtype, entry.shape, content["n_past"])
        elif not array and not _is_head(Shape(entry.dtype, entry.shape), name, blueprint):
            raise UnsupportedLayer(f"its {name} cannot be those of this model")


def _is_head(shape: Shape, name: str, blueprint: Blueprint | None) -> bool:
    if name == RNG:
        return shape == Shape("uint32", (2,))
    if name == LOGITS and blueprint is not None:
        return shape == blueprint.logits
    return name in {LOGITS, EMBEDDING} and len(shape.lengths) == 1 and shape.lengths[0] > 0


def join_layers(
    rows: Mapping[str, Mapping[str, mx.array]],
    content: Mapping[str, Any],
    arrays: Mapping[str, mx.array],
) -> tuple[Layer, ...]:
    """All layers of a state from the rows of its blocks and the rest of its snapshot."""
    layers = [Layer(path, "", dict(named)) for path, named in rows.items()]
    for path, opaque in content.get("opaque", {}).items():
        own = {
            name.partition("/")[2]: array
            for name, array in arrays.items()
            if name.startswith(path + "/")
        }
        layers.append(Layer(path, opaque["kind"], {}, own, opaque["attributes"]))
    return tuple(sorted(layers, key=lambda layer: _order(layer.path)))


def _order(path: str) -> tuple[int, ...]:
    return tuple(int(part) for part in path.split("."))
