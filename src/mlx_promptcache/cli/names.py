"""What a shell completes: names of stored states, files, directories. Needs no model and no MLX."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from click.shell_completion import BashComplete, CompletionItem, FishComplete, ZshComplete

from mlx_promptcache import models, places
from mlx_promptcache.cli import output
from mlx_promptcache.errors import PromptCacheError
from mlx_promptcache.store import Store

if TYPE_CHECKING:
    import click
    from click.shell_completion import ShellComplete

    Items = list[CompletionItem]

UNSAFE = re.compile(r"([^\w@%+=:,./-])")  # what a shell takes for something else than itself


class _Bash(BashComplete):
    """Bash puts in what it is given: blanks and quotes must be escaped; twice, because click's
    script reads each line with `read`, which takes one backslash away.
    """

    def format_completion(self, item: CompletionItem) -> str:
        if item.type == "plain":
            item.value = UNSAFE.sub(r"\\\\\1", item.value)
        return super().format_completion(item)


class _Fish(FishComplete):
    """Fish's script cuts a value at its first comma: nothing is better than half a name."""

    def get_completions(self, args: list[str], incomplete: str) -> Items:
        return [i for i in super().get_completions(args, incomplete) if "," not in i.value]


SHELLS: dict[str, type[ShellComplete]] = {"bash": _Bash, "zsh": ZshComplete, "fish": _Fish}


def complete_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> Items:  # noqa: ARG001
    """The names that begin so; none where the store cannot be looked at."""
    output.set_up_notices(quiet=True)  # a notice would be written over the line that is completed
    try:
        names = _store(ctx).names.labels()
    except PromptCacheError:
        return []
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def _store(ctx: click.Context) -> Store:
    """The store that the words before choose, as `ModelChoice.store` does."""
    chosen, model = ctx.params.get("cache_dir"), ctx.params.get("model")
    if chosen is None:
        path = models.find(model, download=False) if model else places.demo_model()
        chosen = str(places.store_directory(path)) if path else ""
    allow = bool(ctx.params.get("allow_foreign_store"))
    return Store(Path(chosen).expanduser(), allow_foreign=allow, read_only=True)


def complete_files(ctx: click.Context, param: click.Parameter, incomplete: str) -> Items:  # noqa: ARG001
    """Files, which the shell finds itself."""
    return [CompletionItem(incomplete, type="file")]


def complete_directories(
    ctx: click.Context,  # noqa: ARG001
    param: click.Parameter,  # noqa: ARG001
    incomplete: str,
) -> Items:
    """Directories, which the shell finds itself."""
    return [CompletionItem(incomplete, type="dir")]
