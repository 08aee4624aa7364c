"""Where things are: what cannot be looked at is not there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlx_promptcache import places
from shim import Call, Fault, Shim

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

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
