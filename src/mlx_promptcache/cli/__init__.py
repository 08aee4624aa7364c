"""The command line. One module a command, imported when called: `list` must not wait for MLX."""

from __future__ import annotations

import errno
import gc
import importlib
import keyword
import os
import sys

import click
from click.shell_completion import CompletionItem

from mlx_promptcache.cli import output
from mlx_promptcache.errors import PromptCacheError
from mlx_promptcache.version import __version__

COMMANDS = {
    "generate": "Continue a prompt, and reuse what was computed before.",
    "save": "Compute a prompt and keep its state under a name.",
    "load": "Restore a state, and go on generating where it stopped.",
    "chat": "Talk with a model, and go on tomorrow where it stopped.",
    "batch": "Answer a file of questions after one shared prefix, together.",
    "list": "List the stored states.",
    "show": "Show everything about one stored state.",
    "match": "Say how much of a prompt would be reused, and why not more.",
    "export": "Write a stored state to a file of its own.",
    "import": "Take a state from a file into the store.",
    "clear": "Delete stored states.",
    "verify": "Read every stored byte and check it.",
    "prune": "Make the store fit its budget.",
    "push": "Bring stored states to a place that others share.",
    "pull": "Bring states from such a place.",
    "report": "Write a page about the store.",
    "memory": "Tell what a context takes in memory and on disk, and what fits.",
    "serve": "Serve the OpenAI API; what was computed survives a restart.",
    "bench": "Measure what the cache is worth on this machine.",
    "completion": "Print a script that lets a shell complete commands and names.",
}
PROGRAM = "mlx-promptcache"
COMPLETING = "_MLX_PROMPTCACHE_COMPLETE"  # the variable that click's scripts set when they ask

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130

# Objects made before garbage is looked for. What a start imports stays: going through it 50 times,
# as by default, took some 3 % of the processor's time until the first token.
GARBAGE_AFTER = 50_000


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        name = f"{cmd_name}_" if keyword.iskeyword(cmd_name) else cmd_name
        module = importlib.import_module(f"mlx_promptcache.cli.{name}")
        command: click.Command = module.command
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Commands, without importing any of them; options as ever."""
        if incomplete.startswith("-"):
            return super().shell_complete(ctx, incomplete)
        found = COMMANDS.items()
        return [CompletionItem(c, help=told) for c, told in found if c.startswith(incomplete)]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):  # without importing any of them
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name=PROGRAM)
def cli() -> None:
    """Run MLX language models, and never compute the same prompt twice."""


def main() -> None:
    """Run the command line and exit: 0 done, 1 it cannot be done, 2 wrong usage, 3 damage found."""
    gc.set_threshold(GARBAGE_AFTER, *gc.get_threshold()[1:])
    _open_streams()
    code = run(sys.argv[1:])
    if "mlx_promptcache.server" in sys.modules:
        _leave(code)
    gc.freeze()  # Python looks for garbage among all that there is as it ends: 50 ms for nothing
    sys.exit(code)


def _leave(code: int) -> None:
    """End at once. MLX aborts many a process that computed in threads, when it is taken down: its
    exit code would then say nothing.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _open_streams() -> None:
    """Where the caller closed a standard stream open one that says and takes nothing: else the next
    file that is opened has its number, and whatever is said is written there.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: PTH123, SIM115


def _complete() -> None:
    """If a shell's script asks what a line may go on with, let click know how our shells do."""
    if COMPLETING in os.environ:
        from click.shell_completion import add_completion_class

        from mlx_promptcache.cli.names import SHELLS

        for name, shell in SHELLS.items():
            add_completion_class(shell, name)


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code. No traceback reaches a user."""
    try:
        _complete()
        result = cli.main(arguments, prog_name=PROGRAM, standalone_mode=False)
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
        if isinstance(exc, OSError) and exc.errno == errno.ENOSPC:  # the store has its own sentence
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            output.error("there is no room for what is printed: free some, or print it elsewhere")
            return FAILED
        output.error(
            f"this should not have happened: {type(exc).__name__}: {exc} "
            "(MLX_PROMPTCACHE_DEBUG=1 shows where)"
        )
        return FAILED
    return result if isinstance(result, int) else DONE
