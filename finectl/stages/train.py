"""Train: plain training of any model artifact with the denoising loss, AdamW, EMA and label dropout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from finectl.artifacts.job import Execution, Job, Outcome, Plan, Reads, Stage
from finectl.artifacts.store import Artifact
from finectl.models.io import load_model, read_config, require_class_conditional, save_model
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

SMALL = {"steps": 600}
PAPER = {"steps": 10_000}


@dataclass(frozen=True)
class Config(DataFields, TrainFields):
    """The options of `finectl train`."""

    weights: str


def plan(config: Config, parents: Sequence[Artifact]) -> Plan[Config]:
    """Resolve the options against the model and the data set.

    Raises:
        InputError: the data does not fit the model.
    """
    model = require_class_conditional(parents[0])
    data, fields = resolve_data(config, parents, model.image_size)
    require_fit(parents[0], data)
    resolved = replace(config, **fields, **resolve_settings(config, data.bundled, small=SMALL, paper=PAPER))
    settings = settings_of(resolved)
    return Plan(
        resolved,
        slug=f"{parents[0].name.rsplit('-', 1)[0]}-t{settings.steps}",
        data=data,
        summary=training_estimate(model, settings),
        notes=(f"training on {data.name}: {describe_settings(settings)}",),
    )


def run(job: Job[Config]) -> Outcome:
    """Train the model and write its raw and EMA weights."""
    from finectl.data.dataset import load
    from finectl.metrics.heldout_loss import heldout_evaluator
    from finectl.training.device import resolve_device
    from finectl.training.loop import fit

    config = job.config
    model = load_model(job.parents[0], config.weights)
    train = load(config.data or "", "train", config.image_size, data_options(config, job))
    held = load(config.data or "", "heldout", config.image_size, data_options(config, job))
    heldout = heldout_evaluator(
        held, resolve_device(job.execution.device, job.world.local_rank), diffusion=model.config.diffusion
    )
    trained = fit(job, model, train, settings_of(config), heldout=heldout)
    if job.world.leads:
        save_model(job.directory, model.config, trained.state, trained.ema)
    return Outcome(cost=trained.cost)


def measure(plan: Plan[Config], parents: Sequence[Artifact], execution: Execution) -> dict[str, Any]:
    """Time a step, for `--dry-run`."""
    return measure_training(read_config(parents[0]), settings_of(plan.config), execution)


STAGE = Stage(
    name="train",
    version=1,
    makes="model",
    config=Config,
    reads=lambda config: Reads("model", ("model",)),
    plan=plan,
    run=run,
    shares_work=True,
    measure=measure,
)
