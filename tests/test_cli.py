"""The command line: its options, its JSON, its exit codes and its sentences.

Most commands run in this process, on a tiny model that lies on disk; what is about processes
(signals, two at once, a read-only mount, a full disk) runs in real ones.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest

import processes
import tiny
from mlx_promptcache import Sampling, cli
from mlx_promptcache.cli.choices import SamplingChoice
from mlx_promptcache.store import BLOCKS, SNAPSHOTS, Store

PROMPT = "The cat sat on the mat, and the dog sat on the cat. " * 8
KEYS = {
    "text", "tokens", "finish_reason", "prompt_tokens", "cached_tokens", "prefilled_tokens", "hit",
    "source", "miss_reason", "load_seconds", "prefill_seconds", "ttft_seconds", "total_seconds",
    "generation_tokens", "generation_tps", "saved", "peak_memory_bytes", "seed",
}  # fmt: skip
GREEDY = ("-n", "5", "--temp", "0")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.on_disk(tmp_path_factory.mktemp("models") / "tiny")


class Program:
    """Runs commands in this process against one model and one store."""

    def __init__(self, model: Path, store: Path, capture: pytest.CaptureFixture[str]) -> None:
        self.model, self.directory, self._capture = model, store, capture
        self.store = Store(store)

    def __call__(self, command: str, *arguments: str | Path) -> processes.Ended:
        chosen = ["-m", str(self.model), "--cache-dir", str(self.directory)]
        code = cli.run([command, *map(str, arguments), *chosen])
        out, err = self._capture.readouterr()
        return processes.Ended(code, out, err)

    def generate(self, *arguments: str | Path) -> dict[str, Any]:
        return self("generate", *GREEDY, "--json", *arguments).json


@pytest.fixture
def program(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Program:
    return Program(tiny_model, tmp_path / "store", capsys)


def one_line(ended: processes.Ended, code: int = 1) -> str:
    """The only line on standard error of a command that failed as it should."""
    assert (ended.code, ended.out) == (code, "")
    lines = ended.err.splitlines()
    assert len(lines) == 1, ended.err
    assert lines[0].startswith("mlx-promptcache: ")
    return lines[0]


# generate


def test_generate_says_all_that_its_json_promises(program: Program) -> None:
    answer = program.generate("-p", PROMPT)
    assert set(answer) == KEYS
    assert answer["hit"] == "none"
    assert answer["generation_tokens"] == len(answer["tokens"])
    assert set(answer["saved"]) == {
        "name", "snapshot", "blocks_written", "blocks_shared", "bytes_written",
    }  # fmt: skip
    on_disk = sum(
        p.stat().st_size
        for kind in ("blocks", "snapshots")
        for p in (program.directory / kind).rglob("*.safetensors")
    )
    assert answer["saved"]["bytes_written"] == on_disk


def test_the_same_prompt_again_is_an_exact_hit_with_the_same_text(program: Program) -> None:
    cold, warm = program.generate("-p", PROMPT), program.generate("-p", PROMPT)
    assert (warm["hit"], warm["prefilled_tokens"]) == ("exact", 0)
    assert (warm["text"], warm["tokens"]) == (cold["text"], cold["tokens"])
    assert warm["saved"]["bytes_written"] == 0


def test_text_goes_to_standard_output_and_nothing_else_does(program: Program) -> None:
    text = program.generate("-p", PROMPT)["text"]
    ended = program("generate", *GREEDY, "-p", PROMPT)
    assert (ended.code, ended.out, ended.err) == (0, text + "\n", "")


def test_a_prompt_that_begins_alike_reuses_what_agrees(program: Program) -> None:
    program.generate("-p", PROMPT + "one")
    answer = program.generate("-p", PROMPT + "two")
    assert answer["hit"] == "prefix"
    assert 0 < answer["prefilled_tokens"] < 30
    assert answer["cached_tokens"] + answer["prefilled_tokens"] == answer["prompt_tokens"]


def test_a_declared_prefix_is_a_snapshot_of_its_own(program: Program) -> None:
    program.generate("--prefix", PROMPT, "-p", "one")
    answer = program.generate("--prefix", PROMPT, "-p", "two")
    assert answer["hit"] == "prefix"
    assert answer["source"] in {stem.rpartition("-")[2] for stem in program.store.stems(SNAPSHOTS)}


def test_prompts_come_from_files_and_standard_input_too(
    program: Program, tmp_path: Path, tiny_model: Path
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT, "utf-8")
    expected = program.generate("-p", PROMPT)["tokens"]
    assert program.generate("--prompt-file", file)["tokens"] == expected
    chosen = ("-m", tiny_model, "--cache-dir", program.directory, *GREEDY, "--json")
    piped = processes.run("generate", "-p", "-", *chosen, stdin=PROMPT).json
    assert (piped["tokens"], piped["hit"]) == (expected, "exact")


def test_messages_and_the_options_that_make_them_are_one(program: Program, tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "Hello"}, {"role": "user", "content": "cat"}]
    file = tmp_path / "chat.json"
    file.write_text(json.dumps(chat), "utf-8")
    by_options = program.generate("--system-prompt", "Hello", "-p", "cat")
    by_messages = program.generate("--messages", file)
    assert by_messages["hit"] == "exact"
    assert by_messages["tokens"] == by_options["tokens"]


def test_stop_texts_end_the_text_before_themselves(program: Program) -> None:
    text = program.generate("-p", PROMPT, "-n", "12")["text"]
    stop = text[3:5]
    answer = program.generate("-p", PROMPT, "-n", "12", "--stop", stop)
    assert answer["text"] == text[: text.index(stop)]
    assert answer["finish_reason"] == "stop"


def test_a_seed_is_told_and_gives_the_same_again(program: Program) -> None:
    first = program.generate("-p", PROMPT, "--temp", "1")
    again = program.generate("-p", PROMPT, "--temp", "1", "--seed", str(first["seed"]))
    others = {
        tuple(program.generate("-p", PROMPT, "--temp", "1", "--seed", str(s))["tokens"])
        for s in range(4)
    }
    assert again["tokens"] == first["tokens"]
    assert len(others) > 1


def test_no_prompt_cache_neither_reads_nor_writes(program: Program) -> None:
    program.generate("-p", PROMPT)
    before = snapshot_of(program.directory)
    answer = program.generate("-p", PROMPT, "--no-prompt-cache")
    assert (answer["hit"], answer["saved"]) == ("none", None)
    assert snapshot_of(program.directory) == before


def test_read_only_reuses_and_leaves_no_trace(program: Program) -> None:
    program.generate("-p", PROMPT + "one")
    before = snapshot_of(program.directory)
    answer = program.generate("-p", PROMPT + "two", "--prompt-cache-ro")
    assert (answer["hit"], answer["saved"]) == ("prefix", None)
    assert snapshot_of(program.directory) == before


def snapshot_of(directory: Path) -> dict[str, tuple[bytes, int, int]]:
    return {
        str(path): (path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino)
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def test_exact_runs_find_their_own_rows_the_next_time(program: Program) -> None:
    program.generate("-p", PROMPT + "one")
    first = program.generate("-p", PROMPT + "two", "--exact")
    second = program.generate("-p", PROMPT + "two", "--exact")
    assert first["tokens"] == second["tokens"]
    assert second["hit"] == "exact"


def test_contradicting_options_are_wrong_usage(program: Program) -> None:
    assert program("generate", "-p", "a", "--no-prompt-cache", "--save-as", "x").code == 2
    assert program("generate", "-p", "a", "--prompt-file", "b").code == 2
    assert program("generate", "-p", "a", "--prompt-cache-ro", "--prompt-cache-all").code == 2
    assert program("generate", "-p", "a", "--temp", "-1").code == 2
    assert program("generate", "--no-such-option").code == 2


# save, load, names


def test_a_saved_text_is_continued_inside_its_message(program: Program) -> None:
    saved = program("save", "few", "-p", PROMPT, "--json").json
    assert set(saved) >= {
        "name", "snapshot", "tokens", "bytes_written", "blocks_written", "blocks_shared",
        "prefill_seconds", "raw_bytes",
    }  # fmt: skip
    answer = program.generate("--prompt-cache", "few", "-p", "Question: what is")
    whole = program.generate("-p", PROMPT + "Question: what is", "--no-prompt-cache")
    assert (answer["hit"], answer["source"]) == ("prefix", "few")
    assert answer["cached_tokens"] == saved["tokens"]
    assert answer["tokens"] == whole["tokens"]


def test_saved_messages_are_continued_by_a_message(program: Program, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "cat"}, {"role": "assistant", "content": "dog"}]
    file = tmp_path / "chat.json"
    file.write_text(json.dumps(chat), "utf-8")
    saved = program("save", "talk", "--messages", file, "--json").json
    answer = program.generate("--prompt-cache", "talk", "-p", "mat")
    file.write_text(json.dumps([*chat, {"role": "user", "content": "mat"}]), "utf-8")
    whole = program.generate("--messages", file, "--no-prompt-cache")
    assert answer["cached_tokens"] >= saved["tokens"]
    assert answer["tokens"] == whole["tokens"]


def test_a_run_goes_on_from_its_name_as_if_it_had_never_stopped(program: Program) -> None:
    options = ("--temp", "1", "--top-p", "0.9", "--repetition-penalty", "1.1", "--seed", "3")
    straight = program("generate", "-p", PROMPT, "-n", "20", "--json", *options).json
    first = program("generate", "-p", PROMPT, "-n", "8", "--json", "--save-as", "half", *options)
    rest = program("load", "half", "-n", "12", "--json").json
    assert first.json["tokens"] + rest["tokens"] == straight["tokens"]
    assert (rest["hit"], rest["prefilled_tokens"]) == ("exact", 0)


SETTINGS = {  # every option that becomes a field of `Sampling`, and what it becomes
    "--temp": ("1.25", 1.25),
    "--top-p": ("0.9", 0.9),
    "--top-k": ("50", 50),
    "--min-p": ("0.01", 0.01),
    "--min-tokens-to-keep": ("2", 2),
    "--xtc-probability": ("0.5", 0.5),
    "--xtc-threshold": ("0.02", 0.02),
    "--logit-bias": ("7=1.5", {"7": 1.5}),
    "--repetition-penalty": ("1.1", 1.1),
    "--repetition-context-size": ("30", 30),
    "--presence-penalty": ("0.25", 0.25),
    "--presence-context-size": ("40", 40),
    "--frequency-penalty": ("-0.25", -0.25),
    "--frequency-context-size": ("50", 50),
}


def settings_of(program: Program, name: str) -> dict[str, Any]:
    found: dict[str, Any] = program("show", name, "--json").json["sampling"]
    return found


@pytest.mark.parametrize("option", SETTINGS)
def test_every_sampling_option_reaches_the_sampling_and_nothing_else(
    option: str, program: Program
) -> None:
    given, expected = SETTINGS[option]
    field = option[2:].replace("-", "_")
    plain = Sampling().to_json()
    program("generate", "-p", PROMPT, "-n", "1", "--save-as", "plain")
    assert settings_of(program, "plain") == plain
    program("generate", "-p", PROMPT, "-n", "1", "--save-as", "one", option, given)
    program("load", "plain", "-n", "1", "--save-as", "other", option, given)
    for name in ("one", "other"):
        found = settings_of(program, name)
        found["xtc_special_tokens"] = []
        assert found == {**plain, field: expected} != plain
    program("load", "one", "-n", "1", "--save-as", "again")
    assert settings_of(program, "again") == settings_of(program, "one")


def test_there_is_an_option_for_every_setting_but_what_the_tokenizer_knows() -> None:
    fields = {f.name for f in dataclasses.fields(Sampling)}
    options = {option[2:].replace("-", "_") for option in SETTINGS}
    assert options | {"seed"} == fields - {"xtc_special_tokens"}


def test_xtc_spares_line_ends_and_end_tokens_as_mlx_lm_does(program: Program) -> None:
    tokenizer = mlx_lm.load(str(program.model))[1]
    special = sorted({*tokenizer.encode("\n"), *tokenizer.eos_token_ids})
    assert len(special) >= 2
    asked = ("--xtc-probability", "0.5")
    program("generate", "-p", PROMPT, "-n", "1", "--save-as", "plain")
    program("generate", "-p", PROMPT, "-n", "1", "--save-as", "xtc", *asked)
    program("load", "plain", "-n", "1", "--save-as", "other", *asked)
    for name, spared in (("plain", []), ("xtc", special), ("other", special)):
        assert settings_of(program, name)["xtc_special_tokens"] == spared


def test_a_state_goes_on_with_its_key_whatever_seed_its_settings_name() -> None:
    asked = SamplingChoice(**dict.fromkeys(SamplingChoice._fields))
    assert asked.sampling(Sampling(temp=0.5, seed=1)) == Sampling(temp=0.5)
    assert asked._replace(seed=2).sampling(Sampling(seed=1)) == Sampling(seed=2)


def test_biases_add_up_to_one_setting_and_what_is_none_is_wrong_usage(program: Program) -> None:
    biases = ("--logit-bias", "7=1.5", "--logit-bias", "9=-100")
    program("generate", "-p", PROMPT, "-n", "1", "--save-as", "two", *biases)
    assert settings_of(program, "two")["logit_bias"] == {"7": 1.5, "9": -100.0}
    for wrong in ("7", "7=", "=7", "seven=1", "7=1=2", "7=nan", "-7=1"):
        ended = program("generate", "-p", PROMPT, "--logit-bias", wrong)
        assert (ended.code, ended.out) == (2, "")
    beyond = program("generate", "-p", PROMPT, "--logit-bias", "100000=1")
    assert "this model has" in one_line(beyond)


def test_a_run_with_every_setting_goes_on_from_its_name_as_well(program: Program) -> None:
    options = [part for option, (given, _) in SETTINGS.items() for part in (option, given)]
    options += ["--seed", "3", "--json"]
    straight = program("generate", "-p", PROMPT, "-n", "20", *options).json
    first = program("generate", "-p", PROMPT, "-n", "8", "--save-as", "half", *options).json
    chosen = ("-m", program.model, "--cache-dir", program.directory)
    rest = processes.run("load", "half", "-n", "12", "--json", *chosen).json
    assert first["tokens"] + rest["tokens"] == straight["tokens"]


def test_settings_that_make_no_sense_are_told_before_the_model_is_looked_for() -> None:
    assert cli.run(["generate", "-p", "a", "-m", "no/such/model", "--xtc-threshold", "0.6"]) == 2
    assert cli.run(["generate", "-p", "a", "-m", "no/such/model", "--xtc-threshold", "0.5"]) == 1


def test_load_without_a_number_tells_the_likeliest_tokens(program: Program) -> None:
    program("save", "few", "-p", PROMPT)
    told = program("load", "few", "--json").json["next_tokens"]
    assert len(told) == 5
    assert [t["logprob"] for t in told] == sorted((t["logprob"] for t in told), reverse=True)
    assert "likeliest" in program("load", "few").out


def test_a_name_is_not_taken_from_another_state_by_accident(program: Program) -> None:
    program("save", "few", "-p", PROMPT)
    assert "--force" in one_line(program("save", "few", "-p", "Something else"))
    assert program("save", "few", "-p", PROMPT).code == 0
    assert program("save", "few", "-p", "Something else", "--force").code == 0
    assert program("show", "few", "--text").out == "Something else\n"


# list, show, clear, verify


def test_list_tells_what_is_stored_newest_first(program: Program) -> None:
    program("save", "old", "-p", "cat " * 20)
    program("save", "new", "-p", PROMPT)
    listed = program("list", "--json").json
    assert set(listed) == {"entries", "total_bytes", "blocks"}
    assert [e["name"] for e in listed["entries"]] == ["new", "old"]
    assert set(listed["entries"][0]) == {
        "name", "snapshot", "tokens", "bytes", "shared_bytes", "raw_bytes", "created", "last_used",
        "hits", "status", "reason",
    }  # fmt: skip
    files = [p.stat().st_size for p in program.directory.rglob("*.safetensors")]
    assert listed["total_bytes"] == sum(files)
    own = sum(e["bytes"] for e in listed["entries"])
    shared = max(e["shared_bytes"] for e in listed["entries"])
    kept = [p.stat().st_size for p in program.directory.rglob("tokenizers/*/*.safetensors")]
    assert own + shared == sum(files) - sum(kept)
    assert len(kept) == 1
    assert "new" in program("list").out


def test_list_counts_hits(program: Program) -> None:
    program("save", "few", "-p", PROMPT)
    for _ in range(3):
        program.generate("--prompt-cache", "few", "-p", "dog")
    hits = {e["name"]: e["hits"] for e in program("list", "--json").json["entries"]}
    assert hits["few"] == 1  # the first; the others were exact hits of the longer prompt
    assert hits[None] == 2


def test_show_tells_everything_about_a_state(program: Program) -> None:
    program("save", "few", "-p", PROMPT)
    shown = program("show", "few", "--json", "--tokens").json
    assert shown["text"] == PROMPT
    assert len(shown["token_ids"]) == shown["tokens"]
    assert {"weights", "config", "adapter", "kv", "salt"} <= set(shown["fingerprint"])
    assert {row["name"] for row in shown["arrays"]} >= {"keys/0", "values/0", "logits", "rng"}
    assert program("show", "few", "--tokens").out.split() == list(map(str, shown["token_ids"]))
    assert "fingerprint" in program("show", "few").out


def test_clear_shows_the_plan_that_it_carries_out(program: Program) -> None:
    program("save", "few", "-p", PROMPT)
    program("save", "other", "-p", PROMPT + "Question: what is two plus two?")
    files = sum(p.stat().st_size for p in program.directory.rglob("*.safetensors"))
    planned = program("clear", "other", "--dry-run", "--json").json
    assert sum(p.stat().st_size for p in program.directory.rglob("*.safetensors")) == files
    done = program("clear", "other", "--yes", "--json").json
    left = sum(p.stat().st_size for p in program.directory.rglob("*.safetensors"))
    assert planned["freed_bytes"] == done["freed_bytes"] == files - left > 0
    assert planned["removed"] == done["removed"]
    assert program("verify").code == 0
    assert program.generate("--prompt-cache", "few", "-p", "dog")["source"] == "few"


def test_clear_asks_before_it_deletes(program: Program) -> None:
    program("save", "few", "-p", PROMPT)
    ended = program("clear", "few")
    assert ended.code == 1
    assert "--yes" in ended.err
    assert program("show", "few").code == 0
    assert program("clear").code == 2


def test_clear_all_leaves_nothing(program: Program) -> None:
    program("save", "few", "-p", PROMPT)
    program.generate("-p", "Something else")
    assert program("clear", "--all", "--yes").code == 0
    assert list(program.directory.rglob("*.safetensors")) == []
    assert program("list", "--json").json["entries"] == []


def test_clear_chooses_by_name_age_and_damage(program: Program) -> None:
    program("save", "few", "-p", PROMPT)
    program.generate("-p", "Something else")
    assert program("clear", "--older-than", "1h", "--yes", "--json").json["removed"] == []
    assert program("clear", "--older-than", "soon", "--yes").code == 2
    removed = program("clear", "--unnamed", "--yes", "--json").json["removed"]
    assert len(removed) == 1
    (snapshot,) = program.store.stems(SNAPSHOTS)
    damage(program.store.path(SNAPSHOTS, snapshot))
    assert "few" in program("clear", "--damaged", "--yes", "--json").json["removed"]
    assert program("list", "--json").json["entries"] == []


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_verify_finds_damage_and_sets_it_aside(program: Program) -> None:
    program("save", "few", "-p", PROMPT)
    assert program("verify", "--json").json["damaged"] == []
    damage(program.store.path(BLOCKS, program.store.stems(BLOCKS)[0]))
    ended = program("verify", "--json")
    assert ended.code == 3
    assert [d["kind"] for d in json.loads(ended.out)["damaged"]] == [BLOCKS]
    assert json.loads(program("verify", "--quarantine", "--json").out)["quarantined"] == 1
    assert program("verify", "few").code == 3  # its block is not there any more
    assert program("generate", *GREEDY, "--prompt-cache", "few", "-p", "dog").code == 0


# What is never used


def test_other_settings_are_a_miss_that_says_which(program: Program) -> None:
    program.generate("-p", PROMPT)
    for options, reason in (
        (("--salt", "mine"), "another salt"),
        (("--kv-bits", "8", "--kv-group-size", "32"), "other KV cache settings"),
    ):
        answer = program.generate("-p", PROMPT, *options)
        assert answer["hit"] == "none"
        assert reason in answer["miss_reason"]


def test_another_adapter_is_a_miss_also_under_the_same_path(
    program: Program, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    write_adapter(adapter, 1)
    plain = program.generate("-p", PROMPT)
    first = program.generate("-p", PROMPT, "--adapter-path", adapter)
    assert first["hit"] == "none"
    assert "another adapter" in first["miss_reason"]
    assert first["tokens"] != plain["tokens"]
    assert program.generate("-p", PROMPT, "--adapter-path", adapter)["hit"] == "exact"
    write_adapter(adapter, 2)
    assert program.generate("-p", PROMPT, "--adapter-path", adapter)["hit"] == "none"


def write_adapter(directory: Path, seed: int) -> None:
    directory.mkdir(exist_ok=True)
    config: dict[str, Any] = {"fine_tune_type": "lora", "num_layers": 2}
    config["lora_parameters"] = {
        "rank": 4, "scale": 20.0, "dropout": 0.0, "keys": ["self_attn.q_proj"],
    }  # fmt: skip
    (directory / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    size = 64
    heads = 4 * 32
    weights = {}
    for layer in range(2):
        key = mx.random.key(seed * 10 + layer)
        name = f"model.layers.{layer}.self_attn.q_proj"
        weights[f"{name}.lora_a"] = mx.random.normal((size, 4), key=key)
        weights[f"{name}.lora_b"] = mx.random.normal((4, heads), key=key)
    mx.save_safetensors(str(directory / "adapters.safetensors"), weights)


def test_replaced_weights_are_a_miss_and_the_old_states_are_stale(
    program: Program, tiny_model: Path, tmp_path: Path
) -> None:
    program.model = tmp_path / "model"
    shutil.copytree(tiny_model, program.model)
    program("save", "few", "-p", PROMPT)
    weights = mx.load(str(program.model / "model.safetensors"))
    assert isinstance(weights, dict)
    other = {name: value * 1.5 for name, value in weights.items()}
    mx.save_safetensors(str(program.model / "model.safetensors"), other, {"format": "mlx"})
    answer = program.generate("--prompt-cache", "few", "-p", "dog")
    assert answer["hit"] == "none"
    assert "other weights" in answer["miss_reason"]
    entries = {e["name"]: e for e in program("list", "--json").json["entries"]}
    assert entries["few"]["status"] == "stale"
    assert "other weights" in entries["few"]["reason"]
    assert "other weights" in one_line(program("load", "few"))
    assert "few" in program("clear", "--stale", "--yes", "--json").json["removed"]


# Bad input


def test_a_model_that_is_not_there_is_one_sentence(program: Program, tmp_path: Path) -> None:
    program.model = tmp_path / "nothing"
    assert "no model" in one_line(program("generate", "-p", "a"))
    program.model = tmp_path
    assert "config.json" in one_line(program("generate", "-p", "a"))


def test_a_name_that_is_not_there_is_one_sentence(program: Program) -> None:
    program.generate("-p", PROMPT)
    for command in (
        ("generate", "--prompt-cache", "nobody", "-p", "a"), ("load", "nobody"),
        ("show", "nobody"), ("clear", "nobody", "--yes"), ("verify", "nobody"),
    ):  # fmt: skip
        assert "no state named 'nobody'" in one_line(program(*command))


def test_an_empty_prompt_is_one_sentence(program: Program, tmp_path: Path) -> None:
    assert "empty" in one_line(program("generate", "-p", ""))
    assert "empty" in one_line(program("generate"))
    assert "empty" in one_line(program("save", "few"))
    assert "cannot be read" in one_line(program("generate", "--prompt-file", tmp_path / "none"))
    (tmp_path / "bad.json").write_text("{", "utf-8")
    assert "not JSON" in one_line(program("generate", "--messages", tmp_path / "bad.json"))


def test_a_prompt_longer_than_the_context_is_one_sentence(program: Program) -> None:
    assert "context" in one_line(program("generate", "-p", "cat " * 4000))


def test_a_name_with_a_slash_is_one_sentence(program: Program) -> None:
    for name in ("a/b", "../up", ".hidden", "", "line\nend"):
        assert "cannot be a name" in one_line(program("save", name, "-p", PROMPT))
    assert not (program.directory.parent / "up").exists()


def test_a_directory_that_is_no_store_is_one_sentence(program: Program) -> None:
    program.directory.mkdir()
    (program.directory / "letters.txt").write_text("private", "utf-8")
    for command in (("generate", "-p", "a"), ("list",), ("save", "x", "-p", "a"), ("verify",)):
        assert "not a store" in one_line(program(*command))
    program.directory = program.directory / "letters.txt"
    assert "is a file" in one_line(program("generate", "-p", "a"))


def test_a_store_that_cannot_be_read_is_a_miss_with_a_notice_to_a_run_and_an_error_else(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    program("save", "few", "-p", PROMPT)
    before = snapshot_of(program.directory)
    with monkeypatch.context() as then:
        for name in ("listdir", "scandir"):
            then.setattr(os, name, refusing(program.directory, getattr(os, name)))
        ran = program("generate", *GREEDY, "-p", PROMPT, "--json")
        for command in (
            ("list",),
            ("verify",),
            ("prune",),
            ("save", "x", "-p", "a"),
            ("load", "few"),
        ):
            assert one_line(program(*command)).endswith("choose another --cache-dir"), command
    assert (ran.json["hit"], ran.json["saved"]) == ("none", None)
    assert "not used: the store" in ran.err
    assert "cannot be read: Permission denied" in ran.err
    assert snapshot_of(program.directory) == before


def refusing(directory: Path, original: Any) -> Any:
    """A look into directories that may not be looked into at and below one."""

    def look(path: Any) -> Any:
        if str(path).startswith(str(directory)):
            raise PermissionError(13, "Permission denied")
        return original(path)

    return look


FULL_DISK = """
import resource, sys
from mlx_promptcache import Sampling, cli
from mlx_promptcache.cli.choices import SamplingChoice
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
code = cli.run(sys.argv[1:])
print(code)
"""


def limited(program: Program, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a process whose files cannot grow, as on a full disk."""
    chosen = ["-m", str(program.model), "--cache-dir", str(program.directory)]
    return subprocess.run(
        [sys.executable, "-c", FULL_DISK, *arguments, *chosen],
        capture_output=True, text=True, env=processes.environment(), check=False, timeout=300,
    )  # fmt: skip


