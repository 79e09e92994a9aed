"""Frechet distance between two sets of images, from the mean and covariance of their features.

Reference: D. C. Dowson and B. V. Landau, The Frechet distance between multivariate normal distributions, Journal of
Multivariate Analysis 12 (1982), equation 4; M. Heusel et al., arXiv 1706.08500, equation 6, for its use with features.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from finectl.errors import ComputationError, InputError
from finectl.metrics.gaussian import (
    CHUNK_ROWS,
    EPSILON,
    Gaussian,
    Moments,
    check_rows,
    moments,
    undo_contrasts,
)
from finectl.metrics.measured import Measured

__all__ = ["Gaussian", "Moments", "frechet", "frechet_change", "frechet_distance", "frechet_infinity", "moments"]

# The fast way is taken when its error stays below this share of the distance, or, for distances that are themselves
# the rounding error of the traces, below the other share of the traces.
ALLOWED_ERROR = 1e-10
ALLOWED_ERROR_OF_TRACES = 1e-13
# Errors of eigenvalues: a multiple of the machine's precision and the largest one, or of what the determinant shows.
EIGENVALUE_ERROR = 4.0
DETERMINANT_SAFETY = 10.0
# Blocks of the extrapolation to infinitely many images, and the smallest number of them that is measured.
BLOCKS = 8
FIRST_BLOCKS = 4
LEAST_ROWS = 16


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Return the squared Frechet distance |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two Gaussians.

    With C1 = A A^T and C2 = B B^T the trace of (C1 C2)^(1/2) is the sum of the singular values of A^T B, and so of the
    roots of the eigenvalues of A^T C2 A; no root of a matrix without symmetry is taken. A and B are the rows
    themselves where there are no more of them than features. The eigenvalues cost a quarter of the singular values, but
    those near 0 may keep no more than half of their digits under the root. They are therefore used when the sum of
    these errors, which is estimated each time, is below 1e-10 of the distance, and the singular values otherwise.
    Singular covariances are as exact as others and need no jitter.

    Args:
        a: Gaussian of d features.
        b: Gaussian of as many.

    Returns:
        The distance in squared feature units, at least 0.

    Raises:
        InputError: the numbers of features differ.
        ComputationError: the distance is not finite.

    Reference: Dowson and Landau (1982), equation 4.
    """
    if a.dim != b.dim:
        raise InputError(
            f"a Frechet distance between {a.dim} features and statistics of another size, {b.dim} features",
            expected="statistics of features from the same extractor",
        )
    separate = float((a.mean - b.mean).square().sum()) + a.trace + b.trace
    overlap = _fast_overlap(a, b, separate)
    if overlap is None:
        overlap = float(torch.linalg.svdvals(a.root.T @ b.root).sum())
    distance = separate - 2 * overlap
    if not math.isfinite(distance):
        raise ComputationError("the Frechet distance is not finite", fix="look at the features: they are too large")
    return max(0.0, distance)


def _fast_overlap(a: Gaussian, b: Gaussian, separate: float) -> float | None:
    """Return tr (C1 C2)^(1/2) from eigenvalues, or None where they are not exact enough, or no faster.

    Args:
        a: Gaussian.
        b: Gaussian.
        separate: The distance without its last term.
    """
    if a.factor is not None:
        if b.factor is not None:
            return None
        product = a.factor @ b.covariance @ a.factor.T
    elif b.factor is not None:
        product = b.factor @ a.covariance @ b.factor.T
    elif b.cholesky is not None:  # of b, the reference: it serves for every set that is compared with it
        product = b.cholesky[0].T @ a.covariance @ b.cholesky[0]
    else:
        return None
    values = torch.linalg.eigvalsh(product)
    overlap = float(values.clamp(min=0).sqrt().sum())
    allowed = max(ALLOWED_ERROR * abs(separate - 2 * overlap), ALLOWED_ERROR_OF_TRACES * separate) / 2
    if _lost(values, EIGENVALUE_ERROR * EPSILON * float(values[-1])) <= allowed:
        return overlap
    # The eigenvalues of graded matrices are often far more exact than that.
    if a.cholesky is None or b.cholesky is None or float(values[0]) <= 0:
        return None
    error = _eigenvalue_error(values, a.cholesky[1] + b.cholesky[1])
    return overlap if _lost(values, error) <= allowed else None


def _lost(values: Tensor, error: float) -> float:
    """Return the error of the sum of the roots of eigenvalues (r,) that have an absolute error."""
    # Of one root it is error / (2 root), and at most the root of the error.
    roots = values.clamp(min=0).sqrt()
    return float((error / (2 * roots)).clamp(max=math.sqrt(error)).sum()) if error > 0 else 0.0


