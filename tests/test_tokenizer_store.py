"""Tokenizers in a store: kept once, by what they are made from, and never believed when wrong."""

from __future__ import annotations

import contextlib
import gc
import json
import shutil
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Rust

import tiny
from families import CORPUS, FAMILIES
from mlx_promptcache import Runner, arithmetic, checkpoint, cli, container, tokenizer_store
from mlx_promptcache.container import Array
from mlx_promptcache.errors import ModelError
from mlx_promptcache.excerpts import (
    FRAME,
    LEFTS,
    RANKS,
    STARTS,
    TOKENS,
    Excerpts,
    Parts,
    taken_apart,
)
from mlx_promptcache.state import Origin
from mlx_promptcache.store import TOKENIZERS, Store
from mlx_promptcache.token_table import TokenTable
from mlx_promptcache.tokenizer import Facts
from mlx_promptcache.tokenizer_store import ARRAY, stem_of
from processes import Ended

USER = {"role": "user", "content": "Hello, world!"}
OURS = "mlx_promptcache.tokenizer"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and beside it the store of a process that loaded it."""
    model = tiny.on_disk(tmp_path_factory.mktemp("models") / "model", family=FAMILIES["llama3"])
    Runner.load(str(model))
    return model


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    """A copy of both."""
    return Path(shutil.copytree(original, tmp_path / "model"))


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The models whose whole tokenizer was loaded."""
    seen: list[Path] = []
    load = checkpoint.load_tokenizer

    def watched(path: Path, config: Any) -> Any:
        seen.append(path)
        return load(path, config)

    monkeypatch.setattr(checkpoint, "load_tokenizer", watched)
    return seen


def store_of(model: Path) -> Store:
    return Store(model / "prompt_cache")


def file_of(model: Path) -> Path:
    return store_of(model).path(TOKENIZERS, stem_of(model))


def is_kept(tokenizer: Any) -> bool:
    return type(tokenizer).__module__ == OURS


def said(tokenizer: Any) -> list[Any]:
    ids = tokenizer.encode("Hello, <|eot_id|> naïve 🐈\n")
    chat = tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    return [ids, tokenizer.decode(ids), chat, tokenizer.eos_token_ids]


def whole_of(model: Path) -> Any:
    tokenizer = Runner.load(str(model), use_cache=False).tokenizer
    assert not is_kept(tokenizer)
    return tokenizer


# Kept, and found


def test_it_is_kept_once_and_found_from_then_on(model: Path, loads: list[Path]) -> None:
    shutil.rmtree(model / "prompt_cache")
    kept = [is_kept(Runner.load(str(model)).tokenizer) for _ in range(3)]
    assert (kept, len(loads)) == ([False, True, True], 1)
    assert store_of(model).stems(TOKENIZERS) == [stem_of(model)]
    assert said(Runner.load(str(model)).tokenizer) == said(whole_of(model))


