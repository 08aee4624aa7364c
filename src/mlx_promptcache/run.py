"""Run: one token sequence going through the model, live.

The loop differs from mlx-lm's `generate_step` in what it makes exact: passes end on a fixed grid of
positions, every draw takes a key of its own, and at each token that is yielded the layers hold just
the tokens yielded so far. It is as fast, because the next forward call is on its way before a token
is waited for.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_promptcache.errors import PromptError
from mlx_promptcache.layers import capture, let_go, live_arrays, quantise, to_be_quantised
from mlx_promptcache.passes import Pass, extended, next_end
from mlx_promptcache.prompt import TextStream, answered
from mlx_promptcache.sampling import Sampling
from mlx_promptcache.state import Mark, Origin, State, Trail
from mlx_promptcache.window_rows import latest, limited

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from mlx_promptcache.match import Match
    from mlx_promptcache.prompt import Prompt
    from mlx_promptcache.ranks import Ranks
    from mlx_promptcache.runner import Runner
    from mlx_promptcache.state import Ref
    from mlx_promptcache.window_rows import WindowRows

    Progress = Callable[[int, int], None]  # (tokens of the prompt that are held, all of them)
    Later = Callable[[], list[Any] | None]  # reads layers; None if they cannot be had

CLEAR_EVERY = 256  # tokens between two releases of MLX's buffers, as in mlx-lm


@dataclass(frozen=True)
class Step:
    """One generated token. `text` is what can be shown now: at times nothing, at times more.

    `finish_reason` is set on the last one: `stop` (an end token or a stop text) or `length`.
    `from_draft` tells that a draft model proposed it.
    """

    token: int
    text: str
    finish_reason: str | None = None
    from_draft: bool = False


class Run:
    """A sequence that grows: mlx-lm's cache objects, and all that a `State` takes down of them."""

    def __init__(
        self,
        runner: Runner,
        layers: list[Any] | Later,
        state: State | None,
        start_lineage: str,
    ) -> None:
        self._runner = runner
        self._there = layers
        self._tokens: list[int] = list(state.tokens) if state else []
        self._logits = state.logits if state else None
        self._embedding = state.embedding if state else None
        self._lineage = state.lineage if state else start_lineage
        self._trail = state.trail if state else Trail()
        self._passes: list[Pass] = list(self._trail.passes)
        self._marks: list[Mark] = list(state.marks) if state else []
        self._end: Mark | None = None  # at the end of the prompt
        self._passed: list[WindowRows] = list(state.passed) if state else []
        self._passed_until = self._passed[-1].span.stop if self._passed else len(self._tokens)
        self._held = len(self._tokens)  # tokens in the layers, those on their way included
        self._broken = (
            False  # a forward call was broken off: layers hold different numbers of tokens
        )
        self._unread: mx.array | None = None  # fed, but its value not yet asked for
        self._unfed: mx.array | None = None  # yielded, but not fed
        self.key: mx.array = state.rng if state else mx.random.key(0)
        self.sampling: Sampling = state.sampling if state else Sampling()
        self.origin: Origin = state.origin if state else Origin()
        self.match: Match | None = None
        self.anew: Callable[[], Run] | None = None
        self.cached_tokens = self._held
        self._prompt_tokens = self._held
        self._text = ""
        self.load_seconds = 0.0
        self.prefill_seconds = 0.0

    @property
    def _layers(self) -> list[Any]:
        """mlx-lm's cache objects; their rows are read when they are first needed."""
        if not isinstance(self._there, list):
            self._there = self._read_rows(self._there)
        return self._there

    def _read_rows(self, later: Later) -> list[Any]:
        """Read the rows of an exact hit; if they cannot be had, compute them.

        The first token may be shown by now: its logits were read and checked by themselves.
        """
        began = time.perf_counter()
        layers = later()
        if layers is None:
            assert self.anew is not None  # noqa: S101 - whoever reads later says how else
            other = self.anew()
            layers = other._layers
            self._trail, self._passes, self._lineage = other._trail, other._passes, other._lineage
            self.match, self.cached_tokens = other.match, other.cached_tokens
            self.prefill_seconds += other.prefill_seconds
            began += other.prefill_seconds
            if self._end is not None:
                self._end = self._end._replace(lineage=self._lineage)
        self.load_seconds += time.perf_counter() - began
        return layers

    # Prefill

    def prefill(
        self,
        tokens: Sequence[int],
        boundaries: Sequence[int],
        *,
        marks: Collection[int] = (),
        progress: Progress | None = None,
    ) -> None:
        """Feed the tokens that are not held yet, and take a mark at each boundary and at the end.

        Passes end at multiples of `prefill_step`, at boundaries and at the end of the tokens. Marks
        are also taken where a pass ends at one of `marks`, and every `snapshot_every` tokens if
        there are layers that can be resumed in no other way.
        """
        began = time.perf_counter()
        self._prompt_tokens = len(tokens)
        while self._held < len(tokens):
            if progress:
                progress(self._held, len(tokens))
            start = self._held
            end = next_end(start, len(tokens), self._runner.prefill_step, boundaries)
            self._broken = True
            self._tokens += tokens[start:end]
            self._forward(mx.array(list(tokens[start:end]))[None], end - start)
            let_go(self._layers)
            arrays = live_arrays(self._layers) + self._keep_passed()
            if end == len(tokens) or end in boundaries or end in marks or self._due(start, end):
                arrays += [a for a in (self._logits, self._embedding) if a is not None]
                self._evaluate(arrays)
                self._marks.append(self._mark())
            else:
                self._evaluate(arrays)
            mx.clear_cache()
        self.prefill_seconds = time.perf_counter() - began
        if progress:
            progress(self._held, len(tokens))
        if self.prefilled_tokens:
            rate = self.prefill_seconds / self.prefilled_tokens
            self._trail = self._trail._replace(seconds_per_token=rate)
        ended = self._marks and self._marks[-1].position == self._held
        self._end = self._marks[-1] if ended else self._mark()

    def begins(self, tokens: Sequence[int]) -> bool:
        """Whether the tokens held are the beginning of these: then the run can go on with them."""
        if self._broken:
            return False
        self._settle()
        return list(tokens[: self._held]) == self._tokens

    def go_on(self, prompt: Prompt, *, progress: Progress | None = None) -> None:
        """Feed what a prompt has more than the tokens held, which it begins with.

        The passes are those of a run that resumes the state held here, and the key goes on.
        """
        self._settle()
        self.origin, self._text = prompt.origin, ""
        self.match, self.anew = None, None
        self.cached_tokens, self.load_seconds = self._held, 0.0
        self.prefill(prompt.tokens, prompt.boundaries, progress=progress)

    def stored(self, refs: Sequence[Ref]) -> None:
        """Note that the state held here is stored, in these blocks: it is not packed again."""
        self._trail = self._trail._replace(refs=tuple(refs))
        self._marks, self._passed, self._passed_until = [], [], self._held

    @property
    def n_past(self) -> int:
        """How many tokens are held, those yielded included."""
        return len(self._tokens) + (self._unfed is not None)

    @property
    def text(self) -> str:
        """What was generated after the prompt, as it was shown."""
        return self._text

    def _evaluate(self, arrays: Sequence[Any]) -> None:
        with self._runner.waiting():
            mx.eval(arrays)

    def _begin_to_evaluate(self, *arrays: Any) -> None:
        with self._runner.waiting():
            mx.async_eval(arrays)

    @property
    def prefilled_tokens(self) -> int:
        """Tokens of the prompt that were fed; fewer than all where the prefill was interrupted."""
        return min(self._held, self._prompt_tokens) - self.cached_tokens

    def _due(self, start: int, end: int) -> bool:
        every = self._runner.snapshot_every
        return self._runner.opaque and start // every < end // every

    def _keep_passed(self) -> list[mx.array]:
        """Keep the latest rows of windows for the blocks to come; return the new arrays."""
        if not self._runner.keeps_windows:
            return []
        rows = latest(self._layers, self._held, self._held - self._passed_until)
        if rows is None:
            return []
        self._passed = limited([*self._passed, rows])
        self._passed_until = self._held
        return rows.arrays

    def _mark(self) -> Mark:
        contents = capture(self._layers, self._held) if self._needs_layers() else ()
        layers = tuple(layer for layer in contents if not layer.sliceable)
        return Mark(self._held, layers, self._logits, self._embedding, self.key, self._lineage)

    def _needs_layers(self) -> bool:
        return self._runner.capturable and not self._runner.sliceable

    def _forward(self, inputs: mx.array, count: int) -> None:
        """One pass over `inputs`, `[1, count]`; nothing is evaluated."""
        self._broken = True
        logits, hidden = self._runner.forward(inputs, self._layers)
        self._logits = mx.contiguous(logits[0, -1])  # and not what a whole pass made
        self._embedding = None if hidden is None else mx.contiguous(hidden[0, -1])
        end = self._held + count
        self._passes.append(Pass(self._held, end, self._lineage))
        self._lineage = extended(self._lineage, self._held, end)
        self._held = end
        if to_be_quantised(self._layers, self._runner.kv):
            self._quantise()
        self._broken = False

    def _quantise(self) -> None:
        """Quantise layers. Marks keep the rows that they were taken with, and what is stored of the
        rows until now is not what the layers hold from now on.
        """
        contents = capture(self._layers, self._held) if self._marks or self._end else ()
        rows = [layer for layer in contents if layer.sliceable]
        trail = self._trail._replace(passes=tuple(self._passes))

        def with_rows(mark: Mark) -> Mark:
            if mark.trail is not None:
                return mark
            own = tuple(layer.cut(mark.position) for layer in rows)
            return mark._replace(layers=(*mark.layers, *own), trail=trail)

        self._marks = [with_rows(mark) for mark in self._marks]
        self._end = self._end and with_rows(self._end)
        quantise(self._layers, self._runner.kv)
        self._trail = self._trail._replace(refs=())

    # Decode

    def steps(self, max_tokens: int, stop: Sequence[str] = ()) -> Iterator[Step]:
        """Generate up to `max_tokens` tokens (without limit if negative).

        At each step `state()` is the state that holds the tokens yielded so far.
        """
        self._settle()
        ends, text = self._runner.ends, TextStream(self._runner.tokenizer, stop)
        limit = self._runner.limits.room_for(self._held, max_tokens)
        draw = Draw(self.sampling, self._tokens, self._runner.ranks)
        key, token = draw(self.key, self._logits)
        self._begin_to_evaluate(token)
        for count in range(1, limit + 1):
            # The first token of a run is shown before its own forward call; after the last one
            # nothing needs a forward call any more, unless somebody asks for the state.
            self.key = key
            if 1 < count < limit:
                self._feed(token)
                key, following = draw(self.key, self._logits, token)
                self._begin_to_evaluate(following, self._logits)
                value = self._read()
            else:
                self._unfed, value, following = token, self._value(token), token
            if self._runner.ranks is not None:
                self._runner.ranks.hear()
            step = self._step(value, value in ends, count == limit, text)
            yield step
            if step.finish_reason:
                return
            if count == 1:
                self._settle()
                key, following = draw(self.key, self._logits, token)
            token = following
            if count % CLEAR_EVERY == 0:
                mx.clear_cache()

    def _step(self, value: int, ended: bool, last: bool, text: TextStream) -> Step:
        shown = "" if ended else text.add(value)
        reason = "stop" if ended or text.stopped else "length" if last else None
        if reason:
            shown += text.finish()
        self._text += shown
        return Step(value, shown, reason)

    def _feed(self, token: mx.array) -> None:
        self._forward(token[None], 1)
        self._unread = token
        if self._held - self._passed_until >= self._runner.shortest_window:
            self._begin_to_evaluate(*self._keep_passed())

    def _read(self) -> int:
        assert self._unread is not None  # noqa: S101 - `_feed` came before
        value = self._value(self._unread)
        self._tokens.append(value)
        self._unread = None
        return value

    def _value(self, token: mx.array) -> int:
        with self._runner.waiting():
            return int(token.item())  # type: ignore[arg-type]

    def _settle(self) -> None:
        """Feed the token that was yielded but not fed; know the one that was fed but not read."""
        if self._unfed is not None:
            token, self._unfed = self._unfed, None
            self._feed(token)
        if self._unread is not None:
            self._read()

    # State

    def state(self) -> State:
        """The state that holds the prompt and the tokens yielded so far."""
        self._settle()
        return self._take_down().evaluated()

    def prompt_state(self) -> State:
        """The state at the end of the prompt, also after tokens were generated.

        Raises:
            PromptError: the prompt has not come to its end.
        """
        if self._end is None:
            raise PromptError("the prompt was broken off: there is no state at its end")
        whole, mark = self._as_held(), self._end
        earlier = tuple(m for m in self._marks if m.position < mark.position)
        return replace(whole.at(mark), origin=self.origin, marks=earlier).evaluated()

    def _whole_origin(self) -> Origin:
        """How the tokens held were made: the prompt, and the text that was generated after it."""
        if self._held < self._prompt_tokens:
            return Origin()  # the prefill was interrupted
        return (
            answered(self.origin, self._text) if self._held > self._prompt_tokens else self.origin
        )

    def _take_down(self) -> State:
        return self._as_held()

    def _as_held(self) -> State:
        """The state of the tokens that the layers hold."""
        if self._broken:
            raise PromptError("a forward call was broken off: what the layers hold is no state")
        if self._unread is not None:
            self._read()
        arrays = [a for a in (self._logits, self._embedding, self.key) if a is not None]
        self._evaluate([arrays, live_arrays(self._layers)])
        return State(
            tokens=tuple(self._tokens),
            contents=capture(self._layers, self._held),
            logits=self._logits,
            embedding=self._embedding,
            rng=self.key,
            sampling=replace(self.sampling, seed=None),
            kv=self._runner.kv,
            fingerprint=self._runner.fingerprint,
            lineage=self._lineage,
            origin=self._whole_origin(),
            marks=tuple(m for m in self._marks if m.position < self._held),
            trail=self._trail._replace(passes=tuple(self._passes)),
            passed=tuple(self._passed),
        )


class Draw:
    """Draws tokens one after the other; keeps the last tokens, for the penalties. Of several ranks
    the first one draws for all.
    """

    def __init__(
        self, sampling: Sampling, tokens: Sequence[int], ranks: Ranks | None = None
    ) -> None:
        self._ranks = ranks
        if ranks is not None:
            ranks.begin()
        self._sample = sampling.sampler()
        self._size = sampling.context_size
        self._last = mx.array(list(tokens[-self._size :]) if self._size else [], mx.int32)

    def __call__(
        self, key: mx.array, logits: mx.array | None, token: mx.array | None = None
    ) -> tuple[mx.array, mx.array]:
        """Return the next key and the next token, `[1]`; `token` is the one drawn before."""
        assert logits is not None  # noqa: S101 - a run that decodes has been prefilled
        if self._size and token is not None:
            self._last = mx.concatenate([self._last, token.astype(mx.int32)])[-self._size :]
        following, subkey = mx.random.split(key)
        drawn = self._sample(logits[None], self._last, subkey)
        return following, drawn if self._ranks is None else self._ranks.leading(drawn)
