"""What may be kept of a tokenizer: nothing of its own, and the same answers in the trial."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tokenizers import Regex, decoders, normalizers

from families import FAMILIES, write_tokenizer
from mlx_promptcache import checkpoint
from mlx_promptcache.tokenizer_trial import agrees, facts_of

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    (directory / "config.json").write_text('{"model_type": "llama"}', "utf-8")
    write_tokenizer(directory, FAMILIES["llama3"])
    return directory


@pytest.fixture
def whole(directory: Path) -> Any:
    return checkpoint.load_tokenizer(directory, {})


@pytest.fixture
def other(directory: Path) -> Any:
    return checkpoint.load_tokenizer(directory, {})


# What may be kept

OVERRIDDEN = ["encode", "decode", "_encode_plus", "convert_tokens_to_ids", "get_chat_template"]


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_a_class_with_a_method_of_its_own_is_not_kept(name: str, whole: Any) -> None:
    kind = type(whole._tokenizer)
    assert facts_of(whole) is not None
    own = type("Own", (kind,), {name: lambda self, *a, **o: None})
    whole._tokenizer.__class__ = own
    assert facts_of(whole) is None


def test_cleaning_that_cannot_be_seen_is_not_kept(whole: Any) -> None:
    whole._tokenizer.clean_up_tokenization_spaces = True
    assert facts_of(whole) is not None  # the spaces are there: it is seen that they stay
    letters_only = normalizers.Replace(Regex(r"[^a-z]"), "a")
    whole._tokenizer.backend_tokenizer.normalizer = letters_only
    assert facts_of(whole) is None


# The trial


def test_a_tokenizer_agrees_with_another_of_the_same_files(whole: Any, other: Any) -> None:
    assert agrees(other, whole)


def other_end(tokenizer: Any) -> None:
    tokenizer._eos_token_ids = {1}


def more_tokens(tokenizer: Any) -> None:
    tokenizer._tokenizer.add_tokens(["never said"])


def no_template(tokenizer: Any) -> None:
    tokenizer.has_chat_template = False


def other_encoding(tokenizer: Any) -> None:
    tokenizer._tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


def other_decoding(tokenizer: Any) -> None:
    tokenizer._tokenizer.backend_tokenizer.decoder = decoders.Fuse()


def other_streaming(tokenizer: Any) -> None:
    class Twice(type(tokenizer.detokenizer)):  # type: ignore[misc]
        @property
        def last_segment(self) -> str:
            return 2 * str(super().last_segment)

    class Other(type(tokenizer)):  # type: ignore[misc]
        @property
        def detokenizer(self) -> Any:
            found = super().detokenizer
            found.__class__ = Twice
            return found

    tokenizer.__class__ = Other


def other_answer(tokenizer: Any) -> None:
    """Only where an answer is asked for."""
    tokenizer._tokenizer.chat_template += "{% if add_generation_prompt %}x{% endif %}"


def other_way_on(tokenizer: Any) -> None:
    """Only where none is asked for."""
    tokenizer._tokenizer.chat_template += "{% if not add_generation_prompt %}x{% endif %}"


DIFFERENCES = [
    other_end, more_tokens, no_template, other_encoding, other_decoding, other_streaming,
    other_answer, other_way_on,
]  # fmt: skip


@pytest.mark.parametrize("alter", DIFFERENCES)
def test_what_does_something_else_is_found_out(
    alter: Callable[[Any], None], whole: Any, other: Any
) -> None:
    alter(other)
    assert not agrees(other, whole)


def test_tokens_that_are_added_but_not_special_are_tried_too(whole: Any, other: Any) -> None:
    for tokenizer in (whole, other):
        tokenizer._tokenizer.add_tokens(["<tool>"])
    assert agrees(other, whole)
    rust = other._tokenizer.backend_tokenizer
    rust.decoder = decoders.Sequence([rust.decoder, decoders.Replace("<tool>", "tool")])
    assert not agrees(other, whole)
