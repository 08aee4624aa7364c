"""The program, with a count: how many tokens are fed to its models, a line for each forward call.

python fed.py COUNT-FILE COMMAND ...

Where SLOW says so every write of a state takes so many seconds more.
"""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Any

from mlx_promptcache import PromptCache, cli, server

if TYPE_CHECKING:
    from collections.abc import Callable

WATCHED: set[type] = set()


def watch(model: Any, note: Callable[[str], object]) -> None:
    """Write down how many tokens go into a model from now on."""
    kind = type(model)
    if kind in WATCHED:
        return
    WATCHED.add(kind)
    original: Any = kind.__call__

    def call(self: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        note(f"{inputs.size}\n")
        return original(self, inputs, *args, **kwargs)

    kind.__call__ = call


def main() -> None:
    """Run the program."""
    file = open(sys.argv[1], "a", buffering=1)  # noqa: PTH123, SIM115 - as long as the process
    load = server.Provider._load

    def watched(self: Any, *args: Any, **kwargs: Any) -> None:
        load(self, *args, **kwargs)
        watch(self.model, file.write)

    server.Provider._load = watched  # type: ignore[method-assign]
    add = PromptCache.add

    def slow(self: Any, state: Any) -> Any:
        time.sleep(float(os.environ.get("SLOW", "0")))
        return add(self, state)

    PromptCache.add = slow  # type: ignore[method-assign]
    sys.argv[1:] = sys.argv[2:]
    cli.main()


if __name__ == "__main__":
    main()
