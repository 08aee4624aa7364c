"""How fast this machine reads a store, and computes a model's prompts: is reading worth it?

Reading a state from a slow drive or over a network can take longer than computing it. What was
measured is kept in the user's cache directory; losing it costs one slow read.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

from mlx_promptcache import memo, places

if TYPE_CHECKING:
    from pathlib import Path

LEAST_BYTES = 1 << 22  # what is read of less says little, and takes no time
LEAST_TOKENS = 256
SLOWER = 2.0  # times that reading must take longer than computing ...
WAIT_SECONDS = 0.25  # ... and seconds, to be left alone: figures of one run are rough
FORGET = 1.5  # each time that reading is left alone its rate is believed to be so much better


class Rates:
    """The rates of one place, a directory or a URL, and one fingerprint on this machine."""

    def __init__(self, place: Path | str, fingerprint: str) -> None:
        where = place if isinstance(place, str) else place.absolute()
        self._read, self._computed = f"read {where}", f"compute {fingerprint}"

    def computing_seconds(self, tokens: int) -> float | None:
        """How long computing so many tokens takes; None if that is not known yet."""
        rate = _load().get(self._computed)
        return tokens / rate if rate else None

    def reading_is_slower(self, stored_bytes: int, tokens: int) -> bool:
        """Whether so many bytes would be read much later than so many tokens are computed.

        Saying yes makes the next answer more hopeful: drives wake up, networks recover.
        """
        if stored_bytes < LEAST_BYTES:
            return False
        known = _load()
        read, computed = known.get(self._read), known.get(self._computed)
        if not read or not computed:
            return False
        reading, computing = stored_bytes / read, tokens / computed
        slower = reading > SLOWER * computing and reading > computing + WAIT_SECONDS
        if slower:
            _save({**known, self._read: read * FORGET})
        return slower

    def note_read(self, stored_bytes: int, seconds: float) -> None:
        """Note how long reading took; it counts as much as all that is known of before."""
        if stored_bytes >= LEAST_BYTES and seconds > 0:
            _note(self._read, stored_bytes / seconds)

    def note_computed(self, tokens: int, seconds: float) -> None:
        """The same of a prompt that was computed."""
        if tokens >= LEAST_TOKENS and seconds > 0:
            _note(self._computed, tokens / seconds)


def _note(name: str, rate: float) -> None:
    known = _load()
    before = known.get(name)
    if before is None or abs(rate - before) > before / 10:  # small changes are not worth a write
        _save({**known, name: rate if before is None else (rate + before) / 2})


def _load() -> dict[str, float]:
    try:
        known = json.loads(places.rates_memo().read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {k: v for k, v in known.items() if isinstance(v, float) and 0 < v < math.inf}


def _save(known: dict[str, float]) -> None:
    memo.write(places.rates_memo(), json.dumps(known))
