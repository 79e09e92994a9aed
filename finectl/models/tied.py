"""Layers that share more than factors: lines over depth (TLEG, Share Init) and weight templates (WAVE).

Each form has a module for what all layers of a type share and one for a layer, as `finectl.models.factorized` has for
FINE. A layer's weight is built where it is applied; gradients reach what it is built from.

Reference: arXiv 2312.05614 (lines); arXiv 2406.17503 (templates).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SharedLine(nn.Module):
    """theta_B and, where there is a slope, theta_A of one layer type.

    Args:
        outputs: Rows of W, m1.
        inputs: Columns of W, m2.
        slope: Whether there is a theta_A.

    Attributes:
        base_weight: (m1, m2), of theta_B; `base_bias` is (m1,).
        slope_weight: (m1, m2), of theta_A, with a slope only; `slope_bias` is (m1,).
    """

    def __init__(self, outputs: int, inputs: int, slope: bool) -> None:
        super().__init__()
        self.base_weight = nn.Parameter(torch.zeros(outputs, inputs))
        self.base_bias = nn.Parameter(torch.zeros(outputs))
        if slope:
            self.slope_weight = nn.Parameter(torch.zeros(outputs, inputs))
            self.slope_bias = nn.Parameter(torch.zeros(outputs))


class LineLinear(nn.Module):
    """A linear layer whose weight and bias are read off a line, theta_B + (l / L) theta_A.

    Args:
        shared: The line; it is referred to, not owned, so that it appears once in the model's state.
        place: l / L, l counted from 0.
    """

    def __init__(self, shared: SharedLine, place: float) -> None:
        super().__init__()
        self._shared = (shared,)  # a tuple is no child
        self.place = place

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: (..., m2) to (..., m1)."""
        line = dict(self._shared[0].named_parameters())
        return F.linear(x, read_line(line, "weight", self.place), read_line(line, "bias", self.place))


class SharedTemplates(nn.Module):
    """The templates of one layer type.

    Args:
        count: How many, N.
        size: Their side, w.

    Attributes:
        templates: (N, w, w).
    """

    def __init__(self, count: int, size: int) -> None:
        super().__init__()
        self.templates = nn.Parameter(torch.zeros(count, size, size))


class TemplateLinear(nn.Module):
    """A linear layer with W = sum_t S_t (x) T_t, from shared templates and scalers of its own.

    Args:
        shared: The templates; they are referred to, not owned.
        scalers: Shape of the scalers, (N, m1 / w, m2 / w).

    Attributes:
        scalers: Of that shape.
        bias: (m1,).
    """

    def __init__(self, shared: SharedTemplates, scalers: tuple[int, int, int]) -> None:
        super().__init__()
        self._shared = (shared,)
        self.scalers = nn.Parameter(torch.zeros(scalers))
        self.bias = nn.Parameter(torch.zeros(scalers[1] * shared.templates.shape[1]))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: (..., m2) to (..., m1)."""
        return F.linear(x, join_templates(self.scalers, self._shared[0].templates), self.bias)


def read_line(line: Mapping[str, Tensor], part: str, place: float) -> Tensor:
    """Return the weight or the bias of the layer at a place, theta_B + place theta_A.

    Args:
        line: `base_weight` and its kin.
        part: `weight` or `bias`.
        place: l / L.

    Reference: arXiv 2312.05614, the linear expansion.
    """
    base, slope = line[f"base_{part}"], line.get(f"slope_{part}")
    return base if slope is None else torch.add(base, slope, alpha=place)


def join_templates(scalers: Tensor, templates: Tensor) -> Tensor:
    """Return sum_t S_t (x) T_t: (N, a, b) and (N, w, w) to (a w, b w). Tile (i, j) is sum_t S_t[i, j] T_t.

    Reference: arXiv 2406.17503, its Kronecker form.
    """
    high, wide = scalers.shape[1:]
    size = templates.shape[1]
    tiles = scalers.flatten(1).T @ templates.flatten(1)  # (a b, w w)
    return tiles.view(high, wide, size, size).transpose(1, 2).reshape(high * size, wide * size)
