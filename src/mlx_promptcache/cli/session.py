"""A run as commands make it: with progress, Ctrl-C, text as it comes, and the JSON of its end."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from typing import TYPE_CHECKING, Any

import click
import mlx.core as mx

from mlx_promptcache import places
from mlx_promptcache.cli import output
from mlx_promptcache.cli.interrupt import Interrupt, Interrupted
from mlx_promptcache.errors import DamagedFile, PromptCacheError, StoreError
from mlx_promptcache.sampling import fresh_seed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlx_promptcache.run import Progress, Run, Step
    from mlx_promptcache.runner import Runner
    from mlx_promptcache.state import State
    from mlx_promptcache.writer import Saved

log = logging.getLogger("mlx_promptcache")

DEFAULT_MAX_TOKENS = 100  # as mlx_lm.generate


class Session:
    """One run of one command."""

    def __init__(self, runner: Runner, *, as_json: bool, quiet: bool, seed: int | None) -> None:
        self.runner = runner
        self.as_json = as_json
        self.seed = fresh_seed(32, runner.ranks) if seed is None else seed
        self.interrupt = Interrupt()
        self.text = ""
        self.tokens: list[int] = []
        self.finish_reason: str | None = None
        self.first_token_seconds: float | None = None
        self.generation_seconds = 0.0
        self.saved: Saved | None = None
        self.broken_pipe: BrokenPipeError | None = None
        speaks = runner.ranks is None or runner.ranks.leads
        self._bar = sys.stderr.isatty() and not quiet and not as_json and speaks

    @contextlib.contextmanager
    def progress(self) -> Iterator[Progress]:
        """A function that shows how far the prompt is, and ends the prefill on Ctrl-C."""
        with output.bar("prompt", quiet=not self._bar) as bar:

            def show(done: int, total: int) -> None:
                bar(done, total)
                self._check()

            yield show

    def _check(self) -> None:
        """End the prefill if the user wants it, on whichever rank that was heard."""
        ranks = self.runner.ranks
        if ranks is not None and ranks.any("prefilling", value=self.interrupt.wanted):
            raise Interrupted
        if ranks is None:
            self.interrupt.check()

    def _is_to_end(self) -> bool:
        """Whether to stop generating: all ranks do after the same token."""
        ranks, wanted = self.runner.ranks, self.interrupt.wanted or self.broken_pipe is not None
        if ranks is None:
            return wanted
        ranks.wishes_to_end = wanted
        return ranks.ending

    def end_together(self) -> None:
        """Wait until all ranks are done: mlx.launch ends all where one of them fails."""
        if self.runner.ranks is not None:
            self.runner.ranks.told("ending")

    def generate(self, run: Run, max_tokens: int, stop: tuple[str, ...]) -> None:
        """Generate, and print the text as it comes."""
        first: float | None = None
        try:
            for step in run.steps(max_tokens, stop):
                self._take(step)
                now = time.perf_counter()
                first = now if first is None else first
                self.generation_seconds = now - first
                if self._is_to_end() and not step.finish_reason:
                    self.finish_reason = "interrupted"
                    break
            if not self.as_json and self.broken_pipe is None:
                self._show("\n")
        except BrokenPipeError as exc:  # whoever reads has seen enough: keep what was computed
            self.finish_reason, self.broken_pipe = "interrupted", exc

    def _take(self, step: Step) -> None:
        if self.first_token_seconds is None:
            self.first_token_seconds = output.process_seconds()
        self.tokens.append(step.token)
        self.text += step.text
        self.finish_reason = step.finish_reason or self.finish_reason
        if not self.as_json and step.text and self.broken_pipe is None:
            self._show(step.text)

    def _show(self, text: str) -> None:
        try:
            click.echo(text, nl=False)
            sys.stdout.flush()
        except BrokenPipeError as exc:  # the other ranks are still to hear of it
            if self.runner.ranks is None:
                raise
            self.broken_pipe = exc

    def keep(
        self, name: str | None, state: State, *, exact: bool = False, onto: str | None = None
    ) -> None:
        """Save a state. With no name it is a convenience, and failing is a notice. A name that
        stood for another state is told, but for `onto`, whose state this one goes on from.

        Raises:
            PromptCacheError: a state that was to be named cannot be saved.
        """
        cache = self.runner.cache
        if cache is None or (cache.read_only and name is None):
            return
        try:
            if name is None:
                saved = cache.keep(state, exact=exact)
            else:
                before = None if name == onto else self._taken_from(name, state)
                saved = cache.save(name, state, replace=True, exact=exact)
                if before is not None:
                    log.warning(
                        "%r stood for another state before, which has no name now: %s", name, before
                    )
        except PromptCacheError as exc:
            if name is not None:
                raise
            log.warning("the prompt was not kept: %s", exc)
            return
        self.remember()
        self.saved = saved if self.saved is None else self.saved + saved

    def _taken_from(self, name: str, state: State) -> str | None:
        """The snapshot that a name stands for, if it has other tokens than this state."""
        cache = self.runner.needed_cache
        try:
            cache.check_free(name, state.tokens)
        except DamagedFile:
            return None
        except StoreError:
            with contextlib.suppress(PromptCacheError):  # that is told where it is saved
                return cache.snapshot(name)
        return None

    def remember(self) -> None:
        """Let `list --all` know of this store."""
        if self.runner.cache is not None:
            places.remember_store(self.runner.cache.directory)

    def finish_sending(self, name: str | None = None) -> None:
        """Wait, but not long, until a remote has what was kept, and the state of this name."""
        supply = self.runner.cache.supply if self.runner.cache is not None else None
        if supply is not None:
            if name is not None:
                ranks = self.runner.ranks
                supply.send_name(name if ranks is None else ranks.own_name(name))
            supply.close()

    def answer(self, run: Run | None) -> dict[str, Any]:
        """The JSON of the run's end."""
        match = run.match if run else None
        cached = run.cached_tokens if run else 0
        fed = run.prefilled_tokens if run else 0
        whole = cached > 0 and fed == 0
        rate = (len(self.tokens) - 1) / self.generation_seconds if self.generation_seconds else 0.0
        return {
            "text": self.text,
            "tokens": self.tokens,
            "finish_reason": self.finish_reason,
            "prompt_tokens": cached + fed,
            "cached_tokens": cached,
            "prefilled_tokens": fed,
            "hit": "exact" if whole else "prefix" if cached else "none",
            "source": match.source if match else None,
            "miss_reason": match.reason if match and not cached else None,
            "load_seconds": run.load_seconds if run else 0.0,
            "prefill_seconds": run.prefill_seconds if run else 0.0,
            "ttft_seconds": self.first_token_seconds,
            "total_seconds": output.process_seconds(),
            "generation_tokens": len(self.tokens),
            "generation_tps": rate,
            "saved": None if self.saved is None else output.saved(self.saved),
            "peak_memory_bytes": mx.get_peak_memory(),
            "seed": self.seed,
        }


__all__ = ["DEFAULT_MAX_TOKENS", "Interrupted", "Session"]
