"""Excerpts of a tokenizer: when they are made, what they hold, and what they cannot be made of.

That they encode as the whole does is shown in `test_tokenizer.py`, for all kinds of tokenizers and
texts; here are the tokenizers that would tempt them to do something else.
"""

from __future__ import annotations

import gc
import json
import random
import threading
import tracemalloc
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from mlx_promptcache import excerpts
from mlx_promptcache.container import Array
from mlx_promptcache.errors import DamagedFile
from mlx_promptcache.excerpts import (
    FRAME,
    LEFTS,
    MOST,
    RANKS,
    STARTS,
    TOKENS,
    Excerpts,
    Parts,
    taken_apart,
)  # fmt: skip
from mlx_promptcache.token_table import TokenTable

if TYPE_CHECKING:
    from collections.abc import Callable

LETTERS = "abcdefghij"


def trained(seed: int = 1, **options: Any) -> tokenizers.Tokenizer:
    """Merges at random, so that they get in each other's way, and several that make one token."""
    print("seed", seed)
    chance = random.Random(seed)
    vocabulary = {"<unk>": 0, **{letter: i for i, letter in enumerate([*LETTERS, " "], 1)}}
    merges: list[tuple[str, str]] = []
    while len(merges) < 250:
        pair = (chance.choice(list(vocabulary)[1:]), chance.choice(list(vocabulary)[1:]))
        text = "".join(pair)
        if len(text) <= 6 and text not in vocabulary:
            vocabulary[text] = len(vocabulary)
            merges.append(pair)
    others = [(text[:i], text[i:]) for text in list(vocabulary)[1:] for i in range(1, len(text))]
    others = [pair for pair in others if vocabulary.keys() >= set(pair) and pair not in merges]
    for pair in others:
        merges.insert(chance.randrange(len(merges)), pair)
    made = tokenizers.Tokenizer(models.BPE(vocabulary, merges, **options))
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_next")
    made.decoder = decoders.Fuse()
    return made


def words(count: int, seed: int = 2) -> list[str]:
    chance = random.Random(seed)
    return ["".join(chance.choices(LETTERS, k=chance.randint(1, 12))) for _ in range(count)]


def parts_of(rust: tokenizers.Tokenizer) -> Parts:
    parts = taken_apart(json.loads(rust.to_str()))
    assert parts is not None
    return Parts.of_arrays(parts.arrays())


def alone(rust: tokenizers.Tokenizer, **options: Any) -> Excerpts:
    """Excerpts with nothing to fall back on."""
    return alone_of(parts_of(rust), **options)


class _Alone(Excerpts):
    def whole(self) -> tokenizers.Tokenizer:
        raise AssertionError("the whole was made")


def alone_of(parts: Parts, **options: Any) -> Excerpts:
    found = _Alone(parts, **options)
    found._left = found._most_strings = found._most_characters = 1 << 40
    return found


def of(rust: tokenizers.Tokenizer, **options: Any) -> Excerpts:
    return Excerpts(parts_of(rust), **options)


