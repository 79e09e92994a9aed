"""What every search shares: the box of candidates, what is asked and measured, and the best of a history.

A search never measures. It is a function of what has been measured so far (`ask`), so that an interrupted search goes
on from its journal, and several machines that read one journal agree on what comes next.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from finectl.errors import ComputationError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Candidate = tuple[float, ...]


@dataclass(frozen=True)
class Space:
    """A box of coefficient vectors on a regular grid, `low + k * step` in each dimension.

    Values are computed in decimal arithmetic, so that the third step of 0.1 is the number that 0.3 is written as.

    Args:
        dimensions: Coefficients of a vector, at least 1.
        low: The least value of each.
        high: The bound that no value exceeds; it is itself a value where `high - low` is a multiple of `step`.
        step: Distance of neighbouring values, above 0.

    Raises:
        UsageError: the box is empty or one of its numbers is not finite.
    """

    dimensions: int
    low: float = 0.0
    high: float = 1.0
    step: float = 0.1

    def __post_init__(self) -> None:
        if self.dimensions < 1:
            raise UsageError(f"a search over {self.dimensions} coefficients", expected="at least 1")
        if not all(map(math.isfinite, (self.low, self.high, self.step))) or self.step <= 0 or self.high < self.low:
            raise UsageError(
                f"no coefficient lies between {self.low:g} and {self.high:g} in steps of {self.step:g}",
                expected="finite numbers, a step above 0, and a lower bound that is not above the upper one",
            )

    @cached_property
    def values(self) -> tuple[float, ...]:
        """The values that a coefficient may take, ascending."""
        low, high, step = (Decimal(str(value)) for value in (self.low, self.high, self.step))
        return tuple(float(low + step * k) for k in range(int((high - low) / step) + 1))

    @property
    def levels(self) -> int:
        """How many values a coefficient may take."""
        return len(self.values)

    @property
    def size(self) -> int:
        """How many candidates there are."""
        return int(self.levels**self.dimensions)

    def points(self) -> Iterator[Candidate]:
        """Yield every candidate, the last coefficient changing fastest."""
        return itertools.product(self.values, repeat=self.dimensions)

    def candidate(self, indices: Sequence[int] | NDArray[np.int64]) -> Candidate:
        """Return the candidate at the given steps from `low`, (N,) integers; those outside move to the border."""
        return tuple(self.values[min(max(int(k), 0), self.levels - 1)] for k in indices)

    def indices(self, vector: Sequence[float]) -> tuple[int, ...]:
        """Return the steps from `low` of the grid point nearest to a vector, (N,) real numbers.

        Raises:
            UsageError: the vector has another number of coefficients, or one that is not finite.
        """
        if len(vector) != self.dimensions or not all(map(math.isfinite, vector)):
            raise UsageError(f"{tuple(vector)} is no candidate", expected=f"{self.dimensions} finite numbers")
        return tuple(min(max(round((value - self.low) / self.step), 0), self.levels - 1) for value in vector)

    def snap(self, vector: Sequence[float]) -> Candidate:
        """Return the grid point nearest to a vector."""
        return self.candidate(self.indices(vector))

    def finer(self, factor: int = 2) -> Space:
        """Return the same box with a step `factor` times smaller; it holds every candidate of this one."""
        return Space(self.dimensions, self.low, self.high, float(Decimal(str(self.step)) / factor))


@dataclass(frozen=True)
class Ask:
    """A measurement that a search wants.

    Args:
        candidate: The coefficients.
        samples: Of how many samples.
        noise: Which set of noises: 0 for the search, the same for all candidates; others re-score.
    """

    candidate: Candidate
    samples: int
    noise: int = 0


@dataclass(frozen=True)
class Measured:
    """A measurement that was made.

    Args:
        candidate: The coefficients.
        samples: Of how many samples.
        value: The objective, less is better (a metric of which more is better is negated); not finite where the
            candidate could not be measured.
        interval: Its confidence interval, where the objective has one.
        noise: Which set of noises.
    """

    candidate: Candidate
    samples: int
    value: float
    interval: tuple[float, float] | None = None
    noise: int = 0

    @property
    def ask(self) -> Ask:
        """What it answers."""
        return Ask(self.candidate, self.samples, self.noise)

    @property
    def rank(self) -> tuple[float, Candidate]:
        """What to sort by: the value, then the coefficients; a value that is not finite comes last."""
        return (self.value if math.isfinite(self.value) else math.inf), self.candidate


@dataclass(frozen=True)
class Options:
    """What every strategy is told.

    Args:
        samples: Samples of a full measurement.
        seed: Of every random choice.
        budget: Full measurements at most, a cheaper one counted by its share of the samples; None for the strategy's
            own limit.
        batch: Candidates asked for together, so that as many machines have work; None for the strategy's own number.
        shares: Successive halving: ascending shares of `samples` of the measurements that a candidate passes through,
            the last 1; `(0.25, 1)` measures every candidate with a quarter first.
        keep: Share of the candidates measured at one level that pass on to the next.
        starts: Candidates of interest to be measured first, where a strategy chooses its own beginning.

    Raises:
        UsageError: a number makes no sense.
    """

    samples: int
    seed: int = 0
    budget: float | None = None
    batch: int | None = None
    shares: tuple[float, ...] = (1.0,)
    keep: float = 0.5
    starts: tuple[Candidate, ...] = field(default=())

    def __post_init__(self) -> None:
        if self.samples < 1 or (self.batch is not None and self.batch < 1):
            raise UsageError(
                f"a search by {self.samples} samples in batches of {self.batch}", expected="at least 1 of each"
            )
        if self.budget is not None and not self.budget >= 1:
            raise UsageError(f"a search with a budget of {self.budget} measurements", expected="at least 1")
        ascending = all(low < high for low, high in itertools.pairwise((0.0, *self.shares)))
        if not self.shares or not ascending or self.shares[-1] != 1 or not 0 < self.keep <= 1:
            raise UsageError(
                f"successive halving with the shares {self.shares} of the samples, of which {self.keep:g} pass on",
                expected="shares that ascend from above 0 to 1, and a part above 0 and at most 1",
            )

    @property
    def counts(self) -> tuple[int, ...]:
        """Samples at each level of successive halving, ascending, the last `samples`."""
        return tuple(sorted({max(1, round(share * self.samples)) for share in self.shares}))


class Search(Protocol):
    """A strategy, constructed from a `Space` and `Options`."""

    space: Space
    options: Options

    def ask(self, history: Sequence[Measured]) -> list[Ask]:
        """Return what to measure next, a function of the history alone; nothing when the search is finished.

        What the history holds is never asked again. Where an earlier batch is not complete, its rest is asked.
        """
        ...

    def candidates(self) -> tuple[int, int]:
        """Return the least and the most full measurements that the search makes, before any re-scoring."""
        ...


def first_of_each(history: Sequence[Measured]) -> dict[Ask, Measured]:
    """Return the measurements by what they answer; the first counts where two machines made the same one."""
    found: dict[Ask, Measured] = {}
    for measured in history:
        found.setdefault(measured.ask, measured)
    return found


def ranking(history: Sequence[Measured], *, samples: int | None = None, noise: int = 0) -> list[Measured]:
    """Return the measurements with finite values of one noise and sample count, the best first.

    Args:
        history: What was measured.
        samples: The count; the largest that the history holds if None, because counts do not compare.
        noise: Which set of noises.
    """
    of_noise = [measured for measured in first_of_each(history).values() if measured.noise == noise]
    count = max((measured.samples for measured in of_noise), default=0) if samples is None else samples
    chosen = [measured for measured in of_noise if measured.samples == count and math.isfinite(measured.value)]
    return sorted(chosen, key=lambda measured: measured.rank)


def best(history: Sequence[Measured], *, samples: int | None = None, noise: int = 0) -> Measured:
    """Return the best measurement of one noise and sample count.

    Raises:
        ComputationError: none is finite.
    """
    ranked = ranking(history, samples=samples, noise=noise)
    if not ranked:
        raise ComputationError(
            "no candidate has a finite objective", expected="at least one whose samples can be measured"
        )
    return ranked[0]


def seed_for(purpose: str, *key: int) -> list[int]:
    """Return a seed of numpy's generators for a purpose and integers such as (seed, round)."""
    digest = hashlib.sha256(":".join([purpose, *map(str, key)]).encode()).digest()
    return [int.from_bytes(digest[start : start + 4], "big") for start in range(0, 16, 4)]
