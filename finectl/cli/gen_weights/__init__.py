"""`finectl gen-weights`: the table of its steps, without importing any of them."""

from __future__ import annotations

from finectl.cli.commands import CommandGroup
from finectl.registry import Entry, Registry

STEPS = Registry(
    "gen-weights step",
    {
        "prompts": Entry(
            "finectl.cli.gen_weights.prompts:prompts", "List the concepts, their prompts and their roles."
        ),
        "pairs": Entry(
            "finectl.cli.gen_weights.pairs:pairs", "Make or import pairs of images before and after an edit."
        ),
        "base": Entry("finectl.cli.gen_weights.base:base", "Train the GAN that all weights belong to."),
        "collect": Entry("finectl.cli.gen_weights.collect:collect", "Train low-rank weights of every concept."),
        "train": Entry(
            "finectl.cli.gen_weights.train:train", "Train the diffusion model that generates weights from a text."
        ),
        "predict": Entry(
            "finectl.cli.gen_weights.predict:predict", "Generate the weights for a text, in one denoising step."
        ),
        "tune": Entry("finectl.cli.gen_weights.tune:tune", "Fine-tune the base to one concept, from a prediction."),
        "report": Entry("finectl.cli.gen_weights.report:report", "Compare the prediction with every other start."),
    },
)
GROUP = CommandGroup(
    STEPS,
    "Generate the initial weights of a task's model from its text (Denoised Neural Weights).\n\n"
    "Each step reads the artifact of the one before it and prints the path of its own:\n\n"
    "finectl gen-weights prompts | finectl gen-weights pairs -",
)
