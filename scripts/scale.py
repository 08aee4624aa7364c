"""Measure how the store does at scale; called by scripts/scale.

The stores are made without a model: states of 30 narrow layers, whose headers are as long as those
of the real model. One state is saved, and the files of all others are those of the first with other
tokens. Only the memory of a restore is measured with the real model, in a process of its own.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_promptcache import PromptCache, Runner, State, container
from mlx_promptcache.layers import Layer, leaves
from mlx_promptcache.passes import Pass
from mlx_promptcache.state import Trail
from mlx_promptcache.store import BLOCKS, SNAPSHOTS, Store
from mlx_promptcache.tree import BlockName, Keys, SnapshotName, cell_start, shard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from mlx_promptcache.container import Array, Header

MODEL = "a model of the benchmark"
LAYERS = 30
VOCABULARY = 49_152
PREFIX, QUESTION, UNRELATED, LONG = 600, 12, 40, 4096  # tokens
TURNS, TURN = 50, 14
RESTORED = 2000

Row = tuple[str, str]


def random_tokens(count: int, seed: int) -> list[int]:
    """Tokens that look like nothing else; the same for the same seed."""
    draw = random.Random(seed)
    return [draw.randrange(VOCABULARY) for _ in range(count)]


# Stores


def state_of(tokens: Sequence[int]) -> State:
    """A state of these tokens, whose rows say nothing."""
    rows = mx.zeros((1, 1, len(tokens), 2), mx.bfloat16)
    return State(
        tokens=tuple(tokens),
        contents=tuple(Layer(str(i), "", {"keys": rows, "values": rows}) for i in range(LAYERS)),
        logits=mx.zeros(64),
        embedding=mx.zeros(64),
        rng=mx.random.key(1),
        lineage="none",
        trail=Trail((), (Pass(0, len(tokens), "none"),), 0.01),
    )


class Template:
    """The last block and the snapshot of a stored state, to be written again for other tokens."""

    def __init__(self, cache: PromptCache, tokens: Sequence[int]) -> None:
        self._store, self._root = Store(cache.directory), cache.fingerprint.digest
        keys, n = Keys(self._root, tokens), len(tokens)
        cell_key = keys[cell_start(n)]
        name = f"{shard(cell_key)}/{cell_key}-{n - cell_start(n)}-{keys[n]}-"
        (stem,) = self._store.beginning(SNAPSHOTS, name)
        self._snapshot = self._read(SNAPSHOTS, stem)
        self._block = self._read(BLOCKS, self._snapshot[0].content["refs"][-1][0])

    def _read(self, kind: str, stem: str) -> tuple[Header, dict[str, Array]]:
        with self._store.reader(kind, stem) as reader:
            header = reader.header()
            entries = header.entries.items()
            return header, {name: container.read_array(reader.read, e) for name, e in entries}

    def block(self, tokens: Sequence[int]) -> list[Any]:
        """Write the block that ends these tokens, and return the reference to it."""
        header, arrays = self._block
        keys, start, n = Keys(self._root, tokens), header.content["start"], len(tokens)
        said = {"start_key": keys[start], "end_key": keys[n], "tokens": list(tokens[start:])}
        packed = container.pack("block", header.content | said, header.notes, arrays)
        name = BlockName(shard(keys[cell_start(start)]), keys[start], tokens[start], keys[n])
        self._store.write(BLOCKS, str(name), packed)
        return [str(name), packed.digest, start, n - start]

    def state(self, tokens: Sequence[int]) -> None:
        """Write the block and the snapshot of these tokens."""
        header, arrays = self._snapshot
        keys, n = Keys(self._root, tokens), len(tokens)
        refs = [*header.content["refs"][:-1], self.block(tokens)]
        said = {"cell_key": keys[cell_start(n)], "key": keys[n], "refs": refs}
        packed = container.pack("snapshot", header.content | said, header.notes, arrays)
        offset, identity = n - cell_start(n), packed.digest[:16]
        name = SnapshotName(keys[cell_start(n)], offset, keys[n], identity)
        self._store.write(SNAPSHOTS, str(name), packed)


def questions(count: int) -> list[list[int]]:
    """Prompts that all leave one prefix at the same position."""
    prefix = random_tokens(PREFIX, seed=1)
    return [prefix + random_tokens(QUESTION, seed=100 + i) for i in range(count)]


def unrelated(count: int) -> list[list[int]]:
    """Prompts that share nothing."""
    return [random_tokens(UNRELATED, seed=100 + i) for i in range(count)]


def filled(
    directory: Path, prompts: Sequence[Sequence[int]], *, blocks_only: bool = False
) -> PromptCache:
    """A store of these prompts; of all but the first one the blocks alone, if that is wanted."""
    cache = PromptCache(directory, MODEL)
    if len(prompts[0]) > PREFIX:
        cache.keep(state_of(prompts[0][:PREFIX]))
    cache.keep(state_of(prompts[0]))
    template = Template(cache, prompts[0])
    for tokens in prompts[1:]:
        if blocks_only:
            template.block(tokens)
        else:
            template.state(tokens)
    return cache


# Figures


def seconds_of(what: Callable[[], object], runs: int) -> list[float]:
    """How long something takes, each time."""
    taken = []
    for _ in range(runs):
        began = time.perf_counter()
        what()
        taken.append(time.perf_counter() - began)
    return taken


def told(taken: Sequence[float], unit: str = "s") -> str:
    """The least and the median of times."""
    factor = {"s": 1, "ms": 1000}[unit]
    least, median = min(taken) * factor, statistics.median(taken) * factor
    return f"{least:8.2f} {unit} least {median:8.2f} {unit} median"


def processes(store: Path, arguments: Sequence[str], runs: int) -> str:
    """How long a command takes in processes of its own, and how long the processors work at it."""
    command = [sys.executable, "-m", "mlx_promptcache", *arguments, "--cache-dir", str(store)]
    run = functools.partial(subprocess.run, command, stdout=subprocess.DEVNULL, check=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    taken = seconds_of(run, runs)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    work = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return f"{told(taken)} {work / runs:8.2f} s of work"


def lists(base: Path, states: int, runs: int) -> Iterable[Row]:
    """Whole processes that list a store, and that look at one state of it."""
    for what, prompts in (("questions", questions(states)), ("unrelated", unrelated(states))):
        store = base / what
        filled(store, prompts)
        identity = Store(store).stems(SNAPSHOTS)[0].rpartition("-")[2]
        time.sleep(2.1)  # what was written a moment ago is not remembered
        yield f"{states:,} {what}: first list", processes(store, ["list"], 1)
        for arguments in (
            ["list"],
            ["list", "--json"],
            ["show", identity],
            ["clear", identity, "--dry-run"],
        ):
            label = " ".join(arguments).replace(identity, "ID")
            yield f"{states:,} {what}: {label}", processes(store, arguments, runs)


def look_ups(base: Path, blocks: int, runs: int) -> Iterable[Row]:
    """Look-ups of a long prompt alone, and among many."""
    prefix = random_tokens(PREFIX, seed=1)
    for what, make, start in (("unrelated", unrelated, []), ("in one cell", questions, prefix)):
        long = [*start, *random_tokens(LONG - len(start), seed=7)]
        other, new = long[:-20] + [0] * 20, [*start, *random_tokens(LONG, seed=8)]
        for others in (1, blocks):
            cache = filled(base / f"{what} {others}", make(others), blocks_only=True)
            cache.keep(state_of(long))
            look = PromptCache(cache.directory, MODEL, read_only=True)
            for ending, tokens in (("whole", long), ("20 differ", other), ("new", new)):
                taken = seconds_of(functools.partial(look.match, tokens), 10 * runs)
                yield f"{LONG:,} tokens, {ending}, {others:,} blocks {what}", told(taken, "ms")


def conversation(base: Path) -> Iterable[Row]:
    """What each turn of a growing conversation writes."""
    cache = PromptCache(base / "conversation", MODEL)
    tokens = random_tokens(TURNS * TURN, seed=1)
    written = []
    for turn in range(1, TURNS + 1):
        saved = cache.keep(state_of(tokens[: turn * TURN]))
        written.append((saved.bytes_written, saved.blocks_written))
    store = Store(cache.directory)
    rows = sum(len(store.header(BLOCKS, s).content["tokens"]) for s in store.stems(BLOCKS))
    for turn in (1, TURNS // 2, TURNS):
        size, blocks = written[turn - 1]
        yield f"turn {turn} of {TURN} tokens", f"{size:,} bytes written, {blocks} blocks"
    yield f"all {TURNS} turns", f"{rows} rows stored of {len(tokens)} tokens"


def memory(base: Path, model: str) -> Iterable[Row]:
    """What a restore takes in memory beside the model, against the state."""
    for part in ("save", "restore"):
        command = [sys.executable, __file__, "--model", model, "--part", part]
        command += ["--store", str(base / "memory")]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    figures = json.loads(done.stdout)
    size = figures.pop("state")
    yield f"state of {RESTORED:,} tokens", f"{size / 1e6:.1f} MB"
    for name, value in figures.items():
        yield name, f"{value / 1e6:.1f} MB, {value / size:.2f} times the state"


def part(model: str, store: str, which: str) -> None:
    """One process of `memory`."""
    runner = Runner.load(model, cache_dir=store)
    assert runner.cache is not None
    tokens = [1 + i * i % 40_000 for i in range(RESTORED)]
    if which == "save":
        runner.cache.keep(runner.prefill(tokens))
        return
    mx.eval(runner.model.parameters())
    before, active = process_bytes("VmRSS"), mx.get_active_memory()
    if before:
        Path("/proc/self/clear_refs").write_text("5", "ascii")  # the peak begins anew
    mx.reset_peak_memory()
    resumed = runner.cache.resume(tokens, runner.model)
    assert resumed.match.exact
    assert isinstance(resumed.layers, list)
    found = leaves(resumed.layers)
    size = sum(a[:, :, :RESTORED].nbytes for _, x in found for a in (x.keys, x.values))
    peak = {"peak of the process": process_bytes("VmHWM") - before} if before else {}
    print(json.dumps({"state": size, **peak, "peak of MLX": mx.get_peak_memory() - active}))


def process_bytes(name: str) -> int:
    """A line of /proc/self/status; 0 where there is none."""
    try:
        lines = Path("/proc/self/status").read_text("ascii").splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def main() -> int:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(prog="scripts/scale", description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--states", type=int, default=10_000, help="(default 10,000)")
    parser.add_argument("--runs", type=int, default=5, help="of each command (default 5)")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--part", choices=["save", "restore"], help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        part(options.model, options.store, options.part)
        return 0
    machine = f"{platform.platform()}, {os.cpu_count()} cores"
    print(f"{machine}; {options.runs} runs of each")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as directory:
        base = Path(directory)
        os.environ["XDG_CACHE_HOME"] = str(base / "cache")  # no memo of the user's is touched
        for table in (
            lists(base, options.states, options.runs),
            look_ups(base, 2 * options.states, options.runs),
            conversation(base),
            memory(base, options.model),
        ):
            for row in table:
                print(f"{row[0]:50} {row[1]}", flush=True)
                rows.append(row)
    if options.json:
        figures = {"machine": machine, **dict(rows)}
        options.json.write_text(json.dumps(figures, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
