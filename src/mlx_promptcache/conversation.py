"""Conversation: questions and answers, kept after each, gone on from where they stopped.

A session is a name. It stands for the state at the end of the last exchange; that state's origin
has the messages, and the id of the state before the exchange. To take an exchange back is to let
the name stand for that one. Nothing is rewritten: an exchange adds blocks of its own tokens, a
snapshot at the end of the question and one at the end of the answer.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_promptcache.errors import (
    CacheLocked,
    CacheMiss,
    DamagedFile,
    PromptError,
    RankError,
    StoreError,
)
from mlx_promptcache.names import check_name
from mlx_promptcache.prompt import Prompt, answered, continued, messages_of
from mlx_promptcache.sampling import Sampling
from mlx_promptcache.state import Origin

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mlx_promptcache.cache import PromptCache
    from mlx_promptcache.run import Progress, Run, Step
    from mlx_promptcache.runner import Runner
    from mlx_promptcache.state import State

    Messages = tuple[Any, ...]

log = logging.getLogger("mlx_promptcache")

SESSIONS = "chat."  # what the names of sessions begin with
USER, SYSTEM = "user", "system"
MOST_BRANCHES = 1000


@dataclass(frozen=True)
class Exchange:
    """What one answer said and took. `cached_tokens + prefilled_tokens == prompt_tokens`: tokens
    that were held already, and those that were fed. `bytes_written` are those of its files.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    prefilled_tokens: int
    generation_tokens: int
    prefill_seconds: float
    generation_seconds: float
    bytes_written: int

    @property
    def tokens_per_second(self) -> float:
        """How fast it was said, from the first token on."""
        seconds = self.generation_seconds
        return (self.generation_tokens - 1) / seconds if seconds else 0.0


def name_of(session: str) -> str:
    """The name that a session's state has in the store.

    Raises:
        StoreError: it cannot be one.
    """
    check_name(session)
    return check_name(SESSIONS + session)


