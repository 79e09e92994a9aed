"""`finectl condense`: its options."""

from __future__ import annotations

from finectl.cli import groups
from finectl.cli import options as opt
from finectl.cli.command import stage_command


@stage_command("finectl.stages.condense", groups.data, groups.training, groups.training_run)
def condense(
    model: opt.Model = None,
    depth: opt.Depth = None,
    factorize: opt.Factorize = "qkv,o,in,out,adaln",
    rank: opt.Rank = None,
    overcomplete: opt.Overcomplete = False,
    sigma_sharing: opt.SigmaSharing = 1,
    learn_sigma: opt.LearnSigma = False,
    frequency_divisor: opt.FrequencyDivisor = 128,
    sigma_lr: opt.SigmaLr = None,
    from_model: opt.FromModel = None,
    cp_weighting: opt.CpWeighting = "inputs",
    cp_iterations: opt.CpIterations = 200,
    distill_steps: opt.DistillSteps = 0,
    steps: opt.CondenseSteps = None,
) -> None:
    """Pre-train a model whose layers share their factors (FINE, phase 1).

    Every matrix of a type is W = U diag(sigma) V^T; U and V are shared by all layers, sigma is the layer's own. Without
    --data it trains on the bundled digits with settings that suit them; with other data, with the paper's.

    --from MODEL starts from a dense model instead: the factors are fitted to its weights, --distill-steps bring the
    result closer to it, and --steps, 0 by default, train it further.
    """
