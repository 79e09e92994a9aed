"""Uncertainty weighting: each cluster's loss is divided by a learned noise level.

Reference: Kendall et al., arXiv 1705.07115, section 3.2; as in Go et al., arXiv 2306.00354 (ANT-UW).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from finectl.training.multitask.tasks import Tasks

LEARNING_RATE = 0.025


class Uncertainty(Tasks):
    """sum_i 0.5 (exp(-s_i) L_i / k + s_i), with s learned by the model's optimiser, from 0, without weight decay.

    Its optimum in s is log(L_i / k), so that a cluster counts 0.5 k / L_i.

    Attributes:
        s: (k,), float32, logarithms of the noise levels.
    """

    lr = LEARNING_RATE

    def __init__(self, clusters: int, seed: int) -> None:
        super().__init__(clusters, seed)
        self.s = nn.Parameter(torch.zeros(clusters))

    def to(self, device: torch.device) -> None:
        """Put s on the device."""
        self.s = nn.Parameter(self.s.detach().to(device))

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return s."""
        return {"s": self.s}

    def state_dict(self) -> dict[str, Tensor]:
        """Return s; the optimiser's moments of it are the optimiser's."""
        return {"s": self.s}

    def weights(self) -> Tensor:
        """Return 0.5 exp(-s), (k,)."""
        return 0.5 * torch.exp(-self.s.detach())

    def learn(self, losses: Tensor) -> None:
        """Set the gradient of s, 0.5 (1 - exp(-s_i) L_i / k); `losses` are L_i / k, (k,)."""
        self.s.grad = 0.5 * (1.0 - torch.exp(-self.s.detach()) * losses.to(self.s.dtype))

    def metrics(self) -> dict[str, Any]:
        """Return s."""
        return {"s": self.s.detach().tolist()}
