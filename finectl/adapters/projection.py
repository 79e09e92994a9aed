"""Channel-wise projections on a model that has none: its new configuration, and what its state is extended by.

Where they sit is in `finectl.models.projections`.

Reference: arXiv 2410.06664, section 3.2.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from finectl.errors import UsageError
from finectl.models.presets import DiTConfig
from finectl.models.projections import NONE, chosen
from finectl.models.unet_config import UNetConfig

if TYPE_CHECKING:
    from torch import Tensor

Config = TypeVar("Config", bound=DiTConfig | UNetConfig)


def add_projections(config: Config, kind: str) -> Config:
    """Return a configuration with projections, without torch.

    Args:
        config: Of the model to be fine-tuned. Projections that it has already stay: they must be among the new ones.
        kind: `none` adds nothing, `blocks` one behind every block, `foldable` those that `fold` removes.

    Raises:
        UsageError: there is no such kind, nothing can be folded, or the model has projections at other places.
    """
    places = chosen(kind, config.all_places)
    if kind == NONE:
        return config
    lost = [place.where for place in config.places if place not in places]
    if lost:
        raise UsageError(
            f"the model has projections {config.projections!r} already, and {kind!r} has none at {lost[0]}",
            expected=f"{config.projections!r}, or a kind that includes them",
        )
    return replace(config, projections=kind)


def identity_state(config: DiTConfig | UNetConfig) -> dict[str, Tensor]:
    """Return what a state is extended by so that it is one of a configuration with projections.

    A model that has some projections already keeps them by `{**identity_state(config), **state}`.

    Args:
        config: With projections.

    Returns:
        Name -> identity, float32, (C, C) in a Diffusion Transformer and (C, C, 1, 1) in a UNet.
    """
    import torch

    ends = (1, 1) if isinstance(config, UNetConfig) else ()
    return {
        place.parameter: torch.eye(place.channels).reshape(place.channels, place.channels, *ends)
        for place in config.places
    }
