"""Batch: many questions after one shared prefix, decoded together from one state.

The state of the prefix is restored or computed once. mlx-lm's batch generator takes its layers for
each question, copies them side by side, and feeds all questions in one forward call a token. Short
answers after a long prefix are decoded in waves. What neither can do is answered one after another,
from the same state.
"""

from __future__ import annotations

import itertools
import logging
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_promptcache import engine, exponentials
from mlx_promptcache.engine import cache as mlx_cache
from mlx_promptcache.layers import leaves, live_arrays, may_be_padded
from mlx_promptcache.limits import full
from mlx_promptcache.prompt import TextStream
from mlx_promptcache.sampling import Sampling
from mlx_promptcache.wave import MOST_TOKENS, Waves

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from mlx_promptcache.prompt import Prompt
    from mlx_promptcache.run import Progress, Run
    from mlx_promptcache.runner import Runner
    from mlx_promptcache.state import State

log = logging.getLogger("mlx_promptcache")

SIZE = 16
LONGER = 16  # times that a prefix is longer than answers for which waves are worth while
SORTED = 4  # waves among which questions are sorted by their length
SEEDS = 1 << 64  # what there are
MOST_PREFILLED_TOGETHER = 8  # as mlx-lm's batch generator
CANNOT = (ValueError, TypeError, AttributeError, RuntimeError, IndexError)  # what models raise


@dataclass(frozen=True)
class Question:
    """A prompt to be answered. Its draws begin at the batch's seed and its `index` together."""

    index: int
    prompt: Prompt
    max_tokens: int


@dataclass(frozen=True)
class Answer:
    """What was said. Of `prompt_tokens`, `cached_tokens` were held before it was its turn."""

    index: int
    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int


