"""Exponentials in loops over vectors: the bits of MLX's own."""

from __future__ import annotations

import io
import re
import threading
from typing import Any

import mlx.core as mx
import pytest
import trial_exponentials
from loops import needs_compiler, on_x86

from mlx_promptcache import exponentials
from mlx_promptcache.streams import uncompiled

pytestmark = on_x86

PIECES, SEED = 24, 3


def test_exponentials_have_the_bits_of_mlx_s_own() -> None:
    """The long form is `scripts/trials exponentials`."""
    outcome = trial_exponentials.tried(PIECES, SEED)
    print(outcome.line())
    assert outcome.wrong == []
    assert outcome.figures["numbers"] > (PIECES - 1) * trial_exponentials.PIECE


def test_the_trial_sees_a_last_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exponentials, "POLYNOMIAL", (*exponentials.POLYNOMIAL[:5], 6.9315e-1, 1.0))
    exponentials._compiled.cache_clear()
    try:
        assert "others, the first of" in trial_exponentials.tried(3, SEED).wrong[0]
    finally:
        exponentials._compiled.cache_clear()


# What MLX makes of it


def graph(array: mx.array) -> str:
    """The operations that make this array, as text."""
    text = io.StringIO()
    mx.export_to_dot(text, array)
    return text.getvalue()


def passes(array: mx.array) -> list[str]:
    return re.findall(r'label ="(Compiled\w+)"', graph(array))


@needs_compiler
def test_exponentials_are_three_passes_over_memory() -> None:
    values = mx.zeros((50,))
    mx.eval(values)
    found = passes(exponentials.exp(values))
    assert len(found) == 3
    assert [name.count("Select") for name in sorted(found)].count(1) == 1


def test_what_mlx_keeps_of_shapes_is_limited() -> None:
    exponentials._compiled.cache_clear()
    for size in range(1, exponentials.SHAPES + 10):
        exponentials.exp(mx.zeros((size,)))
    assert exponentials._compiled.cache_info().currsize == exponentials.SHAPES
    misses = exponentials._compiled.cache_info().misses
    exponentials.exp(mx.zeros((size,)))
    assert exponentials._compiled.cache_info().misses == misses


# Where they serve


@pytest.mark.usefixtures("inferring")
def test_they_serve_many_numbers_of_float32() -> None:
    many = mx.zeros((22, exponentials.LEAST // 22 + 1))
    assert exponentials.serve(many)
    assert not exponentials.serve(many[:20])
    assert not exponentials.serve(many.astype(mx.float16))
    with uncompiled():
        assert not exponentials.serve(many)


def test_they_serve_nobody_who_may_want_gradients() -> None:
    many = mx.zeros((exponentials.LEAST,))
    with exponentials.inferring(), exponentials.inferring():
        assert exponentials.serve(many)
    assert not exponentials.serve(many)


def test_what_is_made_once_is_made_for_one_call() -> None:
    made: list[mx.array] = []

    def make() -> mx.array:
        made.append(mx.zeros(1))
        return made[-1]

    for call in (1, 2):
        with exponentials.inferring():
            assert exponentials.once("this", make) is exponentials.once("this", make)
        assert len(made) == call
    assert exponentials.once("this", make) is not exponentials.once("this", make)


@pytest.mark.usefixtures("inferring")
def test_what_others_compute_is_theirs() -> None:
    """They may train a model in the main thread while another one answers."""
    told: list[Any] = []
    thread = threading.Thread(target=lambda: told.append(exponentials._CALL.get()))
    thread.start()
    thread.join()
    assert told == [None]
    assert exponentials._CALL.get() is not None
