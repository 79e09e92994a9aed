"""DiffFit: biases and norms are trained, and gamma, one number for each channel of chosen layers' outputs, 1 at first.

With the layers `proj` and `fc2`, the default, the outputs of attention and feed-forward part are scaled.

Reference: Xie et al., arXiv 2304.06648, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from finectl.adapters.peft.table import BASE, SCALE, PeftOptions, layer_targets
from finectl.models.io import ModelConfig
from finectl.models.presets import DiTConfig


class Scaled(nn.Module):
    """gamma (W x + b): (..., inputs) -> (..., outputs).

    Args:
        layer: The linear layer.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = layer
        self.gamma = nn.Parameter(torch.ones(layer.out_features, device=layer.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.base_layer(x)
        return output * self.gamma.to(output.dtype)


def attach(model: Any, peft: PeftOptions, generator: torch.Generator) -> None:
    """Put scales behind a model's layers; nothing is drawn."""
    for name in layer_targets(model.config, peft):
        model.set_submodule(name, Scaled(model.get_submodule(name)))


def plain(state: Mapping[str, Tensor], config: ModelConfig, peft: PeftOptions) -> dict[str, Tensor]:
    """Return the state with the scales multiplied into weights and biases, in float32."""
    found = {name: value for name, value in state.items() if not name.endswith(f".{SCALE}")}
    for name in layer_targets(cast(DiTConfig, config), peft):
        gamma = state[f"{name}.{SCALE}"].float()
        for part in ("weight", "bias"):
            value = state[f"{name}.{BASE}.{part}"]
            rows = gamma.view(-1, *[1] * (value.dim() - 1))
            found[f"{name}.{BASE}.{part}"] = (value.float() * rows).to(value.dtype)
    return found