class Batch:
    """Answers questions `size` at a time.

    `prefix` is what they begin with, computed when this is made, or restored where it is stored; it
    may be None. A question that begins otherwise is answered, too, by itself. `sampling` is that of
    all; its seed, 0 if it is None, is that of the question with the index 0.

    Raises:
        PromptError: the prefix is longer than the model's context, or the sampling names a token
            that the model does not have.
    """

    def __init__(
        self,
        runner: Runner,
        prefix: Prompt | None = None,
        *,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        size: int = SIZE,
        progress: Progress | None = None,
    ) -> None:
        self._runner, self._stop, self._size = runner, tuple(stop), max(1, size)
        self._sampling = sampling or Sampling()
        self._seed = self._sampling.seed or 0
        self.shared: Run | None = None
        """The run at the end of the prefix, which nothing is fed to any more."""
        self._prefix: tuple[int, ...] = ()
        self._state: State | None = None
        self._layers: list[Any] | None = None
        if prefix is not None and prefix.tokens:
            run = runner.start(prefix, sampling=replace(self._sampling, seed=0), progress=progress)
            self.shared, self._prefix, self._state = run, tuple(prefix.tokens), run.state()
            self._layers = self._state.layers(runner.whole)
        self.together = self._size > 1 and self._can_be_batched()
        """Whether questions are decoded together."""

    def _can_be_batched(self) -> bool:
        """Whether mlx-lm can put these layers side by side, and would do all that a run does."""
        runner = self._runner
        if runner.speculative or runner.kv.bits is not None or not runner.capturable:
            return False
        if runner.ranks is not None:  # each would draw for itself
            return False
        layers = self._layers or runner.make_layers()
        every = [*layers, *(layer for _, layer in leaves(layers))]
        # It forgets that a window keeps its first rows.
        return all(hasattr(x, "merge") and not getattr(x, "keep", 0) for x in every)

    def answers(
        self, questions: Iterable[Question], *, each_step: Callable[[], None] = lambda: None
    ) -> Iterator[Answer]:
        """Answer them; yield each answer when it is there, in whatever order. `each_step` is called
        now and then, and may raise to end it all.
        """
        waiting = iter(questions)
        if self.together:
            alone: list[Question] = []
            short, waiting = self._short(waiting)
            left: list[Question] = []
            yield from self._in_waves(short, left, each_step)
            yield from self._together(itertools.chain(left, waiting), alone, each_step)
            waiting = itertools.chain(alone, waiting)
        for question in waiting:
            yield self._alone(question, each_step)

    def _short(self, waiting: Iterator[Question]) -> tuple[list[Question], Iterator[Question]]:
        """The questions to be decoded in waves, and the others."""
        if self._layers is None or any(type(x) is not mlx_cache.KVCache for x in self._layers):
            return [], waiting
        every = list(waiting)
        short = [question for question in every if self._is_short(question)]
        chosen = {question.index for question in short}
        return short, (question for question in every if question.index not in chosen)

    def _is_short(self, question: Question) -> bool:
        brief = question.max_tokens * LONGER <= len(self._prefix)
        return brief and self._fed(question) <= MOST_TOKENS and self._follows(question)

    def _in_waves(
        self, questions: list[Question], left: list[Question], each_step: Callable[[], None]
    ) -> Iterator[Answer]:
        """Answer these; put those into `left` that the model cannot answer so."""
        if not questions:
            return
        size = min(self._size, len(questions))
        room = max(map(self._fed, questions)) + max(q.max_tokens for q in questions)
        asked = {question.index: question for question in self._alike(questions, size)}
        try:
            layers, held = self._beginning(questions)
            waves = Waves(self._runner.model, layers, size=size, room=room)
            while asked:
                for answer in self._wave(waves, list(asked.values())[:size], held, each_step):
                    del asked[answer.index]
                    yield answer
        except CANNOT as exc:
            log.debug("this model takes no rows that several questions share: %s", exc)
            left += asked.values()

    def _beginning(self, questions: list[Question]) -> tuple[list[Any], int]:
        """Layers from which all these questions go on, and how many tokens these hold: the prefix,
        and what the questions have in common after it. For some questions it is not worth a pass.
        """
        assert self._state is not None  # noqa: S101 - `_short` has looked
        assert self._layers is not None  # noqa: S101 - they are the state's
        shared = len(self._prefix)
        asked = [question.prompt.tokens[shared:-1] for question in questions]
        both = zip(min(asked), max(asked), strict=False)  # what these two share all others do
        common = [one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], both)]
        if len(questions) <= self._size or not common:
            return self._layers, shared
        layers = self._state.layers(self._runner.whole)
        with exponentials.inferring():
            self._runner.model(mx.array([common]), cache=layers)
        mx.eval(live_arrays(layers))
        return layers, shared + len(common)

    def _alike(self, questions: list[Question], size: int) -> Iterator[Question]:
        """These questions in about their order, and those together that are about as long: what is
        shorter than the longest of a wave is padded.
        """
        for i in range(0, len(questions), SORTED * size):
            yield from sorted(questions[i : i + SORTED * size], key=self._fed)

    def _fed(self, question: Question) -> int:
        return len(question.prompt.tokens) - len(self._prefix)

    def _wave(
        self,
        waves: Waves,
        questions: list[Question],
        held: int,
        each_step: Callable[[], None],
    ) -> Iterator[Answer]:
        shared, ends = len(self._prefix), self._runner.ends
        told = [(q.prompt.tokens, q.prompt.tokens[held:], self._sampling_of(q)) for q in questions]
        going = dict(enumerate(map(self._going, questions)))
        for tokens in waves.decode(told):
            for row, one in list(going.items()):
                reason = self._took(one, tokens[row], tokens[row] in ends)
                if reason is not None:
                    del going[row]
                    yield self._answer(one, reason, shared)
            each_step()
            if not going:
                return

    def _took(self, one: _Going, token: int, ended: bool) -> str | None:
        """Add a token to an answer; return why it ends there, if it does."""
        one.tokens.append(token)
        one.said += "" if ended else one.text.add(token)
        if ended or one.text.stopped:
            return "stop"
        return "length" if len(one.tokens) >= one.question.max_tokens else None

    def _together(
        self, waiting: Iterator[Question], alone: list[Question], each_step: Callable[[], None]
    ) -> Iterator[Answer]:
        """Answer what begins with the prefix; put the others, and what is left where mlx-lm fails
        after all, into `alone`.
        """
        first = next(waiting, None)
        if first is None:
            return
        waiting = itertools.chain([first], waiting)
        decoder = _Decoder(self._runner, self._size)
        going: dict[int, _Going] = {}
        try:
            while True:
                for question in itertools.islice(waiting, 2 * self._size - len(going)):
                    if self._follows(question):
                        going[self._insert(decoder, question)] = self._going(question)
                    else:
                        alone.append(question)
                if not going:
                    return
                yield from self._step(decoder, going)
                each_step()
        except CANNOT as exc:
            log.warning("mlx-lm cannot decode these together: one after another, then (%s)", exc)
            alone += [one.question for one in going.values()]
        finally:
            decoder.close()

    def _follows(self, question: Question) -> bool:
        tokens, shared = question.prompt.tokens, len(self._prefix)
        return len(tokens) > shared and tuple(tokens[:shared]) == self._prefix

    def _going(self, question: Question) -> _Going:
        return _Going(question, TextStream(self._runner.tokenizer, self._stop), [])

    def _insert(self, decoder: _Decoder, question: Question) -> int:
        sampler = self._sampling_of(question).sampler()
        return decoder.insert(
            list(question.prompt.tokens[len(self._prefix) :]),
            self._layers,
            max_tokens=question.max_tokens,
            held=list(self._prefix) if sampler.processes else [],
            process=(lambda tokens, logits: sampler.processed(logits, tokens))
            if sampler.processes
            else None,
            draw=None if self._sampling.temp == 0 else _draws(sampler, self._key_of(question)),
        )

    def _step(self, decoder: _Decoder, going: dict[int, _Going]) -> Iterator[Answer]:
        for response in decoder.next():
            one = going.get(response.uid)
            if one is None:
                continue
            reason = self._took(one, response.token, response.finish_reason == "stop")
            if reason is None:
                continue
            if (
                response.finish_reason is None
            ):  # a text ended it, of which the decoder knows nothing
                decoder.remove(response.uid)
            del going[response.uid]
            yield self._answer(one, reason, len(self._prefix))

    def _alone(self, question: Question, each_step: Callable[[], None]) -> Answer:
        run = self._run_of(question)
        one = self._going(question)
        reason = "length"
        for step in run.steps(question.max_tokens, self._stop):
            one.tokens.append(step.token)
            one.said += step.text
            reason = step.finish_reason or reason
            each_step()
        one.finished = True
        return self._answer(one, reason, run.cached_tokens)

    def _run_of(self, question: Question) -> Run:
        sampling = self._sampling_of(question)
        if self._state is None or not self._follows(question):
            return self._runner.start(question.prompt, sampling=sampling)
        run = self._runner.resume(self._state, sampling)
        return self._runner.go_on(run, question.prompt, sampling=sampling)

    def _answer(self, one: _Going, reason: str, cached: int) -> Answer:
        if not one.finished:
            one.said += one.text.finish()
        prompt = len(one.question.prompt.tokens)
        return Answer(one.question.index, one.said, tuple(one.tokens), reason, prompt, cached)

    def _sampling_of(self, question: Question) -> Sampling:
        return replace(self._sampling, seed=self._seed_of(question))

    def _seed_of(self, question: Question) -> int:
        return (self._seed + question.index) % SEEDS

    def _key_of(self, question: Question) -> mx.array:
        return mx.random.key(self._seed_of(question))


