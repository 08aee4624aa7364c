"""Batch: many questions after one prefix, each answered as it would be alone."""

from __future__ import annotations

import functools
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache

import architectures
import processes
import tiny
from mlx_promptcache import PromptCache, Runner, Sampling, batch, cli, shared_rows, wave
from mlx_promptcache.batch import Batch, Question, question_of
from mlx_promptcache.errors import PromptError
from mlx_promptcache.fingerprint import KVSettings
from mlx_promptcache.prompt import Prompt
from tiny import random_tokens

if TYPE_CHECKING:
    from mlx_promptcache.batch import Answer

SAMPLED = Sampling(temp=1.0, top_p=0.9, repetition_penalty=1.2, seed=3)
PENALTIES = Sampling(repetition_penalty=1.5, repetition_context_size=60, logit_bias={7: 2.0})
LENGTHS = (1, 5, 3, 9, 2, 12, 40)  # of questions, in tokens
TOGETHER = ["plain", "rotating", "recurrent", "hybrid", "nested"]


@functools.cache
def model_of(kind: str) -> Any:
    return getattr(tiny, kind)()


def runner_of(kind: str, store: Path | None = None, **more: Any) -> Runner:
    cache = None if store is None else PromptCache(store, kind)
    return Runner(model_of(kind), None, cache, **more)


def questions(prefix: list[int], max_tokens: int = 10) -> list[Question]:
    return [
        Question(i, Prompt((*prefix, *random_tokens(length, 100 + i))), max_tokens)
        for i, length in enumerate(LENGTHS)
    ]


def answered(made: Batch, asked: list[Question]) -> dict[int, Answer]:
    answers = list(made.answers(asked))
    assert len(answers) == len(asked)
    return {answer.index: answer for answer in answers}


def alone(runner: Runner, question: Question, sampling: Sampling) -> list[int]:
    """What is said to a question when nothing else is."""
    own = Sampling(**{**sampling.__dict__, "seed": (sampling.seed or 0) + question.index})
    steps = runner.generate(list(question.prompt.tokens), question.max_tokens, own)
    return [step.token for step in steps]


# Together


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED, PENALTIES], ids=["greedy", "drawn", "p"])
@pytest.mark.parametrize("kind", TOGETHER)
def test_answers_are_those_of_questions_asked_alone(kind: str, sampling: Sampling) -> None:
    """By rounding they could differ: in these models of float32 it decides about no token."""
    prefix = random_tokens(70, 1)
    asked = questions(prefix)
    made = Batch(runner_of(kind), Prompt(tuple(prefix)), sampling=sampling, size=3)
    assert made.together
    answers = answered(made, asked)
    for question in asked:
        assert list(answers[question.index].tokens) == alone(runner_of(kind), question, sampling)
        assert answers[question.index].cached_tokens == len(prefix)
        assert answers[question.index].prompt_tokens == len(question.prompt.tokens)


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED, PENALTIES], ids=["greedy", "drawn", "p"])
def test_short_answers_after_a_long_prefix_are_those_of_questions_asked_alone(
    sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "_Decoder", None)  # in waves, and in no other way
    prefix = random_tokens(200, 1)
    asked = questions(prefix, 10)
    made = Batch(runner_of("plain"), Prompt(tuple(prefix)), sampling=sampling, size=3)
    answers = answered(made, asked)
    for question in asked:
        assert list(answers[question.index].tokens) == alone(runner_of("plain"), question, sampling)
        assert answers[question.index].cached_tokens == len(prefix)


def test_the_layers_of_all_waves_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[shared_rows.SharedRows] = []
    rows = shared_rows.SharedRows.__init__

    def count(self: shared_rows.SharedRows, *args: Any) -> None:
        made.append(self)
        rows(self, *args)

    monkeypatch.setattr(shared_rows.SharedRows, "__init__", count)
    prefix = random_tokens(200, 1)
    asked = [*questions(prefix, 10), *questions(prefix, 10)]
    asked = [Question(i, q.prompt, 10) for i, q in enumerate(asked)]
    runner = runner_of("plain")
    answered(Batch(runner, Prompt(tuple(prefix)), size=3), asked)
    assert len(made) == len(runner.make_layers())


