"""The fingerprint: the content of what computes, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import stat
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from mlx_promptcache import fingerprint as fingerprint_module
from mlx_promptcache import models
from mlx_promptcache.errors import ModelError, PromptCacheError
from mlx_promptcache.fingerprint import (
    PARTS,
    PLAIN,
    QUANTISED,
    Fingerprint,
    KVSettings,
    Memo,
    remembered,
)
from mlx_promptcache.tree import KEY_BYTES

CONFIG = {"model_type": "llama", "hidden_size": 8, "max_position_embeddings": 2048}
KV8 = KVSettings(8, 32, 0)


def write_weights(path: Path, **changed: Any) -> None:
    """Some small tensors, all of which are in the fingerprint, and one that is sampled."""
    rng = np.random.default_rng(5)
    tensors: dict[str, Any] = {
        "model.embed.weight": rng.normal(size=(32, 8)).astype(np.float32),
        "model.norm.weight": np.ones(8, np.float16),
        "model.empty": np.zeros((0, 8), np.float32),
        "model.mlp.weight": rng.normal(size=(64, 1024)).astype(np.float32),
    }
    safetensors.numpy.save_file({**tensors, **changed}, path, {"format": "pt"})


def write_config(model: Path, **changed: Any) -> None:
    (model / "config.json").write_text(json.dumps({**CONFIG, **changed}))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    write_config(directory)
    write_weights(directory / "model-00001-of-00002.safetensors")
    write_weights(directory / "model-00002-of-00002.safetensors", more=np.arange(9.0))
    (directory / "tokenizer.json").write_text("{}")
    return directory


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    directory = tmp_path / "adapter"
    directory.mkdir()
    (directory / "adapter_config.json").write_text('{"rank": 8}')
    safetensors.numpy.save_file({"lora_a": np.ones((8, 2))}, directory / "adapters.safetensors")
    return directory


def one_sentence(error: PromptCacheError) -> bool:
    text = str(error)
    return bool(text) and "\n" not in text and "Errno" not in text and not text.endswith(".")


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


# The same content


def test_a_fingerprint_depends_on_the_content_and_not_on_the_place(
    model: Path, adapter: Path, tmp_path: Path
) -> None:
    first = Fingerprint.of_model(model, adapter=adapter, kv=KV8, salt="mine")
    elsewhere = tmp_path / "else" / "where"
    shutil.copytree(model, elsewhere)
    shutil.copytree(adapter, tmp_path / "other adapter")
    shutil.rmtree(model)
    second = Fingerprint.of_model(
        elsewhere, adapter=tmp_path / "other adapter", kv=KV8, salt="mine"
    )
    assert second == first
    assert second.digest == first.digest
    assert first.explain(second.parts) == "nothing"


def test_a_digest_is_as_long_as_every_key(model: Path) -> None:
    digest = Fingerprint.of_model(model).digest
    assert len(bytes.fromhex(digest)) == KEY_BYTES
    assert digest == digest.lower()


def test_files_that_compute_nothing_do_not_count(model: Path) -> None:
    before = Fingerprint.of_model(model)
    (model / "README.md").write_text("new")
    (model / "tokenizer.json").write_text('{"new": 1}')
    (model / "prompt_cache").mkdir()
    assert Fingerprint.of_model(model) == before


def test_the_layout_of_the_configuration_does_not_count(model: Path) -> None:
    before = Fingerprint.of_model(model)
    reordered = dict(reversed(CONFIG.items()))
    (model / "config.json").write_text(json.dumps(reordered, indent=4))
    assert Fingerprint.of_model(model) == before


def test_parts_are_text_that_can_be_kept_and_compared(model: Path) -> None:
    fingerprint = Fingerprint.of_model(model, salt="a secret")
    kept = json.loads(json.dumps(dict(fingerprint.parts)))
    assert fingerprint.differences(kept) == []
    assert "a secret" not in json.dumps(kept)
    assert set(kept) <= set(PARTS)
    assert Fingerprint(kept).digest == fingerprint.digest


# Other content


@pytest.mark.parametrize("tensor", ["model.embed.weight", "model.norm.weight", "more"])
@pytest.mark.parametrize("at", [0, -1])
def test_one_value_of_the_weights_makes_another_fingerprint(
    model: Path, tensor: str, at: int
) -> None:
    before = Fingerprint.of_model(model)
    path = model / "model-00002-of-00002.safetensors"
    tensors = safetensors.numpy.load_file(path)
    flat = tensors[tensor].reshape(-1).copy()
    flat[at] = np.nextafter(flat[at], flat.dtype.type(9))
    size = path.stat().st_size
    write_weights(path, **{**tensors, tensor: flat.reshape(tensors[tensor].shape)})
    assert path.stat().st_size == size
    after = Fingerprint.of_model(model)
    assert after.differences(before.parts) == ["weights"]
    assert after.explain(before.parts) == "other weights"
    assert after.digest != before.digest


def test_every_byte_of_the_weights_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that were trained on, one expert, a patched tensor: a single byte may differ."""
    monkeypatch.setattr(fingerprint_module, "PIECE_BYTES", 64)
    path = tmp_path / "model.safetensors"
    digests = set()
    for place in range(1000):
        data = bytearray(1000)
        data[place] = 1
        path.write_bytes(data)
        digests.add(fingerprint_module._whole_file(path))
    path.write_bytes(bytes(1001))
    digests.add(fingerprint_module._whole_file(path))
    path.write_bytes(b"")
    digests.add(fingerprint_module._whole_file(path))
    assert len(digests) == 1002


