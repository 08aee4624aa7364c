"""A store and a remote: what one has and the other lacks goes there, and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlx_promptcache import hub
from mlx_promptcache.hub import HubRemote
from mlx_promptcache.receiver import Receiver
from mlx_promptcache.remote import Remote
from mlx_promptcache.sender import Sender

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mlx_promptcache.budget import Budget
    from mlx_promptcache.moved import Moved
    from mlx_promptcache.quarantine import Quarantine
    from mlx_promptcache.signatures import Signer
    from mlx_promptcache.store import Store

    Progress = Callable[[int, int], None]


def remote_at(url: str, fingerprint: str) -> Remote:
    """The remote of a URL."""
    return (HubRemote if url.startswith(hub.SCHEME) else Remote)(url, fingerprint)


class Sharing:
    """What goes between one store and one remote, for one fingerprint.

    `signer` signs what goes there. What comes from there must be signed if the store has a file
    `trusted_keys`.
    """

    def __init__(
        self,
        store: Store,
        bad: Quarantine,
        fingerprint: str,
        budget: Budget,
        remote: Remote,
        *,
        signer: Signer | None = None,
    ) -> None:
        self.store, self.remote = store, remote
        self.sender = Sender(store, fingerprint, remote, signer)
        self.receiver = Receiver(store, bad, fingerprint, budget, remote)

    def push(
        self, names: Sequence[str] = (), *, replace: bool = False, progress: Progress | None = None
    ) -> Moved:
        """Bring states there: see `Sender.push`, which raises what this does."""
        return self.sender.push(names, replace=replace, progress=progress)

    def pull(
        self, names: Sequence[str] = (), *, replace: bool = False, progress: Progress | None = None
    ) -> Moved:
        """Bring states here: see `Receiver.pull`, which raises what this does."""
        return self.receiver.pull(names, replace=replace, progress=progress)