def _eigenvalue_error(values: Tensor, log_determinant: float) -> float:
    """Estimate the absolute error of computed eigenvalues from their product, which the smallest ones decide.

    Args:
        values: float64 (r,), ascending, above 0.
        log_determinant: Logarithm of their product, from elsewhere.
    """
    smallest, logarithms = float(values[0]), values.log()
    difference = abs(float(logarithms.sum()) - log_determinant) + EPSILON * float(logarithms.abs().sum())
    # Independent errors e of all of them change the logarithm by about e times the root of the sum of 1 / value^2.
    return DETERMINANT_SAFETY * difference * smallest / float((smallest / values).square().sum().sqrt())


def frechet(features: Tensor, reference: Gaussian) -> Measured:
    """Return the Frechet distance of images to a reference with its 95 % interval.

    The interval is that of the images' draw, the reference taken as it is: the value plus and minus 1.96 standard
    errors by the delta method, from each image's influence on the distance. Nothing is drawn. It is about the distance
    of N images, not about the lower one of infinitely many. In 64 and 256 dimensions the standard error is 0.9 to 1.1
    of the true standard deviation from N = 4 d on, and 0.9 to 1.5 of it below, most too wide where all directions vary
    alike and N is far below d.

    Args:
        features: float (N, d), N at least 2.
        reference: Gaussian of d features.

    Raises:
        InputError: the shapes do not fit, or N is below 2.
        ComputationError: a feature is not finite.

    Reference: L. A. Jaeckel, The infinitesimal jackknife, Bell Laboratories memorandum (1972), for the standard error.
    """
    gaussian = Gaussian.of(features)
    value = frechet_distance(gaussian, reference)
    error = float(_influence(features, gaussian, reference).std()) / math.sqrt(gaussian.count)
    measured = Measured.around(value, error, {"n": gaussian.count})
    return Measured(value, max(0.0, measured.low), measured.high, measured.details)


def frechet_change(features: Tensor, before: Tensor, reference: Gaussian) -> Measured:
    """Return by how much the Frechet distance of images differs from that of others, paired, with its 95 % interval.

    Row k of both sets is of the same draw, such as images of two models from one noise. What the pair has in common
    moves both distances alike, so that the difference is far more certain than either distance. The interval is that
    of `frechet`, from the difference of each pair's influences.

    Args:
        features: float (N, d), N at least 2.
        before: float (N, d), the same number of rows.
        reference: Gaussian of d features.

    Raises:
        InputError: the shapes do not fit, or N is below 2.
        ComputationError: a feature is not finite.
    """
    if features.shape != before.shape:
        raise InputError(
            f"pairs of features of shapes {tuple(features.shape)} and {tuple(before.shape)}", expected="one shape"
        )
    gaussians = [Gaussian.of(rows) for rows in (features, before)]
    one, other = (frechet_distance(gaussian, reference) for gaussian in gaussians)
    moved = _influence(features, gaussians[0], reference) - _influence(before, gaussians[1], reference)
    return Measured.around(one - other, float(moved.std()) / math.sqrt(len(features)), {"n": len(features)})


def _influence(features: Tensor, gaussian: Gaussian, reference: Gaussian) -> Tensor:
    """Return how much each row moves the Frechet distance, times N, up to a constant: float64 (N,).

    The derivative of tr (C1^(1/2) C2 C1^(1/2))^(1/2) with respect to C1 is T / 2, T the matrix of the optimal transport
    from N(0, C1) to N(0, C2). A row x moves the mean by (x - m1) / N and the covariance by ((x - m1)(x - m1)^T - C1)/N,
    hence the distance by 2 (m1 - m2).(x - m1) + |x - m1|^2 - (x - m1)^T T (x - m1) and a constant. T is not formed,
    nor C1 inverted: with C2 = B B^T, the eigenvectors V and roots s of the eigenvalues of B^T C1 B, the last term is
    the sum over k of ((x - m1)^T B V_k)^2 / s_k. Of N <= d rows F = `gaussian.factor` it is N - 1 times the row's
    element on the diagonal of (F C2 F^T)^(1/2), taken from the contrasts back to the rows.
    """
    if gaussian.factor is not None:
        half = None if reference.factor is None else gaussian.factor @ reference.factor.T
        product = gaussian.factor @ reference.covariance @ gaussian.factor.T if half is None else half @ half.T
        values, vectors = torch.linalg.eigh(product)
        transported = undo_contrasts(vectors).square() @ values.clamp(min=0).sqrt() * (gaussian.count - 1)  # (N,)
        projection = None
    else:
        projection = reference.root  # (d, r)
        values, vectors = torch.linalg.eigh(projection.T @ gaussian.covariance @ projection)
        kept = values > gaussian.dim * EPSILON * values.abs().max()
        projection = projection @ (vectors[:, kept] / values[kept].pow(0.25))
    shift = 2 * (gaussian.mean - reference.mean)
    parts = []
    for first in range(0, gaussian.count, CHUNK_ROWS):
        rows = features[first : first + CHUNK_ROWS].detach().to("cpu", torch.float64) - gaussian.mean
        lost = transported[first : first + CHUNK_ROWS] if projection is None else (rows @ projection).square().sum(1)
        parts.append(rows @ shift + rows.square().sum(dim=1) - lost)
    return torch.cat(parts)


