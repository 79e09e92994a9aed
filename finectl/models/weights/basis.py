"""Principal components of every block, for collections of few LoRAs: the model generates coefficients, not weights.

A network that draws all 256 numbers of a block from noise has to learn first where it is in the block; the components,
taken from the training LoRAs alone, hold that. This is ours and not the paper's: `none` is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from finectl.errors import InputError

NONE = "none"
NAMES = ("components", "unit")


@dataclass(frozen=True, eq=False)
class Basis:
    """c = components z / unit, of every block by itself.

    Args:
        components: (N, c, b), orthonormal rows; rows of zeros where a block has fewer.
        unit: (), the root mean square of all coefficients. There is one only, so that errors of coefficients count as
            much as the errors of the weights that they stand for.
    """

    components: Tensor
    unit: Tensor

    @classmethod
    def fit(cls, z: Tensor, count: int) -> Basis:
        """Find the components of normalised training weights.

        Args:
            z: (M, N, b), float32, 0 at filling.
            count: Components a block.
        """
        samples, blocks, size = z.shape
        components = torch.zeros(blocks, count, size)
        kept = min(count, samples, size)
        for block in range(blocks):
            _, values, rows = torch.linalg.svd(z[:, block].double(), full_matrices=False)
            rows = rows[:kept] * (values[:kept] > values[:1] * 1e-9)[:, None]
            largest = rows.abs().argmax(1, keepdim=True)  # a component's sign is arbitrary: this one is the same always
            signs = torch.where(rows.gather(1, largest) < 0, -1.0, 1.0)
            components[block, :kept] = (rows * signs).float()
        found = torch.einsum("mnb,ncb->mnc", z, components)
        return cls(components, found.square().mean().sqrt().clamp(min=1e-12))

    @property
    def count(self) -> int:
        """Coefficients a block."""
        return int(self.components.shape[1])

    def coefficients(self, z: Tensor) -> Tensor:
        """Return the coefficients of normalised weights, (..., N, b) to (..., N, c)."""
        return torch.einsum("...nb,ncb->...nc", z, self.components) / self.unit

    def expand(self, coefficients: Tensor) -> Tensor:
        """Return the normalised weights of coefficients, (..., N, c) to (..., N, b)."""
        return torch.einsum("...nc,ncb->...nb", coefficients, self.components) * self.unit

    def expand_rows(self, coefficients: Tensor, n: Tensor) -> Tensor:
        """Return the normalised weights of single blocks.

        Args:
            coefficients: (M, c).
            n: (M,), int64, which block each is.

        Returns:
            (M, b).
        """
        return torch.einsum("mc,mcb->mb", coefficients, self.components[n]) * self.unit

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors by name."""
        return {name: getattr(self, name) for name in NAMES}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], blocks: int, size: int) -> Basis:
        """Build it from what `state_dict` returned.

        Raises:
            InputError: a tensor is missing or does not fit the layout.
        """
        shape = tuple(state["components"].shape) if set(NAMES) <= set(state) else ()
        if len(shape) != 3 or (shape[0], shape[2]) != (blocks, size):
            raise InputError(f"the basis of shape {shape} does not fit the layout", expected=f"({blocks}, c, {size})")
        return cls(state["components"], state["unit"])

    def to(self, device: torch.device) -> Basis:
        """Return it on a device."""
        return Basis(self.components.to(device), self.unit.to(device))
