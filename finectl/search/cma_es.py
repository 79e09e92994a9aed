"""CMA-ES through optuna: generations of candidates around a mean that moves and a covariance that adapts.

The strategy's state is rebuilt by running it again over the history, with the same seed and the same answers: no
storage of optuna's is needed, and several workers share a search by sharing its journal. They work on one generation
at a time, `batch` candidates. Proposals are real vectors, snapped to the grid: the variant for integers (with a
margin) was tried and stops too early on so small a grid.

Reference: arXiv 1604.00772 (CMA-ES).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from finectl.errors import UsageError
from finectl.search.base import Candidate, Options, Space, seed_for
from finectl.search.halving import Measurements, Score
from finectl.search.optional import import_optuna, require_cmaes
from finectl.search.replay import Replayed, Rounds

BUDGET_A_DIMENSION = 25
STALE_GENERATIONS = 3
INITIAL_WIDTH = 0.25  # standard deviation of the first generation, as a share of the range


class CmaEs(Replayed):
    """Evolves a normal distribution over the box.

    Args:
        space: The candidates, of two coefficients or more.
        options: What every strategy is told. Without a budget it is 25 measurements a coefficient; a batch is a
            generation, by default 4 + 3 ln N.

    Raises:
        UsageError: optuna or cmaes is not installed, or there is but one coefficient.
    """

    def __init__(self, space: Space, options: Options) -> None:
        super().__init__(space, options)
        import_optuna()
        require_cmaes()
        if space.dimensions < 2 or space.levels < 2:
            raise UsageError(
                "cma-es adapts a covariance, which one coefficient does not have",
                expected="two coefficients or more, of two values or more",
                fix="--search grid",
            )
        own = min(space.size, BUDGET_A_DIMENSION * space.dimensions)
        self.budget = float(own) if options.budget is None else options.budget
        self.generation = max(options.batch or 0, 4 + math.floor(3 * math.log(space.dimensions)))

    def rounds(self) -> Rounds:
        """Yield what is new in each generation, until three bring nothing new or the budget is spent."""
        found = Measurements(replace(self.options, budget=self.budget))
        yield from found.take(dict.fromkeys(map(self.space.snap, self.options.starts)))
        study, distributions = self._study()
        stale = 0
        while stale < STALE_GENERATIONS:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # optuna calls parts of itself experimental
                trials = [study.ask(distributions) for _ in range(self.generation)]
            asked = [self.space.candidate([round(trial.params[name]) for name in distributions]) for trial in trials]
            before = len(found.scores)
            yield from found.take(asked)
            scores = found.scores
            if any(candidate not in scores for candidate in asked):
                return  # the budget ended in the middle of a generation
            stale = 0 if len(scores) > before else stale + 1
            for trial, candidate in zip(trials, asked, strict=True):
                study.tell(trial, _told(scores, candidate))

    def candidates(self) -> tuple[int, int]:
        """Return one generation and the budget."""
        most = math.floor(self.budget)
        return min(self.generation, most), most

    def _study(self) -> tuple[Any, dict[str, Any]]:
        optuna = import_optuna()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sampler = optuna.samplers.CmaEsSampler(
                seed=seed_for("cma-es", self.options.seed)[0],
                sigma0=INITIAL_WIDTH * (self.space.levels - 1),
                x0={f"w{i}": (self.space.levels - 1) / 2 for i in range(self.space.dimensions)},
                popsize=self.generation,
                warn_independent_sampling=False,
            )
        scale = optuna.distributions.FloatDistribution(-0.5, self.space.levels - 0.5)  # in steps, each as wide
        return optuna.create_study(sampler=sampler), {f"w{i}": scale for i in range(self.space.dimensions)}


def _told(scores: Mapping[Candidate, Score], candidate: Candidate) -> float:
    """Return a candidate's value; where it could not be measured, the worst of the others."""
    value = scores[candidate].value
    if math.isfinite(value):
        return value
    return max((score.value for score in scores.values() if math.isfinite(score.value)), default=0.0)
