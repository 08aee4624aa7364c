"""The table of tokens says what a dict of all of them says."""

from __future__ import annotations

import random

import pytest

from mlx_promptcache.errors import DamagedFile
from mlx_promptcache.token_table import FEW, TokenTable

LISTS = {
    "usual": ["a", "b", "ab", "Ġa", "日本", "👩‍👩‍👧‍👦", "<|end|>", "abc"],
    "one": ["a"],
    "an empty one in the middle": ["a", "", "b"],
    "an empty one first": ["", "b"],
    "an empty one last": ["b", ""],
    "ends that look like others": ["ab", "b", "xab", "x", "ba"],
    "other ends of lines": ["\r", "\x85", "\u2028", "a\rb"],
}
STRANGERS = ["", "a", "x", "b\na", "\n", "a\n", "\nb", "ab", "\ud83d", "日", "\u2029", "é" * 99]


@pytest.mark.parametrize("what", LISTS)
def test_it_says_what_a_dict_says(what: str) -> None:
    tokens = LISTS[what]
    ids = {token: i for i, token in enumerate(tokens)}
    table = TokenTable.of(tokens)
    assert len(table) == len(tokens)
    assert table[:] == tokens
    assert [table[i] for i in range(len(tokens))] == tokens
    asked = {*tokens, *STRANGERS}
    assert {string: table.find(string) for string in asked} == {s: ids.get(s) for s in asked}
    assert table.among(asked) == {s: ids[s] for s in asked if s in ids}
    assert TokenTable(table.text).among(tokens) == ids


def test_it_says_so_of_many() -> None:
    chance = random.Random(5)

    def some(least: int, most: int) -> str:
        return "".join(chance.choices("abcé\r ", k=chance.randint(least, most)))

    tokens = sorted({some(1, 7) for _ in range(999)})
    asked = {some(0, 8) for _ in range(999)}
    ids = {token: i for i, token in enumerate(tokens)}
    table = TokenTable.of(tokens)
    assert 0 < sum(string in ids for string in asked) < len(asked)
    assert table.among(asked) == {s: ids[s] for s in asked if s in ids}
    assert [table.find(s) for s in sorted(asked)] == [ids.get(s) for s in sorted(asked)]


@pytest.mark.parametrize("what", LISTS)
def test_who_asks_for_many_is_not_kept_waiting(what: str) -> None:
    tokens = LISTS[what]
    ids = {token: i for i, token in enumerate(tokens)}
    table = TokenTable.of(tokens)
    for _ in range(FEW + 1):
        table.find("never")
    table.text = b""  # it is not gone through again
    asked = {*tokens, *STRANGERS}
    assert {string: table.find(string) for string in asked} == {s: ids.get(s) for s in asked}


def test_nothing_is_among_nothing() -> None:
    assert TokenTable.of(["a", "b"]).among(set()) == {}


def test_what_is_no_text_is_damage() -> None:
    for data in (b"\xff", b"a\n\xed\xa0\xbd", b"a\n\xc3"):
        with pytest.raises(DamagedFile, match="its tokens are no text"):
            TokenTable(data)
