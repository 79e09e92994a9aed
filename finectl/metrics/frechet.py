"""Frechet distance between two sets of images, from the mean and covariance of their features.

Reference: D. C. Dowson and B. V. Landau, The Frechet distance between multivariate normal distributions, Journal of
Multivariate Analysis 12 (1982), equation 4; M. Heusel et al., arXiv 1706.08500, equation 6, for its use with features.
"""

from __future__ import annotations

import torch

from finectl.errors import ComputationError, InputError

# A covariance is refused when it lacks symmetry or positivity by more than this share of its largest eigenvalue.
RESAMPLES = 50
Z_95 = 1.959964
TOLERANCE = 1e-6


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

    def update(self, features: torch.Tensor) -> None:
        """Add a batch.

        Args:
            features: float (B, dim), on any device.

        Raises:
            InputError: the batch has another shape.
            ComputationError: a feature is not finite.
        """
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise InputError(f"features of shape {tuple(features.shape)}", expected=f"shape (B, {self.dim})")
        if not features.shape[0]:
            return
        if not bool(features.isfinite().all()):
            raise ComputationError("the images' features are not finite", fix="look at the images: finectl sample")
        batch = Moments(self.dim)
        values = features.detach().to("cpu", torch.float64)
        batch.count = values.shape[0]
        batch._mean = values.mean(dim=0)
        centred = values - batch._mean  # (B, dim)
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
    def mean(self) -> torch.Tensor:
        """float64 (dim,).

        Raises:
            InputError: no features were added.
        """
        if not self.count:
            raise InputError("no images to take the mean of", expected="at least 1 image")
        return self._mean.clone()

    @property
    def cov(self) -> torch.Tensor:
        """Unbiased covariance, float64 (dim, dim), exactly symmetric.

        Raises:
            InputError: fewer than 2 features were added.
        """
        if self.count < 2:
            raise InputError(f"{self.count} images have no covariance", expected="at least 2 images")
        return (self._scatter + self._scatter.T) / (2 * (self.count - 1))


def moments(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and unbiased covariance.

    Args:
        features: float (N, d), N at least 2.

    Returns:
        Mean float64 (d,), covariance float64 (d, d).

    Raises:
        InputError: the shape is not (N, d) or N is below 2.
        ComputationError: a feature is not finite.
    """
    if features.ndim != 2:
        raise InputError(f"features of shape {tuple(features.shape)}", expected="shape (N, d)")
    accumulated = Moments(features.shape[1])
    accumulated.update(features)
    return accumulated.mean, accumulated.cov


def frechet_distance(mean1: torch.Tensor, cov1: torch.Tensor, mean2: torch.Tensor, cov2: torch.Tensor) -> float:
    """Return the squared Frechet distance |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two Gaussians.

    With C1 = A A^T and C2 = B B^T from the eigendecompositions, tr (C1 C2)^(1/2) is the sum of the singular values of
    A^T B. No square root of a non-symmetric matrix is taken, and nothing is squared before a root is taken of it, so
    covariances without full rank (fewer images than features) are as exact as others and need no jitter.

    Args:
        mean1: float (d,).
        cov1: float (d, d), symmetric, no negative eigenvalue.
        mean2: float (d,).
        cov2: float (d, d), symmetric, no negative eigenvalue.

    Returns:
        The distance in squared feature units, at least 0.

    Raises:
        InputError: the shapes do not fit, or a matrix is no covariance.
        ComputationError: a number is not finite.

    Reference: Dowson and Landau (1982), equation 4.
    """
    dim = mean1.numel()
    shapes = [tuple(tensor.shape) for tensor in (mean1, cov1, mean2, cov2)]
    if not dim or shapes != [(dim,), (dim, dim)] * 2:
        raise InputError(f"means and covariances of shapes {shapes}", expected="(d,), (d, d), (d,), (d, d)")
    first, second = mean1.to("cpu", torch.float64), mean2.to("cpu", torch.float64)
    covariance1, covariance2 = cov1.to("cpu", torch.float64), cov2.to("cpu", torch.float64)
    if not all(bool(tensor.isfinite().all()) for tensor in (first, second, covariance1, covariance2)):
        raise ComputationError("the means or covariances of the features are not finite")
    cross = _root(covariance1).T @ _root(covariance2)  # (r1, r2)
    overlap = torch.linalg.svdvals(cross).sum()
    distance = (first - second).square().sum() + covariance1.trace() + covariance2.trace() - 2 * overlap
    return max(0.0, float(distance))


def frechet_with_interval(
    features: torch.Tensor, reference: torch.Tensor, *, seed: int, resamples: int = RESAMPLES
) -> tuple[float, float, float]:
    """Return the Frechet distance of two sets of features and its 95 % interval over the draw of the first set.

    The interval has the bootstrap's standard error around the value itself: a resample repeats images, which moves the
    distance up, so the resamples' own percentiles would miss the value.

    Args:
        features: float (N, d), of the images that are measured.
        reference: float (M, d).
        seed: Seed of the resamples.
        resamples: How many, at least 2.

    Returns:
        Value, lower and upper end.
    """
    mean, covariance = moments(reference)
    value = frechet_distance(*moments(features), mean, covariance)
    random = torch.Generator().manual_seed(seed)
    count = features.shape[0]
    drawn = [
        frechet_distance(*moments(features[torch.randint(count, (count,), generator=random)]), mean, covariance)
        for _ in range(resamples)
    ]
    half = Z_95 * float(torch.tensor(drawn, dtype=torch.float64).std())
    return value, max(0.0, value - half), value + half


def _root(covariance: torch.Tensor) -> torch.Tensor:
    """Return A (d, r) with A A^T = covariance (d, d), r its numerical rank."""
    values, vectors = torch.linalg.eigh(covariance)  # ascending
    largest, smallest = float(values.max()), float(values.min())
    asymmetry = float((covariance - covariance.T).abs().max())
    if smallest < -TOLERANCE * abs(largest):
        raise InputError(f"a covariance has the eigenvalue {smallest:.3g}", expected="none below 0")
    if asymmetry > TOLERANCE * abs(largest):
        raise InputError(f"a covariance differs from its transpose by {asymmetry:.3g}", expected="a symmetric matrix")
    # Below this, eigenvalues are rounding errors of zero; their roots would not be small.
    kept = values > len(values) * torch.finfo(torch.float64).eps * largest
    root: torch.Tensor = vectors[:, kept] * values[kept].sqrt()
    return root
