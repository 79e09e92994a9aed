"""Weights of the size that a diffusion model takes: differences from the shared start, centred and scaled.

The method's paper does not mention it, and without it the weights are about a thousandth of the noise that covers them:
a model would learn to return the noise. The mean is one of every position, the scale one of every tensor, since a scale
of every position would make as much of positions that never move as of those that matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from finectl.errors import InputError
from finectl.models.weights.layout import Layout

FLOOR = 1e-6
"""Smallest scale of a tensor; one that hardly moves is not blown up to that of the noise."""
NAMES = ("initial", "mean", "scale")


@dataclass(frozen=True, eq=False)
class Normaliser:
    """z = (w - initial - mean) / scale.

    Args:
        initial: (N, b), the shared start of all LoRAs.
        mean: (N, b), the mean difference from it over the training LoRAs.
        scale: (N, b), root mean square of a tensor's centred differences, the same at all its positions; 1 at filling.
        mask: (N, b), bool, which positions are weights.
    """

    initial: Tensor
    mean: Tensor
    scale: Tensor
    mask: Tensor

    @classmethod
    def fit(cls, layout: Layout, blocks: Tensor, initial: Tensor) -> Normaliser:
        """Measure mean and scales of training weights.

        Args:
            layout: Which position belongs to which tensor.
            blocks: (M, N, b), float32, packed LoRAs.
            initial: (N, b), the packed shared start.
        """
        mean = (blocks - initial).double().mean(0)  # (N, b)
        squares = (blocks.double() - initial - mean).square().mean(0).flatten()
        ids, mask = layout.tensor_ids.flatten(), layout.mask.flatten()
        sums = torch.zeros(len(layout.shapes), dtype=torch.float64).index_add(0, ids[mask], squares[mask])
        counts = ids[mask].bincount(minlength=len(layout.shapes))
        scales = (sums / counts).sqrt().clamp(min=FLOOR)
        scale = torch.where(mask, scales[ids.clamp(min=0)], 1.0).reshape_as(mean)
        return cls(initial.float(), mean.float(), scale.float(), layout.mask)

    def normalise(self, blocks: Tensor) -> Tensor:
        """Return z of weights, (..., N, b); 0 at filling."""
        return ((blocks - self.initial - self.mean) / self.scale) * self.mask

    def restore(self, z: Tensor) -> Tensor:
        """Return the weights of z, (..., N, b); 0 at filling."""
        return (self.initial + self.mean + self.scale * z) * self.mask

    def state_dict(self) -> dict[str, Tensor]:
        """Return what `from_state` needs beside the layout."""
        return {name: getattr(self, name) for name in NAMES}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], layout: Layout) -> Normaliser:
        """Build it from what `state_dict` returned.

        Raises:
            InputError: a tensor is missing or does not fit the layout.
        """
        shape = (layout.blocks, layout.block_size)
        odd = [name for name in NAMES if name not in state or tuple(state[name].shape) != shape]
        if odd:
            raise InputError(
                f"the normalisation's {odd[0]!r} does not fit the layout", expected=f"a tensor of shape {shape}"
            )
        return cls(state["initial"], state["mean"], state["scale"], layout.mask)

    def to(self, device: torch.device) -> Normaliser:
        """Return it on a device."""
        return Normaliser(*(getattr(self, name).to(device) for name in (*NAMES, "mask")))
