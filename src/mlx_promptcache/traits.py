"""Traits: what of a model's layers decides where prompts are cut and marked."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from mlx_promptcache.blueprint import Blueprint
    from mlx_promptcache.ranks import Ranks


class Traits(NamedTuple):
    """Whether there are layers that are opaque, that are other than rows, and whose contents depend
    on where passes are cut.
    """

    opaque: bool = False
    other_than_rows: bool = False
    cuts_matter: bool = False

    @classmethod
    def of(cls, blueprint: Blueprint | None) -> Traits:
        """Those of this process's layers."""
        if blueprint is None:
            return cls()
        return cls(bool(blueprint.opaque), not blueprint.sliceable, blueprint.cuts_matter)

    def of_all(self, ranks: Ranks) -> Traits:
        """Those of the layers of all ranks, as each has only some of them. A call of all ranks."""
        rows = ranks.told("looking at the layers", *map(int, self))
        return Traits(*(any(told) for told in zip(*rows, strict=True)))
