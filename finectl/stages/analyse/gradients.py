"""Gradient similarity between timesteps: the cosines of the loss's gradients at theta_0, one for each timestep.

Reference: DeMe, arXiv 2410.06664, section 8 and Fig. 1a.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from finectl.diffusion.losses import denoising_loss
from finectl.diffusion.ranges import equal_ranges
from finectl.stages.analyse.setting import Setting
from finectl.training.multitask.gradients import BYTES, MEMORY_BYTES, cosines, gradient_gram


def centres(timesteps: int, count: int) -> list[int]:
    """Return the middle timestep of each of `count` equal parts of 0..timesteps-1."""
    return [(first + last) // 2 for first, last in equal_ranges(timesteps, count)]


def gradient_similarity(setting: Setting, memory_bytes: int = MEMORY_BYTES) -> dict[str, Any]:
    """Compare the gradients of the squared error at single timesteps, over the same images, each with its own noise.

    Args:
        setting: The models and images.
        memory_bytes: Of the gradients that are kept at once.

    Returns:
        `timesteps`, `borders` of the ranges, `cosines` (K, K), `norms` (K,), and the mean cosine of two timesteps of
        one expert's range (`within`) and of two ranges (`between`), None where there is no such pair.
    """
    config, schedule = setting.job.config, setting.schedule
    data = setting.images("train")
    x0, labels = setting.clean(data, "analyse-gradients"), data.labels
    network = setting.network(setting.base_state()).requires_grad_(True)
    times = centres(len(schedule), config.timesteps)

    def losses(index: int) -> Iterator[Tensor]:
        noise = setting.noise("analyse-gradients", index, tuple(x0.shape))
        for rows in torch.arange(len(x0)).split(config.batch_size):
            setting.check()
            image, y, eps = (value[rows].to(setting.device) for value in (x0, labels, noise))
            t = torch.full((len(rows),), times[index], device=setting.device)
            yield denoising_loss(network, schedule, image, y, t, eps, bound=False).sum() / len(x0)

    parameters = list(network.parameters())
    width = max(1, memory_bytes // (BYTES * len(times)))
    passes = -(-sum(parameter.numel() for parameter in parameters) // width)
    with setting.job.console.progress("gradients", passes * len(times), unit="gradient") as progress:
        gram = gradient_gram(losses, len(times), parameters, memory_bytes=memory_bytes, between=progress.advance)
    found = cosines(gram)
    return {
        "timesteps": times,
        "images": len(x0),
        "borders": list(setting.parts.borders or ()),
        "norms": torch.diagonal(gram).clamp(min=0).sqrt().tolist(),
        "cosines": found.tolist(),
        **_by_range(found, times, setting.parts.borders),
    }


def _by_range(found: Tensor, times: list[int], borders: tuple[int, ...] | None) -> dict[str, float | None]:
    """Return the mean cosine of two different timesteps of one range, and of two ranges."""
    if borders is None:
        return {"within": None, "between": None}
    ranges = [sum(t >= border for border in borders[1:]) for t in times]
    pairs = [(i, j) for i in range(len(times)) for j in range(i)]
    within = [float(found[i, j]) for i, j in pairs if ranges[i] == ranges[j]]
    between = [float(found[i, j]) for i, j in pairs if ranges[i] != ranges[j]]
    return {"within": fmean(within) if within else None, "between": fmean(between) if between else None}
