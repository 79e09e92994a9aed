"""Comparisons of starts of fine-tuning over concepts and seeds: means, intervals, wins, and updates to a threshold.

A run is one concept fine-tuned from one start with one seed, measured after some of its updates. All starts of a
concept and a seed see the same data in the same order, so their differences are taken in pairs. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median, variance
from typing import Any

from finectl.metrics.convergence import Better, steps_to_reach

LEVEL = 0.95

Point = tuple[float, float, float, float]
"""Updates, value, and the ends of its interval."""


@dataclass(frozen=True)
class TunedRun:
    """One concept fine-tuned from one start with one seed.

    Args:
        concept: Its name.
        role: Its role: `val`, `test` or `unseen`.
        start: Where it started.
        seed: Of the order of the data, and of the start where that is drawn.
        values: Metric -> updates -> value.
        tuning_s: Seconds of all updates, without measuring.
        start_s: Seconds that making the start took, such as a prediction; 0 where it is there already.
    """

    concept: str
    role: str
    start: str
    seed: int
    values: Mapping[str, Mapping[int, float]]
    tuning_s: float = 0.0
    start_s: float = 0.0


@dataclass(frozen=True)
class Reached:
    """When a start reaches what another one ends at.

    Args:
        updates: Where the mean curve of all concepts reaches the threshold; None if it never does.
        speed_up: Updates of the other one divided by that; None without one, infinite for a start that is there.
        total_s: Seconds until then, the making of the start included.
        speed_up_total: Seconds of the other one divided by that.
        concepts: How many single concepts reach their own thresholds.
    """

    updates: float | None = None
    speed_up: float | None = None
    total_s: float | None = None
    speed_up_total: float | None = None
    concepts: int = 0


@dataclass(frozen=True)
class Against:
    """How one start does against another at one number of updates.

    Args:
        difference: Mean of (one - other) over concepts and seeds, in the metric's units.
        low: Lower end of its 95 % interval.
        high: Upper end.
        wins: Concepts on which it is better, seeds averaged.
        concepts: Concepts compared.
    """

    difference: float
    low: float
    high: float
    wins: int
    concepts: int


@dataclass
class Starts:
    """All runs of some concepts, which every start and every seed has.

    Args:
        runs: The runs; those that are not of every start and seed of their concept are left out and named.
    """

    runs: Sequence[TunedRun]
    left_out: tuple[str, ...] = ()
    _table: dict[tuple[str, str, int], TunedRun] = field(default_factory=dict)

    @classmethod
    def of(cls, runs: Sequence[TunedRun]) -> Starts:
        """Sort runs out: concepts that lack a start or a seed, or have a value that is no number, do not compare."""
        starts = dict.fromkeys(run.start for run in runs)
        seeds = dict.fromkeys(run.seed for run in runs)
        table = {(run.concept, run.start, run.seed): run for run in runs}
        names = dict.fromkeys(run.concept for run in runs)
        whole = [
            name
            for name in names
            if all(
                (name, start, seed) in table and is_finite(table[name, start, seed])
                for start in starts
                for seed in seeds
            )
        ]
        kept = [run for run in runs if run.concept in set(whole)]
        made = cls(kept, tuple(name for name in names if name not in set(whole)))
        made._table = {(run.concept, run.start, run.seed): run for run in kept}
        return made

    @property
    def concepts(self) -> tuple[str, ...]:
        """Names of the concepts, in order."""
        return tuple(dict.fromkeys(run.concept for run in self.runs))

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds."""
        return tuple(dict.fromkeys(run.seed for run in self.runs))

    @property
    def starts(self) -> tuple[str, ...]:
        """The starts, in order."""
        return tuple(dict.fromkeys(run.start for run in self.runs))

    def steps(self, metric: str) -> tuple[int, ...]:
        """The updates after which a metric was measured, ascending."""
        return tuple(sorted(self.runs[0].values.get(metric, {}))) if self.runs else ()

    def grid(self, metric: str, start: str, step: int) -> list[list[float]]:
        """Return the values of one start: a row a concept, a column a seed."""
        return [
            [self._table[concept, start, seed].values[metric][step] for seed in self.seeds] for concept in self.concepts
        ]

    def mean(self, metric: str, start: str, step: int) -> float:
        """Return the mean over concepts and seeds."""
        return fmean(fmean(row) for row in self.grid(metric, start, step))

    def curve(self, metric: str, start: str) -> list[Point]:
        """Return the mean after each number of updates, with its interval over concepts and seeds."""
        points = []
        for step in self.steps(metric):
            grid = self.grid(metric, start, step)
            points.append((float(step), *mean_interval(grid)))
        return points

    def difference_curve(self, metric: str, one: str, other: str) -> list[Point]:
        """Return the mean of (one - other) after each number of updates, with its interval; pairs are compared."""
        found = [self.against(metric, one, other, step, "lower") for step in self.steps(metric)]
        return [(float(step), a.difference, a.low, a.high) for step, a in zip(self.steps(metric), found, strict=True)]

    def against(self, metric: str, one: str, other: str, step: int, better: Better) -> Against:
        """Compare two starts, paired by concept and seed."""
        mine, theirs = self.grid(metric, one, step), self.grid(metric, other, step)
        differences = [[a - b for a, b in zip(x, y, strict=True)] for x, y in zip(mine, theirs, strict=True)]
        sign = 1 if better == "lower" else -1
        wins = sum(sign * fmean(row) < 0 for row in differences)
        return Against(*mean_interval(differences), wins=wins, concepts=len(differences))

    def seconds_of_update(self) -> float:
        """Return the seconds of one update: the median over all runs, so that a busy moment does not count."""
        found = [
            run.tuning_s / max(max(steps, default=0), 1) for run in self.runs for steps in [_steps_of(run)] if steps
        ]
        return median(found) if found else 0.0

    def start_seconds(self, start: str) -> float:
        """Return the seconds that making a start takes: the median over its runs."""
        found = [run.start_s for run in self.runs if run.start == start]
        return median(found) if found else 0.0

    def reached(self, metric: str, start: str, baseline: str, better: Better) -> Reached:
        """Return when a start reaches what the baseline has after its last update.

        The threshold is that of the mean curve; `concepts` counts those whose own curves (seeds averaged) reach the
        value that the baseline ends at on this very concept.
        """
        last = self.steps(metric)[-1]
        bound = self.mean(metric, baseline, last)
        updates = steps_to_reach([point[:2] for point in self.curve(metric, start)], bound, better)
        own = 0
        for index in range(len(self.concepts)):
            points = [(float(step), fmean(self.grid(metric, start, step)[index])) for step in self.steps(metric)]
            limit = fmean(self.grid(metric, baseline, last)[index])
            own += steps_to_reach(points, limit, better) is not None
        if updates is None:
            return Reached(concepts=own)
        base = steps_to_reach([point[:2] for point in self.curve(metric, baseline)], bound, better) or float(last)
        one = self.seconds_of_update()
        total = self.start_seconds(start) + updates * one
        base_total = self.start_seconds(baseline) + base * one
        return Reached(
            updates,
            base / updates if updates else math.inf,
            total,
            base_total / total if total else math.inf,
            own,
        )


