"""diffusers' DiTTransformer2DModel: its configuration and its tensors, both ways."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from finectl.diffusion.config import DiffusionConfig
from finectl.errors import InputError, UsageError
from finectl.models.foreign.layout import Copies, Layout, Part, Shape
from finectl.models.foreign.published_dit import TABLE, positions, state_shapes, without_padding
from finectl.models.presets import DiTConfig

if TYPE_CHECKING:
    from torch import Tensor

NAME = "diffusers-dit"
CLASS = "DiTTransformer2DModel"
CLASSES = (CLASS, "Transformer2DModel")
"""Checkpoints from before diffusers 0.28 call the class Transformer2DModel."""

FREQUENCY_DIVISOR = 127
PIPELINE_CLASSES = 1000
"""DiTPipeline's null class, whatever the model's number of classes."""

FIXED: dict[str, tuple[Any, Any]] = {
    # option: (the only value that finectl's DiT computes, diffusers' default)
    "norm_type": ("ada_norm_zero", "ada_norm_zero"),
    "activation_fn": ("gelu-approximate", "gelu-approximate"),
    "attention_bias": (True, True),
    "norm_elementwise_affine": (False, False),
}
OLD_FIXED: dict[str, tuple[Any, Any]] = {
    "norm_type": ("ada_norm_zero", "layer_norm"),
    "activation_fn": ("gelu-approximate", "geglu"),
    "attention_bias": (True, False),
    "norm_elementwise_affine": (False, True),
    "cross_attention_dim": (None, None),
    "interpolation_scale": (None, None),
}
OLD_INTERPOLATED_SIZE = 128
"""From this side on, the old class stretches its position embedding."""

EMBEDDER = "norm1.emb.timestep_embedder.linear"
LABELS = "norm1.emb.class_embedder.embedding_table.weight"
TABLE_IN_BLOCK = f"transformer_blocks.0.{LABELS}"


def config_from(values: Mapping[str, Any], where: str, diffusion: DiffusionConfig) -> DiTConfig:
    """Return finectl's configuration for that of diffusers.

    Args:
        values: The config.json of the model.
        where: How an error message names it.
        diffusion: The noise schedule.

    Raises:
        InputError: an option has a value that finectl's DiT does not compute.
    """
    old = values.get("_class_name") != CLASS
    for name, (wanted, default) in (OLD_FIXED if old else FIXED).items():
        found = values.get(name, default)
        if found != wanted:
            raise InputError(f"{where} has {name} {found!r}", expected=f"{wanted!r}, which a DiT has")
    sizes: dict[str, Any] = {
        name: values.get(name) for name in ("num_attention_heads", "attention_head_dim", "num_layers")
    }
    if old:
        sizes |= {name: values.get(name) for name in ("sample_size", "patch_size", "in_channels")}
    sizes |= {name: values.get(name, usual) for name, usual in _USUAL.items() if sizes.get(name) is None}
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise InputError(f"{where} has {name} {size!r}", expected="a positive whole number")
    side, channels = int(sizes["sample_size"]), int(sizes["in_channels"])
    if old and side >= OLD_INTERPOLATED_SIZE:
        raise InputError(
            f"{where} is an old Transformer2DModel of sample_size {side}, whose position embedding is stretched",
            expected=f"below {OLD_INTERPOLATED_SIZE}, or {CLASS}",
        )
    outputs = values.get("out_channels") or channels
    if outputs not in (channels, 2 * channels):
        raise InputError(
            f"{where} maps {channels} channels to {outputs}", expected=f"{channels}, or {2 * channels} with a variance"
        )
    classes = values.get("num_embeds_ada_norm", None if old else PIPELINE_CLASSES)
    if not isinstance(classes, int) or classes < 0:
        raise InputError(f"{where} has num_embeds_ada_norm {classes!r}", expected="the number of classes")
    try:
        return DiTConfig(
            width=int(sizes["num_attention_heads"]) * int(sizes["attention_head_dim"]),
            depth=int(sizes["num_layers"]),
            heads=int(sizes["num_attention_heads"]),
            patch_size=int(sizes["patch_size"]),
            image_size=side,
            channels=channels,
            num_classes=classes,
            learn_sigma=outputs == 2 * channels,
            frequency_divisor=FREQUENCY_DIVISOR,
            mlp_norm_eps=float(values.get("norm_eps", 1e-5)),
            diffusion=diffusion,
        )
    except UsageError as error:
        raise InputError(f"{where}: {error.what}", expected=error.expected) from error


_USUAL = {
    "num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28, "sample_size": 32, "patch_size": 2,
    "in_channels": 4,
}  # fmt: skip


def import_layout(config: DiTConfig, table_rows: int) -> Layout:
    """Return how finectl's tensors are made of diffusers'.

    Args:
        config: What is made.
        table_rows: Rows of the label table there; more than `num_classes` + 1 when it was padded for DiTPipeline.
    """
    shapes = state_shapes(config)
    parts: dict[str, Part] = {}
    for ours, theirs in _names(config).items():
        parts[ours] = Part((theirs,), shapes[ours])
    for index in range(config.depth):
        for end in ("weight", "bias"):
            ours = f"blocks.{index}.attn.qkv.{end}"
            parts[ours] = Part(tuple(_qkv_names(index, end)), shapes[ours], _concatenate)
    if table_rows != config.num_classes + 1:
        parts[TABLE] = Part(parts[TABLE].sources, shapes[TABLE], without_padding(config.num_classes))
    return Layout(
        parts,
        copies=[
            Copies(name, {f"block {i}": name.replace(".0.", f".{i}.", 1) for i in range(1, config.depth)})
            for name in _embedder_names().values()
        ],
        constants={"pos_embed.pos_embed": lambda: positions(config)},
    )


def export_layout(config: DiTConfig) -> Layout:
    """Return how diffusers' tensors are made of finectl's; the label table is padded for DiTPipeline."""
    shapes = state_shapes(config)
    parts: dict[str, Part] = {}
    for ours, theirs in _names(config).items():
        parts[theirs] = Part((ours,), shapes[ours])
    rows = table_rows(config)
    if rows != config.num_classes + 1:
        theirs = _embedder_names()[TABLE]
        parts[theirs] = Part((TABLE,), (rows, config.width), _with_padding(config.num_classes, rows))
    for ours in _embedder_names().values():
        for index in range(1, config.depth):
            parts[ours.replace(".0.", f".{index}.", 1)] = parts[ours]
    for index in range(config.depth):
        for end in ("weight", "bias"):
            ours = f"blocks.{index}.attn.qkv.{end}"
            shape: Shape = (shapes[ours][0] // 3, *shapes[ours][1:])
            for third, theirs in enumerate(_qkv_names(index, end)):
                parts[theirs] = Part((ours,), shape, _third(third))
    return Layout(parts)


def table_rows(config: DiTConfig) -> int:
    """Return the rows of the exported label table: DiTPipeline's null class is 1000, so fewer classes are padded."""
    return max(config.num_classes, PIPELINE_CLASSES) + 1


