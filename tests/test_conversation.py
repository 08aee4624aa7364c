"""Conversation: what was said is kept after each exchange, and is not computed again."""

from __future__ import annotations

import functools
import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import tiny
from families import FAMILIES
from mlx_promptcache import PromptCache, Runner, Sampling, saver
from mlx_promptcache.conversation import SESSIONS, Conversation
from mlx_promptcache.errors import CacheMiss, PromptError, StoreError
from mlx_promptcache.headers import block_header
from mlx_promptcache.store import BLOCKS, SNAPSHOTS, Store
from tiny import bits, digest

if TYPE_CHECKING:
    from mlx_promptcache.conversation import Exchange
    from mlx_promptcache.windows import Span

SAMPLED = Sampling(temp=1.0, top_p=0.95, repetition_penalty=1.1, seed=5)
QUESTIONS = ("The cat sat on the mat.", "And the dog?", "What is two plus two?")
EASY = 300.0  # a bias that leaves a token no rival
every_kind = pytest.mark.parametrize("kind", ["plain", "rotating", "hybrid"])


@functools.cache
def loaded(kind: str, family: str) -> tuple[Any, Any]:
    """A model and its tokenizer. The bits of what it computes depend on how passes are cut."""
    with tempfile.TemporaryDirectory() as name:
        path = tiny.on_disk(Path(name) / "model", kind, FAMILIES[family])
        runner = Runner.load(str(path), use_cache=False)
        return tiny.uneven(runner.model), runner.tokenizer


def runner_of(store: Path | None, kind: str = "plain", family: str = "chatml", **more: Any) -> Any:
    model, tokenizer = loaded(kind, family)
    cache = None if store is None else PromptCache(store, kind)
    return Runner(model, tokenizer, cache, **more)


def opened(
    store: Path, session: str | None = "s", *, system: str | None = None, **more: Any
) -> Conversation:
    """A conversation as another process would open it."""
    return Conversation(runner_of(store, **more), session, system=system)


def said(talk: Conversation, count: int = 12) -> Exchange:
    """Answer what was asked, and keep it."""
    for _ in talk.answer(count):
        pass
    exchange = talk.keep()
    assert exchange is not None
    return exchange


def ask(talk: Conversation, text: str, count: int = 12) -> Exchange:
    talk.ask(text)
    return said(talk, count)


def only(talk: Conversation, text: str) -> Sampling:
    """Sampling that says nothing but one token, which encodes to itself however often it comes."""
    (token,) = talk._runner.tokenizer.encode(text, add_special_tokens=False)
    return Sampling(logit_bias={int(token): EASY})


def state_of(talk: Conversation) -> str:
    """All bits of what a conversation holds."""
    assert talk._run is not None
    return digest(talk._run.state())


def fed(talk: Conversation) -> int:
    fed_tokens: int = talk._runner.tokens_fed
    return fed_tokens


def files(store: Path) -> dict[str, set[str]]:
    kept = Store(store)
    return {kind: set(kept.stems(kind)) for kind in (BLOCKS, SNAPSHOTS)}


# Going on


@every_kind
def test_a_conversation_that_was_ended_after_each_answer_is_one_that_was_not_bit_for_bit(
    kind: str, tmp_path: Path
) -> None:
    straight = opened(tmp_path / "straight", kind=kind)
    straight.sample(SAMPLED)
    whole = [ask(straight, question) for question in QUESTIONS]
    parts: list[Exchange] = []
    for question in QUESTIONS:
        talk = opened(tmp_path / "parts", kind=kind)
        assert fed(talk) == 0
        talk.sample(talk.sampling if parts else SAMPLED)
        parts.append(ask(talk, question))
    assert [e.text for e in parts] == [e.text for e in whole]
    assert [e.prefilled_tokens for e in parts] == [e.prefilled_tokens for e in whole]
    assert state_of(talk) == state_of(straight)
    assert talk.messages == straight.messages
    assert len(talk.messages) == 2 * len(QUESTIONS)


@pytest.mark.parametrize("family", ["chatml", "llama3", "zephyr"])
@every_kind
def test_a_question_feeds_only_what_is_new(kind: str, family: str, tmp_path: Path) -> None:
    talk = opened(tmp_path, kind=kind, family=family)
    talk.sample(only(talk, "Z"))
    first = ask(talk, QUESTIONS[0])
    assert first.text == "Z" * 12
    held = talk.n_past
    second = ask(talk, QUESTIONS[1])
    assert (second.cached_tokens, second.prefilled_tokens) == (held, second.prompt_tokens - held)
    assert second.prefilled_tokens < first.prompt_tokens + 12  # not what was said before
    again = opened(tmp_path, kind=kind, family=family)
    third = ask(again, QUESTIONS[2])
    assert third.cached_tokens == talk.n_past
    assert fed(again) == third.prefilled_tokens + third.generation_tokens