def made_of(made: Excerpts, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens what encodes has, each time that it is made."""
    sizes: list[int] = []
    seen: list[tokenizers.Tokenizer] = []

    def note(rust: tokenizers.Tokenizer | None) -> tokenizers.Tokenizer | None:
        if rust is not None and not any(rust is other for other in seen):
            seen.append(rust)
            sizes.append(rust.get_vocab_size(with_added_tokens=False))
        return rust

    excerpt, whole = made._excerpt, made.whole
    monkeypatch.setattr(made, "_excerpt", lambda texts: note(excerpt(texts)))
    monkeypatch.setattr(made, "whole", lambda: note(whole()))
    return sizes


# The same tokenizer


@pytest.mark.parametrize("byte_fallback", [False, True])
@pytest.mark.parametrize("ignores", [False, True])
@pytest.mark.parametrize("unknown", [None, "<unk>"])
@pytest.mark.parametrize("seed", range(3))
def test_the_whole_is_what_was_taken_apart(
    seed: int, unknown: str | None, ignores: bool, byte_fallback: bool
) -> None:
    options = {"ignore_merges": ignores, "unk_token": unknown, "fuse_unk": seed % 2 == 0}
    whole = trained(seed, byte_fallback=byte_fallback, **options)
    whole.add_special_tokens(["<one>", "ab", "<two>"])
    assert json.loads(of(whole).whole().to_str()) == json.loads(whole.to_str())


# The same ids


@pytest.mark.parametrize("ignores", [False, True])
@pytest.mark.parametrize("unknown", [None, "<unk>"])
@pytest.mark.parametrize("seed", range(6))
def test_merges_that_get_in_each_others_way_happen_in_their_order(
    seed: int, unknown: str | None, ignores: bool
) -> None:
    whole = trained(seed, ignore_merges=ignores, unk_token=unknown, fuse_unk=seed % 2 == 0)
    made = alone(whole)
    texts = [" ".join(words(5, seed=n)) for n in range(40)]
    for text in [*texts, "a?b ??", "é", "", " ", "   ", "a  b"]:
        assert made.encode(text).ids == whole.encode(text).ids
        assert made.encode(text).tokens == whole.encode(text).tokens


def test_what_is_beside_a_character_that_is_left_out_comes_together() -> None:
    vocabulary = {"a": 0, "b": 1, "ab": 2, "abab": 3}
    whole = tokenizers.Tokenizer(models.BPE(vocabulary, [("a", "b"), ("ab", "ab")]))
    made = alone(whole)
    for text in ("a?b", "?a??b?a!b?", "b?a", "??"):
        assert made.encode(text).ids == whole.encode(text).ids
    assert whole.encode("a?b").tokens == ["ab"]


def test_a_word_that_is_a_token_needs_no_merges_where_they_are_ignored() -> None:
    vocabulary = {"a": 0, "b": 1, "ab": 2}
    for ignores, told in ((True, ["ab"]), (False, ["a", "b"])):
        whole = tokenizers.Tokenizer(models.BPE(vocabulary, [], ignore_merges=ignores))
        assert alone(whole).encode("ab").tokens == whole.encode("ab").tokens == told


def test_bytes_stand_in_for_characters_where_they_do() -> None:
    vocabulary = {"a": 0, "<0xC3>": 1, "<0xA9>": 2, "<unk>": 3}
    for stand_in, told in ((True, ["a", "<0xC3>", "<0xA9>"]), (False, ["a", "<unk>"])):
        model = models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=stand_in)
        whole = tokenizers.Tokenizer(model)
        assert alone(whole).encode("aé").tokens == whole.encode("aé").tokens == told


def test_a_token_with_several_merges_has_all_of_them() -> None:
    whole = trained()
    parts = parts_of(whole)
    pairs = [tuple(pair) for pair in json.loads(whole.to_str())["model"]["merges"]]
    ids = {token: i for i, token in enumerate(parts.tokens[:])}
    assert parts._merges(ids) == pairs
    assert len({"".join(pair) for pair in pairs}) < len(pairs)


def test_what_a_normalizer_makes_of_a_text_is_what_counts() -> None:
    whole = trained()
    whole.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Prepend("a")])
    made = alone(whole)
    for text in ("ABC DEF", "b", "Éa"):
        assert made.encode(text).ids == whole.encode(text).ids


def test_no_pre_tokenizer_makes_one_word() -> None:
    whole = trained()
    whole.pre_tokenizer = None
    made = alone(whole)
    for text in ("abcdef ghij", "a", ""):
        assert made.encode(text).ids == whole.encode(text).ids


def test_added_tokens_keep_their_ids_and_their_ways() -> None:
    whole = trained()
    whole.add_special_tokens(["<end>", "ab"])  # one of them is a token of the model, too
    whole.add_tokens([AddedToken("gh i", lstrip=True), AddedToken("j", single_word=True)])
    for splits in (False, True):
        made = of(whole, splits_special_tokens=splits)
        whole.encode_special_tokens = splits
        for text in ("cd gh i  gh i", "j", "jj a", "a<end>b", "ab<end><end>ab"):
            assert made.encode(text).ids == whole.encode(text).ids
            assert (made._whole is None) == (not splits or "<end>" not in text)
        for token in ("<end>", "ab", "gh i", "j", "a", "never"):
            assert made.token_to_id(token) == whole.token_to_id(token)
    size = whole.get_vocab_size(with_added_tokens=True)
    assert made.get_vocab_size(with_added_tokens=True) == size
    for i in range(size + 3):
        assert made.id_to_token(i) == whole.id_to_token(i)


def test_an_added_token_that_is_one_of_the_model_by_now_counts_once() -> None:
    whole = tokenizers.Tokenizer(models.BPE({"a": 0}, []))
    whole.add_tokens(["x"])
    whole.model = models.BPE({"x": 0, "a": 1, "b": 2}, [])
    made = of(whole)
    for added in (True, False):
        told = whole.get_vocab_size(with_added_tokens=added)
        assert made.get_vocab_size(with_added_tokens=added) == told
        assert len(made.get_vocab(with_added_tokens=added)) == told


def test_added_tokens_are_said_as_they_are_normalised() -> None:
    whole = trained()
    whole.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    whole.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse()])
    whole.add_tokens(["<tool>"])
    whole.add_special_tokens(["<end>"])
    made = of(whole)
    for text in ("b <tool>b<end>", "b<tool>", "<tool><tool>"):
        assert made.encode(text).ids == whole.encode(text).ids
    ids = [2, *(made.token_to_id(token) or 0 for token in ("<tool>", "<end>")), 2]
    assert "\u2581<tool>" in [whole.id_to_token(i) for i in ids]
    assert [made.id_to_token(i) for i in ids] == [whole.id_to_token(i) for i in ids]
    for skipping in (False, True):
        told = whole.decode(ids, skip_special_tokens=skipping)
        assert made.decode(ids, skip_special_tokens=skipping) == told


def test_an_added_token_that_stands_in_a_word_asks_for_the_whole() -> None:
    """Its id is one that the model itself does not know: an excerpt's would."""
    whole = trained(ignore_merges=True)
    whole.add_tokens([AddedToken("zz", single_word=True)])
    made = of(whole)
    assert made._whole is None
    assert made.encode("zz a").ids == whole.encode("zz a").ids
    assert made._whole is None
    assert made.encode("azza zz").ids == whole.encode("azza zz").ids
    assert made._whole is not None


# When they are made


def test_an_excerpt_has_what_the_text_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trained()
    made = of(whole)
    sizes = made_of(made, monkeypatch)
    made.encode("ab ab ab")
    assert len(sizes) == 1
    assert 1 < sizes[0] <= 6  # ab, a, b, a space before them
    assert made._whole is None


def test_texts_that_are_expected_share_one(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trained()
    made = of(whole)
    sizes = made_of(made, monkeypatch)
    texts = [f"{word} a" for word in words(9)]
    made.expect(texts)
    for text in texts:
        assert made.encode(text).ids == whole.encode(text).ids
    assert len(sizes) == 1


def test_a_text_that_is_asked_for_again_needs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trained()
    made = of(whole)
    sizes = made_of(made, monkeypatch)
    for special in (True, False):
        told = whole.encode("ab cd", add_special_tokens=special).ids
        assert made.encode("ab cd", add_special_tokens=special).ids == told
    assert len(sizes) == 1


def test_texts_that_are_too_long_together_are_not_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trained()
    made = of(whole)
    sizes = made_of(made, monkeypatch)
    texts = ["ab " * (whole.get_vocab_size() // 4), "cd " * (whole.get_vocab_size() // 4)]
    made.expect(texts)
    assert sizes == []
    for text in texts:
        assert made.encode(text).ids == whole.encode(text).ids
    assert len(sizes) == 2
    assert made._whole is None


def test_who_asks_often_gets_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trained()
    made = of(whole)
    sizes = made_of(made, monkeypatch)
    for word in words(MOST + 5):
        assert made.encode(word).ids == whole.encode(word).ids
    assert len(sizes) == MOST + 1
    assert sizes[-1] == whole.get_vocab_size(with_added_tokens=False)
    assert max(sizes[:-1]) < sizes[-1]


def test_whoever_has_the_whole_needs_no_excerpts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trained()
    made = of(whole)
    sizes = made_of(made, monkeypatch)
    made.whole()
    made.expect(["ab", "cd"])
    assert made.encode("ab").ids == whole.encode("ab").ids
    assert sizes == [whole.get_vocab_size(with_added_tokens=False)]


def test_a_text_of_many_strings_gets_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trained()
    made = of(whole)
    sizes = made_of(made, monkeypatch)
    text = "abcdefghij" * 20
    assert made.encode(text).ids == whole.encode(text).ids
    assert sizes == [whole.get_vocab_size(with_added_tokens=False)]


def test_a_long_text_gets_the_whole_before_its_words_are_looked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = trained()
    made = of(whole)
    monkeypatch.setattr(made, "_words", None)
    text = "a " * whole.get_vocab_size()
    assert made.encode(text).ids == whole.encode(text).ids


def test_no_text_but_the_last_is_held_on_to() -> None:
    made = of(trained())
    made.expect(["ab cd"])
    made.encode("ab cd")
    made.encode("ef")
    assert made._words._heard.words == set()
    assert list(made._expected) == ["ef"]


def test_any_thread_may_ask() -> None:
    whole = trained()
    texts = [" ".join(words(4, seed=n)) for n in range(60)]
    told = [whole.encode(text).ids for text in texts]
    for made in (alone(whole), of(whole)):
        wrong: list[Any] = []

        def ask(first: int, made: Excerpts = made, wrong: list[Any] = wrong) -> None:
            try:
                order = [*range(first, 60), *range(first)]
                wrong.extend(texts[i] for i in order if made.encode(texts[i]).ids != told[i])
            except BaseException as exc:  # noqa: BLE001 - whatever it is
                wrong.append(exc)

        threads = [threading.Thread(target=ask, args=(10 * k,)) for k in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []


def test_what_is_not_needed_any_more_is_given_back() -> None:
    made = of(trained())
    made.encode("abc")
    frame = weakref.ref(made._words._heard)
    del made
    gc.collect()
    assert frame() is None


# What is said of tokens


def test_ids_are_said_as_the_whole_says_them() -> None:
    whole = trained()
    whole.add_special_tokens(["<end>"])
    made = alone(whole)
    ids = [*range(40), whole.token_to_id("<end>"), 10_000]
    for skipping in (False, True):
        for decoder in (decoders.Fuse(), None):
            whole.decoder = decoder
            made = alone(whole)
            told = whole.decode(ids, skip_special_tokens=skipping)
            assert made.decode(ids, skip_special_tokens=skipping) == told
    assert made.id_to_token(10_000) is None
    for rust in (whole, made):
        with pytest.raises(OverflowError):
            rust.id_to_token(-1)


def test_a_list_of_all_tokens_is_the_wholes() -> None:
    whole = trained()
    whole.add_special_tokens(["<end>"])
    made = of(whole)
    assert made.get_vocab() == whole.get_vocab()
    assert made.get_vocab(with_added_tokens=False) == whole.get_vocab(with_added_tokens=False)
    assert made.get_vocab_size(with_added_tokens=False) == len(made.get_vocab()) - 1


# What is not taken apart


def changed(**model: Any) -> str:
    text = json.loads(trained().to_str())
    text["model"].update(model)
    return json.dumps(text)


def added(text: str, token: str) -> str:
    whole = tokenizers.Tokenizer.from_str(text)
    whole.add_special_tokens([token])
    return whole.to_str()


def vocabulary(change: Callable[[dict[str, int]], Any]) -> dict[str, int]:
    tokens: dict[str, int] = json.loads(trained().to_str())["model"]["vocab"]
    change(tokens)
    return tokens


ODD = {
    "chance": lambda: changed(dropout=0.1),
    "marks within words": lambda: changed(continuing_subword_prefix="##", merges=[]),
    "marks at their end": lambda: changed(end_of_word_suffix="</w>"),
    "another kind": lambda: tokenizers.Tokenizer(models.WordLevel({"a": 0}, "a")).to_str(),
    "a line end in a token": lambda: changed(vocab=vocabulary(lambda v: v.update({"\n": len(v)}))),
    "ids with a gap": lambda: changed(vocab=vocabulary(lambda v: v.update({"é": len(v) + 1}))),
    "an id twice": lambda: changed(vocab=vocabulary(lambda v: v.update({"é": 3}))),
    "no tokens": lambda: tokenizers.Tokenizer(models.BPE()).to_str(),
    "a merge of the unknown": lambda: changed(
        unk_token="<unk>",
        vocab=vocabulary(lambda v: v.update({"<unk>a": len(v)})),
        merges=[["<unk>", "a"]],
    ),
    "an unknown one that is none": lambda: changed(unk_token="<none>"),
    "an unknown one that is added": lambda: added(changed(unk_token="<none>"), "<none>"),
    "a byte that is added": lambda: added(changed(byte_fallback=True), "<0x41>"),
    "a merge of bytes": lambda: changed(
        byte_fallback=True,
        vocab=vocabulary(
            lambda v: v.update({"<0xC3>": len(v), "<0xA9>": len(v) + 1, "<0xC3><0xA9>": len(v) + 2})
        ),
        merges=[["<0xC3>", "<0xA9>"]],
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", ODD)
def test_what_an_excerpt_could_do_otherwise_is_not_taken_apart(what: str) -> None:
    text = ODD[what]()
    tokenizers.Tokenizer.from_str(text)  # it is one
    parts = taken_apart(json.loads(text))
    assert parts is None or not parts.tokens


def test_what_only_looks_so_is_taken_apart() -> None:
    for same in (changed(dropout=None), changed(continuing_subword_prefix="")):
        assert taken_apart(json.loads(same)) is not None


# Damage


def replaced(parts: Parts, name: str, change: Callable[[bytes], bytes]) -> dict[str, Array]:
    arrays = parts.arrays()
    data = change(bytes(arrays[name].data))
    size = 1 if name in (FRAME, TOKENS) else 4
    return {**arrays, name: Array(arrays[name].dtype, (len(data) // size,), data)}


AT_ONCE: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "no JSON": (FRAME, lambda _: b"{"),
    "JSON of something else": (FRAME, lambda _: b"[]"),
    "no text": (TOKENS, lambda _: b"\xff\xfe"),
    "no Unicode": (FRAME, lambda _: b"\xff\xfe"),
    "deep": (FRAME, lambda _: b"[" * 100_000),
    "fewer tokens": (TOKENS, lambda data: data[: len(data) // 2]),
    "fewer starts": (STARTS, lambda data: data[:-4]),
    "fewer ranks": (RANKS, lambda data: data[:-4]),
    "another kind": (FRAME, lambda data: data.replace(b'"BPE"', b'"WordPiece"')),
    "chance": (FRAME, lambda data: data.replace(b'"dropout": null', b'"dropout": 0.5')),
    "no model": (FRAME, lambda data: data.replace(b'"model"', b'"models"')),
    "a model that is none": (FRAME, lambda _: b'{"model": 1}'),
    "added tokens without a place": (
        FRAME,
        lambda data: data.replace(
            b'"added_tokens": []',
            b'"added_tokens": [{"id": 9, "content": "x", "single_word": false, "lstrip": false, '
            b'"rstrip": false, "normalized": false, "special": true}]',
        ),
    ),
}  # fmt: skip
LATER: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "starts beyond the end": (STARTS, lambda data: b"\xff" * len(data)),
    "starts that turn back": (STARTS, lambda data: data[:4] + data[4:][::-1]),
    "a left part of nothing": (LEFTS, lambda data: bytes(len(data))),
    "a left part of all": (LEFTS, lambda data: b"\xff\xff\0\0" * (len(data) // 4)),
    "merges of what is no token": (TOKENS, lambda data: data.replace(b"a", b"z", 1)),
}  # fmt: skip


@pytest.mark.parametrize("what", AT_ONCE)
def test_parts_that_are_none_are_found_out_at_once(what: str) -> None:
    arrays = replaced(parts_of(trained()), *AT_ONCE[what])
    with pytest.raises(DamagedFile):
        Excerpts(Parts.of_arrays(arrays))


MISPLACED = {"starts beyond the end", "starts that turn back"}


@pytest.mark.parametrize("what", LATER)
def test_merges_that_are_none_are_found_out_when_they_are_needed(what: str) -> None:
    made = alone_of(Parts.of_arrays(replaced(parts_of(trained()), *LATER[what])))
    said = "its merges are not where they should be" if what in MISPLACED else "it makes no token"
    with pytest.raises(DamagedFile, match=f"^{said}"):
        made.encode(" ".join(words(40)))


def test_a_token_has_no_more_merges_than_places_to_come_together_at() -> None:
    parts = parts_of(trained())
    starts = [0, *[len(parts.ranks)] * len(parts.tokens)]
    with pytest.raises(DamagedFile, match=r"^its merges are not where they should be"):
        parts._replace(starts=starts).excerpt({parts.tokens[0]: 0})


def test_merges_have_no_more_characters_than_those_of_tokens() -> None:
    """Else a short file would fill the memory: each merge takes as much as its token."""
    parts = parts_of(trained())
    long = "a" * 20_000
    n, many = len(parts.ranks), len(long) - 1
    hostile = parts._replace(
        tokens=TokenTable.of([*parts.tokens[:], long]),
        starts=[*parts.starts, n + many],
        ranks=[*parts.ranks, *range(n, n + many)],
        lefts=[*parts.lefts, *range(1, len(long))],
    )
    tracemalloc.start()
    try:
        with pytest.raises(DamagedFile, match=r"^its merges are not where they should be"):
            Excerpts(hostile).whole()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


def test_a_tokenizer_of_too_many_merges_is_not_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    told = json.loads(trained().to_str())
    assert taken_apart(told) is not None
    monkeypatch.setattr(excerpts, "MOST_MERGED", 0)
    assert taken_apart(told) is None


def test_no_two_merges_have_one_rank() -> None:
    parts = parts_of(trained())
    ids = {token: i for i, token in enumerate(parts.tokens[:])}
    parts.excerpt(ids)
    with pytest.raises(DamagedFile, match=r"^its merges are not where they should be"):
        parts._replace(ranks=[0] * len(parts.ranks)).excerpt(ids)


PANICS: dict[str, dict[str, Any]] = {
    "words of no length": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "a special token that is none": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<none>", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        }
    },
}


@pytest.mark.parametrize("what", PANICS)
def test_a_panic_over_a_text_is_damage(what: str) -> None:
    parts = parts_of(trained())
    made = alone_of(parts._replace(frame={**parts.frame, **PANICS[what]}))
    with pytest.raises(DamagedFile, match=r"^it makes no tokenizer"):
        made.encode("ab cd")


def test_an_unknown_token_that_there_is_none_of_is_damage() -> None:
    parts = parts_of(trained())
    frame = {**parts.frame, "model": {**parts.frame["model"], "unk_token": "<none>"}}
    made = alone_of(parts._replace(frame=frame))
    with pytest.raises(DamagedFile, match=r"^it makes no tokenizer"):
        made.encode("é")


def test_a_text_that_is_none_is_not_damage() -> None:
    made = alone(trained())
    for wrong in ("\ud83d", 5):
        with pytest.raises(TypeError):
            made.encode(wrong)  # type: ignore[arg-type]


def test_a_whole_that_is_none_is_damage() -> None:
    parts = parts_of(trained())
    made = Excerpts(parts._replace(lefts=[0] * len(parts.lefts)))
    assert len(made.get_vocab()) == made.get_vocab_size()  # which needs no whole
    with pytest.raises(DamagedFile):
        made.whole()
