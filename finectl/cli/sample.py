"""`finectl sample`: its options."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finectl.cli import groups
from finectl.cli import options as opt
from finectl.cli.command import Call, run_one, stage_command
from finectl.cli.control import with_controlnet
from finectl.cli.ensemble import with_ensemble

if TYPE_CHECKING:
    from finectl.runner import Result


def run(call: Call) -> Result | None:
    """Sample a model, experts as one model, or a ControlNet on its model."""
    return run_one(with_ensemble(with_controlnet(call)))


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
    handover: opt.Handover = None,
    fraction: opt.Fraction = None,
    domain_guidance: opt.DomainGuidance = None,
    control_image: opt.ControlImage = None,
    from_image: opt.FromImage = None,
    control_scale: opt.ControlScale = 1.0,
    vae: opt.Vae = None,
    batch_size: opt.ComputeBatchSize = 64,
    seed: opt.Seed = 0,
) -> None:
    """Generate images with a model: PNG files and a grid.

    Image k depends on --seed and k alone, whatever the batch size. A model of latents is decoded with the autoencoder
    that encoded its data; --vae says where that is now. A model of text takes --prompt or --prompts, by default the
    held-out captions of its data.

    Two models: with --handover the model that INPUT was fine-tuned from makes the last steps, a --fraction of all; with
    --domain-guidance its unconditional prediction is what --guidance moves away from.

    A ControlNet as INPUT (finectl finetune --control) is sampled on the model that it was trained on, with the controls
    of held-out images, those of --control-image, or those that are measured on --from-image.
    """
