"""Tokenizer: what a Hugging Face tokenizer does, from what it left behind, without transformers.

Making a tokenizer out of a model's files takes `transformers` seconds, and gives a Rust tokenizer,
a chat template and a handful of special tokens. These are kept in the store, by the content of the
files that they came from; the next process encodes and renders with `tokenizers` and `jinja2`.

Only what is known to be the same is kept (`tokenizer_trial.py`); any other tokenizer is loaded by
mlx-lm, every time. Whatever else is asked is answered by the whole tokenizer, loaded when that
happens.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import operator
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from mlx_promptcache import engine
from mlx_promptcache.errors import DamagedFile
from mlx_promptcache.excerpts import Excerpts
from mlx_promptcache.outlines import Outline

if TYPE_CHECKING:
    from collections.abc import Callable

    import tokenizers

    Rust: TypeAlias = tokenizers.Tokenizer | Excerpts

DETOKENIZERS = BPE, SPM, SPM_NO_SPACE, NAIVE = "bpe", "spm", "spm, no space", "naive"
CLEANED = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"),
    (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip
"""What `clean_up_tokenization_spaces` does, in this order (transformers 5.23)."""


class Facts(NamedTuple):
    """What is known of a tokenizer besides its Rust part."""

    special_tokens: dict[str, str]
    eos_token_id: int | None
    eos_token_ids: list[int]
    chat_template: str | None
    detokenizer: str
    splits_special_tokens: bool
    cleans_up: bool
    outlines: list[Outline]

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Facts:
        """Facts as they were written.

        Raises:
            TypeError: they are not all there, or are not what facts are.
        """
        facts = cls(**value)
        if not isinstance(facts.outlines, list):
            raise TypeError("these are no facts of a tokenizer")
        facts = facts._replace(outlines=[Outline.from_json(each) for each in facts.outlines])
        specials, ends = facts.special_tokens, facts.eos_token_ids
        sound = (
            isinstance(specials, dict)
            and all(isinstance(token, str) for token in specials.values())
            and isinstance(ends, list)
            and all(map(_is_id, ends))
            and (facts.eos_token_id is None or _is_id(facts.eos_token_id))
            and (facts.chat_template is None or isinstance(facts.chat_template, str))
            and facts.detokenizer in DETOKENIZERS
            and isinstance(facts.splits_special_tokens, bool)
            and isinstance(facts.cleans_up, bool)
        )
        if not sound:
            raise TypeError("these are no facts of a tokenizer")
        return facts


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 32


class Tokenizer(engine.Renderer):
    """A Hugging Face tokenizer as far as mlx-lm and this program ask it.

    `whole` makes the tokenizer that this one was kept of, for whatever else is asked. `damaged` is
    told if excerpts turn out to be none: from then on the whole one encodes.
    """

    def __init__(
        self,
        rust: Rust,
        facts: Facts,
        whole: Callable[[], Any],
        damaged: Callable[[DamagedFile], Any] = lambda _: None,
    ) -> None:
        self._rust, self._facts, self._make_whole = rust, facts, whole
        self._damaged, self._encodes = damaged, True
        self._made: Any = None
        self._making = threading.Lock()
        self.is_wrapped = False
        self.chat_template = facts.chat_template
        self.eos_token_id = facts.eos_token_id
        self._render: Any = None

    def whole(self) -> Any:
        """The whole tokenizer in mlx-lm's wrapper, loaded when this is first called.

        Raises:
            ModelError: mlx-lm cannot load it any more.
        """
        with self._making:
            if self._made is None:
                self._made = self._make_whole()
            return self._made

    def _whole(self) -> Any:
        return self.whole()._tokenizer

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if name.endswith("_token") and name in self._facts.special_tokens:
            return self._facts.special_tokens[name]
        return getattr(self._whole(), name)

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """The special tokens by their roles."""
        return dict(self._facts.special_tokens)

    @property
    def bos_token(self) -> str | None:
        """The token that begins a sequence."""
        return self._facts.special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        """The token that ends a sequence."""
        return self._facts.special_tokens.get("eos_token")

    def __len__(self) -> int:
        return int(self._rust.get_vocab_size(with_added_tokens=True))

    def get_vocab(self) -> Mapping[str, int]:
        """The vocabulary, looked up token by token."""
        return _Vocabulary(self._rust)

    def encode(
        self, text: str, *args: Any, add_special_tokens: bool = True, **others: Any
    ) -> list[int]:
        """The ids of a text."""
        usual = isinstance(text, str) and not (args or others)
        if usual and self._encodes:
            with self._watched():
                return list(self._rust.encode(text, add_special_tokens=add_special_tokens).ids)
        ids: list[int] = self._whole().encode(
            text, *args, add_special_tokens=add_special_tokens, **others
        )
        return ids

    def expect(self, texts: Sequence[str]) -> None:
        """Be told that these texts are encoded next: what encodes them is made once for all."""
        if isinstance(self._rust, Excerpts) and self._encodes:
            with self._watched():
                self._rust.expect(texts)

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            yield
        except DamagedFile as exc:
            self._encodes = False
            self._damaged(exc)

    def decode(self, ids: Any, skip_special_tokens: bool = False, **others: Any) -> Any:
        """The text of an id, or of a list of ids."""
        ids = [ids] if isinstance(ids, int) else ids
        if others or type(ids) not in (list, tuple) or not all(isinstance(i, int) for i in ids):
            return self._whole().decode(ids, skip_special_tokens=skip_special_tokens, **others)
        text: str = self._rust.decode(ids, skip_special_tokens=skip_special_tokens)
        return cleaned(text) if self._facts.cleans_up else text

    def convert_ids_to_tokens(self, ids: Any, *args: Any, **others: Any) -> Any:
        """The tokens of ids. While it is being wrapped they are looked up as they are asked for:
        mlx-lm asks for all that there are, and needs few.
        """
        if args or others:
            return self._whole().convert_ids_to_tokens(ids, *args, **others)
        if isinstance(ids, int):
            return self._rust.id_to_token(ids)
        if self.is_wrapped:
            return [self._rust.id_to_token(int(i)) for i in ids]
        return _Tokens(self._rust, ids)

    def convert_tokens_to_ids(self, token: str) -> int | None:
        """The id of a token."""
        if not isinstance(token, str) or (found := self._rust.token_to_id(token)) is None:
            other: int | None = self._whole().convert_tokens_to_ids(token)
            return other
        return int(found)

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        *args: Any,
        tokenize: bool = True,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        return_dict: bool = False,
        **variables: Any,
    ) -> Any:
        """The text of a chat; its ids with `tokenize`. `variables` are the template's own.

        Raises whatever the template raises, and

        Raises:
            ValueError: there is no template, or the last message cannot be gone on with.
        """
        usual = not args and isinstance(continue_final_message, bool) and not return_dict
        usual = usual and ASKED.isdisjoint(variables) and _are_messages(conversation)
        usual = usual and all(type(v) in (str, int, float, bool) for v in variables.values())
        if self.chat_template is None or not usual:
            return self._whole().apply_chat_template(
                conversation, *args, tokenize=tokenize, return_dict=return_dict,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message, **variables,
            )  # fmt: skip
        text = self._text(
            conversation, variables, answer=add_generation_prompt, goes_on=continue_final_message
        )
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def _text(
        self,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any],
        *,
        answer: bool,
        goes_on: bool,
    ) -> str:
        outlines = () if goes_on else self._facts.outlines
        for outline in outlines if self.chat_template is self._facts.chat_template else ():
            if outline.serves(messages, variables, answer=answer):
                return outline.text(messages)
        if self._render is None:
            from mlx_promptcache.templates import Template

            self._render = Template(str(self.chat_template))
        variables = {**self._facts.special_tokens, **variables}
        return str(self._render(messages, variables, answer=answer, goes_on=goes_on))


ASKED = frozenset(
    ("tools", "documents", "chat_template", "sanitize_control_tokens", "padding", "truncation",
     "max_length", "return_tensors", "return_assistant_tokens_mask", "tokenizer_kwargs",
     "conversations", "messages", "self"),
)  # fmt: skip
"""What `apply_chat_template` of transformers takes for itself, or refuses: no variables."""


def _are_messages(value: Any) -> bool:
    messages = type(value) in (list, tuple) and all(type(message) is dict for message in value)
    return messages and _is_plain(value)


def _is_plain(value: Any) -> bool:
    """Whether there is nothing in it but what JSON has: nothing with methods of its own."""
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(type(key) is str and _is_plain(item) for key, item in value.items())
    return value is None or type(value) in (str, int, float, bool)


def cleaned(text: str) -> str:
    """A text without the spaces before punctuation."""
    for found, put in CLEANED:
        text = text.replace(found, put)
    return text


class _Vocabulary(Mapping[str, int]):
    """Tokens to ids, looked up one by one: a dict of all takes as long as encoding a long text."""

    def __init__(self, rust: Rust) -> None:
        self._rust = rust

    def __getitem__(self, token: str) -> int:
        found = self._rust.token_to_id(token)
        if found is None:
            raise KeyError(token)
        return int(found)

    def __iter__(self) -> Iterator[str]:
        return iter(self._rust.get_vocab(with_added_tokens=True))

    def __len__(self) -> int:
        return int(self._rust.get_vocab_size(with_added_tokens=True))


class _Tokens(Sequence[Any]):
    """The tokens of ids, looked up one by one."""

    def __init__(self, rust: Rust, ids: Sequence[int]) -> None:
        self._rust, self._ids = rust, ids

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._rust.id_to_token(i) for i in self._ids[index]]
        return self._rust.id_to_token(self._ids[index])

    def __len__(self) -> int:
        return len(self._ids)


def wrapped(tokenizer: Tokenizer, facts: Facts) -> Any:
    """The tokenizer in mlx-lm's wrapper, which makes text of tokens as they come."""
    module = engine.tokenizer_utils()
    detokenizer = {
        BPE: module.BPEStreamingDetokenizer,
        SPM: module.SPMStreamingDetokenizer,
        SPM_NO_SPACE: functools.partial(module.SPMStreamingDetokenizer, trim_space=False),
        NAIVE: module.NaiveStreamingDetokenizer,
    }[facts.detokenizer]

    kind = _wrapper_of(module.TokenizerWrapper, has_chat_template=facts.chat_template is not None)
    wrapper = kind(tokenizer, detokenizer, eos_token_ids=facts.eos_token_ids)
    wrapper._kept = tokenizer
    tokenizer.is_wrapped = True
    return wrapper


