"""Timing programs: where their text begins, what fails, whose turn it is, and what is compared."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_promptcache import timing
from mlx_promptcache.errors import MeasuringError
from mlx_promptcache.timing import Arm, Command, median, ratio, take_turns, timed

if TYPE_CHECKING:
    from collections.abc import Callable

MARKER = b"=====\n"
SAMPLES = st.lists(st.floats(0.001, 1000), min_size=1, max_size=30)


def program(source: str, marker: bytes = b"", without: tuple[str, ...] = ()) -> Command:
    return Command((sys.executable, "-S", "-c", source), marker, without)


def ignored(line: str) -> None:
    pass


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (b"", b""),
        (b"loading\n", b""),
        (b"loading\n=====\n", b""),
        (b"=====\nHel", b"Hel"),
        (b"loading\n=====\nHello\n=====\nPrompt: 3 tokens", b"Hello\n"),
    ],
)
def test_the_text_is_what_stands_between_two_markers(said: bytes, text: bytes) -> None:
    assert Command((), MARKER).text(said) == text


def test_without_a_marker_all_output_is_the_text() -> None:
    assert Command(()).text(b"Hello") == b"Hello"


def test_the_first_byte_of_text_is_timed_not_the_end_and_not_what_comes_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = 0  # in bytes that were read
    read = os.read

    def counted(descriptor: int, count: int) -> bytes:
        nonlocal clock
        chunk = read(descriptor, count)
        clock += len(chunk)
        return chunk

    monkeypatch.setattr(timing, "ENOUGH", 1)
    monkeypatch.setattr(os, "read", counted)
    monkeypatch.setattr(time, "perf_counter", lambda: clock)
    said = "loading\n=====\nHello you"
    taken = timed(program(f"print({said!r}, end='')", MARKER))
    assert taken.text == "Hello you"
    assert taken.first_seconds == said.index("H") + 1
    assert taken.total_seconds == len(said)


def test_a_program_that_fails_is_an_error_with_its_last_words() -> None:
    failing = program("import sys; print('text'); sys.exit('there is no such model')")
    with pytest.raises(MeasuringError, match=r"exit code 1: there is no such model$"):
        timed(failing)


@pytest.mark.parametrize("source", ["pass", "print('  ')", "print('loading')"])
def test_a_program_that_says_nothing_has_no_first_token(source: str) -> None:
    with pytest.raises(MeasuringError, match="no text"):
        timed(program(source, MARKER if "loading" in source else b""))


def test_programs_do_not_see_the_settings_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_PROMPTCACHE_DIR", "/elsewhere")
    monkeypatch.setenv("LD_PRELOAD_ME", "1")
    monkeypatch.setenv("KEPT", "1")
    shown = "import os; print([n in os.environ for n in ('MLX_PROMPTCACHE_DIR', 'LD_PRELOAD_ME',"
    shown += " 'KEPT', 'HF_HUB_OFFLINE')])"
    assert timed(program(shown)).text == "[False, True, True, True]\n"
    assert timed(program(shown, without=("LD_",))).text == "[False, False, True, True]\n"


def test_arms_take_turns_and_end_after_their_own_runs() -> None:
    order: list[str] = []

    def arm(name: str) -> Callable[[int], str]:
        def run(i: int) -> str:
            order.append(f"{name}{i}")
            return f"{name}{i}"

        return run

    told: list[str] = []
    arms = {"a": Arm(arm("a"), 3), "b": Arm(arm("b"), 1), "c": Arm(arm("c"), 2)}
    taken = take_turns(arms, told.append)
    assert order == ["a0", "b0", "c0", "a1", "c1", "a2"]
    assert taken == {"a": ["a0", "a1", "a2"], "b": ["b0"], "c": ["c0", "c1"]}
    assert told == ["round 1 of 3", "round 2 of 3", "round 3 of 3"]


@given(SAMPLES)
def test_as_many_samples_are_above_the_median_as_below(samples: list[float]) -> None:
    middle = median(samples)
    assert sum(s < middle for s in samples) <= len(samples) / 2
    assert sum(s > middle for s in samples) <= len(samples) / 2
    assert min(samples) <= middle <= max(samples)


def test_the_median_of_an_even_number_lies_between_the_two_in_the_middle() -> None:
    assert median([4.0, 1.0, 100.0, 2.0]) == 3.0


def test_a_ratio_is_one_of_medians_so_that_one_slow_run_changes_nothing() -> None:
    assert ratio([1.0, 2.0, 100.0], [4.0, 4.0, 5.0]) == 0.5
