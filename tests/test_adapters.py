"""Adapters that mlx-lm trained: what one computed is its own, whatever lies where it lay.

What goes on does so in a process of its own, as users run it. What must not be used is asked for in
this one, which has more to confuse: what it remembers of files, and all that it loaded before.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers
import mlx_lm
import pytest
from mlx_lm.tuner.trainer import TrainingArgs, train
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import save_config

import processes
import tiny
from mlx_promptcache import Runner, Sampling, cli
from mlx_promptcache.fingerprint import remembered

PROMPT = "The cat sat on the mat, and the dog sat on the cat. " * 4
SAMPLED = ("--temp", "1", "--top-p", "0.9", "--repetition-penalty", "1.1", "--seed", "3")
CONFIG: dict[str, Any] = {
    "fine_tune_type": "lora",
    "num_layers": 2,
    "lora_parameters": {"rank": 4, "scale": 20.0, "dropout": 0.0},
}


def trained(model: Path, directory: Path, seed: int) -> Path:
    """Train an adapter for some steps, and leave it as mlx-lm does."""
    mx.random.seed(seed)
    learning, *_ = mlx_lm.load(str(model))
    learning.freeze()
    linear_to_lora_layers(learning, CONFIG["num_layers"], CONFIG["lora_parameters"])
    directory.mkdir(exist_ok=True)
    save_config(dict(CONFIG), directory / "adapter_config.json")
    texts = [(tiny.random_tokens(24, seed + i, 200), 0) for i in range(4)]
    adapter_file = directory / "adapters.safetensors"
    arguments = TrainingArgs(
        batch_size=2, iters=3, steps_per_report=99, steps_per_eval=99, steps_per_save=99,
        max_seq_length=32, adapter_file=str(adapter_file),
    )  # fmt: skip
    mx.disable_compile()  # on a CPU it calls the system's compiler, which takes its time
    try:
        train(learning, mlx.optimizers.Adam(learning_rate=0.05), texts, args=arguments)
    finally:
        mx.enable_compile()
    assert adapter_file.is_file()
    return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.on_disk(tmp_path_factory.mktemp("adapters") / "model")


@pytest.fixture(scope="module")
def adapters(model: Path) -> tuple[Path, Path]:
    return trained(model, model.parent / "one", 1), trained(model, model.parent / "other", 2)


@pytest.fixture
def adapter(adapters: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the first one, which may be written to."""
    return Path(shutil.copytree(adapters[0], tmp_path / "adapter"))


def run(model: Path, store: Path, *arguments: str | Path) -> processes.Ended:
    return processes.run(*arguments, "-m", model, "--cache-dir", store, "--json")


@pytest.fixture
def run_here(capsys: pytest.CaptureFixture[str]) -> Callable[..., processes.Ended]:
    def it(model: Path, store: Path, *arguments: str | Path) -> processes.Ended:
        chosen = ("-m", model, "--cache-dir", store, "--json")
        code = cli.run([*map(str, (*arguments, *chosen))])
        return processes.Ended(code, *capsys.readouterr())

    return it


def greedy(model: Path, adapter: str | None) -> list[int]:
    """What the command line would say, computed here and without a cache."""
    runner = Runner.load(str(model), adapter, use_cache=False)
    messages = [{"role": "user", "content": PROMPT}]
    return [step.token for step in runner.generate(messages, 6)]


def test_training_made_two_adapters_that_say_other_things(
    model: Path, adapters: tuple[Path, Path]
) -> None:
    assert len({tuple(greedy(model, path)) for path in (None, *map(str, adapters))}) == 3


def test_a_run_with_an_adapter_goes_on_in_a_new_process_bit_for_bit(
    model: Path, adapter: Path, tmp_path: Path
) -> None:
    store, chosen = tmp_path / "store", ("--adapter-path", adapter)
    options = ("-p", PROMPT, *SAMPLED, *chosen)
    straight = run(model, store, "generate", *options, "-n", "20", "--no-prompt-cache").json
    half = run(model, store, "generate", *options, "-n", "8", "--save-as", "half").json
    rest = run(model, store, "load", "half", *chosen, "-n", "12", "--save-as", "whole").json
    assert half["tokens"] + rest["tokens"] == straight["tokens"]
    assert (rest["hit"], rest["prefilled_tokens"]) == ("exact", 0)

    here = Runner.load(str(model), str(adapter), cache_dir=str(store))
    assert here.cache is not None
    prompt = here.cache.load("half").tokens[: half["prompt_tokens"]]
    sampling = Sampling(temp=1.0, top_p=0.9, repetition_penalty=1.1, seed=3)
    alone = Runner(here.model, here.tokenizer)
    steps = alone.generate(prompt, 20, sampling)
    for name, count in (("half", 8), ("whole", 12)):
        assert [next(steps).token for _ in range(count)]
        assert alone.state.logits is not None
        assert bits_of(here.cache.load(name)) == bits_of(alone.state)


