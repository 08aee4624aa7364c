"""The house: imports go down only, and nothing below the layers waits for MLX."""

from __future__ import annotations

import ast
import functools
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import mlx_promptcache
import processes

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = "mlx_promptcache"
SOURCE = Path(mlx_promptcache.__file__).parent

# From the floor to the roof: a module may import those above its own line, and no others.
FLOORS = [
    "errors",
    "version",
    "__init__",
    "codec",
    "container",
    "memo",
    "namespaces",
    "connections",
    "privacy",
    "files",
    "locks",
    "places",
    "directory",
    "names",
    "uses",
    "layout",
    "store",
    "budget",
    "deletion",
    "tree",
    "windows",
    "passes",
    "models",
    "fingerprint",
    "quarantine",
    "headers",
    "journal",
    "facts",
    "eviction",
    "room",
    "catalog",
    "prefixes",
    "report",
    "verification",
    "synced",
    "writer",
    "beginnings",
    "finder",
    "reasons",
    "match",
    "cuts",
    "parcel",
    "signatures",
    "exporter",
    "importer",
    "compression",
    "rates",
    "remote",
    "hub",
    "arrivals",
    "moved",
    "sender",
    "receiver",
    "sharing",
    "supply",
    "templates",
    "outlines",
    "engine",
    "ranks",
    "streams",
    "planes",
    "exponentials",
    "softmax",
    "causal",
    "swiglu",
    "attention",
    "arrays",
    "unwritten",
    "mapped",
    "checkpoint",
    "layers",
    "pair",
    "blueprint",
    "feeding",
    "growth",
    "working",
    "window_rows",
    "ahead",
    "rows",
    "arithmetic",
    "token_table",
    "excerpts",
    "tokenizer",
    "tokenizer_trial",
    "tokenizer_store",
    "sampling",
    "state",
    "parts",
    "prompt",
    "loader",
    "restorer",
    "saver",
    "lent",
    "cache",
    "shard_cache",
    "limits",
    "traits",
    "trunk",
    "run",
    "speculative",
    "runner",
    "mlx_lm_file",
    "handover",
    "conversation",
    "shared_rows",
    "wave",
    "batch",
    "backlog",
    "tiers",
    "host",
    "server",
    "timing",
    "machine",
    "memory",
    "programs",
    "plots",
    "benchmark",
    "cli.output",
    "cli.names",
    "cli.__init__",
    "cli.interrupt",
    "cli.options",
    "cli.choices",
    "cli.session",
    "cli.prompts",
    "cli.drawing",
    "cli.list",
    "cli.show",
    "cli.clear",
    "cli.verify",
    "cli.prune",
    "cli.export",
    "cli.import_",
    "cli.match",
    "cli.transfer",
    "cli.push",
    "cli.pull",
    "cli.report",
    "cli.completion",
    "cli.save",
    "cli.load",
    "cli.generate",
    "cli.memory",
    "cli.terminal",
    "cli.markdown",
    "cli.chat",
    "cli.jsonl",
    "cli.batch",
    "cli.bench",
    "cli.serve",
    "__main__",
]

WITHOUT_MLX = FLOORS[: FLOORS.index("engine")]
COMMANDS_WITHOUT_MLX = [
    "cli.__init__", "cli.list", "cli.show", "cli.clear", "cli.verify", "cli.export", "cli.import_",
    "cli.prune", "cli.report", "cli.completion", "cli.push", "cli.pull",
]  # fmt: skip
VAGUE = {"utils", "util", "helpers", "common", "base", "manager", "misc", "core"}
UNSAFE = {"pickle", "marshal", "shelve", "dill", "joblib", "torch"}  # what loads code from files


