"""The kinds of artifact: a new kind is one line here.

This table is read by help, completions and error messages, so it imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """What an artifact of this kind is, and the command that makes one when it is missing."""

    help: str
    made_by: str


KINDS: dict[str, Kind] = {
    "latents": Kind("images as an autoencoder's latents", "finectl encode --vae PATH"),
    "condensed": Kind("a model pre-trained with factors shared by all its layers", "finectl condense"),
    "learngene": Kind("the size-free factors of a condensed model", "finectl extract"),
    "model": Kind("a dense diffusion model", "finectl init --depth 4"),
    "expert": Kind("a model fine-tuned on one range of timesteps", "finectl finetune-ranges --only 0"),
    "experts": Kind("the experts of all ranges of timesteps", "finectl finetune-ranges"),
    "export": Kind("a model in another tool's layout", "finectl convert --to diffusers"),
    "samples": Kind("generated images", "finectl sample"),
    "statistics": Kind("features of reference images, as evaluate measured them", "finectl evaluate"),
    "analysis": Kind("what fine-tuning did to experts or models", "finectl analyse"),
    "evaluation": Kind("measurements of one or several models", "finectl evaluate"),
}
