"""The command line. One module a command, imported when called: `list` must not wait for MLX."""

from __future__ import annotations

import importlib
import os
import sys

import click

from mlx_promptcache.cli import output
from mlx_promptcache.errors import PromptCacheError
from mlx_promptcache.version import __version__

COMMANDS = {
    "generate": "Continue a prompt, and reuse what was computed before.",
    "save": "Compute a prompt and keep its state under a name.",
    "load": "Restore a state, and go on generating where it stopped.",
    "list": "List the stored states.",
    "show": "Show everything about one stored state.",
    "clear": "Delete stored states.",
    "verify": "Read every stored byte and check it.",
    "prune": "Make the store fit its budget.",
    "serve": "Serve the OpenAI API; what was computed survives a restart.",
    "bench": "Measure what the cache is worth on this machine.",
}

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"mlx_promptcache.cli.{cmd_name}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):  # without importing any of them
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mlx-promptcache")
def cli() -> None:
    """Run MLX language models, and never compute the same prompt twice."""


def main() -> None:
    """Run the command line and exit: 0 done, 1 it cannot be done, 2 wrong usage, 3 damage found."""
    code = run(sys.argv[1:])
    if "mlx_promptcache.server" in sys.modules:
        _leave(code)
    sys.exit(code)


def _leave(code: int) -> None:
    """End at once. MLX aborts many a process that computed in threads, when it is taken down: its
    exit code would then say nothing.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code. No traceback reaches a user."""
    try:
        result = cli.main(arguments, prog_name="mlx-promptcache", standalone_mode=False)
        sys.stdout.flush()
    except click.UsageError as exc:
        exc.show()
        return USAGE
    except (click.Abort, KeyboardInterrupt):
        output.error("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has seen enough. Nothing is left to flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (PromptCacheError, click.ClickException) as exc:
        if output.debug():
            raise
        output.error(exc.message if isinstance(exc, click.ClickException) else str(exc))
        return FAILED
    except Exception as exc:
        if output.debug():
            raise
        output.error(
            f"this should not have happened: {type(exc).__name__}: {exc} "
            "(MLX_PROMPTCACHE_DEBUG=1 shows where)"
        )
        return FAILED
    return result if isinstance(result, int) else DONE
