"""`finectl init`: its options."""

from __future__ import annotations

from finectl.cli import family, groups
from finectl.cli import options as opt
from finectl.cli.command import stage_command
from finectl.cli.method_help import MethodCommand


@stage_command(
    "finectl.stages.init", groups.data, groups.text, groups.training_run, run=family.run, parser=MethodCommand
)
def init(
    inputs: opt.Sources = None,
    method: opt.Method = "fine",
    variant: opt.Variant = None,
    set: opt.Constants = None,
    depth: opt.Depth = None,
    depths: opt.FamilyDepths = None,
    only: opt.Only = None,
    model: opt.ModelOrNone = None,
    process: opt.Process = None,
    sigma: opt.Sigma = None,
    sigma_from: opt.SigmaFrom = None,
    prompt: opt.TaskPrompt = None,
    depth_scale: opt.DepthScale = 0.75,
    tune_steps: opt.TuneSteps = None,
    tune_samples: opt.TuneSamples = None,
    tune_lr: opt.TuneLr = 1e-2,
    tune_biases: opt.TuneBiases = True,
    width_map: opt.WidthMap = "rows",
    flip: opt.Flip = False,
    batch_size: opt.BatchSize = None,
    seed: opt.Seed = 0,
) -> None:
    """Initialise a dense model of any depth.

    --method fine builds it from a learngene and tunes sigma briefly on a part of the target data; --method he is DiT's
    own initialisation, the control, with INPUT's shapes or those of --model. `finectl ls methods` lists all of them,
    and `finectl init --method NAME --help` explains one. --method all --depths 2,4,6,8 makes a family: one artifact
    each, one path a line, and the same command goes on with those that are missing.
    """
