"""mlx-lm without all that it imports: in processes of their own, where nothing is imported yet."""

from __future__ import annotations

import builtins
import importlib
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import processes
import tiny
from mlx_promptcache import engine

HEAVY = ["transformers", "huggingface_hub", "numpy", "jinja2"]
CHECK = """
import json, sys
HEAVY = ["transformers", "huggingface_hub", "numpy", "jinja2"]
def heavy():
    return [name for name in HEAVY if name in sys.modules]
def stand_ins():
    "Names of modules of mlx-lm that do not hold what they should."
    own = [(n, m) for n, m in sys.modules.items() if n.split(".")[0] in ("mlx_lm", *HEAVY)]
    return [n for n, m in own if not hasattr(m, "__spec__") or m.__spec__ is None]
whole_import = __import__
"""


def python(source: str, *arguments: str | Path) -> Any:
    return processes.python(CHECK + source, *arguments)


# Importing


def test_importing_a_runner_imports_nothing_heavy() -> None:
    heavy, left, same, used = python("""
import mlx_promptcache.runner
from mlx_promptcache import engine
a = heavy()
engine.utils(), engine.tokenizer_utils()
used = [m.__name__ for m in (engine.utils(), engine.tokenizer_utils())]
private = [n for n in used if n in sys.modules]
import builtins
print(json.dumps([a + heavy() + private, stand_ins(), builtins.__import__ is whole_import, used]))
""")
    assert (heavy, left, same) == ([], [], True)
    assert used == ["mlx_lm.utils", "mlx_lm.tokenizer_utils"]


def test_what_an_answer_does_not_need_is_imported_after_it() -> None:
    """Each of these takes a millisecond or more of every start."""
    assert (
        python("""
import mlx_promptcache.runner
from mlx_promptcache import engine
engine.utils(), engine.tokenizer_utils()
names = ["shutil", "decimal", "secrets", "random"]
names += ["mlx_promptcache." + name for name in ("saver", "writer", "room", "deletion", "facts")]
print(json.dumps([name for name in names if name in sys.modules]))
""")
        == []
    )


USES = {
    "a name": "import mlx_lm; got = mlx_lm.load",
    "from the package": "from mlx_lm import generate; got = generate",
    "from a package with submodules": "from mlx_lm import stream_generate, utils; got = utils.load",
    "a submodule": "import mlx_lm.utils; got = mlx_lm.utils.load",
    "all names": "from mlx_lm import *; got = load",
    "its names": "import mlx_lm; assert 'load' in dir(mlx_lm); got = mlx_lm.load",
    "in a copy's wake": "engine.tokenizer_utils(); import mlx_lm; got = mlx_lm.load",
}


@pytest.mark.parametrize("use", ["a name", "all names", "its names", "in a copy's wake"])
def test_mlx_lm_works_as_ever_afterwards(use: str) -> None:
    module, kind, real, left = python(f"""
from mlx_promptcache import engine
assert not heavy()
exec({USES[use]!r})
import importlib, types, mlx_lm, mlx_lm.tokenizer_utils, mlx_lm.utils
real = mlx_lm.utils.TokenizerWrapper is mlx_lm.tokenizer_utils.TokenizerWrapper
real = real and issubclass(mlx_lm.tokenizer_utils.NewlineTokenizer, object)
real = real and mlx_lm.tokenizer_utils.AutoTokenizer.__module__.startswith("transformers")
assert importlib.import_module("mlx_lm") is mlx_lm is sys.modules["mlx_lm"]
print(json.dumps([got.__module__, type(mlx_lm) is types.ModuleType, real, stand_ins()]))
""")
    assert (module, kind, real, left) == ("mlx_lm.utils", True, True, [])


def test_submodules_and_names_come_in_any_order() -> None:
    names, quiet = python(f"""
from mlx_promptcache import engine
import os
quiet = os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"]
names = []
for use in {[USES[n] for n in ("a submodule", "from a package with submodules")]!r}:
    exec(use); names.append(got.__name__)
exec({USES["from the package"]!r}); names.append(got.__name__)
print(json.dumps([names, quiet]))
""")
    assert names == ["load", "load", "generate"]
    assert quiet == "1"  # as mlx-lm sets it before it imports transformers


def test_a_package_that_was_imported_before_is_left_alone() -> None:
    same, whole = python("""
import mlx_lm, mlx_lm.utils, mlx_lm.tokenizer_utils
before = dict(vars(mlx_lm))
from mlx_promptcache import engine
same = sys.modules["mlx_lm"] is mlx_lm and dict(vars(mlx_lm)) == before
whole = engine.utils() is mlx_lm.utils and engine.tokenizer_utils() is mlx_lm.tokenizer_utils
print(json.dumps([same, whole]))
""")
    assert (same, whole) == (True, True)


def test_a_module_that_is_imported_later_is_used_from_then_on() -> None:
    assert python("""
from mlx_promptcache import engine
import mlx_lm.utils
print(json.dumps(engine.utils() is mlx_lm.utils))
""")


