"""Gradient surgery: a cluster's gradient loses the part that opposes another's.

Reference: Yu et al., arXiv 2001.06782.
"""

from __future__ import annotations

import torch
from torch import Tensor

from finectl.diffusion.random import generator_for
from finectl.training.multitask.tasks import Tasks


class ProjectedGradients(Tasks):
    """The sum of the gradients of L_i / k, each after its projections, in a random order that each step draws anew.

    Without conflicts it is the gradient of plain training.
    """

    def separates(self, step: int) -> bool:
        """Tell that every step needs the clusters' gradients."""
        return True

    def separated(self, steps: int) -> int:
        """Return all of the steps."""
        return steps

    def solve(self, gram: Tensor, step: int) -> Tensor:
        """Return what each original gradient counts in the sum, (k,), float64."""
        generator = generator_for("pcgrad", self.seed, step)
        orders = [torch.randperm(self.clusters, generator=generator).tolist() for _ in range(self.clusters)]
        return projected_sum(gram, orders)


def projected_sum(gram: Tensor, orders: list[list[int]]) -> Tensor:
    """Return the sum of projected gradients as what each original one counts in it.

    A projected gradient is a sum of the original ones, so their inner products are all that is needed: with
    h = sum_l c_l g_l and <h, g_j> < 0, the projection takes <h, g_j> / |g_j|^2 off c_j.

    Args:
        gram: (k, k), float64 on the CPU, inner products of the gradients.
        orders: For each gradient the order in which it meets the others; itself is left out.

    Returns:
        (k,), float64.

    Reference: Yu et al., arXiv 2001.06782, Algorithm 1.
    """
    coefficients = torch.eye(len(gram), dtype=torch.float64)
    for own, (row, order) in enumerate(zip(coefficients, orders, strict=True)):
        for other in order:
            product = row @ gram[:, other]
            if other != own and bool(product < 0):
                row[other] -= product / gram[other, other]
    return coefficients.sum(0)