@pytest.mark.parametrize(
    "name", [n for n in architectures.runnable() if n not in architectures.DEPEND_ON_PASSES]
)
def test_short_answers_of_every_architecture_are_those_of_questions_asked_alone(name: str) -> None:
    runner = Runner(architectures.build(name), None, None)
    prefix = random_tokens(64, 1)
    asked = questions(prefix, 3)[:4]
    answers = answered(Batch(runner, Prompt(tuple(prefix)), size=3), asked)
    for question in asked:
        assert list(answers[question.index].tokens) == alone(runner, question, Sampling())


def test_no_token_sees_a_copy_of_the_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    usual = mx.fast.scaled_dot_product_attention

    def watched(queries: Any, keys: Any, *rest: Any, **more: Any) -> Any:
        seen.append(keys.shape)
        return usual(queries, keys, *rest, **more)

    prefix = random_tokens(200, 1)
    made = Batch(runner_of("plain"), Prompt(tuple(prefix)), size=3)
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", watched)
    answered(made, questions(prefix, 10))
    assert not seen
    alone(runner_of("plain"), questions(prefix)[0], Sampling())
    assert seen


def test_questions_of_one_length_are_fed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    fed: list[list[int]] = []
    feed = wave.Waves._feed

    def watched(self: wave.Waves, asked: list[list[int]]) -> None:
        fed.append([len(tokens) for tokens in asked])
        feed(self, asked)

    monkeypatch.setattr(wave.Waves, "_feed", watched)
    prefix = random_tokens(200, 1)
    lengths = [9, 3] * 6
    asked = [
        Question(i, Prompt((*prefix, i, *random_tokens(n - 1, i))), 2)
        for i, n in enumerate(lengths)
    ]
    answered(Batch(runner_of("plain"), Prompt(tuple(prefix)), size=3), asked)
    assert fed == [[2] * 3, [2] * 3, [8] * 3, [8] * 3]


def test_what_all_questions_begin_with_is_fed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = random_tokens(200, 1)
    asked = [
        Question(i, Prompt((*prefix, *random_tokens(50, 2), *random_tokens(1 + i % 3, 9 + i))), 4)
        for i in range(9)
    ]
    runner = runner_of("plain")
    made = Batch(runner, Prompt(tuple(prefix)), sampling=PENALTIES, size=3)
    fed: list[int] = []
    kind = type(runner.model)
    call = kind.__call__

    def watched(self: Any, inputs: Any, *args: Any, **more: Any) -> Any:
        fed.append(inputs.size)
        return call(self, inputs, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "__call__", watched)
        answers = answered(made, asked)
    assert fed[0] == 50
    assert sum(fed[1:]) < 9 * 10
    for question in asked:
        assert list(answers[question.index].tokens) == alone(runner, question, PENALTIES)
        assert answers[question.index].cached_tokens == len(prefix)


