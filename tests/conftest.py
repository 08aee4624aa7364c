"""What all tests share: the real model, and an order that puts the fast tests first."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mlx_promptcache import places
from workers import Scheduling

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent
CACHE = pytest.StashKey[str]()
FIGURES = pytest.StashKey[list[str]]()
"""Lines that the end of a session shows: what was measured on the way."""
REAL_MODEL = places.demo_model()
# Tests that start processes, then those that run the real model. The last are in so many parts that
# workers end at about the same time.
LAST = (
    "test_completion", "test_report_page", "test_examples", "test_adapters", "test_kv_settings",
    "test_engine", "test_benchmark", "test_cli", "test_chat", "test_batch", "test_sharing",
    "test_kill", "test_many", "test_ranks", "test_server", "test_scripts", "test_real",
    "test_conformance",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Give the session, and all processes that it starts, a user's cache directory of its own.

    With workers each has its own, and this process none: they look for the real model in the
    user's. What they measure is sent here when they end.
    """
    config.stash[FIGURES] = []
    if hasattr(config, "workeroutput"):
        config.workeroutput["figures"] = config.stash[FIGURES]
    elif config.getoption("tx", None):
        return
    config.stash[CACHE] = tempfile.mkdtemp(prefix="mlx-promptcache-tests-")
    os.environ["XDG_CACHE_HOME"] = config.stash[CACHE]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling:
    """Let workers share the tests in units."""
    return Scheduling(config, log)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object | None) -> None:
    """Take what a worker measured; one that was killed sends nothing."""
    node.config.stash[FIGURES] += getattr(node, "workeroutput", {}).get("figures", [])


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Show what was measured on the way."""
    if config.stash[FIGURES]:
        terminalreporter.section("measured on the way, not judged (see scripts/bench)")
        for line in config.stash[FIGURES]:
            terminalreporter.write_line(line)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Leave nothing behind."""
    if CACHE in config.stash:
        shutil.rmtree(config.stash[CACHE], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def slowness(item: pytest.Item) -> int:
        return LAST.index(item.path.stem) + 1 if item.path.stem in LAST else 0

    items.sort(key=slowness)


@pytest.fixture(autouse=True)
def _own_surroundings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test sees the user's settings, and notices reach `caplog` again after a command ran."""
    for name in list(os.environ):
        if name.startswith("MLX_PROMPTCACHE"):
            monkeypatch.delenv(name)
    # What the drive here happens to have free is no matter of theirs either.
    monkeypatch.setenv("MLX_PROMPTCACHE_MAX_SIZE", "20GB")
    monkeypatch.setenv("MLX_PROMPTCACHE_MIN_FREE", "0")
    yield
    log = logging.getLogger("mlx_promptcache")
    log.handlers, log.propagate = [], True
    log.setLevel(logging.NOTSET)


@pytest.fixture
def inferring() -> Iterator[None]:
    """As within a forward call of a runner."""
    from mlx_promptcache import exponentials

    with exponentials.inferring():
        yield


@pytest.fixture(scope="session")
def real_model() -> Path:
    """SmolLM2-135M-Instruct, float32, as `scripts/smollm2.py` brings it."""
    if REAL_MODEL is None:
        pytest.fail("the real model is not there: run scripts/test, which brings it")
    return REAL_MODEL
