"""mlx-lm's own prompt-cache files: what mlx-lm reads of ours, and what is read of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models import cache as mlx_cache

import processes
import tiny
from known import model_of
from mlx_promptcache import KVSettings, PromptCache, Runner, cli, handover, mlx_lm_file
from mlx_promptcache.errors import (
    DamagedFile,
    ForeignFile,
    PromptCacheError,
    PromptError,
    StoreError,
    UnsupportedLayer,
)
from mlx_promptcache.layers import capture
from tiny import bits, random_tokens

if TYPE_CHECKING:
    from collections.abc import Callable

    from mlx_promptcache.layers import Layer

    Header = dict[str, Any]

LENGTH = 70
PROMPT = "The cat sat on the mat, and the dog sat on the c"
QUESTION = " Question: what is two plus two?"


def mlx_lms(kind: str, tokens: list[int], path: Path, **options: Any) -> list[Any]:
    """Layers that mlx-lm filled with a prompt and wrote to a file, as its cache_prompt does."""
    model = model_of(kind)
    layers: list[Any] = mlx_cache.make_prompt_cache(model)
    for _ in generate_step(
        mx.array(tokens), model, max_tokens=0, prompt_cache=layers, **options
    ):  # fmt: skip
        pass
    mlx_cache.save_prompt_cache(str(path), layers, {"model": kind, "tokenizer_config": "{}"})
    return layers


def read(path: Path) -> mlx_lm_file.Contents:
    data = path.read_bytes()
    return mlx_lm_file.read(lambda at, count: data[at : at + count], len(data))


def content_of(layers: list[Any], n_past: int) -> list[Any]:
    return [told(layer) for layer in capture(layers, n_past)]


def told(layer: Layer) -> Any:
    arrays = {**layer.rows, **layer.arrays}
    named = {name: bits(arrays[name]) for name in sorted(arrays)}
    return layer.path, layer.kind, layer.window, sorted((layer.attributes or {}).items()), named


def goes_on(model: Any, layers: list[Any]) -> list[int]:
    """What mlx-lm says after these layers."""
    steps = generate_step(mx.array([3]), model, max_tokens=8, prompt_cache=layers)
    return [int(token) for token, _ in steps]


# Both ways


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_mlx_lm_reads_what_is_written_for_it_with_every_bit(kind: str, tmp_path: Path) -> None:
    runner = Runner(model_of(kind))
    state = runner.prefill(random_tokens(LENGTH, 1))
    layers = state.layers(runner.model)
    size = mlx_lm_file.write(tmp_path / "a", layers, {"model": "m"}, replace_file=False)
    (tmp_path / "a").rename(tmp_path / "a.safetensors")
    theirs, metadata = mlx_cache.load_prompt_cache(str(tmp_path / "a.safetensors"), True)
    assert metadata == {"model": "m"}
    assert size == (tmp_path / "a.safetensors").stat().st_size
    assert content_of(theirs, LENGTH) == [told(layer) for layer in state.contents]
    assert goes_on(runner.model, theirs) == goes_on(runner.model, state.layers(runner.model))


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_what_mlx_lm_wrote_is_read_with_every_bit(kind: str, tmp_path: Path) -> None:
    tokens, model = random_tokens(LENGTH, 1), model_of(kind)
    theirs = mlx_lms(kind, tokens, tmp_path / "a.safetensors")
    filled = mlx_lm_file.filled(read(tmp_path / "a.safetensors"), model, KVSettings())
    state = mlx_lm_file.state_of(filled, tokens, model, KVSettings())
    assert [told(layer) for layer in state.contents] == content_of(theirs, LENGTH)
    assert goes_on(model, state.layers(model)) == goes_on(model, theirs)


@pytest.mark.parametrize("kind", ["plain", "hybrid"])
def test_quantised_layers_are_read_with_the_settings_that_made_them(
    kind: str, tmp_path: Path
) -> None:
    tokens, model = random_tokens(LENGTH, 1), model_of(kind)
    options = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0}
    theirs = mlx_lms(kind, tokens, tmp_path / "a.safetensors", **options)
    contents = read(tmp_path / "a.safetensors")
    kv = KVSettings(8, 32, 0)
    state = mlx_lm_file.state_of(mlx_lm_file.filled(contents, model, kv), tokens, model, kv)
    assert [told(layer) for layer in state.contents] == content_of(theirs, LENGTH)
    with pytest.raises(UnsupportedLayer, match="give the --kv-bits"):
        mlx_lm_file.filled(contents, model, KVSettings())
    other = KVSettings(4, 32, 0)
    with pytest.raises(UnsupportedLayer):
        mlx_lm_file.state_of(mlx_lm_file.filled(contents, model, other), tokens, model, other)


def test_the_room_that_buffers_have_is_not_written(tmp_path: Path) -> None:
    mlx_lms("plain", random_tokens(10, 1), tmp_path / "theirs.safetensors")
    layers = Runner(model_of("plain")).prefill(random_tokens(10, 1)).layers(model_of("plain"))
    mlx_lm_file.write(tmp_path / "ours.safetensors", layers, {}, replace_file=False)
    theirs, ours = ((tmp_path / f"{who}.safetensors").stat().st_size for who in ("theirs", "ours"))
    assert ours < theirs / 10


def test_layers_that_mlx_lm_could_not_read_are_not_written(tmp_path: Path) -> None:
    class Own(mlx_cache.KVCache):  # type: ignore[misc]
        pass

    layers = [mlx_cache.KVCache(), Own()]
    with pytest.raises(UnsupportedLayer, match="layer 1 is a Own"):
        mlx_lm_file.write(tmp_path / "a", layers, {}, replace_file=False)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_written_over_only_on_request(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    layers = Runner(model_of("plain")).prefill([1, 2]).layers(model_of("plain"))
    with pytest.raises(StoreError, match="is there already"):
        mlx_lm_file.write(tmp_path / "a", layers, {}, replace_file=False)
    assert (tmp_path / "a").read_text() == "mine"
    mlx_lm_file.write(tmp_path / "a", layers, {}, replace_file=True)
    assert len(read(tmp_path / "a").classes) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


# Files that are not what they should be


@pytest.fixture
def file(tmp_path: Path) -> Path:
    mlx_lms("plain", random_tokens(LENGTH, 1), tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def changed(path: Path, change: Callable[[Header], object]) -> None:
    """Change the header of a safetensors file."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def as_state(path: Path) -> None:
    model, kv = model_of("plain"), KVSettings()
    tokens = random_tokens(LENGTH, 1)
    mlx_lm_file.state_of(mlx_lm_file.filled(read(path), model, kv), tokens, model, kv)


