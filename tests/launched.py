"""Runs a program in several processes that compute together, as `mlx.launch` would start them."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import processes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SECONDS = 120
TESTS = Path(__file__).parent


@contextlib.contextmanager
def started(
    size: int, *arguments: str | Path, only: dict[int, dict[str, str]] | None = None, **more: str
) -> Iterator[list[subprocess.Popen[str]]]:
    """The processes of `python *arguments`, by rank; `only` adds to the environment of some. They
    are ended with the block.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".json") as hosts:
        json.dump([[f"127.0.0.1:{port}"] for port in _free_ports(size)], hosts)
        hosts.flush()
        ring = {"MLX_HOSTFILE": hosts.name, "OPENBLAS_NUM_THREADS": "1"}
        ranks = [
            subprocess.Popen(
                [sys.executable, *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=TESTS,
                env=processes.environment(
                    **ring, **more, MLX_RANK=str(rank), **(only or {}).get(rank, {})
                ),
            )
            for rank in range(size)
        ]
        try:
            yield ranks
        finally:
            for rank in ranks:
                rank.kill()
                rank.communicate()


def ended(ranks: Sequence[subprocess.Popen[str]]) -> list[processes.Ended]:
    """How processes end, which they must."""
    outputs = [rank.communicate(timeout=SECONDS) for rank in ranks]
    return [
        processes.Ended(rank.returncode, out, _said(err))
        for rank, (out, err) in zip(ranks, outputs, strict=True)
    ]


def run(size: int, *arguments: str | Path, **more: Any) -> list[processes.Ended]:
    """Run the program `mlx-promptcache` on so many ranks."""
    with started(size, "-m", "mlx_promptcache", *arguments, **more) as ranks:
        return ended(ranks)


def python(size: int, source: str, *arguments: str | Path, **more: Any) -> list[Any]:
    """Run a Python program on so many ranks, and return the JSON that each prints."""
    with started(size, "-c", source, *arguments, **more) as ranks:
        results = ended(ranks)
    assert not any(result.code for result in results), [result.err for result in results]
    return [json.loads(result.out.splitlines()[-1]) for result in results]


def _said(err: str) -> str:
    """What a rank said, without what MLX's ring did."""
    return "".join(line for line in err.splitlines(keepends=True) if not line.startswith("[ring]"))


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