def test_an_answer_that_the_template_rewrites_is_fed_before_the_next_question_where_layers_need_it(
    tmp_path: Path,
) -> None:
    """Else each question would have to wait for the last answer: opaque layers forget nothing."""
    talk = opened(tmp_path, kind="hybrid", family="qwen3")
    talk.sample(SAMPLED)
    ask(talk, QUESTIONS[0])
    held = opened(tmp_path, kind="hybrid", family="qwen3")
    second = ask(held, QUESTIONS[1])
    alone = len(held._runner.tokenizer.encode(QUESTIONS[1]))
    assert second.prefilled_tokens <= alone + 8  # the end of the turn, and the next one's words
    assert fed(held) >= second.prefilled_tokens + second.generation_tokens


def test_a_conversation_without_a_store_goes_on_too() -> None:
    talk = Conversation(runner_of(None))
    talk.sample(only(talk, "Z"))
    ask(talk, QUESTIONS[0])
    assert ask(talk, QUESTIONS[1]).cached_tokens > 0
    assert talk.undo() == 1
    assert [m["content"] for m in talk.messages] == [QUESTIONS[0], "Z" * 12]


def test_a_seed_begins_the_draws_anew_and_without_one_they_go_on(tmp_path: Path) -> None:
    talk = opened(tmp_path)
    talk.sample(SAMPLED)
    assert talk._key is not None
    begun = bits(talk._key)
    ask(talk, QUESTIONS[0])
    gone_on = opened(tmp_path)
    assert gone_on._key is not None
    assert bits(gone_on._key) != begun
    assert gone_on.sampling.temp == SAMPLED.temp
    gone_on.sample(SAMPLED)
    assert bits(gone_on._key) == begun


# What is stored


def test_an_exchange_writes_its_own_tokens_and_two_snapshots(tmp_path: Path) -> None:
    talk = opened(tmp_path)
    talk.sample(only(talk, "Z"))
    ask(talk, QUESTIONS[0] * 20)
    before = files(tmp_path)
    exchange = ask(talk, QUESTIONS[1])
    after = files(tmp_path)
    new = after[BLOCKS] - before[BLOCKS]
    tokens = sum(len(block_header(Store(tmp_path), stem).content["tokens"]) for stem in new)
    assert before[BLOCKS] < after[BLOCKS]
    assert tokens == exchange.prefilled_tokens + exchange.generation_tokens
    assert len(after[SNAPSHOTS] - before[SNAPSHOTS]) == 2
    paths = [Store(tmp_path).path(k, s) for k in after for s in after[k] - before[k]]
    assert exchange.bytes_written == sum(path.stat().st_size for path in paths)


def test_what_is_on_the_drive_is_not_read_and_synced_again_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = opened(tmp_path)
    ask(talk, QUESTIONS[0] * 40)
    synced: list[int] = []

    def count(self: Store, those: list[tuple[str, str]]) -> None:
        synced.append(len(those))

    monkeypatch.setattr(Store, "sync", count)
    talk.sample(only(talk, "Z"))
    ask(talk, QUESTIONS[1])
    assert len(files(tmp_path)[BLOCKS]) > 3
    assert synced == [2, 2]  # the question's block and snapshot, the answer's


def test_what_is_stored_is_not_packed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = opened(tmp_path)
    talk.sample(only(talk, "Z"))
    ask(talk, QUESTIONS[0] * 40)
    held, begun = talk.n_past, []
    piece = saver.Saver._piece

    def count(self: saver.Saver, span: Span, *pool: Any) -> Any:
        begun.append(span.start)
        return piece(self, span, *pool)

    monkeypatch.setattr(saver.Saver, "_piece", count)
    ask(talk, QUESTIONS[1])
    assert begun
    assert min(begun) == held


def test_a_session_is_listed_under_its_name_and_can_be_cleared(tmp_path: Path) -> None:
    talk = opened(tmp_path, "my talk")
    ask(talk, QUESTIONS[0])
    cache = PromptCache(tmp_path, "plain")
    assert [e.name for e in cache.list() if e.name] == ["chat.my talk"]
    cache.prune(0)  # evicts all that has no name
    assert ask(opened(tmp_path, "my talk"), QUESTIONS[1]).cached_tokens > 0
    cache.clear(["chat.my talk"])
    assert opened(tmp_path, "my talk").messages == ()


