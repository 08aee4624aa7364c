"""What may be kept of a tokenizer, and the trial that it stands before it is kept.

A tokenizer may be kept if its encoding, decoding and rendering are those of transformers' own
classes, and if what is kept gives the same for a number of texts, all special tokens and several
chats as the one that it was made from.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from mlx_promptcache import engine
from mlx_promptcache.outlines import outlines
from mlx_promptcache.tokenizer import BPE, NAIVE, SPM, SPM_NO_SPACE, Facts, cleaned

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from mlx_promptcache.outlines import Outline


def facts_of(wrapper: Any) -> Facts | None:
    """What a tokenizer that mlx-lm loaded comes to; None if it does something of its own.

    Imports transformers, which whoever has such a tokenizer has done already.
    """
    from transformers import PreTrainedTokenizerFast
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    whole = wrapper._tokenizer
    kind = type(whole)
    usual = isinstance(whole, PreTrainedTokenizerFast) and all(
        getattr(kind, name, None) is getattr(base, name)
        for base, names in ((PreTrainedTokenizerBase, SHARED), (PreTrainedTokenizerFast, FAST))
        for name in names
    )
    detokenizer = _detokenizer_of(wrapper)
    template = whole.chat_template
    own = getattr(wrapper, "_chat_template", None)
    cleans_up = _cleans_up(whole)
    if not usual or detokenizer is None or own is not None or cleans_up is None:
        return None
    if not (template is None or isinstance(template, str)):
        return None
    return Facts(
        special_tokens={k: v for k, v in whole.special_tokens_map.items() if isinstance(v, str)},
        eos_token_id=whole.eos_token_id,
        eos_token_ids=sorted(wrapper.eos_token_ids),
        chat_template=template,
        detokenizer=detokenizer,
        splits_special_tokens=bool(getattr(whole, "split_special_tokens", False)),
        cleans_up=cleans_up,
        outlines=[],
    )


SHARED = (
    "encode", "decode", "apply_chat_template", "get_chat_template", "special_tokens_map",
    "clean_up_tokenization", "convert_tokens_to_ids", "__call__", "__getattr__",
)  # fmt: skip
FAST = (
    "_encode_plus", "_decode", "convert_ids_to_tokens", "get_vocab", "set_truncation_and_padding",
    "backend_tokenizer", "__len__",
)  # fmt: skip


def outlines_of(wrapper: Any, facts: Facts) -> list[Outline]:
    """The outlines of what prompts mostly are, for a tokenizer in mlx-lm's wrapper."""
    if facts.chat_template is None:
        return []
    chats = itertools.product(OUTLINED, (True, False))
    return outlines(facts.chat_template, facts.special_tokens, chats, _variables_of(wrapper))


OUTLINED = (["user"], ["system", "user"])


class _Told(engine.Renderer):
    """A tokenizer that takes note of the variables that templates get."""

    def __init__(self) -> None:
        self.variables: dict[str, Any] = {}

    def apply_chat_template(self, *_: Any, **asked: Any) -> str:
        """Take note."""
        usual = {"tokenize", "add_generation_prompt", "continue_final_message", "return_dict"}
        self.variables = {name: value for name, value in asked.items() if name not in usual}
        return ""


def _variables_of(wrapper: Any) -> dict[str, Any]:
    """The variables that mlx-lm's wrapper adds to what is asked."""
    tokenizer, told = wrapper._tokenizer, _Told()
    wrapper._tokenizer = told
    try:
        wrapper.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    finally:
        wrapper._tokenizer = tokenizer
    return told.variables


def _detokenizer_of(wrapper: Any) -> str | None:
    detokenizer = wrapper.detokenizer
    name = type(detokenizer).__name__
    if name == "SPMStreamingDetokenizer":
        return SPM if detokenizer.trim_space else SPM_NO_SPACE
    return {"BPEStreamingDetokenizer": BPE, "NaiveStreamingDetokenizer": NAIVE}.get(name)


