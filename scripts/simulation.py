"""A fleet of machines that share a place, simulated event by event: where the rows of each prompt
come from, how long its first token takes, and what that asks of the place that is shared.

A machine computes one prompt at a time, in the order of arrival. It has rows in memory, a store on
its drive within a budget, and a remote behind that. What is looked up, brought, kept, evicted and
sent, and in which order, is what the program does; times are arithmetic on constants.
"""

from __future__ import annotations

import heapq
import random
from collections import OrderedDict, deque
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from fleet import BY_KEY, COMPUTED, DISK, MEMORY, RECOMPUTE, REMOTE, SHARED, Figures, Setup
from mlx_promptcache import tree
from mlx_promptcache.rates import LEAST_BYTES, SLOWER, WAIT_SECONDS
from mlx_promptcache.room import SPARE
from mlx_promptcache.store import BLOCKS, SNAPSHOTS
from mlx_promptcache.tree import Keys, cell_end, shard
from stock import SHARDS, Block, Snapshot, Stock, Walk, on_disk
from traffic import tokens_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from traffic import Request

ROOT = "0" * 32
# Of the sharing code: what it does not do for less, does at once, or waits for.
LEAST_TOKENS = 16
THREADS = 8
TRIED_PARTS = 2
PATIENCE_SECONDS = 5.0
LET_BE_SECONDS = 60.0
PAGE = 1000  # names that an object store lists at once


@contextmanager
def cells_of(size: int) -> Iterator[None]:
    """Let the program's cells have another size for a while."""
    before, tree.CELL = tree.CELL, size
    try:
        yield
    finally:
        tree.CELL = before


class _Pipe:
    """Bytes that all machines together get through, first come, first served."""

    def __init__(self, per_second: float) -> None:
        self._per_second, self._free = per_second, 0.0

    def through(self, size: int, now: float) -> float:
        """When so many bytes are through."""
        self._free = max(self._free, now) + size / self._per_second
        return self._free


class _Sent(NamedTuple):
    stem: str
    kind: int


