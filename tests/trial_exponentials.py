"""Every float32 from -89 to 0: its exponential beside MLX's own, bit for bit.

Infinity and a few numbers below -89 are compared as well; what is not a number has to stay none.
"""

from __future__ import annotations

import struct
import sys
from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_promptcache import softmax
from outcome import Outcome, parser, some

if TYPE_CHECKING:
    from collections.abc import Sequence

FIRST, NOT_ONE, LAST = (
    struct.unpack("I", struct.pack("f", x))[0] for x in (-0.0, -(2.0**-26), -89.0)
)
PIECE = 1 << 20
OTHERS = (0.0, -89.5, -1e3, -3.4028235e38, float("-inf"), float("nan"))


def tried(pieces: int | None, seed: int) -> Outcome:
    """The trial of all pieces of a million numbers that follow one another, or of so many: these
    are of numbers whose exponential is not 1.
    """
    begins = some(range(NOT_ONE if pieces else FIRST, LAST + 1, PIECE), pieces, seed)
    values, wrong = 0, []
    for begin in begins:
        bits = mx.arange(begin, min(begin + PIECE, LAST + 1), dtype=mx.uint32)
        wrong += compared(bits.view(mx.float32))
        values += bits.size
    wrong += compared(mx.array(OTHERS))
    figures = {"numbers": values, "others": len(OTHERS)}
    return Outcome("exponentials", seed, figures, wrong)


def compared(values: mx.array) -> list[str]:
    """A sentence, if there is a number of which MLX has another exponential."""
    ours, own = (exp(values).view(mx.int32) for exp in (softmax.exp, mx.exp))
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
