"""TLEG: every parameter of a block is a straight line over depth, read at the target's layers.

Layer l of L, counted from 0, has theta_l = theta_B + (l / L) theta_A, weights and biases alike; a target of depth L'
takes theta_B + (l / L') theta_A. Two blocks and the embedders are all that is kept, whatever the depth.

Reference: Xia et al., Transformer as Linear Expansion of Learngene, arXiv 2312.05614: the linear expansion and the
initialisation of descendants by it.

A learngene of `condense --method tleg`, an auxiliary model whose layers are tied in this way from its start, is read as
it is: the paper's method. Ours: from a dense ancestor, theta_B and theta_A are the closed-form least-squares fit to its
layers; what is fitted afterwards to layers that never lay on a line loses more than what was trained on one. Ours, too:
`scaled` multiplies the residual branches by (L / L')^0.75, as FINE's `--depth-scale` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from finectl.artifacts.store import Artifact
from finectl.initializers.base import Initialized, Request
from finectl.initializers.expansion import expand_scaled
from finectl.initializers.transfer import Ancestor, assemble, scale_branches
from finectl.models.presets import DiTConfig, count_parameters


def initialize(request: Request) -> Initialized:
    """Read the line of a learngene at the target's layers, or fit one to each parameter of a dense ancestor.

    Raises:
        InputError: the source is no Diffusion Transformer, or a file is damaged.
    """
    if cast(Artifact, request.source).kind == "learngene":
        return expand_scaled(request)
    ancestor = Ancestor.of(request)
    layers, depth = ancestor.layers, request.target.depth
    made: list[dict[str, Tensor]] = [{} for _ in range(depth)]
    for name in layers[0]:
        base, slope = fit_line([layer[name] for layer in layers])
        for index, value in enumerate(expand(base, slope, depth)):
            made[index][name] = value.to(layers[0][name].dtype)
    made_of_line = replace(assemble(request, made, ancestor.rest), transferred=kept_parameters(ancestor.config))
    if request.job.config.variant != "scaled":
        return made_of_line
    return scale_branches(made_of_line, (len(layers) / depth) ** request.constants["exponent"])


def fit_line(values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Fit values[l] = base + (l / L) slope by least squares.

    Args:
        values: One tensor a layer, from the first to the last, all of one shape.

    Returns:
        Base and slope, float64, of that shape. A single layer has no slope.
    """
    layers = len(values)
    places = torch.arange(layers, dtype=torch.float64) / layers
    design = torch.stack([torch.ones_like(places), places], dim=1)  # (L, 2)
    solver = torch.linalg.pinv(design)  # (2, L)
    base, slope = torch.zeros_like(values[0], dtype=torch.float64), torch.zeros_like(values[0], dtype=torch.float64)
    for value, (to_base, to_slope) in zip(values, solver.T.tolist(), strict=True):
        base.add_(value, alpha=to_base)
        slope.add_(value, alpha=to_slope)
    return base, slope


def expand(base: Tensor, slope: Tensor, depth: int) -> list[Tensor]:
    """Return base + (l / L') slope for l = 0..L' - 1.

    Reference: arXiv 2312.05614, the linear expansion.
    """
    return [base + (index / depth) * slope for index in range(depth)]


def kept_parameters(config: DiTConfig) -> int:
    """Count theta_B and theta_A: two blocks, whatever the depth of ancestor and target."""
    return 2 * count_parameters(config)["block"]