@pytest.mark.parametrize("looks", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_no_garbage_is_looked_for_meanwhile(
    looks: bool, fails: bool, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(model / "prompt_cache")
    load, seen = checkpoint.load_tokenizer, []
    keep = tokenizer_store.TokenizerStore._keep

    def watched(path: Path, config: Any) -> Any:
        seen.append(gc.isenabled())
        if fails:
            raise ModelError("it is none")
        return load(path, config)

    def kept(store: Any, *args: Any) -> None:
        seen.append(gc.isenabled())
        keep(store, *args)

    monkeypatch.setattr(checkpoint, "load_tokenizer", watched)
    monkeypatch.setattr(tokenizer_store.TokenizerStore, "_keep", kept)
    if not looks:
        gc.disable()
    try:
        with pytest.raises(ModelError) if fails else contextlib.nullcontext():
            Runner.load(str(model))
        assert gc.isenabled() == looks
    finally:
        gc.enable()
    assert seen == ([False] if fails else [False, False])


def test_a_directory_that_was_copied_finds_it(model: Path, loads: list[Path]) -> None:
    assert is_kept(Runner.load(str(model)).tokenizer)
    assert loads == []


def test_one_store_serves_models_with_the_same_files(
    model: Path, tmp_path: Path, loads: list[Path]
) -> None:
    other = shutil.copytree(model, tmp_path / "other")
    kept = [
        is_kept(Runner.load(str(path), cache_dir=str(tmp_path / "store")).tokenizer)
        for path in (model, other)
    ]
    assert (kept, loads) == ([False, True], [model])


def test_it_is_private_to_its_owner(model: Path) -> None:
    file = file_of(model)
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (file, file.parent, file.parent.parent)]
    assert modes == [0o600, 0o700, 0o700]


def test_a_store_that_is_only_read_is_not_written_to(model: Path, loads: list[Path]) -> None:
    assert is_kept(Runner.load(str(model), read_only=True).tokenizer)
    file_of(model).unlink()
    before = sorted(model.rglob("*"))
    for _ in range(2):
        assert not is_kept(Runner.load(str(model), read_only=True).tokenizer)
    assert sorted(model.rglob("*")) == before
    shutil.rmtree(model / "prompt_cache")
    Runner.load(str(model), read_only=True)
    assert not (model / "prompt_cache").exists()


def test_without_a_cache_nothing_is_kept(model: Path) -> None:
    shutil.rmtree(model / "prompt_cache")
    Runner.load(str(model), use_cache=False)
    assert not (model / "prompt_cache").exists()


# What it is made from


def change(name: str, **what: Any) -> Callable[[Path], None]:
    def apply(model: Path) -> None:
        path = model / name
        value = json.loads(path.read_bytes()) if path.exists() else {}
        path.write_text(json.dumps({**value, **what}))

    return apply


def change_tokenizer(model: Path) -> None:
    path = model / "tokenizer.json"
    value = json.loads(path.read_bytes())
    value["normalizer"] = {"type": "Lowercase"}
    path.write_text(json.dumps(value))


def write(name: str, text: str) -> Callable[[Path], None]:
    def apply(model: Path) -> None:
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(text)

    return apply


CHANGES: dict[str, Callable[[Path], None]] = {
    "tokenizer.json": change_tokenizer,
    "its config": change("tokenizer_config.json", eos_token="<|start_header_id|>"),
    "a template in a file": write("chat_template.jinja", "{{ messages[0]['content'] }}!"),
    "ends of generation": change("generation_config.json", eos_token_id=[5, 6]),
    "ends of the model": change("config.json", eos_token_id=[7]),
    "more templates": write("additional_chat_templates/tool.jinja", "{{ messages }}"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_other_files_make_another_tokenizer(what: str, model: Path, loads: list[Path]) -> None:
    before = stem_of(model)
    CHANGES[what](model)
    assert stem_of(model) != before
    loaded, expected = Runner.load(str(model)).tokenizer, whole_of(model)
    assert not is_kept(loaded)
    if what == "more templates":  # no template is the only one then: it is not kept
        assert isinstance(expected.chat_template, dict)
        assert not is_kept(Runner.load(str(model)).tokenizer)
        return
    assert said(loaded) == said(expected) != said(whole_of_copy(model, before))
    again = Runner.load(str(model)).tokenizer
    assert is_kept(again)
    assert said(again) == said(expected)


def whole_of_copy(model: Path, stem: str) -> Any:
    """The tokenizer that is kept under another stem."""
    cache = Runner.load(str(model)).cache
    assert cache is not None
    tokenizer = cache.tokenizers._load(stem, lambda: None)
    assert is_kept(tokenizer)
    return tokenizer


@pytest.mark.parametrize("release", ["mlx-lm", "tokenizers", "transformers", "ours"])
def test_other_releases_make_another_tokenizer(
    release: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = stem_of(model)
    if release == "mlx-lm":
        versions = {**arithmetic.versions(), "mlx-lm": "0.99"}
        monkeypatch.setattr(arithmetic, "versions", lambda: versions)
    elif release == "tokenizers":
        monkeypatch.setattr("tokenizers.__version__", "9.9")
    elif release == "transformers":
        monkeypatch.setattr(tokenizer_store, "_transformers", lambda: "9.9")
    else:
        monkeypatch.setattr(tokenizer_store, "FORMAT", 99)
    assert stem_of(model) != before


def test_the_release_of_transformers_is_read_off_its_source(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import transformers

    assert tokenizer_store._transformers() == transformers.__version__
    monkeypatch.setattr(Path, "read_bytes", lambda self: b"")
    assert tokenizer_store._transformers() == transformers.__version__
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert tokenizer_store._transformers() == "none"


def test_weights_and_foreign_files_make_no_other_tokenizer(model: Path) -> None:
    before = stem_of(model)
    (model / "model.safetensors").write_bytes(b"other")
    (model / "README.md").write_text("other")
    (model / "directory.json").mkdir()
    assert stem_of(model) == before


def test_files_that_change_while_it_is_loaded_keep_nothing(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(model / "prompt_cache")
    load = checkpoint.load_tokenizer

    def slow(path: Path, config: Any) -> Any:
        tokenizer = load(path, config)
        change_tokenizer(model)
        return tokenizer

    monkeypatch.setattr(checkpoint, "load_tokenizer", slow)
    Runner.load(str(model))
    assert store_of(model).stems(TOKENIZERS) == []


def test_files_that_cannot_be_read_keep_nothing_and_stop_nothing(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path) -> str:
        raise PermissionError("not yours")

    monkeypatch.setattr(tokenizer_store, "stem_of", refused)
    assert not is_kept(Runner.load(str(model)).tokenizer)


# Damage


def damaged(at: float, *, cut: bool) -> Callable[[Path], None]:
    def apply(file: Path) -> None:
        data = bytearray(file.read_bytes())
        place = min(int(len(data) * at), len(data) - 1)
        data[place] ^= 0x10
        file.write_bytes(data[:place] if cut else data)

    return apply


DAMAGES = {
    f"{'cut' if cut else 'flipped'} at {at}": damaged(at, cut=cut)
    for cut in (False, True)
    for at in (0.0, 0.001, 0.1, 0.3, 0.6, 1.0)
} | {"empty": lambda file: file.write_bytes(b""), "text": lambda file: file.write_text("x" * 999)}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_moved_aside_and_made_anew(
    damage: str, model: Path, loads: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    file = file_of(model)
    sound = file.read_bytes()
    DAMAGES[damage](file)
    tokenizer = Runner.load(str(model)).tokenizer
    (notice,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert notice.startswith("a stored tokenizer cannot be used and was moved aside: ")
    assert not is_kept(tokenizer)
    assert said(tokenizer) == said(whole_of(model))
    (aside,) = (model / "prompt_cache" / "quarantine" / TOKENIZERS).iterdir()
    assert aside.read_bytes() != sound
    caplog.clear()
    assert is_kept(Runner.load(str(model)).tokenizer)
    assert caplog.records == []


def test_a_damaged_file_that_is_only_read_stays(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    DAMAGES["flipped at 0.6"](file_of(model))
    assert not is_kept(Runner.load(str(model), read_only=True).tokenizer)
    (notice,) = [record.message for record in caplog.records]
    assert notice.startswith("a stored tokenizer cannot be used and is passed over: ")
    assert file_of(model).exists()


# Forgery


def forge(model: Path, content: Any, arrays: dict[str, Array], kind: str = "tokenizer") -> None:
    """Replace what is kept by a container that is as sound as any."""
    file = file_of(model)
    file.unlink()
    store_of(model).write(TOKENIZERS, stem_of(model), container.pack(kind, content, {}, arrays))


def kept_parts(model: Path) -> tuple[dict[str, Any], bytes]:
    """The facts that are kept, and the JSON of the whole tokenizer."""
    header = store_of(model).header(TOKENIZERS, stem_of(model))
    return dict(header.content), whole_of(model).backend_tokenizer.to_str().encode()


def kept_arrays(model: Path) -> list[str]:
    return list(store_of(model).header(TOKENIZERS, stem_of(model)).entries)


def of_text(text: bytes, name: str = ARRAY) -> dict[str, Array]:
    return {name: Array("uint8", (len(text),), text)}


WRONG_FACTS: dict[str, Any] = {
    "special_tokens": [[], None, "x", {"eos_token": 5}, {"eos_token": None}, {"eos_token": ["x"]}],
    "eos_token_id": ["0", 1.5, -1, True, [0], 1 << 40],
    "eos_token_ids": ["1", None, 5, ["1"], [None], [-1], [1.5], [True], {"1": 1}, [[1]]],
    "chat_template": [5, ["{{ x }}"], {"default": ""}, False],
    "detokenizer": ["other", None, 5, [], {}],
    "splits_special_tokens": [0, 1, "no", None],
    "cleans_up": [0, 1, "no", None, []],
    "outlines": [None, 5, "x", {"a": 1}, [[]], [5], [[["user"], True, {}, [[1, False]]]]],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG_FACTS.items() for value in values]
)
def test_facts_of_wrong_types_are_no_facts(name: str, value: Any, original: Path) -> None:
    content, _ = kept_parts(original)
    assert json.loads(json.dumps(Facts.from_json(content)._asdict())) == content
    with pytest.raises(TypeError):
        Facts.from_json({**content, name: value})


@pytest.mark.parametrize("name", WRONG_FACTS)
def test_facts_that_are_missing_are_no_facts(name: str, original: Path) -> None:
    content, _ = kept_parts(original)
    for value in ({k: v for k, v in content.items() if k != name}, {**content, f"{name}s": 1}, {}):
        with pytest.raises(TypeError):
            Facts.from_json(value)


FORGERIES: dict[str, Callable[[dict[str, Any], bytes], tuple[Any, ...]]] = {
    "facts of a wrong type": lambda c, t: ({**c, "eos_token_ids": "1"}, of_text(t)),
    "no facts": lambda c, t: ({}, of_text(t)),
    "more facts": lambda c, t: ({**c, "more": 1}, of_text(t)),
    "another kind": lambda c, t: (c, of_text(t), "block"),
    "no array": lambda c, t: (c, {}),
    "another array": lambda c, t: (c, of_text(t, "other")),
    "another type": lambda c, t: (c, {ARRAY: Array("int8", (len(t),), t)}),
    "two dimensions": lambda c, t: (c, {ARRAY: Array("uint8", (1, len(t)), t)}),
    "no text": lambda c, t: (c, of_text(b"")),
    "no Unicode": lambda c, t: (c, of_text(b"\xff\xfe" * 9)),
    "no JSON": lambda c, t: (c, of_text(b"{" * 9999)),
    "no tokenizer": lambda c, t: (c, of_text(b"{}")),
    "half a tokenizer": lambda c, t: (c, of_text(t[: len(t) // 2])),
    "zeros without end": lambda c, t: (c, of_text(bytes(1 << 20))),
    "another detokenizer": lambda c, t: ({**c, "detokenizer": "x"}, of_text(t)),
}


@pytest.mark.parametrize("what", FORGERIES)
def test_a_forged_file_is_not_believed(
    what: str, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    forge(model, *FORGERIES[what](*kept_parts(model)))
    tokenizer = Runner.load(str(model)).tokenizer
    (notice,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert notice.startswith("a stored tokenizer cannot be used and was moved aside: ")
    assert "\n" not in notice
    assert not is_kept(tokenizer)
    assert said(tokenizer) == said(whole_of(model))
    assert is_kept(Runner.load(str(model)).tokenizer)


FORGED_PARTS: dict[str, Callable[[Parts], Parts]] = {
    "another frame": lambda p: p._replace(frame={"added_tokens": []}),
    "fewer tokens": lambda p: p._replace(tokens=TokenTable.of(p.tokens[:9])),
    "fewer merges": lambda p: p._replace(ranks=p.ranks[:-1]),
}
FORGED_MERGES: dict[str, Callable[[Parts], Parts]] = {
    "merges beyond the end": lambda p: p._replace(starts=[*p.starts[:-1], 1 << 20]),
    "merges of nothing": lambda p: p._replace(lefts=[0] * len(p.lefts)),
}


def forge_parts(model: Path, change: Callable[[Parts], Parts]) -> None:
    content, text = kept_parts(model)
    parts = taken_apart(json.loads(text.decode()))
    assert parts is not None
    forge(model, content, change(parts).arrays())


@pytest.mark.parametrize("what", FORGED_PARTS)
def test_forged_parts_are_not_believed(
    what: str, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    forge_parts(model, FORGED_PARTS[what])
    assert not is_kept(Runner.load(str(model)).tokenizer)
    assert "a stored tokenizer cannot be used and was moved aside: " in caplog.text


@pytest.mark.parametrize("missing", [TOKENS, STARTS, RANKS, LEFTS])
def test_parts_that_are_not_all_there_are_not_believed(missing: str, model: Path) -> None:
    content, text = kept_parts(model)
    parts = taken_apart(json.loads(text.decode()))
    assert parts is not None
    arrays = parts.arrays()
    forge(model, content, arrays)
    assert is_kept(Runner.load(str(model)).tokenizer)
    del arrays[missing]
    forge(model, content, arrays)
    assert not is_kept(Runner.load(str(model)).tokenizer)


@pytest.mark.parametrize("what", FORGED_MERGES)
def test_merges_that_are_found_out_later_are_moved_aside_then(
    what: str, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    forge_parts(model, FORGED_MERGES[what])
    tokenizer = Runner.load(str(model)).tokenizer
    assert is_kept(tokenizer)
    texts = [*CORPUS, "Hello"]
    whole = whole_of(model)
    tokenizer.expect(texts)
    assert [tokenizer.encode(text) for text in texts] == [whole.encode(text) for text in texts]
    (notice,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert notice.startswith("a stored tokenizer cannot be used and was moved aside: ")
    assert not is_kept(Runner.load(str(model)).tokenizer)
    assert is_kept(Runner.load(str(model)).tokenizer)


def test_what_cannot_be_taken_apart_is_kept_whole(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for odd in (lambda _: None, lambda whole: whole["nothing"]):
        shutil.rmtree(model / "prompt_cache")
        monkeypatch.setattr(tokenizer_store, "taken_apart", odd)
        for kept in (False, True):
            tokenizer = Runner.load(str(model)).tokenizer
            assert is_kept(tokenizer) == kept
            assert said(tokenizer) == said(whole_of(model))
        assert type(tokenizer._tokenizer._rust) is Rust


def test_a_prompt_needs_no_more_than_excerpts(
    model: Path, monkeypatch: pytest.MonkeyPatch, loads: list[Path]
) -> None:
    def never(_: Any) -> Any:
        raise AssertionError("the whole Rust tokenizer was made")

    made: list[int] = []
    excerpt = Parts.excerpt
    monkeypatch.setattr(Excerpts, "whole", never)

    def counted(parts: Parts, found: Mapping[str, int]) -> Any:
        made.append(len(found))
        return excerpt(parts, found)

    monkeypatch.setattr(Parts, "excerpt", counted)
    runner = Runner.load(str(model))
    prompt = runner.prompter.whole(Origin("The quick brown fox"), Origin("The quick"))
    text = "".join(step.text for step in runner.generate(prompt, 8))
    assert text
    assert loads == []
    assert len(made) == 1  # for the prompt, and for all that tells where the prefix ends


def test_an_array_that_would_be_huge_is_not_read(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tokenizer_store, "LARGEST_BYTES", 100)
    monkeypatch.setattr(container, "read_array", lambda *_: pytest.fail("it was read"))
    Runner.load(str(model))
    assert "it is too large" in caplog.text


def test_a_panic_of_the_tokenizers_library_is_damage(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class PanicException(BaseException):
        """As Rust's panics come to Python."""

    class Panicking:
        @staticmethod
        def from_str(text: str) -> Any:
            raise PanicException("index out of\nbounds")

    monkeypatch.setattr("tokenizers.Tokenizer", Panicking)
    kept = cache_of(model).tokenizers._load(stem_of(model), lambda: None)
    assert kept is None
    assert "it makes no tokenizer: index out of bounds" in caplog.text


def cache_of(model: Path) -> Any:
    from mlx_promptcache import PromptCache

    return PromptCache(model / "prompt_cache", "any")


def test_an_interruption_is_no_damage(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenizer_store, "wrapped", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache_of(model).tokenizers._load(stem_of(model), lambda: None)
    assert file_of(model).exists()


# What is not kept


def template_type(model: Path) -> None:
    change("tokenizer_config.json", chat_template_type="deepseek_v32")(model)


def several_templates(model: Path) -> None:
    templates = [{"name": n, "template": "{{ messages }}"} for n in ("default", "tool_use")]
    change("tokenizer_config.json", chat_template=templates)(model)


def newlines(model: Path) -> None:
    change("tokenizer_config.json", tokenizer_class="NewlineTokenizer")(model)


@pytest.mark.parametrize("alter", [template_type, several_templates, newlines])
def test_what_does_something_of_its_own_is_loaded_every_time(
    alter: Callable[[Path], None], model: Path, loads: list[Path]
) -> None:
    alter(model)
    before = store_of(model).stems(TOKENIZERS)
    for count in (1, 2):
        assert not is_kept(Runner.load(str(model)).tokenizer)
        assert len(loads) == count
    assert store_of(model).stems(TOKENIZERS) == before


LOWER = {"normalizer": {"type": "Lowercase"}}


def lowered(whole: dict[str, Any]) -> Parts | None:
    return taken_apart({**whole, **LOWER})


def merges_beyond_the_end(whole: dict[str, Any]) -> Parts:
    parts = taken_apart(whole)
    assert parts is not None
    return FORGED_MERGES["merges beyond the end"](parts)


def no_numbers(whole: dict[str, Any]) -> Parts:
    """Which the trial stumbles over."""
    parts = taken_apart(whole)
    assert parts is not None
    return parts._replace(lefts=["1"] * len(parts.lefts))  # type: ignore[list-item]


@pytest.mark.parametrize("odd", [lowered, merges_beyond_the_end, no_numbers])
def test_parts_that_differ_in_any_text_are_not_kept_but_the_whole_is(
    odd: Callable[[dict[str, Any]], Parts | None], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(model / "prompt_cache")
    monkeypatch.setattr(tokenizer_store, "taken_apart", odd)
    Runner.load(str(model))
    assert kept_arrays(model) == [ARRAY]
    tokenizer = Runner.load(str(model)).tokenizer
    assert is_kept(tokenizer)
    assert said(tokenizer) == said(whole_of(model))


def test_what_differs_in_any_text_is_not_kept(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lowered_text(text: str, _: Any) -> str:
        return json.dumps({**json.loads(text), **LOWER})

    shutil.rmtree(model / "prompt_cache")
    monkeypatch.setattr(tokenizer_store, "taken_apart", lowered)
    monkeypatch.setattr(tokenizer_store, "_shortened", lowered_text)
    Runner.load(str(model))
    assert store_of(model).stems(TOKENIZERS) == []


def test_parts_are_tried_however_many_special_tokens_there_are(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Together they are too long for an excerpt."""
    specials = [f"<|reserved_special_token_{i}|>" for i in range(60)]
    rust = Rust.from_file(str(model / "tokenizer.json"))
    rust.add_special_tokens(specials)
    rust.save(str(model / "tokenizer.json"))
    shutil.rmtree(model / "prompt_cache")
    with monkeypatch.context() as patched:
        patched.setattr(Parts, "_merges", lambda *_: [])
        Runner.load(str(model))
    assert kept_arrays(model) == [ARRAY]
    shutil.rmtree(model / "prompt_cache")
    Runner.load(str(model))
    assert FRAME in kept_arrays(model)


def test_parts_that_no_text_tries_are_not_kept(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(model / "prompt_cache")
    monkeypatch.setattr(Excerpts, "_are_short", lambda *_: False)
    Runner.load(str(model))
    assert kept_arrays(model) == [ARRAY]
    assert is_kept(Runner.load(str(model)).tokenizer)


def test_merges_are_written_shorter_only_where_they_say_the_same() -> None:
    tokens = ["#version", "x", "#versionx", "a", "b", "ab", " ", "a ", "merges", '"merges":[', "]"]
    tokens.append("]]")
    model = {"type": "BPE", "vocab": {t: i for i, t in enumerate(tokens)}, "merges": []}
    for merges, short in (
        ([["a", "b"], ["]", "]"]], True), ([["#version", "x"], ["a", "b"]], False),
        ([["a", "b"], ["a", " "]], False), ([], True),
    ):  # fmt: skip
        text = Rust.from_str(json.dumps({"model": {**model, "merges": merges}})).to_str()
        kept = tokenizer_store._shortened(text, json.loads(text))
        assert (json.loads(kept)["model"]["merges"] == [" ".join(m) for m in merges]) == short
        assert Rust.from_str(kept).to_str() == Rust.from_str(text).to_str()


@pytest.mark.parametrize("told", [
    {"model": {"type": "BPE", "merges": [["a", "b"]], "last": [["c", "d"]]}},
    {"model": {"type": "BPE", "merges": [["a", "b"]]}, "last": {"lists": [["c", "d"]]}},
    {"model": {"type": "BPE", "merges": [["a", "b"]], "last": 1}},
    {"model": {"type": "BPE", "list": [["c", "d"]]}},
])  # fmt: skip
def test_merges_that_do_not_stand_at_the_end_are_left(told: dict[str, Any]) -> None:
    text = json.dumps(told, separators=(",", ":"))
    assert tokenizer_store._shortened(text, told) == text


def test_only_the_merges_of_the_model_are_written_shorter() -> None:
    model = {"vocab": {'"merges":[': 0}, "merges": [["a", "b"], ["]", "]}}"]]}
    told = {"other": {"merges": [["c", "d"]]}, "model": model}
    kept = json.loads(tokenizer_store._shortened(json.dumps(told, separators=(",", ":")), told))
    assert kept == {**told, "model": {**model, "merges": ["a b", "] ]}}"]}}


def test_merges_that_are_written_in_another_way_are_left() -> None:
    told = {"model": {"merges": [["a", "b"]]}}
    text = json.dumps(told)
    assert tokenizer_store._shortened(text, told) == text
    assert tokenizer_store._shortened(text.replace(" ", ""), told) != text.replace(" ", "")


def test_a_store_that_cannot_be_written_to_stops_nothing(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> bool:
        raise OSError("no space left")

    file_of(model).unlink()
    monkeypatch.setattr(Store, "write", full)
    assert said(Runner.load(str(model)).tokenizer) == said(whole_of(model))


def test_a_tokenizer_that_mlx_lm_cannot_load_is_a_sentence(model: Path) -> None:
    (model / "tokenizer.json").write_text("{}")
    for _ in range(2):
        with pytest.raises(ModelError, match="cannot load the tokenizer"):
            Runner.load(str(model))


# On the command line


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], model: Path) -> Callable[..., Ended]:
    def it(*arguments: str | Path) -> Ended:
        capsys.readouterr()
        code = cli.run([*map(str, arguments), "-m", str(model)])
        return Ended(code, *capsys.readouterr())

    return it


def test_verify_reads_it(model: Path, run: Callable[..., Ended]) -> None:
    size = file_of(model).stat().st_size
    report = run("verify", "--json").json
    assert (report["files"], report["bytes"], report["damaged"]) == (1, size, [])
    DAMAGES["flipped at 0.6"](file_of(model))
    found = run("verify", "--quarantine", "--json")
    assert found.code == 3
    report = json.loads(found.out)
    (damage,) = report["damaged"]
    assert (damage["kind"], damage["file"]) == (TOKENIZERS, stem_of(model))
    assert report["quarantined"] == 1
    assert not file_of(model).exists()
    assert run("verify").code == 0


def test_verify_finds_another_kind_in_its_place(model: Path, run: Callable[..., Ended]) -> None:
    content, text = kept_parts(model)
    forge(model, content, of_text(text), "block")
    assert "it is no tokenizer" in run("verify").out


def test_list_counts_its_bytes(model: Path, run: Callable[..., Ended]) -> None:
    assert run("list", "--json").json["total_bytes"] == file_of(model).stat().st_size


def test_clear_all_deletes_it_and_nothing_else_does(model: Path, run: Callable[..., Ended]) -> None:
    leftover = file_of(model).parent / ".tmp-left"
    leftover.write_bytes(b"x")
    size = file_of(model).stat().st_size + leftover.stat().st_size
    run("save", "name", "-p", "Hello, world! " * 9)
    assert run("clear", "name", "--yes").code == 0
    assert run("clear", "--unnamed", "--stale", "--yes").code == 0
    assert file_of(model).exists()
    plan = run("clear", "--all", "--dry-run")
    assert "1 tokenizers" in plan.out
    assert run("clear", "--all", "--yes", "--json").json["freed_bytes"] == size
    assert not file_of(model).exists()
    assert not leftover.exists()
    assert "nothing to delete" in run("clear", "--all", "--yes").out
