"""The server: mlx-lm's own, in processes of their own, asked by OpenAI's client.

How many tokens were really fed to its models is counted beside what it says.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import signal
import socket
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import mlx_lm
import mlx_lm.server
import openai
import pytest

import processes
import tiny
from mlx_promptcache import cli
from mlx_promptcache import server as server_module
from serving import Server, serving

if TYPE_CHECKING:
    from collections.abc import Iterator

    from serving import Answer

PROMPT = "The cat sat on the mat, and the dog sat on the cat. " * 20
KINDS = ("plain", "rotating", "hybrid")
DRAFT = "bare"
CONTEXT = 100


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("models")
    return {kind: tiny.on_disk(directory / kind, kind) for kind in (*KINDS, DRAFT)}


@pytest.fixture(scope="module")
def shared(
    models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Server, Path]]:
    store = tmp_path_factory.mktemp("shared") / "store"
    chosen = ("--model", models["plain"], "--cache-dir", store, "--salt-per-user")
    with serving(*chosen) as server:
        yield server, store


@pytest.fixture(scope="module")
def short(
    models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Server, Path]]:
    """A server whose model's context is short, and a model whose context has no end."""
    directory = tmp_path_factory.mktemp("short")
    chosen = made_for(CONTEXT, models["plain"], directory / "short")
    endless = made_for(None, models["plain"], directory / "endless")
    with serving("--model", chosen, "--cache-dir", directory / "store") as server:
        yield server, endless


def made_for(context: int | None, model: Path, copy: Path) -> Path:
    """A copy of a model whose configuration tells of another context."""
    config = json.loads((model / "config.json").read_text())
    config["max_position_embeddings"] = context
    if context is None:
        del config["max_position_embeddings"]
    shutil.copytree(model, copy)
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.fixture(scope="module")
def letter(models: dict[str, Path]) -> dict[str, Any]:
    """Options with which a model says nothing but one letter: text that is encoded as it was."""
    _, tokenizer, *_ = mlx_lm.load(str(models["plain"]))
    return {"logit_bias": {str(tokenizer.encode("z")[-1]): 100.0}}


def states(store: Path) -> list[int]:
    """How many tokens each state of a store holds, in order."""
    ended = processes.run("list", "--cache-dir", store, "--json").json
    return sorted(entry["tokens"] for entry in ended["entries"])


def reused(server: Server, answer: Answer) -> int:
    """How much of a prompt was reused, by what was fed: every other token of it and every token of
    the answer went through the model once.
    """
    return answer.prompt_tokens + answer.tokens - server.fed()


def knock_until_refused(server: Server) -> None:
    address = urllib.parse.urlsplit(server.url)
    deadline = time.monotonic() + 2  # the answer that is on its way takes longer
    while time.monotonic() < deadline:
        with contextlib.suppress(ConnectionResetError):  # the door closes at this very moment
            socket.create_connection((address.hostname, address.port or 0), timeout=1).close()
        time.sleep(0.05)


def test_an_answer_is_the_same_streamed_and_whole_and_what_is_fed_is_counted(
    shared: tuple[Server, Path],
) -> None:
    server, _ = shared
    server.fed()
    cold = server.ask(PROMPT)
    assert (cold.cached_tokens, reused(server, cold)) == (0, 0)
    warm = server.ask(PROMPT, stream=True)
    assert (warm.text, warm.reason) == (cold.text, "length")
    assert warm.cached_tokens == reused(server, warm) == warm.prompt_tokens - 1


def test_every_turn_of_a_chat_goes_on_where_the_last_answer_ended(
    shared: tuple[Server, Path], letter: dict[str, Any]
) -> None:
    server, _ = shared
    turns = ["Hello " * 30]
    before = server.ask(*turns, **letter)
    for question in ("and then", "and after that"):
        turns += [before.text, question]
        server.fed()
        answer = server.ask(*turns, **letter)
        assert answer.cached_tokens == before.prompt_tokens + before.tokens
        assert reused(server, answer) == answer.cached_tokens
        before = answer


def test_a_crowd_is_answered_as_each_of_it_is_alone(shared: tuple[Server, Path]) -> None:
    server, _ = shared
    prompts = [f"{PROMPT[: 40 * i]} what is {i}?" for i in range(16)]
    alone = [server.ask(text, user=f"alone {i}") for i, text in enumerate(prompts)]

    def ask(i: int) -> Answer:
        return server.ask(prompts[i % 16], user=f"crowd {i % 4}")

    with ThreadPoolExecutor(32) as pool:
        crowd = list(pool.map(ask, range(32)))
    for i, answer in enumerate(crowd):
        expected = alone[i % 16]
        assert (answer.prompt_tokens, answer.tokens) == (expected.prompt_tokens, expected.tokens)
        both = min(len(answer.sure), len(expected.sure))
        assert answer.sure[:both] == expected.sure[:both]
    assert sum(len(answer.sure) for answer in alone) > 64
    for i in range(0, 32, 5):
        assert ask(i).cached_tokens == crowd[i].prompt_tokens - 1


