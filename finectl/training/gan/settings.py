"""How a GAN is trained, known before torch is imported."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finectl.errors import UsageError

BETAS = (0.5, 0.999)
L1_WEIGHT = 100.0


@dataclass(frozen=True)
class GanFields:
    """The options of every step that trains a GAN; None is a default that depends on the generator's size."""

    steps: int | None
    epochs: int | None
    batch_size: int | None
    lr: float | None
    lr_discriminator: float | None
    l1: float
    gan_from: float | None
    eval_every: int | None
    seed: int


@dataclass(frozen=True)
class GanSettings:
    """How a GAN is trained.

    Args:
        steps: Updates of the generator.
        batch_size: Pairs an update.
        lr: Learning rate of the generator's Adam.
        lr_discriminator: Likewise of the discriminator.
        l1: Weight of the mean absolute difference; the adversarial term has weight 1.
        gan_from: Share of the updates after which the discriminator takes part, in [0, 1]; with 1 it never does.
        eval_every: Measure held-out pairs every so many updates; 0 never.
        seed: Of the order of the pairs and of the texts.
        ema: Decay of the moving average of the generator's weights; 0 for none.
    """

    steps: int
    batch_size: int
    lr: float
    lr_discriminator: float
    l1: float = L1_WEIGHT
    gan_from: float = 0.0
    eval_every: int = 0
    seed: int = 0
    ema: float = 0.0

    @property
    def first_adversarial(self) -> int:
        """The step, counted from 0, from which on the discriminator takes part."""
        return math.ceil(self.gan_from * self.steps)

    def lr_factor(self, step: int) -> float:
        """Return what learning rates are multiplied by: 1 in the first half of the steps, then linearly down towards 0.

        Reference: pix2pix, arXiv 1611.07004, and its published training.
        """
        half = self.steps / 2
        return min(1.0, (self.steps - step) / half)


def resolve_gan(config: GanFields, pairs: int, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `GanFields` that were left out.

    Args:
        config: The options.
        pairs: Pairs that make an epoch.
        defaults: By name; of `steps` and `epochs` one of them.

    Raises:
        UsageError: `--steps` and `--epochs` are both given.
    """
    names = ("batch_size", "lr", "lr_discriminator", "gan_from")
    chosen = {n: defaults[n] if getattr(config, n) is None else getattr(config, n) for n in names}
    if config.steps is not None and config.epochs is not None:
        raise UsageError(f"--steps {config.steps} and --epochs {config.epochs} are both given", expected="one of them")
    steps, epochs = config.steps, config.epochs
    if steps is None and epochs is None:
        steps, epochs = defaults.get("steps"), defaults.get("epochs")
    if steps is None:
        steps = math.ceil((epochs or 0) * pairs / chosen["batch_size"])
    every = max(1, steps // 10) if config.eval_every is None else config.eval_every
    return {**chosen, "steps": steps, "epochs": None, "eval_every": every}


def gan_settings(config: Any) -> GanSettings:
    """Return how a resolved configuration trains."""
    return GanSettings(
        steps=config.steps,
        batch_size=config.batch_size,
        lr=config.lr,
        lr_discriminator=config.lr_discriminator,
        l1=config.l1,
        gan_from=config.gan_from,
        eval_every=config.eval_every,
        seed=config.seed,
        ema=getattr(config, "ema", 0.0),
    )


def describe_gan(settings: GanSettings) -> str:
    """Return the settings in one line, for a note."""
    first = settings.first_adversarial
    adversarial = "no discriminator" if first >= settings.steps else f"discriminator from step {first + 1}"
    return f"{settings.steps} steps, batch {settings.batch_size}, lr {settings.lr:g}, {adversarial}"


def last_checkpoints(steps: int, count: int, share: float = 0.2) -> tuple[int, ...]:
    """Return the updates after which a run of so many keeps its weights: evenly in the last share, the last one too.

    Raises:
        UsageError: the share has fewer updates than that.
    """
    kept = tuple(steps - round(share * steps * (count - 1 - k) / count) for k in range(count))
    if len(set(kept)) < count or kept[0] < 1:
        raise UsageError(
            f"{count} checkpoints in the last {share:.0%} of {steps} updates",
            expected=f"at most {max(1, int(share * steps))}",
            fix="fewer --checkpoints, or more --steps",
        )
    return kept
