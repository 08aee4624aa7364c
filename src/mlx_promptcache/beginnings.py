"""Where blocks begin on the way of one prompt, told by the names of files alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlx_promptcache import layout
from mlx_promptcache.layout import BLOCKS
from mlx_promptcache.tree import KEY_BYTES, BlockName, cell_start, shard

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mlx_promptcache.store import Store
    from mlx_promptcache.tree import Keys


KEY_DIGITS = 2 * KEY_BYTES
MOST_LISTED = 2000  # directories; to list more takes longer than to look for each in vain


class Beginnings:
    """The blocks of a store that begin at positions of one prompt with the token there. Each
    position is looked at once.
    """

    def __init__(self, store: Store, keys: Keys) -> None:
        self._store, self._keys = store, keys
        self._stems: dict[int, list[str]] = {}
        self._asked = False
        self._present: list[str] | None = None

    def at(self, position: int) -> list[str]:
        """The stems of those that begin at a position, in order."""
        if position not in self._stems:
            self._look([position])
        return self._stems[position]

    def among(self, start: int, stop: int) -> list[int]:
        """The positions in `[start, stop)`, all of one cell, where some begin."""
        unknown = [at for at in range(start, stop) if at not in self._stems]
        if unknown:
            self._stems.update({at: [] for at in unknown})
            self._look(self._possible(unknown))
        return [at for at in range(start, stop) if self._stems.get(at)]

    def _possible(self, positions: list[int]) -> list[int]:
        """Those of these positions of one cell with whose tokens some may begin, as far as the
        directories tell that are there. A key, which tells more, takes longer to compute.
        """
        if not self._asked:
            self._asked, self._present = True, self._store.few_names_in(BLOCKS, MOST_LISTED)
        cell, tokens = shard(self._keys[cell_start(positions[0])]), self._keys.tokens
        if self._present is None or cell in self._present:
            return positions
        digits = {name[-1] for name in self._present if name.startswith(cell)}
        return [at for at in positions if layout.digit(tokens[at]) in digits]

    def _look(self, positions: Iterable[int]) -> None:
        """Look into the directories of these positions, all of one cell."""
        starts, wanted = {}, set()
        for at in positions:
            cell, token = shard(self._keys[cell_start(at)]), self._keys.tokens[at]
            starts[at] = f"{cell}/{self._keys[at]}-{token}-"
            wanted.update(layout.directories(BLOCKS, starts[at]))
        by_key: dict[str, list[tuple[str, str]]] = {}
        for directory, names in self._store.names_in_each(BLOCKS, wanted).items():
            for name in names:
                by_key.setdefault(name[:KEY_DIGITS], []).append((directory, name))
        for at, start in starts.items():
            first = start.partition("/")[2]
            there = by_key.get(first[:KEY_DIGITS], ())
            stems = {layout.stem(BLOCKS, *place) for place in there if place[1].startswith(first)}
            self._stems[at] = sorted(stem for stem in stems if stem and BlockName.parse(stem))