@pytest.mark.parametrize(("kind", "at_once"), [("plain", 8), ("hybrid", 1)])
def test_layers_that_take_padding_for_tokens_are_fed_one_prompt_at_a_time(
    kind: str, at_once: int, models: dict[str, Path], tmp_path: Path
) -> None:
    parsed: list[argparse.Namespace] = []

    def options(parser: argparse.ArgumentParser) -> Any:
        parse: Any = vars(type(parser))["parse_args_of"]
        parsed.append(parse(parser, ["--model", str(models[kind])]))
        raise Enough

    with pytest.raises(Enough):
        server_module.main(options)
    assert parsed[0].prompt_concurrency == 8
    provider = server_module.Provider(parsed[0], server_module.Serving(cache_dir=str(tmp_path)))
    provider.tiers = SimpleNamespace(below=None)  # type: ignore[assignment]
    provider.load_default()
    assert provider.failure is None
    assert provider.cli_args.prompt_concurrency == at_once


class Enough(Exception):
    """What was wanted has been seen."""


def test_a_user_finds_what_the_same_user_asked_and_nothing_else(
    shared: tuple[Server, Path],
) -> None:
    server, store = shared
    text = "two plus two " * 30
    first = server.ask(text, user="Ann Example")
    assert first.cached_tokens == 0
    assert server.ask(text, user="Ann Example").cached_tokens == first.prompt_tokens - 1
    assert server.ask(text, user="Bob Example").cached_tokens < 8  # what Bob's template begins with
    assert server.ask(text).cached_tokens < 8
    assert b"Example" not in b"".join(p.read_bytes() for p in store.rglob("*") if p.is_file())
    assert "Example" not in server.told
    with pytest.raises(openai.BadRequestError) as refused:
        server.ask(text, extra_body={"user": 7})
    assert "user must be of type str" in refused.value.response.text


def test_what_was_answered_survives_a_kill_whatever_the_model(
    models: dict[str, Path], tmp_path: Path, letter: dict[str, Any]
) -> None:
    chosen = ("--model", models["plain"], "--cache-dir", tmp_path / "store", "--salt-per-key")
    asked: dict[str, dict[str, Any]] = {kind: {"model": str(models[kind])} for kind in KINDS}
    asked["with a draft"] = {"extra_body": {"draft_model": str(models[DRAFT])}}
    asked["drawn with a seed"] = {"seed": 3, "temperature": 1.0, "model": str(models["plain"])}
    asked["with a letter"] = {**letter, "key": "another secret"}
    with serving(*chosen, slow="0.2") as server:
        cold = {
            name: server.ask(PROMPT, stream=True, **{"key": f"secret {name}", **options})
            for name, options in asked.items()
        }
        server.end(signal.SIGKILL)
        assert server.notices == []
    assert [answer.cached_tokens for answer in cold.values()] == [0] * len(cold)
    with serving(*chosen) as server:
        for name, options in asked.items():
            other = server.ask(PROMPT, **{**options, "key": "somebody else's"})
            assert other.cached_tokens == 0 or name != "plain"
            server.fed()
            warm = server.ask(PROMPT, stream=True, **{"key": f"secret {name}", **options})
            assert (warm.text, warm.reason) == (cold[name].text, cold[name].reason), name
            assert warm.cached_tokens == warm.prompt_tokens - 1, name
            if name != "with a draft":  # the draft model is fed as well
                assert reused(server, warm) == warm.cached_tokens, name
        said = cold["with a letter"]
        more = server.ask(PROMPT, said.text, "more", **letter, key="another secret")
        assert more.cached_tokens == said.prompt_tokens + said.tokens
        told = server.told
        assert server.notices == []
    files = [p.read_bytes() for p in (tmp_path / "store").rglob("*") if p.is_file()]
    assert b"secret" not in b"".join(files)
    assert "secret" not in told


