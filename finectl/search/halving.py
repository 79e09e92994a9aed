"""Successive halving by samples: every candidate is measured with few samples first, only the best part with all.

A metric such as the Fréchet distance is biased by its number of samples, so values of different counts do not compare.
The bias is nearly the same for all candidates, though: the mean difference over the candidates measured at both counts
carries a cheap value over to a full one, good enough to steer a search by, never to choose the winner by.

Reference: arXiv 1502.07943 (successive halving); arXiv 1810.05934 (promotion without waiting for a whole rung).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass

from finectl.search.base import Ask, Candidate, Measured, Options

ROUNDING = 1e-9


@dataclass(frozen=True)
class Score:
    """What is known of a candidate on the scale of a full measurement.

    Args:
        value: The objective, carried over from fewer samples if need be; may be infinite.
        share: Samples behind it, of those of a full measurement.
    """

    value: float
    share: float


def spent(measured: Iterable[Measured], options: Options) -> float:
    """Return what measurements cost, in full ones."""
    return sum(entry.samples for entry in measured) / options.samples


def promotions(measured: Sequence[Measured], options: Options) -> list[Ask]:
    """Return the measurements with more samples that the best candidates of each level have earned."""
    by_count = {count: [entry for entry in measured if entry.samples == count] for count in options.counts}
    asks = []
    for count, following in itertools.pairwise(options.counts):
        passed = {entry.candidate for entry in by_count[following]}
        ranked = sorted(by_count[count], key=lambda entry: entry.rank)
        for entry in ranked[: math.ceil(options.keep * len(ranked))]:
            if entry.candidate not in passed and math.isfinite(entry.value):
                asks.append(Ask(entry.candidate, following))
    return asks


def scores(measured: Sequence[Measured], options: Options) -> dict[Candidate, Score]:
    """Return what is known of each candidate, in order of its first measurement."""
    by_count: dict[int, dict[Candidate, float]] = {count: {} for count in options.counts}
    for entry in measured:
        if entry.samples in by_count:
            by_count[entry.samples][entry.candidate] = entry.value
    shift = {options.samples: 0.0}
    for count, following in reversed(list(itertools.pairwise(options.counts))):
        both = by_count[count].keys() & by_count[following].keys()
        gaps = [by_count[following][candidate] - by_count[count][candidate] for candidate in both]
        finite = [gap for gap in gaps if math.isfinite(gap)]
        shift[count] = shift[following] + (math.fsum(finite) / len(finite) if finite else 0.0)
    found: dict[Candidate, Score] = {}
    for entry in measured:
        for count in reversed(options.counts):
            if entry.candidate in by_count[count]:
                value = by_count[count][entry.candidate] + shift[count]
                found.setdefault(entry.candidate, Score(value, count / options.samples))
                break
    return found


class Measurements:
    """What one run of a strategy has learnt, and how it learns more."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.measured: list[Measured] = []

    def take(self, candidates: Iterable[Candidate]) -> Generator[list[Ask], list[Measured], None]:
        """Have candidates measured that are not yet: with few samples first where the options say so.

        Those come first that the candidates begin with; the budget may end before the last of them.
        """
        known = {entry.candidate for entry in self.measured}
        cheapest = self.options.counts[0]
        asks = [Ask(candidate, cheapest) for candidate in dict.fromkeys(candidates) if candidate not in known]
        while asks := self._affordable(asks):
            self.measured += yield asks
            asks = promotions(self.measured, self.options)

    def _affordable(self, asks: Sequence[Ask]) -> list[Ask]:
        """Return the first of the measurements that the budget still pays for."""
        if self.options.budget is None:
            return list(asks)
        total = itertools.accumulate((ask.samples / self.options.samples for ask in asks), initial=self.spent)
        return [ask for ask, cost in zip(asks, itertools.islice(total, 1, None), strict=True) if cost <= self.limit]

    @property
    def scores(self) -> dict[Candidate, Score]:
        """What is known of each candidate, in order of its first measurement."""
        return scores(self.measured, self.options)

    @property
    def limit(self) -> float:
        """The budget, in full measurements, with room for the rounding of shares."""
        return math.inf if self.options.budget is None else self.options.budget + ROUNDING

    @property
    def spent(self) -> float:
        """What the measurements cost, in full ones."""
        return spent(self.measured, self.options)

    def best(self) -> Candidate:
        """Return the best candidate; the first measured where none has a finite value."""
        found = self.scores
        return min(found, key=lambda candidate: (_finite(found[candidate].value), candidate))


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.inf
