"""Fixed noised batches to look at models with: no training, always the same images, timesteps and noise."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from finectl.data.dataset import ImageSet
from finectl.data.order import batch_indices
from finectl.diffusion.random import generator_for


class Probe(NamedTuple):
    """One batch: clean images x0 (B, C, H, W), labels y (B,), timesteps t (B,) and noise (B, C, H, W)."""

    x0: Tensor
    y: Tensor
    t: Tensor
    noise: Tensor


def probes(
    data: ImageSet, purpose: str, *, batches: int, batch_size: int, timesteps: int, seed: int, device: torch.device
) -> Iterator[Probe]:
    """Give batches of images with uniform timesteps and normal noise; they are drawn on the CPU, whatever the device.

    Args:
        data: The images; in an epoch none comes twice.
        purpose: Keeps the streams of different uses apart.
        batches: How many.
        batch_size: Images of each.
        timesteps: T; timesteps are 0..T-1.
        seed: Seed of images, timesteps and noise.
        device: Where the batches are wanted.
    """
    info = data.info
    shape = (batch_size, info.channels, info.image_size, info.image_size)
    for index in range(batches):
        positions = batch_indices(len(data), batch_size, index, seed)
        random = generator_for(purpose, seed, index)
        draw = torch.randn(shape, generator=random).to(device) if data.sampled else None
        x0 = data.transform(data.read(positions).to(device), draw)
        t = torch.randint(timesteps, (batch_size,), generator=random).to(device)
        noise = torch.randn(shape, generator=random).to(device)
        yield Probe(x0, data.labels[positions].to(device), t, noise)
