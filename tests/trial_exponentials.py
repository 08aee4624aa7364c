"""Every float32 from -89 to 88: its exponential beside MLX's own, bit for bit.

Infinity and a few numbers below -89 are compared as well; what is not a number has to stay none.
"""

from __future__ import annotations

import struct
import sys
from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_promptcache import exponentials
from outcome import Outcome, parser, some

if TYPE_CHECKING:
    from collections.abc import Sequence

RANGES = {  # of bits: from zero, from the first number whose exponential is not 1, to the last
    "above": (0.0, 2.0**-26, 88.0),
    "below": (-0.0, -(2.0**-26), -89.0),
}
PIECE = 1 << 20
OTHERS = (0.0, -89.5, -1e3, -3.4028235e38, float("-inf"), float("nan"))


def tried(pieces: int | None, seed: int) -> Outcome:
    """The trial of all pieces of a million numbers that follow one another, or of so many: these
    are of numbers whose exponential is not 1.
    """
    begins = []
    for zero, not_one, last in (map(_bits, of) for of in RANGES.values()):
        first = not_one if pieces else zero
        begins += [(begin, min(begin + PIECE, last + 1)) for begin in range(first, last + 1, PIECE)]
    values, wrong = 0, []
    for begin, end in some(begins, pieces, seed):
        bits = mx.arange(begin, end, dtype=mx.uint32)
        wrong += compared(bits.view(mx.float32))
        values += bits.size
    wrong += compared(mx.array(OTHERS))
    figures = {"numbers": values, "others": len(OTHERS)}
    return Outcome("exponentials", seed, figures, wrong)


def _bits(number: float) -> int:
    bits: int = struct.unpack("I", struct.pack("f", number))[0]
    return bits


def compared(values: mx.array) -> list[str]:
    """A sentence, if there is a number of which MLX has another exponential."""
    ours, own = (exp(values).view(mx.int32) for exp in (exponentials.exp, mx.exp))
    other = (ours != own) & ~(mx.isnan(values) & mx.isnan(ours.view(mx.float32)))
    count, i = other.sum().item(), mx.argmax(other)
    if not count:
        return []
    of, told, mlx = (array[i].item() for array in (values, ours, own))
    return [f"{count} others, the first of {of}: bits {told}, and MLX's {mlx}"]


def main(argv: Sequence[str]) -> int:
    """Run the trial and tell what came of it."""
    options = parser("exponentials", __doc__)
    options.add_argument("--pieces", type=int, help="of a million numbers each (default all)")
    asked = options.parse_args(argv)
    if asked.pieces is not None and asked.pieces < 1:
        options.error("--pieces must be 1 or more")
    mx.set_default_device(mx.Device(mx.cpu))
    return tried(asked.pieces, asked.seed).tell(as_json=asked.json)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
