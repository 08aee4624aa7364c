"""What a drive may hold after a power cut: all that was synced, and any part of all else.

POSIX promises of a file that its bytes are there if `fsync` of the file returned, and of a name if
`fsync` of its directory did. Until then the bytes of a file may be lost, be there in part, or be
zeros, and of the changes to the names of a directory any may be missing, whatever came after.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from shim import Done

WHOLE, LOST, PART, ZEROS = "whole", "lost", "part", "zeros"
FATES = (LOST, PART, ZEROS)  # of bytes that were not synced
MISSING = "missing"  # of a change to names


@dataclass(eq=False)
class File:
    """A file: its bytes, and those that are on the drive for certain."""

    data: bytes = b""
    synced: bytes = b""

    def after(self, fate: str) -> bytes:
        """Its bytes after a power cut."""
        new = self.data[len(self.synced) :]
        kept = {WHOLE: new, LOST: b"", PART: new[: len(new) // 2], ZEROS: bytes(len(new))}
        return self.synced + kept[fate]


@dataclass(eq=False)
class Directory:
    """A directory: its names now, those that are on the drive for certain, and what changed since,
    each change with all names that it changes at once.
    """

    names: dict[str, File | Directory] = field(default_factory=dict)
    synced: dict[str, File | Directory] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Change:
    """Names of a directory that stand for other files from now on, or (None) for none."""

    names: dict[str, File | Directory | None]

    def apply(self, names: dict[str, File | Directory]) -> None:
        for name, node in self.names.items():
            names.pop(name, None)
            if node is not None:
                names[name] = node


Fate = dict[File | Change, str]  # of each that is not whole
Files = dict[str, bytes | None]  # by path; None for a directory


class Drive:
    """A drive that holds what is in a directory, all of it synced; `do` does calls on it."""

    def __init__(self, directory: Path) -> None:
        self._top, self._path = _read(directory), str(directory)

    def do(self, done: Done) -> None:
        """Do a call that the shim saw. Calls that change nothing on the drive are passed over."""
        function, other = done.function, done.other
        if function == "create" and self._find(done.path) is None:
            self._change(done.path, File())
        elif function == "mkdir":
            self._change(done.path, Directory())
        elif function == "write":
            node = self._find(done.path)
            assert isinstance(node, File)
            node.data += other
        elif function in {"unlink", "remove", "rmdir"}:
            self._change(done.path, None)
        elif function == "link":
            self._change(other, self._find(done.path))
        elif function in {"rename", "replace"}:
            self._rename(done.path, other)
        elif function in {"fsync", "fdatasync"}:
            self._sync(self._find(done.path))

    def _sync(self, node: File | Directory | None) -> None:
        if isinstance(node, File):
            node.synced = node.data
        elif isinstance(node, Directory):
            node.synced = dict(node.names)
            node.changes.clear()

    def _rename(self, path: str, other: str) -> None:
        node, (old, name), (new, target) = self._find(path), self._place(path), self._place(other)
        changed: dict[str, File | Directory | None] = {name: None}
        if old is not new:  # then one may be on the drive without the other
            self._change(other, node)
        else:
            changed[target] = node
        self._add(old, Change(changed))

    def _change(self, path: str, node: File | Directory | None) -> None:
        directory, name = self._place(path)
        self._add(directory, Change({name: node}))

    def _add(self, directory: Directory, change: Change) -> None:
        change.apply(directory.names)
        directory.changes.append(change)

    def _place(self, path: str) -> tuple[Directory, str]:
        above, _, name = path.rpartition("/")
        directory = self._find(above)
        assert isinstance(directory, Directory)
        return directory, name

    def _find(self, path: str) -> File | Directory | None:
        node: File | Directory | None = self._top
        for name in path.removeprefix(self._path).split("/"):
            if name:
                node = node.names.get(name) if isinstance(node, Directory) else None
        return node

    # After a power cut

    def unsynced(self) -> list[File | Change]:
        """The changes that may be missing, and the files whose bytes may."""
        found: dict[File | Change, None] = {}
        seen: set[Directory] = set()
        waiting: list[File | Directory | None] = [self._top]
        for node in waiting:  # grows
            if isinstance(node, File) and node.data != node.synced:
                found[node] = None
            elif isinstance(node, Directory) and node not in seen:
                seen.add(node)
                found.update(dict.fromkeys(node.changes))
                waiting += [*node.synced.values(), *node.names.values()]
                waiting += [n for change in node.changes for n in change.names.values()]
        return list(found)

    def after(self, fate: Fate) -> Files:
        """What is on the drive after a power cut with this fate."""
        found: Files = {}
        waiting: list[tuple[str, File | Directory]] = [("", self._top)]
        for path, node in waiting:  # grows
            if isinstance(node, File):
                found[path] = node.after(fate.get(node, WHOLE))
                continue
            found[path] = None
            names = dict(node.synced)
            for change in node.changes:
                if change not in fate:
                    change.apply(names)
            waiting += [(f"{path}/{name}".lstrip("/"), n) for name, n in names.items()]
        return found

    def fates(self, draw: random.Random, most: int, drawn: int) -> Iterator[Fate]:
        """All fates of what is not synced if these are at most so many. Else: nothing and all of it
        lost, each one and each two lost, each one kept, and so many that are drawn.
        """
        unsynced = self.unsynced()
        fates = [(WHOLE, *_fates_of(node)) for node in unsynced]
        count = 1
        for each in fates:
            count *= len(each)
        if count <= most:
            for chosen in itertools.product(*fates):
                yield _fate(unsynced, chosen)
            return
        alone = [{node: f} for node in unsynced for f in _fates_of(node)]
        lost = {node: _fates_of(node)[0] for node in unsynced}
        yield from ({}, lost, *alone)
        yield from ({n: f for n, f in lost.items() if n is not node} for node in unsynced)
        yield from ({**a, **b} for a, b in itertools.combinations(alone, 2) if a.keys() != b.keys())
        for _ in range(drawn):
            yield _fate(unsynced, [draw.choice(each) for each in fates])


def _fates_of(node: File | Change) -> tuple[str, ...]:
    return FATES if isinstance(node, File) else (MISSING,)


def _fate(nodes: Sequence[File | Change], chosen: Sequence[str]) -> Fate:
    return {node: fate for node, fate in zip(nodes, chosen, strict=True) if fate != WHOLE}


def _read(path: Path) -> Directory:
    names: dict[str, File | Directory] = {}
    for inside in path.iterdir():
        data = b"" if inside.is_dir() else inside.read_bytes()
        names[inside.name] = _read(inside) if inside.is_dir() else File(data, data)
    return Directory(names, dict(names))


def write(files: Files, directory: Path) -> None:
    """Write what a drive holds into a directory."""
    for path, data in files.items():
        if data is None:
            (directory / path).mkdir(mode=0o700)
        else:
            (directory / path).write_bytes(data)
