"""Timestep ranges: the timesteps 0..T-1 cut into contiguous parts."""

from __future__ import annotations

from itertools import pairwise

from finectl.errors import UsageError


def equal_ranges(timesteps: int, count: int) -> list[tuple[int, int]]:
    """Return `count` ranges (first, last), both inclusive, that cover 0..timesteps-1 as evenly as integers allow.

    Raises:
        UsageError: there are more ranges than timesteps, or fewer than one.
    """
    if not 1 <= count <= timesteps:
        raise UsageError(f"{count} ranges of {timesteps} timesteps", expected=f"between 1 and {timesteps}")
    borders = [round(index * timesteps / count) for index in range(count + 1)]
    return [(first, end - 1) for first, end in pairwise(borders)]
