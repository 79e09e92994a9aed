"""Second moments of what a model's linear layers are given: the metric in which an error of their weights counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from finectl.data.dataset import ImageSet
from finectl.data.order import batch_indices
from finectl.diffusion.random import generator_for
from finectl.diffusion.schedule import NoiseSchedule
from finectl.models.dit import DiT, drop_labels
from finectl.models.presets import LAYER_TYPES

IMAGES = 2048
BATCH_SIZE = 64


@torch.no_grad()
def input_moments(
    model: DiT,
    data: ImageSet,
    *,
    seed: int,
    device: torch.device,
    images: int = IMAGES,
    between: Callable[[], None] | None = None,
) -> dict[str, Tensor]:
    """Run a model on noised training images and return the uncentred second moments of its layers' inputs.

    Timesteps are uniform, labels are dropped as in training; the same seed gives the same images and noise.

    Args:
        model: Dense.
        data: The training images.
        seed: Seed of images, timesteps and noise.
        device: Where to compute.
        images: Images, each with a timestep of its own; one may come several times.
        between: Called after every batch, for example to look for signals.

    Returns:
        Layer type -> (L, m2, m2), float64, on the device: the mean of x x^T over images and tokens.
    """
    model.to(device).eval()
    schedule = NoiseSchedule.of(model.config, device)
    sums: dict[tuple[str, int], Tensor] = {}
    rows: dict[tuple[str, int], int] = {}

    def count(key: tuple[str, int]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, given: tuple[Any, ...]) -> None:
            x = given[0].flatten(0, -2).double()  # (B T, m2)
            sums[key] = sums[key].add_(x.t() @ x) if key in sums else x.t() @ x
            rows[key] = rows.get(key, 0) + x.shape[0]

        return hook

    hooks = [
        block.get_submodule(path).register_forward_pre_hook(count((kind, index)))
        for index, block in enumerate(model.blocks)
        for kind, path in LAYER_TYPES.items()
    ]
    try:
        for step in range(-(-images // BATCH_SIZE)):
            model(*_noised(model, data, schedule, step, seed, device))
            if between is not None:
                between()
    finally:
        for handle in hooks:
            handle.remove()
    layers = range(model.config.depth)
    return {kind: torch.stack([sums[kind, i] / rows[kind, i] for i in layers]) for kind in LAYER_TYPES}


def _noised(
    model: DiT, data: ImageSet, schedule: NoiseSchedule, step: int, seed: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what a step gives the model: noised images (B, C, H, W), timesteps (B,) and labels (B,)."""
    positions = batch_indices(len(data), BATCH_SIZE, step, seed)
    random = generator_for("moments", seed, step)
    shape = (BATCH_SIZE, data.info.channels, data.info.image_size, data.info.image_size)
    draw = torch.randn(shape, generator=random).to(device) if data.sampled else None
    x0 = data.transform(data.read(positions).to(device), draw)
    t = torch.randint(len(schedule), (BATCH_SIZE,), generator=random).to(device)
    noise = torch.randn(shape, generator=random).to(device)
    y = drop_labels(data.labels[positions], model.config.num_classes, model.config.label_dropout, random)
    return schedule.add_noise(x0, noise, t), t, y.to(device)
