"""`finectl evaluate`: its options."""

from __future__ import annotations

from finectl.cli import groups
from finectl.cli import options as opt
from finectl.cli.command import stage_command


@stage_command("finectl.stages.evaluate", groups.data)
def evaluate(
    inputs: opt.Inputs = None,
    metrics: opt.Metrics = "loss,frechet,accuracy",
    weights: opt.Weights = "ema",
    draws: opt.Draws = 10,
    samples: opt.Samples = 1000,
    scheduler: opt.Scheduler = "ddim",
    sampling_steps: opt.SamplingSteps = 50,
    guidance: opt.Guidance = 1.0,
    batch_size: opt.ComputeBatchSize = 250,
    fail_if: opt.FailIf = None,
    seed: opt.Seed = 0,
) -> None:
    """Measure models and compare them in one table.

    loss: held-out denoising loss, with the same noise for every model. frechet and accuracy: in the features of the
    bundled digits classifier, on generated images.
    """
