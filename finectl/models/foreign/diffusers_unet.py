"""diffusers' UNet2DModel and UNet2DConditionModel: kept as they are, under finectl's interface."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from finectl.diffusion.config import DiffusionConfig
from finectl.errors import InputError
from finectl.models.foreign.layout import Layout, Part, Shape
from finectl.models.unet_config import CLASSES, TEXT_UNET, UNET, UNetConfig

NAME = "diffusers-unet"
ARCHITECTURE_OF = {name: architecture for architecture, name in CLASSES.items()}
PREFIX = "unet."
LABEL_DROPOUT = 0.1

FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    # option: the values that the interface (x, t, class) or (x, t, text) can serve
    UNET: {"class_embed_type": (None,), "time_embedding_type": ("positional", "learned", None)},
    TEXT_UNET: {
        "class_embed_type": (None,),
        "num_class_embeds": (None,),
        "addition_embed_type": (None,),
        "encoder_hid_dim_type": (None,),
        "time_embedding_type": ("positional", None),
    },
}
REASONS = {
    "class_embed_type": "classes come from a table of embeddings",
    "num_class_embeds": "a text-conditional UNet has no classes here",
    "addition_embed_type": "it needs more than the text: Stable Diffusion XL and its like are not supported",
    "encoder_hid_dim_type": "it needs more than the text",
    "time_embedding_type": "timesteps are numbers of steps, not noise levels",
}

# Attention layers were written by other names before diffusers 0.17.
OLD_ATTENTION = re.compile(r"^(.*attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)$")
NEW_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def config_from(
    values: Mapping[str, Any],
    where: str,
    diffusion: DiffusionConfig,
    shapes: Mapping[str, Shape] | None,
    num_classes: int | None,
) -> UNetConfig:
    """Return finectl's configuration for that of diffusers.

    Args:
        values: The config.json of the model.
        where: How an error message names it.
        diffusion: The noise schedule.
        shapes: Name -> shape of the weights, where they are known already.
        num_classes: Classes of the label table; one less than its rows when the last one is the null class, None for
            as many as it has rows.

    Raises:
        InputError: an option has a value that the interface cannot serve.
    """
    architecture = ARCHITECTURE_OF[str(values.get("_class_name"))]
    for name, allowed in FIXED[architecture].items():
        if values.get(name) not in allowed:
            raise InputError(f"{where} has {name} {values[name]!r}", expected=f"{allowed[0]!r}: {REASONS[name]}")
    channels = values.get("in_channels", 3 if architecture == UNET else 4)
    rows = values.get("num_class_embeds") or 0
    classes = rows if num_classes is None else num_classes
    if rows - classes not in (0, 1) or (rows == 0 and classes):
        raise InputError(
            f"the label table of {where} has {rows} rows, which do not go with --num-classes {classes}",
            expected=f"{rows}, or {max(rows - 1, 0)} when the last row is the null class",
        )
    return UNetConfig(
        architecture=architecture,
        network={name: value for name, value in values.items() if not name.startswith("_")}
        | {"out_channels": values.get("out_channels", channels)},
        image_size=square_side(values.get("sample_size"), where),
        channels=int(channels),
        parameters=sum(math.prod(shape) for shape in shapes.values()) if shapes else 0,
        num_classes=classes,
        null_class=rows > classes,
        label_dropout=LABEL_DROPOUT if rows > classes else 0.0,
        diffusion=diffusion,
    )


def square_side(size: Any, where: str) -> int:
    """Return the side of a square `sample_size`.

    Raises:
        InputError: it is missing or not square.
    """
    sides = size if isinstance(size, list | tuple) and size else [size]
    if not all(isinstance(side, int) and side == sides[0] for side in sides):
        raise InputError(f"{where} has sample_size {size!r}", expected="the side of square images")
    return int(sides[0])


def new_names(shapes: Mapping[str, Shape]) -> dict[str, str]:
    """Return the present name of every tensor -> its name in the file."""
    return {OLD_ATTENTION.sub(lambda m: f"{m[1]}.{NEW_ATTENTION[m[2]]}.{m[3]}", name): name for name in shapes}


def network_shapes(config: UNetConfig) -> dict[str, Shape]:
    """Return name -> shape of the network that diffusers builds, without memory for it.

    Raises:
        InputError: diffusers cannot build it.
    """
    import torch

    from finectl.models.unet import build_network

    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in build_network(config).state_dict().items()}


def import_layout(config: UNetConfig) -> Layout:
    """Return how finectl's tensors are made of diffusers'."""
    return Layout({f"{PREFIX}{name}": Part((name,), shape) for name, shape in network_shapes(config).items()})


def export_layout(config: UNetConfig) -> Layout:
    """Return how diffusers' tensors are made of finectl's."""
    return Layout({name: Part((f"{PREFIX}{name}",), shape) for name, shape in network_shapes(config).items()})


def export_config(config: UNetConfig, version: str) -> dict[str, Any]:
    """Return the config.json that diffusers' class reads.

    Raises:
        InputError: the network is inside EDM's preconditioning, which diffusers' pipelines do not have.
    """
    if config.sigma_data is not None:
        raise InputError(
            "the network predicts through EDM's preconditioning, which no diffusers pipeline applies to a UNet2DModel",
            expected="a model that was not imported from EDM",
        )
    return {"_class_name": CLASSES[config.architecture], "_diffusers_version": version, **config.network}
