"""Kernel distance: the squared maximum mean discrepancy of two sets of features under a polynomial kernel.

Reference: M. Binkowski et al., Demystifying MMD GANs, arXiv 1801.01401, section 4; A. Gretton et al., A Kernel
Two-Sample Test, Journal of Machine Learning Research 13 (2012), equation 3, for the unbiased estimate.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from finectl.errors import ComputationError, InputError, UsageError
from finectl.metrics.measured import Measured

LEAST_ROWS = 2


def kernel_mmd2(x: Tensor, y: Tensor) -> float:
    """Return the unbiased estimate of the squared maximum mean discrepancy; it may be a little below 0.

    The kernel is (x . y / d + 1)^3.

    Args:
        x: float (N, d), N at least 2.
        y: float (M, d), M at least 2.

    Raises:
        InputError: the shapes do not fit, or there are fewer than 2 rows.
        ComputationError: a feature is not finite.
    """
    return _discrepancy(*_checked(x, y))[0]


def kernel_distance(
    features: Tensor, reference: Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> Measured:
    """Return the kernel distance, a mean over random subsets of both sets, with its 95 % interval.

    The interval is that of the images' draw, the reference taken as it is, and of the subsets' draw. It comes from each
    image's influence on the discrepancy, because subsets share images: their standard deviation over the root of their
    number falls to 0 with more subsets of the same images.

    Args:
        features: float (N, d), N at least 2.
        reference: float (M, d), M at least 2.
        subsets: Number of subsets; 1 is taken, and nothing drawn, when a subset would be all of both sets.
        subset_size: Rows of a subset from each set; min(N, M) when that is smaller.
        seed: Seed of the subsets.

    Returns:
        The squared discrepancy; details: n, subsets, subset_size, seed, and std, the customary standard deviation over
        the subsets.

    Raises:
        UsageError: no subset, or fewer than 2 rows in it.
        InputError: the shapes do not fit, or there are fewer than 2 rows.
        ComputationError: a feature is not finite.
    """
    if subsets < 1 or subset_size < LEAST_ROWS:
        raise UsageError(f"{subsets} subsets of {subset_size} images", expected="at least 1 subset of 2 images")
    x, y = _checked(features, reference)
    count, others = x.shape[0], y.shape[0]
    size = min(subset_size, count, others)
    whole = size == count == others
    random = torch.Generator().manual_seed(seed)
    values, variances = [], []
    for _ in range(1 if whole else subsets):
        chosen, compared = x, y
        if not whole:
            chosen = x[torch.randperm(count, generator=random)[:size]]
            compared = y[torch.randperm(others, generator=random)[:size]]
        value, of_features, of_reference = _discrepancy(chosen, compared)
        values.append(value)
        variances.append([of_features, of_reference])
    discrepancies = torch.tensor(values, dtype=torch.float64)
    own, other = torch.tensor(variances, dtype=torch.float64).mean(dim=0).tolist()
    # What drawing the subsets adds: seen in them, or for a single one what drawing without replacement leaves.
    drawing = own * (1 / size - 1 / count) + other * (1 / size - 1 / others)
    if len(values) > 1:
        drawing = float(discrepancies.var()) / len(values)
    details = {
        "n": count,
        "subsets": len(values),
        "subset_size": size,
        "seed": seed,
        "std": float(discrepancies.std(correction=0)),
    }
    return Measured.around(float(discrepancies.mean()), math.sqrt(own / count + drawing), details)


def _discrepancy(x: Tensor, y: Tensor) -> tuple[float, float, float]:
    """Return the unbiased squared discrepancy and the variances of the rows' influences on it, of x's and of y's.

    Args:
        x: float (n, d).
        y: float (m, d).
    """
    x, y = x.double(), y.double()
    n, m = x.shape[0], y.shape[0]
    within_x, within_y, between = _kernel(x, x), _kernel(y, y), _kernel(x, y)
    # Means over the other rows of the same set: without a row's kernel with itself.
    own_x = (within_x.sum(dim=1) - within_x.diagonal()) / (n - 1)  # (n,)
    own_y = (within_y.sum(dim=1) - within_y.diagonal()) / (m - 1)  # (m,)
    cross_x, cross_y = between.mean(dim=1), between.mean(dim=0)
    value = float(own_x.mean() + own_y.mean() - 2 * cross_x.mean())
    return value, float((2 * (own_x - cross_x)).var()), float((2 * (own_y - cross_y)).var())


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    """Return (x . y / d + 1)^3 of all pairs, float64 (n, m)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def _checked(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return both sets on the CPU, or say what is wrong with them."""
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or not x.shape[1]:
        raise InputError(
            f"features of shape {tuple(x.shape)} compared with features of shape {tuple(y.shape)}",
            expected="shapes (N, d) and (M, d), from the same extractor",
        )
    if min(x.shape[0], y.shape[0]) < LEAST_ROWS:
        raise InputError(f"a kernel distance between {x.shape[0]} and {y.shape[0]} images", expected="at least 2 each")
    first, second = x.detach().cpu(), y.detach().cpu()
    if not bool(first.isfinite().all()) or not bool(second.isfinite().all()):
        raise ComputationError("the images' features are not finite", fix="look at the images: finectl sample")
    return first, second
