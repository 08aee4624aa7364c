"""Text and chats to tokens, in the shapes of real families: whatever is stored, what is fed is what
the whole prompt gives, rendered and encoded at once.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from mlx_lm.tokenizer_utils import load as load_tokenizer

import tiny
from families import FAMILIES
from mlx_promptcache import Runner, checkpoint, cli
from mlx_promptcache.errors import PromptError
from mlx_promptcache.prompt import CONTINUATIONS, TAIL, Prompter, answered
from mlx_promptcache.state import Origin
from mlx_promptcache.tree import agreeing
from processes import Ended

if TYPE_CHECKING:
    import mlx.core as mx

    from mlx_promptcache.run import Run

    Chat = list[dict[str, Any]]

USER = {"role": "user", "content": "Hello"}
SYSTEM = "You are a helpful assistant."
TALKING = [name for name, family in FAMILIES.items() if family.template]
PREFIXES = [
    "The cat sat on the mat, and the d",
    "Question: what is two plus two? Answer:",
    "Examples: ",
    "Hello, world!\n\n",
    "naïve caf",
    "🐈",
]
RESTS = ["four", " four", "-", "\n \nAnswer: four."]
SEAMS = [
    *RESTS,
    "a",
    " a",
    "\n",
    "\n\na",
    " ",
    "1",
    ".",
    "é",
    "  four",
    "fé🐈",
    "</s>a",
    "'s",
    "\t",
]
GOING_ON = "og sat on the cat."  # the word that the first of the prefixes begins

every_family = pytest.mark.parametrize("name", FAMILIES)
every_talking_family = pytest.mark.parametrize("name", TALKING)
both_kinds = pytest.mark.parametrize("kind", ["plain", "rotating"])


@dataclass(frozen=True)
class Answer:
    """What a `generate` said, and the prompt that it held and fed to say it."""

    prompt: list[int]
    cached: int
    tokens: list[int]
    text: str


class Talk:
    """A model of a family and a store of its own; commands run in this process, and are watched."""

    def __init__(
        self, name: str, kind: str, model: Path, store: Path, run: Callable[..., Ended]
    ) -> None:
        self.family, self.model, self.store = FAMILIES[name], model, store
        self.sliceable = kind != "hybrid"
        self.tokenizer = load_tokenizer(model)
        self.fed: list[int] = []
        self.started: list[Run] = []
        self._run = run
        others = [*self.family.specials, *([self.family.bos] if self.family.bos else [])]
        ids = [self.tokenizer.convert_tokens_to_ids(special) for special in others]
        # An answer of random weights is no chat of its own.
        self.plainly = [part for i in ids for part in ("--logit-bias", f"{i}=-10000")]

    def __call__(self, command: str, *arguments: str | Path) -> Ended:
        chosen = ("-m", self.model, "--cache-dir", self.store)
        return self._run(command, *arguments, *chosen)

    def generate(self, *arguments: str | Path, count: int = 1) -> Answer:
        """Generate, and check that what was held and fed makes the prompt, once."""
        self.fed.clear()
        self.started.clear()
        options = ("-n", str(count), "--temp", "0", "--json", *self.plainly)
        said = self("generate", *arguments, *options).json
        (run,) = self.started
        prompt = list(run.prompt_state().tokens)
        assert said["cached_tokens"] + said["prefilled_tokens"] == len(prompt)
        assert self.fed[: said["prefilled_tokens"]] == prompt[said["cached_tokens"] :]
        return Answer(prompt, said["cached_tokens"], said["tokens"], said["text"])

    def text(self, text: str) -> list[str | Path]:
        """The options that give a prompt of text, whatever it begins with."""
        file = self.store.with_name("prompt.txt")
        file.write_text(text, "utf-8")
        return ["--prompt-file", file]

    def messages(self, *turns: str) -> Chat:
        """User and assistant in turn, after a system message where the family takes one."""
        system = [{"role": "system", "content": SYSTEM}] if self.family.system else []
        roles = ("user", "assistant")
        return [*system, *({"role": roles[i % 2], "content": t} for i, t in enumerate(turns))]

    @property
    def system(self) -> list[str]:
        """The option that says the same as the first of `messages`."""
        return ["--system-prompt", SYSTEM] if self.family.system and self.family.template else []

    def whole(self, prompt: str | Chat) -> list[int]:
        """The tokens of a text or a chat, rendered and encoded at once by the tokenizer alone."""
        if isinstance(prompt, str) and self.family.template:
            prompt = self.messages(prompt)
        if isinstance(prompt, str):
            return list(self.tokenizer.encode(prompt))
        goes_on = prompt[-1]["role"] == "assistant"
        text = self.tokenizer.apply_chat_template(
            prompt, tokenize=False, add_generation_prompt=not goes_on,
            continue_final_message=goes_on,
        )  # fmt: skip
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def unanswered(self, turns: list[str]) -> list[int]:
        """The tokens of a chat up to where an answer is asked for."""
        text = self.tokenizer.apply_chat_template(self.messages(*turns), tokenize=False)
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def reusable(self, held: list[list[int]], prompt: list[int]) -> int:
        """How much of a prompt can be reused where these prompts are held, whole."""
        if self.sliceable:
            return max((agreeing(other, prompt) for other in held), default=0)
        return max((len(other) for other in held if other == prompt[: len(other)]), default=0)

    def left_by_next_turn(self, turns: list[str], prompt: list[int]) -> list[int]:
        """What another turn leaves of a prompt, where that is most of it."""
        following = self.whole(self.messages(*turns, "a", "a"))
        position = agreeing(following, prompt)
        return prompt[:position] if 2 * position > len(prompt) else []

    def assert_begins_once(self, prompt: list[int]) -> None:
        """There is a beginning of the sequence where there should be one, and nowhere else."""
        bos = self.tokenizer.bos_token_id
        begins = self.family.begins
        assert (prompt.count(bos), prompt[0] == bos) == (begins, begins)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    directory = tmp_path_factory.mktemp("models")
    return functools.cache(
        lambda name, kind: tiny.on_disk(directory / f"{name} {kind}", kind, FAMILIES[name])
    )


@pytest.fixture
def talk(
    models: Callable[[str, str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Talk]:
    """Makes a talk with a model of a family."""

    def run(*arguments: str | Path) -> Ended:
        code = cli.run(list(map(str, arguments)))
        return Ended(code, *capsys.readouterr())

    def of(name: str, kind: str = "plain") -> Talk:
        talk = Talk(name, kind, models(name, kind), tmp_path / "store", run)
        forward, start = Runner.forward, Runner.start

        def watched(self: Runner, inputs: mx.array, layers: list[Any]) -> Any:
            fed: Any = inputs[0].tolist()
            talk.fed.extend(fed)
            return forward(self, inputs, layers)

        def started(self: Runner, *args: Any, **options: Any) -> Run:
            talk.started.append(start(self, *args, **options))
            return talk.started[-1]

        monkeypatch.setattr(Runner, "forward", watched)
        monkeypatch.setattr(Runner, "start", started)
        return talk

    load = functools.cache(checkpoint.load)
    monkeypatch.setattr(checkpoint, "load", load)
    return of


def common(prompts: list[list[int]]) -> int:
    """How many tokens all prompts begin with."""
    return min(agreeing(prompts[0], prompt) for prompt in prompts)


# Text, and text in a user message


@every_family
@both_kinds
def test_a_cold_prompt_is_encoded_as_the_tokenizer_does_it(
    name: str, kind: str, talk: Callable[..., Talk]
) -> None:
    it = talk(name, kind)
    for text in PREFIXES:
        answer = it.generate(*it.system, *it.text(text), "--no-prompt-cache")
        assert answer.prompt == it.whole(text)
        it.assert_begins_once(answer.prompt)


@every_family
def test_what_is_kept_of_a_text_is_what_it_has_in_common_with_its_continuations(
    name: str, talk: Callable[..., Talk]
) -> None:
    it = talk(name)
    system = SYSTEM if it.system else None
    for prefix in PREFIXES:
        kept = Prompter(it.tokenizer).beginning(
            Origin(prefix, None, system, it.family.template is not None)
        )
        wholes = [it.whole(prefix + rest) for rest in SEAMS]
        assert len(kept.tokens) == common(wholes)  # neither before the seam nor beyond it
        assert list(kept.tokens) == wholes[0][: len(kept.tokens)]


LONG = {
    "sentences": "The cat sat on the mat, and the dog sat on the cat. " * 200,
    "one word": "a" * 6000,
    "a word without a pattern": "".join(random.Random(1).choices("abcdeino", k=6000)),
    "spaces": "a" + " " * 6000,
    "signs": "🐈" * 1500,
    "special tokens": "</s><s><|im_end|>" * 400,
}


@every_family
@pytest.mark.parametrize("kind", LONG)
def test_of_a_long_text_as_much_is_kept_and_only_its_end_is_encoded_again(
    name: str, kind: str, talk: Callable[..., Talk], monkeypatch: pytest.MonkeyPatch
) -> None:
    it, prefix = talk(name), LONG[kind]
    system = SYSTEM if it.system else None
    origin = Origin(prefix, None, system, it.family.template is not None)
    wholes = [it.whole(prefix + rest) for rest in CONTINUATIONS]
    encoded: list[int] = []
    encode = Prompter.encode_text

    def counted(self: Prompter, text: str, *, special: bool) -> list[int]:
        encoded.append(len(text))
        return encode(self, text, special=special)

    monkeypatch.setattr(Prompter, "encode_text", counted)
    kept = Prompter(it.tokenizer).beginning(origin)
    assert list(kept.tokens) == wholes[0][: common(wholes)]
    if kind == "sentences":
        assert sum(encoded) < 4 * len(prefix)
    encoded.clear()
    longer = Origin(prefix + " Then it ran.", None, system, origin.template)
    whole = Prompter(it.tokenizer).whole(longer, origin)
    assert list(whole.tokens) == it.whole(prefix + " Then it ran.")
    assert whole.boundaries == (agreeing(kept.tokens, whole.tokens),)
    if kind == "sentences":
        assert sum(length >= len(prefix) for length in encoded) == 1


class InPairs:
    """A tokenizer whose every token depends on where the text began."""

    bos_token = None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        pairs = [int.from_bytes(text[i : i + 2].encode(), "big") for i in range(0, len(text), 2)]
        return [*pairs, 0] if add_special_tokens else pairs  # it closes texts, as some do


class NoSystem(InPairs):
    """A tokenizer whose template takes no system's message."""

    has_chat_template = True

    def apply_chat_template(self, chat: list[dict[str, str]], **_: Any) -> str:
        if any(message["role"] == "system" for message in chat):
            raise ValueError("no system")
        return "".join(message["content"] for message in chat)


