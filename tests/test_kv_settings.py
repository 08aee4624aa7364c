"""KV settings on the command line, each command in a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import processes
import tiny
from mlx_promptcache import KVSettings, PromptCache, Runner, Sampling
from mlx_promptcache.fingerprint import remembered

PREFIX = "The cat sat on the mat, and the dog sat on the cat. " * 3
QUESTION, OTHER = "Question: what is two plus two?", "Hello, world!"
SAMPLED = ("--temp", "1", "--top-p", "0.9", "--repetition-penalty", "1.1", "--seed", "3")

# Quantised: after the declared prefix and before the end of the prompt; in the process that goes
# on. A window: smaller than the prefix; filled in the process that goes on.
SETTINGS: dict[str, KVSettings] = {
    "inside the prompt": KVSettings(4, 32, 60),
    "while generating": KVSettings(8, 32, 85),
    "a window": KVSettings(max_size=24),
    "a wide window": KVSettings(max_size=85),
}
every_setting = pytest.mark.parametrize("kv", SETTINGS.values(), ids=SETTINGS)


def options_of(kv: KVSettings) -> tuple[str, ...]:
    if kv.max_size is not None:
        return ("--max-kv-size", str(kv.max_size))
    start = ("--quantized-kv-start", str(kv.quantized_start))
    return ("--kv-bits", str(kv.bits), "--kv-group-size", str(kv.group_size), *start)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A llama, and a qwen2, which has windows where a largest size is set."""
    directory = tmp_path_factory.mktemp("settings")
    return {kind: tiny.on_disk(directory / kind, kind) for kind in ("plain", "bare")}


def run(model: Path, store: Path, *arguments: str) -> processes.Ended:
    return processes.run(*arguments, "-m", model, "--cache-dir", store, "--json")


def here(model: Path, kv: KVSettings, store: Path | None = None) -> Runner:
    loaded = Runner.load(str(model), use_cache=False)
    fingerprint = remembered(model, kv=kv)
    cache = None if store is None else PromptCache(store, fingerprint, kv=kv)
    return Runner(loaded.model, loaded.tokenizer, cache, kv=kv)


@every_setting
def test_a_run_goes_on_and_prompts_begin_in_new_processes_as_in_one(
    kv: KVSettings, models: dict[str, Path], tmp_path: Path
) -> None:
    model = models["plain" if kv.max_size is None else "bare"]
    store, chosen = tmp_path / "store", options_of(kv)
    prompt = ("--prefix", PREFIX, "-p", QUESTION, *chosen)
    half = run(model, store, "generate", *prompt, *SAMPLED, "-n", "8", "--save-as", "half").json
    rest = run(model, store, "load", "half", *chosen, "-n", "12", "--save-as", "whole").json
    again = run(model, store, "generate", *prompt, *SAMPLED, "-n", "8").json
    other = run(model, store, "generate", "--prefix", PREFIX, "-p", OTHER, *chosen, "-n", "1").json

    runner = here(model, kv)
    cache = here(model, kv, store).cache
    assert cache is not None
    tokens = cache.load("half").tokens[: half["prompt_tokens"]]
    boundary = other["cached_tokens"]
    sampling = Sampling(temp=1.0, top_p=0.9, repetition_penalty=1.1, seed=3)
    steps = runner.generate(tokens, 20, sampling, boundaries=(boundary,))
    straight: list[int] = []
    for name, answer in (("half", half), ("whole", rest)):
        straight = [next(steps).token for _ in answer["tokens"]]
        assert answer["tokens"] == straight
        stored = cache.load(name)
        assert parts_of(stored) == parts_of(runner.state)
        assert stored.phase == kv.phase_at(stored.n_past)
        assert stored.contents[0].sliceable == (kv.max_size is None)
    assert (rest["hit"], rest["prefilled_tokens"]) == ("exact", 0)
    assert (again["hit"], again["tokens"]) == ("exact", half["tokens"])
    assert other["hit"] == "prefix"
    assert cache.verify().damaged == ()
    positions = [24, boundary, 60, len(tokens), len(tokens) + 8, 85, len(tokens) + 20]
    assert positions == sorted(positions)  # else the settings are not what they say


def parts_of(state: Any) -> list[Any]:
    """All of a state but what was computed with which settings, which both sides were told."""
    arrays = [state.logits, state.embedding, state.rng]
    for layer in state.contents:
        arrays += [*layer.rows.values(), *layer.arrays.values()]
    return [state.tokens, [x.attributes for x in state.contents], *map(tiny.bits, arrays)]


def test_states_of_other_settings_are_not_used_and_that_is_told(
    models: dict[str, Path], tmp_path: Path
) -> None:
    model = models["plain"]
    store, prompt = tmp_path / "store", ("-p", PREFIX, "-n", "2", "--temp", "0")
    for number, (name, kv) in enumerate(SETTINGS.items()):
        options = (*prompt, *options_of(kv), "--save-as", name)
        answer = run(model, store, "generate", *options).json
        assert answer["hit"] == "none"
        assert number == 0 or "other KV cache settings" in answer["miss_reason"]
    for name in SETTINGS:
        refused = run(model, store, "load", name)
        assert (refused.code, refused.out, len(refused.err.splitlines())) == (1, "", 1)
        assert "made with other KV cache settings" in refused.err
