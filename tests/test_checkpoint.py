"""Models from their files: the weights that mlx-lm loads, read in a thread, or a sentence."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model, quantize_model, save_config, save_model

import processes
import tiny
from mlx_promptcache import Runner, Sampling, checkpoint, streams
from mlx_promptcache.cli.choices import ModelChoice
from mlx_promptcache.errors import ModelError

PROMPT = [1, 2, 3, 4, 5]
SAMPLED = Sampling(temp=1.0, seed=1)
UNSAFE = "new_thread_unsafe_stream"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.on_disk(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


@pytest.fixture(params=["in a thread", "in this thread"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where weights are read: releases of MLX before 0.32 have no stream for other threads."""
    if request.param == "in this thread":
        monkeypatch.delattr(mx, UNSAFE, raising=False)
    return str(request.param)


def quantised(model: Path, directory: Path) -> Path:
    """A copy of a model with some layers in 4 bits and others in 8."""
    loaded, config = load_model(model)
    some, config = quantize_model(
        loaded, config, 32, 4,
        quant_predicate=lambda path, _: {"group_size": 32, "bits": 8} if "mlp" in path else True,
    )  # fmt: skip
    save_model(directory, some)
    save_config(config, directory / "config.json")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, directory)
    return directory


def adapted(model: Path, directory: Path) -> Path:
    """An adapter of a model with random weights."""
    config: dict[str, Any] = {
        "fine_tune_type": "lora", "num_layers": 2,
        "lora_parameters": {"rank": 4, "scale": 20.0, "dropout": 0.0},
    }  # fmt: skip
    loaded, _ = load_model(model)
    loaded.freeze()
    linear_to_lora_layers(loaded, config["num_layers"], config["lora_parameters"])
    weights: Any = tree_flatten(loaded.trainable_parameters())
    keys = mx.random.split(mx.random.key(1), len(weights))
    directory.mkdir()
    mx.save_safetensors(
        str(directory / "adapters.safetensors"),
        {
            name: mx.random.normal(a.shape, key=k)
            for (name, a), k in zip(weights, keys, strict=True)
        },
    )
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def bits(model: Any) -> dict[str, Any]:
    parameters: Any = tree_flatten(model.parameters())
    return {name: tiny.bits(array) for name, array in parameters}


# The same weights


@pytest.mark.parametrize("what", ["plain", "rotating", "bare", "hybrid", "quantised", "adapted"])
def test_the_weights_are_those_that_mlx_lm_loads(what: str, place: str, tmp_path: Path) -> None:
    kind = what if what in ("rotating", "bare", "hybrid") else "plain"
    model, adapter = tiny.on_disk(tmp_path / "model", kind), None
    if what == "quantised":
        model = quantised(model, tmp_path / "small")
    if what == "adapted":
        adapter = adapted(model, tmp_path / "adapter")
    expected = mlx_lm.load(str(model), adapter_path=None if adapter is None else str(adapter))[0]
    loaded, config, weights, _ = checkpoint.load(model, adapter)
    weights.wait()
    assert bits(loaded) == bits(expected)
    assert not any(module.training for module in loaded.modules())
    assert config["model_type"] == json.loads((model / "config.json").read_bytes())["model_type"]
    if what == "quantised":
        assert any(name.endswith("scales") for name in bits(loaded))
    if what == "adapted":
        assert any("lora_a" in name for name in bits(loaded))
    logits = [m(mx.array([PROMPT]))[0, -1] for m in (loaded, expected)]
    assert tiny.bits(logits[0]) == tiny.bits(logits[1])


def test_a_command_knows_a_model_by_its_files_from_before_they_were_read(
    model: Path, tmp_path: Path
) -> None:
    """Else states of the old weights would be taken for those of the new ones."""
    store = str(tmp_path / "store")
    choice = ModelChoice(str(model), None, store, None, 64, 5000, None, None, 3, "", False)
    before, loaded = choice.certain_fingerprint(), choice.begin()
    (weights,) = model.glob("*.safetensors")
    data = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    runner = choice.runner(loaded=loaded)
    assert runner.model is not None
    assert runner.fingerprint == before.digest
    assert choice.runner().fingerprint != before.digest


def test_loading_draws_from_the_global_key_as_mlx_lm_does(original: Path, place: str) -> None:
    drawn = []
    for load in (lambda: mlx_lm.load(str(original)), lambda: checkpoint.load(original, None)):
        mx.random.seed(5)
        load()
        drawn.append(tiny.bits(mx.random.uniform(shape=(4,))))
    assert drawn[0] == drawn[1]


