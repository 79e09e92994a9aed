"""`finectl analyse`: its options."""

from __future__ import annotations

from finectl.cli import groups
from finectl.cli import options as opt
from finectl.cli.command import stage_command


@stage_command("finectl.stages.analyse", groups.data, groups.text)
def analyse(
    inputs: opt.MergeInputs = None,
    base: opt.Base = None,
    only: opt.OnlyAnalyses = None,
    timesteps: opt.GradientTimesteps = 20,
    images: opt.AnalysedImages = 128,
    draws: opt.Draws = 4,
    plane: opt.Plane = "0,1",
    grid: opt.LandscapeGrid = 9,
    merged: opt.MergedModel = None,
    batch_size: opt.ComputeBatchSize = 64,
    seed: opt.Seed = 0,
) -> None:
    """Analyse what fine-tuning did to experts of timestep ranges, or to models around their base.

    norms and cosines of task vectors, by block; gradients: cosines of the loss's gradients between timesteps;
    landscape: the held-out loss in the plane of two task vectors; activations: how blocks' outputs changed, by channel
    and by position. Numbers, tables and a picture of each.
    """
