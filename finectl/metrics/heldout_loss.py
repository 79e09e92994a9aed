"""Held-out denoising loss with the same noise for every model, so that two values differ by the models alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finectl.data.dataset import ImageSet
from finectl.diffusion.config import DDPM, DiffusionConfig
from finectl.diffusion.losses import Denoiser, denoising_loss
from finectl.diffusion.random import generator_for
from finectl.diffusion.ranges import equal_ranges
from finectl.diffusion.schedule import NoiseSchedule
from finectl.metrics.measured import Z_95
from finectl.training.distributed import total
from finectl.world import World

RANGES = 4
TRAINING_DRAWS = 4
TRAINING_IMAGES = 1024
# Images whose noise is drawn at once, and their values where images are large: 32 MiB.
CHUNK_IMAGES = 512
CHUNK_VALUES = 1 << 23


@dataclass(frozen=True, eq=False)
class HeldoutLoss:
    """Losses of every image and draw.

    Args:
        losses: (draws, N), float32, mean squared error of the prediction.
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
        In a range an image counts once, by its mean there; the loss is the mean over all terms. A range without any
        has None for both.

        Args:
            ranges: Equal parts into which 0..T-1 is cut.
        """
        return {
            "value": self.mean,
            "interval": _interval(self.mean, self.losses.double().mean(0)),
            "images": int(self.losses.shape[1]),
            "draws": int(self.losses.shape[0]),
            "ranges": [self._range(first, last) for first, last in equal_ranges(self.total_timesteps, ranges)],
        }

    def _range(self, first: int, last: int) -> dict[str, Any]:
        inside = (self.timesteps >= first) & (self.timesteps <= last)  # (draws, N)
        terms = int(inside.sum())
        if not terms:
            return {"first": first, "last": last, "loss": None, "interval": None, "terms": 0}
        values = self.losses.double().where(inside, 0.0)
        counts = inside.sum(0)  # (N,)
        seen = counts > 0
        loss = float(values.sum()) / terms
        interval = _interval(loss, values.sum(0)[seen] / counts[seen])
        return {"first": first, "last": last, "loss": loss, "interval": interval, "terms": terms}


def _interval(value: float, images: Tensor) -> list[float]:
    """Return the 95 % interval around a value from one number an image, (N,) float64."""
    half = Z_95 * float(images.std()) / math.sqrt(images.numel()) if images.numel() > 1 else math.inf
    return [value - half, value + half]


@torch.no_grad()
def heldout_loss(
    model: Denoiser,
    data: ImageSet,
    *,
    draws: int,
    seed: int = 0,
    batch_size: int = 512,
    device: str | torch.device = "cpu",
    diffusion: DiffusionConfig = DDPM,
    world: World | None = None,
) -> HeldoutLoss:
    """Measure the denoising loss on images that no training saw.

    Draw d of an image takes a timestep from the d-th of `draws` equal parts of 0..T-1 and fresh noise; both depend on
    (seed, d), on the image's place and on the data set alone. Images are read as they are needed, never all at once.

    Args:
        model: (x_t, t, y) to the prediction, in evaluation mode.
        data: The held-out images; of latents, each draw takes a new sample.
        draws: Timesteps an image.
        seed: Seed of timesteps and noise.
        batch_size: Images computed at a time, at most; it changes rounding only.
        device: Where to compute; the draws are made on the CPU.
        diffusion: The model's noise schedule, and what it predicts.
        world: The processes that share the draws, joined by the caller; all of them call this with the same arguments,
            and all get the same result, bit for bit, whatever their number.
    """
    world = world or World()
    schedule = NoiseSchedule.from_config(diffusion, device)
    timesteps = len(schedule)
    times, rows = [], []
    for draw in range(draws):
        random = generator_for("heldout", seed, draw)
        part = torch.rand(len(data), generator=random)
        t = ((draw + part) / draws * timesteps).long().clamp(max=timesteps - 1)  # (N,)
        times.append(t)
        if draw % world.size != world.rank:
            rows.append(torch.zeros(len(data)))  # another process's, in whose sum this one has no share
            continue
        losses = [
            denoising_loss(
                model,
                schedule,
                x0.to(device),
                data.labels[positions].to(device),
                t[positions].to(device),
                noise.to(device),
                bound=False,
            ).cpu()
            for positions, x0, noise in _batches(data, seed, draw, random, batch_size)
        ]
        rows.append(torch.cat(losses))
    return HeldoutLoss(total(world, torch.stack(rows)).float(), torch.stack(times), timesteps)


def _batches(
    data: ImageSet, seed: int, draw: int, random: torch.Generator, batch_size: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Give positions (B,), images (B, C, H, W) and their noise, drawn by chunks that do not depend on the batch size.

    The first chunk continues `random`; each later one has a generator of its own.
    """
    length = max(1, min(CHUNK_IMAGES, CHUNK_VALUES // math.prod(data.shape)))
    for number, chunk in enumerate(torch.arange(len(data)).split(length)):
        source = random if number == 0 else generator_for("heldout", seed, draw, number)
        noise = torch.randn((len(chunk), *data.shape), generator=source)  # (n, C, H, W)
        sampling = torch.randn(noise.shape, generator=source) if data.sampled else None
        for part in torch.arange(len(chunk)).split(batch_size):
            positions = chunk[part]
            images = data.transform(data.read(positions), None if sampling is None else sampling[part])
            yield positions, images, noise[part]


def heldout_evaluator(
    data: ImageSet, device: str | torch.device = "cpu", draws: int = TRAINING_DRAWS, diffusion: DiffusionConfig = DDPM
) -> Callable[[Denoiser], float]:
    """Return the held-out loss as a function of the model, for logging during training.

    Args:
        data: The held-out images; of more than 1,024, a fixed balanced part is used.
        device: Where the model is.
        draws: Timesteps an image.
        diffusion: The model's noise schedule, and what it predicts.
    """
    part = data.subset(TRAINING_IMAGES, seed=0) if len(data) > TRAINING_IMAGES else data

    def evaluate(model: Denoiser) -> float:
        return heldout_loss(model, part, draws=draws, device=device, diffusion=diffusion).mean

    return evaluate