def test_a_tensor_of_another_name_shape_or_dtype_makes_another_fingerprint(tmp_path: Path) -> None:
    path, digests = tmp_path / "model.safetensors", set()
    zeros = np.zeros((4, 8), np.float32)
    for tensors in (
        {"a": zeros},
        {"b": zeros},
        {"a": zeros.T.copy()},
        {"a": zeros.view(np.int32)},
        {"a": zeros, "b": zeros},
    ):
        safetensors.numpy.save_file(tensors, path)
        digests.add(fingerprint_module._whole_file(path))
    assert len(digests) == 5


def test_a_file_more_or_of_another_name_makes_another_fingerprint(model: Path) -> None:
    before = Fingerprint.of_model(model)
    (model / "model-00002-of-00002.safetensors").rename(model / "model-2.safetensors")
    renamed = Fingerprint.of_model(model)
    shutil.copy(model / "model-2.safetensors", model / "model-3.safetensors")
    more = Fingerprint.of_model(model)
    assert renamed.explain(before.parts) == more.explain(renamed.parts) == "other weights"


def test_another_configuration_makes_another_fingerprint(model: Path) -> None:
    before = Fingerprint.of_model(model)
    write_config(model, rope_theta=10000.0)
    after = Fingerprint.of_model(model)
    assert after.digest != before.digest
    assert after.explain(before.parts) == "another configuration of the model"


def test_what_mlx_lm_reads_beside_the_configuration_counts(model: Path) -> None:
    write_config(model, model_file="code.py")
    seen = [Fingerprint.of_model(model)]
    for name in ("code.py", "hf_quant_config.json"):
        for content in ("one", "other"):
            (model / name).write_text(content)
            seen.append(Fingerprint.of_model(model))
    assert len({fingerprint.digest for fingerprint in seen}) == len(seen) == 5
    assert seen[-1].explain(seen[-2].parts) == "another configuration of the model"
    write_config(model)
    without = Fingerprint.of_model(model)
    (model / "code.py").write_text("code that nothing names")
    assert Fingerprint.of_model(model) == without


def test_each_content_of_an_adapter_makes_another_fingerprint(model: Path, adapter: Path) -> None:
    none = Fingerprint.of_model(model)
    first = Fingerprint.of_model(model, adapter=adapter)
    flip_last_byte(adapter / "adapters.safetensors")
    second = Fingerprint.of_model(model, adapter=adapter)
    (adapter / "adapter_config.json").write_text('{"rank": 4}')
    third = Fingerprint.of_model(model, adapter=adapter)
    assert len({f.digest for f in (none, first, second, third)}) == 4
    for one, other in ((none, first), (first, second), (second, third)):
        assert other.explain(one.parts) == "another adapter"


def test_every_byte_of_an_adapter_counts(model: Path, adapter: Path) -> None:
    weights, digests = adapter / "adapters.safetensors", set()
    for place in (0, 1 << 16, 1 << 19, (1 << 20) - 1):
        tensor = np.zeros(1 << 20, np.uint8)
        tensor[place] = 1
        safetensors.numpy.save_file({"lora_a": tensor}, weights)
        digests.add(Fingerprint.of_model(model, adapter=adapter).digest)
    assert len(digests) == 4