NOT_KEPT = (
    "has_tool_calling", "tool_call_start", "tool_call_start_tokens", "tool_call_end",
    "tool_call_end_tokens", "tool_parser", "response_transitions", "response_initial_state",
)  # fmt: skip
"""What mlx-lm's wrapper says of a tokenizer, and only the whole one can."""


def _wrapper_of(base: Any, *, has_chat_template: bool) -> Any:
    class Wrapper(base):  # type: ignore[misc]
        @property  # type: ignore[misc]
        def __class__(self) -> type:
            # mlx-lm asks whether a tokenizer is wrapped already, of its own class of that name.
            own = sys.modules.get("mlx_lm.tokenizer_utils")
            return getattr(own, "TokenizerWrapper", type(self))

        @property
        def _whole(self) -> Any:
            return self._kept.whole()

        def __setattr__(self, name: str, value: Any) -> None:
            """What is set may change what a tokenizer does: from then on the whole one does it."""
            own = name.startswith("_") or hasattr(type(self), name)
            if not own and "_kept" in self.__dict__:
                whole = self._whole
                self._tokenizer, self._detokenizer = whole._tokenizer, whole._detokenizer
            super().__setattr__(name, value)

        def __reduce_ex__(self, protocol: Any) -> Any:
            """Copies, also those for other processes, are whole."""
            whole = copy.copy(self._whole)
            whole._eos_token_ids = self._eos_token_ids
            return whole.__reduce_ex__(protocol)

        @property
        def has_chat_template(self) -> bool:
            return has_chat_template

        @has_chat_template.setter
        def has_chat_template(self, _value: bool) -> None:
            """What mlx-lm makes of a class that it does not know says nothing."""

    for name in NOT_KEPT:
        if hasattr(base, name):
            setattr(Wrapper, name, property(operator.attrgetter(f"_whole.{name}")))
    return Wrapper
