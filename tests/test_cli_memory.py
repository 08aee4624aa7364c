"""The `memory` command: what it prints, its exit codes and its sentences."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

import processes
import tiny
from mlx_promptcache import cli, compression, machine, memory
from mlx_promptcache.fingerprint import KVSettings
from mlx_promptcache.memory import Memory
from mlx_promptcache.store import BLOCKS, SNAPSHOTS, Store

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Command = Callable[..., processes.Ended]

KEYS = {
    "model", "mode", "context", "trained_context", "beyond_trained", "conversations", "kv",
    "prefill_step", "weights_bytes", "layers", "layers_bytes", "most_layers_bytes", "kept_bytes",
    "conversation_bytes", "bytes_per_token", "pass_bytes", "total_bytes", "memory_bytes",
    "memory_source", "fits", "conversations_that_fit", "longest_context", "endless", "disk",
}  # fmt: skip
PROMPT = "The cat sat on the mat, and the dog sat on the cat. " * 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.on_disk(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def run(model: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    def command(*arguments: Any, model: Path = model, name: str = "memory") -> processes.Ended:
        code = cli.run([name, "-m", str(model), *map(str, arguments)])
        return processes.Ended(code, *capsys.readouterr())

    return command


# The answer


def test_the_answer_has_the_bytes_of_the_library(run: Command, model: Path) -> None:
    answer = run("--json", "--context", 1000).json
    found = Memory.of(str(model))
    context = found.context(1000)
    assert set(answer) == KEYS
    assert answer["weights_bytes"] == found.weights_bytes
    assert answer["layers_bytes"] == context.layers_bytes == 1024 * 1024
    assert answer["conversation_bytes"] == context.bytes
    assert answer["bytes_per_token"] == 1024
    assert answer["layers"] == [
        {
            "kind": "KVCache", "count": 2, "bytes": 1024 * 1024, "bytes_per_token": 1024.0,
            "state_bytes": 1000 * 1024,
        }
    ]  # fmt: skip
    assert answer["pass_bytes"] == found.pass_bytes(1000)
    assert answer["total_bytes"] == found.bytes(1000)
    assert answer["disk"]["raw_bytes"] == context.raw_bytes
    assert answer["fits"] is True


def test_without_a_context_it_is_that_which_the_model_was_made_for(run: Command) -> None:
    answer = run("--json").json
    assert answer["context"] == answer["trained_context"] == 2048
    assert answer["beyond_trained"] is False


def test_where_a_model_does_not_say_it_is_4096(run: Command, tmp_path: Path) -> None:
    path = tiny.on_disk(tmp_path)
    settings = json.loads((path / "config.json").read_text())
    del settings["max_position_embeddings"]
    (path / "config.json").write_text(json.dumps(settings))
    answer = run("--json", model=path).json
    assert (answer["context"], answer["trained_context"]) == (4096, None)
    assert "the model was made for" not in run(model=path).out


def test_a_context_beyond_what_the_model_was_made_for_is_told(run: Command) -> None:
    assert run("--json", "--context", 2049).json["beyond_trained"] is True
    first = run("--context", 2049).out.splitlines()[0]
    assert first.endswith("2,049 tokens, one conversation; the model was made for 2,048")


def test_a_context_of_one_token_is_one(run: Command) -> None:
    lines = run("--context", 1).out.splitlines()
    assert lines[0].endswith("a context of one token, one conversation")
    assert any(line.startswith("one pass of 1          about") for line in lines)


def test_the_modes_are_one_a_few_and_as_many_as_fit(run: Command) -> None:
    ask = ("--json", "--context", 1000, "--memory", "60MB", "--mode")
    one, few, all_of_them = (run(*ask, m).json for m in ("interactive", "local", "server"))
    assert (one["conversations"], few["conversations"]) == (1, 4)
    assert all_of_them["conversations"] == one["conversations_that_fit"] > 4
    assert few["total_bytes"] - one["total_bytes"] == 3 * one["conversation_bytes"]
    room = 60_000_000 - all_of_them["total_bytes"]
    assert 0 <= room < one["conversation_bytes"]
    assert few["longest_context"] < one["longest_context"] == all_of_them["longest_context"]


def test_what_does_not_fit_is_told(run: Command) -> None:
    answer = run("--json", "--memory", "100kB").json
    assert answer["fits"] is False
    assert answer["memory_bytes"] == 100_000
    assert (answer["conversations_that_fit"], answer["longest_context"]) == (0, 0)
    assert "does not fit the 100.0 kB given" in run("--memory", "100kB").out


def test_layers_without_end_are_told(run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "LONGEST", 10_000)
    answer = run("--json", "--memory", "10GB").json
    assert (answer["endless"], answer["longest_context"]) == (True, None)
    assert "longest that fits      any" in run("--memory", "10GB").out


def test_where_nobody_knows_how_much_there_is_nothing_is_said_of_it(
    run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "memory_bytes", lambda: None)
    answer = run("--json").json
    assert [answer[k] for k in ("memory_bytes", "fits", "longest_context")] == [None, None, None]
    ended = run()
    assert ended.code == 0
    assert "fit" not in ended.out


def test_the_table_names_every_kind_of_layer(run: Command, tmp_path: Path) -> None:
    ended = run("--context", 1000, model=tiny.on_disk(tmp_path, "hybrid"))
    lines = ended.out.splitlines()
    assert (ended.code, ended.err) == (0, "")
    assert [line.split()[0] for line in lines[2:4]] == ["ArraysCache", "KVCache"]
    assert lines[3].split()[1:] == ["1", "262.1", "kB", "256", "B", "256.0", "kB"]
    assert any(line.startswith("one pass of 512        about") for line in lines)


def test_quantised_layers_are_those_of_the_options(run: Command, model: Path) -> None:
    ask = ("--kv-bits", 8, "--kv-group-size", 32, "--quantized-kv-start", 600, "--json")
    early, late = (run(*ask, "--context", n).json for n in (599, 1000))
    assert [k["kind"] for a in (early, late) for k in a["layers"]] == [
        "KVCache", "QuantizedKVCache",
    ]  # fmt: skip
    found = Memory.of(str(model), kv=KVSettings(8, 32, 600))
    assert late["layers_bytes"] == found.context(1000).layers_bytes
    assert late["disk"]["ratio_source"] == "measured with SmolLM2 in 8 bits"
    assert early["disk"]["ratio_source"] == "measured with SmolLM2 in float32"


# The ratio


def test_the_ratio_is_that_of_the_store_if_it_holds_such_states(
    run: Command, model: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    ask = ("--json", "--context", 300, "--cache-dir", store)
    assert run(*ask).json["disk"]["ratio"] == 0.835
    assert not store.exists()
    run("-p", PROMPT, "-n", 1, "--cache-dir", store, name="generate")
    disk = run(*ask).json["disk"]
    assert disk["ratio_source"] == "measured in this store"
    files = [p for kind in ("blocks", "snapshots") for p in (store / kind).rglob("*.safetensors")]
    stored = sum(path.stat().st_size for path in files)
    held = Store(store)
    raw = sum(
        held.header(kind, s).raw_bytes for kind in (BLOCKS, SNAPSHOTS) for s in held.stems(kind)
    )
    assert disk["ratio"] == round(stored / raw, 3) != 0.835
    assert disk["bytes"] == round(disk["raw_bytes"] * stored / raw)
    for other in (("--kv-bits", 8, "--kv-group-size", 32), ("--max-kv-size", 40)):
        assert run(*ask, *other).json["disk"]["ratio_source"] != "measured in this store"


def test_states_of_other_models_in_one_store_do_not_count(run: Command, tmp_path: Path) -> None:
    store, other = tmp_path / "store", tiny.on_disk(tmp_path / "other", "hybrid")
    run("-p", PROMPT, "-n", 1, "--cache-dir", store, name="generate", model=other)
    assert run("--json", "--cache-dir", store).json["disk"]["ratio"] == 0.835


def test_damaged_files_do_not_count(run: Command, tmp_path: Path) -> None:
    store = tmp_path / "store"
    run("-p", PROMPT, "-n", 1, "--cache-dir", store, name="generate")
    for kind, source in (("snapshots", "measured in this store"), ("blocks", "with SmolLM2")):
        for path in (store / kind).rglob("*.safetensors"):
            path.write_bytes(b"no more")
        assert source in run("--json", "--cache-dir", store).json["disk"]["ratio_source"]


def test_where_nothing_was_measured_a_byte_is_a_byte() -> None:
    assert compression.usual("float32", 2) == (1.0, "not measured for 2 bits")
    assert compression.usual("float64").value == 1.0


# What cannot be


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--context", 0), "--context"),
        (("--context", 1 << 40), "--context"),
        (("--memory", "much"), "is not a size such as"),
        (("--mode", "batch"), "--mode"),
        (("--kv-bits", 7), "not to 7"),
    ],
)
def test_wrong_usage_is_told(arguments: tuple[Any, ...], sentence: str, run: Command) -> None:
    ended = run(*arguments)
    assert (ended.code, ended.out) == (2, "")
    assert sentence in ended.err


def test_what_is_no_model_is_one_sentence(run: Command, tmp_path: Path) -> None:
    for name, sentence in (
        (tmp_path, "it has no config.json"),
        (tmp_path / "none", "there is no model directory"),
        ("nobody/nothing", "no such repo has been downloaded yet"),
    ):
        ended = run(model=name)
        assert (ended.code, ended.out, len(ended.err.splitlines())) == (1, "", 1)
        assert sentence in ended.err


def test_layers_that_cannot_be_quantised_are_one_sentence(run: Command, tmp_path: Path) -> None:
    ended = run("--kv-bits", 8, "--kv-group-size", 32, model=tiny.on_disk(tmp_path, "rotating"))
    assert (ended.code, ended.out, len(ended.err.splitlines())) == (1, "", 1)
    assert "leave --kv-bits out" in ended.err


def test_nothing_is_written(run: Command, model: Path) -> None:
    before = sorted(path.name for path in model.rglob("*"))
    run("--json")
    assert sorted(path.name for path in model.rglob("*")) == before
