"""Speculative decoding: what is said is what plain decoding says, and any state of it goes on."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.generate import speculative_generate_step

import processes
import tiny
from mlx_promptcache import PromptCache, Runner, Sampling
from mlx_promptcache.errors import CacheMiss, ModelError, UnsupportedLayer
from mlx_promptcache.fingerprint import KVSettings
from tiny import digest, random_tokens

if TYPE_CHECKING:
    from pathlib import Path

    from mlx_promptcache.state import State

GREEDY = Sampling(seed=1)
SAMPLED = Sampling(temp=1.0, top_p=0.9, repetition_penalty=1.1, seed=7)
samplings = pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
# How much the draft model differs from the model: it agrees always, at times, hardly ever.
noises = pytest.mark.parametrize("noise", [0.0, 0.02, 1.0])
PROMPT = random_tokens(100, seed=1)


@functools.cache
def model() -> Any:
    return tiny.plain()


@functools.cache
def draft(noise: float) -> Any:
    """The model with noise in its weights."""
    other = tiny.plain()
    parameters: list[Any] = list(tree_flatten(other.parameters()))
    weights = [
        (name, array + noise * mx.random.normal(array.shape, key=mx.random.key(i)))
        for i, (name, array) in enumerate(parameters)
    ]
    other.update(tree_unflatten(weights))
    mx.eval(other.parameters())
    return other


def speculating(noise: float, directory: Path | None = None, count: int = 3, **more: Any) -> Runner:
    cache = None if directory is None else PromptCache(directory, "pair", kv=more.get("kv"))
    return Runner(model(), None, cache, draft_model=draft(noise), num_draft_tokens=count, **more)


def said(runner: Runner, start: list[int] | State, count: int, sampling: Any = None) -> list[int]:
    return [step.token for step in runner.generate(start, count, sampling)]


@noises
@samplings
def test_it_says_what_plain_decoding_says(noise: float, sampling: Sampling) -> None:
    plain = said(Runner(model()), PROMPT, 60, sampling)
    for count in (1, 3, 8):
        assert said(speculating(noise, count=count), PROMPT, 60, sampling) == plain


def test_a_draft_model_that_agrees_saves_passes_of_the_model() -> None:
    for noise, passes in [(0.0, range(15, 18)), (1.0, range(50, 62))]:
        runner = speculating(noise)
        steps = list(runner.generate(PROMPT, 60, GREEDY))
        assert runner.forward_passes in passes
        proposed = sum(step.from_draft for step in steps)
        rounds = len(steps) - proposed
        assert runner.forward_passes - 1 in {rounds, rounds - 1}  # the last may have been left out


def test_greedy_tokens_are_those_of_mlx_lm() -> None:
    generated = speculative_generate_step(
        mx.array(PROMPT), model(), draft(0.02), num_draft_tokens=3, max_tokens=50
    )
    assert [token for token, _, _ in generated] == said(speculating(0.02), PROMPT, 50, GREEDY)


@noises
@samplings
@pytest.mark.parametrize("cut", [1, 2, 3, 4, 5, 30])
def test_n_and_m_tokens_straight_are_n_save_load_m(
    noise: float, sampling: Sampling, cut: int, tmp_path: Path
) -> None:
    straight = speculating(noise)
    whole = said(straight, PROMPT, 50, sampling)
    first = speculating(noise, tmp_path)
    begin = said(first, PROMPT, cut, sampling)
    assert first.cache is not None
    first.cache.save("so far", first.state)
    second = speculating(noise, tmp_path)
    assert second.cache is not None
    loaded = second.cache.load("so far")
    assert digest(loaded) == digest(first.state)
    assert loaded.n_past == len(PROMPT) + cut
    assert begin + said(second, loaded, 50 - cut) == whole
    assert digest(second.state) == digest(straight.state)
    assert second.state.lineage == straight.state.lineage


def test_looking_at_the_state_after_every_token_changes_nothing() -> None:
    straight, looked_at = speculating(0.02), speculating(0.02)
    whole = said(straight, PROMPT, 30, SAMPLED)
    tokens = []
    for step in looked_at.generate(PROMPT, 30, SAMPLED):
        tokens.append(step.token)
        state = looked_at.state
        assert state.tokens == (*PROMPT, *tokens)
        assert {layer.rows["keys"].shape[2] for layer in state.contents} == {state.n_past}
    assert tokens == whole
    assert digest(looked_at.state) == digest(straight.state)


CHILD = """
import json, sys
sys.path[:0] = [{tests!r}]
import test_speculative as t
runner = t.speculating({noise}, __import__("pathlib").Path(sys.argv[1]))
state = runner.cache.load("so far")
print(json.dumps([t.said(runner, state, 30), t.digest(runner.state)]))
"""


def test_another_process_goes_on(tmp_path: Path) -> None:
    straight = speculating(0.02)
    whole = said(straight, PROMPT, 61, SAMPLED)
    first = speculating(0.02, tmp_path)
    begin = said(first, PROMPT, 31, SAMPLED)
    assert first.cache is not None
    first.cache.save("so far", first.state)
    tests = str(processes.__file__).rpartition("/")[0]
    rest, ended = processes.python(CHILD.format(tests=tests, noise=0.02), tmp_path)
    assert begin + rest == whole
    assert ended == digest(straight.state)


def test_a_round_that_comes_out_otherwise_is_not_repeated(tmp_path: Path) -> None:
    """As it may be on another machine: here the draft model is another one."""
    first = speculating(0.0, tmp_path)
    said(first, PROMPT, 3, GREEDY)  # the second and the third were proposed
    state = first.state
    assert state.speculation is not None
    other = speculating(1.0, tmp_path)
    assert said(other, state, 20) == said(Runner(model()), [*PROMPT, *state.tokens[100:]], 20)


def test_other_sampling_or_another_number_of_proposals_goes_on_too(tmp_path: Path) -> None:
    first = speculating(0.0, tmp_path)
    said(first, PROMPT, 3, GREEDY)
    plain = said(Runner(model()), PROMPT, 23, GREEDY)[3:]
    assert said(speculating(0.0, count=5), first.state, 20) == plain
    reseeded = said(speculating(0.0), first.state, 20, SAMPLED)
    assert reseeded == said(speculating(0.0), first.state, 20, SAMPLED)
    assert reseeded != plain


def test_prompts_are_reused_with_the_layers_of_both(tmp_path: Path) -> None:
    prompt = random_tokens(700, seed=2)
    first = speculating(0.02, tmp_path)
    assert first.cache is not None
    first.cache.keep(first.prefill(prompt[:600]))
    run = speculating(0.02, tmp_path).start(prompt)
    assert run.cached_tokens == 600
    steps = [step.token for step in run.steps(20)]
    assert steps == said(Runner(model()), prompt, 20, GREEDY)
    exact = speculating(0.02, tmp_path).start(prompt, exact=True)
    assert exact.cached_tokens == 512
    again = speculating(0.02, tmp_path).start(prompt[:600])
    assert (again.cached_tokens, again.prefilled_tokens) == (600, 0)


def test_an_exact_run_takes_no_rows_that_a_round_computed(tmp_path: Path) -> None:
    first = speculating(0.0, tmp_path)
    more = said(first, PROMPT, 40, GREEDY)
    assert first.cache is not None
    first.cache.keep(first.state)
    prompt = [*PROMPT, *more, 5]
    boundaries = (100, 104)  # where a round began, and where it would have ended
    warm = speculating(0.0, tmp_path).start(prompt, boundaries=boundaries, exact=True)
    assert warm.cached_tokens == 100
    cold = speculating(0.0).prefill(prompt, boundaries=boundaries)
    assert digest(warm.state().logits) == digest(cold.logits)


@pytest.mark.parametrize("start", [50, 120])
def test_quantised_layers_of_both_go_on(start: int, tmp_path: Path) -> None:
    kv = KVSettings(8, 32, start)  # in the prompt, or among what is generated
    straight = speculating(0.02, kv=kv)
    whole = said(straight, PROMPT, 60, SAMPLED)
    for cut in (19, 20, 21, 22, 23, 24, 40):
        first = speculating(0.02, tmp_path / str(cut), kv=kv)
        begin = said(first, PROMPT, cut, SAMPLED)
        assert first.cache is not None
        first.cache.save("so far", first.state)
        second = speculating(0.02, tmp_path / str(cut), kv=kv)
        assert second.cache is not None
        assert begin + said(second, second.cache.load("so far"), 60 - cut) == whole
        assert digest(second.state) == digest(straight.state)


def test_the_state_of_the_prompt_costs_no_round() -> None:
    runner = speculating(0.0)
    run = runner.start(PROMPT, sampling=GREEDY)
    assert [step.token for step in run.steps(1)]
    assert run.prompt_state().n_past == len(PROMPT)
    assert runner.forward_passes == 1
    assert run.state().n_past == len(PROMPT) + 1


def test_the_context_is_not_exceeded() -> None:
    runner = speculating(0.0, context_length=110)
    assert len(said(runner, PROMPT, 100, GREEDY)) == 10
    assert runner.state.n_past == 110


def test_layers_that_cannot_forget_and_other_vocabularies_are_refused() -> None:
    for kind in ("rotating", "recurrent"):
        other = tiny.KINDS[kind]()
        for pair in ((other, model()), (model(), other)):
            with pytest.raises(UnsupportedLayer, match="leave the draft model"):
                Runner(pair[0], draft_model=pair[1])
    with pytest.raises(ModelError, match="same vocabulary"):
        Runner(model(), draft_model=tiny.smallest())
    for count in (0, 1025):
        with pytest.raises(ValueError, match="between 1 and 1024"):
            speculating(0.0, count=count)


def test_by_the_command_line(tmp_path: Path) -> None:
    main, other = tiny.on_disk(tmp_path / "main"), tiny.on_disk(tmp_path / "draft")
    common = ("-m", main, "--json", "-p", "Hello, world!", "--temp", "0")
    plain = processes.run("generate", *common, "-n", "30").json
    pair = ("--draft-model", other, "--num-draft-tokens", "4")
    first = processes.run("generate", *common, *pair, "-n", "10", "--save-as", "ten").json
    assert first["hit"] == "none"
    assert "draft" in first["miss_reason"]
    assert first["tokens"] == plain["tokens"][:10]
    loaded = processes.run("load", "ten", "-m", main, *pair, "--json", "-n", "20").json
    assert first["tokens"] + loaded["tokens"] == plain["tokens"]
    assert processes.run("generate", *common, *pair, "-n", "1").json["hit"] == "exact"
    without = processes.run("load", "ten", "-m", main)
    assert without.code == 1
    assert "another draft model" in without.err
    listed = processes.run("list", "-m", main, *pair, "--json").json["entries"]
    assert {e["status"] for e in listed if e["name"] == "ten"} == {"ok"}
    no_such = processes.run("generate", *common, "--draft-model", tmp_path / "none")
    assert (no_such.code, no_such.err.count("\n")) == (1, 1)


def test_a_state_of_a_pair_is_none_of_the_model_alone(tmp_path: Path) -> None:
    runner = speculating(0.0, tmp_path)
    assert runner.cache is not None
    runner.cache.save("pair", runner.prefill(PROMPT))
    with pytest.raises(CacheMiss):
        PromptCache(tmp_path, "alone").load("pair")
    alone = Runner(model(), None, PromptCache(tmp_path, "pair"))
    assert alone.cache is not None
    with pytest.raises(CacheMiss):
        alone.cache.load("pair")
    assert alone.start(PROMPT).cached_tokens == 0
