"""What does the arithmetic: the lineage of position 0.

Bits differ between machines, backends, BLAS libraries and releases of MLX. Rows that were computed
elsewhere agree to rounding and are used, but `--exact` must not take them for its own; so every
lineage begins with versions, device and the bits of a small product.
"""

from __future__ import annotations

import functools
import hashlib

import mlx.core as mx

from mlx_promptcache import engine
from mlx_promptcache.arrays import to_array
from mlx_promptcache.version import __version__


@functools.cache
def lineage() -> str:
    """The lineage of position 0 in this process."""
    a = mx.random.normal((64, 256), key=mx.random.key(0))
    b = mx.random.normal((256, 64), key=mx.random.key(1))
    bits = b"".join(to_array(mx.matmul(rows, b)).data for rows in (a, a[:1]))
    text = f"{versions()} {mx.default_device()}"
    return hashlib.blake2b(text.encode() + bits, digest_size=16).hexdigest()


@functools.cache
def versions() -> dict[str, str]:
    """The releases that compute a state and write it."""
    return {
        "mlx": str(vars(mx)["__version__"]),
        "mlx-lm": engine.version(),
        "mlx-promptcache": __version__,
    }
