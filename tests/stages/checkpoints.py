"""Tiny foreign checkpoints, and a forward pass of the published DiT that shares no code with finectl."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.nn import functional as F

WIDTH, DEPTH, HEADS, PATCH, SIDE, CHANNELS, CLASSES = 24, 2, 3, 2, 8, 4, 10
TIMES = (0, 1, 250, 500, 999)


def published_state(
    seed: int = 0, *, classes: int = CLASSES, learn_sigma: bool = True, width: int = WIDTH, patch: int = PATCH
) -> dict[str, Tensor]:
    """Return a state dict in the layout of published DiT checkpoints, with no weight at zero."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return 0.2 * torch.randn(*shape, generator=random)

    outputs = patch * patch * CHANNELS * (2 if learn_sigma else 1)
    state = {
        "pos_embed": positions(width, SIDE // patch),
        "x_embedder.proj.weight": draw(width, CHANNELS, patch, patch),
        "x_embedder.proj.bias": draw(width),
        "t_embedder.mlp.0.weight": draw(width, 256),
        "t_embedder.mlp.0.bias": draw(width),
        "t_embedder.mlp.2.weight": draw(width, width),
        "t_embedder.mlp.2.bias": draw(width),
        "y_embedder.embedding_table.weight": draw(classes + 1, width),
        "final_layer.linear.weight": draw(outputs, width),
        "final_layer.linear.bias": draw(outputs),
        "final_layer.adaLN_modulation.1.weight": draw(2 * width, width),
        "final_layer.adaLN_modulation.1.bias": draw(2 * width),
    }
    for index in range(DEPTH):
        for name, rows, columns in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", 4 * width, width),
            ("mlp.fc2", width, 4 * width),
            ("adaLN_modulation.1", 6 * width, width),
        ):
            state[f"blocks.{index}.{name}.weight"] = draw(rows, columns)
            state[f"blocks.{index}.{name}.bias"] = draw(rows)
    return state


