"""Condense: factorised pre-training (FINE, phase 1).

A DiT is trained whose matrices of a type all share U and V, W^(l) = U diag(sigma^(l)) V^T, with the plain denoising
loss; the gradient reaches U, V and every sigma, never a free W. What the layers have in common gathers in U and V.

With `--from` the factors are fitted to the layers of a dense model instead, and training is optional.

Reference: FINE, arXiv 2409.19289, section 3.2, Eq. 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from finectl.artifacts.job import Execution, InheritedData, Job, Outcome, Plan, Reads, Stage
from finectl.artifacts.store import Artifact
from finectl.data.sources import DataInfo
from finectl.errors import InputError, UsageError
from finectl.models.io import read_dit_config
from finectl.models.learngene import SIGMA_RULE
from finectl.models.presets import DiTConfig, FactorConfig, count_parameters, family_name, preset
from finectl.training.estimate import measure_training, training_estimate
from finectl.training.settings import (
    DataFields,
    TrainFields,
    data_options,
    describe_settings,
    require_fit,
    resolve_data,
    resolve_settings,
    settings_of,
)

# In a short run the shared factors bear, and need, a higher rate than dense weights. sigma is of scale 1, entries of U
# and V are of scale 1 / sqrt(width), and Adam moves all by about the same: sigma gets a rate of its own.
SMALL = {"steps": 1500, "lr": 4e-3}
SMALL_SIGMA_FACTOR = 5.0
PAPER = {"steps": 30_000}
# Fitted factors need no high rate to find each other, and sigma none of its own.
FROM_SMALL = {"steps": 0, "lr": 2e-3}
FROM_PAPER = {"steps": 0}
DEFAULT_MODEL = "dit-nano"
DEFAULT_DIVISOR = 128


@dataclass(frozen=True)
class Config(DataFields, TrainFields):
    """The options of `finectl condense`; None is a default that depends on the model or the data."""

    model: str | None
    depth: int | None
    factorize: str
    rank: int | None
    overcomplete: bool
    sigma_sharing: int
    learn_sigma: bool
    frequency_divisor: int
    sigma_lr: float | None
    from_model: str | None = None
    cp_weighting: str = "inputs"
    cp_iterations: int = 200
    distill_steps: int = 0


def reads(config: Config) -> Reads | None:
    """Return the dense model that `--from` names, if it does."""
    return Reads("ancestor", ("model",), named=(config.from_model,)) if config.from_model else None


def plan(config: Config, parents: Sequence[Artifact]) -> Plan[Config]:
    """Resolve the options against the preset and the data set.

    Raises:
        UsageError: the preset, a type, the rank or the patch does not fit.
        InputError: the data set is missing or empty.
    """
    if parents:
        return plan_from(config, parents[0])
    config = without_ancestor(config)
    data, fields = resolve_data(config, ())
    model = architecture(config, data)
    factors = cast(FactorConfig, model.factorized)
    settings = resolve_settings(config, data.bundled, small=SMALL, paper=PAPER)
    sigma_lr = settings["lr"] * (SMALL_SIGMA_FACTOR if data.bundled else 1.0)
    resolved = replace(
        config,
        depth=model.depth,
        rank=factors.rank,
        factorize=",".join(factors.types),
        sigma_lr=sigma_lr if config.sigma_lr is None else config.sigma_lr,
        **fields,
        **settings,
    )
    notes: tuple[str, ...] = ()
    if config.data is None:
        notes = (f"no --data: training on the bundled {data.name} with {describe_settings(settings_of(resolved))}",)
    return Plan(
        resolved,
        slug=f"{cast(str, config.model).replace('/', '-')}-l{model.depth}-r{factors.rank}",
        data=data,
        summary={**training_estimate(model, settings_of(resolved)), **parameter_counts(model)},
        notes=notes,
    )


def parameter_counts(model: DiTConfig) -> dict[str, int]:
    """Return what is shared by all layers, what each layer has of its own, and the size of the dense model."""
    counts = count_parameters(model)
    dense = count_parameters(replace(model, factorized=None))
    return {
        "parameters_shared": counts["factors"],
        "parameters_of_one_layer": counts["block"],
        "parameters_dense": dense["total"],
    }


def architecture(config: Config, data: DataInfo) -> DiTConfig:
    """Return the auxiliary model's architecture on a data set.

    Raises:
        UsageError: the preset, a type, the rank or the patch does not fit.
    """
    dense = preset(
        cast(str, config.model),
        image_size=data.image_size,
        channels=data.channels,
        num_classes=data.num_classes,
        depth=config.depth,
        learn_sigma=config.learn_sigma,
    )
    return replace(dense, factorized=factors_of(config, dense), frequency_divisor=config.frequency_divisor)


def factors_of(config: Config, dense: DiTConfig) -> FactorConfig:
    """Return what of a dense architecture is factorised, and how.

    Raises:
        UsageError: a type is unknown, or the rank is above the width and that is not said to be meant.
    """
    rank = config.rank or dense.width
    if rank > dense.width and not config.overcomplete:
        raise UsageError(
            f"--rank {rank} is above the width {dense.width} of {family_name(dense)}: the factors would be "
            "overcomplete",
            expected=f"a rank of at most {dense.width}",
            fix=f"--rank {dense.width}, or --overcomplete if it is meant",
        )
    types = tuple(part.strip() for part in config.factorize.split(",") if part.strip())
    return FactorConfig(types, rank, config.sigma_sharing)


def without_ancestor(config: Config) -> Config:
    """Return the configuration of a run from scratch, in which the options of `--from` are not read.

    Raises:
        UsageError: one of them was given, or there are no steps.
    """
    if config.distill_steps:
        raise UsageError("--distill-steps needs a model to distil from", fix="--from MODEL")
    if config.steps == 0:
        raise UsageError("--steps 0 would leave the factors at random", expected="x>=1, or --from MODEL")
    return replace(config, model=config.model or DEFAULT_MODEL, cp_weighting="none", cp_iterations=0)


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
    updates = config.distill_steps + (config.steps or 0)
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
    settings = resolve_settings(config, bundled, small=FROM_SMALL, paper=FROM_PAPER)
    if config.eval_every is None:
        settings["eval_every"] = max(1, (config.distill_steps + settings["steps"]) // 10)
    resolved = replace(
        config,
        model=family_name(dense),
        depth=model.depth,
        rank=rank,
        factorize=",".join(cast(FactorConfig, model.factorized).types),
        learn_sigma=model.learn_sigma,
        frequency_divisor=model.frequency_divisor,
        sigma_lr=settings["lr"] if config.sigma_lr is None else config.sigma_lr,
        from_model=str(ancestor.path.resolve()),
        **{**fields, **settings},
    )
    return Plan(
        resolved,
        slug=f"{family_name(dense).replace('/', '-')}-l{model.depth}-r{rank}-cp",
        data=data,
        summary={**training_estimate(model, settings_of(resolved)), **parameter_counts(model)},
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
    if config.sigma_sharing != 1:
        raise UsageError("--sigma-sharing does not go with --from: the fit gives every column its own sigma")
    return replace(dense, factorized=factors_of(config, dense))


def run(job: Job[Config]) -> Outcome:
    """Train the factorised model and write its raw and EMA weights."""
    from finectl.data.dataset import load
    from finectl.diffusion.random import generator_for
    from finectl.metrics.heldout_loss import heldout_evaluator
    from finectl.models.dit import DiT, initialize_
    from finectl.models.io import save_model
    from finectl.training.device import resolve_device
    from finectl.training.loop import fit

    if job.parents:
        return run_from(job, job.parents[0])
    config = job.config
    model_config = architecture(config, cast(DataInfo, job.data))
    model = initialize_(DiT(model_config), generator_for("condense", config.seed))
    train = load(config.data or "", "train", config.image_size, data_options(config, job))
    held = load(config.data or "", "heldout", config.image_size, data_options(config, job))
    heldout = heldout_evaluator(held, resolve_device(job.execution.device, job.world.local_rank))
    trained = fit(job, model, train, settings_of(config), groups=groups_of(model, config), heldout=heldout)
    if job.world.leads:
        save_model(job.directory, model_config, trained.state, trained.ema)
    counts = count_parameters(model_config)
    return Outcome(metrics={"parameters": counts["total"], "parameters_shared": counts["factors"]}, cost=trained.cost)


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
    weighted, steps = config.cp_weighting == "inputs", config.distill_steps + cast(int, config.steps)
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
    state, ema, cost = fitted.state, None, {"steps": 0, "samples": 0}
    if steps and train is not None:
        held = load(config.data or "", "heldout", config.image_size, data_options(config, job))
        heldout = heldout_evaluator(held, device, diffusion=model_config.diffusion)
        settings = replace(settings_of(config), steps=steps)
        loss = Distillation(dense.to(device), model, config.distill_steps, config.seed)
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


def groups_of(model: Any, config: Config) -> list[dict[str, Any]]:
    """Return the parameter groups of a condensed model: sigma has a learning rate of its own."""
    named = list(model.named_parameters())
    return [
        {"params": [parameter for name, parameter in named if not name.endswith(".sigma")]},
        {"params": [parameter for name, parameter in named if name.endswith(".sigma")], "lr": config.sigma_lr},
    ]


def measure(plan: Plan[Config], parents: Sequence[Artifact], execution: Execution) -> dict[str, Any]:
    """Time a step, for `--dry-run`."""
    if parents:
        steps = plan.config.distill_steps + cast(int, plan.config.steps)
        model, settings = architecture_from(plan.config, parents[0]), replace(settings_of(plan.config), steps=steps)
        return measure_training(model, settings, execution) if steps else {}
    model = architecture(plan.config, cast(DataInfo, plan.data))
    return measure_training(model, settings_of(plan.config), execution)


STAGE = Stage(
    name="condense",
    version=1,
    makes="condensed",
    config=Config,
    reads=reads,
    plan=plan,
    run=run,
    locations=("data", "from_model"),
    shares_work=True,
    measure=measure,
)
