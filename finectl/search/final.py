"""The choice at the end: the best few are measured again on fresh noise, and the winner is chosen on that alone.

The best of many noisy values is too good by about the noise itself; a second, independent measurement of a few is not.
"""

from __future__ import annotations

from collections.abc import Sequence

from finectl.errors import ComputationError
from finectl.search.base import Ask, Measured, first_of_each, ranking

RESCORED = 5
FRESH = 1


def rescore(history: Sequence[Measured], count: int = RESCORED, *, noise: int = FRESH) -> list[Ask]:
    """Return the measurements that the final choice still needs: of the best few, on fresh noise.

    Args:
        history: What was measured; the best are those of noise 0 with the most samples.
        count: How many.
        noise: The set of noises that the search has not seen.
    """
    known = first_of_each(history)
    asks = [Ask(entry.candidate, entry.samples, noise) for entry in ranking(history)[:count]]
    return [ask for ask in asks if ask not in known]


def winner(history: Sequence[Measured], count: int = RESCORED, *, noise: int = FRESH) -> Measured:
    """Return the best of the best few on fresh noise.

    Raises:
        ComputationError: none of them has a finite value there.
    """
    known = first_of_each(history)
    asks = [Ask(entry.candidate, entry.samples, noise) for entry in ranking(history)[:count]]
    again = ranking([known[ask] for ask in asks if ask in known], noise=noise)
    if not again:
        raise ComputationError(
            "no candidate has a finite objective on fresh noise",
            expected="at least one of the best of the search measured again",
        )
    return again[0]
