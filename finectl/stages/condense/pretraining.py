"""Condense by pre-training: a DiT whose layers share U and V is trained with the plain denoising loss.

The gradient reaches U, V and every sigma, never a free W. What the layers have in common gathers in U and V.

Reference: FINE, arXiv 2409.19289, section 3.2, Eq. 3.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from finectl.artifacts.job import Job, Outcome, Plan
from finectl.data.sources import DataInfo
from finectl.errors import UsageError
from finectl.models.presets import DiTConfig, FactorConfig, count_parameters, preset
from finectl.stages.condense.config import Config, factors_of, groups_of, parameter_counts
from finectl.training.estimate import training_estimate
from finectl.training.settings import (
    data_options,
    describe_settings,
    resolve_data,
    resolve_settings,
    settings_of,
)

# In a short run the shared factors bear, and need, a higher rate than dense weights. sigma is of scale 1, entries of U
# and V are of scale 1 / sqrt(width), and Adam moves all by about the same: sigma gets a rate of its own.
SMALL = {"steps": 1500, "lr": 4e-3}
SMALL_SIGMA_FACTOR = 5.0
PAPER = {"steps": 30_000}
DEFAULT_MODEL = "dit-nano"
DEFAULT_DIVISOR = 128


def plan_pretraining(config: Config) -> Plan[Config]:
    """Resolve the options against the preset and the data set.

    Raises:
        UsageError: the preset, a type, the rank or the patch does not fit.
        InputError: the data set is missing or empty.
    """
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


def run_pretraining(job: Job[Config]) -> Outcome:
    """Train the factorised model and write its raw and EMA weights."""
    from finectl.data.dataset import load
    from finectl.diffusion.random import generator_for
    from finectl.metrics.heldout_loss import heldout_evaluator
    from finectl.models.dit import DiT, initialize_
    from finectl.models.io import save_model
    from finectl.training.device import resolve_device
    from finectl.training.loop import fit

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
