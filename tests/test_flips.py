"""Damage of every kind to a small store: the short form of `scripts/trials flips`."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from mlx_promptcache import container
from trial_flips import Damage, Victim, tried

EVERY = 353  # a prime, so that all files, bytes and bits are met


@pytest.mark.usefixtures("caplog")
def test_no_flip_no_cut_and_no_swap_makes_a_wrong_token() -> None:
    outcome = tried("smallest", 1, EVERY)
    assert outcome.wrong == []
    assert outcome.figures["flips"] > 2 * outcome.figures["bytes"] // EVERY - 2
    assert outcome.figures["cuts"] > 10


def test_every_pair_of_files_is_swapped(tmp_path: Path) -> None:
    victim = Victim(tmp_path / "store", "smallest")
    swaps = [d for d in victim.damages(random.Random(1)) if d.how == "swaps"]
    count = len(victim.files)
    assert len(swaps) == count * (count - 1) // 2 >= 36
    assert [wrong for turn, swap in enumerate(swaps) for wrong in victim.harm(swap, turn)] == []


def test_what_is_wrong_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without checksums of arrays the trial tells so, and of whatever is raised but misses."""
    victim = Victim(tmp_path / "store", "smallest")
    (path,) = [p for p in victim.files if p in victim.needed and "snapshots" in p.parts]
    whole = victim.files[path]
    flipped = whole[:-1] + bytes([whole[-1] ^ 0xFF])
    damage = Damage("flips", "the last byte", {path: flipped})
    assert victim.harm(damage, 0) == []

    with monkeypatch.context() as patch:
        patch.setattr(container, "_check", lambda *_: None)
        told = " ".join(victim.harm(damage, 0))
    assert "verify found nothing" in told
    assert "a damaged state was loaded" in told
    with monkeypatch.context() as patch:
        patch.setattr(container, "read_header", lambda *_: 1 / 0)
        (wrong,) = victim.harm(damage, 0)
    assert "ZeroDivisionError" in wrong
    assert {p: p.read_bytes() for p in victim.files} == victim.files
