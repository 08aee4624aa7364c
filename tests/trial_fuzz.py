"""Hostile inputs for everything that reads files, led by the lines that they reach.

The long form runs atheris (`pip install '.[fuzz]'`) in a process of its own; the short one, in
`test_fuzz.py`, changes the same seeds without being led. Whatever is read is read whole, or refused
by an error of ours: anything else ends the trial.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":  # what leads has to see each line as it is imported
    import atheris

    with atheris.instrument_imports(include=["mlx_promptcache"]):
        from mlx_promptcache import facts, parcel, passes, rates

from mlx_promptcache import (
    codec,
    container,
    exporter,
    facts,
    fingerprint,
    headers,
    parcel,
    passes,
    places,
    rates,
)
from mlx_promptcache.container import SEAL_BYTES, Header
from mlx_promptcache.errors import PromptCacheError
from mlx_promptcache.names import check_name
from mlx_promptcache.store import Store
from mlx_promptcache.tree import BlockName, SnapshotName
from outcome import Outcome, parser

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Target = Callable[[bytes], None]

GOLDEN = Path(__file__).parent / "golden"
INPUTS = 1_000_000
MOST_MEMORY_MB = 256
LONGEST_INPUT = 16_384
LONGEST_SENTENCE = 2500  # a name of 200 characters that are no letters is escaped
SEED_BYTES = 12_000  # larger files make slow seeds, and say nothing more
DONE = re.compile(r"Done (\d+) (?:runs )?in (\d+) second")
COVERED = re.compile(r"cov: (\d+)")


# What is tried: each takes any bytes


def whole_file(data: bytes) -> None:
    """A file as it stands; hardly any gets past its seal."""
    use(read_header(data), data)


def sealed_file(data: bytes) -> None:
    """A header, a zero, the arrays: sealed as it should be."""
    text, _, payload = data.partition(b"\0")
    file = sealed(text, payload)
    use(read_header(file), file)


def own_header(data: bytes) -> None:
    """Our own header, a zero, the arrays: in a safetensors file that agrees with it."""
    text, _, payload = data.partition(b"\0")
    inner = text.decode("utf-8", "replace")
    metadata = {"format": container.FORMAT, "version": container.VERSION, "header": inner}
    outer = {"__metadata__": metadata, **container._tensors(sizes_of(inner))}
    file = sealed(json.dumps(outer).encode(), payload)
    use(read_header(file), file)


def plane(data: bytes) -> None:
    """A compressed plane."""
    size = int.from_bytes(data[:3], "little")
    codec.decode_plane(codec.Plane(codec.ZSTD, data[3:]), size)


def names(data: bytes) -> None:
    """The name of a file, in the store and as users give it."""
    text = data.decode("utf-8", "surrogateescape")
    for kind in (BlockName, SnapshotName):
        parsed: Any = kind.parse(text)
        assert parsed is None or str(parsed) == text
    checked = check_name(text)
    assert Path("names", checked).parent == Path("names")


def files_of_a_store(data: bytes) -> None:
    """A name and statistics, as files."""
    store = _store()
    (store.directory / "names" / "x").write_bytes(data)
    (store.directory / "uses.jsonl").write_bytes(data)
    assert all(isinstance(use, dict) for use in store.uses.all())
    assert set(store.names.all()) == {"x"}
    store.names.read("x")


def memos(data: bytes) -> None:
    """What this program keeps in the user's cache directory, with the right checksum."""
    path = _store().directory.parent / "memo"
    text = data.decode("ascii", "replace").replace("\ufffd", "?")
    path.write_text(f"{facts._checksum(text)}\n{text}", "ascii")
    facts._Known.load(path)
    path.write_text(f"{fingerprint._hash(text.encode())}\n{text}", "ascii")
    fingerprint.Memo.load(path)
    places.rates_memo().parent.mkdir(parents=True, exist_ok=True)
    places.rates_memo().write_bytes(data)
    rates.Rates(Path("x"), "y").reading_is_slower(1 << 40, 1)


TARGETS: tuple[Target, ...] = (
    whole_file, sealed_file, own_header, own_header, own_header, plane, names, files_of_a_store,
    memos,
)  # fmt: skip


def try_one(data: bytes) -> bool:
    """Give an input to the target that its first byte says; return whether it was refused.

    Raises what nobody should see.
    """
    try:
        TARGETS[data[0] % len(TARGETS) if data else 0](data[1:])
    except PromptCacheError as exc:
        said = str(exc)
    else:
        return False
    assert said.isprintable()
    assert 0 < len(said) < LONGEST_SENTENCE
    return True


