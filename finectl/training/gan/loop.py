"""The only loop that trains GANs: `base`, `collect` and `tune` all call it.

minimise over G   lambda E|y - G(x)| + E softplus(-D(x, G(x)))
minimise over D   (E softplus(-D(x, y)) + E softplus(D(x, G(x)))) / 2

Pairs and texts of a step are functions of (seed, step), so a run that was killed and resumed equals an unbroken one,
bit for bit on a CPU.

Reference: pix2pix, arXiv 1611.07004, equations 1 to 4; non-saturating form: arXiv 1406.2661, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finectl.artifacts.job import Execution, Job
from finectl.console import Console
from finectl.errors import ComputationError, Interrupted
from finectl.training.clock import Clock
from finectl.training.device import Arithmetic
from finectl.training.gan.pairs import Batch
from finectl.training.gan.settings import BETAS, GanSettings
from finectl.training.gan.state import Players, Position
from finectl.training.log import Log
from finectl.training.step import FUSED_DEVICES, Ema

LOG_ENTRIES = 100


@dataclass(frozen=True)
class Place:
    """Where a run works and who may stop it.

    Args:
        directory: Gets log.jsonl.
        state: Gets the resume state.
        console: Where to write for people.
        execution: Device, arithmetic and how often to save.
        interrupted: Tells whether somebody asked to stop.
    """

    directory: Path
    state: Path
    console: Console
    execution: Execution
    interrupted: Callable[[], bool]

    @classmethod
    def of(cls, job: Job[Any]) -> Place:
        """Return the place of a stage's whole run."""
        return cls(job.directory, job.state, job.console, job.execution, lambda: job.interrupt.requested)


@dataclass
class TrainedGan:
    """What came of a run.

    Args:
        generator: The module that was given, after the last update.
        discriminator: Likewise.
        ema: Moving average of the generator's trained parameters; None without one.
        kept: Update -> the generator's trained parameters after it, those of the updates that were to be kept.
        cost: Over all runs: updates, samples and wall seconds.
    """

    generator: nn.Module
    discriminator: nn.Module
    ema: dict[str, Tensor] | None
    kept: dict[int, dict[str, Tensor]]
    cost: dict[str, Any]