class Remote:
    """The place that is shared, and what is asked of it."""

    def __init__(self, setup: Setup, figures: Figures) -> None:
        self.setup, self.figures = setup, figures
        self.stock = Stock(setup.sizes)
        self._pipe = _Pipe(setup.place.to_all)
        self._there: set[_Sent] = set()

    def _directory(self, kind: str, directory: str) -> int:
        return self.stock.names(kind, directory) + self.setup.place.strangers // SHARDS

    def _pages(self, kind: str, directories: Sequence[str], cells: int) -> tuple[int, int]:
        """The pages of a listing: all of them, and the most that follow one upon another."""
        if self.setup.listing == BY_KEY:
            return cells, -(-cells // THREADS)
        each = [max(1, -(-self._directory(kind, d) // PAGE)) for d in directories]
        return sum(each), max(max(each), -(-sum(each) // THREADS))

    def listed(self, cells: Sequence[str], kinds: Sequence[str]) -> float:
        """List what there is of cells, of all kinds at once; return how long it takes."""
        directories = sorted({shard(key) for key in cells})
        asked = [self._pages(kind, directories, len(cells)) for kind in kinds]
        self.figures.lists += sum(pages for pages, _ in asked)
        return self.setup.place.latency * max(rounds for _, rounds in asked)

    def moved(self, files: Sequence[Block | Snapshot], now: float) -> float:
        """When files that begin to move now have moved."""
        place, size = self.setup.place, sum(file.size for file in files)
        alone = now + place.latency * -(-len(files) // THREADS) + size / place.to_machine
        return max(alone, self._pipe.through(size, now)) if files else now

    def lacks(self, file: Block | Snapshot, kind: int) -> bool:
        """Whether a list does not show these bits of a file."""
        return _Sent(file.stem, _kind(file, kind)) not in self._there

    def arrive(self, files: Sequence[Block | Snapshot], kind: int, now: float) -> None:
        """Files are there, and are listed from now on."""
        for file in files:
            sent = _Sent(file.stem, _kind(file, kind))
            if sent not in self._there:
                self._there.add(sent)
                self.figures.distinct += file.size
        self.stock.add(files, now)
        self.figures.objects = len(self._there)


def _kind(file: Block | Snapshot, kind: int) -> int:
    return file.kind if isinstance(file, Block) else kind


class _Host:
    """One machine: what waits for it, what it holds, and until when it lets the remote be."""

    def __init__(self, setup: Setup, kind: int) -> None:
        self.stock = Stock(setup.sizes)
        self.kind = kind
        self.waiting: deque[Request] = deque()
        self.busy = self.sending = False
        self.to_send: deque[tuple[list[Block], list[Block | Snapshot]]] = deque()
        self.let_be = -1.0
        self._memory: OrderedDict[str, int] = OrderedDict()
        self._room = setup.machine.memory

    def in_memory(self, stem: str) -> bool:
        """Whether the rows of a block are in memory."""
        return stem in self._memory

    def hold(self, blocks: Sequence[Block]) -> None:
        """Hold the rows of blocks in memory, and let go of those that were used least lately."""
        for block in blocks:
            self._room += self._memory.pop(block.stem, 0)
            self._memory[block.stem] = block.size
            self._room -= block.size
        while self._room < 0 and self._memory:
            self._room += self._memory.popitem(last=False)[1]


class _Job(NamedTuple):
    """What is to be kept: the keys of a prompt and its answer, and where states end."""

    keys: Keys
    ends: tuple[int, ...]


class Simulation:
    """One run of a fleet over requests."""

    def __init__(self, setup: Setup, seed: int) -> None:
        self._setup, self._seed = setup, seed
        self.figures = Figures()
        self.remote = Remote(setup, self.figures)
        self.hosts: dict[int, _Host] = {}
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._count = 0

    def run(self, requests: Sequence[Request]) -> Figures:
        """Let the requests arrive, and return the figures when all is done."""
        with cells_of(self._setup.cell):
            draw = random.Random(self._seed)
            for request in requests:
                number = request.session if self._setup.affinity else draw.randrange(1 << 30)
                self._at(request.at, self._arrival(number % self._setup.machines, request))
            while self._events:
                at, _, event = heapq.heappop(self._events)
                event(at)
        self.figures.requests = len(requests)
        self.figures.seconds = requests[-1].at - requests[0].at if len(requests) > 1 else 1.0
        return self.figures

    def _at(self, when: float, event: Callable[[float], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (when, self._count, event))

    def _host(self, number: int) -> _Host:
        if number not in self.hosts:
            self.hosts[number] = _Host(self._setup, number % self._setup.kinds)
        return self.hosts[number]

    # A prompt

    def _arrival(self, number: int, request: Request) -> Callable[[float], None]:
        def arrive(now: float) -> None:
            host = self._host(number)
            host.waiting.append(request)
            if not host.busy:
                self._begin(host, now)

        return arrive

    def _begin(self, host: _Host, now: float) -> None:
        host.busy = True
        request = host.waiting.popleft()
        prompt = tokens_of(request.prompt, self._seed)
        seconds = self._prefill(host, prompt, now)
        self.figures.first_token.append(now + seconds - request.at)
        tokens = prompt
        if request.keeps_answer:
            tokens = prompt + tokens_of((request.answer,), self._seed)
        self._at(now + seconds, lambda at: self._end(host, at))
        if self._setup.mode != RECOMPUTE:
            job = _Job(Keys(ROOT, tokens), tuple(sorted({len(prompt), len(tokens)})))
            answered = now + seconds + (len(tokens) - len(prompt)) / self._decoded
            self._at(answered, lambda at: self._keep(host, job, at))

    @property
    def _decoded(self) -> float:
        return self._setup.machine.decoded_per_second

    def _end(self, host: _Host, now: float) -> None:
        host.busy = False
        if host.waiting:
            self._begin(host, now)

    def _prefill(self, host: _Host, prompt: Sequence[int], now: float) -> float:
        """Seconds until the state of a prompt is there; counts where its tokens came from."""
        if self._setup.mode == RECOMPUTE:
            self.figures.tokens[COMPUTED] += len(prompt)
            return len(prompt) / self._setup.machine.tokens_per_second
        keys = Keys(ROOT, prompt)
        walk, waited, came = host.stock.walk(keys), 0.0, set[str]()
        if self._setup.mode == SHARED and len(prompt) - walk.position >= LEAST_TOKENS:
            waited, came = self._bring(host, keys, walk, now)
            if came:
                walk = host.stock.walk(keys)
        return waited + self._resume(host, walk, len(prompt), came, now)

    def _resume(self, host: _Host, walk: Walk, n: int, came: set[str], now: float) -> float:
        machine, tokens = self._setup.machine, self.figures.tokens
        read = drive = 0
        for block, rows in walk.steps:
            tier = MEMORY if host.in_memory(block.stem) else DISK
            tier = REMOTE if block.stem in came else tier
            tokens[tier] += rows
            read += 0 if tier == MEMORY else block.size
            drive += block.size if tier == DISK else 0
        host.stock.used.update(dict.fromkeys(walk.stems, now))
        host.hold([block for block, _ in walk.steps])
        tokens[COMPUTED] += n - walk.position
        computing = (n - walk.position) / machine.tokens_per_second
        return computing + read / machine.restored_per_second + drive / machine.disk_per_second

    # From the remote

    def _bring(self, host: _Host, keys: Keys, walk: Walk, now: float) -> tuple[float, set[str]]:
        """Bring what a prompt could use; return how long that took and which blocks came."""
        n = len(keys.tokens)
        if now < host.let_be:
            return 0.0, set()
        computing = (n - walk.position) / self._setup.machine.tokens_per_second
        patience = min(PATIENCE_SECONDS, computing)
        cells = [keys[start] for start in range(0, n + 1, tree.CELL)]
        seconds = self.remote.listed(cells, (BLOCKS, SNAPSHOTS))
        state, blocks, position = self._wanted(host, keys)
        if position < walk.position + LEAST_TOKENS:
            return self._waited(host, seconds, patience, now), set()
        if self._is_slower(blocks, position - walk.position):
            self.figures.not_worth += 1
            return self._waited(host, seconds, patience, now), set()
        lacking = [b for b in state.blocks if b.stem not in host.stock.blocks] if state else []
        if lacking:  # they are looked for when the snapshot has come
            seconds += self.remote.listed([b.cell_key for b in lacking], (BLOCKS,))
        files: list[Block | Snapshot] = [*([state] if state is not None else []), *blocks]
        self.figures.gets += len(files)
        self.figures.got += sum(file.size for file in files)
        seconds = self.remote.moved(files, now + seconds) - now
        over, kept = self._over(host, files), [*walk.stems, *(file.stem for file in files)]
        if over and not self._evict(host, over, kept, now):
            return self._waited(host, seconds, patience, now), set()
        self._store(host, files, now, came=True)
        waited = self._waited(host, seconds, patience, now)
        return waited, {b.stem for b in blocks} if waited == seconds else set()

    def _waited(self, host: _Host, seconds: float, patience: float, now: float) -> float:
        """How long a prompt waits; what comes later is here for the next one."""
        if seconds > patience:
            self.figures.late += 1
            if patience == PATIENCE_SECONDS or not self._setup.forgiving:
                host.let_be = now + patience + LET_BE_SECONDS
        return min(seconds, patience)

    def _wanted(self, host: _Host, keys: Keys) -> tuple[Snapshot | None, list[Block], int]:
        """The deepest snapshot, blocks that lack here, and how far all that leads."""
        there = self.remote.stock
        walk = there.whole(keys)
        parts = sorted(there.beginning(keys, walk.position), key=lambda b: b.size)[:TRIED_PARTS]
        state = there.deepest_state(keys)
        wanted = {block.stem: block for block, _ in walk.steps} | {b.stem: b for b in parts}
        if state is not None and state.stem in host.stock.snapshots:
            state = None
        if state is not None:
            wanted |= {block.stem: block for block in state.blocks}
        goal = min(len(keys.tokens), walk.position + (cell_end(0) if parts else 0))
        position = max(goal, state.position if state is not None else 0)
        return state, [b for b in wanted.values() if b.stem not in host.stock.blocks], position

    def _is_slower(self, blocks: Sequence[Block], tokens: int) -> bool:
        size = sum(block.size for block in blocks)
        if size < LEAST_BYTES:
            return False
        reading = size / self._setup.place.to_machine
        computing = tokens / self._setup.machine.tokens_per_second
        return reading > SLOWER * computing and reading > computing + WAIT_SECONDS

    # What is kept, and sent

    def _keep(self, host: _Host, job: _Job, now: float) -> None:
        for end in job.ends:
            keys = Keys(ROOT, job.keys.tokens[:end])
            walk = host.stock.walk(keys)
            added = self._make_room(host, keys, walk, end, now)
            if added is not None:
                self._store(host, added, now, came=False)
                blocks = [file for file in added if isinstance(file, Block)]
                host.hold(blocks)
                path = [block for block, _ in walk.steps]
                wanted = bool(added if self._setup.sends_all else path)
                if wanted and self._setup.mode == SHARED and now >= host.let_be:
                    host.to_send.append((path, added if self._setup.sends_all else []))
        if host.to_send and not host.sending:
            self._send(host, now)

    def _make_room(
        self, host: _Host, keys: Keys, walk: Walk, end: int, now: float
    ) -> list[Block | Snapshot] | None:
        """What a save adds, once there is room for it; None if there is none."""
        kept = walk.stems
        while True:  # what a save would have used again may be evicted
            added = host.stock.missing(keys, walk, end, host.kind)
            if not (over := self._over(host, added)):
                return added
            if not self._evict(host, over, kept, now):
                return None

    def _over(self, host: _Host, files: Sequence[Block | Snapshot]) -> int:
        """By how many bytes a store with these files would be larger than its budget."""
        needed = sum(on_disk(file.size) for file in self._new(host, files))
        return max(0, host.stock.bytes + needed - self._setup.machine.budget)

    def _new(self, host: _Host, files: Sequence[Block | Snapshot]) -> list[Block | Snapshot]:
        stock = host.stock
        return [f for f in files if f.stem not in stock.blocks and f.stem not in stock.snapshots]

    def _evict(self, host: _Host, over: int, kept: Sequence[str], now: float) -> bool:
        freed = host.stock.evict(over + self._setup.machine.budget // SPARE, kept, now)
        self.figures.evicted += freed
        self.figures.refused += freed < over
        return freed >= over

    def _store(
        self, host: _Host, files: Sequence[Block | Snapshot], now: float, *, came: bool
    ) -> None:
        """Add files to a store that has room for them."""
        size = sum(file.size for file in self._new(host, files))
        self.figures.copied += size if came else 0
        self.figures.written += 0 if came else size
        host.stock.add(files, now)

    def _send(self, host: _Host, now: float) -> None:
        """Send what a list does not show, one state after the other."""
        host.sending = True
        path, added = host.to_send.popleft()
        blocks = [*path, *(file for file in added if isinstance(file, Block))]
        cells = list({block.cell_key: None for block in blocks})
        seconds = self.remote.listed(cells, (BLOCKS,))
        if added:
            seconds += self.remote.listed(cells[-1:], (SNAPSHOTS,))
        missing = [file for file in [*path, *added] if self.remote.lacks(file, host.kind)]
        self.figures.puts += len(missing)
        self.figures.put += sum(file.size for file in missing)

        def sent(at: float) -> None:
            self.remote.arrive(missing, host.kind, at)
            host.sending = False
            if host.to_send:
                self._send(host, at)

        self._at(self.remote.moved(missing, now + seconds), sent)
