"""Several processes share the tests: what stays together, and what they pass on."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import processes
from mlx_promptcache import places
from workers import unit_of

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    ("nodeid", "unit"),
    [
        ("tests/test_store.py::test_a[x]", "tests/test_store.py"),
        ("tests/test_store.py::test_b", "tests/test_store.py"),
        ("tests/test_conformance.py::test_a[qwen3]", "qwen3"),
        ("tests/test_conformance.py::test_b[qwen3]", "qwen3"),
        ("tests/test_conformance.py::test_b[Qwen 3]", "Qwen 3"),
        ("tests/test_conformance.py::test_of_all", "test_of_all"),
    ],
)
def test_a_unit_is_a_module_or_an_architecture(nodeid: str, unit: str) -> None:
    assert unit_of(nodeid) == unit


TESTS = """
import os
import pytest
from conftest import CACHE, FIGURES, REAL_MODEL

@pytest.mark.parametrize("name", ["x", "y"])
@pytest.mark.parametrize("number", [1, 2])
def test_it(name, number, request):
    config = request.config
    assert str(REAL_MODEL) == os.environ["EXPECTED"]
    assert os.environ["XDG_CACHE_HOME"] == config.stash[CACHE]
    assert os.path.isdir(config.stash[CACHE])
    worker = os.environ.get("PYTEST_XDIST_WORKER", "alone")
    config.stash[FIGURES].append(f"{request.path.stem} {worker} {config.stash[CACHE]}")
"""


def bring_model(user: Path) -> None:
    """A model where the user's is looked for, except on macOS."""
    model = user / "mlx_promptcache" / "demo" / places.DEMO_MODEL
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}", "utf-8")


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_run_whole_modules_and_what_they_measure_is_shown(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    bring_model(tmp_path / "user")
    monkeypatch.setenv("EXPECTED", str(places.demo_model()))
    for name in ("conftest.py", "workers.py"):
        shutil.copy(HERE / name, tmp_path)
    for name in ("one", "two", "three"):
        (tmp_path / f"test_{name}.py").write_text(TESTS, "utf-8")
    mine = {name: value for name, value in processes.environment().items() if "PYTEST" not in name}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", ".", "-n", str(workers)],
        cwd=tmp_path, env=mine, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = re.findall(r"^(test_\w+) (\w+) (\S+)$", done.stdout, re.MULTILINE)
    assert len(lines) == 12
    assert len({(module, worker) for module, worker, _ in lines}) == 3
    caches = {(worker, cache) for _, worker, cache in lines}
    assert len(caches) == len({worker for worker, _ in caches}) == max(workers, 1)
    assert not any(Path(cache).exists() for _, cache in caches)