def is_finite(run: TunedRun) -> bool:
    """Tell whether all values of a run are numbers."""
    return all(math.isfinite(value) for values in run.values.values() for value in values.values())


def mean_interval(grid: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Return the mean over rows and columns with its 95 % interval, both taken as samples of more.

    Rows (concepts) and columns (seeds) are crossed: the variance of the mean is taken as that of the rows' means over
    their number plus that of the columns' means over theirs, which is a little too large, and the degrees of freedom
    are Satterthwaite's. A single row or column adds nothing; of a single value nothing is known.

    Args:
        grid: (C, S), at least one value.

    Returns:
        Mean, and the ends of the interval.

    Reference: F. E. Satterthwaite, An Approximate Distribution of Estimates of Variance Components, Biometrics
    Bulletin 2 (1946), equation 17.
    """
    rows = [fmean(row) for row in grid]
    columns = [fmean(column) for column in zip(*grid, strict=True)]
    mean = fmean(rows)
    parts = [(variance(means) / len(means), len(means) - 1) for means in (rows, columns) if len(means) > 1]
    total = sum(part for part, _ in parts)
    if not parts:
        return mean, -math.inf, math.inf
    if total <= 0:
        return mean, mean, mean
    from scipy.stats import t

    freedom = total**2 / sum(part**2 / degrees for part, degrees in parts)
    half = float(t.ppf((1 + LEVEL) / 2, freedom)) * math.sqrt(total)
    return mean, mean - half, mean + half


def _steps_of(run: TunedRun) -> list[int]:
    return [step for values in run.values.values() for step in values]


def run_from(values: Mapping[str, Any]) -> TunedRun:
    """Return the run that `run_to` wrote as JSON."""
    metrics = {
        name: {int(step): float(at[step]) for step in sorted(at, key=int)}  # as JSON sorts them, 10 comes before 5
        for name, at in values["values"].items()
    }
    return TunedRun(**{**values, "values": metrics})


def run_to(run: TunedRun) -> dict[str, Any]:
    """Return a run as plain JSON."""
    return {**vars(run), "values": {name: {str(k): v for k, v in at.items()} for name, at in run.values.items()}}
