"""VPT-Deep: trained prompt tokens before every block, which stay in the model.

Every block attends to its own prompts, and what it makes of them is dropped. They are random at first, as published,
and so change what the model answers at once: no start of prompts leaves a softmax over more tokens as it was.

Reference: Jia et al., arXiv 2203.12119, section 3.2.
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
    """Put prompts before every block; those that a model has already are trained on."""
    extend(model, cast(DiTConfig, result_config(model.config, peft)), generator)


def plain(state: Mapping[str, Tensor], config: ModelConfig, peft: PeftOptions) -> dict[str, Tensor]:
    """Return the state: the prompts are part of the architecture."""
    return dict(state)
