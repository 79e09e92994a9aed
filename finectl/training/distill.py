"""Distillation of a teacher into a condensed model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from finectl.diffusion.losses import Denoiser, Noised, denoising_loss
from finectl.diffusion.random import generator_for
from finectl.diffusion.schedule import NoiseSchedule
from finectl.models.dit import DiT
from finectl.models.learngene import evenly_spaced
from finectl.models.unet import UNet
from finectl.training.distributed import local

WHOLE_SHARE = 0.5
"""Share of the steps that train the model at its full depth."""


class Distillation:
    """The loss of the first `steps` updates: the distance from the teacher's prediction; then the denoising loss.

    Models of other depths are read off a model that was fitted to its teacher layer by layer, evenly spaced. So with
    `depths` half of the steps run a random depth's layers alone, against the prediction of the whole teacher.

    Args:
        teacher: The teacher, on the device of the training.
        student: The model that is trained, itself, not what wraps it.
        steps: Updates that distil.
        seed: Seed of the depths.
        depths: Whether smaller depths are trained, too.
    """

    def __init__(self, teacher: DiT | UNet, student: DiT, steps: int, seed: int, *, depths: bool = True) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        self.student = student
        self.steps = steps
        self.seed = seed
        self.depths = depths

    def __call__(self, model: Denoiser, schedule: NoiseSchedule, batch: Noised, *, step: int) -> Tensor:
        """Return each image's loss, (B,), as `finectl.training.run.Loss` says."""
        if step >= self.steps:
            return denoising_loss(model, schedule, *batch.tensors)
        x_t = batch.at(schedule)
        with torch.no_grad():
            wanted = self.teacher(x_t, batch.t, batch.y).float()  # (B, C or 2C, H, W)
        layers = self.layers(step)
        with self.student.running(layers):
            output = model(x_t, batch.t, batch.y).float()
        loss = (output - wanted).square().flatten(1).mean(1)
        skipped = [block for index, block in enumerate(self.student.blocks) if index not in layers]
        return loss + _nothing(skipped) if skipped else loss

    def layers(self, step: int) -> list[int]:
        """Return the layers that a step runs: all, or those of a random smaller depth."""
        depth = self.student.config.depth
        random = generator_for("distill", self.seed, step)
        if depth == 1 or not self.depths or float(torch.rand((), generator=random)) < WHOLE_SHARE:
            return list(range(depth))
        return evenly_spaced(depth, int(torch.randint(1, depth, (), generator=random)))


def _nothing(modules: list[nn.Module]) -> Tensor:
    """Return 0 as a function of modules: processes that average gradients wait for those of every parameter."""
    parameters = [local(parameter) for module in modules for parameter in module.parameters()]
    return 0.0 * torch.stack([parameter.sum() for parameter in parameters]).sum()
