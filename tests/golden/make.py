"""Write the golden files: a small store, what is in it, and the file that test_container.py reads.

Called by scripts/golden. Time stands still meanwhile, so that the same program on the same machine
writes the same bytes, and a difference is one of the format or of the arithmetic.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import test_container  # noqa: E402
import tiny  # noqa: E402
from mlx_promptcache import KVSettings, PromptCache, Runner, Sampling, arithmetic  # noqa: E402

STORE, EXPECTED = HERE / "store", HERE / "expected.json"
NO_STATE = ("lock", "uses.jsonl")
AFTER = 12
SAMPLED = Sampling(temp=1.0, top_p=0.9, repetition_penalty=1.1, seed=7)


@dataclass(frozen=True)
class Case:
    """A state: a model of `tiny`, how many tokens of which random sequence, and how it is run."""

    name: str
    kind: str
    prompt: int
    generated: int
    seed: int
    boundaries: tuple[int, ...] = ()
    kv: KVSettings = field(default_factory=KVSettings)
    sampling: Sampling = field(default_factory=lambda: Sampling(seed=1))


CASES = [
    Case("rows", "smallest", 300, 9, 1, (100,), sampling=SAMPLED),
    Case("a branch", "smallest", 120, 3, 1),
    Case("two cells", "smallest", 257, 0, 2),
    Case("windows", "rotating", 34, 9, 3, sampling=SAMPLED),
    Case("recurrent", "recurrent", 40, 3, 4, (20,)),
    Case("convolutions", "hybrid", 40, 3, 5, (20,), sampling=SAMPLED),
    Case("lists", "nested", 30, 3, 6),
    Case("8 bits", "plain", 30, 9, 7, (20,), KVSettings(8, 32, 0), SAMPLED),
    Case("4 bits, later", "plain", 20, 9, 8, (), KVSettings(4, 32, 25)),
]


def write(case: Case) -> dict[str, Any]:
    """Save the state of a case, and return what is to be found there."""
    cache = PromptCache(STORE, f"golden {case.kind}", kv=case.kv)
    runner = Runner(getattr(tiny, case.kind)(), None, cache, kv=case.kv)
    vocabulary = 16 if case.kind == "smallest" else tiny.VOCAB
    prompt = tiny.random_tokens(case.prompt, case.seed, vocabulary)
    run = runner.start(prompt, boundaries=case.boundaries, sampling=case.sampling)
    list(run.steps(case.generated))
    state = run.state()
    cache.save(case.name, state, sync=False)
    following = [step.token for step in runner.generate(state, AFTER)]
    return {
        "kind": case.kind,
        "kv": asdict(case.kv),
        "prompt": case.prompt,
        "boundaries": case.boundaries,
        "tokens": state.tokens,
        "logits": hexadecimal(state.logits),
        "embedding": hexadecimal(state.embedding),
        "rng": hexadecimal(state.rng),
        "state": tiny.digest(state),
        "following": following,
        "end": tiny.digest(runner.state),
    }


def hexadecimal(array: Any) -> str:
    """All bytes of an array."""
    return tiny.bits(array)[2].hex()


def one_line_each(members: dict[str, Any]) -> str:
    """A JSON object whose differences can be read."""
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in members.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main() -> int:
    """Write everything anew."""
    shutil.rmtree(STORE, ignore_errors=True)
    still = mock.patch.multiple("time", time=lambda: 1.7e9, perf_counter=lambda: 0.0)
    with still:
        states = {case.name: write(case) for case in CASES}
    for name in NO_STATE:
        (STORE / name).unlink(missing_ok=True)
    EXPECTED.write_text(one_line_each({"arithmetic": arithmetic.lineage(), **states}), "utf-8")
    packed = test_container.golden()
    test_container.GOLDEN.write_bytes(test_container.written(packed))
    files = [path for path in HERE.rglob("*") if path.suffix in {".safetensors", ".json"}]
    print(f"{len(files)} files, {sum(path.stat().st_size for path in files)} bytes")
    if packed.digest != test_container.GOLDEN_DIGEST:
        print(f'tests/test_container.py: GOLDEN_DIGEST = "{packed.digest}"')
    return 0


if __name__ == "__main__":
    sys.exit(main())
