"""Text or messages to tokens, and tokens to text.

Tokenisation is not compositional: `encode(a) + encode(b)` is not `encode(a + b)` at the seam, and
a chat template rewrites its tail. So a prompt is always rendered and encoded whole, and what is
stored is compared by tokens. Where a prefix ends among the tokens of the whole is found by trying
continuations: it ends where they begin to differ.
"""

from __future__ import annotations

import os.path
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mlx_promptcache.errors import PromptError
from mlx_promptcache.state import Origin
from mlx_promptcache.tree import agreeing

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

# Beginnings that merge in different ways with what stands before them.
CONTINUATIONS = ("a", " a", "\n", "\n\na", " ", "1", ".", "-", "é")
TAIL = 512  # characters before a seam that may decide where it is
EMPTY = "the prompt is empty: give some text with --prompt (-p - reads standard input)"
LEAST_TEXT = 4  # letters of a message that are told apart from the words of an error


@dataclass(frozen=True)
class Prompt:
    """Tokens, the positions among them that are worth keeping, and how they were made."""

    tokens: tuple[int, ...]
    boundaries: tuple[int, ...] = ()
    origin: Origin = field(default_factory=Origin)


class Prompter:
    """Makes prompts with one tokenizer, mlx-lm's wrapper around a Hugging Face tokenizer.

    With `marks_turns` the end of what the next turn of a chat leaves as it is, is declared worth
    keeping, too: for models that can only be resumed where a state was kept.
    """

    def __init__(self, tokenizer: Any, *, marks_turns: bool = False) -> None:
        self._tokenizer = tokenizer
        self._marks_turns = marks_turns

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return bool(getattr(self._tokenizer, "has_chat_template", False))

    def whole(self, origin: Origin, prefix: Origin | None = None) -> Prompt:
        """The prompt to answer; `prefix`, its beginning, is declared worth keeping.

        Raises:
            PromptError: it is empty, or the template refuses it.
        """
        text = self._text(origin)
        others = self._rendered_alike(prefix, origin) if text else []
        if others:
            self._expect([text, *_ends([text, *others])[1]])
        tokens = self.encode_text(text, special=not _is_chat(origin))
        if not tokens:
            raise PromptError(EMPTY)
        ends = set()
        if others:
            ends.add(self._shared(origin, text, tokens, others))
        elif prefix is not None:
            ends.add(agreeing(self._stable(prefix), tokens))
        if self._marks_turns:
            ends.add(self._left_by_next_turn(origin, tokens))
        boundaries = sorted(end for end in ends if 0 < end < len(tokens))
        return Prompt(tuple(tokens), tuple(boundaries), origin)

    def _left_by_next_turn(self, origin: Origin, tokens: Sequence[int]) -> int:
        """Where a rendering with an answer and another question begins to differ, or 0.

        Some templates take back what they put before an answer, such as an empty thought.
        """
        if not _is_chat(origin):
            return 0
        try:
            position = agreeing(self._encode(continued(answered(origin, "a"), "a")), tokens)
        except PromptError:
            return 0
        return position if 2 * position > len(tokens) else 0  # else there is little to keep

    def beginning(self, origin: Origin) -> Prompt:
        """The prompt up to where continuations of it can differ: what is worth keeping of it.

        Text stays open, inside its user message; after messages a new one may follow.

        Raises:
            PromptError: it is empty or all seam, or the template refuses it.
        """
        if not (origin.text or origin.messages):
            raise PromptError(EMPTY)
        tokens = self._stable(origin)
        if not tokens:
            raise PromptError(
                "no token of this prompt is sure to stay when it goes on: give a longer one"
            )
        return Prompt(tuple(tokens), (), replace(origin, open=True))

    def left_open(self, origin: Origin) -> tuple[int, ...]:
        """The tokens up to the very end of a text that goes on, as mlx_lm.cache_prompt takes them:
        the last ones may be others once it does.

        Raises:
            PromptError: the template refuses it.
        """
        if not _is_chat(origin):
            return tuple(self._encode(origin))
        try:
            text = self._rendered(messages_of(origin), answer=False, goes_on=True)
        except Exception as exc:
            raise PromptError("the chat template leaves no message open") from exc
        return tuple(self.encode_text(text, special=False))

    def _stable(self, origin: Origin) -> list[int]:
        """The tokens that all continuations begin with."""
        first, *others = self._continuations(origin)
        whole = self.encode_text(first, special=not _is_chat(origin))
        return whole[: self._shared(origin, first, whole, others)]

    def _rendered_alike(self, prefix: Origin | None, origin: Origin) -> list[str]:
        """The continuations of a prompt's prefix, if there is one, and both are chats or texts."""
        if prefix is None or _is_chat(prefix) != _is_chat(origin):
            return []
        return self._continuations(prefix)

    def _continuations(self, origin: Origin) -> list[str]:
        try:
            return [self._text(continued(origin, text)) for text in CONTINUATIONS]
        except PromptError:
            # A template that allows no second user message: what follows is the answer.
            return [self._text(origin), self._text(origin, answer=False)]

    def _shared(
        self, origin: Origin, text: str, tokens: Sequence[int], others: Sequence[str]
    ) -> int:
        """How many tokens of a text those of all others begin with."""
        position = self._seam([text, *others], tokens)
        if position is None:
            special = not _is_chat(origin)
            found = [self.encode_text(other, special=special) for other in others]
            position = min(agreeing(tokens, other) for other in found)
        return position

    def _seam(self, texts: Sequence[str], whole: Sequence[int]) -> int | None:
        """How many tokens of the first text, `whole`, the others begin with, found without encoding
        all of them: what is far before the seam is left out. None if the rest does not line up.
        """
        cut, ends = _ends(texts)
        self._expect(ends)
        first, *others = (self.encode_text(end, special=False) for end in ends)
        shared = min(agreeing(first, other) for other in others)
        shift = len(whole) - len(first)
        middle = shared // 2 if cut else 0  # by then a cut inside a word is forgotten
        return shift + shared if shift >= 0 and whole[shift + middle :] == first[middle:] else None

    def _expect(self, texts: Sequence[str]) -> None:
        """Tell a tokenizer that can make use of it which texts it is to encode."""
        expect = getattr(self._tokenizer, "expect", None)  # which transformers' do not have
        if expect is not None:
            expect(texts)

    def _encode(self, origin: Origin) -> list[int]:
        return self.encode_text(self._text(origin), special=not _is_chat(origin))

    def _text(self, origin: Origin, *, answer: bool = True) -> str:
        return self._render(messages_of(origin), answer) if _is_chat(origin) else origin.text or ""

    def encode_text(self, text: str, *, special: bool) -> list[int]:
        """The tokens of a text; with `special` those that the tokenizer puts around text, too.

        A beginning-of-sequence token that stands in the text already is not added again.
        """
        bos = getattr(self._tokenizer, "bos_token", None)
        special = special and not (bos and text.startswith(bos))
        return [int(t) for t in self._tokenizer.encode(text, add_special_tokens=special)]

    def _render(self, messages: Sequence[Mapping[str, Any]], answer: bool) -> str:
        if not self.has_template:
            raise PromptError("this model has no chat template: give the prompt as text")
        goes_on = answer and bool(messages) and messages[-1].get("role") == "assistant"
        try:
            return self._rendered(messages, answer=answer and not goes_on, goes_on=goes_on)
        except Exception as exc:
            if goes_on and self._allows(messages):
                raise PromptError(
                    "the last answer cannot be gone on with, because the chat template renders it "
                    "in another way: let a user message follow it"
                ) from exc
            said = str(exc)
            if any(text in said for text in _texts(messages)):  # errors end up in logs
                raise PromptError("the chat template refuses these messages") from None
            raise PromptError(f"the chat template refuses these messages: {said}") from exc

    def _allows(self, messages: Sequence[Mapping[str, Any]]) -> bool:
        try:
            self._rendered(messages, answer=False, goes_on=False)
        except Exception:  # noqa: BLE001 - templates raise what they like
            return False
        return True

    def _rendered(
        self, messages: Sequence[Mapping[str, Any]], *, answer: bool, goes_on: bool
    ) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                [dict(m) for m in messages],
                tokenize=False,
                add_generation_prompt=answer,
                continue_final_message=goes_on,
            )
        )


