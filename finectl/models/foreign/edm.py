"""EDM state dicts of the ADM architecture (DhariwalUNet inside EDMPrecond), as a UNet2DModel.

Other architectures of EDM are refused by name: diffusers' UNet2DModel does not compute them. A state dict does not tell
the preconditioning; that of EDM with sigma_data = 0.5 is taken, as its published networks of this architecture have it.

Reference: Karras et al., arXiv 2206.00364; Dhariwal and Nichol, arXiv 2105.05233 (ADM).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from finectl.errors import InputError
from finectl.models.foreign.layout import Layout, Part, Shape
from finectl.models.unet_config import UNET, UNetConfig

if TYPE_CHECKING:
    from torch import Tensor

NAME = "edm"
PREFIX = "model."
MARK = "map_layer0."
SIGMA_DATA = 0.5
HEAD_WIDTH = 64
GROUPS = 32
LEAST_WIDTH = 4 * GROUPS
FIRST = re.compile(r"enc\.(\d+)x\1_conv\.weight")
BLOCK = re.compile(r"(enc|dec)\.(\d+)x\2_(?:block\d+|down|up|in\d)\.")
RESAMPLE = "resample_filter"

REFUSED = {
    # a tensor that gives the architecture away: what it is, and why it is not exact
    "out_gain": "an EDM2 network: its magnitude-preserving layers have no counterpart",
    "unet.out_gain": "an EDM2 network: its magnitude-preserving layers have no counterpart",
    "u": "a network in iDDPM's preconditioning: its noise levels are a table of its own",
}
SONG = "a SongUNet (DDPM++ or NCSN++): its residual branches are scaled by sqrt(1/2), and its heads differ"


def bare_names(names: Mapping[str, Any]) -> dict[str, str]:
    """Return the name of every tensor inside the preconditioning -> its name in the file."""
    return {name.removeprefix(PREFIX): name for name in names}


def config_from_shapes(shapes: Mapping[str, Shape], where: str) -> UNetConfig:
    """Read the architecture off the tensors' shapes.

    Args:
        shapes: Bare name -> shape.
        where: How an error message names the source.

    Raises:
        InputError: it is another architecture of EDM, or one that UNet2DModel computes differently.
    """
    for mark, what in REFUSED.items():
        if mark in shapes:
            raise _refused(where, what)
    first = [match for match in map(FIRST.fullmatch, shapes) if match]
    if "out_norm.weight" not in shapes or not first:
        raise _refused(where, SONG if "map_layer1.weight" in shapes else "of an unknown architecture")
    side = int(first[0][1])
    width, channels = shapes[first[0][0]][0], shapes[first[0][0]][1]
    if width < LEAST_WIDTH:
        raise _refused(where, f"{width} channels wide: below {LEAST_WIDTH} its norms have groups of another size")
    sides = sorted({int(match[2]) for match in map(BLOCK.match, shapes) if match}, reverse=True)
    widths = [shapes[f"enc.{s}x{s}_block0.conv1.weight"][0] for s in sides]
    attention = [f"enc.{s}x{s}_block0.qkv.weight" in shapes for s in sides]
    layers = sum(f"enc.{side}x{side}_block{i}.conv1.weight" in shapes for i in range(len(shapes)))
    classes = shapes["map_label.weight"][1] if "map_label.weight" in shapes else 0
    network: dict[str, Any] = {
        "sample_size": side,
        "in_channels": channels,
        "out_channels": shapes["out_conv.weight"][0],
        "layers_per_block": layers,
        "block_out_channels": widths,
        "down_block_types": ["AttnDownBlock2D" if a else "ResnetDownsampleBlock2D" for a in attention],
        "up_block_types": ["AttnUpBlock2D" if a else "ResnetUpsampleBlock2D" for a in reversed(attention)],
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "attention_head_dim": HEAD_WIDTH,
        "attn_norm_num_groups": GROUPS,
        "norm_num_groups": GROUPS,
        "norm_eps": 1e-5,
        "num_class_embeds": classes + 1 if classes else None,
    }
    return UNetConfig(
        architecture=UNET,
        network=network,
        image_size=side,
        channels=channels,
        parameters=0,
        num_classes=classes,
        null_class=classes > 0,
        sigma_data=SIGMA_DATA,
    )


def import_layout(config: UNetConfig, shapes: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> Layout:
    """Return how finectl's tensors are made of EDM's.

    Args:
        config: From `config_from_shapes`.
        shapes: Bare name -> shape of the source.
        wanted: Name -> shape of the network that diffusers builds.
    """
    names: dict[str, tuple[str, Callable[..., Tensor] | None]] = {}
    for theirs, ours in _blocks(config).items():
        names |= _block_parts(theirs, ours, config)
    for theirs, ours in (
        (f"enc.{config.image_size}x{config.image_size}_conv", "conv_in"),
        ("map_layer0", "time_embedding.linear_1"),
        ("map_layer1", "time_embedding.linear_2"),
        ("out_norm", "conv_norm_out"),
        ("out_conv", "conv_out"),
    ):
        names |= {f"{ours}.{end}": (f"{theirs}.{end}", None) for end in ("weight", "bias")}
    names["class_embedding.weight"] = ("map_label.weight", _label_table)
    parts = {f"unet.{name}": Part((names[name][0],), shape, names[name][1]) for name, shape in wanted.items()}
    filters = {name: _box_filter for name in shapes if name.endswith(f".{RESAMPLE}")}
    return Layout(parts, constants=filters, ignored=("map_augment.",))


def _blocks(config: UNetConfig) -> dict[str, str]:
    """Return the residual blocks: EDM's name -> diffusers' module, without its attention."""
    levels, layers = config.depth, int(config.network["layers_per_block"])
    side = config.image_size
    blocks = {}
    for level in range(levels):
        here = f"{side >> level}x{side >> level}"
        back = levels - 1 - level
        if level > 0:
            blocks[f"enc.{here}_down"] = f"down_blocks.{level - 1}.downsamplers.0"
        if back > 0:
            blocks[f"dec.{here}_up"] = f"up_blocks.{back - 1}.upsamplers.0"
        blocks |= {f"enc.{here}_block{i}": f"down_blocks.{level}.resnets.{i}" for i in range(layers)}
        blocks |= {f"dec.{here}_block{i}": f"up_blocks.{back}.resnets.{i}" for i in range(layers + 1)}
    coarsest = side >> (levels - 1)
    return blocks | {f"dec.{coarsest}x{coarsest}_in{i}": f"mid_block.resnets.{i}" for i in range(2)}


def _block_parts(theirs: str, ours: str, config: UNetConfig) -> dict[str, tuple[str, Callable[..., Tensor] | None]]:
    """Return diffusers' name -> (EDM's name, how it is made) for one block and its attention."""
    layers = {
        "norm0": "norm1", "conv0": "conv1", "affine": "time_emb_proj", "norm1": "norm2", "conv1": "conv2",
        "skip": "conv_shortcut",
    }  # fmt: skip
    ends = ("weight", "bias")
    parts: dict[str, tuple[str, Callable[..., Tensor] | None]] = {
        f"{ours}.{new}.{end}": (f"{theirs}.{old}.{end}", None) for old, new in layers.items() for end in ends
    }
    attention = ours.replace(".resnets.", ".attentions.")
    for end in ends:
        parts[f"{attention}.group_norm.{end}"] = (f"{theirs}.norm2.{end}", None)
        parts[f"{attention}.to_out.0.{end}"] = (f"{theirs}.proj.{end}", _as_linear)
        for index, which in enumerate("qkv"):
            parts[f"{attention}.to_{which}.{end}"] = (f"{theirs}.qkv.{end}", _third_of_heads(index))
    return parts


def _as_linear(weight: Tensor) -> Tensor:
    """Take a 1x1 convolution as a linear layer; a bias stays what it is."""
    return weight[:, :, 0, 0] if weight.dim() == 4 else weight


def _third_of_heads(index: int) -> Callable[[Tensor], Tensor]:
    """Return the function that takes q, k or v out of a fused layer whose rows run over (head, channel, q k v)."""

    def take(fused: Tensor) -> Tensor:
        rows = fused.reshape(fused.shape[0] // (3 * HEAD_WIDTH), HEAD_WIDTH, 3, -1)[:, :, index]  # (heads, d, inputs)
        return rows.reshape(-1, rows.shape[-1]) if fused.dim() == 4 else rows.reshape(-1)

    return take


def _label_table(weight: Tensor) -> Tensor:
    """Turn the layer of a one-hot label into a table, with a zero row for no label."""
    import torch

    return torch.cat([weight.T, weight.new_zeros(1, weight.shape[0])])


def _box_filter() -> Tensor:
    import torch

    return torch.full((1, 1, 2, 2), 0.25)


def _refused(where: str, what: str) -> InputError:
    return InputError(
        f"{where} is {what}",
        expected="the ADM architecture (DhariwalUNet) inside EDMPrecond, which a UNet2DModel computes exactly",
    )
