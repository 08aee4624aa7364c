"""Requests to a fleet of machines, generated: what is asked, when, and what of it was asked before.

Sessions come as a Poisson process whose rate rises and falls in waves. A session is a chat that
grows turn by turn after one of some system prompts, a series of questions after one of some
few-shot prefixes, or one document that nobody else has. Which prefix it is follows Zipf's law.
The same seed gives the same requests.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import math
import random
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

HEADER = 0, 4  # what a chat template puts before every message: a few tokens, always the same
_SYSTEM, _SHOTS, _OWN = 1 << 40, 2 << 40, 3 << 40  # where the numbers of texts begin

Text = tuple[int, int]  # the number of a text and its tokens; texts of one number begin alike


class Request(NamedTuple):
    """A prompt, made of texts, that arrives at a machine or at any. `answer` is the text that will
    be generated; it is kept where a conversation will go on after it.
    """

    at: float
    session: int
    prompt: tuple[Text, ...]
    answer: Text
    keeps_answer: bool


@dataclass(frozen=True)
class Mix:
    """What is asked of a fleet. Lengths in tokens are medians of log-normal distributions, with the
    standard deviation of their logarithm; times are in seconds.
    """

    chats: float = 0.45  # of all sessions
    series: float = 0.08  # of all sessions; the rest are documents
    systems: int = 200  # system prompts that there are
    shots: int = 50  # few-shot prefixes that there are
    zipf: float = 1.0
    system: tuple[float, float] = (400, 0.8)
    prefix: tuple[float, float] = (1900, 0.4)
    message: tuple[float, float] = (80, 1.0)
    reply: tuple[float, float] = (150, 0.8)
    document: tuple[float, float] = (1500, 0.9)
    question: tuple[float, float] = (40, 0.5)
    label: int = 8  # tokens of an answer to a question
    turns: float = 3.0  # of a chat, on average
    questions: float = 6.0  # of a series, on average
    thinking: float = 120.0  # between two turns, on average
    pause: float = 5.0  # between two questions of a series, on average
    pace: float = 0.1  # for each token of a reply, before the next turn
    waves: int = 2  # in all that is generated
    height: float = 0.5  # of a wave, as a part of the mean rate
    longest: int = 16_000  # tokens of a text

    @property
    def requests_of_session(self) -> float:
        """How many there are on average."""
        rest = 1 - self.chats - self.series
        return self.chats * self.turns + self.series * self.questions + rest


def tokens_of(texts: tuple[Text, ...], seed: int) -> array[int]:
    """The tokens of texts, one after the other."""
    found = array("H")
    for number, count in texts:
        shared = number < _OWN
        found += _shared(number, count, seed) if shared else _drawn(number, count, seed)
    return found


def _drawn(number: int, count: int, seed: int) -> array[int]:
    return array("H", random.Random(number << 20 ^ seed).randbytes(2 * count))


_shared = functools.lru_cache(maxsize=4096)(_drawn)


def requests(mix: Mix, count: int, per_second: float, seed: int) -> list[Request]:
    """As many requests as are wanted, in the order of arrival, so many a second on average."""
    draw = random.Random(seed)
    writer = _Sessions(mix, draw)
    waiting: list[Request] = []
    done: list[Request] = []
    sessions = _arrivals(mix, count, per_second / mix.requests_of_session, draw)
    for number, began in enumerate(sessions):
        while waiting and waiting[0].at <= began:
            done.append(heapq.heappop(waiting))
        if len(done) >= count:
            break
        for request in writer.session(number, began):
            heapq.heappush(waiting, request)
    return done[:count]


def _arrivals(mix: Mix, count: int, rate: float, draw: random.Random) -> Iterator[float]:
    """When sessions begin: a Poisson process of the highest rate, thinned."""
    wave = count / mix.requests_of_session / rate / max(1, mix.waves)
    highest, at = rate * (1 + mix.height), 0.0
    while True:
        at += draw.expovariate(highest)
        now = 1 + mix.height * math.sin(2 * math.pi * at / wave)
        if draw.random() * (1 + mix.height) < now:
            yield at


class _Sessions:
    """Draws sessions."""

    def __init__(self, mix: Mix, draw: random.Random) -> None:
        self._mix, self._draw = mix, draw
        self._numbers = itertools.count(_OWN)
        self._systems = self._shelf(_SYSTEM, mix.systems, mix.system)
        self._shots = self._shelf(_SHOTS, mix.shots, mix.prefix)

    def _shelf(self, first: int, count: int, lengths: tuple[float, float]) -> list[Text]:
        return [(first + i, self._length(lengths)) for i in range(count)]

    def _length(self, lengths: tuple[float, float]) -> int:
        drawn = self._draw.lognormvariate(math.log(lengths[0]), lengths[1])
        return max(1, min(self._mix.longest, round(drawn)))

    def _own(self, lengths: tuple[float, float]) -> Text:
        """A text that nobody else has."""
        return next(self._numbers), self._length(lengths)

    def _taken(self, shelf: list[Text]) -> Text:
        return self._draw.choices(shelf, cum_weights=_zipf(len(shelf), self._mix.zipf))[0]

    def _times(self, mean: float) -> int:
        """How often, at least once: the geometric distribution."""
        times = 1
        while self._draw.random() > 1 / mean:
            times += 1
        return times

    def session(self, number: int, began: float) -> Iterator[Request]:
        """The requests of one session."""
        kind = self._draw.random()
        if kind < self._mix.chats:
            yield from self._chat(number, began)
        elif kind < self._mix.chats + self._mix.series:
            yield from self._series(number, began)
        else:
            own = self._own(self._mix.document)
            yield Request(began, number, (own,), self._own(self._mix.reply), keeps_answer=False)

    def _chat(self, number: int, at: float) -> Iterator[Request]:
        held: tuple[Text, ...] = (self._taken(self._systems),)
        for _ in range(self._times(self._mix.turns)):
            held += (HEADER, self._own(self._mix.message), HEADER)
            reply = self._own(self._mix.reply)
            yield Request(at, number, held, reply, keeps_answer=True)
            held += (reply,)
            at += reply[1] * self._mix.pace + self._draw.expovariate(1 / self._mix.thinking)

    def _series(self, number: int, at: float) -> Iterator[Request]:
        prefix = self._taken(self._shots)
        for _ in range(self._times(self._mix.questions)):
            prompt = (prefix, HEADER, self._own(self._mix.question), HEADER)
            answer = next(self._numbers), self._mix.label
            yield Request(at, number, prompt, answer, keeps_answer=False)
            at += self._draw.expovariate(1 / self._mix.pause)


@functools.cache
def _zipf(count: int, power: float) -> list[float]:
    """The sums of the weights of ranks."""
    return list(itertools.accumulate((i + 1) ** -power for i in range(count)))
