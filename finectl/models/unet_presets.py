"""Named UNets of diffusers, unconditional as the DDPM checkpoints or of text, and their parameters (no torch)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from finectl.diffusion.config import DDPM, DiffusionConfig
from finectl.errors import UsageError
from finectl.models.unet_config import TEXT_UNET, UNET, UNetConfig
from finectl.registry import nearest


class UNetPreset(NamedTuple):
    """A named UNet.

    Args:
        widths: Channels of each resolution, the finest first.
        attention: The resolutions with attention beside the middle, counted from 0, the finest.
        layers: Residual blocks of a down block; an up block has one more.
        groups: Groups of its norms.
        head_width: Channels of an attention head; None for a single head.
        help: One line.
    """

    widths: tuple[int, ...]
    attention: tuple[int, ...]
    layers: int
    groups: int
    head_width: int | None
    help: str


UNET_PRESETS: dict[str, UNetPreset] = {
    "unet-nano": UNetPreset((16, 32, 64), (2,), 1, 8, 16, "0.7 M parameters: minutes on a laptop, images from 8x8 on"),
    "unet-cifar": UNetPreset((128, 256, 256, 256), (1,), 2, 32, None, "36 M parameters: google/ddpm-cifar10-32"),
    "unet-lsun": UNetPreset(
        (128, 128, 256, 256, 512, 512), (4,), 2, 32, None, "114 M parameters: google/ddpm-ema-church-256"
    ),
}


class TextPreset(NamedTuple):
    """A named UNet of text.

    Args:
        widths: Channels of each resolution, the finest first.
        attention: The resolutions whose blocks attend to the text beside the middle, counted from 0, the finest.
        layers: Residual blocks of a down block; an up block has one more.
        groups: Groups of its norms.
        heads: Heads of every attention.
        text_width: Numbers a vector of the text encoder; None for those of any encoder.
        diffusion: Its noise schedule.
        help: One line.
    """

    widths: tuple[int, ...]
    attention: tuple[int, ...]
    layers: int
    groups: int
    heads: int
    text_width: int | None
    diffusion: DiffusionConfig
    help: str


STABLE_DIFFUSION = DiffusionConfig(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
TEXT_PRESETS: dict[str, TextPreset] = {
    "unet-text-nano": TextPreset(
        (16, 32, 64), (1, 2), 1, 8, 4, None, DDPM, "1.1 M parameters, conditioned on text: images from 8x8 on"
    ),
    "unet-sd14": TextPreset(
        (320, 640, 1280, 1280), (0, 1, 2), 2, 32, 8, 768, STABLE_DIFFUSION,
        "860 M parameters: CompVis/stable-diffusion-v1-4, for latents and CLIP ViT-L/14",
    ),
}  # fmt: skip


def is_unet(name: str | None) -> bool:
    """Tell whether a name of a preset is that of a UNet."""
    return name is not None and (name.lower() in UNET_PRESETS or is_text_unet(name))


def is_text_unet(name: str | None) -> bool:
    """Tell whether a name of a preset is that of a UNet that is conditioned on text."""
    return name is not None and name.lower() in TEXT_PRESETS


def text_unet_preset(name: str, *, image_size: int, channels: int, text_width: int) -> UNetConfig:
    """Return the configuration of a named UNet of text for a given kind of image.

    Args:
        name: A name of `TEXT_PRESETS`.
        image_size: Side of the square input, in pixels; every resolution but the last halves it.
        channels: Channels of the input.
        text_width: Numbers a vector of the text encoder.

    Raises:
        UsageError: unknown name, an image size that cannot be halved as often, or another encoder than the preset's.

    Reference: Rombach et al., arXiv 2112.10752, section 3.3.
    """
    if not is_text_unet(name):
        raise UsageError(
            f"unknown model {name!r}{nearest(name.lower(), TEXT_PRESETS)}",
            expected=f"one of: {', '.join(TEXT_PRESETS)}",
        )
    size = TEXT_PRESETS[name.lower()]
    _require_halves(name, len(size.widths) - 1, image_size)
    if size.text_width not in (None, text_width):
        raise UsageError(
            f"{name} takes texts as vectors of {size.text_width} numbers, this text encoder makes {text_width}",
            expected="--text-encoder openai/clip-vit-large-patch14, or a folder of it",
        )
    crossed = [level in size.attention for level in range(len(size.widths))]
    network: dict[str, Any] = {
        "sample_size": image_size,
        "in_channels": channels,
        "out_channels": channels,
        "center_input_sample": False,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "down_block_types": ["CrossAttnDownBlock2D" if yes else "DownBlock2D" for yes in crossed],
        "up_block_types": ["CrossAttnUpBlock2D" if yes else "UpBlock2D" for yes in reversed(crossed)],
        "block_out_channels": list(size.widths),
        "layers_per_block": size.layers,
        "downsample_padding": 1,
        "mid_block_scale_factor": 1,
        "act_fn": "silu",
        "norm_num_groups": size.groups,
        "norm_eps": 1e-5,
        "cross_attention_dim": text_width,
        "attention_head_dim": size.heads,
    }
    return UNetConfig(
        architecture=TEXT_UNET,
        network=network,
        image_size=image_size,
        channels=channels,
        parameters=count_text_unet(network),
        diffusion=size.diffusion,
    )


def _require_halves(name: str, times: int, image_size: int) -> None:
    """Check that images can be halved so many times.

    Raises:
        UsageError: they cannot.
    """
    if image_size % 2**times:
        raise UsageError(
            f"{name} halves images {times} times, and these are {image_size}x{image_size} pixels",
            expected=f"an --image-size that is a multiple of {2**times}",
        )


def unet_preset(name: str, *, image_size: int, channels: int) -> UNetConfig:
    """Return the configuration of a named UNet for a given kind of image.

    Args:
        name: A name of `UNET_PRESETS`.
        image_size: Side of the square input, in pixels; every resolution but the last halves it.
        channels: Channels of the input.

    Raises:
        UsageError: unknown name, or an image size that cannot be halved as often.

    Reference: Ho et al., arXiv 2006.11239, appendix B.
    """
    if name.lower() not in UNET_PRESETS:
        raise UsageError(
            f"unknown model {name!r}{nearest(name.lower(), UNET_PRESETS)}",
            expected=f"one of: {', '.join(UNET_PRESETS)}",
        )
    size = UNET_PRESETS[name.lower()]
    _require_halves(name, len(size.widths) - 1, image_size)
    downs = ["AttnDownBlock2D" if level in size.attention else "DownBlock2D" for level in range(len(size.widths))]
    network: dict[str, Any] = {
        "sample_size": image_size,
        "in_channels": channels,
        "out_channels": channels,
        "center_input_sample": False,
        "time_embedding_type": "positional",
        "freq_shift": 1,
        "flip_sin_to_cos": False,
        "down_block_types": downs,
        "up_block_types": [down.replace("Down", "Up") for down in reversed(downs)],
        "block_out_channels": list(size.widths),
        "layers_per_block": size.layers,
        "mid_block_scale_factor": 1,
        "downsample_padding": 0,
        "act_fn": "silu",
        "attention_head_dim": size.head_width,
        "norm_num_groups": size.groups,
        "norm_eps": 1e-6,
    }
    return UNetConfig(
        architecture=UNET,
        network=network,
        image_size=image_size,
        channels=channels,
        parameters=count_unet2d(network),
    )


def count_unet2d(network: Mapping[str, Any]) -> int:
    """Count the parameters of a `UNet2DModel` without building it.

    Args:
        network: Its options as a preset has them: plain and attention blocks that resample by convolutions.
    """
    widths, layers = network["block_out_channels"], network["layers_per_block"]
    signal = 4 * widths[0]  # channels of the timestep's embedding
    total = _convolution(network["in_channels"], widths[0]) + _linear(widths[0], signal) + _linear(signal, signal)
    before = widths[0]
    for level, (kind, width) in enumerate(zip(network["down_block_types"], widths, strict=True)):
        inputs = [before, *[width] * (layers - 1)]
        total += _block(inputs, width, signal, attention="Attn" in kind)
        total += _convolution(width, width) if level < len(widths) - 1 else 0
        before = width
    total += 2 * _residual(widths[-1], widths[-1], signal) + _attention(widths[-1])
    for index, kind in enumerate(network["up_block_types"]):
        level = len(widths) - 1 - index
        width, finer = widths[level], widths[max(level - 1, 0)]
        # Each residual block gets what is there and a skip connection; the last one's is that of the finer resolution.
        inputs = [before + width, *[2 * width] * (layers - 1), width + finer]
        total += _block(inputs, width, signal, attention="Attn" in kind)
        total += _convolution(width, width) if level else 0
        before = width
    return total + 2 * widths[0] + _convolution(widths[0], network["out_channels"])


def count_text_unet(network: Mapping[str, Any]) -> int:
    """Count the parameters of a `UNet2DConditionModel` without building it.

    Args:
        network: Its options as a preset has them: a transformer layer behind each residual block that has one.
    """
    widths, layers, text = network["block_out_channels"], network["layers_per_block"], network["cross_attention_dim"]
    signal = 4 * widths[0]
    total = _convolution(network["in_channels"], widths[0]) + _linear(widths[0], signal) + _linear(signal, signal)
    before = widths[0]
    for level, (kind, width) in enumerate(zip(network["down_block_types"], widths, strict=True)):
        added = _transformer(width, text) if "CrossAttn" in kind else 0
        total += sum(_residual(channels, width, signal) + added for channels in [before, *[width] * (layers - 1)])
        total += _convolution(width, width) if level < len(widths) - 1 else 0
        before = width
    total += 2 * _residual(widths[-1], widths[-1], signal) + _transformer(widths[-1], text)
    for index, kind in enumerate(network["up_block_types"]):
        level = len(widths) - 1 - index
        width, finer = widths[level], widths[max(level - 1, 0)]
        added = _transformer(width, text) if "CrossAttn" in kind else 0
        inputs = [before + width, *[2 * width] * (layers - 1), width + finer]
        total += sum(_residual(channels, width, signal) + added for channels in inputs)
        total += _convolution(width, width) if level else 0
        before = width
    return total + 2 * widths[0] + _convolution(widths[0], network["out_channels"])


def _transformer(width: int, text: int) -> int:
    """Count a norm, two 1x1 convolutions, and between them attention to the image, to the text, and a gated MLP."""
    own = 3 * width * width + _linear(width, width)
    crossed = width * width + 2 * width * text + _linear(width, width)
    gated = _linear(width, 8 * width) + _linear(4 * width, width)
    return 2 * width + 2 * _linear(width, width) + 6 * width + own + crossed + gated


def _block(inputs: Sequence[int], width: int, signal: int, *, attention: bool) -> int:
    return sum(_residual(channels, width, signal) + (_attention(width) if attention else 0) for channels in inputs)


def _residual(inputs: int, outputs: int, signal: int) -> int:
    convolutions = _convolution(inputs, outputs) + _convolution(outputs, outputs)
    shortcut = _linear(inputs, outputs) if inputs != outputs else 0
    return 2 * inputs + 2 * outputs + convolutions + _linear(signal, outputs) + shortcut


def _attention(width: int) -> int:
    return 2 * width + 4 * _linear(width, width)


def _convolution(inputs: int, outputs: int) -> int:
    return (9 * inputs + 1) * outputs


def _linear(inputs: int, outputs: int) -> int:
    return (inputs + 1) * outputs