def test_that_a_prompt_is_empty_is_told_before_what_is_wrong_with_its_prefix() -> None:
    it = Prompter(NoSystem())
    prefix = Origin(messages=({"role": "system", "content": "Be brief."},))
    for text, told in (("", "the prompt is empty"), ("a", "no system")):
        with pytest.raises(PromptError, match=told):
            it.whole(Origin(messages=({"role": "user", "content": text},)), prefix)


@pytest.mark.parametrize("length", [4, 5, TAIL + 3, 3 * TAIL, 3 * TAIL + 1])
def test_what_does_not_line_up_is_encoded_whole(length: int) -> None:
    it, prefix = InPairs(), "".join(random.Random(2).choices("abcdefgh", k=length))
    kept = Prompter(it).beginning(Origin(prefix)).tokens
    assert list(kept) == it.encode(prefix, add_special_tokens=False)[: length // 2]


@every_family
@both_kinds
def test_what_follows_a_saved_text_is_encoded_with_it_and_all_that_was_saved_is_reused(
    name: str, kind: str, talk: Callable[..., Talk]
) -> None:
    it = talk(name, kind)
    for prefix in PREFIXES:
        saved = it("save", "few", *it.text(prefix), *it.system, "--force", "--json").json["tokens"]
        held = [it.whole(prefix + "a")[:saved]]
        for rest in RESTS:
            answer = it.generate("--prompt-cache", "few", *it.text(rest), "--prompt-cache-ro")
            assert answer.prompt == it.whole(prefix + rest)
            assert answer.cached == it.reusable(held, answer.prompt) == saved
        cold = it.generate(*it.system, *it.text(prefix + rest), "--no-prompt-cache")
        assert answer.tokens == cold.tokens


@every_family
@both_kinds
def test_a_declared_prefix_ends_where_its_continuations_begin_to_differ(
    name: str, kind: str, talk: Callable[..., Talk]
) -> None:
    it = talk(name, kind)
    held: list[list[int]] = []
    for prefix in PREFIXES:
        boundary = common([it.whole(prefix + rest) for rest in SEAMS])
        for rest in RESTS:
            answer = it.generate(*it.system, "--prefix", prefix, *it.text(rest))
            assert answer.prompt == it.whole(prefix + rest)
            it.assert_begins_once(answer.prompt)
            assert answer.cached == it.reusable(held, answer.prompt)
            held += [answer.prompt, answer.prompt[:boundary]]
        assert answer.cached >= boundary


@every_family
@both_kinds
def test_a_word_that_goes_on_after_the_seam_is_encoded_as_one(
    name: str, kind: str, talk: Callable[..., Talk]
) -> None:
    it = talk(name, kind)
    saved = it("save", "few", *it.text(PREFIXES[0]), *it.system, "--json").json["tokens"]
    whole = it.whole(PREFIXES[0] + GOING_ON)
    reusable = it.reusable([it.whole(PREFIXES[0] + "a")[:saved]], whole)
    assert reusable < saved  # the last token that was kept is another one now
    answer = it.generate("--prompt-cache", "few", *it.text(GOING_ON), "--prompt-cache-ro")
    assert (answer.prompt, answer.cached) == (whole, reusable)


@every_family
def test_exact_runs_after_a_saved_text_reuse_it_as_well(
    name: str, talk: Callable[..., Talk]
) -> None:
    it = talk(name)
    saved = it("save", "few", *it.text(PREFIXES[1]), *it.system, "--json").json["tokens"]
    answer = it.generate("--prompt-cache", "few", *it.text(" four"), "--exact")
    assert answer.cached == saved


def test_a_text_that_may_become_another_token_altogether_is_told(
    talk: Callable[..., Talk],
) -> None:
    it = talk("chatml")
    assert common([it.tokenizer.encode(text) for text in (" ", "  ", " a")]) == 0
    ended = it("save", "few", *it.text(" "), "--ignore-chat-template")
    (line,) = ended.err.splitlines()
    assert (ended.code, ended.out) == (1, "")
    assert "give a longer one" in line


# Chats

QUESTIONS = ["Hello, world!", " what is two plus two? ", "And the dog?\n"]


@every_talking_family
@both_kinds
def test_a_chat_that_grows_is_rendered_whole_and_reuses_all_that_stays(
    name: str, kind: str, talk: Callable[..., Talk], tmp_path: Path
) -> None:
    it, file = talk(name, kind), tmp_path / "chat.json"
    turns: list[str] = []
    held: list[list[int]] = []
    for question in QUESTIONS:
        turns.append(question)
        file.write_text(json.dumps(it.messages(*turns)), "utf-8")
        cold = it.generate("--messages", file, "--no-prompt-cache", count=6)
        answer = it.generate("--messages", file, "--prompt-cache-all", count=6)
        assert answer.prompt == cold.prompt == it.whole(it.messages(*turns))
        assert answer.tokens == cold.tokens
        it.assert_begins_once(answer.prompt)
        assert answer.cached == it.reusable(held, answer.prompt)
        held += [answer.prompt, answer.prompt + answer.tokens]
        held.append(it.left_by_next_turn(turns, answer.prompt))
        turns.append(answer.text)
    if name != "mistral":  # which says its system message again, last
        assert answer.cached > len(answer.prompt) // 2


@every_talking_family
@both_kinds
def test_a_chat_that_was_named_goes_on_by_a_message_after_its_answer(
    name: str, kind: str, talk: Callable[..., Talk]
) -> None:
    it = talk(name, kind)
    first = it.generate(*it.system, *it.text(QUESTIONS[0]), "--save-as", "talk", count=6)
    turns = [QUESTIONS[0], first.text]
    for question in QUESTIONS[1:]:
        turns.append(question)
        chosen = ("--prompt-cache", "talk", "--save-as", "talk")
        answer = it.generate(*chosen, *it.text(question), count=6)
        assert answer.prompt == it.whole(it.messages(*turns))
        it.assert_begins_once(answer.prompt)
        turns.append(answer.text)


@every_talking_family
@both_kinds
def test_an_answer_that_was_cut_goes_on_where_it_was_cut(
    name: str, kind: str, talk: Callable[..., Talk]
) -> None:
    it = talk(name, kind)
    first = it.generate(*it.system, *it.text("Hello"), "--save-as", "talk", count=4)
    going_on = it.generate("--prompt-cache", "talk", "--save-as", "longer", count=3)
    assert going_on.prompt == it.whole(it.messages("Hello", first.text))
    loaded = it("load", "talk", "-n", "3", "--save-as", "loaded", "--json").json
    for saved, text in (("longer", going_on.text), ("loaded", loaded["text"])):
        answer = it.generate("--prompt-cache", saved, *it.text("And now?"))
        assert answer.prompt == it.whole(it.messages("Hello", first.text + text, "And now?"))


@every_family
@both_kinds
def test_text_that_was_generated_after_a_saved_text_goes_on_as_text(
    name: str, kind: str, talk: Callable[..., Talk]
) -> None:
    it = talk(name, kind)
    it("save", "few", *it.text(PREFIXES[0]), *it.system)
    loaded = it("load", "few", "-n", "5", "--save-as", "longer", "--json", *it.plainly).json
    text = PREFIXES[0] + loaded["text"]
    answer = it.generate("--prompt-cache", "longer", "-p", " And now?")
    assert answer.prompt == it.whole(text + " And now?")


def test_plain_text_goes_on_after_its_answer(talk: Callable[..., Talk]) -> None:
    it = talk("plain")
    text = PREFIXES[0]
    for count in (5, 3, 1):
        chosen = ["--prompt-cache", "talk"] if text != PREFIXES[0] else it.text(text)
        answer = it.generate(*chosen, "--save-as", "talk", count=count)
        assert answer.prompt == it.whole(text)
        text += answer.text


@every_talking_family
def test_what_was_generated_between_two_messages_is_gone_on_from_by_its_tokens(
    name: str, talk: Callable[..., Talk], tmp_path: Path
) -> None:
    it, file = talk(name), tmp_path / "chat.json"
    file.write_text(json.dumps(it.messages("Hello", "Four.")), "utf-8")
    it("save", "talk", "--messages", file)
    it("load", "talk", "-n", "4", "--save-as", "longer")
    tokens = it("show", "longer", "--tokens", "--json").json["token_ids"]
    answer = it.generate("--prompt-cache", "longer", "-p", " And now?")
    following = it.tokenizer.encode(" And now?", add_special_tokens=False)
    assert (answer.prompt, answer.cached) == ([*tokens, *following], len(tokens))


@every_talking_family
@pytest.mark.parametrize("kind", ["plain", "rotating", "hybrid"])
def test_only_layers_that_cannot_be_cut_need_a_state_where_the_next_turn_begins(
    name: str, kind: str, talk: Callable[..., Talk]
) -> None:
    it = talk(name, kind)
    runner = Runner.load(str(it.model), use_cache=False)
    prompt = runner.prompter.whole(Origin(messages=tuple(it.messages("Hello"))))
    left = it.left_by_next_turn(["Hello"], list(prompt.tokens))
    needed = not it.sliceable and 0 < len(left) < len(prompt.tokens)
    assert prompt.boundaries == ((len(left),) if needed else ())
    assert needed == (kind == "hybrid" and name == "qwen3, silent")


@every_talking_family
@both_kinds
def test_a_saved_chat_goes_on_by_a_message_or_by_its_answer(
    name: str, kind: str, talk: Callable[..., Talk], tmp_path: Path
) -> None:
    it, file = talk(name, kind), tmp_path / "chat.json"
    for turns in (["Hello"], ["Hello", "Four."], ["Hello", "<think>\nhm\n</think>\n\nFour."]):
        file.write_text(json.dumps(it.messages(*turns)), "utf-8")
        saved = it("save", "talk", "--messages", file, "--force", "--json").json["tokens"]
        answer = it.generate("--prompt-cache", "talk", "--prompt-cache-ro")
        assert answer.prompt == it.whole(it.messages(*turns))
        if len(turns) == 1 and it.family.alternates:  # nothing but an answer may follow
            assert saved == agreeing(it.unanswered(turns), answer.prompt)
        if len(turns) == 2:
            assert saved == common([it.whole(it.messages(*turns, rest)) for rest in SEAMS])
            answer = it.generate("--prompt-cache", "talk", "-p", "Dog?", "--prompt-cache-ro")
            assert answer.prompt == it.whole(it.messages(*turns, "Dog?"))
            assert answer.cached == saved


def test_an_answer_in_parts_grows_by_a_part() -> None:
    part = {"type": "text", "text": "One,"}
    for content, expected in (
        ("One,", "One, two."),
        ([part], [part, {"type": "text", "text": " two."}]),
        (None, " two."),
    ):
        origin = Origin(messages=(USER, {"role": "assistant", "content": content}))
        messages = answered(origin, " two.").messages
        assert messages == (USER, {"role": "assistant", "content": expected})


# What a template refuses


THOUGHTLESS = {"role": "assistant", "content": "<think>hm</think>Four."}  # not as it is rendered
REFUSED: dict[str, tuple[str, Chat, str]] = {
    "a system message": ("gemma2", [{"role": "system", "content": SYSTEM}, USER], "no system role"),
    "two questions, gemma2": ("gemma2", [USER, USER], "must alternate"),
    "two questions, gemma3": ("gemma3", [USER, USER], "must alternate"),
    "two questions, mistral": ("mistral", [USER, USER], "must alternate"),
    "an answer to nothing": (
        "gemma2", [{"role": "assistant", "content": "Four."}], "must alternate",
    ),
    "no content": ("chatml", [{"role": "user"}], "content"),
    "no messages": ("chatml", [], "empty"),
    "an answer that cannot be gone on with": ("qwen3", [USER, THOUGHTLESS], "gone on with"),
    "no template": ("plain", [USER], "no chat template"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("command", ["generate", "save"])
def test_what_a_template_refuses_is_one_sentence(
    case: str, command: str, talk: Callable[..., Talk], tmp_path: Path
) -> None:
    name, chat, words = REFUSED[case]
    it, file = talk(name), tmp_path / "chat.json"
    file.write_text(json.dumps(chat), "utf-8")
    ended = it(command, *(["talk"] if command == "save" else []), "--messages", file)
    if command == "save" and chat[-1:] == [THOUGHTLESS]:
        assert ended.code == 0  # the next message closes it
        return
    assert (ended.code, ended.out) == (1, "")
    (line,) = ended.err.splitlines()
    assert words in line
    assert len(line) < 300


def test_options_that_the_template_refuses_are_one_sentence(talk: Callable[..., Talk]) -> None:
    for name, words in (("gemma2", "no system role"), ("plain", "needs a chat template")):
        ended = talk(name)("generate", "--system-prompt", SYSTEM, "-p", "Hello")
        (line,) = ended.err.splitlines()
        assert (ended.code, ended.out) == (1, "")
        assert words in line


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "mistral"])
def test_a_saved_question_takes_no_second_one_where_roles_alternate(
    name: str, talk: Callable[..., Talk], tmp_path: Path
) -> None:
    it, file = talk(name), tmp_path / "chat.json"
    file.write_text(json.dumps([USER]), "utf-8")
    assert it("save", "talk", "--messages", file).code == 0
    ended = it("generate", "--prompt-cache", "talk", "-p", "Hello?")
    (line,) = ended.err.splitlines()
    assert (ended.code, ended.out) == (1, "")
    assert "must alternate" in line
    assert it.generate("--prompt-cache", "talk").prompt == it.whole([USER])


# Tokens, without a text


@every_family
def test_text_after_stored_tokens_begins_no_sequence_of_its_own(
    name: str, talk: Callable[..., Talk]
) -> None:
    it = talk(name)
    tokens = [*it.whole("Hello, world!"), 50, 60]
    runner = Runner.load(str(it.model), cache_dir=str(it.store))
    assert runner.cache is not None
    runner.cache.save("ids", runner.prefill(tokens))
    answer = it.generate("--prompt-cache", "ids", "-p", " And the dog?")
    following = it.tokenizer.encode(" And the dog?", add_special_tokens=False)
    assert (answer.prompt, answer.cached) == ([*tokens, *following], len(tokens))
    it.assert_begins_once(answer.prompt)


def test_a_beginning_that_stands_in_the_text_is_not_added_again(talk: Callable[..., Talk]) -> None:
    it = talk("plain")
    answer = it.generate("-p", "<s>Hello")
    assert answer.prompt == it.whole("Hello")
    saved = it("save", "begun", "-p", "<s>Hello", "--json").json["tokens"]
    answer = it.generate("--prompt-cache", "begun", "-p", " world", "--prompt-cache-ro")
    assert (answer.prompt, answer.cached) == (it.whole("Hello world"), saved)
