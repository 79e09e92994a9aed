"""`finectl evaluate`: its options."""

from __future__ import annotations

from finectl.cli import groups
from finectl.cli import options as opt
from finectl.cli.command import stage_command
from finectl.cli.ensemble import run


@stage_command("finectl.stages.evaluate", groups.data, groups.text, run=run)
def evaluate(
    inputs: opt.Inputs = None,
    ensemble: opt.EnsembleOf = None,
    metrics: opt.Metrics = None,
    labels: opt.Labels = None,
    reference: opt.Reference = None,
    images: opt.Images = None,
    weights: opt.Weights = "ema",
    draws: opt.Draws = 10,
    ranges: opt.Ranges = 4,
    samples: opt.Samples = 1000,
    scheduler: opt.Scheduler = "ddim",
    sampling_steps: opt.SamplingSteps = 50,
    guidance: opt.Guidance = 1.0,
    handover: opt.Handover = None,
    fraction: opt.Fraction = None,
    domain_guidance: opt.DomainGuidance = None,
    vae: opt.Vae = None,
    features: opt.Features = None,
    features_weights: opt.FeaturesWeights = None,
    inception: opt.Inception = None,
    clip: opt.Clip = None,
    dino: opt.Dino = None,
    lpips: opt.LpipsWeights = None,
    fid_mode: opt.FidMode = "clean",
    features_dtype: opt.FeaturesDtype = "float32",
    allow_few: opt.AllowFew = False,
    steps_every: opt.StepsEvery = 0,
    reach: opt.Reach = None,
    batch_size: opt.ComputeBatchSize = 250,
    workers: opt.Workers = 2,
    format: opt.TableFormat = None,
    fail_if: opt.FailIf = None,
    seed: opt.Seed = 0,
) -> None:
    """Measure models, generated images or image files, and compare them in one table.

    Needs no file of weights: loss, the held-out denoising loss with the same noise for every model; frechet and
    accuracy, in the features of the bundled digits classifier or of --features. In Inception's features: fid,
    fid-infinity, sfid, is, kid, precision, recall, density, coverage. In others: fdd (DINOv2), fd-clip, clip-score. Of
    pairs of images: l1, psnr, ssim, lpips.

    A value always comes with its interval and its n; values that were not measured in the same way get columns of their
    own. Nothing is downloaded without --download.
    """
