"""One side of a handover of states between two releases of mlx-lm; scripts/releases runs it.

    handover.py model DIR                             write a tiny model for both sides to load
    handover.py fill DIR --answer MINE                run every case to a state with a name
    handover.py read DIR --told THEIRS --answer MINE  read these, judge, and go on

`DIR` holds the store, and the other side's mlx-lm objects as they are in memory (`by-hand/`). These
are put into this side's objects attribute by attribute, with none of the package's code: a second
way to the same state, from which mlx-lm alone must go on with the same bits.

Who reads also saves where it came to, on top of the other side's rows, and tells of it in the same
way: so the other side can read that in turn.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_lm.models import cache as mlx_cache

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import architectures  # noqa: E402
import tiny  # noqa: E402
from mlx_promptcache import KVSettings, PromptCache, Runner, Sampling, arithmetic, places  # noqa: E402
from mlx_promptcache.errors import PromptCacheError  # noqa: E402
from mlx_promptcache.layers import capture, make_layers  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from mlx_promptcache.state import State

    Json = dict[str, Any]

PROMPT, BEFORE, AFTER = 70, 9, 12  # tokens; the prompt is longer than the tiny windows
TEXT = "The cat sat on the mat, and the dog sat on the cat. "
GREEDY = Sampling(seed=1)
SAMPLED = Sampling(temp=1.0, repetition_penalty=1.1, seed=7)
KV8 = KVSettings(8, 32, 0)
NOT_RUN = {
    *architectures.KNOWN_BROKEN,
    "phi3small",  # mlx-lm 0.31 writes beyond the end of its logits
}


@dataclass(frozen=True)
class Case:
    """A model, and how it is run. A `path` is loaded from disk, with its own fingerprint."""

    name: str
    make: Callable[[], Any]
    kv: KVSettings
    sampling: Sampling
    path: Path | None = None

    def runner(self, store: Path) -> Runner:
        """A runner with that store."""
        kv = self.kv
        if self.path is None:
            return Runner(self.make(), None, PromptCache(store, self.name.split(",")[0], kv=kv))
        return Runner.load(
            str(self.path), None, kv.bits, str(store), kv_group_size=kv.group_size,
            quantized_kv_start=kv.quantized_start, max_kv_size=kv.max_size,
        )  # fmt: skip

    def prompt(self, runner: Runner) -> list[int]:
        """The tokens of its prompt."""
        if self.path is None:
            return tiny.random_tokens(PROMPT, seed=len(self.name))
        tokens: list[int] = runner.tokenizer.encode(TEXT * 12)
        return tokens[:PROMPT]


def cases(directory: Path, *, every: bool) -> Iterator[Case]:
    """What is run; with `every` also a tiny model of each architecture."""
    for kind, make in tiny.KINDS.items():
        yield Case(kind, make, KVSettings(), SAMPLED)
    for kind in ("plain", "hybrid"):
        yield Case(f"{kind}, 8 bits", tiny.KINDS[kind], KV8, SAMPLED)
    yield Case("plain, 4 bits later", tiny.plain, KVSettings(4, 32, PROMPT + BEFORE + 4), GREEDY)
    yield Case("bare, 24 tokens kept", tiny.bare, KVSettings(max_size=24), SAMPLED)
    yield Case("on disk", tiny.plain, KVSettings(), SAMPLED, directory.parent / "model")
    demo = places.demo_model()
    if demo is not None:
        yield Case("SmolLM2", tiny.plain, KVSettings(), GREEDY, demo)
        yield Case("SmolLM2, 8 bits", tiny.plain, KVSettings(8, 64, 0), GREEDY, demo)
    if every:
        for name in architectures.modules():
            if name in architectures.CONFIGS and name not in NOT_RUN:
                yield Case(f"module {name}", _building(name), KVSettings(), SAMPLED)


def _building(name: str) -> Callable[[], Any]:
    return lambda: architectures.build(name)


# Going on


def went_on(runner: Runner, state: State) -> Json:
    """What the next tokens are, the logits after each of them, and the state at the end.

    The runner is left there.
    """
    tokens, logits = [], []
    for step in runner.generate(state, AFTER):
        tokens.append(step.token)
        logits.append(tiny.digest(runner.state.logits))
    return {"tokens": tokens, "logits": logits, "end": tiny.digest(runner.state)}


def fed(model: Any, kv: KVSettings, layers: list[Any], tokens: Sequence[int]) -> Iterator[mx.array]:
    """The logits after each of these tokens, from mlx-lm alone."""
    for token in tokens:
        logits = model(mx.array([[token]]), cache=layers)[0, -1]
        maybe_quantize_kv_cache(layers, kv.quantized_start, kv.group_size, kv.bits)
        mx.eval(logits)
        yield logits


# Objects by hand


def written_by_hand(layers: Sequence[Any], path: Path) -> None:
    """Write mlx-lm objects as they are in memory, every attribute."""
    arrays: dict[str, mx.array] = {"none": mx.zeros(1)}

    def plain(value: Any) -> Any:
        if isinstance(value, mx.array):
            arrays[str(len(arrays))] = value
            return {"array": str(len(arrays) - 1)}
        if isinstance(value, (list, tuple)):
            return {type(value).__name__: [plain(item) for item in value]}
        if hasattr(value, "__dict__"):
            return {"class": type(value).__name__, "vars": plain(list(vars(value).items()))}
        return value

    told = plain(list(layers))
    path.parent.mkdir(exist_ok=True)
    mx.save_safetensors(str(path), arrays, {"layers": json.dumps(told)})


def read_by_hand(path: Path) -> list[Any]:
    """Objects of the mlx-lm that runs here, with the attributes that were written."""
    loaded: Any = mx.load(str(path), return_metadata=True)
    arrays, metadata = loaded

    def built(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if "array" in value:
            return arrays[value["array"]]
        if "class" in value:
            made = object.__new__(getattr(mlx_cache, value["class"]))
            made.__dict__.update(built(value["vars"]))
            return made
        (kind, items), *_ = value.items()
        return (tuple if kind == "tuple" else list)(built(item) for item in items)

    layers: list[Any] = built(json.loads(metadata["layers"]))
    return layers


# The two sides


def fill(directory: Path, *, every: bool) -> list[Json]:
    """Run every case up to a state, save it, and tell how this release goes on from it."""
    told: list[Json] = []
    for number, case in enumerate(cases(directory, every=every)):
        runner = case.runner(directory / "store")
        if runner.cache is None:
            told.append({"case": case.name, "no cache": runner.why_not_kept})
            continue
        prompt = case.prompt(runner)
        list(runner.start(prompt, reuse=False, sampling=case.sampling).steps(BEFORE))
        told.append(
            {
                "case": case.name,
                "prompt": prompt,
                "versions": arithmetic.versions(),
                "fingerprint": runner.fingerprint,
                **_kept(directory, runner, f"case {number}"),
            }
        )
    return told


def _kept(directory: Path, runner: Runner, name: str) -> Json:
    """Save the state that the runner is at, in both ways, and tell how it goes on."""
    assert runner.cache is not None
    run = runner.run_in_progress
    assert run is not None
    state = run.state()
    written_by_hand(run._layers, directory / "by-hand" / f"{name}.safetensors")
    runner.cache.save(name, state, sync=False)
    return {
        "name": name,
        "tokens": list(state.tokens),
        "state": tiny.digest(state),
        "on": went_on(runner, state),
    }


def read(directory: Path, told: Sequence[Json], *, every: bool) -> list[Json]:
    """Judge what the other side told of; each case with what this side wrote on top."""
    here = {case.name: case for case in cases(directory, every=every)}
    answers: list[Json] = []
    for theirs in told:
        name = theirs["case"]
        answer: Json = {"case": name}
        if name not in here:
            answer["no cache"] = "this release has no such architecture"
        elif "name" not in theirs:
            answer["no cache"] = theirs.get("no cache", "the other side could not read it")
        else:
            runner = here[name].runner(directory / "store")
            if runner.cache is None:
                answer["no cache"] = runner.why_not_kept
            else:
                answer |= _read(directory, here[name], theirs, runner)
        answers.append(answer)
    return answers


def _read(directory: Path, case: Case, theirs: Json, runner: Runner) -> Json:
    assert runner.cache is not None
    try:
        state = runner.cache.load(theirs["name"])
    except PromptCacheError as exc:
        return {"wrong": [f"refused: {exc}"]}
    contents = capture(state.layers(runner.model), state.n_past)
    on = went_on(runner, state)
    mine = _kept(directory, runner, f"{theirs['name']}, gone on")
    checks = {
        "fingerprint": runner.fingerprint == theirs["fingerprint"],
        "read": tiny.digest(state) == theirs["state"],
        "held": tiny.digest(replace(state, contents=contents)) == theirs["state"],
        "by hand": _by_hand(directory, case, theirs, runner, on["tokens"]) == on["logits"],
        "again": _again(directory, case, runner, state) == on,
        "prompts": _prompts_begin_there(case, theirs, runner),
        "exact": _exact_does_not(case, theirs, runner),
        "verify": not runner.cache.verify([theirs["name"], mine["name"]]).damaged,
    }
    return {
        **{name: theirs[name] for name in ("prompt", "versions", "fingerprint")},
        **mine,
        "wrong": [name for name, fine in checks.items() if not fine],
        "bits": on == theirs["on"],
        "equal tokens": on["tokens"] == theirs["on"]["tokens"],
        "difference": _difference(case, theirs, runner, state),
    }


def _by_hand(
    directory: Path, case: Case, theirs: Json, runner: Runner, tokens: Sequence[int]
) -> list[str]:
    """The logits after these tokens, from objects that were filled by hand, and mlx-lm alone."""
    layers = read_by_hand(directory / "by-hand" / f"{theirs['name']}.safetensors")
    return [tiny.digest(logits) for logits in fed(runner.model, case.kv, layers, tokens)]


def _again(directory: Path, case: Case, runner: Runner, state: State) -> Json:
    """How this side goes on from the same state when it has written and read it itself."""
    assert runner.cache is not None
    own = PromptCache(directory / "own", runner.cache.fingerprint, kv=case.kv)
    own.save(case.name, state, replace=True, sync=False)
    return went_on(runner, own.load(case.name))


def _prompts_begin_there(case: Case, theirs: Json, runner: Runner) -> bool:
    """Whether a prompt, and a longer one, begin where the other side stopped.

    With `--max-kv-size` what is computed depends on where passes are cut, so that such models are
    reused as with `--exact`: the prompt by the release that computed it, and a longer one, which
    a cold run computes in one pass, by none.
    """
    prompt, tokens = theirs["prompt"], theirs["tokens"]
    begun, longer = len(prompt), len(tokens)
    if case.kv.max_size is not None:
        begun, longer = begun if theirs["versions"] == arithmetic.versions() else 0, 0
    whole = runner.start(prompt).cached_tokens == begun
    return whole and runner.start([*tokens, 1, 2]).cached_tokens == longer


def _exact_does_not(case: Case, theirs: Json, runner: Runner) -> bool:
    """Whether `--exact` takes its own rows alone, which passes of the same width computed.

    It has the bits of a run without a cache; and that it adds its rows changes no other state.
    """
    assert runner.cache is not None
    prompt = theirs["prompt"]
    cold = Runner(runner.model, None, None, kv=case.kv).start(prompt).state()
    run = runner.start(prompt, exact=True)
    own = len(prompt) if theirs["versions"] == arithmetic.versions() else 0
    fine = run.cached_tokens == own and _logits(run.state()) == _logits(cold)
    runner.cache.keep(run.state(), exact=True)
    warm = runner.start(prompt, exact=True)
    fine = fine and warm.cached_tokens == len(prompt) and _logits(warm.state()) == _logits(cold)
    return fine and tiny.digest(runner.cache.load(theirs["name"])) == theirs["state"]


def _logits(state: State) -> str:
    return tiny.digest(state.logits)


def _difference(case: Case, theirs: Json, runner: Runner, state: State) -> float:
    """How far the stored log-probabilities are from those that this side computes alone, in the
    same passes.
    """
    layers = make_layers(runner.model, case.kv)
    prompt = theirs["prompt"]
    rest = theirs["tokens"][len(prompt) :]
    runner.model(mx.array(prompt)[None], cache=layers)
    maybe_quantize_kv_cache(layers, case.kv.quantized_start, case.kv.group_size, case.kv.bits)
    *_, mine = fed(runner.model, case.kv, layers, rest)
    assert state.logits is not None
    difference = mx.abs(_logprobs(mine) - _logprobs(state.logits))
    return float(mx.max(difference).item())  # type: ignore[arg-type]


def _logprobs(logits: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits)


def _draws() -> str:
    """Which tokens this MLX draws where all are as likely, with one key."""
    return tiny.digest(mx.random.categorical(mx.zeros((1, tiny.VOCAB)), key=mx.random.key(1)))


def main() -> int:
    """Play one side."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["model", "fill", "read"])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--told", type=Path, help="what the other side told")
    parser.add_argument("--answer", type=Path, help="where to tell the other side")
    parser.add_argument("--architectures", action="store_true")
    options = parser.parse_args()
    if options.part == "model":
        tiny.on_disk(options.directory / "model")
        return 0
    if options.part == "fill":
        cases_told = fill(options.directory, every=options.architectures)
    else:
        told = json.loads(options.told.read_text("utf-8"))["cases"]
        cases_told = read(options.directory, told, every=options.architectures)
    answer = {"versions": arithmetic.versions(), "draws": _draws(), "cases": cases_told}
    options.answer.write_text(json.dumps(answer), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
