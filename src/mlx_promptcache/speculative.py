"""Speculative decoding: a draft model proposes tokens, the model checks them in one pass.

A round begins where the layers of both models hold `start` tokens. The next token is drawn from the
logits there, and the draft model proposes some more. One pass of the model over all of these gives
the logits after each of them, and the model's own token is drawn from each. As long as that is the
proposed one, it is accepted; both models forget the rest.

The draws take the keys that plain decoding takes, and the draft model's draws take them, too: so
both say the same as often as they can, and what is said depends on the draft model by rounding
only. (Leviathan et al., arXiv:2211.17192, accept by a rule that needs no such keys.)

The bits of a row depend on the pass that computed it. A state taken in the middle of a round
says where the round began (`Speculation`), and a run that resumes it repeats the round from there:
then it goes on as the run did that the state was taken from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_promptcache.layers import capture, live_arrays, to_be_quantised
from mlx_promptcache.passes import Pass, extended, speculated
from mlx_promptcache.prompt import TextStream
from mlx_promptcache.run import Draw, Run
from mlx_promptcache.state import Speculation

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mlx_promptcache.pair import Pair
    from mlx_promptcache.run import Step
    from mlx_promptcache.state import State


@dataclass
class _Round:
    """A round from `start` on. `tokens` are the first one and those accepted after it; `keys[i]` is
    the key when `i` of them have been drawn. The logits are there once the round was checked.
    """

    start: int
    tokens: list[int]
    keys: list[mx.array]
    logits: mx.array | None = None  # [tokens fed, vocab]
    hidden: mx.array | None = None  # [tokens fed, hidden]
    lineage: str = ""
    following: int | None = None  # the token that the next round begins with


class SpeculativeRun(Run):
    """A run whose layers are those of a `Pair`."""

    def __init__(self, pair: Pair, draft_tokens: int, *args: Any) -> None:
        super().__init__(*args)
        self._pair, self._draft_tokens = pair, draft_tokens
        self._round: _Round | None = None
        self._following: int | None = None

    def begins(self, tokens: Sequence[int]) -> bool:  # noqa: ARG002
        """Never: rounds begin where a prompt ends, and are not taken up again live."""
        return False

    def steps(self, max_tokens: int, stop: Sequence[str] = ()) -> Iterator[Step]:
        """Generate up to `max_tokens` tokens; see `Run.steps`."""
        ends, text = self._runner.ends, TextStream(self._runner.tokenizer, stop)
        limit = self._runner.limits.room_for(len(self._tokens), max_tokens)
        for count in range(1, limit + 1):
            value, drafted = self._next()
            step = self._step(value, value in ends, count == limit, text)
            yield replace(step, from_draft=drafted)
            if step.finish_reason:
                return

    def _next(self) -> tuple[int, bool]:
        """The next token, and whether the draft model proposed it."""
        if self._round is not None and self._round.logits is None:
            self._check(self._round)
        done = self._round
        if done is not None and len(self._tokens) < self._held:
            token = done.tokens[len(self._tokens) - done.start]
            self._tokens.append(token)
            return token, True
        self._close()
        return self._begin(), False

    def _begin(self) -> int:
        """Begin a round: draw its first token, which is known before anything is fed."""
        self._settle()
        if to_be_quantised(self._layers, self._runner.kv):
            self._quantise()
        token = self._following
        following, drawn = Draw(self.sampling, self._tokens)(self.key, self._logits)
        if token is None:
            token = int(drawn.item())  # type: ignore[arg-type]
        self._round = _Round(self._held, [token], [self.key, following])
        self._tokens.append(token)
        return token

    def _check(self, this: _Round) -> None:
        """Let the draft model propose, and the model check."""
        self._broken = True
        start, key = this.start, this.keys[1]
        room = self._runner.limits.room_for(start + 1, self._draft_tokens)
        fed = [mx.array(this.tokens)]
        draw = Draw(self.sampling, self._tokens[:start])
        for _ in range(room):
            logits = self._pair.propose(fed[-1][None], self._layers)
            key, token = draw(key, logits, fed[-1])
            this.keys.append(key)
            fed.append(token)
        this.logits, this.hidden = self._runner.check(mx.concatenate(fed)[None], self._layers)
        draw = Draw(self.sampling, self._tokens[:start])
        own = []
        for i, token in enumerate(fed):
            key, drawn = draw(this.keys[i + 1], this.logits[i], token)
            own.append(drawn)
        this.keys.append(key)
        mx.eval(own, fed, live_arrays(self._layers))
        proposed = [int(token.item()) for token in fed[1:]]  # type: ignore[arg-type]
        drawn_tokens = [int(token.item()) for token in own]  # type: ignore[arg-type]
        accepted = 0
        while accepted < room and proposed[accepted] == drawn_tokens[accepted]:
            accepted += 1
        if accepted == room:  # the draft model has not been fed its last proposal yet
            self._pair.propose(fed[-1][None], self._layers)
        self._pair.rewind(self._layers, room - accepted, max(0, room - accepted - 1))
        this.tokens += proposed[:accepted]
        this.following = drawn_tokens[accepted]
        self._take_note(this, room)

    def _take_note(self, this: _Round, room: int) -> None:
        self._held = this.start + len(this.tokens)
        this.lineage = speculated(self._lineage, this.start, this.start + 1 + room)
        self._passes.append(Pass(this.start, self._held, this.lineage))
        self._broken = False

    def _close(self) -> None:
        """End a round all of whose tokens have been yielded: the run stands at its end."""
        this, self._round = self._round, None
        if this is None or this.logits is None:
            return
        count = len(this.tokens)
        self._logits = this.logits[count - 1]
        self._embedding = None if this.hidden is None else this.hidden[count - 1]
        self.key = this.keys[count]
        self._lineage = extended(this.lineage, this.start, self._held)
        self._following = this.following

    # State

    def _take_down(self) -> State:
        this = self._round
        if this is not None and this.logits is None:
            self._check(this)
        if this is None or len(self._tokens) == self._held:
            self._close()
            return self._as_held()
        return self._inside(this)

    def _inside(self, this: _Round) -> State:
        """The state in the middle of a round."""
        assert this.logits is not None  # noqa: S101 - the round was checked
        count, n_past = len(self._tokens) - this.start, len(self._tokens)
        whole = self._as_held()
        contents = tuple(layer.cut(n_past) for layer in capture(self._layers, self._held))
        logits, key = this.logits[count - 1], this.keys[count]
        hidden = None if this.hidden is None else this.hidden[count - 1]
        mx.eval([a for a in (logits, hidden, key, this.keys[0]) if a is not None])
        first, second = (int(n) for n in this.keys[0].tolist())  # type: ignore[union-attr, arg-type]
        return replace(
            whole,
            contents=contents,
            logits=logits,
            embedding=hidden,
            rng=key,
            lineage=extended(this.lineage, this.start, n_past),
            speculation=Speculation(this.start, (first, second), self._draft_tokens, self._lineage),
        )

    def repeat(self, speculation: Speculation) -> bool:
        """Repeat the round in whose middle this run's state was taken; False if it comes out other
        than it did, as it may on another machine: then the layers are of no use any more.
        """
        start, said = speculation.start, self._tokens[speculation.start :]
        self._pair.rewind(self._layers, len(said), len(said))
        self._held, self._lineage = start, speculation.lineage
        self._passes = [p for p in self._passes if p.start < start]
        refs = tuple(ref for ref in self._trail.refs if ref.end <= start)
        self._trail = self._trail._replace(refs=refs)  # the rows after `start` are made again
        key = mx.array(speculation.key, mx.uint32)
        following, _ = mx.random.split(key)
        this = _Round(start, said[:1], [key, following])
        self._check(this)
        self._round = this
        return this.tokens[: len(said)] == said
