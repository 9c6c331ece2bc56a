"""Random numbers by key, not by stream: what is drawn depends on its key alone.

A stream hands out numbers in call order, so concurrency changes an episode. Here every draw is a hash of (seed,
what it is for), so two processes, a shuffled order or a resumed run draw the same.
"""

from __future__ import annotations

import random
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

Key = int | str | bytes | float | None
_GOLDEN = 0x9E3779B97F4A7C15


def digest(*parts: Key, size: int = 8) -> bytes:
    """`size` bytes of BLAKE2b over the parts. Each part carries its type and length: ("a", "b") is not ("ab",)."""
    h = blake2b(digest_size=size)
    for part in parts:
        data = part if isinstance(part, bytes) else repr(part).encode()
        h.update(b"%s:%d:" % (type(part).__name__.encode(), len(data)))
        h.update(data)
    return h.digest()


def key(*parts: Key) -> int:
    """An unsigned 64-bit number that depends on the parts and on nothing else."""
    return int.from_bytes(digest(*parts), "little")


def rng(*parts: Key) -> random.Random:
    """A generator of its own for one purpose: `rng(seed, "price", slot, turn)`."""
    return random.Random(key(*parts))


def share(*parts: Key) -> float:
    """A number in [0, 1) from the key; use it for splits: `share("split", product_id) < 0.2`."""
    return key(*parts) / 2.0**64


def uniforms(keys: NDArray[np.uint64], positions: NDArray[Any]) -> NDArray[np.float64]:
    """One uniform in [0, 1) for each (key, position) pair; both [N], vectorised. This is the sampling noise."""
    with np.errstate(over="ignore"):
        x = keys.astype(np.uint64) + (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    uniform: NDArray[np.float64] = (x >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return uniform
