"""The only training loop: `condense`, `init` and `train` all call it.

Every random number of a step is a function of (seed, step) and drawn for the whole batch, and the data order is one of
(seed, epoch); each of several processes takes its slice. So a run that was killed and resumed equals an unbroken one,
bit for bit on a CPU, and a run on another number of processes differs by rounding only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from finectl.artifacts.files import sync
from finectl.artifacts.job import Job
from finectl.artifacts.tensors import save_tensors
from finectl.data.dataset import ImageSet
from finectl.diffusion.losses import Denoiser
from finectl.errors import ComputationError
from finectl.models.io import checkpoint_file
from finectl.training.batches import Retained
from finectl.training.clock import Clock
from finectl.training.distributed import (
    agree,
    local,
    lost_peers_as_errors,
    total,
    whole,
)
from finectl.training.flops import training_flops, update_operations
from finectl.training.log import NAME as LOG_NAME
from finectl.training.log import Log
from finectl.training.multitask.tasks import Tasks
from finectl.training.previews import draw_previews, require_previews
from finectl.training.run import Loss, Run, Timesteps, plain_loss, prepare, train_step, uniform_timesteps
from finectl.training.settings import TrainSettings
from finectl.training.state import Position, load_state, save_state
from finectl.world import World

LOG_ENTRIES = 200


@dataclass
class Trained:
    """A trained model.

    Args:
        model: The module that was given, with its raw weights, on the device it was trained on.
        state: Its raw weights, whole also where they were sharded.
        ema: Their moving average, likewise.
        cost: Over all runs: optimiser updates, samples seen, floating-point operations (`training_flops`) and wall
            seconds.
    """

    model: nn.Module
    state: dict[str, Tensor]
    ema: dict[str, Tensor]
    cost: dict[str, Any]


@dataclass(frozen=True)
class Watch:
    """What a stage measures of the averaged weights now and then.

    Args:
        every: Updates between one time and the next; it is done before the first and after the last one, too.
        look: Called with the averaged model and the updates done so far, in every process; what it returns is logged.
    """

    every: int
    look: Callable[[Denoiser, int], Mapping[str, Any]]


class NotFinite(Exception):
    """A loss or a weight is not finite.

    Args:
        what: The fault.
        step: The step whose batch gave it, counted from 0.
    """

    def __init__(self, what: str, step: int) -> None:
        super().__init__(what)
        self.step = step


def fit(
    job: Job[Any],
    model: Any,
    data: ImageSet,
    settings: TrainSettings,
    *,
    groups: list[dict[str, Any]] | None = None,
    heldout: Callable[[Denoiser], float] | None = None,
    loss: Loss = plain_loss,
    timesteps: Timesteps = uniform_timesteps,
    tasks: Tasks | None = None,
    retained: Retained | None = None,
    watch: Watch | None = None,
    shardable: bool = True,
) -> Trained:
    """Train a model on images and labels.

    Args:
        job: Where state and log go, how to run, the processes that share the work, and whether a signal asks to stop.
        model: A denoiser (x_t, t, y) with a `config`, on any device; parameters that need no gradient stay as they are.
        data: The training images.
        settings: Steps, batch size, optimiser, EMA and seed.
        groups: Parameter groups with learning rates of their own; all trainable parameters by default.
        heldout: The held-out loss of a model, logged every `eval_every` updates and at both ends.
        loss: Each image's loss; the denoising loss by default.
        timesteps: How the timesteps of a batch are drawn; uniformly by default.
        tasks: Clusters of timesteps whose losses are tasks, saved with the state; `timesteps` serves all in a batch.
        retained: Images of a second set that take the first places of every batch.
        watch: What is measured of the averaged weights beside the held-out loss.
        shardable: Whether `--fsdp` may shard the model; otherwise it is trained whole in every process.

    Returns:
        The model after the last update.

    Raises:
        InputError: samples are to be drawn of latents whose autoencoder is gone.
        ComputationError: the loss is not finite, also after one return to the last state, or another process is gone.
        Interrupted: a signal came, or `--max-time` is over; the state is saved.
    """
    if job.execution.sample_every:
        require_previews(data.info)
    with lost_peers_as_errors(job.world):
        one = update_operations(model) if job.world.leads else None
        run = prepare(
            job,
            model,
            data,
            settings,
            groups=groups,
            loss=loss,
            sharded=job.execution.fsdp and shardable,
            timesteps=timesteps,
            tasks=tasks,
            retained=retained,
        )
        # Counted first: what goes wrong here must not cost a finished run.
        flops = training_flops(model, run.loss, run.batches, settings.steps, tasks, one) if job.world.leads else None
        with run.batches:
            position = _train(job, run, heldout, watch)
        seen = position.step * settings.batch_size
        cost = {"steps": position.step, "samples": seen, "flops": flops, "wall_s": round(position.wall_s, 3)}
        return Trained(model, whole(model.state_dict()), whole(run.ema.state_dict()), cost)


def _train(
    job: Job[Any], run: Run, heldout: Callable[[Denoiser], float] | None, watch: Watch | None = None
) -> Position:
    """Go from the saved state to the last step, with one return to it when a loss is not finite."""
    failure: NotFinite | None = None
    while True:
        position = load_state(job.state, run.model, run.ema, run.optimizer, run.tasks, run.loss)
        try:
            _steps(job, run, position, heldout, failure, watch)
            return position
        except NotFinite as error:
            if failure is not None:
                raise ComputationError(
                    f"{error} (again: going back to the last saved state did not help)",
                    expected="a finite loss and finite weights",
                    fix="run again with --no-resume and a smaller --lr, or with --dtype float32; "
                    f"the images of that batch are in {job.directory / LOG_NAME}",
                ) from error
            failure = error
            job.console.note(f"{error}: going back to the last saved state, once")


def _steps(
    job: Job[Any],
    run: Run,
    position: Position,
    heldout: Callable[[Denoiser], float] | None,
    failure: NotFinite | None,
    watch: Watch | None = None,
) -> None:
    """Do the steps that are left, with log, held-out loss, samples and saved states between them."""
    settings, execution, world = run.settings, job.execution, job.world
    log_every = max(1, settings.steps // LOG_ENTRIES)
    progress = job.console.progress("training", settings.steps, done=position.step)
    with Log(job.directory if world.leads else None, position.step, tensorboard=execution.tensorboard) as log, progress:
        course = Course(job, run, position, log, Clock(position.wall_s, execution))
        if failure is not None:
            batch = run.batches.indices(max(failure.step, 0)).tolist()
            again = run.batches.retained_indices(max(failure.step, 0)).tolist()
            others = {"retained_of_that_step": again} if again else {}
            log.write(position.step, not_finite_at_step=failure.step + 1, images_of_that_step=batch, **others)
        if position.step == 0:
            course.save()
            _log_heldout(log, 0, run, heldout)
            _log_watched(log, 0, run, watch)
        while position.step < settings.steps:
            course.count(train_step(run, position.step))
            done = position.step == settings.steps
            if position.step % log_every == 0 or done:
                progress.advance(0, loss=course.log_loss())
            progress.advance(samples=settings.batch_size)
            if settings.keeps(position.step):
                course.keep()  # before the state is saved: a resumed run does not come here again
            if settings.eval_every and (position.step % settings.eval_every == 0 or done):
                _log_heldout(log, position.step, run, heldout)
            if watch is not None and (position.step % watch.every == 0 or done):
                _log_watched(log, position.step, run, watch)
            if execution.sample_every and (position.step % execution.sample_every == 0 or done):
                draw_previews(job, run.model, run.ema, run.batches.data.info, position.step)
            save_now, is_over, asked = course.agreed()
            if asked or (is_over and not done):
                job.stop(course.save, "interrupted" if asked else "--max-time is over")
            if save_now:
                course.save()
        _require_finite_weights(world, run.model, position.step)
        position.wall_s = course.clock.seconds()


@dataclass
class Course:
    """Where a run is, between its steps.

    Args:
        job: The run of the stage.
        run: What its steps need.
        position: Updated as steps are counted.
        log: Of the process that leads.
        clock: Seconds of work.
    """

    job: Job[Any]
    run: Run
    position: Position
    log: Log
    clock: Clock
    unread: list[Tensor] = field(default_factory=list)

    def count(self, loss: Tensor) -> None:
        """Count a step; its loss stays on the device, because reading it waits for the step's end."""
        self.unread.append(loss)
        self.position.step += 1
        self.position.loss_count += 1

    def settle(self) -> None:
        """Read the losses of the last steps, summed over the processes.

        Raises:
            NotFinite: one is not finite.
        """
        values = total(self.job.world, torch.stack(self.unread)).tolist() if self.unread else []
        for index, value in enumerate(values):
            if not math.isfinite(value):
                step = self.position.step - len(values) + index
                raise NotFinite(f"the loss is not finite at step {step + 1}", step)
            self.position.loss_sum += value
        self.unread.clear()

    def log_loss(self) -> float:
        """Log the mean loss since the last entry and return it."""
        self.settle()
        position = self.position
        mean = position.loss_sum / position.loss_count
        self.log.write(position.step, loss=mean, seconds=round(self.clock.seconds(), 3))
        position.loss_sum, position.loss_count = 0.0, 0
        return mean

    def agreed(self) -> tuple[bool, ...]:
        """Return whether to save, whether time is over, and whether a signal came, the same in all processes."""
        leads = self.job.world.leads
        is_due, is_over = leads and self.clock.is_time_to_save(self.position.step), leads and self.clock.is_over()
        return agree(self.job.world, is_due, is_over, self.job.interrupt.requested)

    def keep(self) -> None:
        """Write the averaged weights of this update, all of them float32, into the artifact.

        Raises:
            NotFinite: a loss or a weight is not finite.
        """
        self.settle()
        _require_finite_weights(self.job.world, self.run.model, self.position.step)
        averages = whole(self.run.ema.state_dict())  # every process has to, where they are sharded
        if self.job.world.leads:
            path = self.job.directory / checkpoint_file(self.position.step)
            path.parent.mkdir(exist_ok=True)
            sync(self.job.directory)
            save_tensors(path, averages)

    def save(self) -> None:
        """Save the state.

        Raises:
            NotFinite: a loss or a weight is not finite; the state that was saved before stays.
        """
        self.settle()
        _require_finite_weights(self.job.world, self.run.model, self.position.step)
        self.position.wall_s = self.clock.seconds()
        self.log.sync()
        run = self.run
        leads = self.job.world.leads
        save_state(self.job.state, self.position, run.model, run.ema, run.optimizer, run.tasks, run.loss, leads=leads)
        self.clock.saved()


def _require_finite_weights(world: World, model: nn.Module, step: int) -> None:
    """Look at the weights too: the last loss is that of the weights before the last update."""
    bad = [n for n, p in model.named_parameters() if not bool(torch.isfinite(local(p.detach())).all())]
    (anywhere,) = agree(world, bool(bad))
    if anywhere:
        raise NotFinite(f"{bad[0] if bad else 'a weight'} is not finite after step {step}", step - 1)


def _log_heldout(log: Log, step: int, run: Run, heldout: Callable[[Denoiser], float] | None) -> None:
    """Log the held-out loss of the averaged weights."""
    if heldout is None or not run.settings.eval_every:
        return
    with run.ema.denoiser(run.model) as averaged:
        log.write(step, heldout_loss=heldout(averaged))


def _log_watched(log: Log, step: int, run: Run, watch: Watch | None) -> None:
    """Log what a stage measures of the averaged weights."""
    if watch is not None:
        with run.ema.denoiser(run.model) as averaged:
            log.write(step, **watch.look(averaged, step))