def positions(width: int, side: int) -> Tensor:
    """Return the sine-cosine position embedding of a published checkpoint, (1, side^2, width)."""
    grid = numpy.stack(numpy.meshgrid(numpy.arange(side, dtype=float), numpy.arange(side, dtype=float))).reshape(2, -1)
    rates = 1 / 10000 ** (numpy.arange(width // 4) / (width / 4))
    parts = []
    for axis in grid:
        angles = numpy.outer(axis, rates)
        parts += [numpy.sin(angles), numpy.cos(angles)]
    return torch.tensor(numpy.concatenate(parts, axis=1), dtype=torch.float32)[None]


def published_forward(
    state: dict[str, Tensor], x: Tensor, t: Tensor, y: Tensor, *, heads: int = HEADS, divisor: int = 128
) -> Tensor:
    """Compute a published DiT with plain functions of its state dict."""

    def linear(name: str, value: Tensor) -> Tensor:
        return value @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(value: Tensor) -> Tensor:
        mean = value.mean(-1, keepdim=True)
        return (value - mean) / (value.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    patch = state["x_embedder.proj.weight"].shape[-1]
    width = state["x_embedder.proj.bias"].numel()
    batch, channels, side = x.shape[0], x.shape[1], x.shape[2] // patch
    cut = x.reshape(batch, channels, side, patch, side, patch).permute(0, 2, 4, 1, 3, 5).reshape(batch, side * side, -1)
    weight = state["x_embedder.proj.weight"].reshape(width, -1)
    h = cut @ weight.T + state["x_embedder.proj.bias"] + state["pos_embed"]
    rates = torch.exp(-math.log(10000) * torch.arange(128) / divisor)
    angles = t[:, None].float() * rates
    time = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], 1))))
    c = F.silu(time + state["y_embedder.embedding_table.weight"][y])
    for index in range(sum(name.endswith("attn.qkv.weight") for name in state)):
        block = f"blocks.{index}"
        s1, g1, a1, s2, g2, a2 = linear(f"{block}.adaLN_modulation.1", c)[:, None].chunk(6, -1)
        qkv = linear(f"{block}.attn.qkv", norm(h) * (1 + g1) + s1)
        q, k, v = (part.reshape(batch, -1, heads, width // heads).transpose(1, 2) for part in qkv.split(width, -1))
        weights = (q @ k.transpose(-1, -2) / math.sqrt(width // heads)).softmax(-1)
        h = h + a1 * linear(f"{block}.attn.proj", (weights @ v).transpose(1, 2).reshape(batch, -1, width))
        inner = F.gelu(linear(f"{block}.mlp.fc1", norm(h) * (1 + g2) + s2), approximate="tanh")
        h = h + a2 * linear(f"{block}.mlp.fc2", inner)
    shift, scale = linear("final_layer.adaLN_modulation.1", c)[:, None].chunk(2, -1)
    out = linear("final_layer.linear", norm(h) * (1 + scale) + shift)
    outputs = out.shape[-1] // patch**2
    return out.reshape(batch, side, side, patch, patch, outputs).permute(0, 5, 1, 3, 2, 4).reshape(
        batch, outputs, side * patch, side * patch
    )  # fmt: skip


def inputs(channels: int = CHANNELS, side: int = SIDE, classes: int = CLASSES) -> tuple[Tensor, Tensor, Tensor]:
    """Return random images, the timesteps `TIMES` and labels, the null class among them."""
    random = torch.Generator().manual_seed(7)
    x = torch.randn(len(TIMES), channels, side, side, generator=random)
    y = torch.arange(len(TIMES)) % max(classes, 1)
    if classes:
        y[-1] = classes
    return x, torch.tensor(TIMES), y


def randomised(model: Any, seed: int = 0) -> Any:
    """Give every parameter of a network of diffusers a random value, the embedders of a DiT the same in each block."""
    random = torch.Generator().manual_seed(seed)
    shared: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = 0.1 * torch.randn(parameter.shape, generator=random)
            if parameter.dim() == 1 and "norm" in name and name.endswith("weight"):
                value = 1 + value
            if ".emb." in name:
                value = shared.setdefault(name.split(".emb.")[1], value)
            parameter.copy_(value)
    return model.eval()


def diffusers_dit(**more: Any) -> Any:
    """Return a tiny DiTTransformer2DModel."""
    from diffusers import DiTTransformer2DModel

    options: dict[str, Any] = {
        "num_attention_heads": HEADS, "attention_head_dim": WIDTH // HEADS, "in_channels": CHANNELS,
        "out_channels": 2 * CHANNELS, "num_layers": DEPTH, "sample_size": SIDE, "patch_size": PATCH,
        "num_embeds_ada_norm": CLASSES, "norm_eps": 1e-6,
    }  # fmt: skip
    return randomised(DiTTransformer2DModel(**{**options, **more}))


def diffusers_vae(channels: int = CHANNELS) -> Any:
    """Return a tiny AutoencoderKL."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=[8], norm_num_groups=4, latent_channels=channels, layers_per_block=1, sample_size=SIDE
    )


def diffusers_unet(**more: Any) -> Any:
    """Return a tiny UNet2DModel."""
    from diffusers import UNet2DModel

    options: dict[str, Any] = {
        "sample_size": SIDE, "in_channels": 1, "out_channels": 1, "block_out_channels": [8, 16],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4,
    }  # fmt: skip
    return randomised(UNet2DModel(**{**options, **more}))


def text_unet(**more: Any) -> Any:
    """Return a tiny UNet2DConditionModel."""
    from diffusers import UNet2DConditionModel

    options: dict[str, Any] = {
        "sample_size": SIDE, "in_channels": CHANNELS, "out_channels": CHANNELS, "block_out_channels": [8, 16],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "layers_per_block": 1, "norm_num_groups": 4,
        "attention_head_dim": 4, "cross_attention_dim": 12,
    }  # fmt: skip
    return randomised(UNet2DConditionModel(**{**options, **more}))


def text_parts(folder: Path) -> tuple[Any, Any]:
    """Return a tiny CLIP text encoder and its tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    folder.mkdir()
    words = ["<|startoftext|>", "<|endoftext|>", "a</w>", "b</w>"]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
    config = CLIPTextConfig(
        vocab_size=4, hidden_size=12, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return CLIPTextModel(config), tokenizer
