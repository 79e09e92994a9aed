"""Linear CKA: how alike two sets of features of the same rows are, whatever their rotation and scale.

Reference: Kornblith et al., arXiv 1905.00414, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def linear_cka(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Return the linear CKA of each pair of features, |Y^T X|^2 / (|X^T X| |Y^T Y|) with centred columns.

    Args:
        first: Features X, (n, p) each, of the same n rows throughout.
        second: Features Y, (n, q) each, on the same device.

    Returns:
        (len(first), len(second)), float64 in [0, 1] on the CPU; 0 for features that are the same in all rows.

    Reference: Kornblith et al., arXiv 1905.00414, Eq. 1 with linear kernels; norms are those of Frobenius.
    """
    sizes = [[_product(x, x) for x in side] for side in (first, second)]
    found = torch.zeros(len(first), len(second), dtype=torch.float64)
    for row, x in enumerate(first):
        for column, y in enumerate(second):
            # |Y^T X|^2 is the square of one norm, so the sizes, of |X^T X|, go under a product and no root.
            scale = sizes[0][row] * sizes[1][column]
            found[row, column] = _product(x, y) ** 2 / scale if scale else 0.0
    return found.clamp(max=1.0)


def _product(x: Tensor, y: Tensor) -> float:
    """Return |Y^T X| of centred features, in float64; by (n, n) matrices where there are fewer rows than columns."""
    x, y = _centred(x), _centred(y)
    if x.shape[0] < min(x.shape[1], y.shape[1]):
        return float((x @ x.T).mul(y @ y.T).sum().clamp(min=0).sqrt())
    return float((y.T @ x).norm())


def _centred(features: Tensor) -> Tensor:
    wide = features.double()
    return wide - wide.mean(0)
