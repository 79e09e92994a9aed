"""`finectl condense`: its options."""

from __future__ import annotations

from finectl.cli import groups
from finectl.cli import options as opt
from finectl.cli.command import stage_command


@stage_command("finectl.stages.condense", groups.data, groups.training, groups.training_run)
def condense(
    method: opt.CondenseMethod = "fine",
    model: opt.Model = None,
    depth: opt.Depth = None,
    factorize: opt.Factorize = None,
    rank: opt.Rank = None,
    overcomplete: opt.Overcomplete = False,
    sigma_sharing: opt.SigmaSharing = 1,
    template_size: opt.TemplateSize = None,
    learn_sigma: opt.LearnSigma = False,
    frequency_divisor: opt.FrequencyDivisor = 128,
    sigma_lr: opt.SigmaLr = None,
    from_model: opt.FromModel = None,
    cp_weighting: opt.CpWeighting = "inputs",
    cp_iterations: opt.CpIterations = 200,
    distill: opt.Distill = None,
    distill_steps: opt.DistillSteps = None,
    steps: opt.CondenseSteps = None,
) -> None:
    """Pre-train a model whose layers share their parameters, to read models of other depths off it.

    --method fine (FINE, phase 1): every matrix of a type is W = U diag(sigma) V^T; U and V are shared by all layers,
    sigma is the layer's own. share, tleg and wave are what FINE is compared with. --distill TEACHER trains towards a
    model's predictions. Without --data it trains on the bundled digits with settings that suit them; with other data,
    with the paper's.

    --from MODEL starts from a dense model instead: the factors of --method fine are fitted to its weights,
    --distill-steps bring the result closer to it, and --steps, 0 by default, train it further.
    """
