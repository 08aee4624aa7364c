"""Runner: a model, its tokenizer and its store; prompts in, states and tokens out."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_promptcache import arithmetic, attention, checkpoint, exponentials, models, places, swiglu
from mlx_promptcache.blueprint import PROBE_TOKENS, Blueprint
from mlx_promptcache.cache import PromptCache
from mlx_promptcache.errors import (
    ForeignStore,
    ModelError,
    NotQuantisable,
    PromptError,
    UnreadableStore,
    UnsupportedLayer,
)
from mlx_promptcache.fingerprint import KVSettings, remembered
from mlx_promptcache.headers import MOST_DRAFT_TOKENS
from mlx_promptcache.layers import make_layers
from mlx_promptcache.limits import Limits
from mlx_promptcache.pair import Pair
from mlx_promptcache.passes import Plan
from mlx_promptcache.prompt import Prompt, Prompter
from mlx_promptcache.run import Run, Step
from mlx_promptcache.sampling import Sampling, fresh_seed
from mlx_promptcache.state import Origin, State
from mlx_promptcache.store import Store
from mlx_promptcache.traits import Traits
from mlx_promptcache.tree import CELL
from mlx_promptcache.trunk import Trunk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from mlx_promptcache.checkpoint import Loaded, Weights
    from mlx_promptcache.match import Match
    from mlx_promptcache.ranks import Ranks
    from mlx_promptcache.restorer import Resumed
    from mlx_promptcache.run import Later, Progress

    PromptLike = str | Sequence[Mapping[str, Any]] | Sequence[int] | Prompt

log = logging.getLogger("mlx_promptcache")

PREFILL_STEP = 512
NUM_DRAFT_TOKENS = 3  # as mlx_lm.generate
SNAPSHOT_EVERY = 4 * PREFILL_STEP
LEAST_BRANCH = 16  # tokens that a snapshot at a branch must save the next prompt


class Runner:
    """A model that starts where an earlier process stopped.

    `model` and `tokenizer` are a pair from `mlx_lm.load`; both tokenizer and cache may be None.
    Prompts end their passes on a grid of `prefill_step` positions (a multiple of 256), in cold and
    in warm runs alike. Models with layers that can only be resumed from snapshots have these taken
    every `snapshot_every` tokens of a long prompt, where the next pass ends.

    With a `draft_model` decoding is speculative: it proposes `num_draft_tokens` tokens at a time,
    its layers are part of every state, and all layers of both models must be sliceable.

    With `ranks` the model is one of several processes' parts of it, and whatever computes, reads or
    saves is a call of all of them: each makes the same calls in the same order.

    One runner runs one sequence at a time: `state` is that of the latest.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        cache: PromptCache | None = None,
        *,
        kv: KVSettings | None = None,
        prefill_step: int = PREFILL_STEP,
        snapshot_every: int = SNAPSHOT_EVERY,
        context_length: int | None = None,
        draft_model: Any = None,
        num_draft_tokens: int = NUM_DRAFT_TOKENS,
        ranks: Ranks | None = None,
    ) -> None:
        if prefill_step <= 0 or prefill_step % CELL:
            raise ValueError(f"prefill_step must be a multiple of {CELL}, not {prefill_step}")
        if snapshot_every <= 0:
            raise ValueError(f"snapshot_every must be more than 0, not {snapshot_every}")
        if ranks is not None and draft_model is not None:
            raise ModelError("a draft model cannot take part in a distributed run: leave it out")
        self.ranks = ranks
        """The processes that run the model together; None if this one runs it alone."""
        self._model = model
        self._draft_model = draft_model
        self._awaited: list[Weights] = []
        self.num_draft_tokens = num_draft_tokens
        self._whole = model if draft_model is None else Pair(model, draft_model)
        self.tokenizer = tokenizer
        self.kv = kv if kv is not None else cache.kv if cache is not None else KVSettings()
        self.cache = cache.with_kv(self.kv) if cache is not None else None
        self.prefill_step = prefill_step
        self.snapshot_every = snapshot_every
        self.forward_passes = 0
        """Forward calls so far; `tokens_fed` is how many tokens went through them."""
        self.tokens_fed = 0
        self.why_not_kept: str | None = None
        """Why states of this model cannot be kept; then there is no cache, whatever was given."""
        self._to_be_told = False
        self._blueprint = self._look()
        shape = self._logits_shape()
        self.limits = Limits(shape[-1], context_length)
        """Which prompts and which sampling the model takes."""
        self._trunk = Trunk.of(model, self._probe, shape)
        self._traits = Traits.of(self._blueprint)
        for each in (model, draft_model):
            if each is not None:
                attention.spread(each)
                swiglu.spread(each)
        if draft_model is not None:
            self._check_draft()
        if self.cache is not None:
            self.cache.blueprint = self._blueprint
        if ranks is not None:
            self._agree(ranks)
        self._run: Run | None = None

    @classmethod
    def load(
        cls,
        path_or_repo: str,
        adapter_path: str | None = None,
        kv_bits: int | None = None,
        cache_dir: str | None = None,
        *,
        kv_group_size: int = 64,
        quantized_kv_start: int = 5000,
        max_kv_size: int | None = None,
        draft_model: str | None = None,
        num_draft_tokens: int = NUM_DRAFT_TOKENS,
        salt: str = "",
        read_only: bool = False,
        use_cache: bool = True,
        max_bytes: int | None = None,
        allow_foreign: bool = False,
        loaded: Loaded | None = None,
        shard: str | None = None,
    ) -> Runner:
        """Load a model through mlx-lm and open its store, which may take `max_bytes` on disk (see
        `PromptCache`). `loaded` is this very model, if `checkpoint.load` has begun to load it,
        with its fingerprint, if that is known. A store of another user is a miss for every prompt,
        and nothing is written there, unless `allow_foreign` is set; so is a store that cannot be
        read. With `shard` (`tensor` or `pipeline`) the processes that `mlx.launch` has started load
        a part of it each, and run it together (see `Ranks`).

        Raises:
            ModelError: there is no such model or adapter, or mlx-lm cannot load it.
            StoreError: `cache_dir` is something else than a store.
            RankError: with `shard`, there are no other processes, or one of them has failed.
        """
        if shard is not None and loaded is not None:
            raise ValueError("what is loaded already is the whole model: leave `loaded` out")
        ranks = _join(shard)
        if ranks is not None and (adapter_path is not None or draft_model is not None):
            raise ModelError(
                "adapters and draft models cannot take part in a distributed run: leave them out, "
                "or fuse the adapter with mlx_lm.fuse"
            )
        with contextlib.nullcontext() if ranks is None else ranks.together("loading the model"):
            path = models.find(path_or_repo)
            kv = KVSettings(kv_bits, kv_group_size, quantized_kv_start, max_kv_size)
            adapter = None if adapter_path is None else Path(adapter_path)
            draft_path = None if draft_model is None else models.find(draft_model)
            settings = models.config(path)
            cache = None
            if use_cache:
                directory = places.store_directory(path, cache_dir)
                read_only = read_only or places.writing_is_off()
                try:
                    Store(directory, allow_foreign=allow_foreign, read_only=read_only).check()
                except (ForeignStore, UnreadableStore):  # who asks it for something is told
                    read_only = True
                fingerprint = None if loaded is None else loaded.fingerprint
                fingerprint = fingerprint or remembered(
                    path, adapter=adapter, kv=kv, salt=salt, draft=draft_path
                )
                cache = _cache(ranks)(
                    directory, fingerprint, kv=kv, read_only=read_only, max_bytes=max_bytes,
                    allow_foreign=allow_foreign,
                )  # fmt: skip
            loaded = loaded or checkpoint.load(path, adapter, ranks=ranks)
            tokenizer = _tokenizer(path, loaded.config, cache)
            draft, others = None, None
            if draft_path is not None:
                draft, _, others, _ = checkpoint.load(draft_path, None)
            length = None if max_kv_size is not None else models.context_length(settings)
            runner = cls(
                loaded.model,
                tokenizer,
                cache,
                kv=kv,
                context_length=length,
                draft_model=draft,
                num_draft_tokens=num_draft_tokens,
                ranks=ranks,
            )
        runner._awaited = [each for each in (loaded.weights, others) if each is not None]
        if cache is not None:
            cache.checks += [weights.check for weights in runner._awaited]
        return runner

    @property
    def model(self) -> Any:
        """The model, with its weights."""
        self._wait_for_weights()
        return self._model

    @property
    def draft_model(self) -> Any:
        """The draft model, with its weights; None if there is none."""
        self._wait_for_weights()
        return self._draft_model

    @property
    def whole(self) -> Any:
        """What is fed: the model, or the model and its draft model as one."""
        self._wait_for_weights()
        return self._whole

    @property
    def needed_cache(self) -> PromptCache:
        """The cache, for what cannot be done without one.

        Raises:
            UnsupportedLayer: there is none, because states of this model cannot be kept, say.
        """
        if self.cache is None:
            raise UnsupportedLayer(self.why_not_kept or "there is no prompt cache")
        return self.cache

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end an answer; none without a tokenizer."""
        return frozenset(() if self.tokenizer is None else self.tokenizer.eos_token_ids)

    @property
    def speculative(self) -> bool:
        """Whether a draft model proposes tokens."""
        return self._draft_model is not None

    @property
    def embeds(self) -> bool:
        """Whether the final hidden state can be read from this architecture."""
        return self._trunk.found

    def _look(self) -> Blueprint | None:
        """What the model's layers look like; None, and no cache, if they cannot be taken down."""
        try:
            return Blueprint.of(self._whole, self.kv)
        except NotQuantisable:
            raise
        except UnsupportedLayer as exc:
            self.why_not_kept = f"states of this model cannot be kept: {exc}"
            self._to_be_told = self.cache is not None
            self.cache = None
            return None

    def _check_draft(self) -> None:
        if not self.sliceable or self.kv.max_size is not None:
            raise UnsupportedLayer(
                "speculative decoding needs layers that can forget tokens, in both models: leave "
                "the draft model and --max-kv-size out"
            )
        if not 0 < self.num_draft_tokens <= MOST_DRAFT_TOKENS:
            raise ValueError(f"num_draft_tokens must be between 1 and {MOST_DRAFT_TOKENS}")
        tokens = mx.zeros((1, PROBE_TOKENS), mx.int32)
        proposed: mx.array = self._draft_model(tokens)
        if proposed.shape[-1] != self.limits.vocabulary:
            raise ModelError(
                f"the draft model has {proposed.shape[-1]} tokens and the model "
                f"{self.limits.vocabulary}: take one with the same vocabulary"
            )

    def _agree(self, ranks: Ranks) -> None:
        """Let all ranks cut prompts and take marks at the same places, whatever their own layers
        are, and keep states only where all can.
        """
        ranks.same("model and settings", *self._common())
        self._traits = self._traits.of_all(ranks)
        cache = self.cache
        caches = ranks.told(
            "opening the store", int(cache is None), int(cache is None or cache.read_only)
        )
        if cache is None:
            return
        if any(none for none, _ in caches):
            self.cache, self.why_not_kept = None, "another rank cannot keep states"
            log.warning("nothing is kept: %s", self.why_not_kept)
        elif any(read_only for _, read_only in caches) and not cache.read_only:
            cache.read_only = True
            log.warning("nothing is kept: another rank's store is not to be written")

    def _common(self) -> list[Any]:
        """What must be the same on all ranks before anything is computed."""
        parts = {} if self.cache is None else dict(self.cache.fingerprint.parts)
        parts.pop("shard", None)
        ends = None if self.tokenizer is None else sorted(self.tokenizer.eos_token_ids)
        numbers = [self.prefill_step, self.snapshot_every, self.limits]
        return [sorted(parts.items()), ends, self.kv, arithmetic.versions(), *numbers]

    def waiting(self) -> contextlib.AbstractContextManager[None]:
        """Around whatever waits for other ranks; nothing where there are none."""
        return contextlib.nullcontext() if self.ranks is None else self.ranks.waiting()

    @property
    def capturable(self) -> bool:
        """Whether the layers can be taken down: else states can neither be kept nor read off."""
        return self._blueprint is not None

    @property
    def sliceable(self) -> bool:
        """Whether every layer is: then any position of what is stored can be resumed."""
        return self.capturable and not self._traits.other_than_rows

    @property
    def opaque(self) -> bool:
        """Whether there are layers that can only be resumed where they were captured."""
        return self._traits.opaque

    @property
    def keeps_windows(self) -> bool:
        """Whether rows that windows have moved past are to be kept for the store."""
        if self._blueprint is None or self.cache is None or self.cache.read_only:
            return False
        return bool(self._blueprint.windows)

    @property
    def shortest_window(self) -> float:
        """How many tokens it takes at least until a window lets go of a row."""
        windows = self._blueprint.windows.values() if self._blueprint is not None else ()
        return min((window.size - window.keep for window in windows), default=math.inf)

    @property
    def fingerprint(self) -> str:
        """What this runner computes states as; empty where it has no cache to tell."""
        return "" if self.cache is None else self.cache.fingerprint.digest

    @property
    def layer_maker(self) -> Any:
        """What makes the layers, and computes with them: the model, with its draft model."""
        return self._whole

    def make_layers(self) -> list[Any]:
        """Empty mlx-lm cache objects for this model, and for its draft model."""
        return make_layers(self._whole, self.kv)

    def _logits_shape(self) -> tuple[int, ...]:
        """The shape of what `_probe` gives."""
        if self._blueprint is None:
            return self._probe().shape
        return (1, PROBE_TOKENS, *self._blueprint.logits.lengths)

    def _probe(self) -> mx.array:
        tokens = mx.zeros((1, PROBE_TOKENS), mx.int32)
        logits: mx.array = self._model(tokens, cache=make_layers(self._model, self.kv))
        return logits

    def forward(self, inputs: mx.array, layers: list[Any]) -> tuple[mx.array, mx.array | None]:
        """One forward call over `inputs` `[1, tokens]`: logits `[1, 1 or tokens, vocab]`, and the
        hidden state `[1, 1, hidden]` of the last token where it can be read. Evaluates nothing.
        """
        self._wait_for_weights()
        with self._trunk.watched(), exponentials.inferring():
            logits = self._whole(inputs, cache=layers)
        self.forward_passes += 1
        self.tokens_fed += inputs.size
        return logits, self._trunk.hidden

    def _wait_for_weights(self) -> None:
        if not self._awaited:
            return
        with contextlib.nullcontext() if self.ranks is None else self.ranks.together("reading"):
            for weights in self._awaited:
                weights.wait()
        self._awaited = []

    def check(self, inputs: mx.array, layers: list[Any]) -> tuple[mx.array, mx.array | None]:
        """One forward call of the model alone, without its draft model: logits `[tokens, vocab]`
        and hidden states `[tokens, hidden]` of every token. Evaluates nothing.
        """
        assert isinstance(self._whole, Pair)  # noqa: S101 - who else proposes
        self._wait_for_weights()
        with self._trunk.watched(every=True), exponentials.inferring():
            logits: mx.array = self._model(inputs, cache=layers[: self._whole.own])
        self.forward_passes += 1
        self.tokens_fed += inputs.size
        hidden = self._trunk.hidden
        return logits[0], None if hidden is None else hidden[0]

    # Running

    def start(
        self,
        prompt: PromptLike,
        *,
        boundaries: Sequence[int] = (),
        exact: bool = False,
        reuse: bool = True,
        sampling: Sampling | None = None,
        progress: Progress | None = None,
        later: bool = False,
    ) -> Run:
        """Reuse what is stored of a prompt, feed the rest, and return the run at its end.

        With `exact` only rows are reused that this very run would have computed itself. So it is
        always where windows keep their first rows (`max_kv_size`): what mlx-lm computes with such
        windows depends on where passes are cut.

        With `later` the rows of an exact hit are read when they are first needed, after the first
        token. Should they turn out to be damaged then, they are computed, and the run's
        `cached_tokens` and `match` say so from then on.

        Raises:
            PromptError: the prompt is empty, or longer than the model's context; or the sampling
                names a token that the model does not have.
        """
        made = self._prompt(prompt, boundaries)
        exact = exact or self._traits.cuts_matter
        sampling = self.limits.sampling(sampling or Sampling())
        if self.ranks is not None:
            asked = (made.tokens, made.boundaries, exact, reuse, sampling)
            self.ranks.same("prompt and sampling", *asked)
            self._wait_for_weights()
        began = time.perf_counter()
        later = later and not isinstance(self._whole, Pair)
        resumed = self._resume(made, exact=exact, later=later) if reuse else None
        state, layers, match = resumed or (None, None, None)
        run = self._run_of(layers or self.make_layers(), state)
        run.load_seconds = time.perf_counter() - began
        run.match = match
        run.anew = functools.partial(self._anew, made, exact=exact)
        run.origin = made.origin
        run.sampling = sampling
        seed = fresh_seed(63, self.ranks) if sampling.seed is None else sampling.seed
        run.key = mx.random.key(seed)
        self._run = run
        cuts = made.boundaries
        marks: tuple[int, ...] = ()
        if match is not None and (branch := self._branch(match, len(made.tokens))):
            if exact:  # a cut would be one that a cold run does not make
                marks = (branch - branch % self.prefill_step,)
            else:
                cuts = (*cuts, branch)
        if run.cached_tokens < len(made.tokens):
            self._wait_for_weights()  # that is no part of computing the prompt
        run.prefill(made.tokens, cuts, marks=marks, progress=progress)
        return self._timed(run)

    def go_on(
        self,
        run: Run,
        prompt: PromptLike,
        *,
        sampling: Sampling,
        progress: Progress | None = None,
    ) -> Run:
        """Let a run go on with a longer prompt, which begins with the tokens that it holds; its key
        goes on, too. Another run is started, as `start` does, if it does not begin so.

        Raises:
            PromptError: as `start` does.
        """
        made = self._prompt(prompt, ())
        if self.ranks is not None:
            self.ranks.same("prompt and sampling", made.tokens, sampling)
        if not run.begins(made.tokens):
            return self.start(made, sampling=sampling, progress=progress)
        run.sampling = self.limits.sampling(sampling)
        self._run = run
        run.go_on(made, progress=progress)
        return self._timed(run)

    def _timed(self, run: Run) -> Run:
        """Remember how fast a prompt was computed."""
        if self.cache is not None and not self.cache.read_only:
            self.cache.rates.note_computed(run.prefilled_tokens, run.prefill_seconds)
        return run

    def _anew(self, prompt: Prompt, *, exact: bool) -> Run:
        """A run at the end of a prompt whose state could not be read after all."""
        run = self._run
        try:
            return self.start(prompt, exact=exact)
        finally:
            self._run = run

    def _run_of(self, layers: list[Any] | Later, state: State | None) -> Run:
        lineage = arithmetic.lineage()
        if not isinstance(self._whole, Pair):
            return Run(self, layers, state, lineage)
        from mlx_promptcache.speculative import SpeculativeRun

        pair, count = self._whole, self.num_draft_tokens
        return SpeculativeRun(pair, count, self, layers, state, lineage)

    def _branch(self, match: Match, length: int) -> int | None:
        """Where a prompt leaves what is stored of others, if nothing can be resumed there: with a
        snapshot there the next one can.
        """
        if self.cache is None or self.cache.read_only:
            return None
        saves = match.stored - match.position >= LEAST_BRANCH
        return match.stored if saves and match.stored < length else None

    def resume(self, state: State, sampling: Sampling | None = None) -> Run:
        """Return a run that goes on where a state stops, with the state's own key and sampling.

        Other sampling may be given; if it has a seed, the draws begin anew from it.

        Raises:
            UnsupportedLayer: the state is not of this model, or holds no logits to go on from.
            PromptError: the sampling names a token that the model does not have.
        """
        if state.logits is None:
            raise UnsupportedLayer(
                "this state holds no logits to go on from: give its prompt instead"
            )
        if state.fingerprint and self.fingerprint not in {"", state.fingerprint}:
            raise UnsupportedLayer(
                "this state was computed by another model, or with other settings"
            )
        self.limits.sampling(sampling or state.sampling)
        if self.ranks is not None:
            from mlx_promptcache.shard_cache import identity

            self.ranks.same("state and sampling", *identity(state), sampling)
            self._wait_for_weights()
        run = self._run_of(state.layers(self._whole), state)
        if sampling is not None:
            run.sampling = sampling
            if sampling.seed is not None:
                run.key = mx.random.key(sampling.seed)
        run.prefill(state.tokens, ())  # there is nothing to feed: the state is its own prompt
        if not self._repeated(run, state):
            return self.resume(replace(state, speculation=None), sampling)
        self._run = run
        return run

    def _repeated(self, run: Run, state: State) -> bool:
        """Whether a run that resumes a state stands where the state's own run did."""
        speculation = state.speculation
        if (
            speculation is None
            or not isinstance(self._whole, Pair)
            or speculation.draft_tokens != self.num_draft_tokens
            or run.sampling != state.sampling
            or run.key is not state.rng
        ):
            return True  # there is nothing to repeat, or it shall go on in another way
        from mlx_promptcache.speculative import SpeculativeRun

        assert isinstance(run, SpeculativeRun)  # noqa: S101 - of a pair there is no other
        return run.repeat(speculation)

    def _prompt(self, prompt: PromptLike, boundaries: Sequence[int]) -> Prompt:
        if not isinstance(prompt, Prompt):
            prompt = self._made(prompt)
        return self.limits.prompt(prompt, boundaries)

    def _made(self, prompt: str | Sequence[Any]) -> Prompt:
        if isinstance(prompt, str):
            return self.prompter.whole(Origin(prompt))
        if prompt and isinstance(prompt[0], dict):
            messages: list[Any] = list(prompt)
            return self.prompter.whole(Origin(messages=tuple(messages)))
        return Prompt(tuple(int(token) for token in prompt))

    @property
    def prompter(self) -> Prompter:
        """Makes prompts with this runner's tokenizer.

        Raises:
            PromptError: there is none.
        """
        if self.tokenizer is None:
            raise PromptError("there is no tokenizer: give the prompt as token ids")
        return Prompter(self.tokenizer, marks_turns=self.opaque or self._traits.cuts_matter)

    def _resume(self, prompt: Prompt, *, exact: bool, later: bool) -> Resumed | None:
        if self._to_be_told:
            log.warning("%s", self.why_not_kept)
            self._to_be_told = False
        if self.cache is None:
            return None
        plan = None
        if exact:
            plan = Plan(
                arithmetic.lineage(), len(prompt.tokens), self.prefill_step, prompt.boundaries
            )
        return self.cache.resume(prompt.tokens, self._whole, plan=plan, later=later)

    # For programs

    def prefill(
        self,
        prompt: PromptLike,
        boundaries: Sequence[int] = (),
        exact: bool = False,
    ) -> State:
        """Return the state at the end of a prompt: a text, messages, or token ids.

        What is stored of it is reused. `boundaries` are positions among its tokens that are worth
        keeping: passes end there, and a save of the state keeps them, too.

        Raises:
            PromptError: the prompt is empty, or longer than the model's context.
        """
        return self.start(prompt, boundaries=boundaries, exact=exact).state()

    def generate(
        self,
        prompt_or_state: PromptLike | State,
        max_tokens: int = 256,
        sampling: Sampling | None = None,
        *,
        boundaries: Sequence[int] = (),
        exact: bool = False,
        stop: Sequence[str] = (),
    ) -> Iterator[Step]:
        """Generate after a prompt, or go on where a state stops; yield each token as it comes.

        A prompt draws from `sampling.seed`, or afresh. A state goes on with its own key and
        sampling unless others are given. After every step `state` is exact.
        """
        if isinstance(prompt_or_state, State):
            run = self.resume(prompt_or_state, sampling)
        else:
            run = self.start(prompt_or_state, boundaries=boundaries, exact=exact, sampling=sampling)
        return run.steps(max_tokens, stop)

    @property
    def run_in_progress(self) -> Run | None:
        """The latest run, also one whose prefill was interrupted."""
        return self._run

    @property
    def state(self) -> State:
        """The state that holds the latest prompt and the tokens yielded so far.

        Raises:
            PromptError: nothing has been run yet.
        """
        if self._run is None:
            raise PromptError("nothing has been run yet: there is no state")
        return self._run.state()


def _cache(ranks: Ranks | None) -> Callable[..., PromptCache]:
    """What makes the cache: single processes wait for no module that they do not need."""
    if ranks is None:
        return PromptCache
    from mlx_promptcache.shard_cache import ShardCache

    return functools.partial(ShardCache, ranks=ranks)


def _join(shard: str | None) -> Ranks | None:
    if shard is None:
        return None
    from mlx_promptcache.ranks import Ranks

    return Ranks.join(shard)


def _tokenizer(path: Path, told: Mapping[str, Any], cache: PromptCache | None) -> Any:
    """The tokenizer of a model: as it is kept in the store, or through mlx-lm, and then kept."""

    def whole() -> Any:
        return checkpoint.load_tokenizer(path, told)

    if cache is None:
        return whole()
    return cache.tokenizers.tokenizer(path, whole, keeps=not cache.read_only)