def test_a_model_that_takes_no_shared_rows_answers_nevertheless(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prefix = random_tokens(200, 1)
    asked = questions(prefix, 10)
    made = Batch(runner_of("plain"), Prompt(tuple(prefix)), size=3)
    step = shared_rows.SharedRows.attend
    calls: list[int] = []

    def fails(self: Any, *args: Any) -> Any:
        calls.append(1)
        if len(calls) > 30:  # in the middle of it all
            raise ValueError("[broadcast_shapes]")
        return step(self, *args)

    monkeypatch.setattr(shared_rows.SharedRows, "attend", fails)
    answers = answered(made, asked)
    for question in asked:
        assert list(answers[question.index].tokens) == alone(
            runner_of("plain"), question, Sampling()
        )


def test_masks_leave_out_gaps_and_what_a_window_has_passed() -> None:
    before, window = 6, 5
    layer = KVCache()
    layer.update_and_fetch(mx.zeros((1, 2, before, 4)), mx.zeros((1, 2, before, 4)))
    rows = shared_rows.SharedRows(layer, 2, 20, shared_rows.Masks())
    rows.update_and_fetch(mx.zeros((2, 2, 4, 4)), mx.zeros((2, 2, 4, 4)))
    rows.close_questions(mx.array([2, 4]))
    for width in (None, window):
        mask = rows.make_mask(3, window_size=width)
        assert mask.shape == (2, 1, 3, before + 4 + 3)
        for sequence, length in enumerate((2, 4)):
            own = [before + i if i < length else None for i in range(4)]
            own += [before + length + i for i in range(3)]
            positions = [*range(before), *own]
            for token in range(3):
                at = before + length + token
                expected = [
                    p is not None and p <= at and (width is None or at < p + width)
                    for p in positions
                ]
                assert mask[sequence, 0, token].tolist() == expected


def test_long_answers_and_short_ones_are_each_decoded_in_their_way() -> None:
    prefix = random_tokens(200, 1)
    asked = [Question(q.index, q.prompt, 4 if q.index % 2 else 40) for q in questions(prefix)]
    answers = answered(Batch(runner_of("plain"), Prompt(tuple(prefix)), size=3), asked)
    for question in asked:
        assert list(answers[question.index].tokens) == alone(
            runner_of("plain"), question, Sampling()
        )


def test_questions_are_fed_together_and_the_prefix_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fed: list[tuple[int, ...]] = []
    kind = type(model_of("plain"))
    call = kind.__call__

    def watched(self: Any, inputs: Any, *args: Any, **more: Any) -> Any:
        fed.append(inputs.shape)
        return call(self, inputs, *args, **more)

    runner = runner_of("plain")
    prefix = random_tokens(70, 1)
    asked = questions(prefix, 10)
    monkeypatch.setattr(kind, "__call__", watched)
    answered(Batch(runner, Prompt(tuple(prefix)), size=len(asked)), asked)
    assert [shape for shape in fed if shape[1] >= 70] == [(1, 70)]
    assert fed.count((len(asked), 1)) >= 8
    assert len(fed) <= 1 + 4 + 11  # the prefix, the questions, and a pass a token


def test_a_prefix_that_is_stored_is_not_computed(tmp_path: Path) -> None:
    prefix = Prompt(tuple(random_tokens(300, 1)))
    first = runner_of("plain", tmp_path)
    assert first.cache is not None
    made = Batch(first, prefix)
    assert made.shared is not None
    first.cache.keep(made.shared.prompt_state())
    again = Batch(runner_of("plain", tmp_path), prefix)
    assert again.shared is not None
    assert (again.shared.cached_tokens, again.shared.prefilled_tokens) == (300, 0)
    asked = questions(list(prefix.tokens))
    assert answered(again, asked) == answered(made, asked)


def test_answers_do_not_depend_on_how_many_are_decoded_together() -> None:
    prefix = random_tokens(40, 1)
    asked = questions(prefix)
    said = [
        answered(Batch(runner_of("plain"), Prompt(tuple(prefix)), sampling=SAMPLED, size=n), asked)
        for n in (1, 2, 5, 20)
    ]
    assert all(other == said[0] for other in said[1:])


def test_each_question_has_draws_of_its_own() -> None:
    prefix = random_tokens(40, 1)
    same = Prompt((*prefix, 5, 6, 7))
    asked = [Question(i, same, 10) for i in range(3)]
    said = answered(Batch(runner_of("plain"), Prompt(tuple(prefix)), sampling=SAMPLED), asked)
    assert len({answer.tokens for answer in said.values()}) == 3


def test_a_question_that_begins_otherwise_is_answered_too() -> None:
    prefix = random_tokens(40, 1)
    others = [Prompt(tuple(random_tokens(30, 2))), Prompt(tuple(prefix)), Prompt(tuple(prefix[:9]))]
    asked = [Question(i, prompt, 5) for i, prompt in enumerate(others)]
    asked.append(Question(3, Prompt((*prefix, 1)), 5))
    answers = answered(Batch(runner_of("plain"), Prompt(tuple(prefix))), asked)
    for question in asked:
        assert list(answers[question.index].tokens) == alone(
            runner_of("plain"), question, Sampling()
        )
    assert answers[3].cached_tokens == 40


def test_without_a_prefix_questions_are_decoded_together_all_the_same() -> None:
    asked = questions([])
    answers = answered(Batch(runner_of("plain")), asked)
    for question in asked:
        assert list(answers[question.index].tokens) == alone(
            runner_of("plain"), question, Sampling()
        )
        assert answers[question.index].cached_tokens == 0


# One after another


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("chunked", {}),
        ("plain", {"kv": KVSettings(8, 32, 0)}),
        ("bare", {"kv": KVSettings(None, 64, 0, 32)}),
        ("plain", {"draft_model": "smaller"}),
    ],
)
def test_what_cannot_be_decoded_together_is_answered_one_after_another(
    kind: str, more: dict[str, Any]
) -> None:
    if "draft_model" in more:
        more = {"draft_model": model_of("plain")}
    prefix = random_tokens(70, 1)
    asked = questions(prefix)
    made = Batch(runner_of(kind, **more), Prompt(tuple(prefix)))
    assert not made.together
    answers = answered(made, asked)
    for question in asked:
        runner = runner_of(kind, **more)
        run = runner.start(question.prompt, boundaries=(70,), sampling=Sampling())
        said = [step.token for step in run.steps(question.max_tokens)]
        assert list(answers[question.index].tokens) == said


