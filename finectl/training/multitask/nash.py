"""The Nash bargaining solution of the clusters' gradients, renewed now and then.

Reference: Navon et al., arXiv 2202.01017, section 3; as in Go et al., arXiv 2306.00354 (ANT-NashMTL).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from finectl.training.multitask.tasks import Tasks

UPDATE_EVERY = 25
RIDGE = 1e-14
"""Added to the diagonal of a matrix of norm 1: a solution exists then for gradients that cancel each other, too, with
entries up to 1e7 sqrt(k), and moves the residual by 1e-7 sqrt(k) at most."""
MAX_ITERATIONS = 500
PRECISE = 1e-10
FULL_STEP = 0.25


class Nash(Tasks):
    """sum_i alpha_i L_i / k, with alpha from the gradients of every 25th step and frozen between.

    Attributes:
        alpha: (k,), float64 on the CPU, all positive.
    """

    def __init__(self, clusters: int, seed: int) -> None:
        super().__init__(clusters, seed)
        self.alpha = torch.ones(clusters, dtype=torch.float64)
        self._device = torch.device("cpu")

    def to(self, device: torch.device) -> None:
        """Give weights on the device from now on."""
        self._device = device

    def state_dict(self) -> dict[str, Tensor]:
        """Return alpha."""
        return {"alpha": self.alpha}

    def separates(self, step: int) -> bool:
        """Tell whether alpha is renewed at this step."""
        return step % UPDATE_EVERY == 0

    def separated(self, steps: int) -> int:
        """Return how often alpha is renewed in so many steps."""
        return -(-steps // UPDATE_EVERY)

    def weights(self) -> Tensor:
        """Return alpha, (k,), float32."""
        return self.alpha.to(self._device, torch.float32)

    def solve(self, gram: Tensor, step: int) -> Tensor:
        """Renew alpha and return it; gradients that are all zero, or not finite, leave it as it is."""
        norm = gram.norm()
        if bool(torch.isfinite(norm)) and bool(norm > 0):
            self.alpha.copy_(bargaining_solution(gram / norm))
        return self.alpha

    def metrics(self) -> dict[str, Any]:
        """Return the last alpha."""
        return {"alpha": self.alpha.tolist()}


def bargaining_solution(gram: Tensor) -> Tensor:
    """Return the positive alpha with M alpha = 1 / alpha, elementwise.

    It is the minimum of 0.5 alpha^T M alpha - sum_i log alpha_i, which is strictly convex and self-concordant, so that
    Newton's method, damped by 1 / (1 + decrement) as long as the decrement is large, reaches it from anywhere.

    Args:
        gram: M, (k, k), positive semidefinite, float64, of Frobenius norm 1 or about that.

    Returns:
        (k,), float64.

    Reference: Navon et al., arXiv 2202.01017, section 3 (the condition); Boyd and Vandenberghe, Convex Optimization,
    section 9.6 (the damping).
    """
    matrix = 0.5 * (gram + gram.T).double()
    matrix = matrix + RIDGE * torch.eye(len(matrix), dtype=torch.float64)
    alpha = torch.diagonal(matrix).rsqrt()  # the solution where no gradient has a part of another
    best, smallest = alpha, float("inf")
    for _ in range(MAX_ITERATIONS):
        residual = float((matrix @ alpha - 1 / alpha).abs().max())
        if residual < smallest:
            best, smallest = alpha, residual
        if residual < PRECISE:
            break
        # Newton's step in units of alpha: with D = diag(alpha) the matrix is D M D + I, no nearer to singular than I.
        scaled = alpha[:, None] * matrix * alpha
        gradient = scaled.sum(1) - 1.0
        step = torch.linalg.solve(scaled + torch.eye(len(alpha), dtype=torch.float64), -gradient)
        decrement = float((-gradient @ step).clamp(min=0).sqrt())
        alpha = alpha * (1 + step * (1.0 if decrement < FULL_STEP else 1 / (1 + decrement)))
    return best
