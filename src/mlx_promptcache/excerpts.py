"""Excerpts: as much of a tokenizer of byte-pair encoding as one text can need.

Such a tokenizer is two large tables above all, of tokens and of merges. Making a Rust tokenizer of
them takes some 2 us a token, during which nothing else runs in Python; a prompt needs a few of
them. In byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909, as `tokenizers` has it) a word
begins as its characters, and a merge takes place only where what it makes stands in the word, but
for characters that no token knows. So the tokens that stand in the words of a text, and the merges
that make them, in their order, give the same ids as all.

What the words are says the tokenizer itself, with its own normalizer, added tokens and
pre-tokenizer: everything but the tables is in each excerpt.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import operator
import threading
from array import array
from typing import TYPE_CHECKING, Any, NamedTuple

from mlx_promptcache.container import ITEMSIZE, Array
from mlx_promptcache.errors import DamagedFile
from mlx_promptcache.token_table import TokenTable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence, Set

    import tokenizers
    from tokenizers import models

    Json = dict[str, Any]

MOST = 8  # excerpts are made; who needs more than that is better off with the whole
MOST_STRINGS = 4  # times the number of tokens: finding more strings takes as long as the whole (and
# as many once more, where characters are left out), and so does finding the words of more
# characters than there are tokens
MOST_MERGED = 16  # times the bytes of all tokens: characters that all merges together have
BYTES = tuple(f"<0x{i:02X}>" for i in range(256))
FRAME, TOKENS = "frame.json", "tokens.txt"
STARTS, RANKS, LEFTS = "merges.starts", "merges.ranks", "merges.lefts"
SETTINGS = ("unk_token", "fuse_unk", "byte_fallback", "ignore_merges")  # of plain models
MISPLACED = "its merges are not where they should be"
DTYPES = {FRAME: "uint8", TOKENS: "uint8", STARTS: "uint32", RANKS: "uint32", LEFTS: "uint32"}


class Parts(NamedTuple):
    """A tokenizer of byte-pair encoding, taken apart.

    `frame` is its JSON; of its tokens only those that every excerpt needs: the unknown one, bytes
    that stand in for characters, and the added ones, which get other ids where a model of fewer
    tokens does not have them. `tokens` are in the order of their ids. Merges are ordered by the
    token that they make: those of token `i` are the ones from `starts[i]` up to `starts[i + 1]`, of
    each the rank and the length of the left part in characters.
    """

    frame: Json
    tokens: TokenTable
    starts: Sequence[int]
    ranks: Sequence[int]
    lefts: Sequence[int]

    def excerpt(self, found: Mapping[str, int]) -> models.BPE:
        """The tokenizer's model with these of its tokens, given with their ids, and those that
        every excerpt has.

        Raises:
            DamagedFile: its merges are none.
        """
        return self._model({**self.frame["model"]["vocab"], **found}, self._merges(found))

    def whole(self) -> models.BPE:
        """The tokenizer's model with all of its tokens, and no others.

        Raises:
            DamagedFile: its merges are none.
        """
        ids = self.ids()
        return self._model(ids, self._merges(ids))

    def _model(self, ids: dict[str, int], merges: list[tuple[str, str]]) -> models.BPE:
        from tokenizers import models

        whole: Json = self.frame["model"]
        settings = {name: whole[name] for name in SETTINGS if whole.get(name) is not None}
        with _as_damage():
            return models.BPE(ids, merges, **settings)

    def _merges(self, found: Mapping[str, int]) -> list[tuple[str, str]]:
        """The merges that make these tokens, in the order of their ranks."""
        starts, ranks, lefts = self.starts, self.ranks, self.lefts
        merges: dict[int, tuple[str, str]] = {}
        count, left_characters = 0, MOST_MERGED * len(self.tokens.text)
        for token, i in found.items():
            begin, end = starts[i], starts[i + 1]
            left_characters -= (end - begin) * len(token)
            # A token comes together in as many ways as it has places between two characters.
            if (
                not (begin <= end <= len(ranks) and end - begin < max(1, len(token)))
                or left_characters < 0
            ):
                raise DamagedFile(MISPLACED)
            count += end - begin
            for k in range(begin, end):
                left = lefts[k]
                merges[ranks[k]] = token[:left], token[left:]
        if len(merges) < count:
            raise DamagedFile(MISPLACED)
        return [merges[rank] for rank in sorted(merges)]

    def arrays(self) -> dict[str, Array]:
        """What is kept of it: text in UTF-8, a token a line, and numbers."""
        data = {FRAME: json.dumps(self.frame).encode(), TOKENS: self.tokens.text}
        numbers = {STARTS: self.starts, RANKS: self.ranks, LEFTS: self.lefts}
        data |= {name: array("I", values).tobytes() for name, values in numbers.items()}
        return {
            name: Array(dtype, (len(data[name]) // ITEMSIZE[dtype],), data[name])
            for name, dtype in DTYPES.items()
        }

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, Array]) -> Parts:
        """What was kept of a tokenizer.

        Raises:
            DamagedFile: that is not what these are.
        """
        try:
            frame = json.loads(bytes(arrays[FRAME].data))
        except (ValueError, RecursionError) as exc:
            raise DamagedFile(f"its frame is no JSON: {exc}") from None
        if not (isinstance(frame, dict) and _is_plain(frame.get("model"))):
            raise DamagedFile("its frame is that of another kind of tokenizer")
        tokens = TokenTable(bytes(arrays[TOKENS].data))
        starts, ranks, lefts = (
            memoryview(arrays[name].data).cast("B").cast("I") for name in (STARTS, RANKS, LEFTS)
        )
        if len(starts) != len(tokens) + 1 or len(ranks) != len(lefts):
            raise DamagedFile("its merges are not those of its tokens")
        return cls(frame, tokens, starts, ranks, lefts)

    def ids(self) -> dict[str, int]:
        """All tokens of the model, with their ids."""
        return {token: i for i, token in enumerate(self.tokens[:])}

    def added(self) -> list[Json]:
        """The added tokens, as the JSON has them."""
        return self.frame.get("added_tokens") or []

    def outside(self) -> set[str]:
        """The added tokens that are no tokens of the model."""
        added = ((each["content"], each["id"]) for each in self.added())
        return {text for text, i in added if self.tokens[i : i + 1] != [text]}


def rust_of(text: str, *, splits_special_tokens: bool) -> tokenizers.Tokenizer:
    """The Rust tokenizer of its JSON, which neither pads nor cuts; with `splits_special_tokens`,
    special tokens in a text are text to it.

    Raises:
        DamagedFile: it is none.
    """
    import tokenizers

    with _as_damage():
        rust = tokenizers.Tokenizer.from_str(text)
    rust.no_truncation()
    rust.no_padding()
    rust.encode_special_tokens = splits_special_tokens
    return rust


@contextlib.contextmanager
def _as_damage(*, of_text: bool = False) -> Iterator[None]:
    """Whatever `tokenizers` raises of what it is made of, as damage. Where it is given a text that
    is an error without a kind, and a panic of Rust, which is no Exception.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError, DamagedFile):
        raise
    except BaseException as exc:
        if of_text and isinstance(exc, Exception) and type(exc) is not Exception:
            raise
        said = " ".join(str(exc).split())[:200]
        raise DamagedFile(f"it makes no tokenizer: {said}") from exc


