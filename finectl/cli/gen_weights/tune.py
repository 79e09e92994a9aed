"""`finectl gen-weights tune`: its options."""

from __future__ import annotations

from finectl.cli import options as opt
from finectl.cli.command import stage_command
from finectl.cli.gen_weights import groups
from finectl.cli.gen_weights import options as own


@stage_command("finectl.stages.gen_weights.tune", groups.gan, groups.gan_run)
def tune(
    input: opt.Input = None,
    base: own.BaseInput = None,
    pairs: own.PairsInput = None,
    concept: own.TunedConcept = None,
    start: own.TuneStart = "prediction",
    weights: opt.Weights = "ema",
    subset: own.Subset = 400,
    subset_clip: own.SubsetClip = None,
    eval_every: own.AdaptEvalEvery = None,
) -> None:
    """Fine-tune the base to one concept, from predicted weights (INPUT) or from another start."""
