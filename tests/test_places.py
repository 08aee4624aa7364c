"""Where things are: what cannot be looked at is not there."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from mlx_promptcache import places
from mlx_promptcache.errors import StoreError
from shim import Call, Fault, Shim

if TYPE_CHECKING:
    from pathlib import Path

EACCES = 13


def test_a_store_that_cannot_be_looked_at_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("lost", "there"):
        (tmp_path / name).mkdir()
        places.remember_store(tmp_path / name)
    with Shim(tmp_path / "lost", Fault(Call("stat", ".", 1), EACCES)) as shim:
        assert places.known_stores() == [tmp_path / "there"]
    assert shim.met


def test_a_store_is_remembered_whose_path_is_no_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    store = tmp_path / os.fsdecode(b"caf\xe9 \xc2\x85")  # a byte that is no text, a line's end
    store.mkdir()
    places.remember_store(store)
    places.remember_store(tmp_path)
    assert places.known_stores() == [store, tmp_path]


def test_a_home_that_is_not_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoreError, match="no home directory for '~nobody-of-that-name/x': give"):
        places.expanded("~nobody-of-that-name/x")
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])
    with pytest.raises(StoreError, match="or set HOME"):
        places.user_cache()