def _ends(texts: Sequence[str]) -> tuple[int, list[str]]:
    """How many characters of texts are far before where they begin to differ, and the rest."""
    cut = max(0, len(os.path.commonprefix(texts)) - TAIL)  # noqa: RUF071 - of characters
    return cut, [text[cut:] for text in texts]


def _texts(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """What messages say, but for a few letters: these stand in any sentence."""
    contents = (message.get("content") for message in messages)
    return [text for text in contents if isinstance(text, str) and len(text) >= LEAST_TEXT]


def _is_chat(origin: Origin) -> bool:
    return origin.messages is not None or origin.template


def messages_of(origin: Origin) -> list[Mapping[str, Any]]:
    """The messages of a chat, or of a text as one message."""
    if origin.messages is not None:
        return list(origin.messages)
    system = [] if origin.system is None else [{"role": "system", "content": origin.system}]
    return [*system, {"role": "user", "content": origin.text or ""}]


def continued(origin: Origin, text: str) -> Origin:
    """The origin of a longer prompt: text goes on as text, messages by a new user message."""
    if origin.messages is not None:
        return Origin(messages=(*origin.messages, {"role": "user", "content": text}))
    return Origin((origin.text or "") + text, None, origin.system, origin.template)


def answered(origin: Origin, text: str) -> Origin:
    """The origin of a prompt and its answer."""
    if origin.text is None and origin.messages is None:
        return origin
    if origin.messages is None and (origin.open or not origin.template):
        return replace(origin, text=(origin.text or "") + text)
    if origin.open:
        return Origin()  # what was generated stands between the messages: no rendering gives it
    messages = messages_of(origin)
    if messages and messages[-1].get("role") == "assistant":
        last = {**messages[-1], "content": _lengthened(messages[-1].get("content"), text)}
        return Origin(messages=(*messages[:-1], last))
    return Origin(messages=(*messages, {"role": "assistant", "content": text}))


def _lengthened(content: Any, text: str) -> Any:
    if isinstance(content, list):  # of parts, as some templates take it
        return [*content, {"type": "text", "text": text}]
    return f"{content or ''}{text}"


class TextStream:
    """Tokens to text as they come, up to the first of some stop texts.

    Text that may be the beginning of a stop text is held back until that is decided.
    """

    def __init__(self, tokenizer: Any, stops: Iterable[str] = ()) -> None:
        self._detokenizer = None if tokenizer is None else tokenizer.detokenizer
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that can be shown after one more token."""
        if self._detokenizer is None:
            return ""
        self._detokenizer.add_token(token)
        return self._release(str(self._detokenizer.last_segment))

    def finish(self) -> str:
        """The text that was held back."""
        if self._detokenizer is None:
            return ""
        self._detokenizer.finalize()
        text = self._release(str(self._detokenizer.last_segment))
        held, self._held = self._held, ""
        return text if self.stopped else text + held

    def _release(self, segment: str) -> str:
        if self.stopped:
            return ""
        text = self._held + segment
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of the text are the beginning of a stop text."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
