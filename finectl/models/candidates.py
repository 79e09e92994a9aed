"""Merged models in memory: theta_0 and the task vectors as flat buffers, a model whose parameters are views.

theta(w) = theta_0 + sum_i w_i tau_i costs one pass over the buffers.

Reference: DeMe, arXiv 2410.06664, Eq. 8; Ilharco et al., arXiv 2212.04089 (task vectors).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Candidates:
    """A model that becomes any merged model.

    Args:
        model: Of the merged architecture; its parameters are replaced by views of one buffer.
        base: theta_0 by parameter name.
        others: theta_i likewise.
        device: Where the buffers and the model are.
    """

    def __init__(
        self, model: nn.Module, base: Mapping[str, Tensor], others: Sequence[Mapping[str, Tensor]], device: torch.device
    ) -> None:
        self.model = model.to(device).eval().requires_grad_(False)
        names = [name for name, _ in model.named_parameters()]
        self._base = flat(base, names).to(device)  # (P,)
        self._vectors = torch.stack([flat(other, names).to(device) for other in others]).sub_(self._base)  # (N, P)
        self._buffer = self._base.clone()
        start = 0
        for _, parameter in model.named_parameters():
            count = parameter.numel()
            parameter.data = self._buffer[start : start + count].view(parameter.shape)
            start += count

    def at(self, weights: Sequence[float]) -> Any:
        """Return the model with theta(w); the one returned before becomes it, too.

        Args:
            weights: One for each task vector.
        """
        coefficients = torch.tensor(weights, dtype=self._base.dtype, device=self._base.device)
        torch.addmv(self._base, self._vectors.T, coefficients, out=self._buffer)
        return self.model

    def norms(self) -> list[float]:
        """Return the length of each task vector."""
        return [float(vector.double().norm()) for vector in self._vectors]

    def cosines(self) -> list[list[float]]:
        """Return the cosines between task vectors; 0 where one is zero."""
        lengths = [max(length, 1e-30) for length in self.norms()]
        count = len(lengths)
        dot = [
            [float(self._vectors[i].double() @ self._vectors[j].double()) for j in range(count)] for i in range(count)
        ]
        return [[dot[i][j] / (lengths[i] * lengths[j]) for j in range(count)] for i in range(count)]


def flat(state: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    """Return the parameters of a state as one vector, float32, in the order of their names."""
    return torch.cat([state[name].detach().float().flatten() for name in names])
