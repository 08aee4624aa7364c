"""Runner: what was computed once is gone on from, bit for bit, and nothing is computed twice."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_logits_processors

import architectures
import processes
import tiny
from families import CHATML
from mlx_promptcache import PromptCache, Runner, Sampling, State, container, headers, window_rows
from mlx_promptcache.errors import ModelError, PromptError, StoreError, UnsupportedLayer
from mlx_promptcache.fingerprint import KVSettings
from mlx_promptcache.layers import live_arrays, make_layers
from mlx_promptcache.store import SNAPSHOTS, Store
from mlx_promptcache.tree import CELL
from tiny import bits, digest, random_tokens

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mlx_promptcache.run import Run

GREEDY = Sampling(seed=1)
SAMPLED = Sampling(temp=1.0, top_p=0.9, repetition_penalty=1.1, seed=7)
TRANSFORMS: dict[str, dict[str, Any]] = {
    "logit_bias": {"logit_bias": {7: 5.0, 90: -3.0}},
    "repetition_penalty": {"repetition_penalty": 3.0, "repetition_context_size": 75},
    "presence_penalty": {"presence_penalty": 4.0, "presence_context_size": 75},
    "frequency_penalty": {"frequency_penalty": 4.0, "frequency_context_size": 75},
    "top_p": {"top_p": 0.5},
    "min_p": {"min_p": 0.3},
    "min_tokens_to_keep": {"min_p": 0.9, "min_tokens_to_keep": 9},
    "xtc": {"xtc_probability": 0.5, "xtc_threshold": 0.005, "xtc_special_tokens": [3]},
    "top_k": {"top_k": 9},
}
EVERYTHING: dict[str, Any] = {
    "logit_bias": {7: 3.0, 90: -3.0},
    "repetition_penalty": 1.2, "repetition_context_size": 3,
    "presence_penalty": 0.5, "presence_context_size": 90,
    "frequency_penalty": 0.5, "frequency_context_size": 10,
    "top_p": 0.95, "min_p": 0.02, "xtc_probability": 0.5, "xtc_threshold": 0.01, "top_k": 60,
}  # fmt: skip
KV8 = KVSettings(8, 32, 0)
KV4 = KVSettings(4, 32, 0)
KV8_LATER = KVSettings(8, 32, 75)  # in the middle of prompts, or of what is generated

every_kind = pytest.mark.parametrize("kind", tiny.KINDS)
main_kinds = pytest.mark.parametrize("kind", ["plain", "rotating", "recurrent", "hybrid"])
opaque_kinds = pytest.mark.parametrize("kind", ["recurrent", "hybrid", "nested", "chunked"])
ROWS_ARE_ALL = ("plain", "rotating")  # kinds that blocks alone are enough for


@functools.cache
def model_of(kind: str) -> Any:
    return getattr(tiny, kind)()


def runner_of(
    kind: str, directory: Path | None = None, kv: KVSettings | None = None, **more: Any
) -> Runner:
    """A runner of a tiny model; with a directory also a new look at the store there."""
    cache = None if directory is None else PromptCache(directory, kind, kv=kv)
    return Runner(model_of(kind), None, cache, kv=kv, **more)


def tokens_of(runner: Runner, prompt: Any, count: int, sampling: Sampling | None) -> list[int]:
    return [step.token for step in runner.generate(prompt, count, sampling)]


def keep(runner: Runner, prompt: Sequence[int], name: str | None = None, **more: Any) -> State:
    """Prefill a prompt and save its state."""
    assert runner.cache is not None
    state = runner.prefill(prompt, **more)
    if name is None:
        runner.cache.keep(state)
    else:
        runner.cache.save(name, state, sync=False)
    return state


def logprobs(state: State) -> mx.array:
    assert state.logits is not None
    logits = state.logits.astype(mx.float32)
    return logits - mx.logsumexp(logits)


def assert_close(state: State, cold: State) -> None:
    """The same distribution but for rounding: what the default promises."""
    assert state.tokens == cold.tokens
    difference: Any = mx.max(mx.abs(logprobs(state) - logprobs(cold))).item()
    assert difference < 1e-3


def same_logits(state: State, cold: State) -> bool:
    assert state.logits is not None
    assert cold.logits is not None
    return bits(state.logits) == bits(cold.logits)


@contextlib.contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """The widths of the forward calls of a model's class while this lasts."""
    widths: list[int] = []
    model_class = type(model)
    original = model_class.__call__

    def call(self: Any, inputs: mx.array, *args: Any, **kwargs: Any) -> Any:
        widths.append(inputs.shape[1])
        return original(self, inputs, *args, **kwargs)

    model_class.__call__ = call
    try:
        yield widths
    finally:
        model_class.__call__ = original


# A new process

PROMPT = 70  # more than the windows and the chunks hold
CASES: dict[str, tuple[str, KVSettings | None, Sampling, int]] = {
    f"{kind}, {name}, {before} before": (kind, None, sampling, before)
    for kind in tiny.KINDS
    for name, sampling in (("greedy", GREEDY), ("sampled", SAMPLED))
    for before in (0, 1, 9)
}
CASES |= {
    f"plain, {kv}, {before} before": ("plain", kv, SAMPLED, before)
    for kv in (KV8, KV4, KV8_LATER, KVSettings(4, 32, 70))
    for before in (0, 3, 9)
}
CASES |= {
    f"bare, {kv}, {before} before": ("bare", kv, SAMPLED, before)
    for kv in (KVSettings(max_size=24), KVSettings(max_size=75))
    for before in (0, 3, 9)
}
CASES |= {
    f"plain, {name}": ("plain", None, Sampling(temp=1.0, seed=5, **settings), 9)
    for name, settings in {"no transform": {}, **TRANSFORMS}.items()
}
CASES |= {
    f"{kind}, everything, {before} before": (
        kind, None, Sampling(temp=0.9, seed=5, **EVERYTHING), before,
    )
    for kind in ("plain", "hybrid")
    for before in (0, 1, 9)
}  # fmt: skip
CASES |= {f"hybrid, {kv}": ("hybrid", kv, SAMPLED, 9) for kv in (KV8, KV8_LATER)}
AFTER = 12

CHILD = """
import json, sys
sys.path.insert(0, sys.argv[1])
import test_runner
print(json.dumps(test_runner.resumed_in_this_process(sys.argv[2])))
"""


def went_on(runner: Runner, state: State) -> dict[str, Any]:
    tokens = tokens_of(runner, state, AFTER, None)
    return {"tokens": tokens, "state": digest(runner.state), "fed": runner.tokens_fed}


def resumed_in_this_process(directory: str) -> dict[str, Any]:
    """Go on from every saved state; run in a process that has computed nothing before."""
    answers = {}
    for number, (case, (kind, kv, _, _)) in enumerate(CASES.items()):
        runner = runner_of(kind, Path(directory), kv)
        assert runner.cache is not None
        state = runner.cache.load(f"case {number}")
        answers[case] = {"loaded": digest(state), **went_on(runner, state)}
    return answers


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """By case: what one run without a stop did, and what another process did after a stop."""
    directory = tmp_path_factory.mktemp("cases") / "store"
    straight = {}
    for number, (case, (kind, kv, sampling, before)) in enumerate(CASES.items()):
        prompt = random_tokens(PROMPT, seed=len(kind))
        runner = runner_of(kind, directory, kv)
        run = runner.start(prompt, reuse=False, sampling=sampling)
        if before:
            list(run.steps(before))
        state = runner.state
        assert runner.cache is not None
        runner.cache.save(f"case {number}", state, sync=False)
        whole = runner_of(kind, None, kv)
        tokens = tokens_of(whole, prompt, before + AFTER, sampling)
        straight[case] = {
            "loaded": digest(state),
            "tokens": tokens[before:],
            "state": digest(whole.state),
            "fed": AFTER,
        }
    tests = str(Path(__file__).parent)
    return straight, processes.python(CHILD, tests, directory)


