"""Train: plain training of any model artifact with the denoising loss, AdamW, EMA and label dropout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from finectl.artifacts.job import Execution, Job, Outcome, Plan, Reads, Stage
from finectl.artifacts.store import Artifact
from finectl.errors import UsageError
from finectl.models.io import load_model, read_config, save_model
from finectl.training.estimate import measure_training, training_estimate
from finectl.training.multitask import DEFAULT_CLUSTERS, METHODS, extra_bytes, make_tasks, require_even
from finectl.training.settings import (
    DataFields,
    OptimiserFields,
    TrainFields,
    data_options,
    describe_settings,
    require_fit,
    resolve_settings,
    settings_of,
    settled_betas,
)
from finectl.training.text_settings import CaptionFields, resolve_captioned, unchanged

SMALL = {"steps": 600}
PAPER = {"steps": 10_000}
NONE = "none"
"""No clusters of timesteps: the mean over the batch."""
UNIFORM = "uniform"
"""Weights of 1, whatever is predicted: the denoising loss as it is."""


@dataclass(frozen=True)
class Config(DataFields, TrainFields, OptimiserFields, CaptionFields):
    """The options of `finectl train`."""

    weights: str
    weighting: str
    normalise_weights: bool
    mtl: str
    clusters: int | None


def plan(config: Config, parents: Sequence[Artifact]) -> Plan[Config]:
    """Resolve the options against the model and the data set.

    Raises:
        InputError: the data does not fit the model; for one of text, captions or the text encoder are missing.
        UsageError: the batch cannot be shared evenly among the timestep clusters.
    """
    model = read_config(parents[0])
    data, fields = resolve_captioned(config, parents, model, model.image_size)
    require_fit(parents[0], data)
    clip = {"clip_grad": METHODS[config.mtl].clip_grad} if config.mtl != NONE else {}
    resolved = replace(
        config,
        **fields,
        **resolve_settings(config, data.bundled, small={**SMALL, **clip}, paper={**PAPER, **clip}),
        betas=settled_betas(config.betas),
        normalise_weights=config.normalise_weights and config.weighting != UNIFORM,
        clusters=_clusters(config),
    )
    settings = settings_of(resolved)
    if resolved.clusters:
        require_even(settings.batch_size, resolved.clusters, model.diffusion.timesteps)
    weighted = "" if config.weighting == UNIFORM else f"-{config.weighting}"
    balanced = "" if config.mtl == NONE else f"-{config.mtl}"
    return Plan(
        resolved,
        slug=f"{parents[0].name.rsplit('-', 1)[0]}-t{settings.steps}{weighted}{balanced}",
        data=data,
        summary=_with_clusters(training_estimate(model, settings), resolved),
        notes=(f"training on {data.name}: {describe_settings(settings)}",),
    )


def _clusters(config: Config) -> int | None:
    """Return the number of timestep clusters, None where the loss is one.

    Raises:
        UsageError: a number is given, and nothing uses it.
    """
    if config.mtl != NONE:
        return config.clusters or DEFAULT_CLUSTERS
    if config.clusters:
        raise UsageError(
            f"--clusters {config.clusters} are used by --mtl only",
            expected=f"--mtl {', '.join(METHODS)}",
            fix="leave --clusters out, or choose an --mtl",
        )
    return None


def _with_clusters(estimate: dict[str, Any], config: Config) -> dict[str, Any]:
    """Add to an estimate what the gradients of timestep clusters take, where they are kept at once."""
    if not config.clusters:
        return estimate
    extra = extra_bytes(config.mtl, config.clusters, estimate["parameters"])
    return {**estimate, "memory_bytes": estimate["memory_bytes"] + extra}


def run(job: Job[Config]) -> Outcome:
    """Train the model and write its raw and EMA weights."""
    from finectl.data.dataset import load
    from finectl.diffusion.schedule import NoiseSchedule
    from finectl.diffusion.weightings import WeightedLoss
    from finectl.metrics.heldout_loss import heldout_evaluator
    from finectl.training.device import resolve_device
    from finectl.training.loop import fit
    from finectl.training.multitask.clusters import Stratified
    from finectl.training.run import Loss, plain_loss, uniform_timesteps
    from finectl.training.texts import conditioned

    config = job.config
    model = load_model(job.parents[0], config.weights)
    train = load(config.data or "", "train", config.image_size, data_options(config, job))
    held = load(config.data or "", "heldout", config.image_size, data_options(config, job))
    train, held = conditioned(job, [model], train, held, dropout=config.caption_dropout)
    device = resolve_device(job.execution.device, job.world.local_rank)
    heldout = heldout_evaluator(held, device, diffusion=model.config.diffusion)
    loss: Loss = plain_loss
    if config.weighting != UNIFORM:
        loss = WeightedLoss(config.weighting, NoiseSchedule.of(model.config, device), config.normalise_weights)
    tasks = make_tasks(config.mtl, config.clusters, config.seed) if config.clusters else None
    trained = fit(
        job,
        model,
        train,
        settings_of(config),
        heldout=heldout,
        loss=loss,
        timesteps=Stratified(tasks.clusters) if tasks else uniform_timesteps,
        tasks=tasks,
    )
    if job.world.leads:
        save_model(job.directory, read_config(job.parents[0]), trained.state, trained.ema)
    return Outcome(metrics=tasks.metrics() if tasks else {}, cost=trained.cost)


def measure(plan: Plan[Config], parents: Sequence[Artifact], execution: Execution) -> dict[str, Any]:
    """Time a step, for `--dry-run`."""
    measured = measure_training(read_config(parents[0]), settings_of(plan.config), execution)
    return _with_clusters(measured, plan.config)


STAGE = Stage(
    name="train",
    version=1,
    makes="model",
    config=Config,
    reads=lambda config: Reads("model", ("model",)),
    plan=plan,
    run=run,
    locations=("data", "text_encoder"),
    unchanged_at=unchanged("text_digest", "caption_dropout"),
    shares_work=True,
    measure=measure,
)
