"""`finectl gen-weights base`: its options."""

from __future__ import annotations

from finectl.cli import options as opt
from finectl.cli.command import stage_command
from finectl.cli.gen_weights import groups
from finectl.cli.gen_weights import options as own


@stage_command("finectl.stages.gen_weights.base", groups.gan, groups.gan_run)
def base(
    input: opt.Input = None,
    preset: own.GanPreset = "nano",
    norm: own.GanNorm = None,
    concept: own.GanConcept = None,
    text_encoder: own.GanText = None,
    ema: own.GanEma = 0.0,
) -> None:
    """Train the generator of edited images that all low-rank weights belong to (E2GAN), against a PatchGAN."""
