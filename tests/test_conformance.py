"""Every architecture that the installed mlx-lm has keeps what is promised, asked one by one."""

from __future__ import annotations

import os
from importlib.metadata import version
from typing import TYPE_CHECKING

import mlx.core as mx
import pytest

import architectures
import matrix
import plain
from conformance import (
    AS_MLX_LM,
    AT_ONCE,
    CLOSE,
    EARLY,
    NO,
    NOTHING_TO_DO,
    QUESTIONS,
    ROUNDING,
    SHARED,
    SHORT,
    THIRD_TIME,
    YES,
    Book,
    holds_rows_only,
    kinds_of,
    model_of,
    quantised_by_mlx_lm,
    tokens,
)
from conftest import ROOT

if TYPE_CHECKING:
    from pathlib import Path

ROWS = {"KVCache", "RotatingKVCache"}

MLX_LM_DIFFERS = {**architectures.DEPEND_ON_PASSES, **architectures.DEPENDS_ON_CACHE}
ON_METAL = mx.metal.is_available()

each = pytest.mark.parametrize("name", architectures.runnable())


@pytest.fixture(scope="session")
def book(tmp_path_factory: pytest.TempPathFactory) -> Book:
    """What was answered in this session, whichever worker asked."""
    base = tmp_path_factory.getbasetemp()  # of a worker: in that of all
    directory = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "conformance"
    directory.mkdir(exist_ok=True)
    return Book(directory)


# The architectures


@pytest.mark.parametrize("name", architectures.modules())
def test_every_architecture_has_a_configuration(name: str) -> None:
    assert name in architectures.CONFIGS, f"add a tiny configuration of {name} to CONFIGS"


def test_every_configuration_has_its_architecture() -> None:
    gone = architectures.CONFIGS.keys() - set(architectures.modules())
    assert not gone, f"mlx-lm has no {sorted(gone)}: take them out of CONFIGS"


@pytest.mark.parametrize(
    "table", ["KNOWN_BROKEN", "DEPEND_ON_PASSES", "DEPENDS_ON_CACHE", "UNWRITTEN"]
)
def test_every_exception_is_one_of_an_architecture(table: str) -> None:
    assert getattr(architectures, table).keys() <= architectures.CONFIGS.keys()


@pytest.mark.parametrize("name", architectures.broken())
def test_what_mlx_lm_cannot_run_is_still_that(name: str) -> None:
    error = plain.answer(plain.with_cache, model_of(name), [1, 2, 3], [3], 1)
    assert error == architectures.KNOWN_BROKEN[name], f"take {name} out of KNOWN_BROKEN"


@each
def test_what_stood_beyond_the_windows_still_counts(name: str) -> None:
    """If it did not, a model that lost it would pass for one that kept it."""
    prompt = tokens(SHORT, 3)
    other = [*prompt[:EARLY], (prompt[EARLY] + 1) % 100, *prompt[EARLY + 1 :]]
    logits = [plain.with_cache(model_of(name), p, [SHORT], 1)[1] for p in (prompt, other)]
    assert plain.apart(*logits) > CLOSE


# The questions


@each
def test_tokens_after_a_stop_are_those_of_one_run(name: str, book: Book) -> None:
    assert book.answer(name, "resume") == YES


@each
def test_a_declared_prefix_is_reused_to_its_very_end(name: str, book: Book) -> None:
    assert book.answer(name, "prefix") == YES


@each
def test_prompts_that_part_reuse_what_they_share(name: str, book: Book) -> None:
    rows_only = holds_rows_only(name)
    looks_so = set(kinds_of(name)) <= ROWS
    assert rows_only == (looks_so and name not in architectures.UNWRITTEN)
    assert book.answer(name, "divergence") == (AT_ONCE if rows_only else THIRD_TIME)


@each
def test_an_exact_warm_run_has_the_bits_of_a_cold_one(name: str, book: Book) -> None:
    assert book.answer(name, "exact") == YES


@each
def test_files_of_another_architecture_are_refused_with_a_reason(name: str, book: Book) -> None:
    assert book.answer(name, "refusal") == YES


@each
def test_every_attribute_of_a_layer_is_taken_down(name: str, book: Book) -> None:
    assert book.answer(name, "attributes") == YES


@each
def test_decoding_with_a_cache_is_recomputing_without_one(name: str, book: Book) -> None:
    expected = AS_MLX_LM if name in MLX_LM_DIFFERS else YES
    assert book.answer(name, "recomputing") == expected


@pytest.mark.parametrize("name", MLX_LM_DIFFERS)
def test_mlx_lm_itself_computes_otherwise_without_a_cache(name: str) -> None:
    prompt = tokens(SHARED, 61)
    _, cached = plain.with_cache(model_of(name), prompt, [EARLY, SHARED], 1)
    _, uncached = plain.without_cache(model_of(name), prompt, 1)
    assert plain.apart(cached, uncached) > 10 * ROUNDING


@each
def test_tokens_after_a_stop_are_those_of_one_run_with_quantised_rows(
    name: str, book: Book
) -> None:
    answers: dict[bool | str, str] = {True: YES, False: NOTHING_TO_DO}
    assert book.answer(name, "quantised") == answers.get(quantised_by_mlx_lm(name), NO)


@each
def test_tokens_after_a_stop_are_those_of_one_run_with_a_largest_size(
    name: str, book: Book
) -> None:
    heeds = not hasattr(model_of(name), "make_cache")
    assert book.answer(name, "rotating") == (YES if heeds else NOTHING_TO_DO)


def test_what_one_worker_asked_no_other_asks_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def question(name: str, _: Path) -> str:
        asked.append(name)
        return "oui, déjà"

    monkeypatch.setitem(QUESTIONS, "layers", question)
    books = [Book(tmp_path), Book(tmp_path)]
    assert [book.answer("Qwen 3", "layers") for book in books] == ["oui, déjà"] * 2
    assert asked == ["Qwen 3"]


# The document


def test_the_script_writes_the_document(
    book: Book, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(matrix, "Book", lambda _: book)
    monkeypatch.setattr(architectures, "runnable", lambda: ["qwen3", "mamba", "Qwen 3"])
    monkeypatch.setattr(matrix, "DOCUMENT", tmp_path / "architectures.md")
    assert matrix.main([]) == matrix.main(["--write"]) == 0
    written = (tmp_path / "architectures.md").read_text("utf-8")
    assert capsys.readouterr().out == written
    assert "| qwen3 | 2 KVCache | yes | yes | at once | yes |" in written
    assert written.index("| mamba | 2 ArraysCache |") < written.index("## Shapes")
    assert written.index("## Shapes") < written.index("| Qwen 3 | 2 KVCache |")
    assert matrix.made_with(written) == version("mlx-lm")


@pytest.mark.skipif(ON_METAL, reason="the document is about a CPU")
def test_the_document_says_what_was_answered(book: Book) -> None:
    path: Path = ROOT / "docs" / "architectures.md"
    text = path.read_text("utf-8")
    made_with = matrix.made_with(text)
    answers = [book.answers(name) for name in architectures.runnable()]
    assert matrix.document(answers, made_with) == text, "run scripts/architectures --write"
