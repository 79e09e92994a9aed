"""`finectl condense`: its options."""

from __future__ import annotations

from finectl.cli import options as opt
from finectl.cli.command import stage_command


@stage_command("finectl.stages.condense")
def condense(
    model: opt.Model = "dit-nano",
    depth: opt.Depth = None,
    factorize: opt.Factorize = "qkv,o,in,out,adaln",
    rank: opt.Rank = None,
    overcomplete: opt.Overcomplete = False,
    sigma_sharing: opt.SigmaSharing = 1,
    learn_sigma: opt.LearnSigma = False,
    frequency_divisor: opt.FrequencyDivisor = 128,
    data: opt.Data = None,
    image_size: opt.ImageSize = None,
    steps: opt.Steps = None,
    batch_size: opt.BatchSize = None,
    lr: opt.Lr = None,
    sigma_lr: opt.SigmaLr = None,
    lr_schedule: opt.LrSchedule = "constant",
    warmup_steps: opt.WarmupSteps = None,
    weight_decay: opt.WeightDecay = 0.0,
    ema: opt.Ema = None,
    eval_every: opt.EvalEvery = None,
    seed: opt.Seed = 0,
) -> None:
    """Pre-train a model whose layers share their factors (FINE, phase 1).

    Every matrix of a type is W = U diag(sigma) V^T; U and V are shared by all layers, sigma is the layer's own. Without
    --data it trains on the bundled digits with settings that suit them; with other data, with the paper's.
    """
