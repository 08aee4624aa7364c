"""A store against a dictionary: whatever is done to it, what it gives back is what was put in, or a
miss that the dictionary allows.

States are made without a model. A row is made of all tokens up to it, so that rows of other tokens
are told at once.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import random
import shutil
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from inspection import command
from known import model_of
from mlx_promptcache import PromptCache, State
from mlx_promptcache.errors import CacheMiss, StoreError
from mlx_promptcache.files import SUFFIX, TEMPORARY
from mlx_promptcache.headers import snapshot_header
from mlx_promptcache.layers import Layer
from mlx_promptcache.locks import LOCK_FILES
from mlx_promptcache.names import NAMES
from mlx_promptcache.passes import Pass
from mlx_promptcache.state import Trail
from mlx_promptcache.store import BLOCKS, SNAPSHOTS, Store
from tiny import digest, random_tokens

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mlx_promptcache.writer import Saved

    Tokens = tuple[int, ...]

VOCABULARY, WIDTH = 16, 4
SHARED = random_tokens(600, 1, VOCABULARY)
CUTS = (0, 1, 40, 255, 256, 257, 300, 511, 513, 600)  # around the edges of cells
VARIANTS = (0, 1)  # rows of the same tokens that differ in the last bits
LOOKS = 2  # objects that look at the same store
GARBAGE = (b"", b"garbage", b"\0" * 40)


def sequence(cut: int, tail: int, seed: int) -> Tokens:
    """Tokens that begin as others do."""
    return (*SHARED[:cut], *random_tokens(tail, 2 + seed, VOCABULARY))


SEQUENCES = st.builds(
    sequence, st.sampled_from(CUTS), st.sampled_from([1, 2, 20, 260]), st.integers(0, 2)
)
NAME_CHOICES = st.sampled_from(["a", "b", "A talk", "\u00e9t\u00e9"])
LOOK_CHOICES = st.integers(0, LOOKS - 1)


@functools.lru_cache(256)
def rows_of(tokens: Tokens, variant: int) -> np.ndarray:
    """The rows of these tokens, `[tokens, width]`."""
    sums, so_far = [], 0
    for token in tokens:
        so_far = zlib.crc32(bytes([token]), so_far)
        sums.append([so_far >> (8 * k) & 0xFF for k in range(WIDTH)])
    rows: np.ndarray = np.array(sums, np.float32) + np.float32(variant / 1024)
    return rows


def state_of(tokens: Tokens, variant: int) -> State:
    """A state of these tokens, as the smallest model has them."""
    rows = mx.array(rows_of(tokens, variant))[None, None]
    key = mx.random.key(zlib.crc32(bytes(tokens)) + variant)
    return State(
        tokens=tokens,
        contents=(Layer("0", "", {"keys": rows, "values": rows + 1}),),
        logits=mx.random.normal((VOCABULARY,), key=key),
        embedding=mx.random.normal((WIDTH,), key=key),
        rng=key,
        lineage="none",
        trail=Trail((), (Pass(0, len(tokens), "none"),), 0.01),
    )


@dataclass(frozen=True)
class Named:
    """What a name stands for: a state, its snapshot's id, and all files that it needs, with what
    they held when it was saved.
    """

    tokens: Tokens
    digest: str
    snapshot: str
    files: dict[str, str]


class StoreMachine(RuleBasedStateMachine):
    """Does things to a store, and remembers in a dictionary what must come of it."""

    steps = 0  # of all machines

    def __init__(self) -> None:
        super().__init__()
        self.base = Path(tempfile.mkdtemp(prefix="mlx-promptcache-machine-"))
        self.directory = self.base / "0"
        self.copies = 0
        self.names: dict[str, Named] = {}
        self.live: dict[str, Tokens] = {}  # the states that must be there, by snapshots' ids
        self.ever: set[Tokens] = set()  # all that were there since everything was cleared
        self.harmed: dict[str, str] = {}  # what damaged files hold
        self.sound, self.gentle = True, False
        self.looks = [self._look() for _ in range(LOOKS)]

    def teardown(self) -> None:
        shutil.rmtree(self.base)

    def _look(self) -> PromptCache:
        return PromptCache(self.directory, "a model of the machine")

    @initialize(gentle=st.booleans())
    def begin(self, gentle: bool) -> None:
        """A store that is not there yet is empty. Nobody harms the files of every other one."""
        self.gentle = gentle
        assert self.looks[0].list() == []

    # What is put in

    @rule(
        look=LOOK_CHOICES, name=NAME_CHOICES, tokens=SEQUENCES, variant=st.sampled_from(VARIANTS),
        replace=st.booleans(), exact=st.booleans(),
    )  # fmt: skip
    def save(
        self, look: int, name: str, tokens: Tokens, variant: int, replace: bool, exact: bool
    ) -> None:
        """A name is given to other tokens only where that is wanted."""
        self._step()
        before, state = self.names.get(name), state_of(tokens, variant)
        taken = before is not None and before.tokens != tokens and not replace
        frail = self._is_frail(name)
        try:
            saved = self.looks[look].save(name, state, replace=replace, sync=False, exact=exact)
        except StoreError:
            assert taken
            return
        assert not taken or frail
        self._stored(saved, tokens)
        files = self._files_of(name)
        assert not self._is_harmed(files[0])  # the snapshot: a save heals it
        assert not self._is_harmed(files[-1])
        held = {file: self._held(file) for file in files}
        self.names[name] = Named(tokens, digest(state), saved.snapshot, held)

    @rule(look=LOOK_CHOICES, tokens=SEQUENCES, variant=st.sampled_from(VARIANTS))
    def keep(self, look: int, tokens: Tokens, variant: int) -> None:
        """What is kept has no name."""
        self._step()
        self._stored(self.looks[look].keep(state_of(tokens, variant)), tokens)

    def _stored(self, saved: Saved, tokens: Tokens) -> None:
        self.live[saved.snapshot] = tokens
        self.ever.add(tokens)

    # What comes out

    @rule(look=LOOK_CHOICES, name=NAME_CHOICES)
    def load(self, look: int, name: str) -> None:
        """A name gives the very state; a miss only where there is none, or a file was harmed."""
        self._step()
        named, frail = self.names.get(name), self._is_frail(name)
        try:
            state: State | None = self.looks[look].load(name)
        except CacheMiss:
            state = None
        if state is None:
            assert named is None or frail
        else:
            assert named is not None
            assert digest(state) == named.digest

    @rule(look=LOOK_CHOICES, tokens=SEQUENCES)
    def match(self, look: int, tokens: Tokens) -> None:
        """A match never claims more than was stored, nor less than is."""
        self._step()
        match = self.looks[look].match(tokens)
        assert max(match.position, match.stored) <= _most_common(tokens, self.ever)
        assert not match.exact or tokens in self.ever
        if self.sound:
            there = self.live.values()
            assert match.position >= min(_most_common(tokens, there), len(tokens) - 1)
            assert match.exact or tokens not in there

    @rule(look=LOOK_CHOICES, tokens=SEQUENCES)
    def resume(self, look: int, tokens: Tokens) -> None:
        """Rows that are reused are rows of these tokens."""
        self._step()
        state, layers, match = self.looks[look].resume(tokens, model_of("smallest"))
        assert match.position <= _most_common(tokens, self.ever)
        if state is None:
            assert not self.sound or not match.position
            return
        n = state.n_past
        assert (state.tokens, match.position) == (tokens[:n], n)
        assert isinstance(layers, list)
        keys, values = (np.array(a[0, 0, :n]) for a in (layers[0].keys, layers[0].values))
        ours = [(rows_of(tokens, v)[:n] == keys).all(axis=1) for v in VARIANTS]
        assert np.logical_or.reduce(ours).all()
        assert (values == keys + 1).all()

    @rule(look=LOOK_CHOICES)
    def list(self, look: int) -> None:
        """A list tells of all that there is, and of nothing else."""
        self._step()
        entries = self.looks[look].list()
        whole = {name for name in self.names if not self._is_frail(name)}
        assert whole <= {entry.name for entry in entries if entry.status == "ok"}
        assert {entry.name for entry in entries} - {None} <= self.names.keys()
        if self.sound:
            assert {entry.snapshot for entry in entries} == self.live.keys()

    @rule(look=LOOK_CHOICES)
    def verify(self, look: int) -> None:
        """Nothing is damaged that nobody harmed."""
        self._step()
        assert not self.sound or self.looks[look].verify().damaged == ()

    # What is taken away

    @rule(look=LOOK_CHOICES, name=NAME_CHOICES)
    def clear(self, look: int, name: str) -> None:
        """A name takes its state along, unless another name stands for it."""
        self._step()
        frail = self._is_frail(name)
        try:
            plan = self.looks[look].clear([name])
        except CacheMiss:
            assert name not in self.names or frail
        else:
            self._gone(plan.snapshots)
        gone = self.names.pop(name, None)
        if gone is not None and self.sound:
            still = {named.snapshot for named in self.names.values()}
            assert (gone.snapshot in self.live) == (gone.snapshot in still)

    @rule()
    def clear_unnamed(self) -> None:
        """What has a name stays."""
        self._step()
        assert command("clear", self.directory, "--unnamed", "--yes")[0] == 0
        still = {named.snapshot for named in self.names.values()}
        self.live = {id_: tokens for id_, tokens in self.live.items() if id_ in still}

    @rule()
    def clear_all(self) -> None:
        """Nothing is left, damage neither."""
        self._step()
        assert command("clear", self.directory, "--all", "--yes")[0] == 0
        self.names, self.live, self.ever, self.harmed = {}, {}, set(), {}
        self.sound, self.looks = True, [self._look() for _ in range(LOOKS)]

    @rule(look=LOOK_CHOICES, max_bytes=st.sampled_from([0, 60_000, 200_000]))
    def prune(self, look: int, max_bytes: int) -> None:
        """What has a name is not evicted."""
        self._step()
        whole = {n.snapshot for name, n in self.names.items() if not self._is_frail(name)}
        plan = self.looks[look].prune(max_bytes)
        assert not whole & {_id_of(stem) for stem in plan.snapshots}
        self._gone(plan.snapshots)

    def _gone(self, stems: Iterable[str]) -> None:
        for stem in stems:
            self.live.pop(_id_of(stem), None)

    # What may happen to files

    @precondition(lambda self: not self.gentle)
    @rule(seed=st.integers(0, 1 << 16))
    def damage(self, seed: int) -> None:
        """A bit is flipped, or a file is cut short or overwritten."""
        self._step()
        draw = random.Random(seed)
        for path in self._any_file(draw):
            data = bytearray(path.read_bytes())
            if data and draw.random() < 0.5:
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            else:
                data = draw.choice([data[: len(data) // 2], *map(bytearray, GARBAGE)])
            path.write_bytes(data)
            self.harmed[self._relative(path)] = hashlib.sha256(data).hexdigest()
            self.sound = False

    @precondition(lambda self: not self.gentle)
    @rule(seed=st.integers(0, 1 << 16))
    def lose(self, seed: int) -> None:
        """A file is deleted."""
        self._step()
        for path in self._any_file(random.Random(seed)):
            path.unlink()
            self.sound = False

    @rule(locks=st.booleans())
    def move(self, locks: bool) -> None:
        """The store is copied elsewhere, with its locks or without; the old one is gone."""
        self._step()
        self.copies += 1
        to = self.base / str(self.copies)
        with contextlib.suppress(FileNotFoundError):
            shutil.copytree(self.directory, to)
            shutil.rmtree(self.directory)
        for name in LOCK_FILES if not locks else ():
            (to / name).unlink(missing_ok=True)
        self.directory, self.looks = to, []
        self.looks = [self._look() for _ in range(LOOKS)]

    @rule(look=LOOK_CHOICES)
    def look_anew(self, look: int) -> None:
        """Another process comes."""
        self._step()
        self.looks[look] = self._look()

    @rule(name=st.sampled_from([".DS_Store", f"{TEMPORARY}1-ab", f"of somebody{SUFFIX}"]))
    def litter(self, name: str) -> None:
        """Files that are not ours lie about."""
        self._step()
        for kind in (BLOCKS, SNAPSHOTS):
            for shard in sorted(self.directory.glob(f"{kind}/*"))[:1]:
                (shard / name).write_bytes(b"of somebody")

    def _step(self) -> None:
        StoreMachine.steps += 1

    def _any_file(self, draw: random.Random) -> tuple[Path, ...]:
        kinds = (f"{BLOCKS}/*/*{SUFFIX}", f"{SNAPSHOTS}/*/*{SUFFIX}", f"{NAMES}/*")
        files = sorted(path for kind in kinds for path in self.directory.glob(kind))
        return (draw.choice(files),) if files else ()

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.directory).as_posix()

    def _files_of(self, name: str) -> tuple[str, ...]:
        store = Store(self.directory)
        stem = store.names.read(name)
        blocks = [ref[0] for ref in snapshot_header(store, stem).content["refs"]]
        paths = [store.path(SNAPSHOTS, stem), *(store.path(BLOCKS, block) for block in blocks)]
        return (*map(self._relative, paths), f"{NAMES}/{name}")

    def _is_frail(self, name: str) -> bool:
        """Whether a file that a name needs was harmed: what it holds now may be other rows of the
        same tokens, by whoever saved next.
        """
        named = self.names.get(name)
        if named is None:
            return False
        changed = any(self._held(file) != held for file, held in named.files.items())
        return changed or any(map(self._is_harmed, named.files))

    def _is_harmed(self, file: str) -> bool:
        """Whether a file is lost, or holds what damage made of it."""
        return self._held(file) in {"", self.harmed.get(file)}

    def _held(self, file: str) -> str:
        """What a file holds, as a hash; empty if it is lost."""
        with contextlib.suppress(FileNotFoundError):
            return hashlib.sha256((self.directory / file).read_bytes()).hexdigest()
        return ""


def _id_of(stem: str) -> str:
    return stem.rpartition("-")[2]


def _most_common(tokens: Tokens, stored: Iterable[Tokens]) -> int:
    """How many of these tokens the one begins with that agrees in most."""
    return max((_common(tokens, other) for other in stored), default=0)


def _common(a: Tokens, b: Tokens) -> int:
    apart = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(apart, min(len(a), len(b)))
