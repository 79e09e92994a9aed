"""One step of training, and what it needs: model, data, optimiser, average, schedule and precision.

Reference: Ho et al., arXiv 2006.11239, algorithm 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from finectl.artifacts.job import Job
from finectl.data.dataset import ImageSet, MemoryStore
from finectl.diffusion.losses import Denoiser, Noised, denoising_loss
from finectl.diffusion.random import generator_for
from finectl.diffusion.schedule import NoiseSchedule
from finectl.models.dit import drop_labels
from finectl.training.batches import Batches, Part, Retained
from finectl.training.device import Arithmetic, resolve_device
from finectl.training.distributed import all_sum, join, without_sync, wrap
from finectl.training.memory import checkpoint_activations
from finectl.training.multitask.clusters import of_cluster, require_all_in_each, sums_by_cluster
from finectl.training.multitask.gradients import Gathered
from finectl.training.multitask.tasks import Tasks
from finectl.training.settings import TrainSettings, parse_betas
from finectl.training.step import Ema, clip_gradients, ema_decay, lr_factor, make_optimizer


class Loss(Protocol):
    """What a model is trained with."""

    def __call__(self, model: Denoiser, schedule: NoiseSchedule, batch: Noised, *, step: int) -> Tensor:
        """Return each image's loss, (B,), float32.

        Args:
            model: (x_t, t, y) to the prediction; it may average gradients over processes.
            schedule: The forward process.
            batch: The images, or a part of a batch.
            step: Updates done so far.
        """


class StatefulLoss(ABC):
    """A loss that depends on what training did before; its state is saved and put back with the model's."""

    @abstractmethod
    def begin(self, step: int, ema: Ema) -> None:
        """Take notice of a step before any part of its batch is computed; every process calls it.

        Args:
            step: Updates done so far.
            ema: The moving average after them.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """Return what later steps depend on, by name, whole in every process."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state_dict` returned, bit for bit.

        Raises:
            InputError: it is the state of another loss.
        """


class Timesteps(Protocol):
    """How the timesteps of a batch are drawn."""

    def __call__(self, count: int, schedule: NoiseSchedule, *, step: int, generator: torch.Generator) -> Tensor:
        """Return the timesteps of the whole batch, (count,), int64 in 0..T-1, on the generator's device.

        Args:
            count: Images of the batch, over all processes.
            schedule: The forward process.
            step: Updates done so far.
            generator: The source of all that is random in it, the same in every process.
        """


def uniform_timesteps(count: int, schedule: NoiseSchedule, *, step: int, generator: torch.Generator) -> Tensor:
    """Return timesteps of which each is as likely as any other."""
    return torch.randint(len(schedule), (count,), generator=generator, device=generator.device)


def plain_loss(model: Denoiser, schedule: NoiseSchedule, batch: Noised, *, step: int) -> Tensor:
    """Return the denoising loss, at whatever step."""
    return denoising_loss(model, schedule, *batch.tensors)


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
        timesteps: How the timesteps of a batch are drawn.
        tasks: What the losses of clusters of timesteps count, where they are tasks of their own.
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
    timesteps: Timesteps = uniform_timesteps
    tasks: Tasks | None = None
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
    timesteps: Timesteps = uniform_timesteps,
    tasks: Tasks | None = None,
    retained: Retained | None = None,
) -> Run:
    """Put the model on its device, share it with the other processes, and make all that its steps need.

    Args:
        job: How to run, and with whom.
        model: As in `fit`, and so `data`, `settings`, `groups`, `loss`, `timesteps`, `tasks` and
            `retained`.
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
    sets = [data] if retained is None else [data, retained.images]
    batches = Batches(
        data,
        settings.batch_size,
        settings.seed,
        device,
        world,
        parts=execution.accumulate,
        workers=0 if all(isinstance(images.store, MemoryStore) for images in sets) else execution.workers,
        retained=retained,
    )
    if tasks is not None:
        placed += _prepare_tasks(tasks, batches, settings)
    return Run(
        model=model,
        forward=forward,
        batches=batches,
        settings=settings,
        schedule=NoiseSchedule.of(model.config, device),
        optimizer=make_optimizer(placed, settings.lr, settings.weight_decay, parse_betas(settings.betas)),
        ema=Ema(model.named_parameters(), settings.ema),
        arithmetic=Arithmetic.of(device, execution.dtype),
        loss=loss,
        timesteps=timesteps,
        tasks=tasks,
    )


