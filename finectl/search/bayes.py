"""Bayesian optimisation through optuna: a Gaussian process, or a tree of Parzen estimators, proposes what comes next.

No storage of optuna's is used. Each call of `ask` builds a study from the history, so several workers share a search
by sharing its journal: each takes the first proposal that nobody has claimed (`batch` as large as there are workers).
What a machine with other arithmetic measured counts all the same.

Reference: arXiv 1807.02811 (Gaussian processes); NeurIPS 24, 2011, "Algorithms for Hyper-Parameter Optimization" (TPE).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from finectl.search.base import Ask, Candidate, Measured, Options, Space, first_of_each, seed_for
from finectl.search.design import latin_hypercube
from finectl.search.halving import ROUNDING, Score, promotions, scores, spent
from finectl.search.optional import import_optuna

BUDGET_A_DIMENSION = 12
ATTEMPTS = 8


class Bayes:
    """Proposes one batch after another by a model of the objective.

    Args:
        space: The candidates.
        options: What every strategy is told. Without a budget it is 12 measurements a coefficient.
        sampler: "gp" or "tpe".

    Raises:
        UsageError: optuna is not installed.
    """

    def __init__(self, space: Space, options: Options, *, sampler: Literal["gp", "tpe"] = "gp") -> None:
        import_optuna()
        self.space = space
        self.options = options
        self.sampler = sampler
        own = min(space.size, BUDGET_A_DIMENSION * space.dimensions)
        self.budget = float(own) if options.budget is None else options.budget
        self.first = max(1, min(2 * space.dimensions + 2, math.floor(self.budget / 2)))
        self.batch = options.batch or 1

    def ask(self, history: Sequence[Measured]) -> list[Ask]:
        """Return the rest of the design, promotions to more samples, or new proposals; nothing at the end."""
        counts = self.options.counts
        measured = [entry for entry in first_of_each(history).values() if entry.noise == 0 and entry.samples in counts]
        known = scores(measured, self.options)
        design = latin_hypercube(self.space, self.first, self.options.seed, starts=self.options.starts)
        asks = [Ask(candidate, counts[0]) for candidate in design if candidate not in known]
        if not asks:
            asks = promotions(measured, self.options)
        left = self.budget - spent(measured, self.options) + ROUNDING
        if not asks and left * self.options.samples >= counts[0]:
            asks = [Ask(candidate, counts[0]) for candidate in self._proposals(known)]
        affordable = []
        for ask in asks:
            left -= ask.samples / self.options.samples
            if left >= 0:
                affordable.append(ask)
        return affordable

    def candidates(self) -> tuple[int, int]:
        """Return the budget, which is used up unless the box is smaller."""
        most = min(math.floor(self.budget), self.space.size)
        return most, most

    def _proposals(self, known: Mapping[Candidate, Score]) -> list[Candidate]:
        """Return new candidates; fewer than a batch only where the box has no more."""
        wanted = min(self.batch, self.space.size - len(known))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # optuna calls parts of itself experimental
            study, distributions = self._study(known)
            found: list[Candidate] = []
            for _ in range(ATTEMPTS + wanted):
                if len(found) == wanted:
                    break
                trial = study.ask(distributions)
                candidate = self.space.candidate([trial.params[name] for name in distributions])
                if candidate in known:
                    study.tell(trial, known[candidate].value)  # the same again would be proposed otherwise
                elif candidate not in found:
                    found.append(candidate)
        generator = np.random.default_rng(seed_for("bayes-random", self.options.seed, len(known)))
        while len(found) < wanted:
            candidate = self.space.candidate(generator.integers(self.space.levels, size=self.space.dimensions))
            if candidate not in known and candidate not in found:
                found.append(candidate)
        return found

    def _study(self, known: Mapping[Candidate, Score]) -> tuple[Any, dict[str, Any]]:
        """Return a study that holds what is known, in an order that does not depend on who measured what first."""
        optuna = import_optuna()
        seed = seed_for("bayes", self.options.seed, len(known))[0]
        if self.sampler == "gp":
            sampler = optuna.samplers.GPSampler(seed=seed, n_startup_trials=0)
        else:
            sampler = optuna.samplers.TPESampler(
                seed=seed, n_startup_trials=0, multivariate=True, constant_liar=self.batch > 1
            )
        study = optuna.create_study(sampler=sampler)
        scale = optuna.distributions.IntDistribution(0, self.space.levels - 1)
        distributions = {f"w{i}": scale for i in range(self.space.dimensions)}
        worst = max((score.value for score in known.values() if math.isfinite(score.value)), default=0.0)
        for candidate in sorted(known):
            value = known[candidate].value
            study.add_trial(
                optuna.trial.create_trial(
                    params=dict(zip(distributions, self.space.indices(candidate), strict=True)),
                    distributions=distributions,
                    value=value if math.isfinite(value) else worst,
                )
            )
        return study, distributions