def test_steps_and_states_are_the_same_wherever_weights_are_read(
    original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = []
    for _ in range(2):
        runner = Runner.load(str(original), use_cache=False, draft_model=str(original))
        said.append(
            [(s.token, s.text) for s in runner.generate(PROMPT, 8, SAMPLED)]
            + [tiny.digest(runner.state)]
        )
        monkeypatch.delattr(mx, UNSAFE, raising=False)
    assert said[0] == said[1]


# Waiting


class Held:
    """Holds up every read of weights in another thread until it is let go; then may fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> None:
        self.go, self.begun = threading.Event(), threading.Event()
        evaluate, main = mx.eval, threading.main_thread()

        def held(*arrays: Any) -> None:
            if threading.current_thread() is not main:
                self.begun.set()
                assert self.go.wait(60)
                if error is not None:
                    raise error
            evaluate(*arrays)

        monkeypatch.setattr(mx, "eval", held)


needs_threads = pytest.mark.skipif(not hasattr(mx, UNSAFE), reason="MLX reads in this thread")


@needs_threads
def test_a_runner_is_there_before_its_weights_and_waits_for_them(
    original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch)
    runner = Runner.load(str(original), use_cache=False, draft_model=str(original))
    assert held.begun.wait(60)
    reading = list(runner._awaited)
    assert len(reading) == 2
    threading.Timer(0.2, held.go.set).start()
    assert runner.model is runner._model
    assert held.go.is_set()
    assert not any(weights._thread.is_alive() for weights in reading)
    assert runner._awaited == []


@needs_threads
def test_many_threads_wait_for_one_runner(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, found = Held(monkeypatch), []
    runner = Runner.load(str(original), use_cache=False)
    threads = [threading.Thread(target=lambda: found.append(runner.model)) for _ in range(6)]
    for thread in threads:
        thread.start()
    assert found == []
    held.go.set()
    for thread in threads:
        thread.join()
    assert len(found) == 6


def test_two_runners_at_once_say_what_each_says_alone(original: Path, tmp_path: Path) -> None:
    other = tiny.on_disk(tmp_path / "other", "hybrid")
    paths = [original, other]
    alone = [
        [step.token for step in Runner.load(str(path), use_cache=False).generate(PROMPT, 8)]
        for path in paths
    ]
    for _ in range(3):
        runners = [Runner.load(str(path), use_cache=False) for path in paths]
        going = [runner.generate(PROMPT, 8) for runner in runners]
        together = list(zip(*going, strict=True))
        assert [[step.token for step in steps] for steps in zip(*together, strict=True)] == alone


@needs_threads
def test_each_model_is_read_on_a_stream_of_its_own(original: Path) -> None:
    made = [streams.of_any_thread() for _ in range(2)]
    assert all(stream is not None for stream in made)
    assert made[0] != made[1]


def test_on_another_device_weights_are_read_in_this_thread(
    original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    assert streams.of_any_thread() is None
    monkeypatch.undo()
    assert (streams.of_any_thread() is None) == (not hasattr(mx, UNSAFE))


# Weights that cannot be read


def test_a_truncated_file_is_a_sentence(model: Path, place: str) -> None:
    file = model / "model.safetensors"
    data = file.read_bytes()
    for length in (0, 4, 100, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:length])
        with pytest.raises(ModelError) as raised:
            Runner.load(str(model), use_cache=False).prefill(PROMPT)
        assert "\n" not in str(raised.value)
        assert str(model) in str(raised.value)


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json"])
def test_a_missing_file_is_a_sentence(model: Path, missing: str, place: str) -> None:
    (model / missing).unlink()
    with pytest.raises(ModelError):
        Runner.load(str(model), use_cache=False)


def test_what_fails_while_it_is_read_is_said_on_first_use_and_again(
    original: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = RuntimeError("[read] Unable to read\nso many bytes")

    def failing(self: Any, model: Any) -> None:
        read(self, model)
        self._error = failed

    read = checkpoint.Weights._read
    monkeypatch.setattr(checkpoint.Weights, "_read", failing)
    runner = Runner.load(str(original), use_cache=False)
    uses = (
        lambda: runner.model, lambda: runner.prefill(PROMPT), lambda: runner.draft_model,
        lambda: list(runner.generate(PROMPT, 2)), lambda: runner.model,
    )  # fmt: skip
    for use in uses:
        with pytest.raises(ModelError) as raised:
            use()
        words = "cannot be read: [read] Unable to read so many bytes; bring the model again"
        assert str(raised.value) == f"the weights of {original} {words}"
        assert raised.value.__cause__ is failed


@needs_threads
def test_what_fails_in_the_thread_is_said_where_it_is_waited_for(
    original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch, RuntimeError("no such bytes"))
    runner = Runner.load(str(original), use_cache=False, draft_model=str(original))
    held.go.set()
    for _ in range(2):
        with pytest.raises(ModelError, match="no such bytes"):
            runner.prefill(PROMPT)


def test_a_text_beyond_the_context_is_encoded_without_a_word(
    original: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = checkpoint.load_tokenizer(original, {})
    assert len(tokenizer.encode("cat " * 3000)) > 2048
    assert not caplog.records


def test_on_the_command_line_it_is_one_line(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    ended = processes.run("generate", "-m", model, "-p", "Hello", "-n", "2")
    assert (ended.code, ended.out) == (1, "")
    assert "cannot" in ended.err
    assert len(ended.err.splitlines()) == 1


# Leaving


@needs_threads
def test_a_process_may_end_while_weights_are_read(original: Path, tmp_path: Path) -> None:
    size = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 12}
    config = {**json.loads((original / "config.json").read_bytes()), **size}
    large = tmp_path / "large"
    large.mkdir()
    (large / "config.json").write_text(json.dumps(config))
    made = llama.Model(llama.ModelArgs.from_dict(config))
    weights: Any = tree_flatten(made.parameters())
    mx.save_safetensors(
        str(large / "model.safetensors"), {name: mx.zeros(array.shape) for name, array in weights}
    )
    source = (
        "import sys; from pathlib import Path; from mlx_promptcache import checkpoint\n"
        "model, config, weights, _ = checkpoint.load(Path(sys.argv[1]), None)\n"
        "print(weights._thread.is_alive()); sys.exit(3)"
    )
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", source, str(large)],
            capture_output=True, text=True, env=processes.environment(), check=False, timeout=100,
        )  # fmt: skip
        assert (done.returncode, done.stdout, done.stderr) == (3, "True\n", "")
