"""The layers of `finectl.models.extras`, and how they start."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finectl.models.zero_layers import ZeroLinear

if TYPE_CHECKING:
    from finectl.models.presets import DiTConfig


class Bottleneck(nn.Module):
    """x -> s up(relu(down(x))): (..., D) -> (..., D); zero until `load_state_dict`.

    Args:
        width: D.
        hidden: Width of the bottleneck.
        scale: s.

    Reference: arXiv 2205.13535, Eq. 3 and 4; the tokens that it takes are those that the feed-forward part takes.
    """

    def __init__(self, width: int, hidden: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.down = ZeroLinear(width, hidden)
        self.up = ZeroLinear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.down(x))  # (..., hidden)
        output: Tensor = self.up(hidden)
        return output * self.scale


def draw_extra(name: str, shape: torch.Size, patch_inputs: int, generator: torch.Generator) -> Tensor:
    """Return the start of a parameter of the extra parts, float32 on the generator's device.

    The way down of a bottleneck is uniform with a bound of 1 / sqrt(inputs) and the rest of it zero, so that at first
    it adds nothing. Prompts are uniform with a bound of sqrt(6 / (inputs of a patch + width)).

    Args:
        name: Of the parameter.
        shape: Its shape.
        patch_inputs: Numbers of a patch of the input.
        generator: The source of what is random.

    Reference: arXiv 2205.13535, section 3.2 (zero on the way up); arXiv 2203.12119 (its released code's bound).
    """
    if name.endswith("down.weight"):
        bound = 1.0 / math.sqrt(shape[1])
    elif name.endswith("prompts"):
        bound = math.sqrt(6.0 / (patch_inputs + shape[1]))
    else:
        return torch.zeros(shape, device=generator.device)
    return torch.rand(shape, generator=generator, device=generator.device).mul_(2 * bound).sub_(bound)


@torch.no_grad()
def extend(model: Any, config: DiTConfig, generator: torch.Generator) -> None:
    """Add the extra parts of a configuration that a DiT has not yet, and draw where they start.

    Args:
        model: A DiT, on the CPU.
        config: The model's, with extra parts.
        generator: The source of what is random.
    """
    before = {name for name, _ in model.named_parameters()}
    for block in model.blocks:
        block.extend(config)
    for name, parameter in model.named_parameters():
        if name not in before:
            parameter.copy_(draw_extra(name, parameter.shape, config.patch_inputs, generator))
