"""How good generated weights are as a regression, and whether they are copies.

One step from noise estimates the mean of the weights under a text, so it is judged by what it explains of them, and
against the mean of the training weights, for which R^2 is 0. A generator that returns training weights is found by its
distance to the nearest of them, against how far these are from each other.

Reference: arXiv 2506.07998 asks whether generated weights are copies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finectl.models.weights.layout import Layout

DIGITS = 5


def r_squared(predicted: Tensor, wanted: Tensor) -> float:
    """Return 1 - |predicted - wanted|^2 / |wanted|^2 over all concepts.

    Args:
        predicted: (C, ...), float32.
        wanted: (C, ...), centred at the mean of the training weights.
    """
    error, size = (predicted - wanted).double().square().sum(), wanted.double().square().sum()
    return float(1 - error / size.clamp(min=1e-30))


def norm_ratios(layout: Layout, predicted: Tensor, wanted: Tensor) -> dict[str, float]:
    """Return |predicted| / |wanted| of each layer, over all concepts: below 1 where weights are drawn to the mean.

    Args:
        layout: Whose groups are the layers.
        predicted: (C, N, b), differences from the shared start.
        wanted: (C, N, b), the same of trained weights.
    """
    ratios = {}
    for group in layout.groups:
        span = slice(group.first_block, group.first_block + group.blocks)
        norm = wanted[:, span].double().norm()
        ratios[group.name] = round(float(predicted[:, span].double().norm() / norm.clamp(min=1e-30)), DIGITS)
    return ratios


@dataclass(frozen=True)
class Memorisation:
    """How far generated weights are from the training weights.

    Args:
        nearest: Mean distance of a generated LoRA from the nearest training LoRA.
        between: Mean distance of a training LoRA from the nearest other one.
        own: Mean distance from the trained LoRA of its own concept.
    """

    nearest: float
    between: float
    own: float

    @classmethod
    def of(cls, predicted: Tensor, wanted: Tensor, training: Tensor) -> Memorisation:
        """Measure the distances.

        Args:
            predicted: (C, ...), generated.
            wanted: (C, ...), trained for the same concepts.
            training: (D, ...), those that the generator saw.
        """
        given, seen = predicted.flatten(1).double(), training.flatten(1).double()
        among = torch.cdist(seen, seen).fill_diagonal_(float("inf"))
        return cls(
            float(torch.cdist(given, seen).min(1).values.mean()),
            float(among.min(1).values.mean()) if len(seen) > 1 else float("nan"),
            float((given - wanted.flatten(1).double()).norm(dim=1).mean()),
        )

    def to_dict(self) -> dict[str, float]:
        """Return the distances, rounded, and the ratio of the first two: near 0 for copies."""
        return {
            "nearest_training": round(self.nearest, DIGITS),
            "between_training": round(self.between, DIGITS),
            "own": round(self.own, DIGITS),
            "nearest_over_between": round(self.nearest / max(self.between, 1e-30), DIGITS),
        }


def health(
    layout: Layout,
    predicted: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    mean: Tensor,
    scale: Tensor,
    training: Tensor,
) -> dict[str, Any]:
    """Return what is told of a generator.

    Args:
        layout: Of the blocks.
        predicted: Split -> generated differences from the shared start, (C, N, b); splits without concepts are absent.
        wanted: Split -> the same of trained LoRAs.
        mean: (N, b), their mean over training.
        scale: (N, b), what they are normalised by.
        training: (D, N, b), the trained differences of all training concepts.

    Returns:
        For each split R^2 of the normalised weights, the norm ratio of each layer and the distances.
    """
    found: dict[str, Any] = {}
    for split, values in predicted.items():
        found[split] = {
            "concepts": len(values),
            "r2": round(r_squared((values - mean) / scale, (wanted[split] - mean) / scale), DIGITS),
            "norm_ratio": norm_ratios(layout, values, wanted[split]),
            "distances": Memorisation.of(values, wanted[split], training).to_dict(),
        }
    return found


def spread(first: int, end: int, count: int) -> Sequence[int]:
    """Return at most so many timesteps from first to end - 1, evenly, both ends among them."""
    last = max(end - 1, first)
    return sorted({round(first + (last - first) * index / max(count - 1, 1)) for index in range(count)})
