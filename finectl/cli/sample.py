"""`finectl sample`: its options."""

from __future__ import annotations

from finectl.cli import groups
from finectl.cli import options as opt
from finectl.cli.command import stage_command
from finectl.cli.ensemble import run


@stage_command("finectl.stages.sample", groups.text, run=run)
def sample(
    input: opt.Input = None,
    ensemble: opt.EnsembleOf = None,
    weights: opt.Weights = "ema",
    samples: opt.Samples = 64,
    labels: opt.Labels = None,
    prompts: opt.PromptsFile = None,
    prompt: opt.Prompt = None,
    scheduler: opt.Scheduler = "ddim",
    sampling_steps: opt.SamplingSteps = 50,
    guidance: opt.Guidance = 1.0,
    vae: opt.Vae = None,
    batch_size: opt.ComputeBatchSize = 64,
    seed: opt.Seed = 0,
) -> None:
    """Generate images with a model: PNG files and a grid.

    Image k depends on --seed and k alone, whatever the batch size. A model of latents is decoded with the autoencoder
    that encoded its data; --vae says where that is now. A model of text takes --prompt or --prompts, by default the
    held-out captions of its data.
    """
