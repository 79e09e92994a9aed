"""BitFit: only biases are trained; nothing is added.

Reference: Ben Zaken et al., arXiv 2106.10199.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from finectl.adapters.peft.table import PeftOptions
from finectl.models.io import ModelConfig


def attach(model: Any, peft: PeftOptions, generator: torch.Generator) -> None:
    """Leave the model as it is."""


def plain(state: Mapping[str, Tensor], config: ModelConfig, peft: PeftOptions) -> dict[str, Tensor]:
    """Return the state."""
    return dict(state)
