"""One run of `mlx-promptcache`, for scripts/bench, that also tells how long saving took.

    saving_child.py FILE generate ...     writes to FILE the seconds that it spent on saving

Counted is what passes in the calls that make what is saved and write it: of a prompt's state, and
of a tokenizer that was made anew, with the look for a kept one.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_promptcache import cli
from mlx_promptcache.cache import PromptCache
from mlx_promptcache.run import Run
from mlx_promptcache.tokenizer_store import TokenizerStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Stopwatch:
    """Seconds that passed while it ran."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Count what passes."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - began

    def counts(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its calls counted."""

        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.running():
                return function(*args, **kwargs)

        return counted


def watch(saving: Stopwatch) -> None:
    """Have all that saves counted from now on."""
    tokenizer = saving.counts(TokenizerStore.tokenizer)

    def without_making(
        self: TokenizerStore, model: Path, whole: Callable[[], Any], *, keeps: bool
    ) -> Any:
        making = Stopwatch()
        try:
            return tokenizer(self, model, making.counts(whole), keeps=keeps)
        finally:
            saving.seconds -= making.seconds  # what is made later is not counted at all

    for owner, name, counted in (
        (TokenizerStore, "tokenizer", without_making),
        (Run, "prompt_state", saving.counts(Run.prompt_state)),
        (PromptCache, "keep", saving.counts(PromptCache.keep)),
    ):
        setattr(owner, name, counted)


def main() -> None:
    """Run the command line, and write what was counted."""
    file, saving = Path(sys.argv.pop(1)), Stopwatch()
    watch(saving)
    try:
        cli.main()
    finally:
        file.write_text(f"{saving.seconds:.4f}", "ascii")


if __name__ == "__main__":
    main()
