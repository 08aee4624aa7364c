"""Cache classes that a model defines for itself: gone on from bit for bit, or not kept, and told.

The model below has a `CacheList` two deep, and a cache of its own with every kind of attribute that
can be taken down. What it computes depends on each of them.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import pytest
from mlx.nn.layers.base import Module
from mlx.nn.layers.embedding import Embedding
from mlx.nn.layers.linear import Linear
from mlx_lm.models import llama
from mlx_lm.models.base import create_attention_mask, scaled_dot_product_attention
from mlx_lm.models.cache import CacheList, KVCache, RotatingKVCache

import processes
import tiny
from mlx_promptcache import KVSettings, PromptCache, Runner, Sampling
from mlx_promptcache.errors import UnsupportedLayer
from mlx_promptcache.layers import capture
from test_cli import Program, one_line
from tiny import digest, random_tokens

if TYPE_CHECKING:
    from collections.abc import Callable

    from mlx_promptcache import State

HIDDEN, HEADS, WINDOW = 32, 2, 8
PROMPT, AFTER = 40, 12
GREEDY = Sampling(seed=1)
SAMPLED = Sampling(temp=1.0, top_p=0.9, repetition_penalty=1.1, seed=7)


class Memory:
    """A cache with arrays, nested lists, tuples, None, numbers and text, which all change."""

    def __init__(self) -> None:
        self.offset = 0
        self.total: Any = 0  # a number, until there is an array
        self.last: Any = None
        self.seen: list[Any] = []
        self.nest: list[Any] = [None, [None, 0.0]]
        self.pair: tuple[int, Any] = (0, None)
        self.label = "empty"
        self.filled = False
        self.never = None

    def __call__(self, x: mx.array) -> mx.array:
        """What the attributes make of `x`, `[1, tokens, hidden]`; and they take it in."""
        said = x + 0.1 * (self.total + mx.cumsum(x, axis=1)) + self._held(x)
        said = mx.array(mx.fast.rms_norm(said, None, 1e-5))
        self.total = self.total + mx.sum(x, axis=1, keepdims=True)
        self.offset += x.shape[1]
        self.nest = [self.last, [x[:, :1], self.nest[1][1] + 0.5]]
        self.pair = (self.offset % 7, x[:, -1:] * 2)
        self.last = x[:, -1:]
        self.seen = [*self.seen, self.last][-3:]
        self.label = f"{self.offset} tokens"
        self.filled = True
        return said

    def _held(self, x: mx.array) -> mx.array:
        arrays = [self.last, *self.seen, self.nest[0], self.nest[1][0], self.pair[1]]
        held = [array for array in arrays if array is not None]
        numbers = self.nest[1][1] + self.pair[0] + len(self.label) + self.filled
        return mx.add(sum(held, mx.zeros_like(x[:, :1])) * 0.1, numbers * 0.01)


class Attention(Module):
    """Attention over what a `KVCache` or a window holds."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.qkv = Linear(HIDDEN, 3 * HIDDEN, bias=False)

    def __call__(self, x: mx.array, cache: Any, window: int | None) -> mx.array:
        length = x.shape[1]
        parts = mx.split(self.qkv(x), 3, axis=-1)
        heads = [p.reshape(1, length, HEADS, -1).transpose(0, 2, 1, 3) for p in parts]
        mask = create_attention_mask(x, cache, window_size=window)
        keys, values = cache.update_and_fetch(heads[1], heads[2])
        out = scaled_dot_product_attention(
            heads[0], keys, values, cache=cache, scale=0.3, mask=mask
        )
        return mx.reshape(out.transpose(0, 2, 1, 3), (1, length, HIDDEN))


