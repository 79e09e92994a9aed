"""Evenly spaced layers of a dense ancestor, tuned towards its predictions: pruning with distillation.

The strong, simple control. Each update brings the target's prediction nearer to the ancestor's, on the training images
of the target data, which therefore has to be like the ancestor's: same images, same classes. `--tune-steps` counts as
updates of the model, so that it is compared with others at equal totals. Without any, it is the layers as they are.

Another width: of a wider ancestor, channels at a regular distance are selected, whole heads (`width`); what that breaks
is for the updates to mend. A wider target starts at the function of the layers, with channels repeated, and their
columns divided unequally among the copies, so that these do not stay alike.

Reference: Hinton et al., arXiv 1503.02531, for distillation; the choice of layers as in BK-SDM's block pruning (Kim et
al., arXiv 2305.15798), in its plainest form.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from finectl.diffusion.losses import Denoiser, Noised
from finectl.diffusion.random import generator_for
from finectl.diffusion.schedule import NoiseSchedule
from finectl.errors import InputError
from finectl.initializers.base import Initialized, Request
from finectl.initializers.transfer import Ancestor, assemble
from finectl.initializers.tuning import tune
from finectl.initializers.width import axes, counted_once, same_width, select, spread
from finectl.models.dit import DiT
from finectl.models.learngene import evenly_spaced
from finectl.training.device import resolve_device


class Imitation:
    """Each image's distance from the ancestor's prediction.

    Args:
        teacher: The ancestor, on the device of the training.
    """

    def __init__(self, teacher: DiT) -> None:
        self.teacher = teacher.eval().requires_grad_(False)

    def __call__(self, model: Denoiser, schedule: NoiseSchedule, batch: Noised, *, step: int) -> Tensor:
        """Return (B,), as `finectl.training.run.Loss` says."""
        x_t = batch.at(schedule)
        with torch.no_grad():
            wanted = self.teacher(x_t, batch.t, batch.y).float()  # (B, C or 2C, H, W)
        return (model(x_t, batch.t, batch.y).float() - wanted).square().flatten(1).mean(1)


def initialize(request: Request) -> Initialized:
    """Take evenly spaced layers, at the target's width, and tune them.

    Raises:
        InputError: the ancestor does not take the target's images or classes, or is no Diffusion Transformer.
        ComputationError: the loss is not finite.
        Interrupted: a signal came during the tuning; its state is saved.
    """
    ancestor, steps = Ancestor.of(request), request.job.config.tune_steps
    layers, rest = at_width(request, ancestor)
    start = assemble(request, [layers[i] for i in evenly_spaced(len(layers), request.target.depth)], rest)
    start = counted_once(start, ancestor.config, request.target)
    if not steps:
        return start
    require_same_task(request, ancestor)
    student, cost = tuned(request, ancestor, start)
    return replace(start, state=student, cost=cost)


def at_width(request: Request, ancestor: Ancestor) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Return the ancestor's layers, and its embedders and final layer, at the target's width."""
    layers, rest = [dict(layer) for layer in ancestor.layers], ancestor.rest
    if same_width(ancestor.config, request.target):
        return layers, rest
    taken = axes(ancestor.config, request.target)
    generator = generator_for("init-pruned-kd", request.job.config.seed)
    return [spread(select(layer, taken), taken, generator) for layer in layers], spread(
        select(rest, taken), taken, generator
    )


def require_same_task(request: Request, ancestor: Ancestor) -> None:
    """Check that the ancestor can say anything about the target's data.

    Raises:
        InputError: it was made for other images or classes.
    """
    own, target = ancestor.config, request.target
    wanted = (own.channels, own.image_size, own.num_classes)
    found = (target.channels, target.image_size, target.num_classes)
    if wanted != found or not request.same_labels:
        raise InputError(
            f"--method pruned-kd learns from the ancestor's predictions, and {request.data.name} is not what the "
            "ancestor was trained on",
            expected=f"its own data: {wanted[0]}x{wanted[1]}x{wanted[1]} images of the same {wanted[2]} classes",
            fix="--tune-steps 0 takes the layers without tuning; or leave --data out",
        )


def tuned(request: Request, ancestor: Ancestor, start: Initialized) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the weights after `--tune-steps` updates towards the ancestor's predictions, and what they cost."""
    teacher, model = DiT(ancestor.config), DiT(request.target)
    teacher.load_state_dict(dict(ancestor.state))
    model.load_state_dict(dict(start.state))
    execution, world = request.job.execution, request.job.world
    teacher.to(resolve_device(execution.device, world.local_rank))
    trained = tune(request, model, loss=Imitation(teacher), source=ancestor.config)
    return {name: value.cpu() for name, value in trained.state.items()}, trained.cost
