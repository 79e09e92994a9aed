"""`finectl analyse forgetting`: its options."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from finectl.cli import groups
from finectl.cli import options as opt
from finectl.cli.command import Call, run_one, stage_command

if TYPE_CHECKING:
    from finectl.runner import Result


def with_pretrained(call: Call) -> Call:
    """Name the model that INPUT was made from, and the bank that it was tuned with, where the options do not.

    Raises:
        InputError: INPUT is no model, or what it was made from is gone.
    """
    from finectl.artifacts.ancestors import find_ancestor, require_ancestor
    from finectl.artifacts.job import Reads
    from finectl.artifacts.store import Workspace
    from finectl.data.bank import KIND
    from finectl.runner import find_parents

    named, bank = call.config["pretrained"], call.config["bank"]
    if (named is not None and bank is not None) or not call.options.world.leads:
        return call
    also = (Reads("pretrained", ("model",), named=(named,)),) if named is not None else ()
    reads = Reads("model", ("model",), also=also)
    model, *rest = find_parents(Workspace(call.options.workspace), reads, call.inputs, call.console)
    pretrained = rest[0] if rest else require_ancestor(model, "model", "--pretrained")
    if named is None:
        call.console.note(f"no --pretrained given: taking what {model.path} was made from, {pretrained.path}")
    found = {"pretrained": str(pretrained.path)}
    made = find_ancestor(model, KIND) if bank is None else None
    if made is not None and any(parent.digest == pretrained.manifest.digest for parent in made.manifest.parents):
        found["bank"] = str(made.path)
    return replace(call, inputs=(str(model.path),), config={**call.config, **found})


def run(call: Call) -> Result | None:
    """Run the stage on the two models."""
    return run_one(with_pretrained(call))


@stage_command("finectl.stages.forgetting", groups.data, groups.text, run=run)
def forgetting(
    input: opt.Input = None,
    pretrained: opt.ForgettingPretrained = None,
    bank: opt.ForgettingBank = None,
    source_data: opt.SourceData = None,
    only: opt.OnlyForgetting = None,
    weights: opt.Weights = "ema",
    fractions: opt.Fractions = "0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1",
    metric: opt.ChainMetric = None,
    samples: opt.ChainSamples = 250,
    scheduler: opt.Scheduler = "ddim",
    sampling_steps: opt.SamplingSteps = 50,
    guidance: opt.Guidance = 1.0,
    vae: opt.Vae = None,
    reference: opt.Reference = None,
    features: opt.Features = None,
    features_weights: opt.FeaturesWeights = None,
    inception: opt.Inception = None,
    clip: opt.Clip = None,
    dino: opt.Dino = None,
    allow_few: opt.AllowFew = False,
    pictures: opt.ChainPictures = 10,
    fisher_images: opt.FisherImages = 128,
    fisher_draws: opt.FisherDraws = 4,
    images: opt.LossImages = 500,
    draws: opt.Draws = 10,
    ranges: opt.LossRanges = 10,
    batch_size: opt.ComputeBatchSize = 64,
    seed: opt.Seed = 0,
) -> None:
    """Measure what a fine-tuned model forgot of the one that it started from, and at which noise.

    chain: the last x of the reverse steps are handed over to the pre-trained model; a metric of the images against x,
    and the images. ewc: how far the weights moved, each by how much the loss on the source's images needs it. loss: the
    held-out loss of both models on both domains, by timestep. Numbers, tables and a picture of each.
    """