def use(header: Header, data: bytes) -> None:
    """Do with a header what the program does with those that it finds."""
    read: container.Read = lambda offset, length: data[offset : offset + length]  # noqa: E731
    for entry in header.entries.values():
        with contextlib.suppress(PromptCacheError):
            container.read_array(read, entry)
        with contextlib.suppress(PromptCacheError):
            into = bytearray(container.raw_bytes(entry.dtype, entry.shape))
            container.read_planes(read, _into(data), entry, memoryview(into))
    headers.fingerprint_parts(header)
    headers.noted_number(header, "made")
    block, snapshot = stems_of(header)
    with contextlib.suppress(PromptCacheError):
        headers.checked_block(header, block)
        headers.window_span(header)
        passes.record_of(header)
        facts._block(header, block)
    with contextlib.suppress(PromptCacheError):
        headers.checked_snapshot(header, snapshot)
        headers.windows_of(header)
        headers.has_window_rows(header)
        headers.root_of(header)
        facts._snapshot(header, snapshot)
    with contextlib.suppress(PromptCacheError):
        parcel.opened(header)


def _into(data: bytes) -> container.ReadInto:
    def read_into(offset: int, memory: memoryview) -> int:
        found = data[offset : offset + len(memory)]
        memory[: len(found)] = found
        return len(found)

    return read_into


def stems_of(header: Header) -> tuple[str, str]:
    """The names that a block and a snapshot with this header would have."""
    told = header.content
    first = (told.get("tokens") or [0])[:1] if isinstance(told.get("tokens"), list) else [0]
    start, end = told.get("start_key"), told.get("end_key")
    n, cell = told.get("n_past"), told.get("cell_key")
    offset = n % 256 if isinstance(n, int) else 0
    block = f"{str(start)[:2]}/{start}-{first[0] if first else 0}-{end}"
    return block, f"{str(cell)[:2]}/{cell}-{offset}-{told.get('key')}-{header.digest[:16]}"


def read_header(data: bytes) -> Header:
    """The header of a file."""
    return container.read_header(lambda offset, length: data[offset : offset + length], len(data))


def sealed(text: bytes, payload: bytes) -> bytes:
    """A file with this header, whatever it says, and the right checksum over it."""
    head = len(text).to_bytes(8, "little") + text
    return head + hashlib.sha256(head).digest() + payload


def sizes_of(inner: str) -> dict[str, int]:
    """How many bytes the arrays of a header take in the file; none, if that cannot be said."""
    try:
        table = json.loads(inner)["arrays"]
        return {name: int(container._stored_bytes(row)) for name, row in table.items()}
    except Exception:  # noqa: BLE001 - it is no header, then
        return {}


def _store() -> Store:
    global _opened
    if _opened is None:
        directory = Path(tempfile.mkdtemp())
        os.environ["XDG_CACHE_HOME"] = str(directory)
        _opened = Store(directory / "store")
        _opened.create()
    return _opened


_opened: Store | None = None


def forget() -> None:
    """Delete what was made to be read."""
    global _opened
    if _opened is not None:
        shutil.rmtree(_opened.directory.parent, ignore_errors=True)
        _opened = None


# What it begins with


def seeds() -> list[bytes]:
    """Sound inputs of every kind, from the golden files."""
    found = [b"\x06" + path.stem.encode() for path in (GOLDEN / "store").rglob("*.safetensors")]
    for path in [GOLDEN / "block-v1.safetensors", *sorted((GOLDEN / "store").rglob("*.safetens*"))]:
        data = path.read_bytes()
        if len(data) <= SEED_BYTES:
            found += list(_of_file(data))
    found += _of_file(_parcel())
    found.append(b"\x07" + (GOLDEN / "store" / "names" / "rows").read_bytes())
    found.append(b'\x07{"when": 1.5, "what": "ab", "rows": 7, "seconds": 0.1}\n')
    known = {"blocks": [["a", 1, 2, 3, 4, "d", 5]], "fingerprints": ["{}"], "used": [["a", "d"]]}
    known["snapshots"] = [["s", 1, 2, 3, 4, 9, 8, 7.5, 0, [0], [9]]]
    found.append(b"\x08" + json.dumps(known).encode())
    found.append(b'\x08{"read /x": 1.5, "compute y": 3, "/model": [1, 2, 3, 4, "ab"]}')
    return found


