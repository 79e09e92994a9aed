"""`finectl init`: its options."""

from __future__ import annotations

from finectl.cli import groups
from finectl.cli import options as opt
from finectl.cli.command import stage_command


@stage_command("finectl.stages.init", groups.data, groups.training_run)
def init(
    input: opt.Input = None,
    method: opt.Method = "fine",
    variant: opt.Variant = None,
    set: opt.Constants = None,
    depth: opt.Depth = None,
    model: opt.ModelOrNone = None,
    sigma: opt.Sigma = None,
    depth_scale: opt.DepthScale = 0.75,
    tune_steps: opt.TuneSteps = None,
    tune_samples: opt.TuneSamples = None,
    tune_lr: opt.TuneLr = 1e-2,
    tune_biases: opt.TuneBiases = True,
    flip: opt.Flip = False,
    batch_size: opt.BatchSize = None,
    seed: opt.Seed = 0,
) -> None:
    """Initialise a dense model of any depth.

    --method fine builds it from a learngene and tunes sigma briefly on a part of the target data; --method he is DiT's
    own initialisation, the control, with INPUT's shapes or those of --model. The others start from a dense model:
    `finectl ls methods` says what each does, what it needs, and where it is from.
    """
