"""Samples drawn while a model trains: a picture every so many steps, from the same noise each time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from finectl.artifacts.files import staged
from finectl.artifacts.job import Job
from finectl.data.classes import chosen_labels
from finectl.data.images import make_grid, to_uint8
from finectl.data.sources import DataInfo
from finectl.diffusion.sampling import sample_images
from finectl.models.vae import find_recorded
from finectl.training.step import Ema

FOLDER = "previews"
IMAGES, COLUMNS = 20, 10
SCHEDULER, SAMPLING_STEPS = "ddim", 50


def draw_previews(job: Job[Any], model: Any, ema: Ema, info: DataInfo, step: int) -> None:
    """Write `previews/<step>.png`: samples of the averaged weights, decoded where the model works on latents.

    Every process computes them, since a sharded model needs all; the one that leads writes.
    """
    config = model.config
    some = info.whole and config.num_classes and info.text is None
    drawn = chosen_labels(info) if some else range(max(config.num_classes, 1))
    device = next(model.parameters()).device
    with ema.denoiser(model) as averaged:
        images = sample_images(
            averaged,
            (config.channels, config.image_size, config.image_size),
            [drawn[index % len(drawn)] for index in range(IMAGES)],
            null_label=config.num_classes,
            scheduler=SCHEDULER,
            sampling_steps=SAMPLING_STEPS,
            guidance=1.0,
            seed=0,
            learned_sigma=config.learn_sigma,
            device=device,
            diffusion=config.diffusion,
            clip=info.vae is None,
        )
    if not job.world.leads:
        return
    if info.vae is not None:
        images = _decoded(images, info.vae, device)
    folder = job.directory / FOLDER
    folder.mkdir(exist_ok=True)
    with staged(folder / f"{step:07d}.png") as temporary:
        make_grid(to_uint8(images).cpu(), columns=COLUMNS).save(temporary, format="png")


def require_previews(info: DataInfo) -> None:
    """Check before the first step that samples of these data can be drawn.

    Raises:
        InputError: the data are latents, and their autoencoder is not where it was.
    """
    if info.vae is not None:
        find_recorded(info.vae, info.name)


def _decoded(latents: Tensor, vae: Mapping[str, Any], device: torch.device) -> Tensor:
    from finectl.models.vae import load_vae  # imports diffusers' autoencoders

    return load_vae(vae["name"], device).decode(latents)
