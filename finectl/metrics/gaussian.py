"""Gaussians fitted to features: mean and covariance, and the factors of a covariance that distances are made from."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from finectl.errors import ComputationError, InputError

# A covariance is refused when it lacks symmetry or positivity by more than this share of its largest eigenvalue.
TOLERANCE = 1e-6
# Rows that are turned to float64 at a time: 128 MiB at 2048 features.
CHUNK_ROWS = 8192
EPSILON = torch.finfo(torch.float64).eps


class Moments:
    """Mean and covariance of features that arrive in batches, accumulated in float64.

    Batches are combined by the pairwise update, which subtracts each batch's own mean first and so loses no digits when
    the mean is large beside the spread.

    Reference: T. F. Chan, G. H. Golub and R. J. LeVeque, Updating Formulae and a Pairwise Algorithm for Computing
        Sample Variances, Stanford STAN-CS-79-773 (1979), equation 2.1, for vectors.

    Args:
        dim: Number of features.
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.count = 0
        self._mean = torch.zeros(dim, dtype=torch.float64)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Add a batch.

        Args:
            features: float (B, dim), on any device.

        Raises:
            InputError: the batch has another shape.
            ComputationError: a feature is not finite.
        """
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise InputError(f"features of shape {tuple(features.shape)}", expected=f"shape (B, {self.dim})")
        for rows in features.detach().split(CHUNK_ROWS):
            batch = Moments(self.dim)
            batch.count = rows.shape[0]
            batch._mean, centred = _centred(rows)
            batch._scatter = centred.T @ centred
            self.merge(batch)

    def merge(self, other: Moments) -> None:
        """Add the features which another accumulator has seen, for example on another device.

        Raises:
            InputError: the numbers of features differ.
        """
        if other.dim != self.dim:
            raise InputError(f"moments of {other.dim} features merged into {self.dim}", expected="the same number")
        if not other.count:
            return
        total = self.count + other.count
        step = other._mean - self._mean
        self._scatter = self._scatter + other._scatter + torch.outer(step, step) * (self.count * other.count / total)
        self._mean = self._mean + step * (other.count / total)
        self.count = total

    @property
    def mean(self) -> Tensor:
        """float64 (dim,).

        Raises:
            InputError: no features were added.
        """
        if not self.count:
            raise InputError("no images to take the mean of", expected="at least 1 image")
        return self._mean.clone()

    @property
    def cov(self) -> Tensor:
        """Unbiased covariance, float64 (dim, dim), exactly symmetric.

        Raises:
            InputError: fewer than 2 features were added.
        """
        if self.count < 2:
            raise InputError(f"{self.count} images have no covariance", expected="at least 2 images")
        return (self._scatter + self._scatter.T) / (2 * (self.count - 1))


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and unbiased covariance.

    Args:
        features: float (N, d), N at least 2.

    Returns:
        Mean float64 (d,), covariance float64 (d, d).

    Raises:
        InputError: the shape is not (N, d) or N is below 2.
        ComputationError: a feature is not finite.
    """
    check_rows(features)
    accumulated = Moments(features.shape[1])
    accumulated.update(features)
    return accumulated.mean, accumulated.cov


