"""`completion`: print a script that lets a shell complete commands, options and names.

\b
bash  put  eval "$(mlx-promptcache completion bash)"   into ~/.bashrc (bash 4.4 or newer)
zsh   put  eval "$(mlx-promptcache completion zsh)"    into ~/.zshrc, after compinit
fish  put  mlx-promptcache completion fish | source    into ~/.config/fish/config.fish
"""  # noqa: D301 - the mark of click for lines that stay as they are

from __future__ import annotations

from typing import Any

import click

from mlx_promptcache import cli
from mlx_promptcache.cli import output
from mlx_promptcache.cli.names import SHELLS
from mlx_promptcache.cli.options import examples, output_options


@click.command(help=__doc__, epilog=examples("completion bash", "completion fish"))
@click.argument("shell", type=click.Choice(list(SHELLS)))
@output_options
def command(**options: Any) -> int:
    """Parse, print."""
    shell = options["shell"]
    script = SHELLS[shell](cli.cli, {}, cli.PROGRAM, cli.COMPLETING).source()
    if options["as_json"]:
        output.print_json({"shell": shell, "script": script})
    else:
        click.echo(script, nl=False)
    return 0
