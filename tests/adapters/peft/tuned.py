"""Small tuned models, which several test modules take."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from finectl.models.dit import DiT, initialize_
from finectl.models.io import ModelConfig, build_model
from finectl.models.presets import preset
from finectl.models.unet import initial_state
from finectl.models.unet_presets import text_unet_preset, unet_preset
from finectl.training.step import Ema, make_optimizer

DIT = replace(preset("dit-nano", image_size=8, channels=1, num_classes=4, depth=2), learn_sigma=True)
UNET = unet_preset("unet-nano", image_size=8, channels=1)
LABELLED = replace(
    UNET, network={**UNET.network, "num_class_embeds": 5}, num_classes=4, null_class=True,
    parameters=UNET.parameters + 5 * 64,
)  # fmt: skip
TEXT = text_unet_preset("unet-text-nano", image_size=8, channels=1, text_width=24)


def lively(config: ModelConfig, seed: int = 0) -> Any:
    """Return a model whose every parameter matters."""
    random = torch.Generator().manual_seed(seed)
    model: Any = build_model(config)
    if isinstance(model, DiT):
        initialize_(model, random)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=random), alpha=0.05)
    else:
        model.load_state_dict(initial_state(config, random))  # type: ignore[arg-type]
    return model.eval()


def inputs(config: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Return noisy images, timesteps and labels, or the vectors of texts."""
    random = torch.Generator().manual_seed(7)
    x = torch.randn(3, config.channels, config.image_size, config.image_size, generator=random)
    y = torch.tensor([0, 3, 4])
    return x, torch.tensor([1, 400, 999]), torch.randn(3, 5, 24, generator=random) if config is TEXT else y


@torch.no_grad()
def answer(model: Any) -> Tensor:
    """Return what a model of finectl predicts for them."""
    result: Tensor = model(*inputs(model.config))
    return result


def train(model: Any, steps: int = 2) -> Ema:
    """Take large steps on a loss that all outputs are in, and return the average."""
    optimizer, ema = make_optimizer(model.parameters(), 0.02), Ema(model.named_parameters(), 0.5)
    x, t, y = inputs(model.config)
    target = torch.randn(model(x, t, y).shape, generator=torch.Generator().manual_seed(3))
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x, t, y) - target).square().mean().backward()
        optimizer.step()
        ema.update()
    return ema
