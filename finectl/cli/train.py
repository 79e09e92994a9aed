"""`finectl train`: its options."""

from __future__ import annotations

from finectl.cli import options as opt
from finectl.cli.command import stage_command


@stage_command("finectl.stages.train")
def train(
    input: opt.Input = None,
    weights: opt.Weights = "ema",
    data: opt.Data = None,
    image_size: opt.ImageSize = None,
    steps: opt.Steps = None,
    batch_size: opt.BatchSize = None,
    lr: opt.Lr = None,
    lr_schedule: opt.LrSchedule = "constant",
    warmup_steps: opt.WarmupSteps = None,
    weight_decay: opt.WeightDecay = 0.0,
    ema: opt.Ema = None,
    eval_every: opt.EvalEvery = None,
    seed: opt.Seed = 0,
) -> None:
    """Train a model: noise prediction with AdamW, EMA and label dropout."""
