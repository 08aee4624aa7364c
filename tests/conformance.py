"""The questions that every architecture is asked.

A question is a function of a name and of a directory for its store. It returns one of a few words,
which `matrix.py` explains; what must not be at all it says by raising `Wrong`, with a sentence. The
models are tiny, with random weights; prompts go past their windows and chunks.
"""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache, RotatingKVCache

import architectures
import plain
import tiny
from architectures import VOCAB, runnable
from mlx_promptcache import PromptCache, Runner, Sampling, files
from mlx_promptcache.blueprint import Blueprint
from mlx_promptcache.errors import PromptCacheError, UnsupportedLayer
from mlx_promptcache.fingerprint import KVSettings
from mlx_promptcache.layers import capture, fill, leaves, make_layers
from tiny import bits, digest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mlx_promptcache import State
    from mlx_promptcache.run import Run

    Question = Callable[[str, Path], str]

YES = "yes"
NO = "no"
AT_ONCE = "at once"
THIRD_TIME = "third time"
AS_MLX_LM = "as mlx-lm"
NOTHING_TO_DO = "-"

GREEDY = Sampling(seed=1)
SAMPLED = Sampling(temp=1.0, top_p=0.9, repetition_penalty=1.1, seed=7)
EARLY, SHARED, SHORT, LONG = 20, 40, 52, 252  # positions; windows are 16 and chunks 24
BEFORE, AFTER = 5, 5  # tokens generated before a stop and after it: past the cell that ends at 256
DECODED = 24
QUANTISED = KVSettings(8, 32, 30)  # in the middle of a prompt
ROTATING = KVSettings(max_size=24)
IMPLIED = {"offset"}  # attributes of sliceable layers that follow from how many tokens are held
ROUNDING = 1e-4
CLOSE = 1e-3


class Wrong(Exception):
    """What must not be, in a sentence."""


def require(condition: bool, sentence: str) -> None:
    """Raise unless it is so."""
    if not condition:
        raise Wrong(sentence)


# Models, runners, tokens


@functools.cache
def model_of(name: str) -> Any:
    return architectures.build(name)


@functools.cache
def uneven_of(name: str, copy: int = 0, *, wide: bool = False) -> Any:
    """A model whose rows depend on the width of their pass; another object for another `copy`.

    They do so by far more than by rounding: some architectures round what they compute themselves,
    and some forget soon.
    """
    return tiny.uneven(architectures.build(name, wide=wide), step=2.0**-10)


@functools.cache
def blueprint_of(name: str) -> Blueprint:
    return Blueprint.of(model_of(name), KVSettings())


def tokens(count: int, seed: int) -> list[int]:
    """Tokens below those that an architecture may take for special ones."""
    return tiny.random_tokens(count, seed, VOCAB - 16)


def branch(seed: int) -> list[int]:
    """A prompt whose first `SHARED` tokens are those of every branch, and no others."""
    return [*tokens(SHARED, 1), seed, *tokens(SHORT - SHARED - 1, seed)]


def stored(model: Any, name: str, directory: Path, kv: KVSettings | None = None) -> Runner:
    """A new runner with a new look at the store."""
    return Runner(model, None, PromptCache(directory, name, kv=kv), kv=kv)


def store_of(runner: Runner) -> PromptCache:
    require(runner.cache is not None, "its layers cannot be taken down, so nothing is kept")
    assert runner.cache is not None
    return runner.cache


def said(runner: Runner, prompt: Any, count: int, sampling: Sampling | None) -> list[int]:
    return [step.token for step in runner.generate(prompt, count, sampling)]


def reused(runner: Runner, run: Run, prompt: Sequence[int]) -> int:
    """How many tokens of a prompt were not fed to the model; it must be what the run says."""
    count = len(prompt) - runner.tokens_fed
    require(count == run.cached_tokens, f"it says {run.cached_tokens} were reused, not {count}")
    return count


# Comparisons


def logits_of(state: State) -> mx.array:
    assert state.logits is not None
    return state.logits


