"""What `push` and `pull` have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from mlx_promptcache.budget import Budget
from mlx_promptcache.cli import output
from mlx_promptcache.quarantine import Quarantine
from mlx_promptcache.sharing import Sharing, remote_at

if TYPE_CHECKING:
    from mlx_promptcache.cli.choices import ModelChoice
    from mlx_promptcache.moved import Moved
    from mlx_promptcache.signatures import Signer


def sharing(
    choice: ModelChoice, url: str, *, signer: Signer | None = None, max_bytes: int | None = None
) -> Sharing:
    """What goes between a model's store and a URL.

    Raises:
        UsageError: no model is chosen.
    """
    store, fingerprint = choice.store(), choice.fingerprint()
    if fingerprint is None:
        raise click.UsageError("states are shared for a model: give --model")
    bad = Quarantine(store, read_only=False)
    remote = remote_at(url, fingerprint.digest)
    budget = Budget.chosen(max_bytes)
    return Sharing(store, bad, fingerprint.digest, budget, remote, signer=signer)


def tell(moved: Moved, done: str, *, as_json: bool) -> None:
    """Print what went over."""
    if as_json:
        output.print_json(
            {
                "states": moved.states,
                "files": moved.files,
                "bytes": moved.bytes,
                "files_shared": moved.shared,
                "names": list(moved.names),
                "refused": list(moved.refused),
            }
        )
        return
    names = f", named {', '.join(moved.names)}" if moved.names else ""
    said = (
        f"{_number(moved.states, 'state')}{names}: {_number(moved.files, 'file')}, "
        f"{output.size(moved.bytes)} {done}, {moved.shared} were there"
    )
    click.echo(output.printable(said))


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