def test_where_mlx_lm_fails_after_all_the_rest_is_answered_one_after_another(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    prefix = random_tokens(40, 1)
    asked = questions(prefix)
    expected = answered(Batch(runner_of("plain"), Prompt(tuple(prefix))), asked)
    following = batch._Decoder.next
    calls = []

    def fails(self: Any) -> Any:
        calls.append(self)
        if len(calls) == 4:
            raise ValueError("these layers cannot be merged")
        return following(self)

    monkeypatch.setattr(batch._Decoder, "next", fails)
    answers = answered(Batch(runner_of("plain"), Prompt(tuple(prefix)), size=3), asked)
    assert answers == expected
    assert "these layers cannot be merged" in caplog.text


def test_a_question_must_leave_room_for_an_answer() -> None:
    runner = runner_of("plain", context_length=50)
    assert question_of(runner, 0, Prompt(tuple(random_tokens(45, 1))), 100).max_tokens == 5
    with pytest.raises(PromptError, match="context ends at 50: shorten it"):
        question_of(runner, 0, Prompt(tuple(random_tokens(50, 1))), 100)


# The command


PREFIX = "The cat sat on the mat, and the dog sat on the cat. " * 6
ASKED: list[dict[str, Any]] = [
    {"id": "first", "prompt": "Question: what is two?"},
    {"prompt": "And the dog", "max_tokens": 2},
    {"id": 7, "prompt": "Hello, world!"},
    {"prompt": "four"},
    {"prompt": "cat"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.on_disk(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def program(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs `batch` in this process, with `questions.jsonl` and a store beside it."""

    def run(*arguments: str, command: str = "batch") -> processes.Ended:
        chosen = ["-m", str(model), "--cache-dir", str(tmp_path / "store"), "--temp", "0"]
        file = [str(tmp_path / "questions.jsonl")] if command == "batch" else []
        code = cli.run([command, *file, *chosen, "-n", "6", *arguments])
        return processes.Ended(code, *capsys.readouterr())

    write(tmp_path, *ASKED)
    return run


def write(directory: Path, *asked: dict[str, Any] | str) -> None:
    told = [one if isinstance(one, str) else json.dumps(one) for one in asked]
    (directory / "questions.jsonl").write_text("\n".join(told) + "\n", "utf-8")


def rows(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_answers_come_in_the_order_of_the_questions(program: Any) -> None:
    ended = program("--prefix", PREFIX, "--batch-size", "2")
    assert (ended.code, ended.err) == (0, "")
    said = rows(ended.out)
    assert [row["index"] for row in said] == [0, 1, 2, 3, 4]
    assert [row.get("id") for row in said] == ["first", None, 7, None, None]
    assert [len(row["tokens"]) for row in said] == [6, 2, 6, 6, 6]
    for row, asked in zip(said, ASKED, strict=True):
        limit = ("-n", str(asked.get("max_tokens", 6)))
        one = program("--prefix", PREFIX, "-p", asked["prompt"], *limit, "--json",
                      command="generate").json  # fmt: skip
        assert {k: row[k] for k in ("text", "tokens", "finish_reason", "prompt_tokens")} == {
            k: one[k] for k in ("text", "tokens", "finish_reason", "prompt_tokens")
        }
        assert 0 < row["cached_tokens"] < row["prompt_tokens"]


def test_the_summary_is_one_object(program: Any, tmp_path: Path) -> None:
    told = program("--prefix", PREFIX, "--json").json
    assert (told["questions"], told["answered"], told["failed"]) == (5, 5, 0)
    assert [row["index"] for row in told["answers"]] == [0, 1, 2, 3, 4]
    assert told["together"]
    assert told["prefilled_tokens"] == told["prefix_tokens"] > 0
    again = program("--prefix", PREFIX, "--json", "--output", str(tmp_path / "out.jsonl")).json
    assert again["cached_tokens"] == again["prefix_tokens"]
    assert again["answers"] is None
    assert rows((tmp_path / "out.jsonl").read_text("utf-8")) == told["answers"]


def test_questions_go_on_after_a_stored_prompt(
    program: Any, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = ["-m", str(model), "--cache-dir", str(tmp_path / "store")]
    assert cli.run(["save", "kept", "-p", PREFIX, *store, "--json"]) == 0
    saved = json.loads(capsys.readouterr().out)
    told = program("--prompt-cache", "kept", "--json").json
    assert (told["cached_tokens"], told["prefilled_tokens"]) == (saved["tokens"], 0)
    one = program("--prompt-cache", "kept", "-p", "four", "--json", command="generate").json
    assert told["answers"][3]["tokens"] == one["tokens"]


def test_messages_and_a_system_prompt_are_shared(program: Any, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "four"}]
    write(tmp_path, {"messages": chat}, {"prompt": "four"})
    told = program("--system-prompt", "Hello", "--json").json
    assert told["answers"][0]["tokens"] == told["answers"][1]["tokens"]
    file = tmp_path / "chat.json"
    file.write_text(json.dumps([{"role": "system", "content": "Hello"}]), "utf-8")
    assert (
        program("--messages", str(file), "--json").json["answers"][1]["tokens"]
        == (told["answers"][1]["tokens"])
    )


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "a prompt or messages"),
        ('{"prompt": "a", "messages": []}', "not both"),
        ('{"prompt": 1}', "not a text"),
        ('{"prompt": "\\ud800"}', "not UTF-8"),
        ('{"messages": []}', "not a list of messages"),
        ('{"messages": [{"content": "a"}]}', "each with a role"),
        ('{"prompt": "a", "max_tokens": 0}', "1 or more"),
        ('{"prompt": "a", "id": []}', "neither a text nor a whole number"),
        (json.dumps({"prompt": "cat " * 2100}), "context ends at 2048"),
    ],
)
def test_a_line_that_cannot_be_answered_says_why_and_the_others_are_answered(
    line: str, sentence: str, program: Any, tmp_path: Path
) -> None:
    write(tmp_path, {"prompt": "a"}, line, {"prompt": "b"})
    ended = program("--quiet")
    said = rows(ended.out)
    assert ended.code == 1
    assert ended.err == "mlx-promptcache: 1 of 3 lines have no answer: their errors say why\n"
    assert sentence in said[1]["error"]
    assert ["text" in row for row in said] == [True, False, True]


# Going on


def test_what_is_answered_is_not_answered_again(program: Any, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    program("--output", str(out))
    whole = out.read_text("utf-8")
    kept = whole.splitlines(keepends=True)
    for there in (kept[:2], [*kept[:2], kept[2][:20]], [*kept[:2], kept[2][:-1]], [kept[4]], []):
        out.write_text("".join(there), "utf-8")
        told = program("--output", str(out), "--json").json
        assert out.read_text("utf-8") == whole
        sound = sum(line in kept or f"{line}\n" in kept for line in there)
        assert (told["skipped"], told["answered"]) == (sound, 5 - sound)
    assert program("--output", str(out), "--json").json["answered"] == 0


@pytest.mark.parametrize("change", ["question", "setting", "fewer", "id"])
def test_answers_to_something_else_are_left_alone(
    change: str, program: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    program("--output", str(out))
    before = out.read_bytes()
    first = {**ASKED[0], "prompt": "else"} if change == "question" else ASKED[0]
    first = {**ASKED[0], "id": "other"} if change == "id" else first
    write(tmp_path, first, *(ASKED[1:-1] if change == "fewer" else ASKED[1:]))
    ended = program("--output", str(out), *(("--stop", "x") if change == "setting" else ()))
    assert ended.code == 1
    assert "choose another --output" in ended.err
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    "text", ["my diary\nday two", "one line", '{"model": "x", "key": "y"}', '{"index": 1}\n']
)
def test_a_file_that_is_no_file_of_answers_is_left_alone(
    text: str, program: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text(text, "utf-8")
    ended = program("--output", str(out))
    assert (ended.code, out.read_text("utf-8")) == (1, text)
    assert "no answers" in ended.err


def test_answers_do_not_go_to_the_file_of_the_questions(program: Any, tmp_path: Path) -> None:
    program()
    asked = (tmp_path / "questions.jsonl").read_bytes()
    ended = program("--output", str(tmp_path / "elsewhere" / ".." / "questions.jsonl"))
    assert ended.code == 1  # there is no such directory
    ended = program("--output", str(tmp_path / "." / "questions.jsonl"))
    assert (ended.code, (tmp_path / "questions.jsonl").read_bytes()) == (2, asked)
    assert "choose another" in ended.err


def test_two_runs_do_not_write_to_one_file(program: Any, tmp_path: Path) -> None:
    import fcntl

    with (tmp_path / "out.jsonl").open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        ended = program("--output", str(tmp_path / "out.jsonl"))
    assert ended.code == 1
    assert "somebody else is writing" in ended.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_ended_in_the_middle_is_gone_on_with(
    number: signal.Signals, model: Path, tmp_path: Path, program: Any
) -> None:
    many = [{"prompt": f"cat {i}", "max_tokens": 5 + 300 * (i % 2)} for i in range(12)]
    write(tmp_path, *many)
    out = tmp_path / "out.jsonl"
    store = ["-m", str(model), "--cache-dir", str(tmp_path / "store"), "--temp", "0", "-n", "6"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mlx_promptcache", "batch", str(tmp_path / "questions.jsonl"),
         "--output", str(out), "--batch-size", "2", *store],
        stderr=subprocess.PIPE, env=processes.environment(),
    )  # fmt: skip
    end = time.monotonic() + 60
    while not (out.exists() and out.read_bytes().count(b"\n") >= 2):
        assert time.monotonic() < end
        time.sleep(0.02)
    os.kill(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else -9), err
    there = out.read_bytes().count(b"\n")
    told = program("--output", str(out), "--json").json
    assert (told["skipped"], told["answered"]) == (there, 12 - there)
    assert 2 <= there < 12
    whole = out.read_text("utf-8")
    assert [row["index"] for row in rows(whole)] == list(range(12))
    out.unlink()
    program("--output", str(out))
    assert out.read_text("utf-8") == whole


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--prompt-cache", "none"), "no state named 'none'"),
        (("--output", "/none/out.jsonl"), "cannot be written"),
        (("--prefix-file", "/none"), "cannot be read"),
        (("--prompt-cache", "x", "--prefix", "a"), "has its own prefix"),
        (("--batch-size", "0"), "--batch-size"),
    ],
)
def test_a_mistake_is_one_sentence(arguments: tuple[str, ...], sentence: str, program: Any) -> None:
    ended = program(*arguments)
    assert ended.code in {1, 2}
    assert sentence in ended.err
    assert ended.out == ""


def test_questions_come_from_standard_input_too(
    program: Any, monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    expected = program("--json").json["answers"]
    piped = io.TextIOWrapper(io.BytesIO((tmp_path / "questions.jsonl").read_bytes()))
    monkeypatch.setattr(sys, "stdin", piped)
    store = ["-m", str(model), "--cache-dir", str(tmp_path / "store"), "--temp", "0", "-n", "6"]
    assert cli.run(["batch", "-", *store, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["answers"] == expected
