"""`finectl gen-weights report`: its options."""

from __future__ import annotations

from finectl.cli import options as opt
from finectl.cli.command import stage_command
from finectl.cli.gen_weights import groups
from finectl.cli.gen_weights import options as own


@stage_command("finectl.stages.gen_weights.report", groups.gan_run)
def report(
    input: opt.Input = None,
    collection: own.Collection = None,
    base: own.ReportBase = None,
    pairs: own.ReportPairs = None,
    concepts: own.ReportConcepts = "test,unseen",
    starts: own.ReportStarts = "all",
    at: own.ReportAt = "0,10,20,50",
    seeds: own.ReportSeeds = 3,
    subset: own.Subset = 400,
    subset_clip: own.SubsetClip = None,
    batch_size: own.ReportBatch = 16,
    lr: own.ReportLr = 1.5e-3,
    lr_discriminator: own.ReportLrDiscriminator = 2e-4,
    l1: own.GanL1 = 100.0,
    gan_from: own.ReportGanFrom = 0.0,
    pix2pix: own.ReportPix2pix = 0,
    oracle_steps: own.OracleSteps = None,
    pictures: own.ReportPictures = 4,
    inception: own.ReportInception = None,
    workers: own.RunWorkers = 0,
    seed: opt.Seed = 0,
) -> None:
    """Fine-tune held-out concepts from every start, and compare them: does the prediction help?

    Every start has the same updates, rate, order of data and discriminator. Each run is resumable by itself. Written
    are table.md, .csv and .json, runs.csv with every value, curves, and strips of images.
    """
