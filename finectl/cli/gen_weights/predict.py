"""`finectl gen-weights predict`: its options."""

from __future__ import annotations

from finectl.cli import options as opt
from finectl.cli.command import stage_command
from finectl.cli.gen_weights import options as own


@stage_command("finectl.stages.gen_weights.predict")
def predict(
    prompt: own.WantedPrompt,
    input: opt.Input = None,
    weights: opt.Weights = "ema",
    t_star: own.PredictionStep = None,
    steps: own.PredictionSteps = 1,
    draws: own.PredictionDraws = 1,
    batch_size: own.PredictionBatch = 64,
    text_encoder: own.PredictionText = None,
    export: own.ExportLayout = None,
    seed: opt.Seed = 0,
) -> None:
    """Generate the weights for a PROMPT in one denoising step; seconds are printed.

    They are a start for a short fine-tuning, not a finished model.
    """
