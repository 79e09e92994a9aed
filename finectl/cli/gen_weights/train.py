"""`finectl gen-weights train`: its options."""

from __future__ import annotations

from finectl.cli import options as opt
from finectl.cli.command import stage_command
from finectl.cli.gen_weights import options as own


@stage_command("finectl.stages.gen_weights.train")
def train(
    input: opt.Input = None,
    size: own.GeneratorSize = "tiny",
    rule: own.PackingRule = 1,
    block_size: own.BlockSize = 256,
    basis: own.WeightBasis = "pca16",
    prediction: own.WeightPrediction = "v",
    beta_schedule: own.BetaSchedule = "linear",
    loss: own.BlockLoss = "prediction",
    image_weight: own.ImageWeight = 0.0,
    image_concepts: own.ImageConcepts = 2,
    index_embed: own.IndexEmbed = "sin+table",
    pos_embed: own.PosEmbed = "none",
    text_input: own.TextInput = "tokens+pooled",
    linear_rank: own.LinearRank = 64,
    linear_start: own.LinearStart = None,
    t_min: own.FirstTimestep = 400,
    t_max: own.EndTimestep = 1000,
    t_star: own.TStar = None,
    select: own.SelectWeights = "best",
    text_encoder: own.GeneratorText = None,
    steps: own.GeneratorSteps = 1000,
    batch_size: own.GeneratorBatch = 160,
    lr: own.GeneratorLr = 1e-3,
    lr_schedule: opt.LrSchedule = "cosine",
    warmup_steps: own.GeneratorWarmup = 50,
    weight_decay: opt.WeightDecay = 0.01,
    clip_grad: own.GeneratorClip = 1.0,
    ema: own.GeneratorEma = 0.999,
    ema_power: opt.EmaPower = 0.75,
    eval_every: own.GeneratorEval = None,
    seed: opt.Seed = 0,
    save_every: opt.SaveEvery = "1m",
    max_time: opt.MaxTime = None,
) -> None:
    """Train the diffusion model that generates weights from a text, on the weights of many concepts.

    Defaults suit a collection of some tens of concepts on a CPU. The paper's way: --basis none --prediction epsilon
    --linear-rank 0 --text-input tokens --t-min 0 --size paper --lr 1e-5 --batch-size 512.
    """
