"""A quadratic response surface over coefficient vectors: ridge least squares, its leave-one-out error, its minima.

Reference: Box and Wilson, J. R. Stat. Soc. B 13(1), 1951 (response surfaces); Allen, Technometrics 16(1), 1974
(leave-one-out error of a linear fit in closed form).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

PENALTIES = tuple(10.0**exponent for exponent in range(-6, 2))
LEVERAGE_LIMIT = 0.999


def coefficients(dimensions: int) -> int:
    """Return how many coefficients a quadratic in so many variables has."""
    return (dimensions + 1) * (dimensions + 2) // 2


def terms(points: Array) -> Array:
    """Return 1, every variable, and every product of two.

    Args:
        points: (M, N), each variable between -1 and 1.

    Returns:
        (M, P) with P = (N + 1)(N + 2) / 2.
    """
    count, dimensions = points.shape
    pairs = list(itertools.combinations_with_replacement(range(dimensions), 2))
    products = [points[:, i] * points[:, j] for i, j in pairs]
    return np.column_stack([np.ones(count), points, *products])


@dataclass(frozen=True, eq=False)
class Surface:
    """A fitted quadratic.

    Args:
        mean: (P,) its coefficients.
        root: (P, P) with `root @ root.T` their covariance, from the leave-one-out error.
        logarithmic: Whether it was fitted to the logarithm of the values.
        skill: Leave-one-out R^2 on the scale of the values: 1 predicts each from the others, 0 no better than the mean.
    """

    mean: Array
    root: Array
    logarithmic: bool
    skill: float

    def draws(self, count: int, generator: np.random.Generator) -> Array:
        """Return (P, 1 + count): the fit, and quadratics that the measurements leave possible."""
        noise = generator.standard_normal((len(self.mean), count))
        return np.column_stack([self.mean, self.mean[:, None] + self.root @ noise])


def fit(points: Array, values: Array, weights: Array) -> Surface:
    """Fit a quadratic to the values or to their logarithms, whichever predicts left-out values better.

    Args:
        points: (M, N), each variable between -1 and 1.
        values: (M,) finite.
        weights: (M,) above 0; the precision of each value, up to a factor.
    """
    scales = [False, True] if (values > 0).all() else [False]
    return max((_fit(points, values, weights, logarithmic) for logarithmic in scales), key=lambda found: found.skill)


def _fit(points: Array, values: Array, weights: Array, logarithmic: bool) -> Surface:
    design = terms(points)  # (M, P)
    target = np.log(values) if logarithmic else values
    weights = weights / weights.mean()
    scaled = design * np.sqrt(weights)[:, None]
    centre = float(np.average(target, weights=weights))
    spread = float(np.sqrt(np.average((target - centre) ** 2, weights=weights))) or 1.0
    wanted = np.sqrt(weights) * (target - centre) / spread
    penalised = np.ones(design.shape[1])
    penalised[0] = 0.0
    candidates = []
    for penalty in PENALTIES:
        gram = scaled.T @ scaled + len(points) * penalty * np.diag(penalised) + 1e-12 * np.eye(len(penalised))
        inverse = np.linalg.inv(gram)
        solution = inverse @ scaled.T @ wanted
        leverage = np.einsum("mp,pq,mq->m", scaled, inverse, scaled).clip(max=LEVERAGE_LIMIT)
        left_out = (wanted - scaled @ solution) / (1 - leverage) / np.sqrt(weights)  # (M,)
        candidates.append((float(np.average(left_out**2, weights=weights)), solution, inverse, left_out))
    error, solution, inverse, left_out = min(candidates, key=lambda found: found[0])
    predicted = target - left_out * spread
    if logarithmic:
        predicted = np.exp(predicted.clip(max=np.log(values.max()) + 3))
    mean = float(np.average(values, weights=weights))
    variance = float(np.average((values - mean) ** 2, weights=weights))
    skill = 1 - float(np.average((values - predicted) ** 2, weights=weights)) / variance if variance else 1.0
    constant = np.zeros(len(solution))
    constant[0] = centre
    root = np.asarray(np.linalg.cholesky(inverse * error + 1e-15 * np.eye(len(solution))), np.float64) * spread
    return Surface(solution * spread + constant, root, logarithmic, skill)
