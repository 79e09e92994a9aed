"""What is known of a ControlNet before torch is imported: where it fits, what it holds, and how large it is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from finectl.artifacts.store import Artifact
from finectl.artifacts.tensors import tensor_shapes
from finectl.errors import UsageError
from finectl.models.io import ModelConfig, weights_file
from finectl.models.unet_config import TEXT_UNET, UNetConfig

KIND = "controlnet"
CLASS = "ControlNetModel"
FILES = {"ema": "diffusion_pytorch_model.safetensors", "raw": "raw/diffusion_pytorch_model.safetensors"}
"""The averaged weights are those that diffusers loads from the artifact itself; the raw ones lie in a folder of it."""
CHANNELS = 3
"""Of a control as the network sees it: grey ones are repeated."""
EMBEDDING_WIDTHS = (16, 32, 96, 256)
"""Channels of what reads the control, those of Stable Diffusion's; each but the first halves its side."""
COPIED = ("unet.conv_in.", "unet.time_embedding.", "unet.down_blocks.", "unet.mid_block.")
"""The UNet's first half, which a ControlNet starts as a copy of."""


def require_controllable(config: ModelConfig, whose: str) -> UNetConfig:
    """Return the configuration of a model that a ControlNet can be trained on.

    Raises:
        UsageError: it is of another architecture.
    """
    if isinstance(config, UNetConfig) and config.architecture == TEXT_UNET:
        return config
    name = config.architecture if isinstance(config, UNetConfig) else "dit"
    raise UsageError(
        f"--control: {whose} is of architecture {name!r}, for which diffusers has no ControlNet",
        expected=f"a UNet of text (architecture {TEXT_UNET!r}), diffusers' UNet2DConditionModel, as Stable Diffusion's",
        fix="finectl convert runwayml/stable-diffusion-v1-5 --download; for a small one: finectl init --method he "
        "--model unet-text-nano --text-encoder hash",
    )


def embedding_widths(scale: int) -> tuple[int, ...]:
    """Return the channels of what brings controls of `scale` pixels a position to the UNet's size.

    Raises:
        UsageError: the scale is no power of 2.
    """
    halvings = scale.bit_length() - 1
    if scale < 1 or 2**halvings != scale:
        raise UsageError(f"controls of {scale} pixels a position of the model's input", expected="a power of 2")
    return tuple(EMBEDDING_WIDTHS[min(level, len(EMBEDDING_WIDTHS) - 1)] for level in range(halvings + 1))


def count_branch(artifact: Artifact, config: UNetConfig, scale: int) -> int:
    """Count the parameters of a model's ControlNet.

    Args:
        artifact: The model.
        config: Its configuration.
        scale: Pixels of a control along a side of one position of its input.
    """
    shapes = tensor_shapes(weights_file(artifact, "raw"))
    copied = sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(COPIED))
    widths = config.widths
    outputs = [widths[0]]
    for level, width in enumerate(widths):
        outputs += [width] * (_layers(config.network, level) + (level < len(widths) - 1))
    zeros = sum(width * width + width for width in [*outputs, widths[-1]])
    read = embedding_widths(scale)
    steps = [(CHANNELS, read[0])]
    for before, after in itertools.pairwise(read):
        steps += [(before, before), (before, after)]
    steps.append((read[-1], widths[0]))
    return copied + zeros + sum((9 * inputs + 1) * width for inputs, width in steps)


def _layers(network: Any, level: int) -> int:
    layers = network.get("layers_per_block", 2)
    return int(layers[level]) if isinstance(layers, Sequence) else int(layers)