def bits_of(state: Any) -> list[Any]:
    arrays = [state.logits, state.embedding, state.rng]
    arrays += [array for layer in state.contents for array in layer.rows.values()]
    return [state.tokens, *map(tiny.bits, arrays)]


def other_content_of_the_same_age(adapter: Path, other: Path) -> None:
    weights = adapter / "adapters.safetensors"
    before = weights.stat()
    weights.write_bytes((other / weights.name).read_bytes())
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert weights.stat().st_size == before.st_size


def other_scale(adapter: Path, other: Path) -> None:
    config = {**CONFIG, "lora_parameters": {**CONFIG["lora_parameters"], "scale": 5.0}}
    (adapter / "adapter_config.json").write_text(json.dumps(config), "utf-8")


@pytest.mark.parametrize(
    "replace", [other_content_of_the_same_age, other_scale], ids=lambda f: f.__name__
)
def test_an_adapter_that_was_replaced_in_its_place_does_not_use_what_the_first_computed(
    replace: Callable[[Path, Path], None],
    model: Path,
    adapters: tuple[Path, Path],
    adapter: Path,
    tmp_path: Path,
    run_here: Callable[..., processes.Ended],
) -> None:
    store, chosen = tmp_path / "store", ("--adapter-path", adapter)
    options = ("generate", "-p", PROMPT, "-n", "6", "--temp", "0", *chosen)
    first = run_here(model, store, *options, "--save-as", "mine").json
    replace(adapter, adapters[1])
    cold = greedy(model, str(adapter))
    second = run_here(model, store, *options).json
    assert (second["hit"], second["cached_tokens"]) == ("none", 0)
    assert "another adapter" in second["miss_reason"]
    assert second["tokens"] == cold != first["tokens"]
    refused = run_here(model, store, "load", "mine", *chosen)
    assert (refused.code, refused.out, len(refused.err.splitlines())) == (1, "", 1)
    assert "made with another adapter" in refused.err
    shutil.copytree(adapters[0], adapter, dirs_exist_ok=True)
    again = run_here(model, store, *options).json
    assert (again["hit"], again["tokens"]) == ("exact", first["tokens"])


def test_the_model_alone_and_with_an_adapter_use_nothing_of_each_other(
    model: Path,
    adapters: tuple[Path, Path],
    tmp_path: Path,
    run_here: Callable[..., processes.Ended],
) -> None:
    store = tmp_path / "store"
    options = ("generate", "-p", PROMPT, "-n", "6", "--temp", "0")
    ways = [("--adapter-path", adapters[0]), (), ("--adapter-path", adapters[1])]
    for name, way in zip("abc", ways, strict=True):
        answer = run_here(model, store, *options, *way, "--save-as", name).json
        assert answer["hit"] == "none"
        assert name == "a" or "another adapter" in answer["miss_reason"]
    assert "made with another adapter" in run_here(model, store, "load", "a").err
    assert "made with another adapter" in run_here(model, store, "load", "b", *ways[0]).err
    for name, way in zip("abc", ways, strict=True):
        answer = run_here(model, store, *options, *way).json
        assert (answer["hit"], answer["prefilled_tokens"]) == ("exact", 0), name
    listed = run_here(model, store, "list").json["entries"]
    assert {e["status"] for e in listed} == {"ok"}


def test_the_same_adapter_in_another_place_is_the_same_adapter(
    model: Path, adapters: tuple[Path, Path], adapter: Path
) -> None:
    one, copied, other = (
        remembered(model, adapter=path) for path in (adapters[0], adapter, adapters[1])
    )
    assert one == copied != other
