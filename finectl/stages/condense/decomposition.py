"""Condense a dense model: the factors are fitted to the weights of its layers, and training is optional.

W^(l) = U diag(sigma^(l)) V^T for all layers of a type at once is a canonical (CP) decomposition of their stack.

Reference: FINE, arXiv 2409.19289, Eq. 3; Kolda and Bader, SIAM Review 51(3), 2009, section 3.4.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from finectl.artifacts.job import InheritedData, Job, Outcome, Plan
from finectl.artifacts.store import Artifact
from finectl.data.sources import DataInfo
from finectl.errors import InputError, UsageError
from finectl.models.io import read_dit_config
from finectl.models.learngene import SIGMA_RULE
from finectl.models.presets import DiTConfig, FactorConfig, count_parameters, family_name
from finectl.stages.condense.config import Config, factors_of, groups_of, parameter_counts, resolved_tying
from finectl.stages.condense.pretraining import DEFAULT_DIVISOR
from finectl.training.estimate import training_estimate
from finectl.training.settings import (
    data_options,
    require_fit,
    resolve_data,
    resolve_settings,
    settings_of,
)

# Fitted factors need no high rate to find each other, and sigma none of its own.
FROM_SMALL = {"steps": 0, "lr": 2e-3}
FROM_PAPER = {"steps": 0}


def plan_from(config: Config, ancestor: Artifact) -> Plan[Config]:
    """Resolve the options of a run that starts from a dense model.

    Raises:
        UsageError: an option contradicts the model, or the rank is too high.
        InputError: the model is not dense, or the data set is missing, empty or does not fit it.
    """
    model = architecture_from(config, ancestor)
    dense = replace(model, factorized=None)
    rank = cast(FactorConfig, model.factorized).rank
    inherited = InheritedData.of(ancestor)
    data: DataInfo | InheritedData | None = inherited
    distilling = config.distill_steps or 0
    updates = distilling + (config.steps or 0)
    if config.keep_every and not updates:
        raise UsageError("--keep-every keeps weights of updates, and there are none", fix="--steps N")
    if updates or config.cp_weighting == "inputs":
        if config.data is None and inherited is None:
            raise InputError(
                f"{ancestor.path} does not say what it was trained on",
                expected="data to weigh the errors of the fit by, and to train on",
                fix="--data; or --cp-weighting none --steps 0, which needs none",
            )
        data, fields = resolve_data(config, [ancestor], dense.image_size if config.data is None else None)
        require_fit(ancestor, data)
    else:
        fields = {"data": inherited.name if inherited else None, "image_size": dense.image_size}
    bundled = data.bundled if data else False
    settings = resolve_settings(config, bundled, small=FROM_SMALL, paper=FROM_PAPER, before=distilling)
    resolved = replace(
        config,
        model=family_name(dense),
        depth=model.depth,
        **resolved_tying(config, model),
        distill_steps=distilling,
        learn_sigma=model.learn_sigma,
        frequency_divisor=model.frequency_divisor,
        sigma_lr=settings["lr"] if config.sigma_lr is None else config.sigma_lr,
        from_model=str(ancestor.path.resolve()),
        **{**fields, **settings},
    )
    updates_planned = replace(settings_of(resolved), steps=distilling + settings["steps"])
    return Plan(
        resolved,
        slug=f"{family_name(dense).replace('/', '-')}-l{model.depth}-r{rank}-cp",
        data=data,
        summary={**training_estimate(model, updates_planned), **parameter_counts(model)},
    )


def architecture_from(config: Config, ancestor: Artifact) -> DiTConfig:
    """Return the factorised form of a dense model's architecture.

    Raises:
        UsageError: an option contradicts the model, or the rank is too high.
        InputError: the model is not a dense DiT.
    """
    dense = read_dit_config(ancestor)
    if dense.factorized is not None:
        raise InputError(f"{ancestor.path} is factorised already", expected="a dense model")
    given = {
        "--model": (config.model and config.model.lower().removesuffix("/2"), family_name(dense)),
        "--depth": (config.depth, dense.depth),
        "--learn-sigma": (config.learn_sigma or None, dense.learn_sigma),
        "--frequency-divisor": (
            None if config.frequency_divisor == DEFAULT_DIVISOR else config.frequency_divisor,
            dense.frequency_divisor,
        ),
    }
    for option, (value, own) in given.items():
        if value is not None and value != own:
            raise UsageError(
                f"{option} {value} does not go with --from {ancestor.path}",
                expected=f"{own}, which comes from the model",
                fix=f"leave {option} out",
            )
    if config.method != "fine" or config.distill is not None:
        raise UsageError(
            "--from fits factors to a dense model, and goes with --method fine alone, without --distill",
            fix=f"--method {config.method} --distill {ancestor.path} trains one towards that model"
            if config.method != "fine"
            else "--from MODEL --distill-steps N",
        )
    if config.sigma_sharing != 1:
        raise UsageError("--sigma-sharing does not go with --from: the fit gives every column its own sigma")
    return replace(dense, factorized=factors_of(config, dense))


def run_from(job: Job[Config], ancestor: Artifact) -> Outcome:
    """Fit the factors to the ancestor's weights, distil and train as asked, and write the model."""
    from finectl.data.dataset import load
    from finectl.metrics.heldout_loss import heldout_evaluator
    from finectl.models.dit import DiT
    from finectl.models.io import load_dit, save_model
    from finectl.training.ancestor import fit_ancestor, print_errors
    from finectl.training.device import resolve_device
    from finectl.training.distill import Distillation
    from finectl.training.loop import fit

    config = job.config
    device = resolve_device(job.execution.device, job.world.local_rank)
    model_config = architecture_from(config, ancestor)
    dense = load_dit(ancestor)
    weighted, distilling = config.cp_weighting == "inputs", cast(int, config.distill_steps)
    steps = distilling + cast(int, config.steps)
    train = (
        load(config.data or "", "train", config.image_size, data_options(config, job)) if weighted or steps else None
    )
    fitted = fit_ancestor(
        job,
        dense,
        model_config,
        train if weighted else None,
        iterations=config.cp_iterations,
        seed=config.seed,
        device=device,
    )
    print_errors(job, fitted.errors, weighted)
    model = DiT(model_config)
    model.load_state_dict(fitted.state)
    state, ema, cost = fitted.state, None, {"steps": 0, "samples": 0, "flops": 0}
    if steps and train is not None:
        held = load(config.data or "", "heldout", config.image_size, data_options(config, job))
        heldout = heldout_evaluator(held, device, diffusion=model_config.diffusion)
        settings = replace(settings_of(config), steps=steps)
        loss = Distillation(dense.to(device), model, distilling, config.seed)
        trained = fit(job, model, train, settings, groups=groups_of(model, config), heldout=heldout, loss=loss)
        state, ema, cost = trained.state, trained.ema, trained.cost
    if job.world.leads:
        save_model(job.directory, model_config, state, ema)
    counts = count_parameters(model_config)
    return Outcome(
        metrics={
            "parameters": counts["total"],
            "parameters_shared": counts["factors"],
            "fit": fitted.errors,
            SIGMA_RULE: "nearest",
        },
        cost=cost,
    )