@functools.cache
def imports_of(module: str) -> dict[str, int]:
    """All that a module imports when it runs, with the line: no imports for types alone."""
    path = SOURCE.joinpath(*module.split(".")).with_suffix(".py")
    found: dict[str, int] = {}
    for node in _that_run(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found.update((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno} imports by a relative name"
            for alias in node.names:  # `from package import module`, or `from module import name`
                found[f"{node.module}.{alias.name}"] = node.lineno
    return found


def _that_run(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            for other in child.orelse:
                yield from _that_run(other)
            continue
        yield child
        yield from _that_run(child)


def floor_of(imported: str) -> str | None:
    """The module of ours that an imported name is, or is in; None if it is another's."""
    parts = imported.split(".")
    if parts[0] != PACKAGE:
        return None
    for length in range(len(parts), 0, -1):
        inside = SOURCE.joinpath(*parts[1:length])
        if length > 1 and inside.with_suffix(".py").is_file():
            return ".".join(parts[1:length])
        if (inside / "__init__.py").is_file():
            return ".".join([*parts[1:length], "__init__"])
    raise AssertionError(f"there is no module {imported}")


def test_every_module_has_its_floor() -> None:
    paths = (path.relative_to(SOURCE).with_suffix("") for path in SOURCE.rglob("*.py"))
    assert sorted(".".join(path.parts) for path in paths) == sorted(FLOORS)


@pytest.mark.parametrize("module", FLOORS)
def test_imports_go_down_only(module: str) -> None:
    below = FLOORS[: FLOORS.index(module)]
    ours = {name: floor_of(name) for name in imports_of(module)}
    wrong = [
        f"line {imports_of(module)[name]} imports {name}"
        for name, floor in ours.items()
        if floor is not None and floor not in below
    ]
    assert wrong == []


def test_the_imports_are_seen() -> None:
    """Some that are there, so that the test above cannot pass by seeing none."""
    assert {floor_of(name) for name in imports_of("container")} >= {"codec", "errors"}
    assert "mlx_promptcache.headers" in imports_of("finder")
    assert "mlx.core" in imports_of("layers")
    assert floor_of("mlx_promptcache.cli.output") == "cli.output"
    assert floor_of("mlx_promptcache.store.Store") == "store"
    assert floor_of("mlx_promptcache.cli.main") == "cli.__init__"
    assert floor_of("mlx_promptcache.Runner") == "__init__"
    assert floor_of("mlx.core") is None
    typed = "mlx_promptcache.quarantine.Quarantine"  # for types alone
    assert typed not in imports_of("finder")
    assert typed.rpartition(".")[0] in (SOURCE / "finder.py").read_text("utf-8")


@pytest.mark.parametrize("module", FLOORS)
def test_no_module_is_named_for_anything_and_nothing(module: str) -> None:
    assert not VAGUE & set(module.split("."))


@pytest.mark.parametrize("module", FLOORS)
def test_nothing_that_loads_code_from_files_is_imported(module: str) -> None:
    assert not UNSAFE & {name.partition(".")[0] for name in imports_of(module)}


@pytest.mark.parametrize("module", WITHOUT_MLX)
def test_mlx_is_first_imported_above_the_files(module: str) -> None:
    assert not {"mlx", "mlx_lm"} & {name.partition(".")[0] for name in imports_of(module)}


IMPORTING = """
import importlib, json, sys
waited = []
for module in sys.argv[1:]:
    importlib.import_module(module)
    if {"mlx", "mlx_lm", "transformers"} & set(sys.modules):
        waited.append(module)
print(json.dumps(waited))
"""


def imported_names(modules: list[str]) -> list[str]:
    return [f"{PACKAGE}.{module}".removesuffix(".__init__") for module in modules]


def test_what_is_below_the_layers_does_not_wait_for_mlx() -> None:
    assert processes.python(IMPORTING, *imported_names(WITHOUT_MLX)) == []


@pytest.mark.parametrize("command", COMMANDS_WITHOUT_MLX)
def test_commands_that_only_look_do_not_wait_for_mlx(command: str) -> None:
    assert processes.python(IMPORTING, *imported_names([command])) == []


def test_what_waits_for_mlx_is_seen() -> None:
    assert processes.python(IMPORTING, f"{PACKAGE}.errors", f"{PACKAGE}.layers") == [
        f"{PACKAGE}.layers"
    ]