class Trunk(Module):
    """All but the head."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.embed = Embedding(tiny.VOCAB, HIDDEN)
        self.whole, self.near = Attention(), Attention()

    def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        (full, (window, deep)), memory = cache[0], cache[1]
        x = self.embed(tokens)
        x = x + self.whole(x, full, None)
        x = x + self.near(x, window, WINDOW)
        out: mx.array = memory(deep(x))
        return out


class Model(Module):
    """A model whose layers are `[CacheList(KVCache, CacheList(window, Memory)), Memory]`."""

    def __init__(self, make: Callable[[], Any] = Memory) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trunk = Trunk()
        self.head = Linear(HIDDEN, tiny.VOCAB, bias=False)
        self._make = make

    def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        out: mx.array = self.head(self.trunk(tokens, cache))
        return out

    def make_cache(self) -> list[Any]:
        inner = CacheList(RotatingKVCache(WINDOW), self._make())
        return [CacheList(KVCache(), inner), self._make()]


@functools.cache
def weights() -> Any:
    return tiny.with_weights(Model()).parameters()


def model_of(make: Callable[[], Any] = Memory) -> Any:
    model = tiny.uneven(Model(make))
    model.update(weights())
    return model


def runner_of(directory: Path | None, make: Callable[[], Any] = Memory) -> Runner:
    cache = None if directory is None else PromptCache(directory, "own")
    return Runner(model_of(make), None, cache)


def cache_of(runner: Runner) -> PromptCache:
    assert runner.cache is not None
    return runner.cache


# What can be kept

CASES = {
    f"{name}, {before} before": (sampling, before)
    for name, sampling in (("greedy", GREEDY), ("sampled", SAMPLED))
    for before in (0, 1, 9)
}
CHILD = """
import json, sys
sys.path.insert(0, sys.argv[1])
import test_own_caches
print(json.dumps(test_own_caches.resumed_in_this_process(sys.argv[2])))
"""


def went_on(runner: Runner, state: State, count: int = AFTER) -> list[Any]:
    """Each next token, and the state after it."""
    return [[step.token, digest(runner.state)] for step in runner.generate(state, count)]


def resumed_in_this_process(directory: str) -> dict[str, Any]:
    """Go on from every saved state; run in a process that has computed nothing before."""
    answers = {}
    for name in CASES:
        runner = runner_of(Path(directory))
        answers[name] = went_on(runner, cache_of(runner).load(name))
    return answers


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """By case: how one run without a stop went on, and how another process did after a stop."""
    directory = tmp_path_factory.mktemp("own") / "store"
    straight = {}
    prompt = random_tokens(PROMPT, seed=1)
    for name, (sampling, before) in CASES.items():
        runner = runner_of(directory)
        list(runner.start(prompt, reuse=False, sampling=sampling).steps(before))
        cache_of(runner).save(name, runner.state, sync=False)
        whole = runner_of(None)
        straight[name] = [
            [step.token, digest(whole.state)]
            for step in whole.generate(prompt, before + AFTER, sampling)
        ][before:]
    return straight, processes.python(CHILD, str(Path(__file__).parent), directory)


@pytest.mark.parametrize("name", CASES)
def test_a_new_process_goes_on_bit_for_bit(
    resumed: tuple[dict[str, Any], dict[str, Any]], name: str
) -> None:
    straight, answers = resumed
    assert answers[name] == straight[name]
    assert len({token for token, _ in straight[name]}) > 1


def test_nests_are_told_by_their_path() -> None:
    state = runner_of(None).prefill(random_tokens(PROMPT, seed=1))
    kinds = {layer.path: layer.kind for layer in state.contents}
    assert kinds == {"0.0": "KVCache", "0.1.0": "RotatingKVCache", "0.1.1": "Memory", "1": "Memory"}


@pytest.mark.parametrize("path", ["0.1.1", "1"])
@pytest.mark.parametrize("name", sorted(vars(Memory()).keys() - {"never"}))
def test_no_attribute_could_be_left_out(name: str, path: str) -> None:
    """If one could, the tests above would not show that it is kept."""
    runner = runner_of(None)
    state = runner.prefill(random_tokens(PROMPT, seed=1))
    (empty,) = capture([Memory()], 0)
    assert empty.attributes is not None
    contents = []
    for layer in state.contents:
        if layer.path == path:
            assert layer.attributes is not None
            assert layer.attributes[name] != empty.attributes[name]
            attributes = {**layer.attributes, name: empty.attributes[name]}
            layer = layer._replace(attributes=attributes)
        contents.append(layer)
    lacking = replace(state, contents=tuple(contents))
    assert logits_on(runner, lacking) != logits_on(runner, state)


def logits_on(runner: Runner, state: State) -> list[str]:
    return [digest(runner.state.logits) for _ in runner.generate(state, 3, GREEDY)]


def test_prompts_begin_where_such_layers_were_kept(tmp_path: Path) -> None:
    prompt, other = random_tokens(PROMPT, seed=1), random_tokens(9, seed=2)
    runner = runner_of(tmp_path)
    cache_of(runner).keep(runner.prefill(prompt, boundaries=(20,)))
    for tokens, cached in ((prompt, 40), ([*prompt[:20], *other], 20), ([*prompt, *other], 40)):
        boundaries = (20,) if cached == 20 else (20, 40)
        cold = runner_of(None).prefill(tokens, boundaries)
        for exact in (False, True):
            run = runner_of(tmp_path).start(tokens, boundaries=boundaries, exact=exact)
            assert run.cached_tokens == (cached if not exact or cached == 20 else min(cached, 40))
            assert digest(run.state().logits) == digest(cold.logits)


# What cannot


class WithDict(Memory):
    def __init__(self) -> None:
        super().__init__()
        self.extra = {"rows": mx.zeros(3)}


class WithObject(Memory):
    def __init__(self) -> None:
        super().__init__()
        self.inner = KVCache()


class Lazy(Memory):
    """Makes an attribute when it is first used."""

    def __call__(self, x: mx.array) -> mx.array:
        self.late = x[:, -1:]
        return super().__call__(x)


class OtherCount(Memory):
    """Its offset is no number of tokens."""

    def __call__(self, x: mx.array) -> mx.array:
        said = super().__call__(x)
        self.offset += x.shape[1]
        return said


class Sum:
    """Adds up what it sees, in `self.total`, wherever that is."""

    __slots__ = ()
    total: Any

    def __call__(self, x: mx.array) -> mx.array:
        self.total = self.total + mx.sum(x, axis=1, keepdims=True)
        return mx.add(x, 0.1 * self.total)


class Slotted(Sum):
    __slots__ = ("total",)

    def __init__(self) -> None:
        self.total = 0.0


class InSlotAndDict(Slotted):
    def __init__(self) -> None:
        super().__init__()
        self.other = 1


class OfModule(Sum, Module):
    """MLX's modules are dicts."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = mx.zeros(1)