class Conversation:
    """A chat with one model.

    With a `session` it is stored under that name after every exchange, and goes on from there if
    there is one. Without, its states are kept as those of any prompt. An exchange is `ask` (or
    `edit`, or `retry`), then the steps of `answer`, to their end or not, then `keep`. After `ask`
    the question is stored; until `keep` returns the answer is not.

    Raises:
        StoreError: the session cannot have this name, or the store is read-only.
        CacheMiss: the session is of another model or of other settings, or is damaged.
        PromptError: the model has no chat template, or it refuses a system prompt; or the session
            has another system prompt.
        UnsupportedLayer: there is a session, and states of this model cannot be kept.
        RankError: several processes run the model together.
    """

    def __init__(
        self, runner: Runner, session: str | None = None, *, system: str | None = None
    ) -> None:
        if runner.ranks is not None:
            raise RankError(
                "a conversation cannot take part in a distributed run: give its messages to "
                "generate"
            )
        self._runner = runner
        self._prompter = runner.prompter
        if not self._prompter.has_template:
            raise PromptError("this model has no chat template: use generate, or another model")
        self.session = session
        self.sampling = Sampling()
        self.exchanges: tuple[Exchange, ...] = ()
        """Those of this process."""
        self._origin = Origin(messages=() if system is None else (_message(SYSTEM, system),))
        self._key: mx.array | None = None
        self._run: Run | None = None
        self._stored: str | None = None  # the snapshot that the name stands for
        self._complete: str | None = None  # the snapshot at the end of the last whole exchange
        self._answer: _Answer | None = None
        self._bytes = 0
        if system is not None:
            self._prompter.whole(continued(self._origin, "a"))  # whether the template takes it
        if session is not None:
            self._open(name_of(session), system)

    # What there is

    @property
    def messages(self) -> Messages:
        """All messages so far; the last is a user's if it has no answer yet."""
        return self._origin.messages or ()

    @property
    def questions(self) -> list[str]:
        """What the user said, in order."""
        return [str(m.get("content")) for m in self.messages if m.get("role") == USER]

    @property
    def unanswered(self) -> bool:
        """Whether the last question has no answer."""
        return bool(self.messages) and self.messages[-1].get("role") == USER

    @property
    def n_past(self) -> int:
        """How many tokens are held."""
        return 0 if self._run is None else self._run.n_past

    @property
    def context_length(self) -> int | None:
        """How many tokens the model can hold at the most; None if that is not known."""
        return self._runner.limits.context_length

    def sample(self, sampling: Sampling) -> None:
        """Draw in this way from now on. A seed begins the draws anew; without one they go on."""
        self.sampling = replace(sampling, seed=None)
        if sampling.seed is not None:
            self._key = mx.random.key(sampling.seed)

    # An exchange

    def ask(self, text: str, *, progress: Progress | None = None) -> None:
        """Take a question, feed what is new of it, and store it. One that had no answer yet gives
        way to it.

        Raises:
            PromptError: it is empty, it does not fit the model's context any more, or the template
                refuses it; the conversation is as it was.
        """
        self.keep()
        before = self.messages[:-1] if self.unanswered else self.messages
        self._begin(_asked(before, text), progress)
        self._store(self._origin)

    def edit(self, text: str, *, progress: Progress | None = None) -> None:
        """Ask something else in the place of the last question. Raises as `ask`."""
        self.keep()
        before = self._before(1)
        complete = self._snapshot_of(before)
        self._begin(_asked(before, text), progress)
        self._complete = complete
        self._store(self._origin)

    def retry(self, *, progress: Progress | None = None) -> None:
        """Take the last question again; its draws are others than before. Until the new answer is
        kept, the old one stays stored.

        Raises:
            PromptError: there is no question.
        """
        self.keep()
        before, question = self._before(1), self.questions[-1]
        complete = self._snapshot_of(before)
        self._begin(_asked(before, question), progress)
        self._complete = complete

    def answer(self, max_tokens: int, stop: Sequence[str] = ()) -> Iterator[Step]:
        """Answer the last question. Whoever stops in the middle keeps what was said so far.

        Raises:
            PromptError: there is no question to be answered.
        """
        if self._run is None or not self.unanswered:
            raise PromptError("there is no question to be answered: ask one")
        self._answer = _Answer()
        for step in self._run.steps(max_tokens, stop):
            self._answer.add(step)
            yield step

    def keep(self) -> Exchange | None:
        """Store the answer so far as the answer, and return what it took; None if there is none."""
        run, said = self._run, self._answer
        self._answer = None
        if run is None or said is None or not said.tokens:
            return None
        self._store(answered(self._origin, run.text))
        self._complete = self._stored
        self._settle()
        exchange = Exchange(
            run.text, said.finish_reason, run.cached_tokens + run.prefilled_tokens,
            run.cached_tokens, run.prefilled_tokens, said.tokens, run.prefill_seconds,
            said.seconds, self._bytes,
        )  # fmt: skip
        self.exchanges += (exchange,)
        self._bytes = 0
        return exchange

    def _begin(self, origin: Origin, progress: Progress | None) -> None:
        prompt = self._prompter.whole(origin)
        self._check_room(len(prompt.tokens))
        run = self._started(prompt, progress)
        self._hold(run, origin)

    def _hold(self, run: Run, origin: Origin) -> None:
        """Go on with this run, from the key that the conversation has come to."""
        run.key = run.key if self._key is None else self._key
        self._run, self._origin, self._key = run, origin, run.key

    def _check_room(self, tokens: int) -> None:
        if not self._runner.limits.room_for(tokens, 1):
            raise PromptError(
                f"the conversation would have {tokens} tokens, and the model's context ends at "
                f"{self.context_length}: take exchanges back, or begin another conversation"
            )

    def _started(self, prompt: Prompt, progress: Progress | None) -> Run:
        """A run at the end of a prompt: this one gone on, or from what is stored."""
        held, self._run = self._run or self._runner.run_in_progress, None  # until it stands
        if held is None:
            return self._runner.start(prompt, sampling=self.sampling, progress=progress)
        return self._runner.go_on(held, prompt, sampling=self.sampling, progress=progress)

    def _settle(self) -> None:
        """Go to where the next question will begin, if the template renders the answer in another
        way than it was said, and layers cannot be cut back to where that begins.
        """
        run = self._run
        if run is None or not self._runner.opaque:
            return
        stable = self._prompter.beginning(self._origin)
        if run.begins(stable.tokens):
            return
        settled = replace(stable, origin=self._origin)
        self._hold(self._runner.start(settled, sampling=self.sampling), self._origin)
        self._store(self._origin)
        self._complete = self._stored

    # Back and aside

    def undo(self, count: int = 1) -> int:
        """Take the last exchanges back, and return how many. The state before them is taken up as
        it was, its key as well: the same question then gets the same answer.

        Raises:
            CacheLocked, StoreError: the session cannot be stored so; it is as it was.
        """
        self.keep()
        count = min(count, len(self.questions))
        if count <= 0:
            return 0
        before = self._before(count)
        complete = self._snapshot_of(before)
        if complete is not None:
            self._take_up(complete)
        elif before:
            self._compute(before)
        else:
            self._begin_again()
        return count

    def branch(self, session: str) -> None:
        """Go on in a new session, which begins with all that was said so far. The old one stays.

        Raises:
            StoreError: there is such a session, or it cannot have this name.
        """
        name = name_of(session)
        self._name(name)
        self.session = session

    def save(self, name: str) -> None:
        """Give the state a name of its own, for `generate --prompt-cache` and `load`.

        Raises:
            StoreError: the name is taken, or cannot be one.
        """
        self._name(name)

    def _name(self, name: str) -> None:
        self.keep()
        if self._stored is None:
            raise StoreError("nothing of this conversation is stored yet: ask something first")
        if self.session is None and self._run is not None:  # who stored it may have been another
            self._cache.save(name, replace(self._run.state(), origin=self._origin))
        else:
            self._cache.link(name, self._stored)

    def _before(self, count: int) -> Messages:
        """The messages before the last questions."""
        at = [i for i, m in enumerate(self.messages) if m.get("role") == USER]
        if not at:
            raise PromptError("nothing was asked yet")
        return self.messages[: at[-count]]

    def _snapshot_of(self, messages: Messages) -> str | None:
        """The snapshot of an earlier state of this conversation; None if it is not to be had."""
        at = self._complete
        while at is not None:
            try:
                origin = self._cache.origin(at)
            except CacheMiss:  # evicted
                return None
            if origin.messages == messages:
                return at
            at = origin.earlier
        return None

    def _take_up(self, snapshot: str) -> None:
        state, sampling = self._cache.load(snapshot), self.sampling
        if self.session is not None:
            self._cache.link(self._own_name(self._cache), snapshot, replace=True)
        self._complete = self._stored = snapshot
        self._go_on_from(state)
        self.sampling = sampling  # chosen for this talk, not for that exchange

    def _compute(self, messages: Messages) -> None:
        """An earlier state that is not stored any more."""
        origin = Origin(messages=messages)
        stable = replace(self._prompter.beginning(origin), origin=origin)
        self._hold(self._runner.start(stable, sampling=self.sampling), origin)
        self._complete = None
        self._store(origin)
        self._complete = self._stored

    def _begin_again(self) -> None:
        """Nothing is left: there is no state, and a session without one has no name."""
        if self.session is not None and self._stored is not None:
            name = name_of(self.session)
            if self._cache.snapshot(name) == self._stored:  # else it is somebody else's by now
                self._cache.clear((name,))
        self._origin = Origin(messages=())
        self._run = self._stored = self._complete = None

    # Storing

    @property
    def _cache(self) -> PromptCache:
        return self._runner.needed_cache

    def _open(self, name: str, system: str | None) -> None:
        """Take up a session, if there is one."""
        if self._cache.read_only:
            raise StoreError("this prompt cache is read-only: leave the session out")
        try:
            self._stored = self._cache.snapshot(name)
            if self._stored is None:
                return
            origin = self._cache.origin(name)
        except DamagedFile as exc:
            raise DamagedFile(_cannot(name, exc)) from exc
        except CacheMiss as exc:
            raise CacheMiss(_cannot(name, exc)) from exc
        said = messages_of(origin)
        if origin.earlier is None and origin.messages is None and not origin.template:
            raise CacheMiss(f"the state {name!r} is no conversation: choose another session")
        own = next((m.get("content") for m in said if m.get("role") == SYSTEM), None)
        if system is not None and own != system:
            raise PromptError(
                "this session has begun with another system prompt: choose another session, or "
                "leave the system prompt out"
            )
        self._origin = Origin(messages=tuple(said), earlier=origin.earlier)
        self._complete = origin.earlier if self.unanswered else self._stored
        try:
            self._go_on_from(self._cache.load(name))
        except CacheMiss as exc:
            log.warning("what is stored of the session is computed again: %s", exc)

    def _go_on_from(self, state: State) -> None:
        messages = tuple(messages_of(state.origin))
        self._origin = Origin(messages=messages, earlier=state.origin.earlier)
        self.sampling, self._key = state.sampling, state.rng
        self._run = self._runner.resume(replace(state, origin=self._origin))

    def _store(self, origin: Origin) -> None:
        """Store the run as the state of these messages. Failing is a notice: the talk goes on."""
        assert self._run is not None  # noqa: S101 - there is something to be stored
        self._origin = replace(origin, earlier=self._complete)
        state = replace(self._run.state(), origin=self._origin)
        self._key = state.rng
        cache = self._runner.cache
        if cache is None or (cache.read_only and self.session is None):
            return
        try:
            if self.session is None:
                saved = cache.keep(state)
            else:
                saved = cache.save(self._own_name(cache), state, replace=True)
        except (StoreError, CacheLocked) as exc:
            log.warning("this exchange is not stored: %s", exc)
            return
        self._stored = saved.snapshot
        self._bytes += saved.bytes_written
        self._run.stored(saved.refs)

    def _own_name(self, cache: PromptCache) -> str:
        """The session's name; another one if somebody else has gone on with it meanwhile."""
        assert self.session is not None  # noqa: S101 - the caller knows
        name = name_of(self.session)
        if cache.snapshot(name) in {None, self._stored}:
            return name
        for count in range(2, MOST_BRANCHES):
            session = f"{self.session}-{count}"
            if cache.snapshot(name_of(session)) is None:
                log.warning(
                    "somebody else has gone on with the session %s: this one goes on as %s",
                    self.session, session,
                )  # fmt: skip
                self.session = session
                return name_of(session)
        raise StoreError("there are too many sessions of this name: choose another")


class _Answer:
    """An answer that is being given."""

    def __init__(self) -> None:
        self.tokens = 0
        self.seconds = 0.0
        self.finish_reason = "interrupted"  # until a step says otherwise
        self._first: float | None = None

    def add(self, step: Step) -> None:
        now = time.perf_counter()
        self._first = now if self._first is None else self._first
        self.tokens += 1
        self.seconds = now - self._first
        self.finish_reason = step.finish_reason or self.finish_reason


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _asked(before: Messages, text: str) -> Origin:
    if not text.strip():
        raise PromptError("the question is empty: say something")
    return Origin(messages=(*before, _message(USER, text)))


def _cannot(name: str, exc: CacheMiss) -> str:
    why = exc.reason.rpartition("; save it again")[0] or exc.reason
    return f"{why}: choose another session, or clear it (mlx-promptcache clear {name!r})"
