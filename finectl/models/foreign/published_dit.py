"""The layout of published DiT checkpoints (facebookresearch/DiT), whose names are finectl's own.

Reference: Peebles and Xie, arXiv 2212.09748; key table of its released checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from finectl.errors import InputError, UsageError
from finectl.models.foreign.layout import Layout, Part, Shape
from finectl.models.presets import FREQUENCIES, LAYER_TYPES, PRESETS, DiTConfig, layer_shapes

if TYPE_CHECKING:
    from torch import Tensor

NAME = "dit"
POSITIONS = "pos_embed"
PATCHES = "x_embedder.proj.weight"
TABLE = "y_embedder.embedding_table.weight"
LAST = "final_layer.linear.weight"
MARKS = (PATCHES, TABLE, LAST, "blocks.0.attn.qkv.weight")
"""Tensors by which the layout is known."""

FREQUENCY_DIVISOR = 128


def state_shapes(config: DiTConfig) -> dict[str, Shape]:
    """Return name -> shape of a dense DiT's parameters, without torch."""
    width, patch = config.width, config.patch_size
    shapes: dict[str, Shape] = {
        PATCHES: (width, config.channels, patch, patch),
        "x_embedder.proj.bias": (width,),
        "t_embedder.mlp.0.weight": (width, FREQUENCIES),
        "t_embedder.mlp.0.bias": (width,),
        "t_embedder.mlp.2.weight": (width, width),
        "t_embedder.mlp.2.bias": (width,),
        TABLE: (config.num_classes + 1, width),
        LAST: (patch**2 * config.out_channels, width),
        "final_layer.linear.bias": (patch**2 * config.out_channels,),
        "final_layer.adaLN_modulation.1.weight": (2 * width, width),
        "final_layer.adaLN_modulation.1.bias": (2 * width,),
    }
    for index in range(config.depth):
        for kind, (outputs, inputs) in layer_shapes(config).items():
            layer = f"blocks.{index}.{LAYER_TYPES[kind]}"
            shapes |= {f"{layer}.weight": (outputs, inputs), f"{layer}.bias": (outputs,)}
    return shapes


def positions(config: DiTConfig) -> Tensor:
    """Return the stored position embedding, (1, T, D)."""
    from finectl.models.dit import position_embedding

    return position_embedding(config.width, config.image_size // config.patch_size)[None]


def import_layout(config: DiTConfig, table_rows: int) -> Layout:
    """Return how finectl's tensors are made of the published ones.

    Args:
        config: What is made.
        table_rows: Rows of the label table there; more than `num_classes` + 1 when it was padded for DiTPipeline.
    """
    shapes = state_shapes(config)
    parts = {name: Part((name,), shape) for name, shape in shapes.items()}
    if table_rows != config.num_classes + 1:
        parts[TABLE] = Part((TABLE,), shapes[TABLE], without_padding(config.num_classes))
    return Layout(parts, constants={POSITIONS: lambda: positions(config)})


def without_padding(classes: int) -> Callable[[Tensor], Tensor]:
    """Return the function that keeps a label table's classes and its last row, the null class."""

    def keep(table: Tensor) -> Tensor:
        import torch

        return torch.cat([table[:classes], table[-1:]])

    return keep


def export_layout(config: DiTConfig) -> Layout:
    """Return how the published tensors are made of finectl's."""
    parts = {name: Part((name,), shape) for name, shape in state_shapes(config).items()}
    parts[POSITIONS] = Part((), (1, config.tokens, config.width), lambda: positions(config))
    return Layout(parts)


def config_from_shapes(
    shapes: Mapping[str, Shape],
    where: str,
    *,
    heads: int | None,
    image_size: int | None,
    trained_with: Mapping[str, Any],
) -> DiTConfig:
    """Read the architecture off the tensors' shapes.

    Args:
        shapes: Name -> shape.
        where: How an error message names the source.
        heads: Attention heads, which leave no trace in the shapes; None takes those of the published widths.
        image_size: Side of the input, where the position embedding that tells it is not stored; None for an eighth of
            the training script's.
        trained_with: The options of the training script, where the checkpoint holds them.

    Raises:
        InputError: it is no DiT, or one that finectl cannot compute.
        UsageError: the number of heads is needed and not given.
    """
    missing = [name for name in MARKS if name not in shapes]
    if missing:
        raise InputError(f"{where} has no tensor {missing[0]!r}", expected="the tensors of a Diffusion Transformer")
    width, channels, patch, _ = shapes[PATCHES]
    numbers = [int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")]
    depth = len(set(numbers))
    outputs = shapes[LAST][0] // patch**2
    if outputs not in (channels, 2 * channels):
        raise InputError(
            f"{where} maps {channels} channels to {outputs}", expected=f"{channels}, or {2 * channels} with a variance"
        )
    rows = shapes[TABLE][0]
    if trained_with.get("num_classes") == rows:
        raise InputError(
            f"the label table of {where} has {rows} rows for {rows} classes", expected="one more, for the null class"
        )
    hidden = shapes.get("blocks.0.mlp.fc1.weight", (4 * width, width))[0]
    try:
        return DiTConfig(
            width=width,
            depth=depth,
            heads=heads or _usual_heads(width, where),
            patch_size=patch,
            image_size=_image_size(shapes, patch, where, image_size, trained_with.get("image_size")),
            channels=channels,
            num_classes=rows - 1,
            mlp_ratio=hidden // width,
            learn_sigma=outputs == 2 * channels,
            frequency_divisor=FREQUENCY_DIVISOR,
        )
    except UsageError as error:
        if error.fix:
            raise
        raise InputError(f"{where}: {error.what}", expected=error.expected) from error


def _usual_heads(width: int, where: str) -> int:
    for size in PRESETS.values():
        if size.width == width:
            return size.heads
    raise UsageError(
        f"{where} has width {width}, and the weights do not tell how many heads attention has",
        expected=f"a published width: {', '.join(str(size.width) for size in PRESETS.values())}",
        fix="name the number: --heads N",
    )


def _image_size(shapes: Mapping[str, Shape], patch: int, where: str, given: int | None, pixels: object) -> int:
    """Return the side of the input: from the position embedding, else from the training script's pixels / 8."""
    if POSITIONS in shapes:
        tokens = shapes[POSITIONS][-2]
        side = math.isqrt(tokens)
        if side * side != tokens:
            raise InputError(f"{POSITIONS} of {where} has {tokens} positions", expected="a square number")
        if given is not None and given != side * patch:
            raise UsageError(
                f"--image-size {given} is not that of {where}", expected=f"{side * patch}", fix="leave it out"
            )
        return side * patch
    if given is not None:
        return given
    if isinstance(pixels, int) and pixels >= 8:
        return pixels // 8
    raise UsageError(
        f"{where} has no {POSITIONS!r}, and nothing else in it tells the image size",
        fix="name the side of its input, in latent pixels for a latent model: --image-size N",
    )