class OfList(list[Any]):
    def __call__(self, x: mx.array) -> mx.array:
        self.append(x[:, -1:])
        return mx.add(x, 0.1 * sum(self))


class OfCacheList(CacheList):  # type: ignore[misc]
    """A list that keeps something beside its caches."""

    def __init__(self) -> None:
        super().__init__(KVCache())
        self.count = 0

    def __call__(self, x: mx.array) -> mx.array:
        self.count += x.shape[1]
        return x + 0.01 * self.count


UNKEEPABLE: dict[Any, str] = {
    WithDict: "keeps a dict in 'extra'",
    WithObject: "keeps a KVCache in 'inner'",
    Lazy: "has no 'late'",
    OtherCount: "does not hold 2 tokens",
    Slotted: "keeps more than attributes",
    InSlotAndDict: "keeps more than attributes",
    OfModule: "keeps more than attributes",
    OfList: "keeps more than attributes",
    OfCacheList: "keeps a KVCache in 'caches.0'",
}
every_unkeepable = pytest.mark.parametrize("make", UNKEEPABLE, ids=lambda made: made.__name__)


@every_unkeepable
def test_a_model_whose_layers_cannot_be_taken_down_runs_without_a_cache_and_that_is_told_once(
    make: Callable[[], Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = random_tokens(PROMPT, seed=1)
    expected = [step.token for step in runner_of(None, make).generate(prompt, AFTER, SAMPLED)]
    assert caplog.messages == []
    runner = runner_of(tmp_path / "store", make)
    assert (runner.cache, runner.capturable) == (None, False)
    for _ in range(2):
        assert [step.token for step in runner.generate(prompt, AFTER, SAMPLED)] == expected
    (notice,) = caplog.messages
    assert notice == runner.why_not_kept
    assert "states of this model cannot be kept: layer 0.1.1" in notice
    assert UNKEEPABLE[make] in notice
    assert not (tmp_path / "store").exists()


@every_unkeepable
def test_of_such_a_model_mlx_lms_own_loop_gets_empty_layers_and_a_notice(
    make: Callable[[], Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = random_tokens(PROMPT, seed=1)
    model, cache = model_of(make), PromptCache(tmp_path / "store", "own")
    layers, rest = cache.fetch(model, prompt)
    assert rest == prompt
    assert UNKEEPABLE[make] in caplog.text
    mx.eval(model(mx.array(rest)[None], cache=layers))
    with pytest.raises(UnsupportedLayer):
        cache.store(model, prompt, layers)
    assert not (tmp_path / "store").exists()


def test_kv_bits_do_not_make_an_error_of_it(tmp_path: Path) -> None:
    kv = KVSettings(8, 32, 0)
    runner = Runner(model_of(WithDict), None, PromptCache(tmp_path / "store", "own"), kv=kv)
    assert runner.cache is None
    assert len(list(runner.generate(random_tokens(PROMPT, seed=1), 3))) == 3
    layers, rest = PromptCache(tmp_path, "own", kv=kv).fetch(runner.model, [1, 2, 3])
    assert (len(layers), rest) == (2, [1, 2, 3])


# On the command line


class Odd(KVCache):  # type: ignore[misc]
    """What `LlamaWithOddCaches` makes."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = {"seen": 0}


@pytest.fixture
def program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Program:
    return Program(tiny.on_disk(tmp_path / "model"), tmp_path / "store", capsys)


@pytest.fixture
def odd_caches(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From when this is called on, llamas have caches that cannot be taken down."""

    def patch() -> None:
        made = lambda model: [Odd() for _ in model.layers]  # noqa: E731
        monkeypatch.setattr(llama.Model, "make_cache", made)

    return patch


REASON = "states of this model cannot be kept: layer 0 (Odd) keeps a dict in 'extra'"


def test_save_and_load_say_in_one_sentence_that_states_cannot_be_kept(
    program: Program, odd_caches: Callable[[], None]
) -> None:
    assert program("save", "few", "-p", "The cat sat").code == 0
    odd_caches()
    before = sorted(program.directory.rglob("*.safetensors"))
    for command in (
        ("save", "other", "-p", "The dog"), ("save", "few", "-p", "The dog", "--force", "--quiet"),
        ("load", "few"), ("load", "few", "-n", "3", "--quiet"), ("load", "few", "--json"),
    ):  # fmt: skip
        assert REASON in one_line(program(*command))
    assert sorted(program.directory.rglob("*.safetensors")) == before


def test_generate_goes_on_without_a_cache_unless_a_name_was_asked_for(
    program: Program, odd_caches: Callable[[], None]
) -> None:
    options = ("-p", "The cat sat", "-n", "6", "--temp", "0")
    text = program("generate", *options).out
    odd_caches()
    ended = program("generate", *options, "--prompt-cache-all")
    assert (ended.code, ended.out) == (0, text)
    assert ended.err.count(REASON) == len(ended.err.splitlines()) == 1
    assert program("generate", *options, "--quiet").err == ""
    answer = program("generate", *options, "--json").json
    assert (answer["hit"], answer["saved"]) == ("none", None)
    named = program("generate", *options, "--save-as", "mine")
    assert (named.code, named.out) == (1, text)
    assert REASON in named.err.splitlines()[-1]
    assert program("show", "mine").code == 1