class Gaussian:
    """A Gaussian, with its covariance as a matrix or, when few images made it, as a factor.

    Make one with `Gaussian.of` or `Gaussian.from_moments`. What is derived from the covariance (roots) is computed when
    first asked for and kept, so that a reference which many sets are compared with is decomposed once.

    Args:
        count: Number of images behind it; 0 where that is not known.
        mean: float64 (d,).
        spread: float64 (d, d), the covariance; or (r, d), a factor F with F^T F the covariance.
        factored: Whether `spread` is the factor.
    """

    def __init__(self, count: int, mean: Tensor, spread: Tensor, *, factored: bool = False) -> None:
        self.count = count
        self.mean = mean
        self._spread = spread
        self._factored = factored

    @classmethod
    def of(cls, features: Tensor) -> Gaussian:
        """Fit mean and unbiased covariance; of N <= d images the (d, d) matrix is not formed.

        Args:
            features: float (N, d), N at least 2.

        Raises:
            InputError: the shape is not (N, d) or N is below 2.
            ComputationError: a feature is not finite.
        """
        check_rows(features)
        count, dim = features.shape
        if count < 2:
            raise InputError(f"{count} images have no covariance", expected="at least 2 images")
        if count > dim:
            mean, covariance = moments(features)
            return cls(count, mean, covariance)
        mean, centred = _centred(features)
        return cls(count, mean, contrasts(centred) / math.sqrt(count - 1), factored=True)

    @classmethod
    def from_moments(cls, mean: Tensor, cov: Tensor, count: int) -> Gaussian:
        """Take a mean and a covariance that were computed elsewhere.

        Args:
            mean: float (d,).
            cov: float (d, d), symmetric, no negative eigenvalue.
            count: Number of images behind them; 0 where that is not known.

        Raises:
            InputError: the shapes do not fit, or the matrix is no covariance.
            ComputationError: a number is not finite.
        """
        dim = mean.numel()
        shapes = [tuple(mean.shape), tuple(cov.shape)]
        if not dim or shapes != [(dim,), (dim, dim)]:
            raise InputError(f"mean and covariance of shapes {shapes[0]} and {shapes[1]}", expected="(d,) and (d, d)")
        centre, matrix = mean.detach().to("cpu", torch.float64), cov.detach().to("cpu", torch.float64)
        if not bool(centre.isfinite().all()) or not bool(matrix.isfinite().all()):
            raise ComputationError("the mean or the covariance of the features is not finite")
        largest, asymmetry = float(matrix.abs().max()), float((matrix - matrix.T).abs().max())
        if asymmetry > TOLERANCE * largest:
            raise InputError(
                f"a covariance differs from its transpose by {asymmetry:.3g}", expected="a symmetric matrix"
            )
        matrix = (matrix + matrix.T) / 2
        _check_positive(matrix)
        return cls(count, centre, matrix)

    @property
    def dim(self) -> int:
        """Number of features."""
        return self.mean.numel()

    @property
    def trace(self) -> float:
        """Trace of the covariance: the total variance."""
        return float(self._spread.square().sum() if self._factored else self._spread.trace())

    @property
    def factor(self) -> Tensor | None:
        """F (r, d) with F^T F = covariance, r at most d - 1; None when the covariance itself is kept."""
        return self._spread if self._factored else None

    @cached_property
    def covariance(self) -> Tensor:
        """float64 (d, d), formed from the factor when there is one."""
        return self._spread.T @ self._spread if self._factored else self._spread

    @cached_property
    def cholesky(self) -> tuple[Tensor, float] | None:
        """A (d, d) with A A^T = covariance, and the logarithm of its determinant; None when it is singular in float64.

        A's rows are those of a Cholesky decomposition of the features in the order of falling variance, whose columns
        fall too: products with A then have eigenvalues that keep their digits however small they are.
        """
        if self.factor is not None:
            return None
        order = self.covariance.diagonal().argsort(descending=True, stable=True)
        lower, failed = torch.linalg.cholesky_ex(self.covariance[order][:, order])
        # A singular matrix may pass with rounding errors for pivots, whose roots would not be small.
        pivots = lower.diagonal()
        floor = 10 * self.dim * EPSILON * float(self.covariance.diagonal().max())
        if int(failed) or float(pivots.min()) ** 2 <= floor:
            return None
        return lower[order.argsort()], 2 * float(pivots.log().sum())

    @cached_property
    def root(self) -> Tensor:
        """A (d, r) with A A^T = covariance; r is d, or the numerical rank of a singular covariance."""
        if self.factor is not None:
            return self.factor.T
        if self.cholesky is not None:
            return self.cholesky[0]
        values, vectors = torch.linalg.eigh(self.covariance)  # ascending
        # Below this, eigenvalues are rounding errors of zero; their roots would not be small.
        kept = values > self.dim * EPSILON * values[-1]
        return vectors[:, kept] * values[kept].sqrt()


def check_rows(features: Tensor) -> None:
    """Refuse what is no table of features.

    Raises:
        InputError: the shape is not (N, d).
    """
    if features.ndim != 2 or not features.shape[1]:
        raise InputError(f"features of shape {tuple(features.shape)}", expected="shape (N, d)")


def contrasts(rows: Tensor) -> Tensor:
    """Turn N centred rows (N, d) into N - 1 with the same scatter matrix.

    Centred rows always depend on each other (their sum is 0). The reflection that takes the vector of ones to the first
    axis moves this into its first row, which is left out, so that no eigenvalue of what follows is 0 only for that.
    """
    return rows[1:] - rows[:1] / (math.sqrt(rows.shape[0]) + 1)


def undo_contrasts(columns: Tensor) -> Tensor:
    """Give the N rows back: the transpose of the same map, from (N - 1, r) to (N, r)."""
    count, sums = columns.shape[0] + 1, columns.sum(dim=0, keepdim=True)
    return torch.cat([-sums / math.sqrt(count), columns - sums / (count + math.sqrt(count))])


def _centred(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean (d,) and centred rows (N, d) in float64."""
    values = rows.detach().to("cpu", torch.float64)
    if not bool(values.isfinite().all()):
        raise ComputationError("the images' features are not finite", fix="look at the images: finectl sample")
    mean = values.mean(dim=0)
    return mean, values - mean


def _check_positive(matrix: Tensor) -> None:
    """Refuse a symmetric matrix (d, d) with a negative eigenvalue."""
    # A Cholesky decomposition costs a tenth of the eigenvalues, which are only looked at when it fails.
    slack = TOLERANCE * float(matrix.diagonal().max())
    _, failed = torch.linalg.cholesky_ex(matrix + slack * torch.eye(len(matrix), dtype=matrix.dtype))
    if not int(failed):
        return
    values = torch.linalg.eigvalsh(matrix)
    if float(values[0]) < -TOLERANCE * float(values.abs().max()):
        raise InputError(f"a covariance has the eigenvalue {float(values[0]):.3g}", expected="none below 0")