@pytest.mark.parametrize("case", CASES)
def test_a_new_process_goes_on_bit_for_bit(
    resumed: tuple[dict[str, Any], dict[str, Any]], case: str
) -> None:
    straight, answers = resumed
    assert answers[case] == straight[case]


def test_the_sampled_cases_are_no_greedy_ones(
    resumed: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    straight, _ = resumed
    for kind in tiny.KINDS:
        greedy = straight[f"{kind}, greedy, 9 before"]["tokens"]
        sampled = straight[f"{kind}, sampled, 9 before"]["tokens"]
        assert greedy != sampled
        assert len(set(sampled)) > 3


@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_transform_changes_what_is_said(
    resumed: tuple[dict[str, Any], dict[str, Any]], name: str
) -> None:
    straight, _ = resumed
    assert straight[f"plain, {name}"]["tokens"] != straight["plain, no transform"]["tokens"]


# The state after every step


@every_kind
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_the_state_after_every_step_goes_on_as_the_run_did(kind: str, sampling: Sampling) -> None:
    prompt, count = random_tokens(40, seed=2), 7
    undisturbed = runner_of(kind)
    straight = tokens_of(undisturbed, prompt, count, sampling)
    end = digest(undisturbed.state)
    runner, states = runner_of(kind), []
    for i, step in enumerate(runner.generate(prompt, count, sampling)):
        assert step.token == straight[i]
        states.append(runner.state)
        assert states[-1].n_past == len(states[-1].tokens) == len(prompt) + i + 1
        assert states[-1].tokens == (*prompt, *straight[: i + 1])
    assert len(states) == count
    assert digest(runner.state) == digest(states[-1]) == end
    for i, state in enumerate(states):
        fresh = runner_of(kind)
        left = count - i - 1
        assert tokens_of(fresh, state, left, None) == straight[i + 1 :]
        assert fresh.tokens_fed <= left
        assert not left or digest(fresh.state) == end


@every_kind
def test_a_state_is_a_value_that_no_run_changes(kind: str) -> None:
    runner = runner_of(kind)
    state = runner.prefill(random_tokens(40, seed=2))
    before = digest(state)
    first = tokens_of(runner, state, 20, SAMPLED)
    assert digest(state) == before
    assert tokens_of(runner, state, 20, SAMPLED) == first


@every_kind
def test_a_state_can_be_copied_and_pickled(kind: str) -> None:
    state = runner_of(kind).prefill(random_tokens(40, seed=2))
    pickled: State = pickle.loads(pickle.dumps(state))
    for other in (copy.deepcopy(state), pickled):
        assert digest(other) == digest(state)


def test_a_run_that_was_broken_off_has_the_state_of_what_was_yielded() -> None:
    prompt = random_tokens(40, seed=2)
    straight = tokens_of(runner_of("plain"), prompt, 12, SAMPLED)
    for taken in (1, 2, 5):
        runner = runner_of("plain")
        steps = runner.generate(prompt, 12, SAMPLED)
        for _ in range(taken):
            next(steps)
        assert runner.state.tokens == (*prompt, *straight[:taken])
        rest = tokens_of(runner_of("plain"), runner.state, 12 - taken, None)
        assert rest == straight[taken:]


def test_generating_again_in_one_run_goes_on() -> None:
    prompt = random_tokens(40, seed=2)
    straight = tokens_of(runner_of("plain"), prompt, 12, SAMPLED)
    run = runner_of("plain").start(prompt, sampling=SAMPLED)
    parts = [[step.token for step in run.steps(count)] for count in (1, 1, 4, 6)]
    assert [token for part in parts for token in part] == straight
    assert run.state().tokens == (*prompt, *straight)


@every_kind
def test_the_prompt_has_its_state_also_after_tokens_were_generated(kind: str) -> None:
    prompt = random_tokens(40, seed=2)
    run = runner_of(kind).start(prompt, sampling=SAMPLED)
    at_once = digest(run.state())
    for count in (1, 9):
        run = runner_of(kind).start(prompt, sampling=SAMPLED)
        list(run.steps(count))
        assert digest(run.prompt_state()) == at_once


@pytest.mark.parametrize("kv", [KV8, KVSettings(8, 32, 43)], ids=str)
def test_the_prompt_has_its_state_also_after_its_rows_were_quantised(kv: KVSettings) -> None:
    prompt = random_tokens(40, seed=2)
    at_once = runner_of("plain", None, kv).start(prompt, sampling=SAMPLED).state()
    run = runner_of("plain", None, kv).start(prompt, sampling=SAMPLED)
    list(run.steps(9))
    assert digest(run.prompt_state()) == digest(at_once)


def test_the_prompt_of_an_exact_hit_has_the_key_of_its_own_seed(tmp_path: Path) -> None:
    prompt = random_tokens(40, seed=2)
    keep(runner_of("plain", tmp_path), prompt)
    cold = runner_of("plain").start(prompt, sampling=SAMPLED).state()
    for count in (0, 1, 4):
        run = runner_of("plain", tmp_path).start(prompt, sampling=SAMPLED)
        assert run.prefilled_tokens == 0
        list(run.steps(count))
        assert digest(run.prompt_state()) == digest(cold)


def test_a_resumed_state_has_no_prompt_but_itself() -> None:
    runner = runner_of("plain")
    state = runner.prefill(random_tokens(40, seed=2))
    run = runner.resume(state, SAMPLED)
    tokens = [step.token for step in run.steps(3)]
    assert run.state().tokens == (*state.tokens, *tokens)
    assert run.prompt_state().tokens == state.tokens


@every_kind
def test_the_logits_and_greedy_tokens_are_those_of_mlx_lm(kind: str) -> None:
    model, prompt = model_of(kind), random_tokens(90, seed=4)
    runner = runner_of(kind)
    state = runner.prefill(prompt)
    assert state.logits is not None
    expected = model(mx.array(prompt)[None], cache=make_layers(model, KVSettings()))[0, -1]
    assert mx.allclose(state.logits, expected, atol=1e-4)
    theirs = [token for token, _ in generate_step(mx.array(prompt), model, max_tokens=15)]
    assert tokens_of(runner, prompt, 15, GREEDY) == theirs


def test_the_embedding_is_the_hidden_state_that_the_head_makes_logits_of() -> None:
    runner = runner_of("plain")
    assert runner.embeds
    state = runner.prefill(random_tokens(20, seed=4))
    for _ in range(2):
        assert state.embedding is not None
        assert state.logits is not None
        assert mx.allclose(model_of("plain").lm_head(state.embedding), state.logits, atol=1e-5)
        list(runner.generate(state, 3, GREEDY))
        state = runner.state


# Exact hits


@every_kind
@pytest.mark.parametrize("max_tokens", [1, 2, 8])
def test_an_exact_hit_calls_no_model_before_the_first_token(
    kind: str, max_tokens: int, tmp_path: Path
) -> None:
    prompt = random_tokens(60, seed=3)
    keep(runner_of(kind, tmp_path), prompt)
    cold = tokens_of(runner_of(kind), prompt, max_tokens, SAMPLED)
    runner = runner_of(kind, tmp_path)
    with counted(runner.model) as widths:
        steps = runner.generate(prompt, max_tokens, SAMPLED)
        first = next(steps).token
        assert widths == []
        assert (runner.forward_passes, runner.tokens_fed) == (0, 0)
        assert [first, *(step.token for step in steps)] == cold
        fed = max(0, max_tokens - 2)  # not the first one yet, and not the last one
        assert len(widths) <= fed + 1
        state = runner.state
    assert state.tokens == (*prompt, *cold)
    assert widths == [1] * max_tokens
    assert (runner.forward_passes, runner.tokens_fed) == (max_tokens, max_tokens)


def planes_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of rows that are read from blocks from now on."""
    read: list[int] = []
    whole = container.read_planes

    def counting(*args: Any) -> None:
        read.append(len(args[-1]))
        whole(*args)

    monkeypatch.setattr(container, "read_planes", counting)
    return read


@pytest.mark.parametrize("more", [[], [1, 2]], ids=["the same prompt", "another question"])
def test_the_header_of_a_block_is_read_once(
    more: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = random_tokens(3 * CELL, seed=4)
    keep(runner_of("plain", tmp_path), prompt)
    runner, read, original = runner_of("plain", tmp_path), list[str](), headers.block_header

    def block_header(store: Store, stem: str) -> container.Header:
        read.append(stem)
        return original(store, stem)

    monkeypatch.setattr(headers, "block_header", block_header)
    assert runner.start([*prompt, *more]).cached_tokens == len(prompt)
    assert (len(read), len(set(read))) == (3, 3)


def test_the_first_token_of_an_exact_hit_does_not_wait_for_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = random_tokens(300, seed=4)
    cold = tokens_of(runner_of("plain"), prompt, 6, SAMPLED)
    keep(runner_of("plain", tmp_path), prompt)
    read = planes_read(monkeypatch)
    runner = runner_of("plain", tmp_path)
    run = runner.start(prompt, sampling=SAMPLED, later=True)
    steps = run.steps(6)
    said = [next(steps).token]
    assert (read, runner.forward_passes, run.cached_tokens) == ([], 0, 300)
    said += [step.token for step in steps]
    assert said == cold
    assert sum(read) > 0
    assert (run.cached_tokens, run.prefilled_tokens, runner.tokens_fed) == (300, 0, 5)
    again = runner_of("plain").start(prompt, sampling=SAMPLED)
    assert digest(run.prompt_state()) == digest(again.state())


@pytest.mark.parametrize("exact", [True, False])
def test_rows_that_are_damaged_after_all_are_computed_and_the_counts_say_so(
    exact: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = random_tokens(300, seed=4)
    cold_runner = runner_of("plain")
    cold = tokens_of(cold_runner, prompt, 6, SAMPLED)
    keep(runner_of("plain", tmp_path), prompt)
    blocks = sorted(tmp_path.glob("blocks/*/*.safetensors"), key=lambda path: path.stat().st_size)
    spoiled = bytearray(blocks[-1].read_bytes())
    spoiled[-1] ^= 1
    blocks[-1].chmod(0o600)
    blocks[-1].write_bytes(spoiled)
    runner = runner_of("plain", tmp_path)
    run = runner.start(prompt, exact=exact, sampling=SAMPLED, later=True)
    assert run.cached_tokens == 300
    assert [step.token for step in run.steps(6)] == cold
    assert run.cached_tokens == 0
    assert (run.prefilled_tokens, runner.tokens_fed) == (300, 305)
    assert run.match is not None
    assert run.match.position == 0
    assert "moved aside" in caplog.text
    assert runner.run_in_progress is run
    assert runner.cache is not None
    runner.cache.keep(run.prompt_state(), exact=exact)
    assert runner_of("plain", tmp_path).start(prompt, exact=exact).cached_tokens == 300
    assert digest(run.state()) == digest(cold_runner.state)


@opaque_kinds
def test_layers_that_rows_do_not_fill_are_read_before_the_first_token(
    kind: str, tmp_path: Path
) -> None:
    prompt = random_tokens(90, seed=4)
    keep(runner_of(kind, tmp_path), prompt)
    runner = runner_of(kind, tmp_path)
    run = runner.start(prompt, sampling=SAMPLED, later=True)
    cold = runner_of(kind)
    assert [step.token for step in run.steps(5)] == tokens_of(cold, prompt, 5, SAMPLED)
    assert run.cached_tokens == 90


@every_kind
def test_an_exact_hit_says_so(kind: str, tmp_path: Path) -> None:
    prompt = random_tokens(60, seed=3)
    keep(runner_of(kind, tmp_path), prompt, "mine")
    run = runner_of(kind, tmp_path).start(prompt)
    assert run.match is not None
    assert (run.match.position, run.match.exact, run.match.source) == (60, True, "mine")
    assert (run.cached_tokens, run.prefilled_tokens) == (60, 0)


def test_a_hit_draws_from_its_own_seed(tmp_path: Path) -> None:
    prompt = random_tokens(60, seed=3)
    runner = runner_of("plain", tmp_path)
    list(runner.generate(prompt, 5, Sampling(temp=1.0, seed=1)))
    assert runner.cache is not None
    run = runner.run_in_progress
    assert run is not None
    runner.cache.keep(run.prompt_state())
    said = []
    for seed in (1, 2, 3):
        sampling = Sampling(temp=1.0, seed=seed)
        warm = tokens_of(runner_of("plain", tmp_path), prompt, 10, sampling)
        assert warm == tokens_of(runner_of("plain"), prompt, 10, sampling)
        said.append(warm)
    assert said[0] != said[1] != said[2]
    unseeded = [
        tokens_of(runner_of("plain", tmp_path), prompt, 10, Sampling(temp=1.0)) for _ in range(2)
    ]
    assert unseeded[0] != unseeded[1]


def test_every_draw_has_a_key_of_its_own() -> None:
    flat = Sampling(temp=1e6, seed=1)  # the key alone decides
    tokens = tokens_of(runner_of("plain"), random_tokens(30, seed=3), 60, flat)
    assert len(set(tokens)) > 40


def test_a_state_goes_on_with_its_own_key_and_settings_unless_others_are_given() -> None:
    prompt = random_tokens(40, seed=2)
    straight = tokens_of(runner_of("plain"), prompt, 20, SAMPLED)
    runner = runner_of("plain")
    list(runner.generate(prompt, 10, SAMPLED))
    state = runner.state
    assert state.sampling == Sampling(temp=1.0, top_p=0.9, repetition_penalty=1.1)
    assert tokens_of(runner, state, 10, None) == straight[10:]
    unseeded = Sampling(temp=1.0, top_p=0.9, repetition_penalty=1.1)
    assert tokens_of(runner, state, 10, unseeded) == straight[10:]
    assert tokens_of(runner, state, 10, SAMPLED) != straight[10:]
    assert tokens_of(runner, state, 10, GREEDY) != straight[10:]


@pytest.mark.parametrize("penalty", ["repetition", "presence", "frequency"])
def test_penalties_remember_the_prompt_that_was_restored(penalty: str, tmp_path: Path) -> None:
    prompt = random_tokens(60, seed=3)
    settings: dict[str, Any] = {f"{penalty}_penalty": 50.0, f"{penalty}_context_size": 200}
    harsh = Sampling(**settings)
    cold = tokens_of(runner_of("plain"), prompt, 20, harsh)
    assert not set(cold) & set(prompt)
    assert len(set(cold)) == 20
    keep(runner_of("plain", tmp_path), prompt[:40])
    assert tokens_of(runner_of("plain", tmp_path), prompt, 20, harsh) == cold
    state = keep(runner_of("plain", tmp_path), prompt, "whole")
    for again in (state, runner_of("plain", tmp_path).cache.load("whole")):  # type: ignore[union-attr]
        assert tokens_of(runner_of("plain", tmp_path), again, 20, harsh) == cold


@pytest.mark.parametrize("name", [n for n in EVERYTHING if n.endswith(("_bias", "_penalty"))])
def test_greedy_tokens_are_those_of_mlx_lm_with_its_own_bias_and_penalties(name: str) -> None:
    settings = TRANSFORMS[name]
    prompt = random_tokens(90, seed=4)
    theirs = generate_step(
        mx.array(prompt), model_of("plain"), max_tokens=15,
        logits_processors=make_logits_processors(**settings),
    )  # fmt: skip
    expected = [token for token, _ in theirs]
    assert tokens_of(runner_of("plain"), prompt, 15, Sampling(**settings)) == expected
    assert tokens_of(runner_of("plain"), prompt, 15, GREEDY) != expected


def test_a_bias_for_a_token_that_the_model_does_not_have_is_refused() -> None:
    runner, prompt = runner_of("plain"), random_tokens(40, seed=2)
    beyond = Sampling(logit_bias={tiny.VOCAB: 1.0})
    with pytest.raises(PromptError, match="token 256, and this model has 256"):
        runner.start(prompt, sampling=beyond)
    assert runner.tokens_fed == 0
    state = runner.prefill(prompt)
    for given, sampling in ((state, beyond), (replace(state, sampling=beyond), None)):
        with pytest.raises(PromptError, match="token 256"):
            runner.resume(given, sampling)
    runner.start(prompt, sampling=Sampling(logit_bias={tiny.VOCAB - 1: 1.0}))


# Prefixes


@main_kinds
@pytest.mark.parametrize("length", [1, 2, 255, 256, 257, 511, 512, 513])
def test_prompts_of_every_length_are_stored_and_found(
    kind: str, length: int, tmp_path: Path
) -> None:
    prompt = random_tokens(length + 1, seed=length)
    cold = keep(runner_of(kind, tmp_path), prompt[:length])
    runner = runner_of(kind, tmp_path)
    again = runner.start(prompt[:length])
    assert (again.cached_tokens, again.prefilled_tokens) == (length, 0)
    assert same_logits(again.state(), cold)
    longer = runner.start(prompt)
    assert (longer.cached_tokens, longer.prefilled_tokens) == (length, 1)
    assert_close(longer.state(), runner_of(kind).prefill(prompt))


@main_kinds
@pytest.mark.parametrize("length", [1, 2, 100, 255, 256, 257, 299])
def test_of_a_longer_stored_prompt_nothing_stale_is_used(
    kind: str, length: int, tmp_path: Path
) -> None:
    stored = random_tokens(300, seed=8)
    keep(runner_of(kind, tmp_path), stored)
    for prompt in (stored[:length], [*stored[:length], (stored[length] + 1) % tiny.VOCAB]):
        run = runner_of(kind, tmp_path).start(prompt)
        if kind in ROWS_ARE_ALL:
            assert run.cached_tokens == min(length, len(prompt) - 1)
        else:
            assert run.cached_tokens == 0
        assert run.match is not None
        assert not run.match.exact
        assert_close(run.state(), runner_of(kind).prefill(prompt))
        assert tokens_of(runner_of(kind, tmp_path), prompt, 5, GREEDY) == tokens_of(
            runner_of(kind), prompt, 5, GREEDY
        )


@main_kinds
def test_tokens_fed_are_counted_and_with_those_cached_make_the_prompt(
    kind: str, tmp_path: Path
) -> None:
    whole = random_tokens(700, seed=9)
    for stop, boundaries in [(90, ()), (300, (200,)), (300, ()), (700, (256, 300)), (640, ())]:
        runner = runner_of(kind, tmp_path)
        with counted(runner.model) as widths:
            run = runner.start(whole[:stop], boundaries=boundaries)
        assert run.cached_tokens + run.prefilled_tokens == stop
        assert sum(widths) == run.prefilled_tokens == runner.tokens_fed
        assert len(widths) == runner.forward_passes
        assert runner.cache is not None
        runner.cache.keep(run.state())
    assert run.cached_tokens > 0


def test_passes_end_on_the_grid_and_at_boundaries_in_cold_and_warm_runs(tmp_path: Path) -> None:
    prompt = random_tokens(1200, seed=10)
    runner = runner_of("plain", tmp_path)
    with counted(runner.model) as widths:
        keep(runner, prompt[:1100], boundaries=(100, 600))
    assert widths == [100, 412, 88, 424, 76]
    with counted(runner.model) as widths:
        runner_of("plain", tmp_path, prefill_step=256).prefill(prompt)
    assert [w for w in widths if w != 2] == [100]  # but for the two tokens of the probes


@pytest.mark.parametrize("kind", ["recurrent", "hybrid", "nested"])
def test_the_layers_and_marks_of_a_run_hold_no_memory_but_their_own(kind: str) -> None:
    """A pass of 512 tokens goes through convolutions, which keep its last rows, and has 512 hidden
    states, of which a mark keeps the last one: those of one pass there may be, not of all three.
    """
    runner, prompt = Runner(tiny.KINDS[kind](), snapshot_every=512), random_tokens(1536, 1)
    runner.start(prompt[:2])
    gc.collect()
    before = mx.get_active_memory()
    run = runner.start(prompt)
    gc.collect()
    held = sum(array.nbytes for array in live_arrays(run._layers))
    state = run.state()
    held += sum(layer.nbytes for mark in state.marks for layer in mark.layers)
    assert state.logits is not None
    assert state.embedding is not None
    beside = 4 * state.logits.nbytes + 600 * state.embedding.nbytes
    assert len(state.marks) == 2
    assert held > 0
    assert mx.get_active_memory() - before <= held + beside


def test_no_pass_is_longer_than_the_grid() -> None:
    runner = runner_of("plain", None, prefill_step=256)
    with counted(runner.model) as widths:
        runner.prefill(random_tokens(600, seed=1))
    assert widths == [256, 256, 88]
    for step in (0, -256, 100, 300):
        with pytest.raises(ValueError, match="multiple of 256"):
            runner_of("plain", None, prefill_step=step)


@opaque_kinds
def test_layers_that_cannot_be_cut_are_reused_where_they_were_kept_and_nowhere_else(
    kind: str, tmp_path: Path
) -> None:
    stored = random_tokens(100, seed=11)
    other = random_tokens(40, seed=12)
    keep(runner_of(kind, tmp_path), stored, boundaries=(60,))
    for shared, cached in [(100, 100), (99, 60), (80, 60), (61, 60), (60, 60), (59, 0), (5, 0)]:
        prompt = stored[:shared] + [t for t in other if t != stored[min(shared, 99)]]
        run = runner_of(kind, tmp_path).start(prompt)
        assert run.cached_tokens == cached
        assert_close(run.state(), runner_of(kind).prefill(prompt))


@main_kinds
def test_a_warm_run_says_what_a_cold_one_says_but_for_rounding(kind: str, tmp_path: Path) -> None:
    base = random_tokens(600, seed=13)
    reused = 0
    for stop, turn in [(130, 0), (333, 0), (511, 1), (600, 0), (400, 2), (590, 1)]:
        prompt = [*base[:stop], *random_tokens(30, seed=100 + turn)]
        runner = runner_of(kind, tmp_path)
        run = runner.start(prompt, boundaries=(stop,))
        reused += run.cached_tokens
        assert_close(run.state(), runner_of(kind).prefill(prompt))
        assert runner.cache is not None
        runner.cache.keep(run.state())
    assert reused > 500


# --exact


def odd_store(kind: str, directory: Path, prompt: Sequence[int]) -> None:
    """Fill a store with rows of the prompt that were computed in all sorts of passes."""
    for stop, step in [(37, 512), (130, 512), (300, 256), (301, 512), (511, 768), (560, 512)]:
        keep(runner_of(kind, directory, prefill_step=step), prompt[:stop])
    keep(runner_of(kind, directory), [*prompt[:300], *random_tokens(50, seed=1)])


@main_kinds
@pytest.mark.parametrize("boundaries", [(), (200,), (37, 512, 640)], ids=str)
def test_an_exact_warm_run_has_the_bits_of_a_cold_one(
    kind: str, boundaries: tuple[int, ...], tmp_path: Path
) -> None:
    prompt = random_tokens(700, seed=14)
    odd_store(kind, tmp_path, prompt)
    cold = runner_of(kind).prefill(prompt, boundaries=boundaries)
    first = runner_of(kind, tmp_path).start(prompt, boundaries=boundaries, exact=True)
    assert same_logits(first.state(), cold)
    cache = PromptCache(tmp_path, kind)
    cache.keep(first.state(), exact=True)
    second = runner_of(kind, tmp_path).start(prompt, boundaries=boundaries, exact=True)
    assert (second.cached_tokens, second.prefilled_tokens) == (700, 0)
    assert same_logits(second.state(), cold)
    longer = [*prompt, *random_tokens(80, seed=15)]
    third = runner_of(kind, tmp_path).start(longer, boundaries=boundaries, exact=True)
    cut = 512 if kind in ROWS_ARE_ALL else 0  # the last end of a pass that a longer prompt has, too
    assert third.cached_tokens == max([cut, *boundaries])
    assert same_logits(third.state(), runner_of(kind).prefill(longer, boundaries=boundaries))
    assert digest(*third.state().contents[-1].rows.values()) == digest(
        *runner_of(kind).prefill(longer, boundaries=boundaries).contents[-1].rows.values()
    )


def test_a_default_run_over_odd_rows_has_other_bits_than_a_cold_one(tmp_path: Path) -> None:
    """If it had not, the tests of exactness above would show nothing."""
    prompt = random_tokens(700, seed=14)
    odd_store("plain", tmp_path, prompt)
    run = runner_of("plain", tmp_path).start(prompt)
    cold = runner_of("plain").prefill(prompt)
    assert run.cached_tokens == 560
    assert_close(run.state(), cold)
    assert not same_logits(run.state(), cold)


def test_exact_runs_that_build_on_each_other_stay_exact(tmp_path: Path) -> None:
    whole = random_tokens(1500, seed=16)
    cached = []
    for turn, stop in enumerate((90, 600, 601, 1100, 1024, 1500)):
        prompt = whole[:stop]
        keep(runner_of("plain", tmp_path), [*prompt[: stop - 5], turn])  # others, in between
        run = runner_of("plain", tmp_path).start(prompt, exact=True)
        cached.append(run.cached_tokens)
        assert same_logits(run.state(), runner_of("plain").prefill(prompt))
        PromptCache(tmp_path, "plain").keep(run.state(), exact=True)
    assert cached == [0, 0, 512, 512, 512, 1024]


def test_generated_rows_are_not_taken_for_those_of_a_prompt(tmp_path: Path) -> None:
    prompt = random_tokens(100, seed=17)
    runner = runner_of("plain", tmp_path)
    said = tokens_of(runner, prompt, 30, SAMPLED)
    assert runner.cache is not None
    runner.cache.keep(runner.state)
    whole = [*prompt, *said, 5, 6]
    cold = runner_of("plain").prefill(whole)
    assert runner_of("plain", tmp_path).start(whole).cached_tokens == 130
    run = runner_of("plain", tmp_path).start(whole, exact=True)
    assert run.cached_tokens == 0
    assert same_logits(run.state(), cold)


# Quantised K/V


@pytest.mark.parametrize("kv", [KV8, KV4, KV8_LATER], ids=str)
def test_quantised_prompts_are_found_again(kv: KVSettings, tmp_path: Path) -> None:
    prompt = random_tokens(120, seed=18)
    cold = keep(runner_of("plain", tmp_path, kv), prompt)
    run = runner_of("plain", tmp_path, kv).start(prompt)
    assert (run.cached_tokens, run.prefilled_tokens) == (120, 0)
    assert same_logits(run.state(), cold)
    longer = runner_of("plain", tmp_path, kv).start([*prompt, 1, 2])
    assert longer.cached_tokens == 120
    branch = runner_of("plain", tmp_path, kv).start([*prompt[:100], 1, 2])
    assert branch.cached_tokens == 100
    if kv is KV8_LATER:  # before that the rows are not quantised yet
        run = runner_of("plain", tmp_path, kv).start([*prompt[:60], 1, 2])
        assert same_logits(run.state(), runner_of("plain", None, kv).prefill([*prompt[:60], 1, 2]))


def test_rows_are_quantised_from_the_position_that_was_asked_for() -> None:
    plain = runner_of("plain").prefill(random_tokens(90, seed=18))
    row_bytes = plain.contents[0].nbytes // 90
    parts = {f"{name}.{i}" for name in ("keys", "values") for i in range(3)}
    for kv, ratio in ((KV8, 8 / 32), (KV4, 4 / 32)):
        state = runner_of("plain", None, kv).prefill(plain.tokens)
        assert set(state.contents[0].rows) == parts
        assert state.contents[0].nbytes == 90 * row_bytes * (ratio + 2 / 32)
    runner = runner_of("plain", None, KV8_LATER)
    run = runner.start(plain.tokens[:70])
    for _ in run.steps(9):
        names = set(run.state().contents[0].rows)
        assert (names == {"keys", "values"}) == (run.state().n_past < 75)


@pytest.mark.parametrize("kv", [KV8, KV8_LATER], ids=str)
def test_quantised_exact_runs_have_the_bits_of_cold_ones(kv: KVSettings, tmp_path: Path) -> None:
    prompt = random_tokens(700, seed=18)
    for stop in (50, 90, 300):
        keep(runner_of("plain", tmp_path, kv), prompt[:stop])
    cold = runner_of("plain", None, kv).prefill(prompt)
    for expected in (0, 700):
        run = runner_of("plain", tmp_path, kv).start(prompt, exact=True)
        assert run.cached_tokens == expected
        assert same_logits(run.state(), cold)
        PromptCache(tmp_path, "plain", kv=kv).keep(run.state(), exact=True)


@pytest.mark.parametrize("others", [None, KV4, KV8_LATER, KVSettings(None, max_size=32)], ids=str)
def test_rows_of_other_kv_settings_are_not_used_and_the_miss_says_why(
    others: KVSettings | None, tmp_path: Path
) -> None:
    prompt = random_tokens(120, seed=18)
    keep(runner_of("plain", tmp_path, KV8), prompt)
    run = runner_of("plain", tmp_path, others).start(prompt)
    assert run.cached_tokens == 0
    assert same_logits(run.state(), runner_of("plain", None, others).prefill(prompt))
    assert run.match is not None
    assert run.match.reason is not None
    assert "other KV cache settings" in run.match.reason


def test_a_model_that_cannot_read_quantised_rows_says_so_before_the_prompt() -> None:
    model = architectures.build("stablelm", wide=True)
    with pytest.raises(UnsupportedLayer, match="quantised layers"):
        Runner(model, kv=KVSettings(8, 32, 5000))
    assert Runner(model).prefill(random_tokens(5, seed=18)).n_past == 5


@pytest.mark.parametrize("kind", ["recurrent", "hybrid", "nested"])
@pytest.mark.parametrize("start", [0, 20])
def test_models_with_little_or_nothing_to_quantise_are_cached_as_well(
    kind: str, start: int, tmp_path: Path
) -> None:
    kv, prompt = KVSettings(8, 32, start), random_tokens(60, seed=19)
    keep(runner_of(kind, tmp_path, kv), prompt, boundaries=(10, 40))
    for rest, cached in [(prompt[50:], 60), ([*prompt[50:], 1], 60), ([1], 40)]:
        whole = [*prompt[:50], *rest]
        run = runner_of(kind, tmp_path, kv).start(whole)
        assert run.cached_tokens == cached
        assert_close(run.state(), runner_of(kind, None, kv).prefill(whole, boundaries=(40,)))


@pytest.mark.parametrize("kind", ["plain", "hybrid"])
@pytest.mark.parametrize("exact", [False, True])
def test_plain_rows_may_be_gone_on_from_until_they_are_quantised(
    kind: str, exact: bool, tmp_path: Path
) -> None:
    whole = random_tokens(160, seed=18)
    for stop in (30, 60, 100, 160):  # quantised at the end of the first pass beyond 75
        boundaries = [b for b in (30, 60, 100) if b < stop]
        runner = runner_of(kind, tmp_path, KV8_LATER)
        run = runner.start(whole[:stop], boundaries=boundaries, exact=exact)
        assert run.cached_tokens >= max([0, *(b for b in boundaries if b < 75 or not exact)])
        cold = runner_of(kind, None, KV8_LATER).prefill(whole[:stop], boundaries=boundaries)
        assert same_logits(run.state(), cold)
        assert runner.cache is not None
        runner.cache.save(str(stop), run.state(), exact=exact)
        again = PromptCache(tmp_path, kind, kv=KV8_LATER).load(str(stop))
        assert digest(again) == digest(run.state())


# Prompts


def test_a_runner_needs_neither_tokenizer_nor_cache() -> None:
    runner = Runner(model_of("plain"))
    steps = list(runner.generate([1, 2, 3], 4))
    assert [step.text for step in steps] == [""] * 4
    assert [step.finish_reason for step in steps] == [None, None, None, "length"]
    for prompt in ("text", [{"role": "user", "content": "text"}]):
        with pytest.raises(PromptError, match="no tokenizer"):
            runner.prefill(prompt)


def test_no_state_before_anything_was_run() -> None:
    with pytest.raises(PromptError, match="nothing has been run"):
        _ = runner_of("plain").state


@pytest.mark.parametrize("prompt", [[], (), ""])
def test_an_empty_prompt_is_refused(prompt: Any, tiny_model: Path) -> None:
    runner = Runner.load(str(tiny_model), use_cache=False)
    with pytest.raises(PromptError, match="empty"):
        runner.prefill(prompt)
    with pytest.raises(PromptError, match="empty"):
        runner.generate(prompt)
    if not isinstance(prompt, str):
        with pytest.raises(PromptError, match="empty"):
            runner_of("plain").prefill(prompt)


@pytest.mark.parametrize("token", [-1, tiny.VOCAB, 5000, 1 << 32, 1 << 70])
def test_what_cannot_be_a_token_is_refused(token: int, tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="token"):
        runner_of("plain", tmp_path).prefill([1, token, 2])


def test_a_prompt_longer_than_the_context_is_refused(tmp_path: Path) -> None:
    runner = runner_of("plain", tmp_path, context_length=50)
    with pytest.raises(PromptError, match="51 tokens, more than the 50"):
        runner.prefill(random_tokens(51, seed=1))
    assert runner.forward_passes == 0
    assert runner.prefill(random_tokens(50, seed=1)).n_past == 50


def test_generation_ends_where_the_context_does() -> None:
    prompt = random_tokens(45, seed=1)
    for max_tokens in (100, -1):
        steps = list(runner_of("plain", None, context_length=50).generate(prompt, max_tokens))
        assert len(steps) == 5
        assert steps[-1].finish_reason == "length"


def test_no_tokens_are_generated_where_none_are_wanted() -> None:
    runner = runner_of("plain")
    assert list(runner.generate([1, 2, 3], 0)) == []
    assert runner.state.tokens == (1, 2, 3)


def test_boundaries_outside_of_the_prompt_are_passed_over(tmp_path: Path) -> None:
    prompt = random_tokens(30, seed=1)
    state = keep(runner_of("hybrid", tmp_path), prompt, boundaries=(-4, 0, 10, 10, 30, 99))
    assert [mark.position for mark in state.marks] == [10]


def test_a_state_without_logits_cannot_be_gone_on_from(tmp_path: Path) -> None:
    runner = runner_of("plain", tmp_path)
    assert runner.cache is not None
    keep(runner, random_tokens(30, seed=1))
    state = runner.cache.resume(random_tokens(30, seed=1)[:20], runner.model).state
    assert state is not None
    assert state.logits is None
    with pytest.raises(UnsupportedLayer, match="no logits"):
        runner.generate(state)


def test_a_state_of_another_model_is_refused() -> None:
    state = runner_of("plain").prefill([1, 2, 3])
    for kind in ("rotating", "recurrent", "hybrid", "nested"):
        with pytest.raises(UnsupportedLayer):
            runner_of(kind).generate(state)


@every_kind
def test_a_store_that_claims_to_be_of_this_model_and_is_not_is_a_miss(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = random_tokens(60, seed=3)
    for other in tiny.KINDS:
        if other != kind:
            runner = Runner(model_of(other), None, PromptCache(tmp_path / other, "the same"))
            keep(runner, prompt, boundaries=(20,))
            mine = Runner(model_of(kind), None, PromptCache(tmp_path / other, "the same"))
            run = mine.start(prompt)
            assert run.cached_tokens == 0
            assert digest(run.state().contents[0].path, *_arrays(run)) == digest(
                "0" if kind != "nested" else "0.0", *_arrays(runner_of(kind).start(prompt))
            )
            assert "cannot be used" in caplog.text
            caplog.clear()


def _arrays(run: Run) -> list[mx.array]:
    return live_arrays(run.state().layers(model_of_run(run)))


def model_of_run(run: Run) -> Any:
    return run._runner.model


# From a directory


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.on_disk(tmp_path_factory.mktemp("models") / "tiny")


def test_a_model_is_loaded_with_its_store_beside_it(tiny_model: Path) -> None:
    runner = Runner.load(str(tiny_model))
    assert runner.cache is not None
    assert runner.cache.directory == tiny_model / "prompt_cache"
    assert runner.limits.context_length == 2048
    state = runner.prefill("The cat sat on the mat")
    runner.cache.save("cat", state)
    again = Runner.load(str(tiny_model))
    run = again.start("The cat sat on the mat")
    assert (run.prefilled_tokens, run.match and run.match.source) == (0, "cat")


def test_a_prompt_is_text_or_messages_or_their_tokens(tiny_model: Path) -> None:
    runner = Runner.load(str(tiny_model), use_cache=False)
    text = "Question: what is two plus two?"
    as_text = runner.prefill(text)
    assert as_text.tokens == tuple(runner.tokenizer.encode(text))
    assert digest(*as_text.contents[0].rows.values()) == digest(
        *runner.prefill(as_text.tokens).contents[0].rows.values()
    )
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    rendered = runner.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert runner.prefill(messages).tokens == tuple(rendered)


def test_the_texts_of_the_steps_are_the_text_of_the_tokens(tiny_model: Path) -> None:
    runner = Runner.load(str(tiny_model), use_cache=False)
    steps = list(runner.generate("The dog", 40, Sampling(temp=1.0, seed=3)))
    tokens = [step.token for step in steps]
    assert "".join(step.text for step in steps) == runner.tokenizer.decode(tokens)
    assert len(tokens) == 40


def test_generation_stops_at_an_end_token_and_does_not_show_it(tiny_model: Path) -> None:
    runner = Runner.load(str(tiny_model), use_cache=False)
    for seed in range(100):
        steps = list(runner.generate("The dog", 60, Sampling(temp=1.5, seed=seed)))
        if steps[-1].finish_reason == "stop":
            break
    assert steps[-1].token == 1
    assert CHATML.end not in "".join(step.text for step in steps)
    assert runner.state.tokens[-1] == 1


def test_generation_stops_at_a_text_and_does_not_show_it(tiny_model: Path) -> None:
    runner = Runner.load(str(tiny_model), use_cache=False)
    sampling = Sampling(temp=1.0, seed=3)
    whole = "".join(step.text for step in runner.generate("The dog", 40, sampling))
    stop = next(whole[i : i + 3] for i in range(10, 40) if whole.find(whole[i : i + 3]) == i)
    steps = list(runner.generate("The dog", 40, sampling, stop=[stop, "never said"]))
    assert "".join(step.text for step in steps) == whole[: whole.index(stop)]
    assert steps[-1].finish_reason == "stop"


def test_a_read_only_runner_writes_nothing(tiny_model: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    runner = Runner.load(str(tiny_model), cache_dir=str(store), read_only=True)
    runner.prefill("Hello")
    assert not store.exists()
    writer = Runner.load(str(tiny_model), cache_dir=str(store))
    assert writer.cache is not None
    writer.cache.save("hello", writer.prefill("Hello"))
    (store / "weights.json").unlink(missing_ok=True)
    before = sorted(path.name for path in store.iterdir())
    reader = Runner.load(str(tiny_model), cache_dir=str(store), read_only=True)
    assert reader.start("Hello").prefilled_tokens == 0
    assert sorted(path.name for path in store.iterdir()) == before


def test_there_must_be_a_model_where_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name in ("empty", "file", "nothing"):
        with pytest.raises(ModelError):
            Runner.load(str(tmp_path / name))


def test_mlx_lm_goes_on_from_the_layers_of_a_state(tiny_model: Path) -> None:
    model, tokenizer, *_ = mlx_lm.load(str(tiny_model))
    runner = Runner(model, tokenizer)
    state = runner.prefill("The cat sat")
    straight = [step.token for step in runner.generate("The cat sat", 10)]
    for _ in range(2):
        layers = state.layers(model)
        first = mx.array(straight[:1])
        theirs = [t for t, _ in generate_step(first, model, max_tokens=9, prompt_cache=layers)]
        assert theirs == straight[1:]


if __name__ == "__main__":
    import sys

    print(json.dumps(resumed_in_this_process(sys.argv[1])))


# Windows as rows


def test_windows_resume_at_any_position_and_their_snapshots_hold_no_rows(tmp_path: Path) -> None:
    stored = random_tokens(1000, seed=31)
    keep(runner_of("rotating", tmp_path), stored, "whole")
    for shared in (20, 100, 255, 256, 300, 511, 700, 999):
        prompt = [*stored[:shared], (stored[shared] + 1) % tiny.VOCAB, 5, 6]
        run = runner_of("rotating", tmp_path).start(prompt)
        assert run.cached_tokens == shared
        assert_close(run.state(), runner_of("rotating").prefill(prompt))
    arrays = [
        name
        for stem in Store(tmp_path).stems(SNAPSHOTS)
        for name in headers.snapshot_header(Store(tmp_path), stem).entries
    ]
    assert sorted(arrays) == ["embedding", "logits", "rng"]


def test_windows_resume_inside_what_was_generated_too(tmp_path: Path) -> None:
    runner = runner_of("rotating", tmp_path)
    prompt = random_tokens(200, seed=32)
    said = tokens_of(runner, prompt, 400, GREEDY)
    assert runner.cache is not None
    runner.cache.keep(runner.state)
    whole = [*prompt, *said]
    for shared in (150, 256, 400, 512, 590):
        run = runner_of("rotating", tmp_path).start([*whole[:shared], 3, 3, 3])
        assert run.cached_tokens == shared
        assert_close(run.state(), runner_of("rotating").prefill([*whole[:shared], 3, 3, 3]))


def test_where_blocks_lack_rows_of_windows_the_snapshot_holds_them(tmp_path: Path) -> None:
    """A program with a loop of its own stores layers whose earlier rows are gone."""
    model, kv = model_of("bare"), KVSettings(max_size=40)  # the first four rows are kept
    cache = PromptCache(tmp_path, "bare", kv=kv)
    tokens = random_tokens(300, seed=33)
    layers = make_layers(model, kv)
    for held, own in [(30, False), (300, True)]:
        fed = layers[0].offset
        model(mx.array([tokens[fed:held]]), cache=layers)
        cache.store(model, tokens[:held], layers)
        cell = held - held % 256
        (stem,) = [x for x in Store(tmp_path).stems(SNAPSHOTS) if f"-{held - cell}-" in x]
        assert headers.has_window_rows(headers.snapshot_header(Store(tmp_path), stem)) == own
        more = mx.array([random_tokens(5, seed=34)])
        state = PromptCache(tmp_path, "bare", kv=kv).load(stem.rpartition("-")[2])
        fetched = state.layers(model)
        straight = make_layers(model, kv)
        for begin, end in [(0, 30), (30, held)] if held > 30 else [(0, 30)]:
            model(mx.array([tokens[begin:end]]), cache=straight)
        assert mx.array_equal(model(more, cache=fetched), model(more, cache=straight))


@pytest.mark.parametrize("size", [40, 300])
def test_a_window_that_keeps_its_first_rows_is_reused_where_cold_runs_cut(
    size: int, tmp_path: Path
) -> None:
    """What mlx-lm computes with such windows depends on the cuts, by far more than rounding."""
    kv = KVSettings(max_size=size)
    stored = random_tokens(1300, seed=35)
    keep(runner_of("bare", tmp_path, kv), stored, boundaries=(600,))
    for shared, boundaries, cached in [
        (30, (), 0),
        (600, (), 512),
        (1100, (), 512),
        (1100, (600,), 1024),
        (700, (600,), 600),
    ]:
        prompt = [*stored[:shared], (stored[shared] + 1) % tiny.VOCAB, 5]
        run = runner_of("bare", tmp_path, kv).start(prompt, boundaries=boundaries)
        assert run.cached_tokens == cached
        cold = runner_of("bare", None, kv).prefill(prompt, boundaries=boundaries)
        assert same_logits(run.state(), cold)


def test_an_exact_run_goes_on_from_rows_of_windows_at_an_end_of_its_own_passes(
    tmp_path: Path,
) -> None:
    stored = random_tokens(1300, seed=36)
    keep(runner_of("rotating", tmp_path), stored)
    prompt = [*stored[:1200], *random_tokens(50, seed=37)]
    warm = runner_of("rotating", tmp_path).start(prompt, exact=True)
    assert warm.cached_tokens == 1024
    assert same_logits(warm.state(), runner_of("rotating").prefill(prompt))


def test_only_as_many_rows_as_there_is_memory_for_wait_to_be_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_promptcache.window_rows.MOST_PASSED_BYTES", 600 * 2 * 2 * 2 * 32 * 4)
    stored = random_tokens(1500, seed=38)
    keep(runner_of("rotating", tmp_path), stored, boundaries=(400,))
    for shared, cached in [(300, 0), (400, 400), (1400, 1400)]:
        run = runner_of("rotating", tmp_path).start([*stored[:shared], 3, 3, 3])
        assert run.cached_tokens == cached
        assert_close(run.state(), runner_of("rotating").prefill([*stored[:shared], 3, 3, 3]))


# Snapshots on the way


@opaque_kinds
def test_the_third_prompt_hits_where_the_second_one_left_the_first(
    kind: str, tmp_path: Path
) -> None:
    first = random_tokens(400, seed=41)
    keep(runner_of(kind, tmp_path), first)
    for turn, cached in enumerate((0, 300, 300)):
        prompt = [*first[:300], turn + 1 if first[300] > 9 else turn + 20, *first[:20]]
        runner = runner_of(kind, tmp_path)
        run = runner.start(prompt)
        assert run.cached_tokens == cached
        assert run.match is not None
        assert run.match.stored == 300
        assert ("none stands there" in str(run.match.reason)) == (cached == 0)
        assert_close(run.state(), runner_of(kind).prefill(prompt))
        assert runner.cache is not None
        runner.cache.keep(run.state())


@opaque_kinds
def test_a_branch_is_kept_between_snapshots_too(kind: str, tmp_path: Path) -> None:
    first = random_tokens(600, seed=42)
    keep(runner_of(kind, tmp_path), first, boundaries=(200,))
    other = [*first[:450], (first[450] + 1) % tiny.VOCAB]
    assert keep(runner_of(kind, tmp_path), other).marks[-1].position == 450
    third = [*first[:450], (first[450] + 2) % tiny.VOCAB]
    assert runner_of(kind, tmp_path).start(third).cached_tokens == 450


@opaque_kinds
def test_an_exact_run_keeps_a_branch_without_a_cut_of_its_own(kind: str, tmp_path: Path) -> None:
    first = random_tokens(1300, seed=43)
    keep(runner_of(kind, tmp_path), first)
    prompts = [[*first[:1100], (first[1100] + turn) % tiny.VOCAB, 7] for turn in (1, 2)]
    for prompt, cached in zip(prompts, (0, 1024), strict=True):
        runner = runner_of(kind, tmp_path)
        run = runner.start(prompt, exact=True)
        assert run.cached_tokens == cached
        assert same_logits(run.state(), runner_of(kind).prefill(prompt))
        assert runner.cache is not None
        runner.cache.keep(run.state(), exact=True)


@opaque_kinds
def test_a_long_prompt_can_be_resumed_every_so_many_tokens(kind: str, tmp_path: Path) -> None:
    stored = random_tokens(1300, seed=44)
    state = keep(runner_of(kind, tmp_path, snapshot_every=500), stored)
    assert [mark.position for mark in state.marks] == [512, 1024]
    prompt = [*stored[:1200], (stored[1200] + 1) % tiny.VOCAB]
    assert runner_of(kind, tmp_path).start(prompt).cached_tokens == 1024


def test_where_any_position_can_be_resumed_no_snapshots_are_taken_on_the_way(
    tmp_path: Path,
) -> None:
    for kind in ROWS_ARE_ALL:
        runner = runner_of(kind, tmp_path / kind, snapshot_every=500)
        assert keep(runner, random_tokens(1300, seed=45)).marks == ()
        other = [*random_tokens(1300, seed=45)[:900], 1, 2]
        assert keep(runner, other).marks == ()
    with pytest.raises(ValueError, match="more than 0"):
        runner_of("plain", None, snapshot_every=0)


# What hostile eyes found


def test_what_goes_on_from_a_prompt_state_is_stored_with_rows_of_its_own(tmp_path: Path) -> None:
    """The rows that windows moved past in one continuation are none of another."""
    runner = runner_of("rotating", tmp_path)
    run = runner.start(random_tokens(300, seed=51), sampling=Sampling(temp=1, seed=1))
    list(run.steps(90))
    state = run.prompt_state()
    assert {rows.span.stop for rows in state.passed} == {300}
    said = tokens_of(runner, state, 90, Sampling(temp=1, seed=2))
    assert runner.cache is not None
    runner.cache.keep(runner.state)
    for shared in (340, 380):
        prompt = [*[*state.tokens, *said][:shared], 3, 4]
        warm = runner_of("rotating", tmp_path).start(prompt)
        assert warm.cached_tokens == shared
        assert_close(warm.state(), runner_of("rotating").prefill(prompt))


@main_kinds
def test_what_a_forward_call_left_when_it_was_broken_off_is_no_state(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = runner_of(kind, tmp_path)
    calls = 0
    forward = runner.forward

    def broken(inputs: mx.array, layers: list[Any]) -> Any:
        nonlocal calls
        calls += 1
        answer = forward(inputs, layers)
        if calls == 2:
            raise KeyboardInterrupt
        return answer

    monkeypatch.setattr(runner, "forward", broken)
    with pytest.raises(KeyboardInterrupt):
        runner.start(random_tokens(1300, seed=52))
    run = runner.run_in_progress
    assert run is not None
    with pytest.raises(PromptError, match="broken off"):
        run.state()
    with pytest.raises(PromptError, match="broken off"):
        run.prompt_state()


def test_marks_do_not_pile_up_where_states_are_resumed_again_and_again(tmp_path: Path) -> None:
    for kind in ("rotating", "hybrid"):
        runner = runner_of(kind, tmp_path / kind)
        state = runner.prefill(random_tokens(60, seed=53), boundaries=(40,))
        for _ in range(5):
            tokens_of(runner, state, 1, GREEDY)
            state = runner.state
        assert [mark.position for mark in state.marks] == [40]


def test_later_writers_who_know_more_rows_of_windows_are_found(tmp_path: Path) -> None:
    model, tokens = model_of("rotating"), random_tokens(700, seed=54)
    layers = make_layers(model, KVSettings())
    model(mx.array([tokens]), cache=layers)
    PromptCache(tmp_path, "rotating").store(model, tokens, layers)
    assert runner_of("rotating", tmp_path).start([*tokens[:300], 3, 4]).cached_tokens == 0
    runner = runner_of("rotating", tmp_path)
    assert runner.cache is not None
    runner.cache.keep(runner.start(tokens, reuse=False).state())
    for shared in (100, 300, 600):
        prompt = [*tokens[:shared], (tokens[shared] + 1) % tiny.VOCAB, 4]
        run = runner_of("rotating", tmp_path).start(prompt)
        assert run.cached_tokens == shared
        assert_close(run.state(), runner_of("rotating").prefill(prompt))


def test_a_state_whose_rows_are_in_layers_is_not_saved_empty(tmp_path: Path) -> None:
    for kind in ("plain", "hybrid"):
        cache = PromptCache(tmp_path / kind, kind)
        tokens = keep(runner_of(kind, tmp_path / kind), random_tokens(60, seed=55)).tokens
        resumed = cache.resume(tokens, model_of(kind))
        assert resumed.state is not None
        with pytest.raises(StoreError, match="from a run"):
            cache.save("empty", resumed.state)


def test_a_loop_of_its_own_is_given_no_window_that_keeps_its_first_rows(tmp_path: Path) -> None:
    """What is computed with these depends on the cuts, and those of the caller are not known."""
    model, kv, tokens = model_of("bare"), KVSettings(max_size=40), random_tokens(300, seed=56)
    layers = make_layers(model, kv)
    model(mx.array([tokens]), cache=layers)
    PromptCache(tmp_path, "bare", kv=kv).store(model, tokens, layers)
    _, rest = PromptCache(tmp_path, "bare", kv=kv).fetch(model, [*tokens, 1])
    assert len(rest) == 301


def test_rows_that_do_not_wait_are_not_copied_for_every_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = 0
    latest = window_rows.latest

    def counted_latest(*args: Any) -> Any:
        nonlocal copies
        copies += 1
        return latest(*args)

    monkeypatch.setattr("mlx_promptcache.run.latest", counted_latest)
    monkeypatch.setattr("mlx_promptcache.window_rows.MOST_PASSED_BYTES", 1000)
    tokens_of(runner_of("rotating", tmp_path), random_tokens(60, seed=57), 200, GREEDY)
    assert copies <= 1 + 200 // tiny.WINDOW