def test_looking_at_the_package_imports_nothing() -> None:
    seen = python("""
from mlx_promptcache import engine
import copy, inspect, mlx_lm, pickle
import mlx_lm.models.cache
seen = {"version": engine.version(), "path": list(mlx_lm.__path__), "file": mlx_lm.__file__}
seen["nothing"] = [hasattr(mlx_lm, n) for n in ("__wrapped__", "__warningregistry__")]
seen["names"] = [mlx_lm.__name__, mlx_lm.__package__, mlx_lm.__spec__.name]
seen["source"] = "stream_generate" in inspect.getsource(mlx_lm)
seen["a module"] = inspect.ismodule(mlx_lm) and repr(mlx_lm).startswith("<module 'mlx_lm' from")
for name, attempt in (("pickled", pickle.dumps), ("copied", copy.deepcopy)):
    try:
        attempt(mlx_lm)
    except TypeError:
        seen[name] = False
seen["heavy"] = heavy()
seen["own version"] = mlx_lm.__version__
seen["unknown"] = hasattr(mlx_lm, "nothing_of_the_kind")
seen["extra"] = sorted(set(vars(mlx_lm)) & {"_lock", "_begun"})
print(json.dumps(seen))
""")
    import mlx_lm

    assert seen["version"] == seen["own version"] == mlx_lm.__version__
    assert (seen["path"], seen["file"]) == (list(mlx_lm.__path__), mlx_lm.__file__)
    assert seen["nothing"] == [False, False]
    assert seen["names"] == ["mlx_lm"] * 3
    assert (seen["source"], seen["a module"]) == (True, True)
    assert (seen["pickled"], seen["copied"]) == (False, False)
    assert seen["heavy"] == []
    assert (seen["unknown"], seen["extra"]) == (False, [])


def test_many_threads_find_the_whole_package() -> None:
    found, left = python("""
import threading
from mlx_promptcache import engine
together, found = threading.Barrier(8), []
def ask(i):
    together.wait()
    import mlx_lm
    if i % 4 == 0:
        found.append(mlx_lm.load.__name__)
    elif i % 4 == 1:
        from mlx_lm import stream_generate
        found.append(stream_generate.__name__)
    elif i % 4 == 2:
        import mlx_lm.utils
        found.append(mlx_lm.utils.load.__name__)
    else:
        found.append(engine.utils().load_model.__name__)
threads = [threading.Thread(target=ask, args=(i,), daemon=True) for i in range(8)]
[t.start() for t in threads]
[t.join(120) for t in threads]
print(json.dumps([sorted(found), stand_ins()]))
""")
    assert found == sorted(["load", "stream_generate", "load", "load_model"] * 2)
    assert left == []


def test_a_package_whose_import_fails_can_be_tried_again() -> None:
    outcomes = python("""
from mlx_promptcache import engine
import mlx_lm
sys.modules["mlx_lm.convert"] = None  # an import that fails
outcomes = []
for _ in range(2):
    try:
        mlx_lm.load
    except ImportError:
        outcomes.append("refused")
del sys.modules["mlx_lm.convert"]
outcomes.append(mlx_lm.load.__name__)
print(json.dumps(outcomes))
""")
    assert outcomes == ["refused", "refused", "load"]