def meta(header: Header) -> dict[str, str]:
    found: dict[str, str] = header["__metadata__"]
    return found


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h["0.0"].update(data_offsets=[0, 8]),
        lambda h: h["0.0"].update(data_offsets=h["0.1"]["data_offsets"]),
        lambda h: h["0.0"].update(shape=[1 << 40, 1 << 40]),
        lambda h: h["0.0"].update(shape=[-1, *h["0.0"]["shape"][1:]]),
        lambda h: h["0.0"].update(shape=[True, *h["0.0"]["shape"][1:]]),
        lambda h: h["0.0"].update(dtype="F8_E4M3"),
        lambda h: h["0.0"].pop("dtype"),
        lambda h: h.update({"5.0": h.pop("0.0")}),
        lambda h: h.update({"0.0" + ".0" * 50: h.pop("0.0")}),
        lambda h: h.update({"a.b": h.pop("0.0")}),
        lambda h: h.pop("__metadata__"),
        lambda h: meta(h).pop("1.1"),
        lambda h: meta(h).update({"2.1.1": "eval"}),
        lambda h: meta(h).update({"2.1.1": "string"}),
        lambda h: meta(h).update({"2.1.0": "0.0"}),
        lambda h: meta(h).update({"2.1.0": "9.9"}),
    ],
)
def test_a_header_that_makes_no_sense_is_refused(
    change: Callable[[Header], object], file: Path
) -> None:
    changed(file, change)
    with pytest.raises((DamagedFile, UnsupportedLayer)):
        as_state(file)