def test_a_conversation_without_a_session_is_kept_as_prompts_are(tmp_path: Path) -> None:
    talk = opened(tmp_path, None)
    talk.sample(only(talk, "Z"))
    ask(talk, QUESTIONS[0])
    assert Store(tmp_path).names.all() == {}
    other = opened(tmp_path, None)
    other.sample(only(other, "Z"))
    again = ask(other, QUESTIONS[0])
    assert again.prefilled_tokens == 0
    other.save("kept")
    state = PromptCache(tmp_path, "plain").load("kept")
    assert state.n_past == other.n_past
    assert state.origin.messages == other.messages


def test_a_store_that_is_full_is_a_notice_and_the_talk_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    talk = opened(tmp_path)
    talk.sample(only(talk, "Z"))
    ask(talk, QUESTIONS[0])

    def full(*args: Any, **more: Any) -> None:
        raise StoreError("no space is left")

    with monkeypatch.context() as patch:
        patch.setattr(PromptCache, "save", full)
        assert ask(talk, QUESTIONS[1]).bytes_written == 0
    assert "this exchange is not stored: no space is left" in caplog.text
    assert len(opened(tmp_path).questions) == 1
    ask(talk, QUESTIONS[2])
    assert opened(tmp_path).questions == list(QUESTIONS)


# Crashes


def test_a_crash_in_the_middle_of_an_answer_loses_nothing_but_the_answer(tmp_path: Path) -> None:
    talk = opened(tmp_path)
    talk.sample(SAMPLED)
    ask(talk, QUESTIONS[0])
    talk.ask(QUESTIONS[1])
    steps = [step.token for step in talk.answer(12)]  # and then the power is cut
    back = opened(tmp_path)
    assert back.unanswered
    assert back.questions == list(QUESTIONS[:2])
    before = fed(back)
    back.retry()
    assert fed(back) == before
    assert [step.token for step in back.answer(12)] == steps
    back.keep()
    assert not opened(tmp_path).unanswered


def test_a_question_that_was_never_answered_gives_way_to_another(tmp_path: Path) -> None:
    talk = opened(tmp_path)
    talk.ask(QUESTIONS[0])
    back = opened(tmp_path)
    ask(back, QUESTIONS[1])
    assert back.questions == [QUESTIONS[1]]


def test_an_answer_that_is_stopped_is_kept_as_far_as_it_came(tmp_path: Path) -> None:
    talk = opened(tmp_path)
    talk.sample(only(talk, "Z"))
    talk.ask(QUESTIONS[0])
    for count, _ in enumerate(talk.answer(50), 1):
        if count == 4:
            break
    exchange = talk.keep()
    assert exchange is not None
    assert (exchange.text, exchange.finish_reason) == ("ZZZZ", "interrupted")
    assert opened(tmp_path).messages[-1]["content"] == "ZZZZ"


