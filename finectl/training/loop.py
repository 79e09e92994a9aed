"""The only training loop: `condense`, `init` and `train` all call it.

Every random number of a step is a function of (seed, step), and the data order one of (seed, epoch), so a run that was
killed and resumed equals an unbroken one, bit for bit on a CPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finectl.artifacts.job import Job
from finectl.console import Progress
from finectl.data.dataset import ImageSet
from finectl.data.order import batch_indices
from finectl.diffusion.losses import Denoiser, denoising_loss
from finectl.diffusion.random import generator_for
from finectl.diffusion.schedule import NoiseSchedule
from finectl.errors import ComputationError
from finectl.models.dit import DiT, drop_labels
from finectl.training.device import arithmetic, resolve_device
from finectl.training.log import Log
from finectl.training.memory import tune_allocator
from finectl.training.settings import TrainSettings
from finectl.training.state import Position, load_state, save_state
from finectl.training.step import Ema, make_optimizer

SAVE_INTERVAL_S = 60.0
LOG_ENTRIES = 200


@dataclass
class Trained:
    """A trained model.

    Args:
        model: With its raw weights, on the device it was trained on.
        ema: Its moving average.
        cost: Optimiser updates, samples seen and wall seconds, over all runs.
    """

    model: DiT
    ema: Ema
    cost: dict[str, Any]


def fit(
    job: Job[Any],
    model: DiT,
    data: ImageSet,
    settings: TrainSettings,
    *,
    groups: list[dict[str, Any]] | None = None,
    heldout: Callable[[Denoiser], float] | None = None,
) -> Trained:
    """Train a model on images and labels with the denoising loss.

    Args:
        job: Where state and log go, how to run, and whether a signal asks to stop.
        model: On any device; parameters that need no gradient stay as they are.
        data: Images (N, C, H, W) in [-1, 1] and labels (N,).
        settings: Steps, batch size, optimiser, EMA and seed.
        groups: Parameter groups with learning rates of their own; all trainable parameters by default.
        heldout: The held-out loss of a model, logged every `eval_every` updates and at both ends.

    Returns:
        The model after the last update.

    Raises:
        ComputationError: the loss is not finite.
        Interrupted: a signal came; the state is saved.
    """
    device = resolve_device(job.execution.device)
    if device.type == "cpu":
        tune_allocator()
    model.to(device).train()
    optimizer = make_optimizer(groups or [{"params": list(model.parameters())}], settings.lr, settings.weight_decay)
    base_lrs = [group["lr"] for group in optimizer.param_groups]
    ema = Ema(model.named_parameters(), settings.ema)
    schedule = NoiseSchedule.linear(device)
    position = load_state(job.state, model, ema, optimizer)
    clock = _Clock(position.wall_s)
    log_every = max(1, settings.steps // LOG_ENTRIES)

    progress = job.console.progress("training", settings.steps, done=position.step)
    with Log(job.directory, position.step) as log, progress:

        def save() -> None:
            _require_finite(position)
            position.wall_s = clock.seconds()
            log.sync()
            save_state(job.state, position, model, ema, optimizer)
            clock.saved()

        if position.step == 0:
            _log_heldout(log, 0, ema, model, heldout, settings)
        while position.step < settings.steps:
            for group, base in zip(optimizer.param_groups, base_lrs, strict=True):
                group["lr"] = base * lr_factor(settings, position.step)
            loss = train_step(job, model, data, settings, schedule, optimizer, ema, position.step)
            position.step += 1
            position.loss_sum += loss
            position.loss_count += 1
            if position.step % log_every == 0 or position.step == settings.steps:
                _log_loss(log, progress, position, clock, settings)
            progress.advance(samples=settings.batch_size)
            if settings.eval_every and (position.step % settings.eval_every == 0 or position.step == settings.steps):
                _log_heldout(log, position.step, ema, model, heldout, settings)
            if clock.is_time_to_save(job.execution.save_every, position.step):
                save()
            job.stop_if_requested(save)
        _require_finite(position)
    _require_finite_weights(model, position.step)
    cost = {"steps": position.step, "samples": position.step * settings.batch_size, "wall_s": round(clock.seconds(), 3)}
    return Trained(model, ema, cost)


def train_step(
    job: Job[Any],
    model: DiT,
    data: ImageSet,
    settings: TrainSettings,
    schedule: NoiseSchedule,
    optimizer: torch.optim.Optimizer,
    ema: Ema,
    step: int,
) -> float:
    """Do one optimiser update and return the batch's mean loss.

    Reference: arXiv 2006.11239, Algorithm 1.
    """
    device = schedule.betas.device
    indices = batch_indices(len(data), settings.batch_size, step, settings.seed)
    x0 = data.images[indices].to(device, non_blocking=True)  # (B, C, H, W)
    random = generator_for("train", settings.seed, 0, step, device=device)
    t = torch.randint(len(schedule), (settings.batch_size,), generator=random, device=device)
    noise = torch.randn(x0.shape, generator=random, device=device)
    null, dropout = model.config.num_classes, model.config.label_dropout
    y = drop_labels(data.labels[indices].to(device), null, dropout, random)
    with arithmetic(device, job.execution.dtype):
        loss = denoising_loss(model, schedule, x0, y, t, noise).mean()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    ema.update()
    return float(loss.detach())


def lr_factor(settings: TrainSettings, step: int) -> float:
    """Return what the learning rate is multiplied by at a step: a linear rise to 1, then 1 or a half cosine to 0."""
    warmup = min(1.0, (step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
    if settings.lr_schedule == "constant":
        return warmup
    return warmup * 0.5 * (1 + math.cos(math.pi * step / settings.steps))


class _Clock:
    """Wall seconds of a run over all its resumptions, and of the time since the last save."""

    def __init__(self, before_s: float) -> None:
        self._before_s = before_s
        self._start_s = self._saved_s = time.monotonic()

    def seconds(self) -> float:
        return self._before_s + time.monotonic() - self._start_s

    def saved(self) -> None:
        self._saved_s = time.monotonic()

    def is_time_to_save(self, every: int, step: int) -> bool:
        return step % every == 0 if every else time.monotonic() - self._saved_s >= SAVE_INTERVAL_S


def _require_finite(position: Position) -> None:
    if not math.isfinite(position.loss_sum):
        raise ComputationError(
            f"the loss is not finite at step {position.step}",
            expected="a finite loss",
            fix="run again with a smaller --lr, or with --dtype float32",
        )


def _require_finite_weights(model: nn.Module, step: int) -> None:
    """Look at the weights too: the last loss is that of the weights before the last update."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ComputationError(
                f"{name} is not finite after step {step}",
                expected="finite weights",
                fix="run again with a smaller --lr, or with --dtype float32",
            )


def _log_loss(log: Log, progress: Progress, position: Position, clock: _Clock, settings: TrainSettings) -> None:
    """Log the mean loss since the last entry."""
    _require_finite(position)
    mean = position.loss_sum / position.loss_count
    position.loss_sum, position.loss_count = 0.0, 0
    log.write(position.step, loss=mean, seconds=round(clock.seconds(), 3))
    progress.advance(0, loss=mean)


def _log_heldout(
    log: Log,
    step: int,
    ema: Ema,
    model: nn.Module,
    heldout: Callable[[Denoiser], float] | None,
    settings: TrainSettings,
) -> None:
    """Log the held-out loss of the averaged weights."""
    if heldout is None or not settings.eval_every:
        return
    weights = ema.state_dict()

    def averaged(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(model, weights, (x, t, y))
        return output

    log.write(step, heldout_loss=heldout(averaged))
