"""A quadratic response surface in place of the grid: learn it from few measurements, measure where it is lowest.

1. A space-filling design is measured.
2. A quadratic is fitted, to the values or to their logarithms, points near the best weighted more.
3. The whole grid is ranked by it. Its lowest point is measured next, and the lowest points of quadratics that the
   measurements leave possible (draws from the fit's distribution): where the valley is flat these lie apart, where it
   is narrow they agree.
4. Where the fit does not predict left-out values, half of each batch explores: the points farthest from all measured.
5. This repeats until the lowest point has been measured and stays the same twice, or the budget is spent.

Reference: Box and Wilson, J. R. Stat. Soc. B 13(1), 1951 (response surfaces); Thompson, Biometrika 25, 1933 (draws).
The idea of replacing an expensive merging objective by a surrogate: arXiv 2509.02555.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from finectl.search.base import Candidate, Options, Space, seed_for
from finectl.search.design import latin_hypercube, scaled
from finectl.search.halving import Measurements, Score
from finectl.search.quadratic import Surface, coefficients, fit, terms
from finectl.search.replay import Replayed, Rounds

CHUNK = 1 << 16
WHOLE_GRID = 1 << 21  # candidates that are ranked one by one; a larger box is searched by descents
DESCENTS = 32
FARTHEST_OF = 1 << 13
SWEEPS = 20
WIDTH = 0.7  # standard deviation of the weights around the best, as a share of half the range of a coefficient
DESIGN_SHARE = 0.7
POOR_SKILL = 0.5
PATIENCE = 2
BATCH = 2

Array = NDArray[np.float64]
Indices = NDArray[np.int64]


class Surrogate(Replayed):
    """Ranks the grid by a quadratic fitted to what has been measured.

    Args:
        space: The candidates.
        options: What every strategy is told. Without a budget it is twice the coefficients of the quadratic, and 4
            more for each dimension above two: 12, 24, 38 measurements for 2, 3, 4 coefficients.
    """

    def __init__(self, space: Space, options: Options) -> None:
        super().__init__(space, options)
        unknowns = coefficients(space.dimensions)
        own = 2 * unknowns + 4 * max(space.dimensions - 2, 0)
        self.budget = float(min(space.size, own)) if options.budget is None else options.budget
        self.batch = options.batch or BATCH
        self.first = max(1, min(unknowns + space.dimensions - 1, math.floor(self.budget * DESIGN_SHARE)))

    def rounds(self) -> Rounds:
        """Yield the design, then a few promising candidates after each fit."""
        found = Measurements(replace(self.options, budget=self.budget))
        yield from found.take(latin_hypercube(self.space, self.first, self.options.seed, starts=self.options.starts))
        lowest: Candidate | None = None
        unchanged = 0
        for number in itertools.count():
            surface = self._surface(found.scores)
            picks, low = self._proposals(surface, found.scores, number)
            settled = low == lowest and low in found.scores and surface.skill >= POOR_SKILL
            unchanged = unchanged + 1 if settled else 0
            lowest = low
            before = found.spent
            if unchanged < PATIENCE:
                yield from found.take(picks)
            if found.spent == before:
                return

    def candidates(self) -> tuple[int, int]:
        """Return the design's measurements and the budget."""
        return math.ceil(self.first * self.options.counts[0] / self.options.samples), math.floor(self.budget)

    def _surface(self, scores: Mapping[Candidate, Score]) -> Surface:
        """Fit the quadratic; a candidate that could not be measured counts as the worst of the others."""
        points = scaled(self.space, np.array([self.space.indices(candidate) for candidate in scores]))  # (M, N)
        values = np.array([score.value for score in scores.values()])
        finite = np.isfinite(values)
        values[~finite] = values[finite].max() if finite.any() else 0.0
        distance = ((points - points[np.argmin(values)]) ** 2).mean(axis=1)
        precision = np.array([score.share for score in scores.values()])
        return fit(points, values, precision * np.exp(-distance / (2 * WIDTH**2)))

    def _proposals(
        self, surface: Surface, scores: Mapping[Candidate, Score], number: int
    ) -> tuple[list[Candidate], Candidate]:
        """Return the new candidates to measure, and the lowest point of the fit."""
        generator = np.random.default_rng(seed_for("surrogate", self.options.seed, number))
        low, *possible = self._lowest(surface.draws(4 * self.batch, generator), generator)
        far = self._farthest(list(scores), self.batch // 2, generator) if surface.skill < POOR_SKILL else []
        picks = [candidate for candidate in dict.fromkeys([low, *far, *possible]) if candidate not in scores]
        return picks[: self.batch], low

    def _lowest(self, draws: Array, generator: np.random.Generator) -> list[Candidate]:
        """Return the candidate at which each quadratic, (P, D), is lowest."""
        if self.space.size > WHOLE_GRID:
            return [self._descend(draw, generator) for draw in draws.T]
        values = np.full(draws.shape[1], np.inf)
        found = np.zeros((draws.shape[1], self.space.dimensions), dtype=np.int64)
        for start in range(0, self.space.size, CHUNK):
            steps = self._steps(np.arange(start, min(start + CHUNK, self.space.size)))  # (M, N)
            predicted = terms(scaled(self.space, steps)) @ draws  # (M, D)
            lowest = predicted.argmin(axis=0)
            value = predicted[lowest, np.arange(len(values))]
            found = np.where((value < values)[:, None], steps[lowest], found)
            values = np.minimum(value, values)
        return [self.space.candidate(steps) for steps in found]

    def _descend(self, draw: Array, generator: np.random.Generator) -> Candidate:
        """Return the lowest point that descents along single coefficients reach from many random candidates."""
        levels = np.arange(self.space.levels)
        steps = generator.integers(self.space.levels, size=(DESCENTS, self.space.dimensions))  # (S, N)
        for _ in range(SWEEPS):
            before = steps.copy()
            for dimension in range(self.space.dimensions):
                trials = np.repeat(steps[:, None, :], self.space.levels, axis=1)  # (S, L, N)
                trials[:, :, dimension] = levels
                flat = trials.reshape(-1, self.space.dimensions)
                predicted = terms(scaled(self.space, flat)) @ draw  # (S * L,)
                steps[:, dimension] = predicted.reshape(DESCENTS, -1).argmin(axis=1)
            if (steps == before).all():
                break
        return self.space.candidate(steps[(terms(scaled(self.space, steps)) @ draw).argmin()])

    def _farthest(self, known: list[Candidate], count: int, generator: np.random.Generator) -> list[Candidate]:
        """Return candidates as far as possible from all measured ones and from each other, of a random part of all."""
        if self.space.size <= FARTHEST_OF:
            steps = self._steps(np.arange(self.space.size))
        else:
            steps = generator.integers(self.space.levels, size=(FARTHEST_OF, self.space.dimensions))
        points = scaled(self.space, steps)
        nearest = np.full(len(points), np.inf)
        for candidate in known:
            place = scaled(self.space, np.array(self.space.indices(candidate)))
            nearest = np.minimum(nearest, ((points - place) ** 2).sum(axis=1))
        picks = []
        for _ in range(count):
            row = int(nearest.argmax())
            picks.append(self.space.candidate(steps[row]))
            nearest = np.minimum(nearest, ((points - points[row]) ** 2).sum(axis=1))
        return picks

    def _steps(self, ranks: Indices) -> Indices:
        """Return the candidates of the given ranks in the order of `Space.points`, as (M, N) steps from `low`."""
        shape = (self.space.levels,) * self.space.dimensions
        return np.stack(np.unravel_index(ranks, shape), axis=1).astype(np.int64)
