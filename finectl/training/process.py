"""Which forward process a new model is of, and the UNet for a data set (no torch import)."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from finectl.data.sources import DataInfo
from finectl.diffusion.config import named_process
from finectl.models.presets import DiTConfig
from finectl.models.unet_config import UNetConfig
from finectl.models.unet_presets import text_unet_preset, unet_preset

C = TypeVar("C", DiTConfig, UNetConfig)


def of_process(target: C, process: str | None, data: DataInfo) -> C:
    """Return an architecture with the process that `--process` names; as it is without one.

    Raises:
        UsageError: the model learns a variance, and the process has none.
    """
    if process is None:
        return target
    return replace(target, diffusion=named_process(process, latents=data.vae is not None))


def unet_for(name: str, data: DataInfo, process: str | None) -> UNetConfig:
    """Return the architecture of a named UNet for a data set, of the process that it is known with or of another.

    Args:
        name: A key of the presets.
        data: The data set; with a text encoder for a model of text.
        process: As `--process` names it.
    """
    if data.text is not None:
        width = int(data.text["width"])
        known = text_unet_preset(name, image_size=data.image_size, channels=data.channels, text_width=width)
    else:
        known = unet_preset(name, image_size=data.image_size, channels=data.channels)
    return of_process(known, process, data)
