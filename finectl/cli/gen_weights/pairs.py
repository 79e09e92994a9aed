"""`finectl gen-weights pairs`: its options."""

from __future__ import annotations

from finectl.cli import options as opt
from finectl.cli.command import stage_command
from finectl.cli.gen_weights import options as own


@stage_command("finectl.stages.gen_weights.pairs")
def pairs(
    input: opt.Input = None,
    editor: own.Editor = "builtin",
    data: own.SourceData = "photos",
    image_size: own.PairsSize = None,
    images: own.PairsImages = None,
    layout: own.PairLayout = "auto",
    prompt: own.FolderPrompt = None,
    best_of: own.BestOf = 1,
    clip: own.PairsClip = None,
    sampling_steps: own.EditSteps = 50,
    guidance: own.EditGuidance = 7.5,
    image_guidance: own.ImageGuidance = 1.5,
    strength: own.EditStrength = 0.7,
    edit_size: own.EditedSize = None,
    batch_size: own.EditedAtOnce = 4,
    seed: opt.Seed = 0,
) -> None:
    """Make the pairs of images of every concept, or import them; train, val and test by source image.

    What it costs is said first, and by --dry-run. A run that stops goes on with the concepts that are missing.
    folder:PATH holds a folder a concept, by its name; unmatched names, counts and sizes that differ are listed.
    """