def logprobs(logits: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def require_close(state: State, cold: State) -> None:
    away = plain.apart([logprobs(logits_of(state))], [logprobs(logits_of(cold))])
    require(away < CLOSE, f"the log-probabilities are not those of a cold run: {away:.1g} away")


def cold_run(model: Any, name: str, prompt: Sequence[int], boundary: int) -> Run:
    """The prompt in one pass, if mlx-lm itself gives the same answer wherever passes end."""
    boundaries = [boundary] if name in architectures.DEPEND_ON_PASSES else []
    return Runner(model).start(prompt, boundaries=boundaries, sampling=GREEDY)


# What it is


def layers(name: str, _: Path) -> str:
    """Which cache objects it has, in their order."""
    counted = [(kind, len(list(group))) for kind, group in groupby(kinds_of(name))]
    return ", ".join(kind if count == 1 else f"{count} {kind}" for kind, count in counted)


def kinds_of(name: str) -> list[str]:
    return [type(x).__name__ for _, x in leaves(make_layers(model_of(name), KVSettings()))]


def holds_rows_only(name: str) -> bool:
    """Whether blocks have all that any cache object holds: a row for each token, or a window's."""
    live, prompt = make_layers(model_of(name), KVSettings()), tokens(EARLY, 2)
    model_of(name)(mx.array(prompt)[None], cache=live)
    kinds = {KVCache, RotatingKVCache}
    return all(type(x) in kinds and x.offset == len(prompt) for _, x in leaves(live))


def embedding(name: str, _: Path) -> str:
    """Whether states of it hold the final hidden state of their last token."""
    state = Runner(model_of(name)).prefill(tokens(EARLY, 2))
    return NO if state.embedding is None else YES


# Resuming


def resume(name: str, directory: Path) -> str:
    """Tokens with a stop between them, against the same in one run; greedy, then sampled."""
    model, fresh = uneven_of(name), uneven_of(name, 1)
    for length, sampling in ((SHORT, GREEDY), (LONG, SAMPLED)):
        stop_and_go_on(model, fresh, tokens(length, length), sampling, directory)
    return YES


def stop_and_go_on(
    model: Any,
    fresh: Any,
    prompt: Sequence[int],
    sampling: Sampling,
    directory: Path,
    kv: KVSettings | None = None,
) -> State:
    """Generate, save, load into another model object, generate; require one run's very bits.

    Return the state at the end.
    """
    straight = Runner(model, kv=kv)
    expected = [s.token for s in begun(straight, prompt, sampling).steps(BEFORE + AFTER)]
    first, label = stored(model, "it", directory, kv), f"{len(prompt)} tokens"
    before = [s.token for s in begun(first, prompt, sampling).steps(BEFORE)]
    store_of(first).save(label, first.state, sync=False)
    second = stored(fresh, "it", directory, kv)
    after = said(second, store_of(second).load(label), AFTER, None)
    require(before + after == expected, "other tokens after a stop than in one run")
    require(digest(second.state) == digest(straight.state), "another state at the end")
    require(second.tokens_fed == AFTER, f"{second.tokens_fed} tokens were fed after the stop")
    return second.state


def begun(runner: Runner, prompt: Sequence[int], sampling: Sampling) -> Run:
    return runner.start(prompt, boundaries=[EARLY], sampling=sampling, reuse=False)


# Reusing


def prefix(name: str, directory: Path) -> str:
    """A declared prefix and another tail, against a run without a cache."""
    writer = stored(model_of(name), name, directory)
    store_of(writer).keep(writer.prefill(branch(11), boundaries=[SHARED]))
    reader = stored(model_of(name), name, directory)
    run = reader.start(branch(12), sampling=GREEDY)
    count = reused(reader, run, branch(12))
    require(count == SHARED, f"{count} tokens of a prefix of {SHARED} were reused")
    cold = cold_run(model_of(name), name, branch(12), SHARED)
    require_close(run.state(), cold.state())
    same = [s.token for s in run.steps(AFTER)] == [s.token for s in cold.steps(AFTER)]
    require(same, "other greedy tokens than those of a cold run")
    return YES


@dataclass(frozen=True)
class Reused:
    """How many tokens of two more prompts were reused, of those that a first one has, too."""

    second: int
    third: int

    @property
    def answer(self) -> str:
        """When all of them were."""
        if self.second == SHARED:
            return AT_ONCE
        return THIRD_TIME if self.third == SHARED else NO


def divergence(name: str, directory: Path) -> str:
    """Three prompts that begin alike, and nobody said where they part."""
    counts = reused_after_divergence(name, directory)
    for count in (counts.second, counts.third):
        where = f"{count} of {SHARED} shared tokens were reused"
        require(count in {EARLY, SHARED}, f"{where}: no state was kept there")
    return counts.answer


def reused_after_divergence(name: str, directory: Path) -> Reused:
    """How much of the second and of the third prompt was reused; of the first, one early position
    was declared, so that something always is.
    """
    writer = stored(model_of(name), name, directory)
    store_of(writer).keep(writer.prefill(branch(21), boundaries=[EARLY]))
    counts = []
    for seed in (22, 23):
        runner = stored(model_of(name), name, directory)
        run = runner.start(branch(seed), sampling=GREEDY)
        counts.append(reused(runner, run, branch(seed)))
        if name not in architectures.DEPEND_ON_PASSES:
            require_close(run.state(), Runner(model_of(name)).prefill(branch(seed)))
        store_of(runner).keep(run.state())
    return Reused(*counts)


def exact(name: str, directory: Path) -> str:
    """`--exact` after other passes computed the same tokens, against a run without a cache."""
    model, prompt = uneven_of(name), branch(32)
    odd = stored(model, name, directory)
    store_of(odd).keep(odd.prefill(prompt[: SHARED - 3]))
    cold = Runner(model).start(prompt, boundaries=[SHARED], sampling=GREEDY).state()
    careless = stored(model, name, directory).prefill(prompt, boundaries=[SHARED])
    require(
        bits(logits_of(careless)) != bits(logits_of(cold)),
        "what other passes computed has the same bits: this shows nothing",
    )
    writer = stored(model, name, directory)
    store_of(writer).keep(writer.prefill(branch(31), [SHARED], exact=True), exact=True)
    reader = stored(model, name, directory)
    run = reader.start(prompt, boundaries=[SHARED], exact=True, sampling=GREEDY)
    count = reused(reader, run, prompt)
    require(count == SHARED, f"{count} tokens of an exact prefix of {SHARED} were reused")
    require(digest(run.state()) == digest(cold), "other bits than those of a cold run")
    return YES


# Refusing


def refusal(name: str, directory: Path) -> str:
    """Its files, read by other architectures: under another fingerprint, then under its own."""
    writer = stored(model_of(name), name, directory)
    store_of(writer).save("it", writer.prefill(branch(41), boundaries=[SHARED]), sync=False)
    for other in others(name):
        refuse(other, other, directory, {"made with another model"})
        refuse(other, name, directory, {"cannot be used", "does not fit"})
    return YES


def others(name: str) -> list[str]:
    """The next architecture whose layers look otherwise, and the next of as many layers."""
    names = [n for n in runnable() if architectures.is_known(n)]
    following = [*names[names.index(name) + 1 :], *names[: names.index(name)]]
    mine = blueprint_of(name)
    unlike = [n for n in following if not same_layers(blueprint_of(n), mine)]
    as_many = [n for n in unlike if paths(blueprint_of(n)) == paths(mine)]
    return list(dict.fromkeys([*unlike[:1], *as_many[:1]]))


def same_layers(a: Blueprint, b: Blueprint) -> bool:
    """Whether files cannot tell them apart, if their fingerprints are the same by mistake."""
    return (a.rows, a.opaque) == (b.rows, b.opaque)


def paths(blueprint: Blueprint) -> set[str]:
    return {*blueprint.rows, *blueprint.opaque}


def refuse(other: str, fingerprint: str, directory: Path, reasons: set[str]) -> None:
    """Read the store with another architecture, whose files these are not."""
    cache = PromptCache(directory, fingerprint, read_only=True)
    runner = Runner(model_of(other), None, cache)
    run = runner.start(branch(41), boundaries=[SHARED])
    count = reused(runner, run, branch(41))
    require(count == 0, f"{other} reused {count} of its tokens")
    why = str(run.match and run.match.reason)
    require(any(reason in why for reason in reasons), f"{other} was refused because of {why!r}")
    require(digest(logits_of(run.state())) == cold_digest(other), f"{other} has other logits now")
    try:
        runner.resume(cache.load("it"))
    except PromptCacheError:
        return
    raise Wrong(f"{other} loaded its state")


@functools.cache
def cold_digest(other: str) -> str:
    return digest(logits_of(Runner(model_of(other)).prefill(branch(41), boundaries=[SHARED])))


# Taking down


def attributes(name: str, _: Path) -> str:
    """All that its cache objects hold, taken down and put into fresh ones."""
    live, prompt = make_layers(model_of(name), KVSettings()), branch(51)
    ends = [EARLY, SHARED, *range(SHARED + 1, SHARED + AFTER)]  # two passes, then token by token
    for start, end in zip([0, *ends], ends, strict=False):
        mx.eval(model_of(name)(mx.array(prompt[start:end])[None], cache=live))
    contents = capture(live, ends[-1])
    filled = make_layers(model_of(name), KVSettings())
    fill(filled, contents, ends[-1], KVSettings())
    pairs = zip(leaves(live), leaves(filled), contents, strict=True)
    for (path, layer), (_path, copy), content in pairs:
        taken = {*content.rows, *(IMPLIED if content.sliceable else content.attributes or ())}
        missing = vars(layer).keys() ^ taken
        require(not missing, f"{sorted(missing)} of layer {path} is not accounted for")
        for attribute in vars(layer):
            same = held(layer, attribute) == held(copy, attribute)
            require(same, f"{attribute!r} of layer {path} is another in a layer filled with it")
    return YES


def held(layer: Any, attribute: str) -> Any:
    """The value of an attribute as something that can be compared; of rows, those that count."""
    written = getattr(layer, "keys", None) is not None
    if attribute in {"keys", "values"} and written:
        keys, values = layer.keys_and_values()
        return bits(keys if attribute == "keys" else values)
    return comparable(vars(layer)[attribute])


def comparable(value: Any) -> Any:
    if isinstance(value, mx.array):
        return bits(value)
    if isinstance(value, (list, tuple)):
        return type(value), [comparable(item) for item in value]
    return value


# mlx-lm


def recomputing(name: str, _: Path) -> str:
    """Greedy tokens and their logits, against computing everything again for each token."""
    model, prompt = model_of(name), tokens(SHARED, 61)
    run = Runner(model).start(prompt, boundaries=[EARLY], sampling=GREEDY)
    said_so = [logits_of(run.state())]
    taken = []
    for step in run.steps(DECODED):
        taken.append(step.token)
        said_so.append(logits_of(run.state()))
    ours = (taken, said_so[:-1])
    if agree(ours, plain.without_cache(model, prompt, DECODED)):
        return YES
    theirs = plain.with_cache(model, prompt, [EARLY, SHARED], DECODED)
    require(agree(ours, theirs), "neither what mlx-lm computes with its cache nor without one")
    return AS_MLX_LM


def agree(a: plain.Decoded, b: plain.Decoded) -> bool:
    return a[0] == b[0] and plain.apart(a[1], b[1]) < ROUNDING


def quantised(name: str, directory: Path) -> str:
    """Tokens with a stop between them, with K/V quantised in the middle of the prompt."""
    model, prompt = uneven_of(name, wide=True), tokens(SHORT, 71)
    theirs = quantised_by_mlx_lm(name)
    if isinstance(theirs, str):
        require(refuses_to_quantise(model), f"mlx-lm refuses ({theirs}), and here it goes on")
        return NO
    fresh = uneven_of(name, 1, wide=True)
    state = stop_and_go_on(model, fresh, prompt, SAMPLED, directory, QUANTISED)
    ours = state.phase == "quantised"
    require(ours == theirs, "mlx-lm quantises where we do not, or the other way round")
    return YES if ours else NOTHING_TO_DO


@functools.cache
def quantised_by_mlx_lm(name: str) -> bool | str:
    """Whether mlx-lm quantises anything of an architecture; what it says where it cannot."""
    model, kv = uneven_of(name, wide=True), QUANTISED
    settings = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": kv.quantized_start}
    return plain.answer(plain.quantises, model, tokens(SHORT, 71), **settings)


def refuses_to_quantise(model: Any) -> bool:
    """Whether a runner says before it runs that there is no way."""
    try:
        Runner(model, kv=QUANTISED)
    except UnsupportedLayer:
        return True
    return False


def rotating(name: str, directory: Path) -> str:
    """Tokens with a stop between them, with `max_size`, where mlx-lm heeds it."""
    if hasattr(model_of(name), "make_cache"):
        return NOTHING_TO_DO
    model, fresh = uneven_of(name), uneven_of(name, 1)
    stop_and_go_on(model, fresh, tokens(SHORT, 81), SAMPLED, directory, ROTATING)
    return YES


# Answers


@dataclass(frozen=True)
class Answers:
    """What one architecture answered."""

    name: str
    layers: str
    resume: str
    prefix: str
    divergence: str
    exact: str
    refusal: str
    attributes: str
    recomputing: str
    quantised: str
    rotating: str
    embedding: str


ALL: list[Question] = [
    layers, resume, prefix, divergence, exact, refusal, attributes, recomputing, quantised,
    rotating, embedding,
]  # fmt: skip
QUESTIONS = {question.__name__: question for question in ALL}


class Book:
    """The answers of one session: nothing is asked twice, by whichever process."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def answer(self, name: str, question: str) -> str:
        """One answer; `no`, and a sentence, where something is that must not be."""
        page = self._directory / f"{name}.{question}"
        if not page.is_file():
            files.write_once(page, [self._ask(name, question).encode()], sync=False)
        return page.read_text("utf-8")

    def _ask(self, name: str, question: str) -> str:
        with tempfile.TemporaryDirectory(dir=self._directory) as directory:
            try:
                return QUESTIONS[question](name, Path(directory))
            except (Wrong, PromptCacheError) as exc:
                return f"{NO}: {exc}"

    def answers(self, name: str) -> Answers:
        """All answers of one architecture."""
        return Answers(name, **{question: self.answer(name, question) for question in QUESTIONS})