@dataclass
class _Going:
    """A question that is being answered."""

    question: Question
    text: TextStream
    tokens: list[int]
    said: str = ""
    finished: bool = False


class _Decoder:
    """mlx-lm's batch generator, one question at a time in and one token of each at a time out."""

    def __init__(self, runner: Runner, size: int) -> None:
        layers = runner.make_layers()
        self._generator = engine.generate().BatchGenerator(
            runner.model,
            stop_tokens=[[token] for token in sorted(runner.ends)],
            completion_batch_size=size,
            prefill_batch_size=min(size, MOST_PREFILLED_TOGETHER) if may_be_padded(layers) else 1,
            prefill_step_size=runner.prefill_step,
        )

    def insert(
        self,
        tokens: list[int],
        layers: list[Any] | None,
        *,
        max_tokens: int,
        held: list[int],
        process: Callable[[mx.array, mx.array], mx.array] | None,
        draw: Callable[[mx.array], mx.array] | None,
    ) -> int:
        """Take a question that goes on after these layers, which stay as they are."""
        (uid,) = self._generator.insert(
            [tokens],
            [max_tokens],
            caches=None if layers is None else [layers],
            all_tokens=[held],
            samplers=[draw],
            logits_processors=[[process] if process else []],
        )
        return int(uid)

    def next(self) -> list[Any]:
        """The next token of each question that is being decoded."""
        return list(self._generator.next_generated())

    def remove(self, uid: int) -> None:
        """Decode no more of a question."""
        self._generator.remove([uid])

    def close(self) -> None:
        """Give back what it has set."""
        self._generator.close()


def _draws(sampler: Any, key: mx.array) -> Callable[[mx.array], mx.array]:
    """Draw token after token, with the keys that a run would split off."""
    keys = deque([key])

    def draw(logprobs: mx.array) -> mx.array:
        following, subkey = mx.random.split(keys.pop())
        keys.append(following)
        drawn: mx.array = sampler.drawn(logprobs, subkey)
        return drawn

    return draw


def question_of(runner: Runner, index: int, prompt: Prompt, max_tokens: int) -> Question:
    """A question that fits the model's context.

    Raises:
        PromptError: it does not.
    """
    room = runner.limits.room_for(len(prompt.tokens), max_tokens)
    if room <= 0:
        raise full(len(prompt.tokens), runner.limits.context_length)
    return Question(index, prompt, room)
