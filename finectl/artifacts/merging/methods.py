"""The methods, on a stretch of one tensor: what each makes of theta_0 and the models' numbers.

Every method works on the differences tau_i = theta_i - theta_0 rather than on sum_i w_i theta_i + (1 - sum_i w_i)
theta_0, which is the same sum: between models that are close the differences are exact, so that models which are equal
merge to just that model, and the result is rounded as its own size asks and not as that of terms which cancel.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from finectl.artifacts.merging.numbers import Array

MASK_BITS = 32


def add_weighted(base: Array, weighted: Iterable[tuple[float, Array]]) -> Array:
    """Return base + sum_i w_i tau_i; the order of the models decides that of the additions.

    Args:
        base: theta_0, float32 or float64 (N,).
        weighted: w_i and theta_i; the arrays are overwritten, and each may reuse the memory of the one but one before.
    """
    total: Array | None = None
    for weight, values in weighted:
        np.subtract(values, base, out=values)
        np.multiply(values, values.dtype.type(weight), out=values)
        total = values if total is None else np.add(total, values, out=total)
    return base if total is None else np.add(total, base, out=total)


def keep_at_random(
    models: Iterable[tuple[int, float, Array]], base: Array, masks: Masks
) -> Iterator[tuple[float, Array]]:
    """Give for each model its weight over the density, and theta_i where its mask keeps tau_i, else theta_0."""
    for index, weight, values in models:
        np.copyto(values, base, where=masks.dropped(index, values.size))
        yield weight / masks.density, values


class Masks:
    """The random masks of DARE for one stretch of a tensor, whatever was asked for before.

    Args:
        density: Share of the entries that are kept, in (0, 1).
        seed: Of the random numbers.
        name: The tensor.
        first: Its element with which the stretch begins; even.
    """

    def __init__(self, density: float, seed: int, name: str, first: int) -> None:
        self.density = density
        self._seed, self._name, self._first = seed, name, first

    def dropped(self, index: int, count: int) -> NDArrayBool:
        """Return which of `count` entries of model `index` are dropped; bool (count,)."""
        key = hashlib.sha256(f"{self._seed}/{index}/{self._name}".encode()).digest()
        generator = np.random.PCG64DXSM(int.from_bytes(key, "little"))
        generator.advance(self._first // 2)  # one of its numbers serves two entries
        numbers = generator.random_raw((count + 1) // 2).view(np.uint32)[:count]
        return numbers >= np.uint32(min(round(self.density * 2**MASK_BITS), 2**MASK_BITS - 1))


def agree_on_sign(base: Array, weighted: Iterable[tuple[float, float, Array]], scale: float) -> Array:
    """Return base + scale * the weighted mean of the kept differences whose sign wins, entry by entry.

    Args:
        base: theta_0, float32 or float64 (N,).
        weighted: w_i, the magnitude from which on entries of tau_i are kept, and theta_i, which is overwritten.
        scale: What the mean is multiplied by.

    Reference:
        Yadav et al., "TIES-Merging", arXiv 2306.01708, section 4.
    """
    # Sums of w tau, and of |w|, over the positive and over the negative entries: the sign is elected by the sum of all,
    # and the mean is then that of one side, so that the differences need not be kept.
    sums = [np.zeros_like(base) for _ in range(4)]
    above, below, above_weight, below_weight = sums
    for weight, least, values in weighted:
        np.subtract(values, base, out=values)
        np.copyto(values, 0, where=np.abs(values) < least)
        np.multiply(values, values.dtype.type(weight), out=values)
        above += np.maximum(values, 0)
        below += np.minimum(values, 0)
        share = values.dtype.type(abs(weight))
        np.add(above_weight, share, out=above_weight, where=values > 0)
        np.add(below_weight, share, out=below_weight, where=values < 0)
    total = above + below  # 0 where nobody wins, not a number where one of the models is not
    np.divide(above, above_weight, out=above, where=total > 0)
    np.divide(below, below_weight, out=below, where=total < 0)
    mean = np.where(total > 0, above, np.where(total < 0, below, total))
    mean *= mean.dtype.type(scale)
    return np.add(mean, base, out=mean)


NDArrayBool = np.ndarray[Any, np.dtype[np.bool_]]