def make_adam(model: nn.Module, lr: float) -> torch.optim.Adam:
    """Return Adam for what is trained of a model, with the decays that GANs are trained with."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.Adam(trained, lr=lr, betas=BETAS, fused=trained[0].device.type in FUSED_DEVICES)


def train_step(players: Players, batch: Batch, settings: GanSettings, step: int, arithmetic: Arithmetic) -> Tensor:
    """Do one update of the generator and, once it takes part, one of the discriminator before it.

    Args:
        players: Both networks and their optimisers.
        batch: Pairs.
        settings: How they are trained.
        step: Counted from 0.
        arithmetic: Precision.

    Returns:
        The losses (3,): L1, the generator's adversarial term and the discriminator's loss; the last two are 0 until the
        discriminator takes part.
    """
    factor = settings.lr_factor(step)
    players.generator_optimizer.param_groups[0]["lr"] = settings.lr * factor
    players.discriminator_optimizer.param_groups[0]["lr"] = settings.lr_discriminator * factor
    adversarial = step >= settings.first_adversarial
    with arithmetic.context():
        made = players.generator(batch.x, *batch.text)
    zero = torch.zeros((), device=batch.x.device)
    verdict, doubt = zero, zero
    if adversarial:
        discriminator = players.discriminator.requires_grad_(True)
        with arithmetic.context():
            real = discriminator(torch.cat([batch.x, batch.y], dim=1))
            fake = discriminator(torch.cat([batch.x, made.detach()], dim=1))
        verdict = (F.softplus(-real.float()).mean() + F.softplus(fake.float()).mean()) / 2
        players.discriminator_optimizer.zero_grad(set_to_none=True)
        verdict.backward()
        players.discriminator_optimizer.step()
        discriminator.requires_grad_(False)  # its weights need no gradient of the generator's loss
        with arithmetic.context():
            fake = discriminator(torch.cat([batch.x, made], dim=1))
        doubt = F.softplus(-fake.float()).mean()
    l1 = (made.float() - batch.y).abs().mean()
    players.generator_optimizer.zero_grad(set_to_none=True)
    (settings.l1 * l1 + doubt).backward()
    players.generator_optimizer.step()
    players.discriminator.requires_grad_(True)
    return torch.stack([l1, doubt, verdict]).detach()


def fit_gan(
    place: Place,
    generator: nn.Module,
    discriminator: nn.Module,
    batches: Callable[[int], Batch],
    settings: GanSettings,
    *,
    heldout: Callable[[nn.Module], float] | None = None,
    keep: tuple[int, ...] = (),
) -> TrainedGan:
    """Train a generator on pairs of images against a discriminator.

    Args:
        place: Where state and log go, how to run, and whether somebody asks to stop.
        generator: On the device of the batches; parameters that need no gradient stay as they are.
        discriminator: Likewise; it judges (B, 6, H, W).
        batches: The pairs of a step.
        settings: Steps, rates and weights.
        heldout: What is logged of the generator (its averaged weights, with EMA) as `heldout_l1`.
        keep: Updates after which the generator's trained parameters are kept.

    Raises:
        ComputationError: a loss is not finite.
        Interrupted: somebody asked to stop, or `--max-time` is over; the state is saved.
    """
    generator.train()
    discriminator.train()
    ema = None
    if settings.ema:
        ema = Ema(((n, p) for n, p in generator.named_parameters() if p.requires_grad), settings.ema)
    players = Players(
        generator,
        discriminator,
        make_adam(generator, settings.lr),
        make_adam(discriminator, settings.lr_discriminator),
        ema,
    )
    position = players.load(place.state)
    _steps(place, players, batches, settings, position, heldout, frozenset(keep))
    cost = {"steps": position.step, "samples": position.step * settings.batch_size}
    averaged = None if ema is None else ema.state_dict()
    return TrainedGan(generator, discriminator, averaged, players.kept, {**cost, "wall_s": round(position.wall_s, 3)})


def _steps(
    place: Place,
    players: Players,
    batches: Callable[[int], Batch],
    settings: GanSettings,
    position: Position,
    heldout: Callable[[nn.Module], float] | None,
    keep: frozenset[int],
) -> None:
    """Do the steps that are left, with log, held-out pairs and saved states between them."""
    device = next(players.generator.parameters()).device
    arithmetic = Arithmetic.of(device, place.execution.dtype)
    progress = place.console.progress("training", settings.steps, done=position.step)
    with Log(place.directory, position.step) as log, progress:
        course = Course(place, players, settings, position, log, Clock(position.wall_s, place.execution), heldout)
        if position.step == 0:
            course.evaluate()
        while position.step < settings.steps:
            step = position.step
            course.count(train_step(players, batches(step), settings, step, arithmetic), step)
            if players.ema is not None:
                players.ema.update()
            done = position.step == settings.steps
            if position.step % max(1, settings.steps // LOG_ENTRIES) == 0 or done:
                progress.advance(0, l1=course.log_losses())
            progress.advance(samples=settings.batch_size)
            if position.step in keep:
                course.keep()
            if settings.eval_every and (position.step % settings.eval_every == 0 or done):
                course.evaluate()
            over = course.clock.is_over() and not done
            if place.interrupted() or over:
                course.save()
                raise Interrupted(
                    "--max-time is over; the state is saved" if over else "interrupted; the state is saved",
                    saved=True,
                    fix="run the same command again: it goes on from there",
                )
            if course.clock.is_time_to_save(position.step):
                course.save()
        course.require_finite()
        position.wall_s = course.clock.seconds()


@dataclass
class Course:
    """Where a run is, between its steps."""

    place: Place
    players: Players
    settings: GanSettings
    position: Position
    log: Log
    clock: Clock
    heldout: Callable[[nn.Module], float] | None
    unread: list[Tensor] = field(default_factory=list)
    adversarial: list[bool] = field(default_factory=list)

    def count(self, losses: Tensor, step: int) -> None:
        """Count a step; its losses stay on the device, because reading them waits for the step's end."""
        self.unread.append(losses)
        self.adversarial.append(step >= self.settings.first_adversarial)
        self.position.step += 1

    def settle(self) -> None:
        """Read the losses of the last steps.

        Raises:
            ComputationError: one is not finite.
        """
        values = torch.stack(self.unread).tolist() if self.unread else []
        for index, (l1, doubt, verdict) in enumerate(values):
            if not math.isfinite(l1 + doubt + verdict):
                self._fail(f"the loss is not finite at step {self.position.step - len(values) + index + 1}")
            found: Mapping[str, float] = {"l1": l1}
            if self.adversarial[index]:
                found = {"l1": l1, "generator_loss": doubt, "discriminator_loss": verdict}
            for name, value in found.items():
                self.position.sums[name] = self.position.sums.get(name, 0.0) + value
                self.position.counts[name] = self.position.counts.get(name, 0) + 1
        self.unread.clear()
        self.adversarial.clear()

    def _fail(self, what: str) -> None:
        raise ComputationError(
            what,
            expected="finite losses and weights",
            fix="run again with a smaller --lr, a later --gan-from, or --dtype float32",
        )

    def log_losses(self) -> float:
        """Log the mean losses since the last entry and return the L1 among them."""
        self.settle()
        position = self.position
        means = {name: total / position.counts[name] for name, total in position.sums.items()}
        self.log.write(position.step, **means, seconds=round(self.clock.seconds(), 3))
        position.sums, position.counts = {}, {}
        return means["l1"]

    def evaluate(self) -> None:
        """Log the held-out L1."""
        if self.heldout is None or not self.settings.eval_every:
            return
        ema = self.players.ema
        with nullcontext() if ema is None else ema.applied():
            self.log.write(self.position.step, heldout_l1=self.heldout(self.players.generator))

    def keep(self) -> None:
        """Keep the trained parameters of this update."""
        state = {n: p for n, p in self.players.generator.named_parameters() if p.requires_grad}
        self.players.kept[self.position.step] = {name: value.detach().clone() for name, value in state.items()}

    def require_finite(self) -> None:
        """Look at losses and weights.

        Raises:
            ComputationError: one is not finite.
        """
        self.settle()
        for name, value in self.players.trained().items():
            if not bool(torch.isfinite(value).all()):
                self._fail(f"{name} is not finite after step {self.position.step}")

    def save(self) -> None:
        """Save the state.

        Raises:
            ComputationError: a loss or a weight is not finite; the state that was saved before stays.
        """
        self.require_finite()
        self.position.wall_s = self.clock.seconds()
        self.log.sync()
        self.place.state.mkdir(parents=True, exist_ok=True)
        self.players.save(self.place.state, self.position)
        self.clock.saved()
