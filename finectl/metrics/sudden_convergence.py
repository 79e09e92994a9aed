"""Sudden convergence: the update from which a ControlNet obeys its control, read off a curve by one stated rule.

A ControlNet does not follow its control gradually: after many updates in which nothing is seen it does so at once. The
rule, on the dissimilarity of control and result against updates (lower is better), with v_i its i-th value of n:

1. The drop between i - 1 and i is d_i = mean of the 3 values before it less the mean of the 3 values from i on; of
   fewer near an end, a and b of them, and then it counts d_i / sqrt(1/a + 1/b). The largest is the drop, at i = k.
2. The noise is the median of |v_i - v_(i-1)| over 0.6745 sqrt(2): the standard deviation of one value, were all
   changes noise; a single fall hardly moves a median. A drop of at most 5 times the noise is none. So a straight
   decline is not sudden either: it counts 3.5.
3. The threshold is the midpoint between the mean of v_0..v_(k-1) and that of v_k..v_(n-1). Where the second is not a
   tenth below the first, there is no drop: curves wander by some percent, more slowly than noise does.
4. The curve is smoothed: each value becomes the mean of itself and of the one on either side, where there is one.
5. The step is the first one from which on the smoothed curve stays below the threshold to its end.

Reference: Zhang et al., arXiv 2302.05543, section 3.3, for the phenomenon. Diff-Tuning (arXiv 2406.00773) measures it
by a threshold that was chosen by hand; the rule is ours.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

SMOOTHED = 3
LEAST = 4
"""Values without which there is no telling a drop from noise."""
DROPS_OVER_NOISE = 5.0
LEAST_SHARE = 0.1
"""Of the mean before a drop: what it falls by at least."""
NORMAL_MEDIAN = 0.6745
"""Median of the absolute value of a standard normal number."""


@dataclass(frozen=True)
class SuddenConvergence:
    """Where a curve falls.

    Args:
        step: The first measured update from which on it stays below the threshold.
        threshold: Midpoint between the means before and after the drop.
        before: Mean before the drop.
        after: Mean from it on.
        drop_at: The measured update of the drop.
        noise: Standard deviation of one value.
    """

    step: int
    threshold: float
    before: float
    after: float
    drop_at: int
    noise: float

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return asdict(self)


def sudden_convergence(curve: Sequence[tuple[int, float]]) -> SuddenConvergence | None:
    """Return where a curve falls; None where it has no drop beyond the noise, or does not stay below.

    Args:
        curve: (update, dissimilarity), in the order of updates, finite, lower is better.
    """
    steps, values = [step for step, _ in curve], [value for _, value in curve]
    if len(values) < LEAST:
        return None
    noise = _noise(values)
    at = max(range(1, len(values)), key=lambda index: _drop(values, index))  # of equal ones the first
    if _drop(values, at) <= DROPS_OVER_NOISE * noise:
        return None
    before, after = statistics.fmean(values[:at]), statistics.fmean(values[at:])
    if before - after < LEAST_SHARE * abs(before):
        return None
    threshold = (before + after) / 2
    below = [value < threshold for value in smoothed(values)]
    if not below[-1]:
        return None
    first = max((index + 1 for index, is_below in enumerate(below) if not is_below), default=0)
    return SuddenConvergence(steps[first], threshold, before, after, steps[at], noise)


def smoothed(values: Sequence[float]) -> list[float]:
    """Return the mean of each value and its neighbours, one on either side where there is one."""
    reach = SMOOTHED // 2
    return [statistics.fmean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]


def _noise(values: Sequence[float]) -> float:
    changes = [abs(after - before) for before, after in itertools.pairwise(values)]
    return statistics.median(changes) / (NORMAL_MEDIAN * math.sqrt(2))


def _drop(values: Sequence[float], index: int) -> float:
    """Return how far the values fall at an index, in units in which noise is alike near the ends."""
    before, after = values[max(0, index - SMOOTHED) : index], values[index : index + SMOOTHED]
    return (statistics.fmean(before) - statistics.fmean(after)) / math.sqrt(1 / len(before) + 1 / len(after))
