"""Timestep ranges: the timesteps 0..T-1 cut into contiguous parts."""

from __future__ import annotations

from itertools import pairwise

from finectl.errors import UsageError


def equal_ranges(timesteps: int, count: int) -> list[tuple[int, int]]:
    """Return `count` ranges (first, last), both inclusive, that cover 0..timesteps-1 as evenly as integers allow.

    Raises:
        UsageError: there are more ranges than timesteps, or fewer than one.
    """
    _require_count(timesteps, count)
    borders = [round(index * timesteps / count) for index in range(count + 1)]
    return [(first, end - 1) for first, end in pairwise(borders)]


def equal_borders(timesteps: int, count: int) -> tuple[int, ...]:
    """Return the N + 1 borders of `count` equal ranges [border i, border i+1).

    Timestep t lies in the range of index floor(t N / T), also where N does not divide T.

    Raises:
        UsageError: there are more ranges than timesteps, or fewer than one.

    Reference: DeMe, arXiv 2410.06664, section 3.2.
    """
    _require_count(timesteps, count)
    return tuple(-(-index * timesteps // count) for index in range(count + 1))


def parse_borders(text: str, timesteps: int) -> tuple[int, ...]:
    """Return the borders of `--borders`, such as 0,250,500,1000.

    Raises:
        UsageError: they do not rise from 0 to the number of timesteps.
    """
    parts = [part.strip() for part in text.split(",")]
    if all(part.isascii() and part.isdecimal() for part in parts):
        borders = tuple(int(part) for part in parts)
        if is_partition(borders, timesteps):
            return borders
    raise UsageError(
        f"--borders {text!r} do not cut the timesteps 0..{timesteps - 1} into ranges",
        expected=f"integers that rise from 0 to {timesteps}, such as {','.join(map(str, equal_borders(timesteps, 2)))}",
    )


def is_partition(borders: tuple[int, ...], timesteps: int) -> bool:
    """Tell whether borders rise from 0 to the number of timesteps."""
    ends = borders[:1] == (0,) and borders[-1:] == (timesteps,)
    return ends and all(first < end for first, end in pairwise(borders))


def range_of(borders: tuple[int, ...], index: int) -> tuple[int, int]:
    """Return the range [first, end) of an index."""
    return borders[index], borders[index + 1]


def _require_count(timesteps: int, count: int) -> None:
    if not 1 <= count <= timesteps:
        raise UsageError(f"{count} ranges of {timesteps} timesteps", expected=f"between 1 and {timesteps}")
