"""The main job on the real SmolLM2-135M: what users are promised, by the command line they use."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import pytest

import processes
from conftest import FIGURES, ROOT
from mlx_promptcache import PromptCache, Runner
from mlx_promptcache.store import BLOCKS, SNAPSHOTS, Store

if TYPE_CHECKING:
    from mlx_promptcache.state import State

pytestmark = pytest.mark.real

PREFIX_FILE = ROOT / "examples" / "fewshot" / "prefix.txt"
QUESTIONS = (
    "Sentence: The bread was still warm and the staff sang while they worked.\nSentiment:",
    "Sentence: Nobody answered the phone for three weeks.\nSentiment:",
    "Sentence: The ferry to the island leaves every hour.\nSentiment:",
    "Sentence: My bicycle was stolen again.\nSentiment:",
)
COMMON = ("--ignore-chat-template", "-n", "8", "--temp", "0", "--json")


@dataclass(frozen=True)
class MainJob:
    """The few-shot example, cold and warm, each in a process of its own."""

    store: Path
    cold: dict[str, Any]
    again: dict[str, Any]
    other: dict[str, Any]
    more: list[dict[str, Any]]


@pytest.fixture(scope="module")
def job(
    real_model: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> MainJob:
    store = tmp_path_factory.mktemp("main") / "store"

    def generate(question: str) -> dict[str, Any]:
        model = ("-m", real_model, "--cache-dir", store)
        prompt = ("--prefix-file", PREFIX_FILE, "-p", question)
        return processes.run("generate", *model, *prompt, *COMMON).json

    cold, again, other = (generate(QUESTIONS[i]) for i in (0, 0, 1))
    more = [generate(question) for question in QUESTIONS[2:]]
    warm = [run["load_seconds"] + run["prefill_seconds"] for run in (other, *more)]
    figures = request.config.stash[FIGURES]  # told, not judged: scripts/bench does that
    figures.append(
        f"load + prefill of a prompt of {other['prompt_tokens']} tokens: "
        f"cold {cold['prefill_seconds']:.2f} s, warm {statistics.median(warm):.2f} s "
        f"(1/{cold['prefill_seconds'] / statistics.median(warm):.1f}), "
        f"tokens fed {cold['prefilled_tokens']} and {other['prefilled_tokens']}"
    )
    return MainJob(store, cold, again, other, more)


@pytest.fixture(scope="module")
def runner(real_model: Path) -> Runner:
    return Runner.load(str(real_model), use_cache=False)


def with_store(runner: Runner, directory: Path, **options: Any) -> Runner:
    return Runner(runner.model, runner.tokenizer, PromptCache(directory, "real"), **options)


def tokens_of(runner: Runner, text: str) -> list[int]:
    return [int(t) for t in runner.tokenizer.encode(text)]


def test_a_cold_run_computes_all_and_keeps_it(job: MainJob) -> None:
    assert job.cold["hit"] == "none"
    assert job.cold["miss_reason"]
    assert job.cold["prefilled_tokens"] == job.cold["prompt_tokens"]
    assert 1800 <= job.cold["prompt_tokens"] <= 2200
    assert job.cold["saved"]["blocks_written"] >= 8


def test_the_same_prompt_in_a_new_process_feeds_nothing_and_says_the_same(job: MainJob) -> None:
    assert job.again["hit"] == "exact"
    assert job.again["prefilled_tokens"] == 0
    assert job.again["cached_tokens"] == job.again["prompt_tokens"] == job.cold["prompt_tokens"]
    assert (job.again["text"], job.again["tokens"]) == (job.cold["text"], job.cold["tokens"])
    assert job.again["saved"]["bytes_written"] == 0


def test_another_question_feeds_only_the_question_and_the_seam(
    job: MainJob, runner: Runner
) -> None:
    seam = 2
    assert job.other["hit"] == "prefix"
    assert job.other["prefilled_tokens"] <= len(tokens_of(runner, QUESTIONS[1])) + seam
    cached, fed = job.other["cached_tokens"], job.other["prefilled_tokens"]
    assert cached + fed == job.other["prompt_tokens"]


def test_a_warm_answer_is_the_answer_of_a_run_without_the_cache(
    job: MainJob, runner: Runner
) -> None:
    prompt = PREFIX_FILE.read_text("utf-8") + QUESTIONS[1]
    whole = runner.prefill(prompt)  # one grid, no boundary, nothing reused
    assert whole.logits is not None
    first = int(mx.argmax(whole.logits).item())  # type: ignore[arg-type]
    assert first == job.other["tokens"][0]


def test_the_store_verifies_and_lists_what_was_kept(job: MainJob) -> None:
    report = processes.run("verify", "--cache-dir", job.store, "--json").json
    assert report["damaged"] == []
    listed = processes.run("list", "--cache-dir", job.store, "--json").json
    assert {e["status"] for e in listed["entries"]} == {"ok"}
    assert len(listed["entries"]) == len(QUESTIONS) + 1  # the prompts and the declared prefix


def test_float32_rows_take_at_most_86_percent_of_their_raw_bytes(job: MainJob) -> None:
    assert stored_ratio(Store(job.store)) <= 0.86


def test_bfloat16_rows_take_at_most_70_percent_of_their_raw_bytes(
    real_model: Path, tmp_path: Path
) -> None:
    half = Runner.load(str(real_model), use_cache=False)
    half.model.set_dtype(mx.bfloat16)
    keeping = with_store(half, tmp_path)
    assert keeping.cache is not None
    text = PREFIX_FILE.read_text("utf-8")
    state = keeping.prefill(tokens_of(half, text)[:128])
    assert str(state.contents[0].rows["keys"].dtype) == "mlx.core.bfloat16"
    keeping.cache.save(None, state)
    assert stored_ratio(Store(tmp_path)) <= 0.70


def stored_ratio(store: Store) -> float:
    """Bytes of the block files, headers included, against the rows that they hold in memory."""
    stems = store.stems(BLOCKS)
    raw = sum(store.header(BLOCKS, stem).raw_bytes for stem in stems)
    return sum(store.size(BLOCKS, stem) for stem in stems) / raw


RESUME = """
import json, sys, hashlib
from mlx_promptcache import PromptCache, Runner, Sampling
from mlx_promptcache.arrays import to_array
model, directory, name, n = sys.argv[1:]
runner = Runner.load(model, use_cache=False)
runner = Runner(runner.model, runner.tokenizer, PromptCache(directory, "real"))
state = runner.cache.load(name)
tokens = [step.token for step in runner.generate(state, max_tokens=int(n))]
logits = hashlib.sha256(bytes(to_array(runner.state.logits).data)).hexdigest()
print(json.dumps({"tokens": tokens, "logits": logits, "fed": runner.tokens_fed}))
"""


@pytest.mark.parametrize("way", ["greedy", "sampled"])
def test_n_and_m_tokens_are_the_same_straight_and_over_two_processes(
    way: str, runner: Runner, real_model: Path, tmp_path: Path
) -> None:
    from mlx_promptcache import Sampling

    sampling = {
        "greedy": Sampling(),
        "sampled": Sampling(temp=1.0, top_p=0.9, repetition_penalty=1.1, seed=7),
    }[way]
    n, m = 9, 12
    prompt = tokens_of(runner, PREFIX_FILE.read_text("utf-8"))[:300]
    keeping = with_store(runner, tmp_path)
    assert keeping.cache is not None
    straight = [s.token for s in keeping.generate(prompt, n + m, sampling)]
    end = fingerprint(keeping.state)
    first = [s.token for s in keeping.generate(prompt, n, sampling)]
    keeping.cache.save("half", keeping.state)
    rest = processes.python(RESUME, real_model, tmp_path, "half", str(m))
    assert first + rest["tokens"] == straight
    assert rest["logits"] == end


def fingerprint(state: State) -> str:
    import hashlib

    from mlx_promptcache.arrays import to_array

    assert state.logits is not None
    return hashlib.sha256(bytes(to_array(state.logits).data)).hexdigest()


@pytest.mark.parametrize("declared", [True, False])
def test_exact_runs_give_the_very_logits_of_a_cold_run(
    declared: bool, runner: Runner, tmp_path: Path
) -> None:
    words = tokens_of(runner, PREFIX_FILE.read_text("utf-8"))
    prefix, first, second = words[:600], words[600:640], words[700:760]
    boundaries = (len(prefix),) if declared else ()
    cold = runner.prefill(prefix + second, boundaries, exact=True)
    keeping = with_store(runner, tmp_path)
    assert keeping.cache is not None
    keeping.cache.save(None, keeping.prefill(prefix + first, boundaries, exact=True), exact=True)
    run = keeping.start(prefix + second, boundaries=boundaries, exact=True)
    assert run.cached_tokens == (600 if declared else 512)
    assert fingerprint(run.state()) == fingerprint(cold)
    assert cold.embedding is not None
    warm: Any = run.state().embedding
    assert mx.array_equal(warm, cold.embedding)


def test_without_exact_log_probabilities_agree_to_a_thousandth(
    runner: Runner, tmp_path: Path
) -> None:
    words = tokens_of(runner, PREFIX_FILE.read_text("utf-8"))
    cold = runner.prefill(words[:330])
    keeping = with_store(runner, tmp_path)
    assert keeping.cache is not None
    keeping.cache.save(None, keeping.prefill(words[:301]))
    run = keeping.start(words[:330])
    assert run.cached_tokens == 301
    assert run.state().logits is not None
    assert cold.logits is not None
    warm_logits: Any = run.state().logits
    cold_logits: Any = cold.logits
    warm = warm_logits - mx.logsumexp(warm_logits)
    apart = mx.abs(warm - (cold_logits - mx.logsumexp(cold_logits))).max()
    assert float(str(apart.item())) < 1e-3


def test_a_hundred_prompts_after_one_prefix_store_its_rows_once(
    runner: Runner, tmp_path: Path
) -> None:
    prefix = tokens_of(runner, PREFIX_FILE.read_text("utf-8"))[:600]
    keeping = with_store(runner, tmp_path)
    cache = keeping.cache
    assert cache is not None
    cache.save("prefix", keeping.prefill(prefix), sync=False)
    store = Store(tmp_path)
    before = files_of(tmp_path)
    prefix_bytes = sum(store.size(BLOCKS, stem) for stem in store.stems(BLOCKS))
    row_bytes = store.header(BLOCKS, store.stems(BLOCKS)[0]).raw_bytes // len(
        store.header(BLOCKS, store.stems(BLOCKS)[0]).content["tokens"]
    )
    own_rows = 0
    for i in range(100):
        question = [1000 + i, 2000 + i, 30 + i, 40]
        run = keeping.start(prefix + question)
        assert run.cached_tokens == len(prefix)
        own_rows += run.prefilled_tokens
        cache.save(None, run.state(), sync=False)
    after = files_of(tmp_path)
    assert {path: after[path] for path in before} == before  # nothing was written again
    sizes = [store.size(SNAPSHOTS, stem) for stem in store.stems(SNAPSHOTS)]
    snapshots = sum(sizes)
    assert max(sizes) <= 300_000  # logits are most of it
    blocks = sum(store.size(BLOCKS, stem) for stem in store.stems(BLOCKS))
    assert own_rows == 400
    assert len(sizes) == 101
    assert blocks <= 1.05 * prefix_bytes + own_rows * row_bytes
    assert blocks + snapshots == cache_bytes(tmp_path)


def files_of(directory: Path) -> dict[str, tuple[int, int, int]]:
    """Every container with its inode, mtime and size."""
    return {
        str(path.relative_to(directory)): (
            path.stat().st_ino,
            path.stat().st_mtime_ns,
            path.stat().st_size,
        )
        for path in directory.rglob("*.safetensors")
    }


def cache_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*.safetensors"))


def test_other_weights_under_the_same_path_are_a_miss_with_the_reason(
    real_model: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in real_model.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            (model / path.name).write_bytes(path.read_bytes())
    weights = mx.load(str(real_model / "model.safetensors"))
    assert isinstance(weights, dict)
    mx.save_safetensors(str(model / "model.safetensors"), weights, {"format": "mlx"})
    prompt = ("generate", "-m", model, "-p", "The sea is", "-n", "2", "--temp", "0", "--json")
    assert processes.run(*prompt).json["hit"] == "none"
    assert processes.run(*prompt).json["hit"] == "exact"
    for name, value in weights.items():
        if name.endswith("norm.weight"):
            weights[name] = value * 1.01
    mx.save_safetensors(str(model / "model.safetensors"), weights, {"format": "mlx"})
    answer = processes.run(*prompt).json
    assert answer["hit"] == "none"
    assert "other weights" in answer["miss_reason"]
    listed = processes.run("list", "-m", model, "--json").json["entries"]
    assert {e["status"] for e in listed} == {"ok", "stale"}
    assert json.dumps(listed)