def test_each_kv_setting_makes_another_fingerprint(model: Path) -> None:
    settings = [
        KVSettings(), KVSettings(8), KVSettings(4), KVSettings(8, 32), KVSettings(8, 64, 0),
        KVSettings(max_size=512), KVSettings(max_size=1024), KVSettings(8, max_size=512),
    ]  # fmt: skip
    fingerprints = [Fingerprint.of_model(model, kv=kv) for kv in settings]
    assert len({f.digest for f in fingerprints}) == len(settings)
    assert {f.explain(fingerprints[0].parts) for f in fingerprints[1:]} == {
        "other KV cache settings"
    }
    assert [fingerprints[0].with_kv(kv) for kv in settings] == fingerprints


def test_settings_of_a_quantisation_that_is_off_do_not_count() -> None:
    assert str(KVSettings(None, 32, 0)) == str(KVSettings()) == "plain"


def test_each_salt_makes_another_fingerprint(model: Path) -> None:
    none, one, other = (Fingerprint.of_model(model, salt=salt) for salt in ("", "a", "b"))
    assert len({none.digest, one.digest, other.digest}) == 3
    assert one.explain(none.parts) == one.explain(other.parts) == "another salt"


def test_all_that_differs_is_told_and_what_is_not_known_differs(model: Path) -> None:
    fingerprint = Fingerprint.of_model(model)
    told = fingerprint.explain({**fingerprint.parts, "weights": "x", "adapter": "y"})
    assert told == "other weights and another adapter"
    assert fingerprint.differences({}) == [part for part in PARTS if part in fingerprint.parts]
    assert Fingerprint.of_text("a").explain(Fingerprint.of_text("b").parts) == "another model"


@pytest.mark.parametrize(
    "wrong",
    [
        {"bits": 0}, {"bits": 7}, {"bits": 16}, {"bits": -1}, {"group_size": 0}, {"group_size": 48},
        {"quantized_start": -1}, {"max_size": 0}, {"max_size": -5},
    ],
    ids=repr,
)  # fmt: skip
def test_kv_settings_that_cannot_be_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"bits|items|tokens"):
        KVSettings(**wrong)


def test_a_namespace_is_for_the_rows_that_a_cold_run_holds() -> None:
    plain, later = KVSettings(), KVSettings(8, 64, 100)
    assert plain.phases == (PLAIN,)
    assert later.phases == (PLAIN, QUANTISED)
    assert {plain.phase_at(p) for p in (0, 10**6)} == {PLAIN}
    assert [later.phase_at(p) for p in (0, 99, 100, 101)] == [PLAIN, PLAIN, QUANTISED, QUANTISED]
    assert KVSettings(8, 64, 0).phase_at(0) == QUANTISED


# What is remembered


def test_what_did_not_change_is_not_read_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memo_file = tmp_path / "weights.json"
    first = remembered(model, memo_file=memo_file, adapter=None, kv=KVSettings(), salt="")
    read: list[Path] = []

    def compute(path: Path) -> str:
        read.append(path)
        return "another"

    monkeypatch.setattr(fingerprint_module, "_whole_file", compute)
    again = remembered(model, memo_file=memo_file, adapter=None, kv=KVSettings(), salt="")
    assert again == first
    assert read == []
    assert Fingerprint.of_model(model) != first
    assert [path.name for path in read] == [
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    ]  # fmt: skip


def test_a_file_that_was_rewritten_in_place_is_noticed_though_size_and_mtime_are_as_before(
    model: Path, tmp_path: Path
) -> None:
    memo_file, path = tmp_path / "weights.json", model / "model-00001-of-00002.safetensors"
    first = remembered(model, memo_file=memo_file, adapter=None, kv=KVSettings(), salt="")
    before = path.stat()
    time.sleep(0.05)  # more than a tick of the clock that stamps files
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (
        before.st_size,
        before.st_mtime_ns,
        before.st_ino,
    )
    second = remembered(model, memo_file=memo_file, adapter=None, kv=KVSettings(), salt="")
    assert second.explain(first.parts) == "other weights"


def test_an_adapter_that_was_trained_on_under_its_name_is_noticed(
    model: Path, adapter: Path, tmp_path: Path
) -> None:
    memo_file = tmp_path / "weights.json"
    first = remembered(model, memo_file=memo_file, adapter=adapter, kv=KVSettings(), salt="")
    time.sleep(0.05)
    flip_last_byte(adapter / "adapters.safetensors")
    second = remembered(model, memo_file=memo_file, adapter=adapter, kv=KVSettings(), salt="")
    assert second.explain(first.parts) == "another adapter"