def _prepare_tasks(tasks: Tasks, batches: Batches, settings: TrainSettings) -> list[dict[str, Any]]:
    """Put tasks on the device, and return the parameter groups of what they learn.

    Raises:
        UsageError: their gradients are to be taken apart, and a part of a batch lacks a cluster.
    """
    if tasks.separated(settings.steps):
        require_all_in_each(batches, tasks.clusters)
    tasks.to(batches.device)
    learned = list(tasks.parameters().values())
    return [{"params": learned, "lr": tasks.lr, "weight_decay": 0.0}] if learned else []


def train_step(run: Run, step: int) -> Tensor:
    """Do one optimiser update and return this process's part of the batch's mean loss, (), on the device.

    Reference: arXiv 2006.11239, Algorithm 1.
    """
    settings, schedule, device = run.settings, run.schedule, run.arithmetic.device
    for group, base in zip(run.optimizer.param_groups, run.base_lrs, strict=True):
        group["lr"] = base * lr_factor(settings, step)
    if isinstance(run.loss, StatefulLoss):
        run.loss.begin(step, run.ema)
    parts = run.batches.get(step)
    random = generator_for("train", settings.seed, 0, step, device=device)
    shape = (settings.batch_size, *parts[0].x0.shape[1:])
    t = run.timesteps(settings.batch_size, schedule, step=step, generator=random)  # (B,)
    noise = torch.randn(shape, generator=random, device=device)
    dropped = drop_labels(torch.zeros_like(t), 1, run.model.config.label_dropout, random).bool()

    def losses_of(part: Part) -> Tensor:
        slots = part.slots
        y = torch.where(dropped[slots], run.model.config.num_classes, part.labels)
        drawn = Noised(part.x0, y, t[slots], noise[slots], slots)
        with run.arithmetic.context():
            return run.loss(run.forward, schedule, drawn, step=step)

    run.optimizer.zero_grad(set_to_none=True)
    if run.tasks is None:
        losses = _backward(run, parts, losses_of)
    elif run.tasks.separates(step):
        losses = _backward_by_cluster(run, run.tasks, parts, losses_of, step)
    else:
        losses = _backward_together(run, run.tasks, parts, losses_of)
    mean = torch.zeros((), dtype=torch.float64, device=device)
    for found in losses:
        mean += found.sum() / settings.batch_size
    if settings.clip_grad:
        clip_gradients(run.model.parameters(), settings.clip_grad)
    run.optimizer.step()
    run.ema.decay = ema_decay(settings, step)
    run.ema.update()
    return mean


def _backward(
    run: Run, parts: Sequence[Part], losses_of: Callable[[Part], Tensor], weights: Tensor | None = None
) -> list[Tensor]:
    """Add the gradient of the batch's mean loss to the parameters', averaged over the processes.

    Args:
        run: What is trained.
        parts: This process's images, or some of them.
        losses_of: Each image's loss, (b,), of a part.
        weights: What each image of the global batch counts, (B,); 1 by default.

    Returns:
        The losses of each part, without their weights.
    """
    found = []
    for index, part in enumerate(parts):
        with without_sync(run.forward, last=index == len(parts) - 1):
            losses = losses_of(part)
            counted = losses if weights is None else losses * weights[part.slots]
            share = counted.sum() / run.settings.batch_size
            # Gradients are averaged over the processes, and the sum is wanted.
            (share * run.batches.world.size).backward()
        found.append(losses.detach())
    return found


def _backward_together(
    run: Run, tasks: Tasks, parts: Sequence[Part], losses_of: Callable[[Part], Tensor]
) -> list[Tensor]:
    """Do what `_backward` does with the present weights of the clusters, and let these learn from the losses."""
    size, device = run.settings.batch_size, run.arithmetic.device
    slots = torch.arange(size, device=device)
    found = _backward(run, parts, losses_of, tasks.weights()[slots % tasks.clusters])
    if tasks.parameters():
        sums = sums_by_cluster(torch.cat(found), torch.cat([slots[part.slots] for part in parts]), tasks.clusters)
        tasks.learn(all_sum(run.batches.world, sums) / size)
    return found


def _backward_by_cluster(
    run: Run, tasks: Tasks, parts: Sequence[Part], losses_of: Callable[[Part], Tensor], step: int
) -> list[Tensor]:
    """Do it for each cluster's images alone, and combine their gradients as these themselves say."""
    gathered = Gathered(run.model.parameters(), copied=run.forward is not run.model)
    found = []
    for cluster in range(tasks.clusters):
        found += _backward(run, [of_cluster(part, cluster, tasks.clusters) for part in parts], losses_of)
        gathered.take()
    gathered.put(tasks.solve(gathered.gram(run.batches.world), step).tolist())
    return found