def frechet_infinity(features: Tensor, reference: Gaussian) -> Measured:
    """Return the Frechet distance extrapolated to infinitely many images, with its 95 % interval.

    The distance of N images exceeds its limit by about c / N. It is measured on the first 4, 5, 6, 7 and 8 eighths of
    the rows, a line in 1 / N is fitted by least squares, and its intercept is the value; this may be below 0 where the
    limit is near 0. The rows must be in an order that has nothing to do with what they show. The interval is from the
    rows' influences, as in `frechet`, and the scatter about the line.

    The line bends when there are too few rows. In 64 dimensions with a standard deviation that falls a hundredfold over
    them (deep features fall faster) the value is right from N = d / 2 on; where all directions vary alike it is right
    from N = 4 d on, and a third too low at N = 1.5 d, which the interval does not show.

    Args:
        features: float (N, d), N at least 16.
        reference: Gaussian of d features.

    Raises:
        InputError: the shapes do not fit, or N is below 16.
        ComputationError: a feature is not finite.

    Reference: M. J. Chong and D. Forsyth, arXiv 1911.07023, section 3.
    """
    check_rows(features)
    count = features.shape[0]
    if count < LEAST_ROWS:
        raise InputError(f"{count} images to extrapolate a distance from", expected=f"at least {LEAST_ROWS}")
    ends = [count * block // BLOCKS for block in range(BLOCKS + 1)]
    gaussians = _prefixes(features, ends)[FIRST_BLOCKS - 1 :]
    distances = [frechet_distance(gaussian, reference) for gaussian in gaussians]
    value, weights, scatter = _intercept(
        torch.tensor([1 / gaussian.count for gaussian in gaussians], dtype=torch.float64),
        torch.tensor(distances, dtype=torch.float64),
    )
    # The distance of a prefix moves by the mean of its rows' influences, so a row moves the intercept by its influence
    # times the sum of weight / size over the prefixes that it is in.
    sizes = torch.tensor(ends, dtype=torch.float64)
    shares = (weights / sizes[FIRST_BLOCKS:]).flip(0).cumsum(0).flip(0)  # (5,): rows of the first half, then by eighth
    rows = torch.cat([sizes[FIRST_BLOCKS : FIRST_BLOCKS + 1], sizes[FIRST_BLOCKS:].diff()])
    variance = float(_influence(features, gaussians[-1], reference).var() * (rows @ shares.square()))
    details = {"n": count, "sizes": ends[FIRST_BLOCKS:], "distances": distances}
    return Measured.around(value, math.sqrt(variance + scatter), details)


def _intercept(x: Tensor, y: Tensor) -> tuple[float, Tensor, float]:
    """Fit y = intercept + slope x by least squares.

    Args:
        x: float64 (n,), n at least 3.
        y: float64 (n,).

    Returns:
        Intercept, the weights (n,) that make it of y, and its variance by the scatter of y about the line.
    """
    centred = x - x.mean()
    slope = float(centred @ y / centred.square().sum())
    weights = 1 / len(x) - x.mean() * centred / centred.square().sum()
    residuals = y - y.mean() - slope * centred
    variance = float(residuals.square().sum() / (len(x) - 2) * weights.square().sum())
    return float(weights @ y), weights, variance


def _prefixes(features: Tensor, ends: list[int]) -> list[Gaussian]:
    """Return the Gaussians of the first ends[1], ends[2], ... rows; every row enters the covariance once."""
    dim = features.shape[1]
    seen, gaussians = Moments(dim), []
    for end in ends[1:]:
        if end <= dim:
            gaussians.append(Gaussian.of(features[:end]))
            continue
        seen.update(features[seen.count : end])
        gaussians.append(Gaussian(end, seen.mean, seen.cov))
    return gaussians
