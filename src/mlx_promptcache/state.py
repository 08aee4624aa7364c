"""The state: all that the next token needs, as a value.

A state belongs to the end of its tokens. Its logits are those after the last token, so that an
exact hit samples its first token with no forward pass; its key is the one that the next draw
splits.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx

from mlx_promptcache.fingerprint import PLAIN, QUANTISED, KVSettings
from mlx_promptcache.layers import Layer, fill, make_layers
from mlx_promptcache.sampling import Sampling

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mlx_promptcache.passes import Pass
    from mlx_promptcache.window_rows import WindowRows


@dataclass(frozen=True)
class Origin:
    """How a prompt was made, so that a continuation can be rendered whole.

    `text` for a prompt that is text (inside a user message after `system` where `template` is
    set), else `messages`. Neither where only tokens were given. An `open` text has not been closed:
    what comes next goes on with it, inside its message. `earlier` is the id of the snapshot where a
    conversation stood before its last exchange.
    """

    text: str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    system: str | None = None
    template: bool = False
    open: bool = False
    earlier: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The origin as JSON."""
        messages = None if self.messages is None else [dict(m) for m in self.messages]
        earlier = {} if self.earlier is None else {"earlier": self.earlier}
        return {
            "text": self.text,
            "messages": messages,
            "system": self.system,
            "template": self.template,
            "open": self.open,
            **earlier,
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
            value.get("earlier"),
        )


class Ref(NamedTuple):
    """Rows `[start, start + rows)` as the first rows of a stored block."""

    stem: str
    digest: str
    start: int
    rows: int

    @property
    def end(self) -> int:
        """The position after the rows."""
        return self.start + self.rows


class Trail(NamedTuple):
    """Where a state's rows came from: first from stored blocks, then from passes of its own."""

    refs: tuple[Ref, ...] = ()
    passes: tuple[Pass, ...] = ()
    seconds_per_token: float = 0.0


class Mark(NamedTuple):
    """A position on the way to a state where a snapshot was taken; its rows are the state's.

    `layers` are those that are not sliceable. Where rows were quantised since, they are all, and
    the mark has a `trail` of its own.
    """

    position: int
    layers: tuple[Layer, ...]
    logits: mx.array | None
    embedding: mx.array | None
    rng: mx.array
    lineage: str
    trail: Trail | None = None


class Speculation(NamedTuple):
    """That a state was taken in the middle of a round of speculative decoding.

    The round began at `start`, with `key` and `lineage`, and with `draft_tokens` proposals to make.
    """

    start: int
    key: tuple[int, int]
    draft_tokens: int
    lineage: str

    def to_json(self) -> dict[str, Any]:
        """It as JSON."""
        return {
            "start": self.start,
            "key": list(self.key),
            "draft_tokens": self.draft_tokens,
            "lineage": self.lineage,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Speculation:
        """It from JSON."""
        first, second = value["key"]
        return cls(value["start"], (first, second), value["draft_tokens"], value["lineage"])


@dataclass(frozen=True, eq=False, repr=False)
class State:
    """All that the next token needs, at one position of a token sequence. A value: nothing that is
    done with it changes it.
    """

    tokens: tuple[int, ...]
    contents: tuple[Layer, ...]
    logits: mx.array | None
    """`[vocab]`, after the last token; None if the state came from a program that kept none."""
    embedding: mx.array | None
    """`[hidden]`, the final hidden state of the last token; None where it cannot be read."""
    rng: mx.array
    """The key, `[2]` of uint32, that the next draw splits."""
    sampling: Sampling = field(default_factory=Sampling)
    kv: KVSettings = field(default_factory=KVSettings)
    lineage: str = ""
    fingerprint: str = ""
    """Of what computed it; empty where that is not known."""
    origin: Origin = field(default_factory=Origin)
    marks: tuple[Mark, ...] = ()
    trail: Trail = field(default_factory=Trail)
    speculation: Speculation | None = None
    passed: tuple[WindowRows, ...] = ()
    """Rows that its windows have moved past, for blocks to hold."""

    def __repr__(self) -> str:
        kinds = Counter(layer.kind or "rows" for layer in self.contents)
        layers = ", ".join(f"{count} x {kind}" for kind, count in kinds.items()) or "no layers"
        logits = "" if self.logits is not None else ", no logits"
        return f"<State of {self.n_past:,} tokens: {layers}, {self.nbytes:,} bytes{logits}>"

    @property
    def n_past(self) -> int:
        """How many tokens' rows are held: all of them."""
        return len(self.tokens)

    @property
    def nbytes(self) -> int:
        """Bytes that the state takes in memory."""
        rest = [a for a in (self.logits, self.embedding, self.rng) if a is not None]
        return sum(layer.nbytes for layer in self.contents) + sum(a.nbytes for a in rest)

    def evaluated(self) -> State:
        """The state itself, with nothing left to be computed of it: then any thread may use it.
        What is to be computed belongs to a stream of MLX, and that to one thread.
        """
        layers = [*self.contents, *(layer for mark in self.marks for layer in mark.layers)]
        rest = [(self.logits, self.embedding, self.rng)]
        rest += [(mark.logits, mark.embedding, mark.rng) for mark in self.marks]
        mx.eval(rest, [layer.held for layer in layers], [rows.arrays for rows in self.passed])
        return self

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
        trail = mark.trail or self.trail
        passes = tuple(p for p in trail.passes if p.start < mark.position)
        # What went on from here is not the only way on: its rows must not be taken for others'.
        passed = [r.until(mark.position) for r in self.passed if r.span.start < mark.position]
        return replace(
            self,
            tokens=self.tokens[: mark.position],
            contents=tuple(own.get(x.path) or rows[x.path] for x in self.contents),
            trail=trail._replace(passes=passes),
            passed=tuple(passed),
            logits=mark.logits,
            embedding=mark.embedding,
            rng=mark.rng,
            lineage=mark.lineage,
            origin=Origin(),
            speculation=None,
            marks=(),
        )
