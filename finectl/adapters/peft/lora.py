"""LoRA by the `peft` library: W x + (alpha / r) B A x on chosen layers, with B = 0 at first.

Reference: Hu et al., arXiv 2106.09685, section 4.1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from finectl.adapters.peft.table import BASE, INSTALL, LORA, PeftOptions, lora_targets
from finectl.errors import UsageError
from finectl.models.io import ModelConfig

ADAPTER = "default"


def scaling(peft: PeftOptions) -> float:
    """Return what the product BA is multiplied by: alpha / rank, or 1."""
    return float(peft["alpha"]) / int(peft["rank"]) if peft["alpha"] else 1.0


def attach(model: Any, peft: PeftOptions, generator: torch.Generator) -> None:
    """Put low-rank products beside a model's layers.

    Args:
        model: The model.
        peft: The settings.
        generator: Of A, which is uniform with a bound of 1 / sqrt(inputs); B is zero.

    Raises:
        UsageError: the library is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UsageError(
            f"--peft lora needs the package peft ({error})", expected="it installed", fix=INSTALL
        ) from error
    rank = int(peft["rank"])
    config = LoraConfig(
        r=rank,
        lora_alpha=scaling(peft) * rank,  # a float serves: it is divided by the rank
        target_modules=list(lora_targets(model.config, peft)),
        lora_dropout=0.0,
        bias="none",
    )
    with torch.random.fork_rng(devices=[]):  # the library draws from the global generator; that is drawn again below
        inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{LORA[0]}." in name:
                bound = 1.0 / math.sqrt(parameter.shape[1])
                parameter.copy_(torch.rand(parameter.shape, generator=generator).mul_(2 * bound).sub_(bound))
            elif f".{LORA[1]}." in name:
                parameter.zero_()


def plain(state: Mapping[str, Tensor], config: ModelConfig, peft: PeftOptions) -> dict[str, Tensor]:
    """Return the state with the products added to the layers' weights, in float32."""
    a, b = factor_names("")
    found = {name: value for name, value in state.items() if not any(f".{part}." in name for part in LORA)}
    for name in lora_targets(config, peft):
        weight = f"{name}.{BASE}.weight"
        product = state[f"{name}{b}"].float() @ state[f"{name}{a}"].float()
        found[weight] = torch.add(state[weight].float(), product, alpha=scaling(peft)).to(state[weight].dtype)
    return found


def factor_names(layer: str) -> tuple[str, str]:
    """Return the names of A and B of a layer in a model's state."""
    return f"{layer}.{LORA[0]}.{ADAPTER}.weight", f"{layer}.{LORA[1]}.{ADAPTER}.weight"