def _cleans_up(whole: Any) -> bool | None:
    """Whether decoding closes the spaces before punctuation: found out by trying. None if there are
    none to try it with.
    """
    rust = whole.backend_tokenizer
    ids = rust.encode("a . b , c ! d n't", add_special_tokens=False).ids
    text = rust.decode(ids, skip_special_tokens=False)
    if getattr(whole, "clean_up_tokenization_spaces", False) and cleaned(text) == text:
        return None
    return bool(whole.decode(ids) != text)


TEXTS = (
    "The quick brown fox, 12345 times.  Twice!\n\n\tIndented: yes; 'quoted' isn't \"it\"?",
    "naïve café Ünïcödé 日本語の文 русский עברית हिन्दी 👩‍👩‍👧‍👦🇺🇳 \u200b\u00a0\ufeff",
    "def f(x):\n    return {'a': [x ** 2 for _ in range(10)]}  # \\n\r\n",
    " leading and trailing ", "<s></s><|im_start|>user\n[INST]</think>",
)  # fmt: skip
"""What a kept tokenizer must do as the whole one does, before it is trusted with anything else."""
SHORT = ("", "\n", " ")
MOST_ADDED = 100  # tokens that are no special ones; some tokenizers have thousands
USER = {"role": "user", "content": " What is 1 + 1?\n"}
SYSTEM = {"role": "system", "content": "Be brief."}
ANSWER = {"role": "assistant", "content": "It is 2. "}
CHATS = ((USER,), (SYSTEM, USER), (USER, ANSWER), (SYSTEM, USER, ANSWER, USER))


def _short_texts(whole: Any) -> list[str]:
    """The short texts that a tokenizer is tried with: all special tokens and the like."""
    specials = sorted(set(whole.all_special_tokens))
    added = {str(token) for token in whole.added_tokens_decoder.values()}
    specials += sorted(added - set(specials))[:MOST_ADDED]
    return [*SHORT, *specials, f"a{'b'.join(specials)}c"]


def agrees(kept: Any, whole: Any, expect: Callable[[list[str]], None] = lambda _: None) -> bool:
    """Whether a kept tokenizer does what the whole one does, as far as trying shows. `expect` is
    told texts before they are encoded: see `Tokenizer.expect`.
    """
    same = kept.eos_token_ids == whole.eos_token_ids and len(kept) == len(whole)
    same = same and kept.has_chat_template == whole.has_chat_template
    short = _short_texts(whole)
    # One excerpt for all; of few tokens one for each that is not too long, the short ones first.
    expect([*TEXTS, *short])
    same = same and all(_same_text(kept, whole, text) for text in sorted(TEXTS, key=len))
    expect(short)
    same = same and all(_same_text(kept, whole, text) for text in short)
    if same and whole.has_chat_template:
        same = all(
            _rendered(kept, chat, answer=answer) == _rendered(whole, chat, answer=answer)
            for chat in CHATS
            for answer in (True, False)
        )
    return same


def _same_text(kept: Any, whole: Any, text: str) -> bool:
    for special in (True, False):
        ids = whole.encode(text, add_special_tokens=special)
        if kept.encode(text, add_special_tokens=special) != ids:
            return False
        if kept.decode(ids) != whole.decode(ids) or _streamed(kept, ids) != _streamed(whole, ids):
            return False
    return True


def _streamed(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    detokenizer = tokenizer.detokenizer
    detokenizer.reset()
    segments = []
    for token in ids:
        detokenizer.add_token(token)
        segments.append(detokenizer.last_segment)
    detokenizer.finalize()
    return [*segments, detokenizer.last_segment]


def _rendered(tokenizer: Any, chat: Sequence[Mapping[str, Any]], *, answer: bool) -> str | None:
    """What the template makes of a chat: with `answer`, or going on with its last message."""
    try:
        text: str = tokenizer.apply_chat_template(
            [dict(message) for message in chat], tokenize=False, add_generation_prompt=answer,
            continue_final_message=not answer and chat[-1] is ANSWER,
        )  # fmt: skip
    except Exception:  # noqa: BLE001 - templates raise what they like
        return None
    return text
