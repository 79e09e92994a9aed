"""`finectl merge`: its options."""

from __future__ import annotations

from finectl.cli import groups
from finectl.cli import options as opt
from finectl.cli.command import stage_command


@stage_command("finectl.stages.merge", groups.data, groups.text)
def merge(
    inputs: opt.MergeInputs = None,
    base: opt.Base = None,
    method: opt.MergeMethod = "task-arithmetic",
    weights: opt.MergeWeights = None,
    block_weights: opt.BlockWeights = None,
    density: opt.Density = 0.5,
    output_dtype: opt.OutputDtype = "same",
    fold: opt.Fold = False,
    ranges: opt.MergeRanges = None,
    grid_step: opt.GridStep = 0.1,
    grid_min: opt.GridMin = 0.0,
    grid_max: opt.GridMax = 1.0,
    max_candidates: opt.MaxCandidates = 500,
    search: opt.SearchStrategy = None,
    objective: opt.ObjectiveName = None,
    search_samples: opt.SearchSamples = 5000,
    rescored: opt.Rescored = 5,
    journal: opt.JournalFile = None,
    scheduler: opt.Scheduler = "ddim",
    sampling_steps: opt.SamplingSteps = 50,
    guidance: opt.Guidance = 1.0,
    vae: opt.Vae = None,
    reference: opt.Reference = None,
    features: opt.Features = None,
    features_weights: opt.FeaturesWeights = None,
    inception: opt.Inception = None,
    dino: opt.Dino = None,
    seed: opt.Seed = 0,
) -> None:
    """Merge experts of timestep ranges, or fine-tuned models, into one model.

    theta_0 + sum_i w_i (theta_i - theta_0), over averaged weights. --weights gives w; without it the weights are
    searched for on a grid, by --objective on generated images, and measured beside the model that the experts started
    from, their mean, their sum, each of them alone, and their ensemble.

    finectl merge A B C --base BASE --weights 0.3,0.3,0.4 merges any models that were fine-tuned from one.
    """
