"""`finectl train`: its options."""

from __future__ import annotations

from finectl.cli import groups
from finectl.cli import options as opt
from finectl.cli.command import stage_command


@stage_command(
    "finectl.stages.train", groups.data, groups.training, groups.optimiser, groups.captions, groups.training_run
)
def train(
    input: opt.Input = None,
    weights: opt.Weights = "ema",
    weighting: opt.Weighting = "uniform",
    normalise_weights: opt.NormaliseWeights = False,
    mtl: opt.Mtl = "none",
    clusters: opt.Clusters = None,
) -> None:
    """Train a model: noise prediction with AdamW, EMA and label dropout."""
