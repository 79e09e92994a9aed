"""The whole box, point by point: the reference that every other strategy is measured against."""

from __future__ import annotations

from finectl.errors import UsageError
from finectl.search.base import Options, Space
from finectl.search.halving import Measurements
from finectl.search.replay import Replayed, Rounds


class Grid(Replayed):
    """Measures every candidate, in the order of `Space.points`.

    Raises:
        UsageError: the budget is smaller than the box.
    """

    def __init__(self, space: Space, options: Options) -> None:
        super().__init__(space, options)
        if options.budget is not None and options.budget < self.candidates()[0]:
            raise UsageError(
                f"the grid has {space.size:,} candidates, the budget is {options.budget:g} measurements",
                expected="a budget for all of them",
                fix="take a larger step, or search by surrogate or coarse-to-fine",
            )

    def rounds(self) -> Rounds:
        """Yield the one batch there is, and with successive halving the better part of it again."""
        yield from Measurements(self.options).take(self.space.points())

    def candidates(self) -> tuple[int, int]:
        """Return how many full measurements the box costs."""
        least = -(-self.space.size * self.options.counts[0] // self.options.samples)
        return least, self.space.size if len(self.options.counts) == 1 else 2 * self.space.size