@pytest.mark.parametrize(
    "change",
    [
        lambda h: meta(h).update({"1.0": "RotatingKVCache"}),
        lambda h: meta(h).update({"1.0": "_BaseCache"}),
        lambda h: meta(h).update({"1.0": "__import__"}),
        lambda h: meta(h).update({"1.0": "Runner"}),
        lambda h: h["0.0"].update(shape=[1, 1, *h["0.0"]["shape"][2:3], 64]),
        lambda h: h["0.0"].update(dtype="I32"),
    ],
)
def test_layers_that_are_not_the_models_are_refused(
    change: Callable[[Header], object], file: Path
) -> None:
    changed(file, change)
    with pytest.raises(UnsupportedLayer):
        as_state(file)


def test_no_class_is_looked_up_by_a_name_from_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mlx-lm makes every layer, and each layer of a list, of the class that the file names."""

    def refuse(*_: object) -> None:
        raise AssertionError("a class was asked to make a layer")

    tokens, model = random_tokens(LENGTH, 1), model_of("nested")
    mlx_lms("nested", tokens, tmp_path / "a.safetensors")
    monkeypatch.setattr(mlx_cache._BaseCache, "from_state", refuse)
    filled = mlx_lm_file.filled(read(tmp_path / "a.safetensors"), model, KVSettings())
    assert mlx_lm_file.held(filled) == LENGTH


def test_a_header_that_claims_to_be_longer_than_its_file_is_refused(tmp_path: Path) -> None:
    for data in (b"", b"\xff" * 8, (1 << 40).to_bytes(8, "little") + b"{}", b"\x02" + b"\0" * 7):
        (tmp_path / "a").write_bytes(data)
        with pytest.raises(DamagedFile):
            read(tmp_path / "a")


def test_every_cut_of_a_file_is_refused(file: Path) -> None:
    sound = file.read_bytes()
    for length in range(0, len(sound), len(sound) // 50):
        file.write_bytes(sound[:length])
        with pytest.raises(DamagedFile):
            read(file)


def test_the_layout_of_another_release_is_refused_in_a_sentence(file: Path) -> None:
    """mlx-lm 0.31 wrote what each layer says of itself first, then the metadata, then classes."""

    def older(header: Header) -> None:
        header["__metadata__"] = {
            "0.0": "70", "0.1": "70", "1.model": "m", "2.0": "KVCache", "2.1": "KVCache",
        }  # fmt: skip

    changed(file, older)
    with pytest.raises(ForeignFile, match=r"this release of mlx-lm did not write it"):
        read(file)


def test_layers_of_different_lengths_are_refused(tmp_path: Path) -> None:
    layers = mlx_lms("plain", random_tokens(LENGTH, 1), tmp_path / "a.safetensors")
    layers[1].offset -= 1
    mlx_cache.save_prompt_cache(str(tmp_path / "a.safetensors"), layers, {})
    contents = read(tmp_path / "a.safetensors")
    with pytest.raises(UnsupportedLayer, match="different numbers of tokens"):
        mlx_lm_file.held(mlx_lm_file.filled(contents, model_of("plain"), KVSettings()))


# By the command line


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.on_disk(tmp_path_factory.mktemp("models") / "tiny")


def mlx_lm(*arguments: str | Path) -> str:
    """Run mlx-lm as its users do, and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "mlx_lm", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=processes.environment(),
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def both_ways(
    model: Path, directory: Path, prompt: str, question: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What mlx-lm says after its own file, after ours, and what is said here after its own."""

    def run(*arguments: str | Path) -> str:
        chosen = ("-m", model, "--cache-dir", directory / "store")
        assert cli.run([*map(str, (*arguments, *chosen))]) == 0
        return capsys.readouterr().out

    theirs, ours = directory / "theirs.safetensors", directory / "ours.safetensors"
    mlx_lm("cache_prompt", "--model", model, "--prompt", prompt, "--prompt-cache-file", theirs)
    run("save", "few", "-p", prompt)
    run("export", "few", ours, "--format", "mlx-lm")
    asked = ("generate", "-m", "12", "--verbose", "False", "--prompt", question)
    expected = mlx_lm(*asked, "--model", model, "--prompt-cache-file", theirs)
    assert mlx_lm(*asked, "--prompt-cache-file", ours) == expected  # it knows its model
    told = json.loads(
        run("import", theirs, "--format", "mlx-lm", "--name", "theirs", "-p", prompt, "--json")
    )
    assert told["tokens"] == len(state(directory, model).tokens)
    greedy = ("-n", "12", "--temp", "0", "--prompt-cache-ro")
    said = run("generate", "--prompt-cache", "theirs", "-p", question, *greedy)
    assert said == expected


def state(directory: Path, model: Path) -> Any:
    runner = Runner.load(str(model), cache_dir=str(directory / "store"))
    assert runner.cache is not None
    return runner.cache.load("theirs")


def test_mlx_lm_goes_on_after_our_file_as_after_its_own(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both_ways(model, tmp_path, PROMPT, QUESTION, capsys)


@pytest.mark.real
def test_mlx_lm_goes_on_after_our_file_as_after_its_own_with_the_real_model(
    real_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = "Here is a fact about France. The capital of France is Paris. Now answer this: "
    both_ways(real_model, tmp_path, prompt, "what is the capital of France?", capsys)


# From Python


@pytest.fixture
def runner(model: Path, tmp_path: Path) -> Runner:
    return Runner.load(str(model), cache_dir=str(tmp_path / "store"))


def made_from(runner: Runner, prompt: str, path: Path) -> None:
    """A file as mlx_lm.cache_prompt writes it."""
    tokens = runner.tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=False,
        continue_final_message=True,
    )  # fmt: skip
    layers = mlx_cache.make_prompt_cache(runner.model)
    for _ in generate_step(mx.array(tokens), runner.model, max_tokens=0, prompt_cache=layers):
        pass
    mlx_cache.save_prompt_cache(str(path), layers, {})


def origin(text: str) -> Any:
    from mlx_promptcache.state import Origin

    return Origin(text, None, None, template=True)


def test_the_last_token_is_fed_again_for_the_logits(runner: Runner, tmp_path: Path) -> None:
    made_from(runner, PROMPT, tmp_path / "a.safetensors")
    taken = handover.take_over(runner, tmp_path / "a.safetensors", origin(PROMPT))
    computed = Runner(runner.model).prefill(taken.tokens)
    assert taken.logits is not None
    assert computed.logits is not None
    assert mx.allclose(taken.logits, computed.logits, atol=1e-4)
    assert runner.cache is not None
    runner.cache.save("taken", taken)
    said = [step.token for step in runner.generate(runner.cache.load("taken"), 6)]
    assert said == [step.token for step in Runner(runner.model).generate(computed, 6)]


@pytest.mark.parametrize(
    ("prompt", "error", "sentence"),
    [
        (PROMPT + "at", PromptError, "give the very prompt"),
        ("", PromptCacheError, "give the very prompt"),
        (PROMPT[:-1] + "b", UnsupportedLayer, "other weights, or from another prompt"),
    ],
)
def test_another_prompt_than_the_files_is_refused(
    prompt: str, error: type[Exception], sentence: str, runner: Runner, tmp_path: Path
) -> None:
    made_from(runner, PROMPT, tmp_path / "a.safetensors")
    with pytest.raises(error, match=sentence):
        handover.take_over(runner, tmp_path / "a.safetensors", origin(prompt))


def test_rows_of_other_weights_are_told_by_the_last_of_them(runner: Runner, tmp_path: Path) -> None:
    made_from(runner, PROMPT, tmp_path / "a.safetensors")
    attention = runner.model.layers[0].self_attn
    attention.k_proj.weight = attention.k_proj.weight * -1
    with pytest.raises(UnsupportedLayer, match="other weights"):
        handover.take_over(runner, tmp_path / "a.safetensors", origin(PROMPT))


def test_a_model_that_cannot_forget_a_token_gets_no_logits_and_that_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tiny.on_disk(tmp_path / "hybrid", "hybrid")
    runner = Runner.load(str(path), cache_dir=str(tmp_path / "store"))
    made_from(runner, PROMPT, tmp_path / "a.safetensors")
    taken = handover.take_over(runner, tmp_path / "a.safetensors", origin(PROMPT))
    assert taken.logits is None
    assert "no logits are known" in caplog.text
    assert runner.cache is not None
    runner.cache.save("taken", taken)
    longer = [*taken.tokens, 5, 6, 7]
    assert runner.start(longer).cached_tokens == len(taken.tokens)


def test_a_store_is_needed_to_hand_a_state_over(runner: Runner, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedLayer, match="no prompt cache"):
        handover.hand_over(Runner(runner.model), "few", tmp_path / "a", "m")
    assert isinstance(runner.cache, PromptCache)