def test_what_one_server_answered_another_one_finds_at_a_place_that_they_share(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = ("--remote", f"file://{tmp_path}/shared", "--remote-seconds", "60")
    remote = ("--model", models["plain"], *at)
    for store, cached in (("one", False), ("two", True)):
        # Another machine, which does not know that this model computes sooner than it is answered.
        monkeypatch.setenv("XDG_CACHE_HOME", f"{tmp_path}/memo of {store}")
        with serving(*remote, "--cache-dir", tmp_path / store) as server:
            answer = server.ask(PROMPT)
            assert (answer.cached_tokens == answer.prompt_tokens - 1) == cached
            server.end(signal.SIGTERM)


def test_a_signal_lets_an_answer_end_and_nobody_else_in(
    models: dict[str, Path], tmp_path: Path, letter: dict[str, Any]
) -> None:
    store = tmp_path / "store"
    with serving("--model", models["plain"], "--cache-dir", store) as server:
        pieces = server.client().chat.completions.create(
            model="default_model", stream=True, max_tokens=1000, extra_body=letter,
            messages=[{"role": "user", "content": PROMPT}],
        )  # fmt: skip
        text = next(pieces).choices[0].delta.content
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(ConnectionRefusedError):
            knock_until_refused(server)
        assert server.process.poll() is None
        for piece in pieces:
            text += piece.choices[0].delta.content or ""
        assert text == "z" * 1000
        assert server.gone() == 0
    assert states(store)[-1] > 1000


def test_an_answer_that_takes_too_long_is_broken_off_and_its_prompt_is_kept(
    models: dict[str, Path], tmp_path: Path, letter: dict[str, Any]
) -> None:
    store = tmp_path / "store"
    chosen = ("--cache-dir", store, "--stop-seconds", "0.3")
    endless = made_for(None, models["plain"], tmp_path / "endless")
    with serving("--model", endless, *chosen) as server:
        pieces = server.client().chat.completions.create(
            model="default_model", stream=True, max_tokens=10**6, extra_body=letter,
            messages=[{"role": "user", "content": PROMPT}],
        )  # fmt: skip
        next(pieces)
        began = time.monotonic()
        assert server.end(signal.SIGINT) == 0
        assert time.monotonic() - began < 10
        assert "1 answers were broken off" in server.notices[-1]
    (held,) = states(store)
    assert held > 100


def test_answers_go_on_when_the_store_cannot_be_written_and_it_is_told_once(
    models: dict[str, Path], tmp_path: Path
) -> None:
    store, aside = tmp_path / "store", tmp_path / "aside"
    chosen = ("--model", models["plain"], "--cache-dir", store, "--log-level", "ERROR")
    with serving(*chosen) as server:
        server.ask(PROMPT + "one")
        store.rename(aside)
        store.write_text("no store")
        for text in ("two", "three"):
            assert server.ask(PROMPT + text).tokens == 8
        (notice,) = server.notices
        assert "answers go on" in notice
        store.unlink()
        aside.rename(store)
        written = len(states(store))
        answer = server.ask(PROMPT + "four")
        assert len(states(store)) > written
        assert answer.tokens == 8


def test_a_full_drive_is_told_once(models: dict[str, Path], tmp_path: Path) -> None:
    store = tmp_path / "store"
    chosen = ("--model", models["plain"], "--cache-dir", store, "--log-level", "ERROR")
    with serving(*chosen, limit_bytes=8192) as server:
        assert [server.ask(f"{PROMPT} {i}").tokens for i in range(3)] == [8, 8, 8]
        (notice,) = server.notices
        assert "answers go on" in notice
        assert server.end() == 0
    assert [p for p in store.rglob("*") if p.name.startswith(".") or p.suffix == ".tmp"] == []


@pytest.mark.real
def test_the_real_model_goes_on_after_a_kill(real_model: Path, tmp_path: Path) -> None:
    chosen = ("--model", real_model, "--cache-dir", tmp_path / "store")
    question = "Name three animals, and say where each of them lives. Be brief."
    with serving(*chosen) as server:
        cold = server.ask(question, max_tokens=6)
        server.end(signal.SIGKILL)
    with serving(*chosen) as server:
        warm = server.ask(question, max_tokens=6)
        assert warm.text == cold.text
        assert warm.cached_tokens == reused(server, warm) == warm.prompt_tokens - 1


def test_a_prompt_with_images_says_whose_it_is_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    told = ([1, 9, 2], [[1, 9, 2]], ["assistant"], "normal", SimpleNamespace(cache_key=[1, -5, 2]))
    monkeypatch.setattr(mlx_lm.server.ResponseGenerator, "_tokenize", lambda *_: told)
    generator = server_module.Generator.__new__(server_module.Generator)
    generator.model_provider = SimpleNamespace(context_length=None)
    request, args = SimpleNamespace(namespace="one"), SimpleNamespace(max_tokens=8)
    prompt, *_, vision = generator._tokenize(None, request, args)
    assert (prompt, prompt.namespace) == ([1, 9, 2], "one")
    assert (vision.cache_key, vision.cache_key.namespace) == ([1, -5, 2], "one")


def test_an_empty_prompt_is_refused_and_the_next_one_answered(shared: tuple[Server, Path]) -> None:
    server, _ = shared
    with pytest.raises(openai.BadRequestError) as refused:
        server.client().completions.create(model="default_model", prompt="")
    assert "the prompt is empty" in refused.value.response.text
    assert server.ask("two plus two").tokens == 8


@pytest.mark.parametrize("more", [{}, {"stream": True}, {"seed": 3}])
def test_a_prompt_longer_than_the_context_is_refused_and_nothing_of_it_computed(
    more: dict[str, Any], short: tuple[Server, Path]
) -> None:
    server, _ = short
    assert server.ask("two plus two").tokens == 8
    server.fed()
    with pytest.raises(openai.BadRequestError) as refused:
        server.ask(PROMPT, **more)
    told = refused.value.response.json()["error"]
    sentence = rf"the prompt has \d+ tokens, and the model's context ends at {CONTEXT}: shorten it"
    assert re.fullmatch(sentence, told["message"])
    assert refused.value.type == "invalid_request_error"
    assert refused.value.response.headers["Access-Control-Allow-Origin"] == "*"
    assert server.fed() == 0
    assert server.ask("two plus two").tokens == 8


@pytest.mark.parametrize("more", [{}, {"stream": True}, {"seed": 3}])
def test_an_answer_ends_where_the_context_does(
    more: dict[str, Any], short: tuple[Server, Path], letter: dict[str, Any]
) -> None:
    answer = short[0].ask("two plus two " * 26, max_tokens=1000, **letter, **more)
    assert (answer.prompt_tokens + answer.tokens, answer.reason) == (CONTEXT, "length")


def test_a_model_that_tells_of_no_context_has_no_end(
    short: tuple[Server, Path], letter: dict[str, Any]
) -> None:
    server, endless = short
    with pytest.raises(openai.BadRequestError):
        server.ask(PROMPT)
    answer = server.ask(PROMPT, model=str(endless), max_tokens=CONTEXT, **letter)
    assert (answer.prompt_tokens > CONTEXT, answer.tokens) == (True, CONTEXT)
    with pytest.raises(openai.BadRequestError):
        server.ask(PROMPT)


@pytest.mark.parametrize("hub", ["nowhere", "a file", "a cache"])
def test_the_model_that_is_served_is_listed_whatever_is_downloaded(
    hub: str, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / hub))
    (tmp_path / "a file").write_text("no cache")
    downloaded(tmp_path / "a cache" / "models--owner--name")
    with serving("--model", models["plain"], "--cache-dir", tmp_path / "store") as server:
        listed = {model.id for model in server.client().models.list()}
        assert listed - {"owner/name"} == {str(models["plain"].resolve())}
        assert ("owner/name" in listed) == (hub == "a cache")
        assert "could not be answered" not in server.told


