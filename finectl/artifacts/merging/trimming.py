"""The magnitude at which TIES cuts a task vector: the k-th largest of a whole tensor, in bounded memory.

A tensor of up to `PARTITIONED` elements is selected from in memory. A larger one is read once for every 16 bits of a
number, two times for float32: magnitudes are in the same order as their bits, so counting how often each value of the
upper 16 bits occurs gives those of the k-th largest, and counting the next 16 bits among the numbers that begin so
gives the rest. Both are exact, and give the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from finectl.artifacts.merging.numbers import Array

PARTITIONED = 1 << 22
DIGIT_BITS = 16
Stretches = Callable[[], Iterator[Array]]


def least_kept(stretches: Stretches, count: int, density: float, *, partitioned: int = PARTITIONED) -> Any:
    """Return the magnitude of the k-th largest of a tensor's entries, k being `density` of them and at least 1.

    Args:
        stretches: Gives the entries, float32 or float64, a stretch at a time and all anew at every call; a stretch may
            be overwritten.
        count: How many entries there are.
        density: In (0, 1].
        partitioned: Up to how many entries are held in memory.

    Returns:
        The magnitude as a scalar of the entries' type.
    """
    rank = max(1, round(density * count))
    if count <= partitioned:
        bits = np.concatenate([_magnitudes(stretch) for stretch in stretches()])
        bits.partition(count - rank)
        found = bits[count - rank]
    else:
        found = _counted(stretches, rank)
    return found.view(np.float32 if found.dtype == np.uint32 else np.float64)


def _magnitudes(values: Array) -> Array:
    """Return the bits of the magnitudes, which are in the order of the magnitudes; NaN comes last."""
    return np.abs(values).view(np.uint32 if values.dtype == np.float32 else np.uint64)


def _counted(stretches: Stretches, rank: int) -> Any:
    """Return the bits of the magnitude of that rank, the largest being 1, found digit by digit."""
    prefix, shift = 0, -1
    while shift:
        counts = np.zeros(1 << DIGIT_BITS, np.int64)
        for stretch in stretches():
            bits = _magnitudes(stretch)
            kind = bits.dtype.type
            width = 8 * bits.itemsize
            digit = shift - DIGIT_BITS if shift > 0 else width - DIGIT_BITS
            if shift > 0:
                bits = bits[(bits >> kind(shift)) == kind(prefix)]
            low = (bits >> kind(digit)) & kind((1 << DIGIT_BITS) - 1)
            counts += np.bincount(low.astype(np.int64), minlength=1 << DIGIT_BITS)
        from_above = np.cumsum(counts[::-1])
        steps = int(np.searchsorted(from_above, rank))
        rank -= int(from_above[steps - 1]) if steps else 0
        prefix, shift = (prefix << DIGIT_BITS) | (len(counts) - 1 - steps), digit
    return kind(prefix)
