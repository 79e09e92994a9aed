"""AdaptFormer: a trained bottleneck beside the feed-forward part of every block, which stays in the model.

The way up starts at zero, so that the model starts as it was.

Reference: Chen et al., arXiv 2205.13535, section 3.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from finectl.adapters.peft.table import PeftOptions, result_config
from finectl.models.extra_layers import extend
from finectl.models.io import ModelConfig
from finectl.models.presets import DiTConfig


def attach(model: Any, peft: PeftOptions, generator: torch.Generator) -> None:
    """Put a bottleneck into every block; those that a model has already are trained on."""
    extend(model, cast(DiTConfig, result_config(model.config, peft)), generator)


def plain(state: Mapping[str, Tensor], config: ModelConfig, peft: PeftOptions) -> dict[str, Tensor]:
    """Return the state: the bottlenecks are part of the architecture."""
    return dict(state)