def test_a_full_disk_is_a_notice_to_a_run_and_an_error_to_a_save(program: Program) -> None:
    ran = limited(program, "generate", *GREEDY, "-p", PROMPT)
    assert ran.stdout.splitlines()[-1] == "0"
    assert "was not kept: cannot write to the store" in ran.stderr
    saved = limited(program, "save", "few", "-p", PROMPT)
    assert saved.stdout.splitlines() == ["1"]
    assert "cannot write to the store" in saved.stderr
    left = [p for p in program.directory.rglob("*") if p.is_file() and ".tmp" in p.name]
    assert left == []
    assert program("verify").code == 0


def test_a_directory_that_cannot_be_written_is_read_and_told(program: Program) -> None:
    program("save", "few", "-p", PROMPT)
    ran = without_write_permission(program, "generate", *GREEDY, "--prompt-cache", "few", "-p", "a")
    assert ran.returncode == 0, ran.stderr
    assert "was not kept" in ran.stderr
    assert "Traceback" not in ran.stderr
    saved = without_write_permission(program, "save", "other", "-p", "Something else")
    assert (saved.returncode, saved.stdout) == (1, "")
    assert len(saved.stderr.splitlines()) == 1


def without_write_permission(program: Program, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a process that can only read the store: permissions mean nothing to root,
    so for root the store is mounted read-only, in a namespace of that process alone."""
    chosen = ["-m", str(program.model), "--cache-dir", str(program.directory)]
    command = [sys.executable, "-m", "mlx_promptcache", *arguments, *chosen]
    if os.geteuid() == 0:
        mount = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
        command = ["unshare", "-m", "sh", "-c", mount, str(program.directory), *command]
        if subprocess.run(["unshare", "-m", "true"], check=False).returncode:
            pytest.skip("root cannot make a namespace here")
    directories = [program.directory, *(p for p in program.directory.rglob("*") if p.is_dir())]
    for path in directories:
        path.chmod(0o500)
    try:
        return subprocess.run(
            command, text=True, check=False, capture_output=True, env=processes.environment(),
            timeout=300,
        )  # fmt: skip
    finally:
        for path in directories:
            path.chmod(0o700)


# Processes


def test_ctrl_c_keeps_what_was_computed(program: Program) -> None:
    chosen = ("-m", program.model, "--cache-dir", program.directory)
    endless = ("-p", PROMPT, "-n", "-1", "--temp", "1", "--seed", "1", "--save-as", "end")
    process = processes.start("generate", *chosen, *endless)
    assert process.stdout is not None
    shown = process.stdout.read(1)  # it generates
    process.send_signal(signal.SIGINT)
    rest = process.stdout.read()  # `communicate` would pass over what is in the buffer already
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert program("verify").code == 0
    assert program.generate("-p", PROMPT)["hit"] == "exact"
    kept = program("show", "end", "--json").json
    assert kept["messages"][-1] == {"role": "assistant", "content": (shown + rest)[:-1]}


def test_two_processes_that_save_the_same_prompts_at_once_leave_a_sound_store(
    program: Program,
) -> None:
    script = (
        "import sys\n"
        "from mlx_promptcache import Runner\n"
        "runner = Runner.load(sys.argv[1], cache_dir=sys.argv[2])\n"
        "for i in range(30):\n"
        "    state = runner.prefill('The cat sat on the mat. ' * 9 + str(i))\n"
        "    runner.cache.save(f'state {i}', state, replace=True, sync=False)\n"
        "print('{}')\n"
    )
    command = [sys.executable, "-c", script, str(program.model), str(program.directory)]
    both = [
        subprocess.Popen(command, env=processes.environment(), stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in both:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    report = program("verify", "--json").json
    assert report["damaged"] == []
    entries = program("list", "--json").json["entries"]
    assert {e["name"] for e in entries} >= {f"state {i}" for i in range(30)}
    assert {e["status"] for e in entries} == {"ok"}


def test_a_debug_variable_shows_tracebacks_and_nothing_else_does(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "Traceback" not in program("load", "nobody").err
    monkeypatch.setenv("MLX_PROMPTCACHE_DEBUG", "1")
    with pytest.raises(Exception, match="nobody"):
        program("load", "nobody")


def test_python_dash_m_is_the_same_program() -> None:
    ended = processes.run("--help")
    assert ended.code == 0
    for command in cli.COMMANDS:
        assert command in ended.out


def test_a_stored_prompt_that_other_options_cannot_use_is_told(program: Program) -> None:
    program("save", "few", "-p", PROMPT)
    on = ("generate", *GREEDY, "--prompt-cache", "few", "-p", " on")
    assert program(*on).err == ""
    other = program(*on, "--salt", "x")
    assert other.code == 0
    assert "nothing of the state 'few' is used" in other.err
    assert "salt" in other.err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a full device")
def test_standard_output_without_room_is_one_sentence(program: Program) -> None:
    program("save", "few", "-p", PROMPT)
    line = (
        f"exec {sys.executable} -m mlx_promptcache list --cache-dir {program.directory} >/dev/full"
    )
    done = subprocess.run(
        ["sh", "-c", line], capture_output=True, text=True, env=processes.environment(),
        check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("mlx-promptcache: there is no room for what is printed")
    assert len(done.stderr.splitlines()) == 1


def test_a_name_that_is_taken_is_told_before_anything_is_computed(program: Program) -> None:
    program("save", "few", "-p", PROMPT)
    ended = program("save", "few", "-p", f"{PROMPT} and more of it", "--json")
    assert ended.code == 1
    assert "there is another state named 'few'" in ended.err
    assert [e["tokens"] for e in program("list", "--json").json["entries"]] == [
        program("show", "few", "--json").json["tokens"]
    ]  # nothing else was computed and kept


def test_a_name_that_a_run_takes_from_another_state_is_told(program: Program) -> None:
    few = ("generate", *GREEDY, "-p", PROMPT, "--save-as", "few")
    assert "stood for another state" not in program(*few).err
    assert "stood for another state" not in program(*few).err  # the same
    onto = ("generate", *GREEDY, "--prompt-cache", "few", "-p", " on", "--save-as", "few")
    assert "stood for another state" not in program(*onto).err
    assert (
        "stood for another state" not in program("load", "few", "-n", "2", "--save-as", "few").err
    )
    before = program("show", "few", "--json").json["snapshot"]
    told = program("generate", *GREEDY, "-p", "else", "--save-as", "few").err
    assert f"'few' stood for another state before, which has no name now: {before}" in told
    assert program("show", before).code == 0


@pytest.mark.parametrize("option", [("--salt", "x"), ("--max-kv-size", "512")])
def test_a_state_of_other_options_is_not_to_be_saved_again(
    option: tuple[str, ...], program: Program
) -> None:
    program("save", "few", "-p", PROMPT, *option)
    ended = program("load", "few")
    assert ended.code == 1
    assert "give the options that it was made with" in ended.err
    assert program("load", "few", *option).code == 0


def test_list_all_knows_every_store_that_was_written_to(program: Program, tmp_path: Path) -> None:
    program("save", "few", "-p", PROMPT)
    program.directory = tmp_path / "second"
    program("save", "more", "-p", PROMPT)
    entries = program("list", "--all", "--json").json["entries"]
    here = {e["name"]: e["store"] for e in entries if str(tmp_path) in e["store"]}
    assert here == {"few": str(tmp_path / "store"), "more": str(tmp_path / "second")}
    shutil.rmtree(tmp_path / "second")
    names = {e["name"] for e in program("list", "--all", "--json").json["entries"]}
    assert "more" not in names


@pytest.mark.parametrize("tree", [(), ("--tree",)])
def test_a_store_that_cannot_be_read_hides_no_other_from_list_all(
    tree: tuple[str, ...], program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "memos"))  # no stores of other tests
    program("save", "few", "-p", PROMPT)
    program.directory = tmp_path / "second"
    program("save", "more", "-p", PROMPT)
    scan = os.scandir

    def fails(path: Any = ".") -> Any:
        if str(path).startswith(f"{tmp_path}/second"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return scan(path)

    monkeypatch.setattr(os, "scandir", fails)
    ended = program("list", "--all", *tree)
    assert (ended.code, ended.err.count("second")) == (0, 1)
    assert "few" in ended.out
    assert "more" not in ended.out
    assert program("list", *tree).code == 1  # who asks for it is told


def test_a_store_whose_path_is_no_text_is_saved_to_and_listed(
    program: Program, tmp_path: Path
) -> None:
    program.directory = tmp_path / os.fsdecode(b"caf\xe9")
    assert program("save", "few", "-p", PROMPT).code == 0
    entries = program("list", "--all", "--json").json["entries"]
    assert str(program.directory) in {entry["store"] for entry in entries}


@pytest.mark.parametrize("option", ["--cache-dir", "-m"])
def test_a_home_that_is_not_there_is_one_sentence(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["list", option, "~nobody-of-that-name/x"]) == 1
    assert capsys.readouterr().err == (
        "mlx-promptcache: there is no home directory for '~nobody-of-that-name/x': "
        "give the path whole, or set HOME\n"
    )


@pytest.mark.parametrize("closed", [0, 1, 2])
def test_a_stream_that_is_closed_is_no_error(closed: int, program: Program) -> None:
    program("save", "few", "-p", PROMPT)
    chosen = f"-m {program.model} --cache-dir {program.directory}"
    for command in ("generate -n 2 -p cat", "list", "clear few --yes"):
        line = f"exec {sys.executable} -m mlx_promptcache {command} {chosen} {closed}>&-"
        done = subprocess.run(
            ["sh", "-c", line], capture_output=True, text=True, env=processes.environment(),
            check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, ""), command


def test_a_reader_that_goes_away_does_not_lose_what_was_computed(program: Program) -> None:
    chosen = ("-m", program.model, "--cache-dir", program.directory)
    process = processes.start("generate", *chosen, "-p", PROMPT, "-n", "-1", "--temp", "1")
    with process:
        assert process.stdout is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr is not None
        said = process.stderr.read()
        assert process.wait(timeout=120) == 1
    assert "Traceback" not in said
    assert program.generate("-p", PROMPT)["hit"] == "exact"


@pytest.mark.parametrize(
    "options",
    [
        ("--kv-bits", "7"), ("--kv-bits", "0"), ("--kv-bits", "8", "--kv-group-size", "0"),
        ("--seed", "-1"), ("--seed", str(2**64)), ("--temp", "nan"), ("--max-kv-size", "0"),
        ("--repetition-penalty", "nan"), ("--top-p", "2"), ("--xtc-probability", "1.5"),
        ("--xtc-threshold", "0.6"), ("--min-tokens-to-keep", "0"), ("--presence-penalty", "inf"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_wrong_usage(
    options: tuple[str, ...], program: Program
) -> None:
    ended = program("generate", *GREEDY, "-p", PROMPT, *options)
    assert (ended.code, ended.out) == (2, "")
    assert "Error" in ended.err


def test_kv_bits_that_the_model_cannot_take_are_one_sentence(program: Program) -> None:
    options = ("--kv-bits", "8", "--quantized-kv-start", "0")  # groups of 64, heads of 32
    assert "cannot be quantised" in one_line(program("generate", "-p", PROMPT, *options))


def test_prompts_that_are_no_text_are_told(program: Program) -> None:
    assert program("generate", "-p", "\udcff").code == 2
    chosen = ["-m", str(program.model), "--cache-dir", str(program.directory)]
    piped = subprocess.run(
        [sys.executable, "-m", "mlx_promptcache", "generate", "-p", "-", *chosen],
        input=b"\xff\xfe", capture_output=True, env=processes.environment(), check=False,
    )  # fmt: skip
    assert piped.returncode == 1
    assert b"not UTF-8" in piped.stderr


def test_an_interrupted_run_tells_what_it_did(program: Program) -> None:
    from mlx_promptcache.cli.session import Interrupted, Session

    class Impatient(Session):
        """Ctrl-C comes after the first pass of the prompt."""

        def progress(self) -> Any:
            import contextlib

            def show(done: int, total: int) -> None:
                if 0 < done < total:
                    raise Interrupted

            return contextlib.nullcontext(show)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlx_promptcache.cli.session.Session", Impatient)
        ended = program("generate", *GREEDY, "--json", "-p", PROMPT * 6)
    assert ended.code == 130
    answer = json.loads(ended.out)
    assert (answer["finish_reason"], answer["prefilled_tokens"]) == ("interrupted", 512)
    assert answer["cached_tokens"] + answer["prefilled_tokens"] == answer["prompt_tokens"]
    assert answer["saved"]["blocks_written"] == 2
    assert program.generate("-p", PROMPT * 6)["cached_tokens"] == 512


def test_states_of_another_format_are_left_where_they_are(program: Program) -> None:
    program("save", "few", "-p", PROMPT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlx_promptcache.container.VERSION", "2")
        assert program.generate("-p", PROMPT, "--prompt-cache-ro")["hit"] == "none"
        answer = program.generate("-p", "Something else")
        assert answer["hit"] == "none"
        assert program("verify").code == 0
        entries = {e["name"]: e for e in program("list", "--json").json["entries"]}
        assert entries["few"]["status"] == "stale"
        assert "format version" in one_line(program("load", "few"))
    assert program("load", "few").code == 0


def test_saving_the_same_again_changes_nothing(program: Program) -> None:
    program("save", "few", "-p", PROMPT)
    before = snapshot_of(program.directory)
    saved = program("save", "few", "-p", PROMPT, "--json").json
    assert (saved["bytes_written"], saved["prefilled_tokens"]) == (0, 0)
    after = snapshot_of(program.directory)
    containers = {path for path in after if path.endswith(".safetensors")}
    assert {path: after[path] for path in containers} == {path: before[path] for path in containers}


# match, export and import


def test_match_says_how_much_is_reused_and_why_not_more(program: Program) -> None:
    program("save", "few", "-p", PROMPT)
    told = program("match", "-p", PROMPT + "one", "--json").json
    run = program.generate("-p", PROMPT + "one")
    assert set(told) == {
        "prompt_tokens", "cached_tokens", "stored_tokens", "hit", "source", "reason", "differs_at",
        "text",
    }  # fmt: skip
    for name in ("prompt_tokens", "cached_tokens", "hit", "source"):
        assert told[name] == run[name]
    assert told["reason"].startswith("'few' ends at token ")
    assert told["text"][1].strip().startswith("one")
    shown = program("match", "-p", PROMPT + "two").out.splitlines()
    assert "tokens would be reused, from few" in shown[0]
    assert shown[1].startswith("why not more: 'few' ends at token ")
    assert " two" in shown[1]
    exact = program("match", "-p", PROMPT + "one", "--json").json
    assert (exact["hit"], exact["reason"], exact["text"]) == ("exact", None, None)


def test_match_and_generate_give_the_same_reason_for_a_miss(program: Program) -> None:
    program("save", "few", "-p", PROMPT)
    for options in (["--salt", "mine"], ["--kv-bits", "8", "--kv-group-size", "32"], ["--exact"]):
        told = program("match", "-p", PROMPT, "--json", *options).json
        run = program.generate("-p", PROMPT, *options, "--prompt-cache-ro")
        assert (told["cached_tokens"], run["cached_tokens"]) == (0, 0), options
        assert told["reason"] == run["miss_reason"]


def test_match_loads_no_weights_and_writes_nothing(program: Program, tmp_path: Path) -> None:
    program("save", "few", "-p", PROMPT)
    before = snapshot_of(program.directory)
    chosen = ("-m", program.model, "--cache-dir", program.directory, "-p", PROMPT, "--json")
    source = (
        "import sys; from mlx_promptcache import checkpoint, cli;"
        "checkpoint.load = None; sys.exit(cli.run(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", source, "match", *map(str, chosen)],
        capture_output=True, text=True, env=processes.environment(), check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["cached_tokens"] > 0
    assert snapshot_of(program.directory) == before


def test_no_text_of_a_prompt_is_in_a_reason(program: Program) -> None:
    program("save", "few", "-p", PROMPT)
    told = program("match", "-p", PROMPT[:100] + "secret words", "--json").json
    assert "secret" in "".join(told["text"])
    assert "secret" not in told["reason"]


def test_a_state_goes_from_one_store_to_another_in_a_file(
    program: Program, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, other = tmp_path / "few.safetensors", Program(tiny_model, tmp_path / "other", capsys)
    program("save", "few", "-p", PROMPT)
    told = program("export", "few", file, "--json").json
    assert (told["name"], told["file"], told["format"]) == ("few", str(file), "own")
    assert told["bytes"] == file.stat().st_size
    taken = other("import", file, "--name", "mine", "--json").json
    assert (taken["name"], taken["tokens"]) == ("mine", told["tokens"])
    assert other.generate("--prompt-cache", "mine", "-p", "two")["cached_tokens"] > 0
    assert other("verify").code == 0
    again = one_line(program("export", "few", file))
    assert "is there already" in again
    assert program("export", "few", file, "--force").code == 0


def test_what_cannot_be_exported_or_imported_is_told_in_one_line(
    program: Program, tmp_path: Path
) -> None:
    program("save", "few", "-p", PROMPT)
    file = tmp_path / "few.safetensors"
    program("export", "few", file)
    assert "no state named 'none'" in one_line(program("export", "none", tmp_path / "a"))
    assert "there is no directory" in one_line(program("export", "few", tmp_path / "no" / "a"))
    assert "cannot be read" in one_line(program("import", tmp_path / "none"))
    assert "another salt" in one_line(program("import", file, "--salt", "mine"))
    asked = ("--format", "mlx-lm", "-p", "a")
    assert "leave --format out" in one_line(program("import", file, *asked))
    file.write_bytes(file.read_bytes()[:-9])
    assert "cannot be imported: it has " in one_line(program("import", file))
    assert program("export", "few", "-").code == 2
    assert program("import", file, "-p", "a").code == 2
    assert program("import", file, "--format", "mlx-lm").code == 2


def test_a_start_hardly_looks_for_garbage_and_an_end_not_at_all(program: Program) -> None:
    source = (
        "import atexit, gc, json, sys; from mlx_promptcache import cli;"
        "looked = lambda: sum(s['collections'] for s in gc.get_stats()); before = looked();"
        "left = lambda: len(gc.get_objects());"
        "atexit.register(lambda: print(json.dumps([looked() - before, left()]))); cli.main()"
    )
    chosen = ("-m", program.model, "--cache-dir", program.directory)
    again = [processes.python(source, "generate", "-p", PROMPT, *chosen) for _ in range(2)][1]
    assert again[0] < 5  # some 50 with Python's own threshold
    assert again[1] < 1000  # some 37,000 that would be looked through at the end


def test_exporting_and_importing_do_not_wait_for_mlx(program: Program, tmp_path: Path) -> None:
    program("save", "few", "-p", PROMPT)
    source = (
        "import json, sys; from mlx_promptcache import cli; code = cli.run(sys.argv[1:]);"
        "print(json.dumps([code, 'mlx' in sys.modules]))"
    )
    chosen = ("-m", program.model, "--cache-dir")
    file = tmp_path / "few.safetensors"
    assert processes.python(source, "export", "few", file, *chosen, program.directory) == [0, False]
    assert processes.python(source, "import", file, *chosen, tmp_path / "new") == [0, False]
    told = processes.python(source, "list", "--tree", *chosen, tmp_path / "new")
    assert told == [0, False]


def test_show_says_why_runs_with_other_options_do_not_use_a_state(program: Program) -> None:
    program("save", "few", "-p", PROMPT)
    assert program("show", "few", "--json").json["reason"] is None
    told = program("show", "few", "--salt", "mine", "--json").json
    assert told["status"] == "ok"
    assert told["reason"].startswith("it was made with another salt: runs with the options")
    assert told["reason"] in program("show", "few", "--salt", "mine").out