# Private copies


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package `lonely` with a module to copy, which says who made it."""
    directory = tmp_path / "lonely"
    directory.mkdir()
    (directory / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(engine, "PACKAGE", "lonely")
    yield directory
    for name in [name for name in sys.modules if name.split(".")[0] in ("lonely", "weighty")]:
        del sys.modules[name]


def module_of(package: Path, source: str, names: Any) -> Any:
    (package.parent / "weighty.py").write_text("light = 'whole'\nheavy = 'whole'\n")
    (package / "thing.py").write_text(source)
    importlib.invalidate_caches()
    return engine._without({"weighty": names}, "thing")


def test_a_copy_has_the_names_that_stand_in_and_leaves_no_trace(package: Path) -> None:
    copied = module_of(package, "from weighty import light\nimport json", {"light": "stand-in"})
    assert (copied.light, copied.json) == ("stand-in", json)
    assert not {"weighty", "lonely.thing"} & set(sys.modules)
    assert (copied.__name__, copied.__package__) == ("lonely.thing", "lonely")


def test_a_module_that_is_put_off_is_imported_when_it_is_asked(package: Path) -> None:
    copied = module_of(package, "import weighty", engine._LaterModule("weighty"))
    assert "weighty" not in sys.modules
    assert copied.weighty.light == "whole"
    assert copied.weighty.light is sys.modules["weighty"].light
    with pytest.raises(AttributeError, match="nothing"):
        _ = copied.weighty.nothing


def test_names_of_a_module_that_is_put_off_are_its_own(package: Path) -> None:
    copied = module_of(package, "from weighty import light", engine._LaterModule("weighty"))
    assert copied.light == "whole"


def test_what_a_copy_imports_later_is_whole(package: Path) -> None:
    source = (
        "from weighty import light\ndef later():\n    from weighty import light\n    return light"
    )
    copied = module_of(package, source, {"light": "stand-in"})
    assert (copied.light, copied.later()) == ("stand-in", "whole")


@pytest.mark.parametrize(
    "source",
    [
        "from weighty import light, heavy",
        "from weighty import heavy",
        "import weighty\nlight = weighty.light",
        "import weighty",
        "import weighty as other",
        "from weighty import light\nlight.of_the_real_one",
        "from weighty import *",
    ],
)
def test_what_is_not_as_expected_is_imported_whole(package: Path, source: str) -> None:
    if "of_the_real_one" in source:
        source = source.replace("light.of_the_real_one", "assert light == 'whole'")
    module = module_of(package, source, {"light": "stand-in"})
    assert module is sys.modules["lonely.thing"]
    assert getattr(module, "light", "whole") == "whole"


def test_a_module_without_source_is_imported_whole(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (package / "thing.py").write_text("from weighty import light")
    (package.parent / "weighty.py").write_text("light = 'whole'")
    importlib.invalidate_caches()
    find = importlib.util.find_spec

    def unloadable(name: str, *args: Any) -> Any:
        spec = find(name, *args)
        assert spec is not None
        spec.loader = None
        return spec

    monkeypatch.setattr(importlib.util, "find_spec", unloadable)
    assert engine._without({"weighty": {"light": 1}}, "thing").light == "whole"


def test_a_module_that_is_imported_is_not_copied(package: Path) -> None:
    (package / "thing.py").write_text("")
    importlib.invalidate_caches()
    whole = importlib.import_module("lonely.thing")
    assert engine._without({}, "thing") is whole


def test_a_copy_imports_as_python_does(package: Path) -> None:
    (package / "other.py").write_text("light = 'relative'")
    source = "from .other import light\nfrom . import other\nother2 = __import__('json', level=0)"
    copied = module_of(package, source, {})
    assert (copied.light, copied.other.light, copied.other2) == ("relative", "relative", json)
    assert builtins.__import__ is not copied.__builtins__["__import__"]


def test_a_copy_of_mlx_lm_makes_text_of_tokens_as_the_module_does() -> None:
    ours = python("""
from mlx_promptcache import engine
module = engine.tokenizer_utils()
names = sorted(n for n in vars(module) if not n.startswith("__"))
print(json.dumps([names, heavy(), module.__file__]))
""")
    import mlx_lm.tokenizer_utils

    theirs = sorted(n for n in vars(mlx_lm.tokenizer_utils) if not n.startswith("__"))
    assert ours == [theirs, [], mlx_lm.tokenizer_utils.__file__]


def test_a_name_for_later_is_looked_up_when_it_is_called(package: Path) -> None:
    (package.parent / "weighty.py").write_text("def add(a, b): return a + b")
    importlib.invalidate_caches()
    later = engine._Later("weighty", "add")
    assert "weighty" not in sys.modules
    assert later(1, b=2) == 3


def test_modules_of_this_process_are_as_python_made_them() -> None:
    assert type(sys.modules["mlx_lm.models.cache"]) is types.ModuleType
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("mlx_lm", *HEAVY):
            assert isinstance(module, types.ModuleType)


# A whole run


GENERATE = """
import contextlib, io
from mlx_promptcache import cli
out = io.StringIO()
with contextlib.redirect_stdout(out):
    code = cli.run(sys.argv[1:])
print(json.dumps([code, heavy(), json.loads(out.getvalue())]))
"""


def test_a_warm_run_imports_nothing_heavy_and_says_the_same(tmp_path: Path) -> None:
    model = tiny.on_disk(tmp_path / "model")
    command = ("generate", "-m", model, "-p", "The cat sat", "-n", "6", "--temp", "0", "--json")
    cold = python(GENERATE, *command)
    warm = python(GENERATE, *command)
    longer = python(
        GENERATE, *(part if part != "The cat sat" else "The cat sits" for part in command)
    )
    assert (cold[0], warm[0], longer[0]) == (0, 0, 0)
    assert "transformers" in cold[1]
    assert (warm[1], longer[1]) == ([], [])
    assert [warm[2][k] for k in ("text", "tokens")] == [cold[2][k] for k in ("text", "tokens")]
    assert (cold[2]["hit"], warm[2]["hit"], longer[2]["hit"]) == ("none", "exact", "prefix")


def test_a_run_says_nothing_on_standard_error_that_mlx_lm_would_not(tmp_path: Path) -> None:
    model = tiny.on_disk(tmp_path / "model")
    ended = processes.run("generate", "-m", model, "-p", "Hello", "-n", "1", "--json")
    assert (ended.code, ended.err) == (0, "")
