"""Names and shapes of a network's parameters, from its configuration alone (no torch)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from finectl.models.presets import FREQUENCIES, LAYER_TYPES, DiTConfig, layer_shapes
from finectl.models.unet_config import UNetConfig

Shapes = dict[str, tuple[int, ...]]
TIMES = 4
"""Width of a UNet's timestep embedding over that of its finest resolution."""
CROSS = "CrossAttn"


def parameter_shapes(config: DiTConfig | UNetConfig) -> Shapes | None:
    """Return name to shape of all parameters of a network.

    Args:
        config: A dense Diffusion Transformer, or a UNet of diffusers.

    Returns:
        The parameters, without channel-wise projections; None for a UNet of blocks or options that are not known
        here, which its number of parameters tells.
    """
    if isinstance(config, DiTConfig):
        return _dit_shapes(config)
    try:
        shapes = {f"unet.{name}": shape for name, shape in _unet_shapes(config)}
    except (KeyError, TypeError, ValueError, IndexError):
        return None
    return shapes if sum(map(math.prod, shapes.values())) == config.parameters else None


def _dit_shapes(config: DiTConfig) -> Shapes:
    width, patch = config.width, config.patch_size
    layers: list[tuple[str, tuple[int, ...]]] = [
        ("x_embedder.proj", (width, config.channels, patch, patch)),
        ("t_embedder.mlp.0", (width, FREQUENCIES)),
        ("t_embedder.mlp.2", (width, width)),
        ("final_layer.linear", (patch**2 * config.out_channels, width)),
        ("final_layer.adaLN_modulation.1", (2 * width, width)),
    ]
    shapes = layer_shapes(config)
    for index in range(config.depth):
        layers += [(f"blocks.{index}.{path}", shapes[kind]) for kind, path in LAYER_TYPES.items()]
    found: Shapes = {"y_embedder.embedding_table.weight": (config.num_classes + 1, width)}
    for name, shape in layers:
        found[f"{name}.weight"], found[f"{name}.bias"] = shape, shape[:1]
    for index in range(config.depth):
        found |= {f"blocks.{index}.{name}": shape for name, shape in config.extras.shapes(width).items()}
    return found


Named = Iterator[tuple[str, tuple[int, ...]]]


def _unet_shapes(config: UNetConfig) -> Named:
    """Yield the parameters of a `UNet2DModel` or `UNet2DConditionModel` of plain, attention and text blocks.

    Options that change them in a way that is not told here change their number too, or raise.
    """
    network = config.network
    widths, layers = config.widths, int(network.get("layers_per_block", 2))
    text = network.get("cross_attention_dim")
    signal = TIMES * widths[0]
    yield from _layer("conv_in", widths[0], int(network["in_channels"]), 3, 3)
    yield from _layer("time_embedding.linear_1", signal, widths[0])
    yield from _layer("time_embedding.linear_2", signal, signal)
    if network.get("num_class_embeds"):
        yield "class_embedding.weight", (int(network["num_class_embeds"]), signal)
    before = widths[0]
    for level, kind in enumerate(network["down_block_types"]):
        width, where = widths[level], f"down_blocks.{level}"
        yield from _block(where, [before, *[width] * (layers - 1)], width, signal, kind, text)
        if level < len(widths) - 1:
            yield from _layer(f"{where}.downsamplers.0.conv", width, width, 3, 3)
        before = width
    middle = CROSS if text is not None else "Attn"
    yield from _block("mid_block", [before], before, signal, middle, text)
    yield from _residual("mid_block.resnets.1", before, before, signal)
    for index, kind in enumerate(network["up_block_types"]):
        level, where = len(widths) - 1 - index, f"up_blocks.{index}"
        width, finer = widths[level], widths[max(level - 1, 0)]
        inputs = [before + width, *[2 * width] * (layers - 1), width + finer]
        yield from _block(where, inputs, width, signal, kind, text)
        if level:
            yield from _layer(f"{where}.upsamplers.0.conv", width, width, 3, 3)
        before = width
    yield from _norm("conv_norm_out", widths[0])
    yield from _layer("conv_out", int(network["out_channels"]), widths[0], 3, 3)


def _block(where: str, inputs: list[int], width: int, signal: int, kind: str, text: Any) -> Named:
    for index, channels in enumerate(inputs):
        yield from _residual(f"{where}.resnets.{index}", channels, width, signal)
        attention = f"{where}.attentions.{index}"
        if CROSS in kind:
            yield from _transformer(attention, width, int(text))
        elif "Attn" in kind:
            yield from _norm(f"{attention}.group_norm", width)
            for layer in ("to_q", "to_k", "to_v", "to_out.0"):
                yield from _layer(f"{attention}.{layer}", width, width)


def _residual(where: str, inputs: int, outputs: int, signal: int) -> Named:
    yield from _norm(f"{where}.norm1", inputs)
    yield from _layer(f"{where}.conv1", outputs, inputs, 3, 3)
    yield from _layer(f"{where}.time_emb_proj", outputs, signal)
    yield from _norm(f"{where}.norm2", outputs)
    yield from _layer(f"{where}.conv2", outputs, outputs, 3, 3)
    if inputs != outputs:
        yield from _layer(f"{where}.conv_shortcut", outputs, inputs, 1, 1)


def _transformer(where: str, width: int, text: int) -> Named:
    yield from _norm(f"{where}.norm", width)
    yield from _layer(f"{where}.proj_in", width, width, 1, 1)
    inside = f"{where}.transformer_blocks.0"
    for name, source in (("attn1", width), ("attn2", text)):
        yield f"{inside}.{name}.to_q.weight", (width, width)
        yield f"{inside}.{name}.to_k.weight", (width, source)
        yield f"{inside}.{name}.to_v.weight", (width, source)
        yield from _layer(f"{inside}.{name}.to_out.0", width, width)
    for name in ("norm1", "norm2", "norm3"):
        yield from _norm(f"{inside}.{name}", width)
    yield from _layer(f"{inside}.ff.net.0.proj", 8 * width, width)
    yield from _layer(f"{inside}.ff.net.2", width, 4 * width)
    yield from _layer(f"{where}.proj_out", width, width, 1, 1)


def _layer(name: str, outputs: int, *inputs: int) -> Named:
    yield f"{name}.weight", (outputs, *inputs)
    yield f"{name}.bias", (outputs,)


def _norm(name: str, channels: int) -> Named:
    yield f"{name}.weight", (channels,)
    yield f"{name}.bias", (channels,)
