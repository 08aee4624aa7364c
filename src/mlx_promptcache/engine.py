"""mlx-lm, without all that it imports.

`import mlx_lm` brings in everything that mlx-lm can do, `transformers` with it: seconds, of which a
model whose prompt is stored needs none. Nothing is replaced here and nothing is rewritten; two
imports are put off until somebody wants what they bring.

* The package itself becomes lazy. `import mlx_lm.models.llama` runs the `__init__` of `mlx_lm`
  first; here a module stands in its place that runs this very `__init__` when it is first asked for
  a name that is not there. For whoever imports mlx-lm in the same process nothing changes.
* `mlx_lm.utils` and `mlx_lm.tokenizer_utils` import the Hub's client, `transformers` and some of
  Python's own modules for what loading a model does not use. `utils()` and `tokenizer_utils()` are
  private copies of the two, made from mlx-lm's own files, in which these few names are looked up
  when they are first used.

If anything is not as expected, such as a release of mlx-lm that needs more of what is put off, the
plain import serves: slower, and the same.
"""

from __future__ import annotations

import builtins
import functools
import importlib
import importlib.util
import logging
import os
import sys
import threading
import types
from importlib.machinery import SourceFileLoader
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from importlib.machinery import ModuleSpec
    from pathlib import Path
    from typing import TypeAlias

    Later: TypeAlias = "Mapping[str, Mapping[str, Any] | _LaterModule]"

log = logging.getLogger("mlx_promptcache")

PACKAGE = "mlx_lm"
QUIET = "TRANSFORMERS_NO_ADVISORY_WARNINGS"


class _LazyPackage(types.ModuleType):
    """A package whose `__init__` runs when it is first asked for what only that can give; then it
    is a package like any other.
    """

    def __init__(self, spec: ModuleSpec) -> None:
        super().__init__(spec.name)
        self.__spec__ = spec
        self.__loader__ = spec.loader
        self.__file__ = spec.origin
        self.__path__ = list(spec.submodule_search_locations or [])
        self.__package__ = spec.name

    def __getattr__(self, name: str) -> Any:
        # Whoever looks through all modules asks each for such names: that is no reason to run.
        if not name.startswith("__") or name in GIVEN:
            _run(self)
        if name in self.__dict__:
            return self.__dict__[name]
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    def __dir__(self) -> list[str]:
        _run(self)
        return sorted(self.__dict__)


GIVEN = {"__version__", "__all__"}
_running = threading.RLock()
_begun: set[types.ModuleType] = set()


def _run(package: types.ModuleType) -> None:
    """Run the package's `__init__`, once; others wait, and the thread that runs it goes on."""
    with _running:
        if package in _begun:
            return
        _begun.add(package)
        try:
            package.__spec__.loader.exec_module(package)  # type: ignore[union-attr]
        except BaseException:
            _begun.discard(package)
            raise
        package.__class__ = types.ModuleType


def _make_lazy() -> None:
    if PACKAGE in sys.modules:
        return
    spec = importlib.util.find_spec(PACKAGE)
    if spec is not None and spec.loader is not None:
        os.environ[QUIET] = "1"  # as its `__init__` does before anything can import transformers
        sys.modules.setdefault(PACKAGE, _LazyPackage(spec))


class _Later:
    """A function that is looked up when it is first called."""

    def __init__(self, module: str, name: str) -> None:
        self._module, self._name = module, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(self._module), self._name)(*args, **kwargs)


class _LaterModule:
    """A module that is imported when something of it is first asked for."""

    def __init__(self, module: str) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self._module), name)


class _Unused:
    """Stands for a class that mlx-lm's loading code only names, or derives others from."""

    @classmethod
    def register(cls, *args: Any, **kwargs: Any) -> None:
        """Take part in a registry that nobody asks."""


def version() -> str:
    """The release of mlx-lm."""
    found: str = importlib.import_module(f"{PACKAGE}._version").__version__
    return found


@functools.cache
def utils() -> Any:
    """`mlx_lm.utils`, which loads models: its own code, without tokenizers and the Hub."""
    later: Later = {
        "huggingface_hub": {"snapshot_download": _Later("huggingface_hub", "snapshot_download")},
        ".tokenizer_utils": {
            "TokenizerWrapper": _Unused,
            "load": _Later(f"{PACKAGE}.tokenizer_utils", "load"),
        },
        "shutil": _LaterModule("shutil"),
        "decimal": {"Decimal": _Later("decimal", "Decimal")},
    }
    return _without(later, "utils")


