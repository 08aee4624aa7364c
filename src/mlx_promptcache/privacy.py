"""Whose a store is, and what in it counts: what is for its owner alone, and is no link.

A store is private to its owner, and another user's store is not used unless that is asked for:
whoever can write to a store can make states that say anything. Below the store's own directory
nothing is followed that is a link, and nothing is believed that belongs to a third user. All of
this is looked up whenever something is used, not once: directories are renamed while programs run.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from mlx_promptcache.errors import ForeignStore, StoreError

if TYPE_CHECKING:
    from collections.abc import Collection

OTHERS = stat.S_IRWXG | stat.S_IRWXO
DIRECTORY, FILE = 0o700, 0o600  # the modes of all that a store has
LINK = "it is a link, and links are not followed"
NO_DIRECTORY = "it is no directory"
THIRD = "it belongs to another user"
_LOOK = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK


def users(directory: str | os.PathLike[str], *, allow_foreign: bool) -> frozenset[int]:
    """The users whose files count in a store: this one, and the owner of its directory.

    Raises:
        ForeignStore: its owner is another user, and that is not allowed.
    """
    me = os.geteuid()
    try:
        owner = os.stat(directory).st_uid  # noqa: PTH116 - the directory itself may be a link
    except OSError:  # it is not there
        return frozenset((me,))
    if owner != me and not allow_foreign:
        raise ForeignStore(
            f"the store {directory} belongs to another user (number {owner}): say "
            "--allow-foreign-store, in Python allow_foreign=True, if you trust that user"
        )
    return frozenset((me, owner))


def why_not(path: str, trusted: Collection[int]) -> str | None:
    """Why a directory of a store does not count; None where it does, or is not there."""
    try:
        status = os.lstat(path)
    except OSError:  # whoever uses it is told
        return None
    return _why_not(status, trusted)


def is_there(path: str, trusted: Collection[int]) -> bool:
    """Whether there is a directory that counts in a store."""
    try:
        status = os.lstat(path)
    except OSError:
        return False
    return _why_not(status, trusted) is None


def _why_not(status: os.stat_result, trusted: Collection[int]) -> str | None:
    if stat.S_ISLNK(status.st_mode):
        return LINK
    if not stat.S_ISDIR(status.st_mode):
        return NO_DIRECTORY
    return None if status.st_uid in trusted else THIRD


def check_directory(path: str, trusted: Collection[int]) -> None:
    """Whether a directory of a store counts, or is not there.

    Raises:
        StoreError: it does not.
    """
    if (why := why_not(path, trusted)) is not None:
        raise StoreError(f"{path} is not used: {why}")


def is_open(status: os.stat_result) -> bool:
    """Whether something of ours may be used by others, too."""
    return bool(status.st_mode & OTHERS) and status.st_uid == os.geteuid()


def close(path: str | os.PathLike[str], *, follow: bool = False) -> bool:
    """Take from others what they may do with a file or directory of ours, if it is open to them;
    return whether it was, and is not any more. A link is left alone, as is what it leads to, unless
    it is to be followed. Failing is no matter: there are file systems without modes.
    """
    try:
        if not is_open(os.stat(path, follow_symlinks=follow)):  # noqa: PTH116
            return False
        fd = os.open(path, _LOOK if follow else _LOOK | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        return close_fd(fd)
    finally:
        os.close(fd)


def close_fd(fd: int) -> bool:
    """As `close`, of what is open."""
    try:
        status = os.fstat(fd)
        if is_open(status):
            os.fchmod(fd, stat.S_IMODE(status.st_mode) & ~OTHERS)
            return not is_open(os.fstat(fd))
    except OSError:
        pass
    return False


def make_directory(path: str | os.PathLike[str]) -> None:
    """Make a directory for this user alone, whatever the umask is, if there is nothing there.

    Raises:
        OSError: the file system refuses.
    """
    try:
        os.mkdir(path, DIRECTORY)  # noqa: PTH102
    except FileExistsError:
        return
    os.chmod(path, DIRECTORY)  # noqa: PTH101


def open_file(path: str | os.PathLike[str], flags: int) -> int:
    """Open a file of a store; one that is made is for this user alone, whatever the umask is. No
    link is followed, and no pipe is waited for.

    Raises:
        OSError: the file system refuses.
    """
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, FILE)
    try:
        if flags & os.O_CREAT and not os.fstat(fd).st_mode & stat.S_IRUSR:
            os.fchmod(fd, FILE)
    except OSError:
        os.close(fd)
        raise
    return fd
