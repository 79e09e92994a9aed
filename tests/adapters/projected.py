"""Small UNets of every kind of block, and states with random projections."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from finectl.adapters.projection import Config, identity_state
from finectl.diffusion.config import DiffusionConfig
from finectl.models.io import build_model
from finectl.models.unet_config import UNetConfig

SMALL: dict[str, Any] = {
    "sample_size": 8, "in_channels": 2, "out_channels": 2, "block_out_channels": [8, 12, 16], "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"], "norm_num_groups": 4, "attention_head_dim": 4,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": [8, 16], "layers_per_block": [1, 2],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "norm_num_groups": 4, "attention_head_dim": 4,
    "cross_attention_dim": 12,
}  # fmt: skip
# google/ddpm-cifar10-32, google/ddpm-ema-church-256 and CompVis/stable-diffusion-v1-4
SD14: dict[str, Any] = {
    "sample_size": 64, "in_channels": 4, "out_channels": 4, "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3, "layers_per_block": 2, "cross_attention_dim": 768,
    "attention_head_dim": 8,
}  # fmt: skip


def unet(network: dict[str, Any] = SMALL, architecture: str = "unet2d", **more: Any) -> UNetConfig:
    """Return a configuration; `more` are options of the network."""
    options = {**network, **more}
    return UNetConfig(architecture, options, options["sample_size"], options["in_channels"], 0)


def text_unet(network: dict[str, Any] = TEXT, **more: Any) -> UNetConfig:
    return unet(network, "unet2d-condition", **more)


def sd14() -> UNetConfig:
    schedule = DiffusionConfig(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    return UNetConfig("unet2d-condition", SD14, 64, 4, 859_520_964, diffusion=schedule)


def base_state(config: Config) -> dict[str, Tensor]:
    """Return random float32 weights, no bias at zero."""
    torch.manual_seed(0)
    state = build_model(config).state_dict()
    return {name: value + 0.05 * torch.randn(value.shape) for name, value in state.items()}


def random_state(config: Config) -> dict[str, Tensor]:
    """Return random float32 weights with projections that are no identity."""
    state = base_state(config)
    for name, value in identity_state(config).items():
        state[name] = value + 0.3 * torch.randn(value.shape)
    return state


def inputs(config: UNetConfig, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Return images, timesteps, and labels or text."""
    random = torch.Generator().manual_seed(1)
    x = torch.randn(2, config.channels, config.image_size, config.image_size, generator=random)
    condition = torch.zeros(2, dtype=torch.int64)
    if config.architecture == "unet2d-condition":
        condition = torch.randn(2, 5, config.network["cross_attention_dim"], generator=random).to(dtype)
    return x.to(dtype), torch.tensor([3, 800]), condition


@torch.no_grad()
def output(config: Config, state: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    model = build_model(config).to(dtype).eval()
    model.load_state_dict(state)
    return model(*inputs(config, dtype))