def taken_apart(whole: Json) -> Parts | None:
    """A tokenizer's JSON taken apart; None if an excerpt could do something else than the whole."""
    model: Json = whole["model"]
    vocabulary: dict[str, int] = model.get("vocab") or {}
    if not vocabulary:
        return None
    if not (_is_plain(model) and sorted(vocabulary.values()) == list(range(len(vocabulary)))):
        return None
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    added = {each["content"]: each["id"] for each in whole.get("added_tokens") or []}
    stand_ins = {*(BYTES if model.get("byte_fallback") else ())}
    if (unknown := model.get("unk_token")) is not None:
        stand_ins.add(unknown)
        if unknown not in vocabulary:
            return None
    if (added.keys() & stand_ins) - vocabulary.keys():  # which would stand in here, and do not
        return None
    if "\n" in "".join(tokens) or not all(map(all, pairs)):
        return None
    if stand_ins and not all(map(stand_ins.isdisjoint, pairs)):
        return None
    needed = {token: vocabulary[token] for token in stand_ins if token in vocabulary}
    frame = {**whole, "model": {**model, "vocab": needed | added, "merges": []}}
    made = [vocabulary[left + right] for left, right in pairs]
    counts = [0] * len(tokens)
    for i in made:
        counts[i] += 1
    table = TokenTable.of(tokens)
    if sum(map(operator.mul, counts, map(len, tokens))) > MOST_MERGED * len(table.text):
        return None
    order = sorted(range(len(pairs)), key=made.__getitem__)
    starts = array("I", itertools.accumulate(counts, initial=0))
    lefts = array("I", [len(pairs[rank][0]) for rank in order])
    return Parts(frame, table, starts, array("I", order), lefts)


