"""`serve`: mlx-lm's OpenAI-compatible server, whose prompt cache survives a restart."""

from __future__ import annotations

import argparse
import ipaddress
import logging
import os
import sys
import warnings
from typing import TYPE_CHECKING, Any, NoReturn

import click

from mlx_promptcache import models, places
from mlx_promptcache.budget import MAX_SIZE, parse_size
from mlx_promptcache.cli import output
from mlx_promptcache.cli.choices import RemoteChoice
from mlx_promptcache.cli.options import NO_URL, examples

if TYPE_CHECKING:
    from collections.abc import Callable

    from mlx_promptcache.server import Serving

log = logging.getLogger("mlx_promptcache")

DESCRIPTION = (
    "Serve the OpenAI API with mlx-lm's own server. Its options mean here what they mean there; "
    "those of the prompt cache come last."
)


@click.command(
    help=__doc__,
    epilog=examples(
        "serve --port 8081",
        "serve --salt-per-key --max-size 20GB",
    ),
    add_help_option=False,  # the options are mlx-lm's: its parser tells of them
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def command(arguments: tuple[str, ...]) -> int:
    """Serve until a signal comes."""
    output.set_up_notices(quiet="--quiet" in arguments)
    from mlx_promptcache import server

    server.main(lambda parser: _parsed(parser, arguments))
    return 0


def _parsed(
    parser: argparse.ArgumentParser, arguments: tuple[str, ...]
) -> tuple[argparse.Namespace, Serving]:
    """mlx-lm's arguments, and ours."""
    parser.prog, parser.description = "mlx-promptcache serve", DESCRIPTION
    parser.epilog = "Example: mlx-promptcache serve --port 8081"
    _let_errors_be_told(parser)
    _add_options(parser)
    found = parser.parse_args_of(arguments)  # type: ignore[attr-defined]
    _check(found, parser.error)
    return found, _serving(found)


def _let_errors_be_told(parser: Any) -> None:
    """Leave exits and errors to the command line: they have codes and sentences of their own."""

    def error(message: str) -> NoReturn:
        raise click.UsageError(message)

    def leave(status: int = 0, message: str | None = None) -> NoReturn:  # noqa: ARG001
        raise click.exceptions.Exit(status)

    parser.error, parser.exit = error, leave


def _add_options(parser: argparse.ArgumentParser) -> None:
    environment = os.environ
    demo = places.demo_model()
    parser.set_defaults(
        model=environment.get("MLX_PROMPTCACHE_MODEL") or (str(demo) if demo else None)
    )
    group = parser.add_argument_group("prompt cache")
    group.add_argument("-m", dest="model", metavar="MODEL", help="The same as --model.")
    group.add_argument(
        "--cache-dir", metavar="DIR", default=environment.get("MLX_PROMPTCACHE_DIR"),
        help="The store; prompt_cache in each model's directory by default.",
    )  # fmt: skip
    group.add_argument(
        "--max-size", metavar="20GB", type=_size, default=environment.get(MAX_SIZE),
        help="What the store may take on disk; what is in memory is limited by --prompt-cache-*.",
    )  # fmt: skip
    group.add_argument("--salt", default="", help="A private namespace inside the store.")
    group.add_argument(
        "--remote", metavar="URL", default=environment.get("MLX_PROMPTCACHE_REMOTE") or None,
        help="Ask there for what is not stored here, and send what is kept there.",
    )  # fmt: skip
    group.add_argument(
        "--remote-seconds", type=float, default=5.0, metavar="N",
        help="How long to wait for it at the most (default: 5).",
    )  # fmt: skip
    group.add_argument(
        "--sign", metavar="KEYFILE", default=environment.get("MLX_PROMPTCACHE_SIGN"),
        help="Sign what is sent with this Ed25519 key, as ssh-keygen makes it.",
    )  # fmt: skip
    group.add_argument(
        "--salt-per-key", action="store_true",
        help="A private namespace for each API key (Authorization: Bearer KEY).",
    )  # fmt: skip
    group.add_argument(
        "--salt-per-user", action="store_true",
        help="A private namespace for each `user` that requests name.",
    )  # fmt: skip
    group.add_argument(
        "--allow-foreign-store", action="store_true",
        default=environment.get("MLX_PROMPTCACHE_ALLOW_FOREIGN_STORE", "") not in {"", "0"},
        help="Use a store that belongs to another user, whom you trust.",
    )  # fmt: skip
    group.add_argument(
        "--stop-seconds", type=float, default=30.0, metavar="N",
        help="How long answers that have begun may take after SIGTERM or Ctrl-C (default: 30).",
    )  # fmt: skip
    group.add_argument(
        "--json", action="store_true", help="Print one JSON object when the server listens."
    )
    group.add_argument("--quiet", action="store_true", help="No notices, and no log but errors.")


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from exc


def _check(found: argparse.Namespace, error: Callable[[str], NoReturn]) -> None:
    """Refuse what makes no sense before anything is loaded.

    Raises:
        ModelError: there is no such model.
    """
    from mlx_promptcache.server import kv_settings

    try:
        kv_settings(found)
    except ValueError as exc:
        error(str(exc))
    if found.remote is not None and not found.remote.strip():
        error(NO_URL)
    if found.stop_seconds < 0:
        error("--stop-seconds must not be negative")
    if not 0 <= found.port < 1 << 16:
        error(f"there is no port {found.port}")
    if not _is_loopback(found.host):
        log.warning(
            "listening at %s: everybody who can reach this machine can ask the model, and without "
            "--salt-per-key or --salt-per-user tell by the time what others asked",
            found.host,
        )
    if found.model is not None:
        models.config(models.find(found.model))
    if found.draft_model is not None:
        models.config(models.find(found.draft_model))
    if found.quiet:
        found.log_level = "ERROR"
        warnings.simplefilter("ignore")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _serving(found: argparse.Namespace) -> Serving:
    from mlx_promptcache.namespaces import Namespaces
    from mlx_promptcache.server import Serving

    serving = Serving(
        cache_dir=found.cache_dir,
        salt=found.salt,
        max_bytes=found.max_size,
        allow_foreign=found.allow_foreign_store,
        attach=RemoteChoice(found.remote, found.remote_seconds, found.sign).attach,
        namespaces=Namespaces(found.salt, found.salt_per_key, found.salt_per_user),
        stop_seconds=found.stop_seconds,
        quiet=found.quiet,
        announce=lambda host, port: _announce(found, host, port),
    )
    serving.check()
    return serving


def _announce(found: argparse.Namespace, host: str, port: int) -> None:
    name = f"[{host}]" if ":" in host else host
    url = f"http://{name}:{port}/v1"
    if found.json:
        output.print_json({"url": url, "host": host, "port": port, "model": found.model})
        sys.stdout.flush()
    else:
        log.warning("listening at %s", url)
