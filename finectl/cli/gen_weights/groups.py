"""Options that several steps of `finectl gen-weights` have in common, as signatures."""

from __future__ import annotations

from finectl.cli import options as opt
from finectl.cli.gen_weights import options as own


def gan(
    steps: own.GanSteps = None,
    epochs: own.GanEpochs = None,
    batch_size: own.GanBatch = None,
    lr: own.GanLr = None,
    lr_discriminator: own.GanLrDiscriminator = None,
    l1: own.GanL1 = 100.0,
    gan_from: own.GanFrom = None,
    eval_every: own.GanEvalEvery = None,
    seed: opt.Seed = 0,
) -> None:
    """How a GAN is trained (`finectl.training.gan.settings.GanFields`)."""


def gan_run(save_every: opt.SaveEvery = "1m", max_time: opt.MaxTime = None) -> None:
    """How its training runs."""