def _parcel() -> bytes:
    """A state in a file of its own."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "parcel"
        exporter.export(Store(GOLDEN / "store", read_only=True), "rows", path)
        return path.read_bytes()


def _of_file(data: bytes) -> Iterator[bytes]:
    length = int.from_bytes(data[:8], "little")
    outer, payload = data[8 : 8 + length], data[8 + length + SEAL_BYTES :]
    yield b"\0" + data
    yield b"\1" + outer + b"\0" + payload
    yield b"\2" + json.loads(outer)["__metadata__"]["header"].encode() + b"\0" + payload
    header = read_header(data)
    for entry in header.entries.values():
        offset = entry.offset
        for name, size in entry.planes:
            if name == codec.ZSTD:
                items = container.raw_bytes(entry.dtype, entry.shape) // len(entry.planes)
                yield b"\5" + items.to_bytes(3, "little") + data[offset : offset + size]
            offset += size


WORDS = [
    b"0", b"-1", b"1e999", b"1.0", b"true", b"null", b'""', b"{}", b"[]", b"[[[[[[", b'{"a":' * 40,
    b"18446744073709551616", b"9" * 400, b"NaN", b"-Infinity", b'"\\ud800"', b"\\u0000", b"\0",
    b"../", b"\xff\xff\xff\xff", b"[" * 5000,
]  # fmt: skip


def changed(data: bytes, draw: random.Random, words: Sequence[bytes] = tuple(WORDS)) -> bytes:
    """An input with some bytes changed, cut, doubled, or replaced by words."""
    made = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4, 9))):
        at = 1 + draw.randrange(max(1, len(made) - 1))
        end = at + draw.choice((0, 1, 1, 2, 8, 64, len(made)))
        how = draw.randrange(5)
        if how == 0 and at < len(made):
            made[at] ^= 1 << draw.randrange(8)
        elif how == 1:
            made[at:end] = draw.choice(words)
        elif how == 2:
            made[at:end] = b""
        elif how == 3:
            made[at:at] = made[at:end]
        else:
            numbers = list(re.finditer(rb"\d+|\"[^\"]*\"", made))
            if numbers:
                found = draw.choice(numbers)
                made[found.start() : found.end()] = draw.choice(words)
    return bytes(made)


# The long form


def main(argv: Sequence[str]) -> int:
    """Run the trial and tell what came of it."""
    options = parser("fuzz", __doc__)
    options.add_argument("--inputs", type=int, default=INPUTS, help="how many (default 1,000,000)")
    asked = options.parse_args(argv)
    if importlib.util.find_spec("atheris") is None:
        print("atheris is not installed: .venv/bin/pip install '.[fuzz]'", file=sys.stderr)
        return 2
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # a drive would be worn for nothing
    with tempfile.TemporaryDirectory(dir=memory) as directory:
        told = _led(asked.inputs, asked.seed, Path(directory))
    return told.tell(as_json=asked.json)


def _led(inputs: int, seed: int, directory: Path) -> Outcome:
    corpus = directory / "corpus"
    corpus.mkdir()
    for number, data in enumerate(seeds()):
        (corpus / f"{number:04d}").write_bytes(data)
    words = "\n".join(f'"{_quoted(word)}"' for word in WORDS if len(word) < 64)
    (directory / "words").write_text(words + "\n", "ascii")
    command = [
        sys.executable, __file__, f"-runs={inputs}", f"-seed={seed}", f"-max_len={LONGEST_INPUT}",
        f"-rss_limit_mb={MOST_MEMORY_MB}", f"-dict={directory / 'words'}", "-timeout=20",
        "-print_final_stats=1", f"-artifact_prefix={directory}/", str(corpus),
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, errors="replace",
        env={**os.environ, "TMPDIR": str(directory)},
    )  # fmt: skip
    ran = DONE.search(done.stderr)
    peak_mb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    wrong = [] if done.returncode == 0 and ran else [_why(done, directory)]
    if peak_mb >= MOST_MEMORY_MB:
        wrong.append(f"it took {peak_mb:.0f} MB of memory")
    covered = COVERED.findall(done.stderr)
    figures = {
        "inputs": int(ran[1]) if ran else 0,
        "seconds": int(ran[2]) if ran else 0,
        "places in the code reached": int(covered[-1]) if covered else 0,
        "inputs kept as they reached something new": len(list(corpus.iterdir())) - len(seeds()),
        "MB of memory at most": round(peak_mb),
    }
    return Outcome("fuzz", seed, figures, wrong)


def _quoted(word: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word)


def _why(done: subprocess.CompletedProcess[str], directory: Path) -> str:
    left = [path for path in directory.iterdir() if path.name.startswith(("crash", "oom", "time"))]
    inputs = "; ".join(f"{path.name}: {path.read_bytes()!r}" for path in left)
    return f"{done.stdout[-3000:]} {done.stderr[-3000:]} {inputs}"


def _child() -> None:
    def one(data: bytes) -> None:
        try_one(data)

    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    _child()