def downloaded(repo: Path) -> None:
    """Write what the Hub's cache has of a repo that looks like a model."""
    snapshot = repo / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors.index.json", "tokenizer_config.json"):
        (snapshot / name).write_text("{}")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("1")


# What cannot be served


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("--model", "/no/such/model"), 1, "there is no model directory /no/such/model"),
        (("--port", "no"), 2, "argument --port: invalid int value: 'no'"),
        (("--port", "70000"), 2, "there is no port 70000"),
        (("--kv-bits", "7"), 2, "not to 7"),
        (("--max-size", "huge"), 2, "huge"),
        (("--no-such-option",), 2, "unrecognized arguments: --no-such-option"),
    ],
)
def test_what_makes_no_sense_is_told_in_a_sentence(
    arguments: tuple[str, ...], code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["serve", *arguments]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert told in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("host", "told"),
    [("0.0.0.0", True), ("::", True), ("example.org", True), ("127.0.0.2", False), ("::1", False)],
)
def test_listening_to_other_machines_is_told(
    host: str, told: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["serve", "--host", host, "--model", "/no/such/model"]) == 1
    assert ("everybody who can reach this machine" in capsys.readouterr().err) == told


def test_all_options_of_the_server_of_mlx_lm_are_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.run(["serve", "--help"]) == 0
    ours = capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["mlx_lm.server", "--help"])
    with pytest.raises(SystemExit):
        mlx_lm.server.main()
    options = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    assert len(options) > 20
    assert options <= set(re.findall(r"--[a-z-]+", ours))


def test_a_port_that_is_taken_is_told_in_a_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = processes.run("serve", "--port", str(port), "--quiet")
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.splitlines()[-1] == (
        f"mlx-promptcache: cannot listen at 127.0.0.1:{port}: Address already in use"
    )


def test_a_model_that_cannot_be_loaded_ends_the_server(
    models: dict[str, Path], tmp_path: Path
) -> None:
    model = shutil.copytree(models["plain"], tmp_path / "model")
    (model / "config.json").write_text('{"model_type": "nonsense"}')
    ended = processes.run("serve", "--model", model, "--port", "0", "--quiet")
    assert (ended.code, ended.out) == (1, "")
    (line,) = [line for line in ended.err.splitlines() if "mlx-lm cannot load the model" in line]
    assert "Traceback" not in ended.err
    assert line.startswith("mlx-promptcache: ")
