"""Held-out denoising loss with the same noise for every model, so that two values differ by the models alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finectl.data.dataset import ImageSet
from finectl.diffusion.losses import Denoiser, denoising_loss
from finectl.diffusion.random import generator_for
from finectl.diffusion.ranges import equal_ranges
from finectl.diffusion.schedule import NoiseSchedule

Z_95 = 1.959964
RANGES = 4
TRAINING_DRAWS = 4


@dataclass(frozen=True, eq=False)
class HeldoutLoss:
    """Losses of every image and draw.

    Args:
        losses: (draws, N), float32, mean squared error of the predicted noise.
        timesteps: (draws, N), int64.
        total_timesteps: T.
    """

    losses: Tensor
    timesteps: Tensor
    total_timesteps: int

    @property
    def mean(self) -> float:
        """Mean over all images and draws."""
        return float(self.losses.double().mean())

    def summary(self, ranges: int = RANGES) -> dict[str, Any]:
        """Return the mean with its 95 % interval over images, and the same by timestep range.

        The interval is that of the draw of the images: the noise is fixed, so it is not what models are told apart by.
        """
        parts = []
        for first, last in equal_ranges(self.total_timesteps, ranges):
            inside = (self.timesteps >= first) & (self.timesteps <= last)
            values = self.losses[inside].double()
            parts.append({"first": first, "last": last, "loss": float(values.mean()), "terms": int(values.numel())})
        images = self.losses.double().mean(0)  # (N,)
        half = Z_95 * float(images.std()) / math.sqrt(images.numel()) if images.numel() > 1 else math.inf
        return {
            "value": self.mean,
            "interval": [self.mean - half, self.mean + half],
            "images": int(self.losses.shape[1]),
            "draws": int(self.losses.shape[0]),
            "ranges": parts,
        }


@torch.no_grad()
def heldout_loss(
    model: Denoiser,
    data: ImageSet,
    *,
    draws: int,
    seed: int = 0,
    batch_size: int = 512,
    device: str | torch.device = "cpu",
) -> HeldoutLoss:
    """Measure the denoising loss on images that no training saw.

    Draw d of an image takes a timestep from the d-th of `draws` equal parts of 0..T-1 and fresh noise; both depend on
    (seed, d) and the data set alone.

    Args:
        model: (x_t, t, y) to the predicted noise, in evaluation mode.
        data: The held-out images.
        draws: Timesteps an image.
        seed: Seed of timesteps and noise.
        batch_size: Images computed at a time; it changes rounding only.
        device: Where to compute; the draws are made on the CPU.
    """
    schedule = NoiseSchedule.linear(device)
    total = len(schedule)
    times, rows = [], []
    for draw in range(draws):
        random = generator_for("heldout", seed, draw)
        part = torch.rand(len(data), generator=random)
        t = ((draw + part) / draws * total).long().clamp(max=total - 1)  # (N,)
        noise = torch.randn(data.images.shape, generator=random)
        losses = [
            denoising_loss(
                model,
                schedule,
                data.images[part_of].to(device),
                data.labels[part_of].to(device),
                t[part_of].to(device),
                noise[part_of].to(device),
                bound=False,
            ).cpu()
            for part_of in torch.arange(len(data)).split(batch_size)
        ]
        times.append(t)
        rows.append(torch.cat(losses))
    return HeldoutLoss(torch.stack(rows), torch.stack(times), total)


def heldout_evaluator(
    data: ImageSet, device: str | torch.device = "cpu", draws: int = TRAINING_DRAWS
) -> Callable[[Denoiser], float]:
    """Return the held-out loss as a function of the model, for logging during training.

    Args:
        data: The held-out images.
        device: Where the model is.
        draws: Timesteps an image.
    """

    def evaluate(model: Denoiser) -> float:
        return heldout_loss(model, data, draws=draws, device=device).mean

    return evaluate
