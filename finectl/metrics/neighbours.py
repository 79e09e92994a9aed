"""Precision, recall, density and coverage: which images lie in the neighbourhoods of others.

Reference: T. Kynkaanniemi et al., arXiv 1904.06991, equation 1, for precision and recall; M. F. Naeem et al., arXiv
2002.09797, equations 4 and 5, for density and coverage.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from finectl.errors import ComputationError, InputError, UsageError
from finectl.metrics.accuracy import share
from finectl.metrics.measured import Measured

# Distances that are held at a time: 64 MiB of float64.
BLOCK_ELEMENTS = 2**23
# Squared distances that differ by less than this share of the largest squared feature are equal: rounding must not
# decide whether a copy of a neighbourhood's farthest image lies in it.
TIE = 1e-12


def neighbourhoods(features: Tensor, k: int) -> Tensor:
    """Return the distance of each row to its k-th nearest other row.

    Args:
        features: float (N, d), N above k.
        k: Which neighbour, at least 1.

    Returns:
        float64 (N,).

    Raises:
        UsageError: k is below 1.
        InputError: the shape is not (N, d), or there are fewer than k + 1 rows.
        ComputationError: a feature is not finite.
    """
    (values,) = _checked([features], k)
    return _squared_radii(values - values.mean(dim=0), [k])[0].sqrt()


def neighbour_metrics(
    features: Tensor, reference: Tensor, precision_k: int = 3, density_k: int = 5
) -> dict[str, Measured]:
    """Return precision, recall, density and coverage; each distance is computed once.

    A neighbourhood is the closed ball around an image that reaches to its k-th nearest other one of the same set.
    precision: share of images in a neighbourhood of the reference (k = `precision_k`); recall: share of the reference
    in a neighbourhood of the images (`precision_k`); density: neighbourhoods of the reference that an image lies in,
    over k (`density_k`), above 1 where they overlap; coverage: share of the reference's neighbourhoods with an image
    (`density_k`). Shares have Wilson intervals and density a normal one; all take the balls as they are.

    Args:
        features: float (N, d) of the images.
        reference: float (M, d).
        precision_k: Neighbour of precision and recall, at least 1 and below N and M.
        density_k: Neighbour of density and coverage, at least 1 and below M.

    Returns:
        "precision", "recall", "density", "coverage"; details: n and k.

    Raises:
        UsageError: a k is below 1.
        InputError: the shapes do not fit, or there are fewer than k + 1 rows.
        ComputationError: a feature is not finite.
    """
    x, y = _checked([features, reference], precision_k)
    _checked([y], density_k)
    # Distances are differences of squares, which lose fewer digits near the origin.
    centre = y.mean(dim=0)
    x, y = x - centre, y - centre
    tie = TIE * max(float(x.square().sum(dim=1).max()), float(y.square().sum(dim=1).max()))
    (reach,) = _squared_radii(x, [precision_k])  # (N,)
    near, wide = _squared_radii(y, [precision_k, density_k])  # (M,) each
    precise, recalled, covered = 0, torch.zeros(len(y), dtype=torch.bool), torch.zeros(len(y), dtype=torch.bool)
    holding = []
    for first, squares in _squared_distances(x, y):  # (rows, M)
        precise += int((squares <= near + tie).any(dim=1).sum())
        recalled |= (squares <= reach[first : first + len(squares), None] + tie).any(dim=0)
        inside = squares <= wide + tie
        covered |= inside.any(dim=0)
        holding.append(inside.sum(dim=1))
    return {
        "precision": share(precise, len(x), {"k": precision_k}),
        "recall": share(int(recalled.sum()), len(y), {"k": precision_k}),
        "density": Measured.mean_of(torch.cat(holding).double() / density_k, {"k": density_k}),
        "coverage": share(int(covered.sum()), len(y), {"k": density_k}),
    }


def _squared_radii(rows: Tensor, neighbours: list[int]) -> list[Tensor]:
    """Return for each k the squared distance (N,) of each row to its k-th nearest other row."""
    nearest = []
    for first, squares in _squared_distances(rows, rows):
        squares.diagonal(first).fill_(torch.inf)  # a row is not its own neighbour
        nearest.append(squares.topk(max(neighbours), dim=1, largest=False).values)
    ordered = torch.cat(nearest)  # (N, largest k), ascending
    return [ordered[:, k - 1] for k in neighbours]


def _squared_distances(x: Tensor, y: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield blocks of squared distances: the first row's number and float64 (rows, M)."""
    lengths = y.square().sum(dim=1)  # (M,)
    step = max(1, BLOCK_ELEMENTS // len(y))
    for first in range(0, len(x), step):
        rows = x[first : first + step]
        squares = torch.addmm(lengths.expand(len(rows), -1), rows, y.T, alpha=-2)
        yield first, squares.add_(rows.square().sum(dim=1, keepdim=True)).clamp_(min=0)


def _checked(sets: list[Tensor], k: int) -> list[Tensor]:
    """Return the sets in float64 on the CPU, or say what is wrong with them."""
    shapes = [tuple(rows.shape) for rows in sets]
    if any(len(shape) != 2 or shape[1:] != shapes[0][1:] or not shape[1] for shape in shapes):
        raise InputError(
            f"features of shapes {' and '.join(map(str, shapes))}", expected="(N, d), from the same extractor"
        )
    if k < 1:
        raise UsageError(f"the neighbour k = {k}", expected="at least 1")
    if min(shape[0] for shape in shapes) <= k:
        raise InputError(
            f"{min(shape[0] for shape in shapes)} images do not have {k} neighbours each",
            expected=f"at least {k + 1} images in each set",
        )
    values = [rows.detach().to("cpu", torch.float64) for rows in sets]
    if not all(bool(rows.isfinite().all()) for rows in values):
        raise ComputationError("the images' features are not finite", fix="look at the images: finectl sample")
    return values