def export_config(config: DiTConfig, version: str) -> dict[str, Any]:
    """Return the config.json that diffusers' class reads.

    Args:
        config: A dense DiT.
        version: diffusers' version.

    Raises:
        InputError: diffusers' class has no such sizes.
    """
    if config.mlp_ratio != 4:
        raise InputError(
            f"the model's feed-forward part is {config.mlp_ratio} times its width", expected="4, as diffusers has it"
        )
    return {
        "_class_name": CLASS,
        "_diffusers_version": version,
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": config.width // config.heads,
        "dropout": 0.0,
        "in_channels": config.channels,
        "norm_elementwise_affine": False,
        "norm_eps": config.mlp_norm_eps,
        "norm_num_groups": 32,
        "norm_type": "ada_norm_zero",
        "num_attention_heads": config.heads,
        "num_embeds_ada_norm": table_rows(config) - 1,
        "num_layers": config.depth,
        "out_channels": config.out_channels,
        "patch_size": config.patch_size,
        "sample_size": config.image_size,
        "upcast_attention": False,
    }


def _embedder_names() -> dict[str, str]:
    """Return the names of what diffusers keeps in every block and finectl once: ours -> theirs in block 0."""
    names = {TABLE: TABLE_IN_BLOCK}
    for ours, theirs in (("0", "1"), ("2", "2")):
        for end in ("weight", "bias"):
            names[f"t_embedder.mlp.{ours}.{end}"] = f"transformer_blocks.0.{EMBEDDER}_{theirs}.{end}"
    return names


def _names(config: DiTConfig) -> dict[str, str]:
    """Return ours -> theirs for every tensor but those of the fused query-key-value layer."""
    layers = {
        "x_embedder.proj": "pos_embed.proj",
        "final_layer.adaLN_modulation.1": "proj_out_1",
        "final_layer.linear": "proj_out_2",
    }
    for index in range(config.depth):
        ours, theirs = f"blocks.{index}", f"transformer_blocks.{index}"
        layers |= {
            f"{ours}.adaLN_modulation.1": f"{theirs}.norm1.linear",
            f"{ours}.attn.proj": f"{theirs}.attn1.to_out.0",
            f"{ours}.mlp.fc1": f"{theirs}.ff.net.0.proj",
            f"{ours}.mlp.fc2": f"{theirs}.ff.net.2",
        }
    names = {f"{ours}.{end}": f"{theirs}.{end}" for ours, theirs in layers.items() for end in ("weight", "bias")}
    return names | _embedder_names()


def _qkv_names(index: int, end: str) -> list[str]:
    return [f"transformer_blocks.{index}.attn1.to_{which}.{end}" for which in "qkv"]


def _concatenate(*parts: Tensor) -> Tensor:
    import torch

    return torch.cat(parts)


def _third(index: int) -> Callable[[Tensor], Tensor]:
    return lambda fused: fused.chunk(3)[index]


def _with_padding(classes: int, rows: int) -> Callable[[Tensor], Tensor]:
    """Return the function that puts zero rows between the classes and the null class, which becomes the last row."""

    def pad(table: Tensor) -> Tensor:
        padded = table.new_zeros(rows, table.shape[1])
        padded[:classes], padded[-1] = table[:classes], table[classes]
        return padded

    return pad