def test_a_question_whose_prompt_was_interrupted_is_taken_back(tmp_path: Path) -> None:
    talk = opened(tmp_path)
    talk.sample(only(talk, "Z"))
    ask(talk, QUESTIONS[0])
    calls = []

    def stop(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        talk.ask("cat " * 800, progress=stop)
    assert talk.questions == [QUESTIONS[0]]
    assert opened(tmp_path).questions == [QUESTIONS[0]]
    exchange = ask(talk, "cat " * 800)
    assert exchange.cached_tokens >= 512  # what was fed until then serves


# Back and aside


@every_kind
def test_to_undo_is_to_stand_where_it_stood_before(kind: str, tmp_path: Path) -> None:
    talk = opened(tmp_path, kind=kind)
    talk.sample(SAMPLED)
    ask(talk, QUESTIONS[0])
    before, there = state_of(opened(tmp_path, kind=kind)), talk.n_past
    once = ask(talk, QUESTIONS[1])
    stored, counted = files(tmp_path), fed(talk)
    assert talk.undo() == 1
    assert (files(tmp_path), fed(talk)) == (stored, counted)  # nothing written, nothing fed
    assert (state_of(talk), talk.n_past) == (before, there)
    assert state_of(opened(tmp_path, kind=kind)) == before
    assert ask(talk, QUESTIONS[1]).text == once.text


def test_to_undo_keeps_the_sampling_that_was_chosen_since(tmp_path: Path) -> None:
    talk = opened(tmp_path)
    ask(talk, QUESTIONS[0])
    talk.sample(SAMPLED)
    ask(talk, QUESTIONS[1])
    talk.undo()
    assert talk.sampling.temp == SAMPLED.temp


def test_to_undo_what_somebody_else_has_gone_on_with_leaves_theirs_alone(tmp_path: Path) -> None:
    talk = opened(tmp_path)
    ask(talk, QUESTIONS[0])
    ask(talk, QUESTIONS[1])
    theirs = opened(tmp_path)
    ask(theirs, QUESTIONS[2])
    talk.undo()
    assert opened(tmp_path).questions == list(QUESTIONS)
    assert opened(tmp_path, "s-2").questions == [QUESTIONS[0]]


def test_several_exchanges_are_undone_at_once_and_no_more_than_there_are(tmp_path: Path) -> None:
    talk = opened(tmp_path)
    for question in QUESTIONS:
        ask(talk, question)
    assert opened(tmp_path).undo(2) == 2
    assert opened(tmp_path).questions == [QUESTIONS[0]]
    back = opened(tmp_path)
    assert (back.undo(9), back.messages) == (1, ())
    assert Store(tmp_path).names.all() == {}
    assert back.undo() == 0
    ask(back, QUESTIONS[2])
    assert opened(tmp_path).questions == [QUESTIONS[2]]


def test_an_earlier_state_that_was_evicted_is_computed_again(tmp_path: Path) -> None:
    talk = opened(tmp_path, kind="hybrid")
    talk.sample(only(talk, "Z"))
    ask(talk, QUESTIONS[0])
    ask(talk, QUESTIONS[1])
    PromptCache(tmp_path, "hybrid").prune(0)
    back = opened(tmp_path, kind="hybrid")
    assert back.undo() == 1
    assert fed(back) > 0
    assert [m["content"] for m in opened(tmp_path, kind="hybrid").messages] == [
        QUESTIONS[0], "Z" * 12,
    ]  # fmt: skip
    assert back.undo() == 1
    assert back.messages == ()


def test_the_system_prompt_stays_when_all_is_undone(tmp_path: Path) -> None:
    talk = opened(tmp_path, system="You are a cat.")
    ask(talk, QUESTIONS[0])
    talk.undo()
    assert [m["role"] for m in opened(tmp_path).messages] == ["system"]


@every_kind
def test_a_branch_shares_all_that_was_said(kind: str, tmp_path: Path) -> None:
    talk = opened(tmp_path, kind=kind)
    talk.sample(SAMPLED)
    ask(talk, QUESTIONS[0])
    stored = files(tmp_path)
    talk.branch("aside")
    assert files(tmp_path) == stored  # not a byte but the name
    ask(talk, QUESTIONS[1])
    assert opened(tmp_path, "aside", kind=kind).questions == list(QUESTIONS[:2])
    old = opened(tmp_path, kind=kind)
    assert old.questions == [QUESTIONS[0]]
    assert ask(old, QUESTIONS[1]).text == talk.exchanges[-1].text
    with pytest.raises(StoreError, match=r"another state named 'chat\.aside'"):
        old.branch("aside")


def test_a_saved_state_has_a_name_of_its_own(tmp_path: Path) -> None:
    talk = opened(tmp_path)
    ask(talk, QUESTIONS[0])
    talk.save("here")
    ask(talk, QUESTIONS[1])
    state = PromptCache(tmp_path, "plain").load("here")
    assert state.origin.messages == talk.messages[:2]
    with pytest.raises(StoreError, match="named 'here'"):
        talk.save("here")


def test_nothing_can_be_named_before_something_was_said(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="ask something first"):
        opened(tmp_path).branch("aside")


def test_to_retry_draws_another_answer_and_the_old_one_stays_until_it_is_kept(
    tmp_path: Path,
) -> None:
    talk = opened(tmp_path)
    talk.sample(SAMPLED)
    ask(talk, QUESTIONS[0])
    old = ask(talk, QUESTIONS[1])
    talk.retry()
    steps = talk.answer(12)
    next(steps)
    assert opened(tmp_path).messages[-1]["content"] == old.text
    for _ in steps:
        pass
    new = talk.keep()
    assert new is not None
    assert new.text != old.text
    assert new.prefilled_tokens == 0
    assert opened(tmp_path).messages[-1]["content"] == new.text
    talk.undo()
    assert talk.questions == [QUESTIONS[0]]


def test_to_edit_is_to_ask_something_else_instead(tmp_path: Path) -> None:
    talk = opened(tmp_path)
    ask(talk, QUESTIONS[0])
    ask(talk, QUESTIONS[1])
    talk.edit(QUESTIONS[2])
    said(talk)
    assert opened(tmp_path).questions == [QUESTIONS[0], QUESTIONS[2]]
    talk.undo()
    assert opened(tmp_path).questions == [QUESTIONS[0]]


@pytest.mark.parametrize("what", ["retry", "edit"])
def test_nothing_was_asked_yet(what: str, tmp_path: Path) -> None:
    talk = opened(tmp_path)
    with pytest.raises(PromptError, match="nothing was asked yet"):
        talk.retry() if what == "retry" else talk.edit("cat")
    with pytest.raises(PromptError, match="no question to be answered"):
        next(talk.answer(1))


# What cannot be


def test_a_question_that_does_not_fit_the_context_is_refused_and_nothing_else_is_lost(
    tmp_path: Path,
) -> None:
    talk = opened(tmp_path, context_length=120)
    talk.sample(only(talk, "Z"))
    ask(talk, QUESTIONS[0])
    with pytest.raises(PromptError, match="context ends at 120: take exchanges back"):
        talk.ask("cat " * 90)
    assert ask(talk, QUESTIONS[1], 300).finish_reason == "length"
    assert talk.n_past == 120
    with pytest.raises(PromptError, match="context ends at 120"):
        talk.ask(QUESTIONS[2])


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_question_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="the question is empty"):
        opened(tmp_path).ask(text)