def _is_plain(model: Any) -> bool:
    """Whether it is byte-pair encoding as it is described above: no chance, no marks on words."""
    if not isinstance(model, dict) or model.get("type") != "BPE":
        return False
    odd = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    return not any(model.get(name) for name in odd)


class Excerpts:
    """A Rust tokenizer, as far as `tokenizer.Tokenizer` asks it, made of its parts when it is
    needed: an excerpt for each of the first texts, then the whole.

    Any thread may ask.
    """

    def __init__(self, parts: Parts, *, splits_special_tokens: bool = False) -> None:
        """Make what the words of texts are found with. With `splits_special_tokens`, special tokens
        in a text are text.

        Raises:
            DamagedFile: these are no parts of a tokenizer.
        """
        self._parts, self._splits = parts, splits_special_tokens
        self.made = 0
        """How many excerpts were made."""
        self._left, self._most_strings = MOST, MOST_STRINGS * len(parts.tokens)
        self._most_characters = len(parts.tokens)
        self._whole: tokenizers.Tokenizer | None = None
        self._expected: dict[str, tokenizers.Tokenizer] = {}
        self._lock = threading.RLock()
        self._frame_text = json.dumps(parts.frame)
        self._frame = self._of_frame()
        self._outside = parts.outside()
        added = self._frame.get_added_tokens_decoder()
        contents = {i: token.content for i, token in added.items()}
        if contents != {each["id"]: each["content"] for each in parts.added()}:
            raise DamagedFile("its added tokens have other ids")
        self._added_ids = {text: i for i, text in contents.items()}
        self._added = {i: self._frame.id_to_token(i) for i in contents}  # as normalised
        self._special = {token.content for token in added.values() if token.special}
        self._words = _Words(self._frame)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> tokenizers.Encoding:
        """Encode a text as the whole tokenizer does.

        Raises:
            DamagedFile: its parts make no tokenizer.
        """
        with self._lock:
            rust = self._expected.get(text)
            if rust is None:
                rust = self._excerpt([text]) or self.whole()
                self._expected = {text: rust}
        with _as_damage(of_text=True):
            return rust.encode(text, add_special_tokens=add_special_tokens)

    def expect(self, texts: Sequence[str]) -> None:
        """Make an excerpt that encodes all of these texts, which are to be encoded next, if there
        can be one and they are not expected already.

        Raises:
            DamagedFile: its parts make no tokenizer.
        """
        with self._lock:
            if not self._expected.keys() >= set(texts):
                rust = self._excerpt(texts)
                self._expected = {} if rust is None else dict.fromkeys(texts, rust)

    def _excerpt(self, texts: Sequence[str]) -> tokenizers.Tokenizer | None:
        """What encodes these texts; None if the whole is the better one for that."""
        if self._whole is not None or self._left <= 0 or not self._are_short(texts):
            return None
        found = self._tokens_in(self._words.of(texts))
        if found is None:
            return None
        self._left -= 1
        self.made += 1
        return self._with(self._parts.excerpt(found))

    def _with(self, model: models.BPE) -> tokenizers.Tokenizer:
        rust = self._of_frame()
        rust.model = model
        return rust

    def _of_frame(self) -> tokenizers.Tokenizer:
        return rust_of(self._frame_text, splits_special_tokens=self._splits)

    def _tokens_in(self, words: Set[str]) -> dict[str, int] | None:
        """All tokens that these words could become, with their ids; None if there are too many
        strings to look at, or added tokens that the model does not know among them.

        A character that is no token may be left out, and what is on its two sides come together by
        merges, which make no added token that the model does not know.
        """
        tokens, most = self._parts.tokens, self._most_strings
        strings = _strings(words, most)
        if strings is None or not self._outside.isdisjoint(strings):
            return None
        found = tokens.among(strings)
        if unknown := set("".join(words)) - found.keys():
            left_out = str.maketrans(dict.fromkeys(unknown, ""))
            closer = _strings({word.translate(left_out) for word in words}, most)
            if closer is None:
                return None
            found |= tokens.among(closer - strings)
        return found

    def _are_short(self, texts: Sequence[str]) -> bool:
        """Whether finding the words of these texts takes less time than making the whole."""
        return sum(map(len, texts)) <= self._most_characters

    def whole(self) -> tokenizers.Tokenizer:
        """The whole tokenizer, made when this is first called.

        Raises:
            DamagedFile: its parts make no tokenizer.
        """
        with self._lock:
            if self._whole is None:
                self._whole = self._with(self._parts.whole())
            return self._whole

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of these ids."""
        tokens = [token for token in map(self.id_to_token, ids) if token is not None]
        if skip_special_tokens:
            tokens = [token for token in tokens if token not in self._special]
        decoder = self._frame.decoder
        return " ".join(tokens) if decoder is None else str(decoder.decode(tokens))

    def id_to_token(self, token_id: int) -> str | None:
        """The token of an id, None if there is none.

        Raises:
            OverflowError: it is negative.
        """
        if token_id < 0:
            raise OverflowError("ids of tokens are not negative")
        if token_id in self._added:
            return self._added[token_id]
        tokens = self._parts.tokens
        return tokens[token_id] if token_id < len(tokens) else None

    def token_to_id(self, token: str) -> int | None:
        """The id of a token, None if there is none."""
        found = self._added_ids.get(token)
        return self._parts.tokens.find(token) if found is None else found

    def get_vocab_size(self, *, with_added_tokens: bool = True) -> int:
        """How many tokens there are."""
        tokens, outside = self._parts.tokens, self._outside if with_added_tokens else ()
        return len(tokens) + sum(tokens.find(text) is None for text in outside)

    def get_vocab(self, *, with_added_tokens: bool = True) -> dict[str, int]:
        """All tokens and their ids."""
        return {**self._parts.ids(), **(self._added_ids if with_added_tokens else {})}


class _Words:
    """Finds the words that a tokenizer sees in a text: what it is left with for its model, after
    its normalizer, its added tokens and its pre-tokenizer.
    """

    def __init__(self, rust: tokenizers.Tokenizer) -> None:
        from tokenizers import pre_tokenizers

        self._rust, self._heard = rust, _Heard()
        last = pre_tokenizers.PreTokenizer.custom(self._heard)
        first = rust.pre_tokenizer
        rust.pre_tokenizer = last if first is None else pre_tokenizers.Sequence([first, last])

    def of(self, texts: Iterable[str]) -> set[str]:
        """The words of these texts."""
        with _as_damage(of_text=True):
            for text in texts:
                self._rust.encode(text, add_special_tokens=False)
        words, self._heard.words = self._heard.words, set()
        return words


class _Heard:
    """A pre-tokenizer that leaves all as it is, and takes note of it."""

    def __init__(self) -> None:
        self.words: set[str] = set()

    def pre_tokenize(self, text: tokenizers.PreTokenizedString) -> None:
        """Take note of the words; what is added tokens has its tokens already."""
        splits = text.get_splits("normalized", "byte")
        self.words.update(word for word, _, tokens in splits if tokens is None)


def _strings(words: Set[str], most: int) -> set[str] | None:
    """All strings that stand in these words; None if there may be more than so many."""
    if sum(len(word) * (len(word) + 1) // 2 for word in words) > most:
        return None
    found: set[str] = set()
    for word in words:
        size = len(word)
        found.update(word[i:j] for i in range(size) for j in range(i + 1, size + 1))
    return found