def test_an_identity_is_computed_once_for_as_long_as_the_file_is_the_same(tmp_path: Path) -> None:
    path, memo, computed = tmp_path / "file", Memo(), 0

    def compute(_: Path) -> str:
        nonlocal computed
        computed += 1
        return f"identity {computed}"

    path.write_text("one")
    assert not memo.changed
    assert [memo.identity(path, compute) for _ in range(3)] == ["identity 1"] * 3
    assert memo.changed
    path.write_text("other")
    assert memo.identity(path, compute) == "identity 2"
    shutil.copy2(path, tmp_path / "copy").replace(path)  # another inode, all else the same
    assert memo.identity(path, compute) == "identity 3"


def test_a_memo_comes_back_and_is_for_its_owner_alone(model: Path, tmp_path: Path) -> None:
    path, memo = tmp_path / "weights.json", Memo()
    Fingerprint.of_model(model, memo=memo)
    before = os.umask(0)
    try:
        memo.save(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Memo.load(path).known == memo.known
    assert len(memo.known) == 2
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["weights.json"]


def test_a_memo_that_did_not_change_is_not_written(tmp_path: Path) -> None:
    Memo().save(tmp_path / "weights.json")
    assert list(tmp_path.iterdir()) == []


def test_a_memo_that_cannot_be_written_is_no_matter(model: Path, tmp_path: Path) -> None:
    missing = tmp_path / "missing" / "weights.json"
    assert remembered(model, memo_file=missing, adapter=None, kv=KVSettings(), salt="") == (
        Fingerprint.of_model(model)
    )


def test_a_memo_makes_its_directory_and_forgets_files_that_are_gone(
    model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "caches" / "mine" / "weights.json"
    remembered(model, memo_file=path)
    assert len(Memo.load(path).known) == 2
    (model / "model-00002-of-00002.safetensors").unlink()
    write_weights(model / "model-00001-of-00002.safetensors", a=np.ones(3))
    remembered(model, memo_file=path)
    assert list(Memo.load(path).known) == [str(model / "model-00001-of-00002.safetensors")]


def test_a_memo_that_is_damaged_is_forgotten_and_made_anew(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "weights.json"
    wanted = remembered(model, memo_file=path, adapter=None, kv=KVSettings(), salt="")
    sound = path.read_bytes()
    identity = Memo.load(path).known[str(model / "model-00001-of-00002.safetensors")][-1]
    altered = sound.replace(identity.encode(), b"0" * len(identity))
    assert altered != sound
    for damaged in (b"", b"\n", sound[:-1], sound[40:], altered, b"\xff" + sound, b"{}"):
        path.write_bytes(damaged)
        assert Memo.load(path).known == {}
        assert remembered(model, memo_file=path, adapter=None, kv=KVSettings(), salt="") == wanted
        assert path.read_bytes() == sound


# The Hub's layout


def test_a_file_of_the_hub_is_known_by_the_name_of_its_blob(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for digit, path in zip("ab", sorted(model.glob("model*.safetensors")), strict=True):
        path.rename(blobs / (digit * 64))
        path.symlink_to(blobs / (digit * 64))

    def refuse(path: Path) -> str:
        pytest.fail(f"{path} was read")

    with monkeypatch.context() as patch:
        patch.setattr(fingerprint_module, "_whole_file", refuse)
        first = Fingerprint.of_model(model)
        (blobs / ("b" * 64)).rename(blobs / ("c" * 64))
        second_file = model / "model-00002-of-00002.safetensors"
        second_file.unlink()
        second_file.symlink_to(blobs / ("c" * 64))
        second = Fingerprint.of_model(model)
    assert second.explain(first.parts) == "other weights"


def test_a_link_to_a_file_of_another_name_is_read(model: Path, tmp_path: Path) -> None:
    before = Fingerprint.of_model(model)
    path = model / "model-00001-of-00002.safetensors"
    path.rename(tmp_path / "weights.safetensors")
    path.symlink_to(tmp_path / "weights.safetensors")
    assert Fingerprint.of_model(model) == before
    flip_last_byte(tmp_path / "weights.safetensors")
    assert Fingerprint.of_model(model).explain(before.parts) == "other weights"


def test_a_file_that_only_looks_like_a_blob_is_read(model: Path) -> None:
    before = Fingerprint.of_model(model)
    for path in model.glob("model*.safetensors"):
        path.rename(model / ("a" * 64))
        path.symlink_to("a" * 63)
        (model / ("a" * 64)).rename(model / ("a" * 63))
        break
    assert Fingerprint.of_model(model) == before


# What is no model


def refused(model: Path, **more: Any) -> str:
    with pytest.raises(ModelError) as caught:
        Fingerprint.of_model(model, **more)
    assert one_sentence(caught.value)
    return str(caught.value)


def test_a_directory_that_is_missing_or_empty_holds_no_model(tmp_path: Path) -> None:
    assert "holds no model" in refused(tmp_path / "missing")
    assert "it has no model*.safetensors" in refused(tmp_path)


def test_a_model_without_weights_holds_none(model: Path) -> None:
    for path in model.glob("model*.safetensors"):
        path.rename(path.with_suffix(".bin"))
    assert "it has no model*.safetensors" in refused(model)


def test_weights_that_are_a_directory_or_a_link_to_nowhere_are_told(model: Path) -> None:
    path = model / "model-00002-of-00002.safetensors"
    path.unlink()
    path.mkdir()
    assert "cannot be read" in refused(model)
    path.rmdir()
    path.symlink_to("nowhere")
    assert "cannot be read" in refused(model)


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "null", "7", "[" * 100_000, '{"a": ' + "9" * 5000 + "}"],
    ids=lambda text: text[:9],
)  # fmt: skip
def test_a_configuration_that_is_no_json_object_is_told(model: Path, text: str) -> None:
    (model / "config.json").write_text(text)
    assert "config.json is not" in refused(model)


def test_a_configuration_that_is_not_there_or_not_text_is_told(model: Path) -> None:
    (model / "config.json").write_bytes(b"\xff\xfe\xfd")
    assert "is not JSON" in refused(model)
    (model / "config.json").unlink()
    assert "it has no config.json" in refused(model)


def test_an_adapter_that_is_none_is_told(model: Path, adapter: Path, tmp_path: Path) -> None:
    assert "holds no adapter" in refused(model, adapter=tmp_path / "missing")
    (adapter / "adapters.safetensors").unlink()
    assert "it has no adapters.safetensors" in refused(model, adapter=adapter)
    (adapter / "adapter_config.json").unlink()
    assert "it has no adapter_config.json" in refused(model, adapter=adapter)


# Model directories


def test_a_file_is_no_model_directory(model: Path) -> None:
    with pytest.raises(ModelError, match="is a file: give the directory") as caught:
        models.find(str(model / "config.json"))
    assert one_sentence(caught.value)


@pytest.mark.parametrize("name", ["a b/c", "--/x", "a/..b", "x/" + "y" * 200])
def test_what_cannot_be_the_name_of_a_repo_is_told(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="is neither a directory nor the name of a repo") as caught:
        models.find(name)
    assert one_sentence(caught.value)


def test_a_repo_that_cannot_be_had_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    def unreachable(*_: object, **__: object) -> str:
        raise ConnectionError("several\nlines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"someone/model.*cannot be had") as caught:
        models.find("someone/model")
    assert one_sentence(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {}, {"max_position_embeddings": None}, {"max_position_embeddings": "many"},
        {"max_position_embeddings": 0}, {"max_position_embeddings": -1}, {"n_ctx": 1.5},
        {"text_config": None}, {"text_config": {}}, {"text_config": []}, {"text_config": "x"},
        {"text_config": ["max_position_embeddings"]},
    ],
    ids=repr,
)  # fmt: skip
def test_a_configuration_that_does_not_tell_the_context_tells_none(
    settings: dict[str, Any],
) -> None:
    assert models.context_length(settings) is None


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_a_scaled_embedding_reaches_further_than_the_position_embeddings_say(key: str) -> None:
    scaling = {"original_max_position_embeddings": 4096, "factor": 32.0}
    assert models.context_length({"n_ctx": 4096, key: scaling}) == 131_072
    assert models.context_length({"n_ctx": 200_000, key: scaling}) == 200_000
    assert models.context_length({"n_ctx": 4096, key: {"factor": 32.0}}) == 4096
    assert models.context_length({"n_ctx": 4096, key: "linear"}) == 4096
    assert models.context_length({"text_config": {"n_ctx": 4096, key: scaling}}) == 131_072


def test_the_model_s_own_context_comes_before_that_of_its_text_part() -> None:
    settings = {"n_ctx": 10, "text_config": {"max_position_embeddings": 20}}
    assert models.context_length(settings) == 10
