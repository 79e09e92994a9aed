"""A coarse grid, then the neighbours of the best on finer and finer ones, as the paper describes.

Four coefficients between 0 and 1 in steps of 0.1: the coarse grid {0, 0.3, 0.6, 0.9}^4 has 256 candidates, and the
3^4 neighbourhood of the best 80 more, 336 in all (271 where the best is the corner at 0). Each time the neighbourhood
holds a better candidate, its own neighbours that are new follow: 27 after a move along one axis, 45, 57 and 65 after
one along two, three and four (fewer at the border).

Reference: arXiv 2410.06664, section 8: a large step first, then a smaller one where the objective is best. Bounds,
steps and counts are not published; these are ours.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from finectl.errors import UsageError
from finectl.search.base import Candidate, Options, Space
from finectl.search.halving import Measurements
from finectl.search.replay import Replayed, Rounds

COARSE_VALUES = 4
SHRINK = 3


class CoarseToFine(Replayed):
    """Measures a coarse grid, then repeats steps around the best until nothing near it is better.

    Args:
        space: The candidates.
        options: What every strategy is told. The search stops where its budget is spent.
        coarse: Fine steps to a coarse one; None for the fewest that leave at most 4 values of a coefficient.
        refine: Halvings of the step after the last, for candidates between those of the grid.

    Raises:
        UsageError: the coarse grid alone exceeds the budget, or a number makes no sense.
    """

    def __init__(self, space: Space, options: Options, *, coarse: int | None = None, refine: int = 0) -> None:
        super().__init__(space, options)
        self.coarse = -(-space.levels // COARSE_VALUES) if coarse is None else coarse
        self.refine = refine
        if self.coarse < 1 or refine < 0:
            raise UsageError(f"coarse-to-fine with a coarse step of {self.coarse} and {refine} refinements")
        if options.budget is not None and options.budget < self.candidates()[0]:
            raise UsageError(
                f"coarse-to-fine measures {self.candidates()[0]:,} candidates at least, "
                f"the budget is {options.budget:g}",
                fix="take a larger step, or search by surrogate",
            )

    def rounds(self) -> Rounds:
        """Yield the coarse grid, then the new neighbours of the best at each step."""
        found = Measurements(self.options)
        yield from found.take(self._coarse_grid())
        step, space = self.coarse, self.space
        halvings = self.refine
        while step > 1 or halvings:
            if step > 1:
                step = max(1, step // SHRINK)
            else:
                halvings -= 1
                space = space.finer()
            yield from self._descend(found, space, step)

    def _coarse_grid(self) -> Iterator[Candidate]:
        return itertools.product(self.space.values[:: self.coarse], repeat=self.space.dimensions)

    def _descend(self, found: Measurements, space: Space, step: int) -> Rounds:
        centre = None
        while centre != found.best():
            centre = found.best()
            middle = space.indices(centre)
            moves = itertools.product((-step, 0, step), repeat=space.dimensions)
            near = (space.candidate([k + move for k, move in zip(middle, moved, strict=True)]) for moved in moves)
            yield from found.take(near)

    def candidates(self) -> tuple[int, int]:
        """Return the coarse grid and one neighbourhood in its corner, and the whole box."""
        coarse = len(self.space.values[:: self.coarse]) ** self.space.dimensions
        near = min(2, self.space.levels) ** self.space.dimensions - 1 if self.coarse > 1 else 0
        least = -(-(coarse + near) * self.options.counts[0] // self.options.samples)
        return least, self.space.finer(2**self.refine).size if self.refine else self.space.size
