"""The table of answers, as text: docs/architectures.md.

Run by scripts/architectures, which prints the table, or writes the document with `--write`.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import architectures
from conformance import NO, Answers, Book, quantised_by_mlx_lm

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

DOCUMENT = Path(__file__).parent.parent / "docs" / "architectures.md"

INTRODUCTION = """\
# Architectures

What every architecture of mlx-lm answers to the questions of `tests/conformance.py`. They are asked
of tiny models with random weights, in float32 on a CPU, with prompts of some fifty tokens that go
past windows of 16 and chunks of 24. Wrappers that can see are asked about their language model.

Made by `scripts/architectures --write` with mlx-lm {version}; a test compares it with what the
installed mlx-lm answers.

## Questions

| column | what is asked |
|---|---|
{questions}
"""

SMALLER = "Their ratios and flags, with fewer layers and narrower ones."
WHY = "And what it says."

ABOUT = {
    "layers": "mlx-lm's cache objects, in their order",
    "resume": "Are `n + m` tokens in one run bit for bit those of `n`, save, load into a new "
    "model, `m`? Greedy, and sampled with top-p and a repetition penalty; past the end of a cell",
    "prefix": "Is a declared prefix reused to its very end, with the tokens of a cold run?",
    "divergence": "Prompts share their first tokens, and nobody said how many. Does the second one "
    "reuse all that it shares (`at once`), only the third one (`third time`), or neither (`no`: "
    "they start from the last state that was kept before)?",
    "exact": "Is a warm run with `--exact` bit for bit a cold one?",
    "refusal": "Are its files refused by other architectures, with a reason, even if they come "
    "with the right fingerprint?",
    "attributes": "Is every attribute of its cache objects taken down, and put into fresh ones?",
    "recomputing": "Are greedy tokens and their logits those of computing everything again for "
    "each token? `as mlx-lm`: no, and neither are mlx-lm's own, see below",
    "quantised": "`resume`, with K/V quantised to 8 bits in the middle of the prompt. `-`: mlx-lm "
    "quantises nothing of it; `no`: mlx-lm cannot, see below",
    "rotating": "`resume`, with a largest size of the K/V cache. `-`: mlx-lm pays no heed to it",
    "embedding": "Do states hold the final hidden state of the last token?",
}
"""What is asked, column by column."""


def document(answers: Sequence[Answers], made_with: str) -> str:
    """The whole document."""
    shapes = [a for a in answers if a.name in architectures.SHAPES]
    others = [a for a in answers if a.name not in architectures.SHAPES]
    questions = "\n".join(f"| {question} | {about} |" for question, about in ABOUT.items())
    sections = {
        "Answers": table("architecture", others),
        "Shapes of known models": f"{SMALLER}\n\n{table('model', shapes)}",
        "What mlx-lm cannot run on a CPU": f"{WHY}\n\n{listed(broken())}",
        "Where mlx-lm computes otherwise without a cache": listed(differing()),
        "Where mlx-lm makes a cache object and leaves it empty": listed(unwritten()),
        "K/V that mlx-lm cannot quantise": f"{WHY}\n\n{listed(unquantised(answers))}",
    }
    introduction = INTRODUCTION.format(version=made_with, questions=questions)
    return "\n".join([introduction, *(f"## {title}\n\n{body}" for title, body in sections.items())])


def made_with(text: str) -> str:
    """The version of mlx-lm that a document says it was made with."""
    found = re.search(r"with mlx-lm (\S+);", text)
    return found[1] if found else ""


def table(first: str, answers: Iterable[Answers]) -> str:
    """A row for each of these."""
    headings = [first, *ABOUT]
    rows = [headings, ["---"] * len(headings), *map(row, answers)]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in rows)


def row(answers: Answers) -> list[str]:
    return [answers.name, *(getattr(answers, field) for field in ABOUT)]


def broken() -> list[tuple[str, str]]:
    return sorted(architectures.KNOWN_BROKEN.items())


def differing() -> list[tuple[str, str]]:
    both = {**architectures.DEPEND_ON_PASSES, **architectures.DEPENDS_ON_CACHE}
    return sorted(both.items())


def unwritten() -> list[tuple[str, str]]:
    return sorted(architectures.UNWRITTEN.items())


def unquantised(answers: Iterable[Answers]) -> list[tuple[str, str]]:
    said = ((a.name, quantised_by_mlx_lm(a.name)) for a in answers if a.quantised == NO)
    return sorted((name, sentence) for name, sentence in said if isinstance(sentence, str))


def listed(items: Iterable[tuple[str, str]]) -> str:
    """One line for each sentence, with all that it is said of."""
    names: dict[str, list[str]] = {}
    for name, sentence in items:
        names.setdefault(sentence, []).append(name)
    return "".join(f"* {', '.join(of)}: {sentence}\n" for sentence, of in names.items())


def main(arguments: Sequence[str] | None = None) -> int:
    """Ask all questions of all architectures, and print the table or write the document."""
    parser = argparse.ArgumentParser(prog="scripts/architectures", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write docs/{DOCUMENT.name}")
    options = parser.parse_args(arguments)
    for name in architectures.runnable():
        architectures.config_of(name)  # says so now, and not after minutes, if there is none
    logging.disable(logging.WARNING)  # refused files give notice
    with tempfile.TemporaryDirectory() as directory:
        book = Book(Path(directory))
        answers = []
        for name in architectures.runnable():
            answers.append(book.answers(name))
            print(name, file=sys.stderr)
    text = document(answers, version("mlx-lm"))
    if options.write:
        DOCUMENT.write_text(text, "utf-8")
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
