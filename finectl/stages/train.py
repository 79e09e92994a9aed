"""Train: plain training of any model artifact with the denoising loss, AdamW, EMA and label dropout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from finectl.artifacts.job import Job, Outcome, Plan, Reads, Stage
from finectl.artifacts.store import Artifact
from finectl.models.io import load_model, read_config, save_model
from finectl.training.settings import (
    describe_settings,
    require_fit,
    resolve_data,
    resolve_settings,
    settings_of,
    training_estimate,
)

SMALL = {"steps": 600}
PAPER = {"steps": 10_000}


@dataclass(frozen=True)
class Config:
    """The options of `finectl train`; None is a default that depends on the data."""

    weights: str
    data: str | None
    image_size: int | None
    steps: int | None
    batch_size: int | None
    lr: float | None
    lr_schedule: str
    warmup_steps: int | None
    weight_decay: float
    ema: float | None
    eval_every: int | None
    seed: int


def plan(config: Config, parents: Sequence[Artifact]) -> Plan[Config]:
    """Resolve the options against the model and the data set.

    Raises:
        InputError: the data does not fit the model.
    """
    model = read_config(parents[0])
    data = resolve_data(config.data, config.image_size or model.image_size, parents)
    require_fit(parents[0], data)
    resolved = replace(
        config,
        data=data.name,
        image_size=data.image_size,
        **resolve_settings(config, data.bundled, small=SMALL, paper=PAPER),
    )
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
    train = load(config.data or "", "train", config.image_size)
    heldout = heldout_evaluator(
        load(config.data or "", "heldout", config.image_size), resolve_device(job.execution.device)
    )
    trained = fit(job, model, train, settings_of(config), heldout=heldout)
    save_model(job.directory, model.config, trained.model.state_dict(), trained.ema.state_dict())
    return Outcome(cost=trained.cost)


STAGE = Stage(
    name="train",
    version=1,
    makes="model",
    config=Config,
    reads=lambda config: Reads("model", ("model",)),
    plan=plan,
    run=run,
)
