"""One run of `mlx-promptcache`, for scripts/bench, that also tells how long saving took.

    saving_child.py FILE generate ...     writes to FILE the seconds that it spent on saving

Counted are the calls that make what is saved and write it: of a prompt's state, and of a tokenizer
that was made anew, with the look for a kept one. Nothing else is done meanwhile.
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
    def running(self, sign: int = 1) -> Iterator[None]:
        """Count what passes; with -1 take it off what somebody else counts."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += sign * (time.perf_counter() - began)

    def counts(self, function: Callable[..., Any], sign: int = 1) -> Callable[..., Any]:
        """The function, with its calls counted."""

        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.running(sign):
                return function(*args, **kwargs)

        return counted


def watch(saving: Stopwatch) -> None:
    """Have all that saves counted from now on."""
    tokenizer = saving.counts(TokenizerStore.tokenizer)

    def without_making(
        self: TokenizerStore, model: Path, whole: Callable[[], Any], *, keeps: bool
    ) -> Any:
        return tokenizer(self, model, saving.counts(whole, -1), keeps=keeps)

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
