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
    "controlnet": Kind("a control on a frozen model of text", "finectl finetune MODEL --control edge"),
    "export": Kind("a model in another tool's layout", "finectl convert --to diffusers"),
    "samples": Kind("generated images", "finectl sample"),
    "bank": Kind("images that a model made, which its fine-tuning goes on seeing", "finectl bank"),
    "statistics": Kind("features of reference images, as evaluate measured them", "finectl evaluate"),
    "analysis": Kind("what fine-tuning did to experts or models", "finectl analyse"),
    "prompts": Kind("concepts with their prompts and roles", "finectl gen-weights prompts"),
    "pairs": Kind("images before and after each concept's edit", "finectl gen-weights pairs"),
    "gan": Kind("a generator of edited images with its discriminator", "finectl gen-weights base"),
    "weight-dataset": Kind("low-rank weights of many concepts", "finectl gen-weights collect"),
    "weight-shard": Kind("low-rank weights of some concepts", "finectl gen-weights collect --shard 1/4"),
    "weight-generator": Kind("a diffusion model of weights", "finectl gen-weights train"),
    "tuned-gan": Kind("a generator of edited images fine-tuned to one concept", "finectl gen-weights tune"),
    "lora": Kind("low-rank weights of one concept", "finectl gen-weights predict PROMPT"),
    "evaluation": Kind("measurements of one or several models", "finectl evaluate"),
}
BECOMES: dict[tuple[str, str], str] = {
    ("condensed", "learngene"): "finectl extract {path}",
    ("learngene", "model"): "finectl init {path} --depth 4",
    ("model", "experts"): "finectl finetune-ranges {path}",
    ("expert", "experts"): "the command that made it, without --only, makes the experts of all ranges",
    ("expert", "model"): "put the experts of all ranges together (finectl finetune-ranges), then finectl merge",
    ("experts", "model"): "finectl merge {path}",
    ("model", "bank"): "finectl bank {path}",
    ("model", "controlnet"): "finectl finetune {path} --control edge",
    ("export", "model"): "finectl convert {path}",
    ("prompts", "pairs"): "finectl gen-weights pairs {path}",
    ("pairs", "gan"): "finectl gen-weights base {path}",
    ("gan", "weight-dataset"): "finectl gen-weights collect {path}",
    ("learngene", "weight-dataset"): "finectl gen-weights collect --target sigma {path}",
    ("weight-shard", "weight-dataset"): "the command that made it, without --shard and --only, puts all together",
}
"""Kind that is there, kind that is wanted -> how the one becomes the other."""


def way_to(wanted: str, kind: str, path: object) -> str:
    """Return how an artifact becomes one of the kind that is wanted, or else the command that makes such a one.

    Args:
        wanted: A kind of `KINDS`.
        kind: That of the artifact.
        path: The artifact.
    """
    return BECOMES.get((kind, wanted), KINDS[wanted].made_by).format(path=path)
