"""The label table of a model for the classes of other data: rows drawn anew, or the first ones taken over.

The row of the null class, the last one, is kept in either case: it is what a model knows of images as such. Only
`relabelled` needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from finectl.errors import InputError
from finectl.models.io import ModelConfig
from finectl.models.presets import DiTConfig
from finectl.models.unet_config import UNET, UNetConfig

if TYPE_CHECKING:
    from torch import Tensor

NEW, REUSE = "new", "reuse"
MODES = (NEW, REUSE)
STD = 0.02
"""Of new rows: a Diffusion Transformer's own initialisation of its table."""
DIT_TABLE = "y_embedder.embedding_table.weight"
UNET_TABLE = "unet.class_embedding.weight"
ROWS = "num_class_embeds"
TIMES = 4
"""Width of the time embedding, in widths of the finest resolution, where a UNet does not say it."""


def has_label_table(config: ModelConfig) -> bool:
    """Tell whether a model reads classes; one without them is trained without labels."""
    return isinstance(config, DiTConfig) or (config.architecture == UNET and config.num_classes > 0)


def with_classes(config: ModelConfig, classes: int, *, null: bool) -> ModelConfig:
    """Return the architecture with a table of other classes.

    Args:
        config: Of a model with a label table.
        classes: Classes of the data, at least 1.
        null: Whether a UNet without a null class gets one; a Diffusion Transformer always has one.
    """
    if isinstance(config, DiTConfig):
        return replace(config, num_classes=classes)
    there, null = int(config.network[ROWS]), null or config.null_class
    rows = classes + null
    return replace(
        config,
        network={**config.network, ROWS: rows},
        num_classes=classes,
        null_class=null,
        parameters=config.parameters + (rows - there) * _row_width(config),
    )


def require_rows(config: ModelConfig, classes: int, subject: str) -> None:
    """Check that a table has a row for each class of the data.

    Args:
        config: Of a model with a label table.
        classes: Classes of the data.
        subject: What the message begins with.

    Raises:
        InputError: it has fewer.
    """
    if classes > config.num_classes:
        raise InputError(
            f"{subject} has {classes} classes, and the label table of the model rows for {config.num_classes}",
            expected=f"at most {config.num_classes} classes with --label-rows reuse",
            fix="--label-rows new",
        )


def relabelled(
    state: Mapping[str, Tensor], config: ModelConfig, target: ModelConfig, mode: str, seed: int
) -> dict[str, Tensor]:
    """Return a model's weights with the label table of another configuration.

    Args:
        state: The weights.
        config: Of the model with a label table.
        target: What `with_classes` made of it.
        mode: `new` draws the rows of all classes from N(0, 0.02^2); `reuse` takes the first ones.
        seed: Of the draws.

    Returns:
        The weights; the null row is the model's own. A UNet that had none, and gets one, starts it as the mean row.
    """
    import torch

    from finectl.diffusion.random import generator_for

    name = DIT_TABLE if isinstance(config, DiTConfig) else UNET_TABLE
    table = state[name]  # (rows, D)
    rows, kept = table[: config.num_classes], table[config.num_classes :]
    classes = target.num_classes
    if mode == NEW:
        drawn = torch.randn(classes, table.shape[1], generator=generator_for("label-rows", seed))
        chosen = (STD * drawn).to(table.dtype)
    else:
        chosen = rows[:classes]
    if not len(kept) and target.has_null_class:
        kept = rows.mean(0, keepdim=True)
    return {**state, name: torch.cat([chosen, kept])}


def _row_width(config: UNetConfig) -> int:
    """Return the numbers of one row of a UNet's table: those of its time embedding."""
    return int(config.network.get("time_embedding_dim") or TIMES * config.widths[0])