def load_model(path: Path, read: Callable[..., Any]) -> tuple[Any, dict[str, Any]]:
    """`mlx_lm.utils.load_model(path, lazy=True)`, where `read` stands in the place of `mx.load`:
    the same function, with a name of its module's that only this call sees.
    """
    function: Any = utils().load_model
    if not isinstance(function, types.FunctionType) or "mx" not in function.__globals__:
        return cast("tuple[Any, dict[str, Any]]", function(path, lazy=True))
    mlx = types.SimpleNamespace(**{**vars(function.__globals__["mx"]), "load": read})
    names = {**function.__globals__, "mx": mlx}
    code, closure = function.__code__, function.__closure__
    own: Any = types.FunctionType(code, names, function.__name__, function.__defaults__, closure)
    own.__kwdefaults__ = function.__kwdefaults__
    return cast("tuple[Any, dict[str, Any]]", own(path, lazy=True))


@functools.cache
def tokenizer_utils() -> Any:
    """`mlx_lm.tokenizer_utils`, which makes text of tokens: its own code, without transformers."""
    later: Later = {
        "transformers": {"AutoTokenizer": _Unused, "PreTrainedTokenizerFast": _Unused},
        "transformers.tokenization_utils_base": {"PreTrainedTokenizerBase": Renderer},
    }
    return _without(later, "tokenizer_utils")


class Renderer:
    """What has the usual `apply_chat_template`, as mlx-lm sees it: see `tokenizer.Tokenizer`."""

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        """Render a chat."""
        raise NotImplementedError


def generate() -> Any:
    """`mlx_lm.generate`, which decodes in batches; it imports transformers."""
    return importlib.import_module(f"{PACKAGE}.generate")


def _without(later: Later, name: str) -> Any:
    """A module of mlx-lm, where these modules (`.x` is one of its own) are not imported but have
    only these names, or are there as a whole when something of them is asked for.
    """
    whole = f"{PACKAGE}.{name}"
    if whole in sys.modules:
        return importlib.import_module(whole)  # another thread may be importing it
    try:
        return _copy(later, whole)
    except Exception as exc:  # noqa: BLE001 - whatever another release does otherwise
        log.debug("%s is imported as a whole: %s", whole, exc)
        return importlib.import_module(whole)


def _copy(later: Later, whole: str) -> types.ModuleType:
    spec = importlib.util.find_spec(whole)
    if spec is None or not isinstance(spec.loader, SourceFileLoader):
        raise ImportError(f"there is no source of {whole}")
    code: Any = spec.loader.get_code(whole)
    module = importlib.util.module_from_spec(spec)
    stand_ins = {
        name: names if isinstance(names, _LaterModule) else types.SimpleNamespace(**names)
        for name, names in later.items()
    }
    running = True

    def importing(
        name: str, names: Any = None, local: Any = None, wanted: Any = (), level: int = 0
    ) -> Any:
        stand_in = stand_ins.get("." * level + name) if running else None
        if stand_in is None or (wanted and isinstance(stand_in, _LaterModule)):
            return builtins.__import__(name, names, local, wanted, level)
        if isinstance(stand_in, _LaterModule):
            return stand_in
        if not wanted or "*" in wanted:  # what is asked of it would be seen too late
            raise ImportError(f"{whole} imports all of {name}")
        return stand_in

    # Import statements look `__import__` up among the builtins of their own module: nothing that
    # others can see is changed, not even for a moment.
    module.__dict__["__builtins__"] = {**vars(builtins), "__import__": importing}
    exec(code, module.__dict__)  # noqa: S102 - mlx-lm's own code, from where it is installed
    running = False
    return module


_make_lazy()

import mlx_lm.models.cache as cache  # noqa: E402
import mlx_lm.sample_utils as sample_utils  # noqa: E402

__all__ = [
    "Renderer",
    "cache",
    "generate",
    "load_model",
    "sample_utils",
    "tokenizer_utils",
    "utils",
    "version",
]
