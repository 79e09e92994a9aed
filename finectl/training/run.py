"""One step of training, and what it needs: model, data, optimiser, average, schedule and precision.

Reference: Ho et al., arXiv 2006.11239, algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from finectl.artifacts.job import Job
from finectl.data.dataset import ImageSet, MemoryStore
from finectl.diffusion.losses import Denoiser, denoising_loss
from finectl.diffusion.random import generator_for
from finectl.diffusion.schedule import NoiseSchedule
from finectl.models.dit import drop_labels
from finectl.training.batches import Batches
from finectl.training.device import Arithmetic, resolve_device
from finectl.training.distributed import join, without_sync, wrap
from finectl.training.memory import checkpoint_activations
from finectl.training.settings import TrainSettings
from finectl.training.step import Ema, clip_gradients, lr_factor, make_optimizer


class Loss(Protocol):
    """What a model is trained with."""

    def __call__(
        self, model: Denoiser, schedule: NoiseSchedule, x0: Tensor, y: Tensor, t: Tensor, noise: Tensor, *, step: int
    ) -> Tensor:
        """Return each image's loss, (B,), float32.

        Args:
            model: (x_t, t, y) to the prediction; it may average gradients over processes.
            schedule: The forward process.
            x0: (B, C, H, W).
            y: (B,), int64 labels.
            t: (B,), int64 timesteps.
            noise: (B, C, H, W), standard normal.
            step: Updates done so far.
        """


def plain_loss(
    model: Denoiser, schedule: NoiseSchedule, x0: Tensor, y: Tensor, t: Tensor, noise: Tensor, *, step: int
) -> Tensor:
    """Return the denoising loss, at whatever step."""
    return denoising_loss(model, schedule, x0, y, t, noise)


@dataclass
class Run:
    """What a step needs beside its number.

    Args:
        model: The model itself, for names and weights.
        forward: What is called: the model, or what averages its gradients over the processes.
        batches: The data.
        settings: Steps, batch size, optimiser, EMA and seed.
        schedule: The forward process.
        optimizer: Over the trainable parameters.
        ema: The moving average.
        arithmetic: Device and precision.
        loss: Each image's loss, (b,).
        base_lrs: Learning rates of the optimiser's groups, before the course over the steps.
    """

    model: Any
    forward: nn.Module
    batches: Batches
    settings: TrainSettings
    schedule: NoiseSchedule
    optimizer: torch.optim.Optimizer
    ema: Ema
    arithmetic: Arithmetic
    loss: Loss = plain_loss
    base_lrs: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.base_lrs = [group["lr"] for group in self.optimizer.param_groups]


def prepare(
    job: Job[Any],
    model: Any,
    data: ImageSet,
    settings: TrainSettings,
    *,
    groups: list[dict[str, Any]] | None,
    loss: Loss,
    sharded: bool,
) -> Run:
    """Put the model on its device, share it with the other processes, and make all that its steps need.

    Args:
        job: How to run, and with whom.
        model: As in `fit`, and so `data`, `settings`, `groups` and `loss`.
        sharded: Whether its weights are spread over the processes.
    """
    execution, world = job.execution, job.world
    device = resolve_device(execution.device, world.local_rank)
    join(world, device)
    # A model that no device can hold is sharded from the CPU, block by block.
    model.train() if sharded else model.to(device).train()
    if getattr(model, "is_convolutional", False):
        model.to(memory_format=torch.channels_last)
    if execution.grad_checkpointing:
        checkpoint_activations(model)
    if execution.compile:
        model.compile()
    names = {parameter: name for name, parameter in model.named_parameters()}
    forward = wrap(model, world, device, fsdp=sharded)
    found = dict(model.named_parameters())  # sharding puts others in the places of those that the groups hold
    chosen = groups or [{"params": list(names)}]
    placed = [{**group, "params": [found[names[parameter]] for parameter in group["params"]]} for group in chosen]
    return Run(
        model=model,
        forward=forward,
        batches=Batches(
            data,
            settings.batch_size,
            settings.seed,
            device,
            world,
            parts=execution.accumulate,
            workers=0 if isinstance(data.store, MemoryStore) else execution.workers,
        ),
        settings=settings,
        schedule=NoiseSchedule.of(model.config, device),
        optimizer=make_optimizer(placed, settings.lr, settings.weight_decay),
        ema=Ema(model.named_parameters(), settings.ema),
        arithmetic=Arithmetic.of(device, execution.dtype),
        loss=loss,
    )


def train_step(run: Run, step: int) -> Tensor:
    """Do one optimiser update and return this process's part of the batch's mean loss, (), on the device.

    Reference: arXiv 2006.11239, Algorithm 1.
    """
    settings, schedule, device = run.settings, run.schedule, run.arithmetic.device
    world_size = run.batches.world.size
    for group, base in zip(run.optimizer.param_groups, run.base_lrs, strict=True):
        group["lr"] = base * lr_factor(settings, step)
    parts = run.batches.get(step)
    random = generator_for("train", settings.seed, 0, step, device=device)
    shape = (settings.batch_size, *parts[0].x0.shape[1:])
    t = torch.randint(len(schedule), shape[:1], generator=random, device=device)
    noise = torch.randn(shape, generator=random, device=device)
    dropped = drop_labels(torch.zeros_like(t), 1, run.model.config.label_dropout, random).bool()
    run.optimizer.zero_grad(set_to_none=True)
    mean = torch.zeros((), dtype=torch.float64, device=device)
    for index, part in enumerate(parts):
        slots = part.slots
        y = torch.where(dropped[slots], run.model.config.num_classes, part.labels)
        with without_sync(run.forward, last=index == len(parts) - 1):
            with run.arithmetic.context():
                losses = run.loss(run.forward, schedule, part.x0, y, t[slots], noise[slots], step=step)
            share = losses.sum() / settings.batch_size
            (share * world_size).backward()  # gradients are averaged over the processes, and the sum is wanted
        mean += share.detach()
    if settings.clip_grad:
        clip_gradients(run.model.parameters(), settings.clip_grad)
    run.optimizer.step()
    run.ema.update()
    return mean
