"""What scripts/bench measures within one process: decoding, restoring, bytes, and positions.

    bench_inside.py PART MODEL PREFIX_FILE RUNS [LENGTHS]

Prints samples as JSON. Every time begins when the device has nothing left to do, and ends when
what it was asked for is there.
"""

from __future__ import annotations

import functools
import gc
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx_lm
from mlx_lm.models import cache as mlx_lm_cache

from mlx_promptcache import PromptCache, Runner, Sampling
from mlx_promptcache.layers import live_arrays
from mlx_promptcache.store import BLOCKS, Store
from mlx_promptcache.timing import Arm, median, take_turns

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mlx_promptcache import State

DECODED = 64
STEPS = 16  # tokens that are timed at each position
IN_BFLOAT16 = 512  # tokens, fewer than the others: a CPU takes long

Json = dict[str, Any]


class Inside:
    """A model that this program and mlx-lm share, and a prompt."""

    def __init__(self, model: str, text: str) -> None:
        loaded = mlx_lm.load(model)
        self.model, self.tokenizer = loaded[0], loaded[1]
        self.runner = Runner(self.model, self.tokenizer)
        self.tokens: list[int] = self.tokenizer.encode(text)

    def decoding(self, runs: int) -> Json:
        """Tokens a second after the same prompt, from the second token on: the first one comes
        before its forward call here, and after it there.
        """
        state = self.runner.prefill(self.tokens)
        assert state.logits is not None
        first = int(mx.argmax(state.logits).item())  # type: ignore[arg-type]

        def ours(_: int) -> float:
            run = self.runner.resume(state, Sampling())
            return tokens_a_second(run.steps(DECODED))

        def theirs(_: int) -> float:
            return tokens_a_second(
                mlx_lm.stream_generate(
                    self.model, self.tokenizer, [first], max_tokens=DECODED,
                    prompt_cache=state.layers(self.model),
                )
            )  # fmt: skip

        return {"decoding": turns({"mlx-promptcache": ours, "mlx-lm": theirs}, runs)}

    def restoring(self, runs: int) -> Json:
        """Seconds from files, which the system has in memory, to arrays; and bytes."""
        state = self.runner.prefill(self.tokens)
        with tempfile.TemporaryDirectory() as scratch:
            store, file = Path(scratch) / "store", f"{scratch}/prompt_cache.safetensors"
            cache = PromptCache(store, "bench")
            cache.save("prefix", state)
            mlx_lm_cache.save_prompt_cache(file, state.layers(self.model))

            def ours(_: int) -> float:
                began = begin()
                resumed = cache.resume(state.tokens, self.model)
                assert isinstance(resumed.layers, list)
                mx.eval(live_arrays(resumed.layers))
                assert resumed.match.position == state.n_past
                return time.perf_counter() - began

            def theirs(_: int) -> float:
                began = begin()
                layers = mlx_lm_cache.load_prompt_cache(file)
                mx.eval(live_arrays(layers))
                assert layers[0].offset == state.n_past
                return time.perf_counter() - began

            seconds = turns({"mlx-promptcache": ours, "mlx-lm": theirs}, runs)
            return {"restoring": seconds, "stored": [stored(store, state)]}

    def bfloat16(self, _: int) -> Json:
        """Bytes of rows in bfloat16."""
        self.model.set_dtype(mx.bfloat16)
        runner = Runner(self.model, self.tokenizer)
        state = runner.prefill(self.tokens[:IN_BFLOAT16])
        with tempfile.TemporaryDirectory() as scratch:
            PromptCache(scratch, "bench").save("prefix", state)
            return {"stored": [stored(Path(scratch), state)]}

    def positions(self, runs: int, lengths: list[int]) -> Json:
        """Seconds for one token at a position: with the K/V of all tokens before it, and without,
        when all of them go through the model again.
        """
        runner = Runner(self.model)  # without a tokenizer no token ends the answer
        tokens = self.tokens * (max(lengths) // len(self.tokens) + 1)

        def at(length: int) -> tuple[float, float]:
            begin()
            run = runner.start(tokens[:length], sampling=Sampling())
            times = times_of(run.steps(STEPS + 2))[1:]
            gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
            return median(gaps), run.prefill_seconds

        at(min(lengths))  # what is made once is made now
        arms = {str(n): Arm(functools.partial(lambda n, _: at(n), n), runs) for n in lengths}
        taken = take_turns(arms, told)
        rows = []
        for length in lengths:
            kept, again = zip(*taken[str(length)], strict=True)
            rows.append({"tokens": length, "with": rounded(kept), "without": rounded(again)})
        return {"positions": rows}


def begin() -> float:
    """Clear away what is not used any more, wait for the device, and start the clock."""
    gc.collect()
    mx.clear_cache()
    mx.synchronize()
    return time.perf_counter()


def tokens_a_second(steps: Iterable[Any]) -> float:
    """How fast tokens come, from the second one on."""
    times = times_of(steps)
    return (len(times) - 2) / (times[-1] - times[1])


def times_of(steps: Iterable[Any]) -> list[float]:
    """When each token came."""
    begin()
    times = [time.perf_counter() for _ in steps]
    if len(times) < 3:
        sys.exit("the answer has too few tokens to be timed: choose another prompt")
    return times


def turns(arms: dict[str, Any], runs: int) -> dict[str, list[float]]:
    """Samples of arms that took turns; the first round, in which things are made once, is not
    among them.
    """
    taken = take_turns({name: Arm(run, runs + 1) for name, run in arms.items()}, told)
    return {name: rounded(samples[1:]) for name, samples in taken.items()}


def rounded(samples: Iterable[float]) -> list[float]:
    """With as many digits as mean something."""
    return [float(f"{sample:.5g}") for sample in samples]


def stored(directory: Path, state: State) -> Json:
    """Bytes of the block files, headers included, and of the rows that they hold."""
    store = Store(directory)
    stems = store.stems(BLOCKS)
    return {
        "dtype": str(next(iter(state.contents[0].rows.values())).dtype).rpartition(".")[2],
        "tokens": state.n_past,
        "stored_bytes": sum(store.size(BLOCKS, stem) for stem in stems),
        "raw_bytes": sum(store.header(BLOCKS, stem).raw_bytes for stem in stems),
    }


def told(line: str) -> None:
    """Tell how far it is."""
    print(line, file=sys.stderr)


def main() -> None:
    """Do as the command line says."""
    part, model, prefix, runs, *lengths = sys.argv[1:]
    inside = Inside(model, Path(prefix).read_text("utf-8"))
    more = [[int(n) for n in lengths[0].split(",")]] if lengths else []
    print(json.dumps(getattr(inside, part)(int(runs), *more)))


if __name__ == "__main__":
    main()