def test_a_session_keeps_its_system_prompt(tmp_path: Path) -> None:
    ask(opened(tmp_path, system="You are a cat."), QUESTIONS[0])
    for system in (None, "You are a cat."):
        assert opened(tmp_path, system=system).messages[0]["content"] == "You are a cat."
    with pytest.raises(PromptError, match="begun with another system prompt"):
        opened(tmp_path, system="You are a dog.")


def test_a_template_that_takes_no_system_prompt_says_so_at_once(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="there is no system role"):
        opened(tmp_path, family="gemma2", system="You are a cat.")


def test_a_model_without_a_template_cannot_talk(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="no chat template"):
        opened(tmp_path, family="plain")


def test_a_session_of_another_model_is_left_alone(tmp_path: Path) -> None:
    ask(opened(tmp_path), QUESTIONS[0])
    with pytest.raises(CacheMiss, match="choose another session, or clear it"):
        opened(tmp_path, kind="rotating")
    assert opened(tmp_path).questions == [QUESTIONS[0]]


def test_a_state_that_is_no_conversation_is_no_session(tmp_path: Path) -> None:
    runner = runner_of(tmp_path)
    runner.cache.save("chat.s", runner.prefill("The cat sat on the mat."))
    with pytest.raises(CacheMiss, match="is no conversation"):
        opened(tmp_path)


def test_a_damaged_session_is_computed_again_from_what_was_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    talk = opened(tmp_path)
    talk.sample(only(talk, "Z"))
    ask(talk, QUESTIONS[0])
    for stem in Store(tmp_path).stems(BLOCKS):
        path = Store(tmp_path).path(BLOCKS, stem)
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(bytes(raw))
    with caplog.at_level(logging.WARNING):
        back = opened(tmp_path)
    assert "computed again" in caplog.text
    assert back.messages == talk.messages
    assert ask(back, QUESTIONS[1]).prefilled_tokens > 0
    assert opened(tmp_path).questions == list(QUESTIONS[:2])


def test_a_session_that_somebody_else_has_gone_on_with_is_not_overwritten(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ask(opened(tmp_path), QUESTIONS[0])
    mine, theirs = opened(tmp_path), opened(tmp_path)
    ask(theirs, QUESTIONS[1])
    ask(mine, QUESTIONS[2])
    assert "goes on as s-2" in caplog.text
    assert opened(tmp_path).questions == list(QUESTIONS[:2])
    assert opened(tmp_path, "s-2").questions == [QUESTIONS[0], QUESTIONS[2]]


def test_a_session_needs_a_store_that_can_be_written(tmp_path: Path) -> None:
    model, tokenizer = loaded("plain", "chatml")
    runner = Runner(model, tokenizer, PromptCache(tmp_path, "plain", read_only=True))
    with pytest.raises(StoreError, match="leave the session out"):
        Conversation(runner, "s")
    ask(Conversation(runner), QUESTIONS[0])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("session", ["", "../x", "a/b", "-x", "x" * 300])
def test_a_session_must_have_a_name_that_a_file_can_have(session: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be a name"):
        opened(tmp_path, session)
    assert SESSIONS.isascii()
