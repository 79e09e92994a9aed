"""Finetune-ranges: one expert a range of timesteps, each a copy of the model that is fine-tuned for itself.

An expert sees mostly the timesteps of its range and is held to the predictions of the model it started from. Channel
projections, the identity at the start, are trained with all other weights. Each expert is an artifact of its own; when
all are there, a second stage puts them together.

Reference: DeMe, arXiv 2410.06664, sections 3.2 and 8.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finectl.adapters.projection import add_projections, identity_state
from finectl.artifacts.files import sync
from finectl.artifacts.job import Execution, InheritedData, Job, Outcome, Plan, Reads, Stage
from finectl.artifacts.lineage import total_cost
from finectl.artifacts.store import Artifact
from finectl.diffusion.ranges import equal_borders, parse_borders, range_of
from finectl.errors import InputError, UsageError
from finectl.models.experts import expert_file, read_borders
from finectl.models.io import (
    CONFIG,
    FILES,
    ModelConfig,
    build_model,
    load_weights,
    require_class_conditional,
    save_model,
    total_parameters,
)
from finectl.models.presets import DiTConfig
from finectl.training.estimate import measure_training, training_estimate
from finectl.training.settings import (
    DataFields,
    OptimiserFields,
    TrainFields,
    TrainSettings,
    data_options,
    describe_settings,
    require_fit,
    resolve_data,
    resolve_settings,
    settings_of,
    settled_betas,
)

RANGES = 4
SMALL = {"steps": 300, "batch_size": 64, "lr": 5e-4, "ema": 0.9999, "warmup_steps": 0}
PAPER = {"steps": 20_000, "batch_size": 64, "lr": 5e-5}
SEED_STEP = 1_000_003
"""Between the seeds of one range and the next: the same draws would give the experts' differences much in common."""


@dataclass(frozen=True)
class Config(DataFields, TrainFields, OptimiserFields):
    """The options of `finectl finetune-ranges`; None is a default that depends on the data."""

    weights: str
    ranges: int | None
    borders: str | None
    p: float
    coin: str
    antithetic: bool
    consistency: float
    projection: str
    only: int | None = None


def resolve_borders(config: Config, timesteps: int) -> tuple[int, ...]:
    """Return the borders that `--ranges` or `--borders` ask for.

    Raises:
        UsageError: they are none, or the two contradict each other.
    """
    if config.borders is None:
        return equal_borders(timesteps, RANGES if config.ranges is None else config.ranges)
    borders = parse_borders(config.borders, timesteps)
    if config.ranges not in (None, len(borders) - 1):
        raise UsageError(
            f"--ranges {config.ranges} and --borders {config.borders}, which are of {len(borders) - 1} ranges",
            expected="one of them",
        )
    return borders


def expert_config(base: ModelConfig, projection: str) -> ModelConfig:
    """Return the architecture of the experts: the model's, with projections."""
    if isinstance(base, DiTConfig):  # two calls of one function: its result has the type of its argument
        return add_projections(base, projection)
    return add_projections(base, projection)


def plan_all(config: Config, base: Artifact) -> Plan[Config]:
    """Resolve the options that the ranges have in common against the model and the data set.

    Raises:
        UsageError: the ranges are none, or the model has no room for such projections.
        InputError: the model is conditioned on text, or the data does not fit it.
    """
    model = require_class_conditional(base)
    borders = resolve_borders(config, model.diffusion.timesteps)
    data, fields = resolve_data(config, [base], model.image_size)
    require_fit(base, data)
    resolved = replace(
        config,
        **fields,
        **resolve_settings(config, data.bundled, small=SMALL, paper=PAPER),
        betas=settled_betas(config.betas),
        ranges=len(borders) - 1,
        borders=",".join(map(str, borders)),
        only=None,
    )
    settings = settings_of(resolved)
    slug = f"{base.name.rsplit('-', 1)[0]}-r{len(borders) - 1}-t{settings.steps}"
    teacher = model if config.consistency else None
    estimate = training_estimate(expert_config(model, config.projection), settings, teacher=teacher)
    return Plan(resolved, slug, data, estimate)


def borders_of(config: Config) -> tuple[int, ...]:
    """Return the borders of a resolved configuration."""
    return tuple(int(border) for border in (config.borders or "").split(","))


def plan_of_range(common: Plan[Config], index: int) -> Plan[Config]:
    """Return the plan of one expert.

    Args:
        common: What `plan_all` returned.
        index: The range, counted from 0.

    Raises:
        UsageError: there is no such range.
    """
    borders = borders_of(common.config)
    if index >= len(borders) - 1:
        raise UsageError(f"--only {index}: there is no such range", expected=f"between 0 and {len(borders) - 2}")
    first, end = range_of(borders, index)
    settings = describe_settings(settings_of(common.config))
    return replace(
        common,
        config=replace(common.config, only=index),
        slug=f"{common.slug}-e{index}",
        summary={"range": [first, end], **common.summary},
        notes=(f"expert {index} of timesteps {first} to {end - 1}: {settings}",),
    )


def plan_expert(config: Config, parents: Sequence[Artifact]) -> Plan[Config]:
    """Resolve the options of one expert, as `plan_all` and `plan_of_range` say."""
    return plan_of_range(plan_all(config, parents[0]), config.only or 0)


def expert_settings(config: Config) -> TrainSettings:
    """Return how one expert is trained: each with draws of its own, the first with those of `--seed`."""
    return replace(settings_of(config), seed=config.seed + SEED_STEP * (config.only or 0))


def run_expert(job: Job[Config]) -> Outcome:
    """Fine-tune the model on one range and write its raw and EMA weights."""
    from finectl.data.dataset import load
    from finectl.metrics.heldout_loss import heldout_evaluator
    from finectl.training.consistency import Consistency
    from finectl.training.device import resolve_device
    from finectl.training.loop import fit
    from finectl.training.run import Loss, plain_loss
    from finectl.training.timesteps import RangeTimesteps

    config, base = job.config, job.parents[0]
    original = require_class_conditional(base)
    target = expert_config(original, config.projection)
    borders = borders_of(config)
    first, end = range_of(borders, config.only or 0)
    weights = load_weights(base, config.weights)  # theta_0

    student: Any = build_model(target)
    student.load_state_dict({**identity_state(target), **weights})
    device = resolve_device(job.execution.device, job.world.local_rank)
    loss: Loss = plain_loss
    if config.consistency:
        teacher: Any = build_model(original)  # without projections
        teacher.load_state_dict(weights)
        if job.execution.compile:
            teacher.compile()
        loss = Consistency(teacher.to(device), config.consistency)

    train = load(config.data or "", "train", config.image_size, data_options(config, job))
    held = load(config.data or "", "heldout", config.image_size, data_options(config, job))
    trained = fit(
        job,
        student,
        train,
        expert_settings(config),
        heldout=heldout_evaluator(held, device, diffusion=target.diffusion),
        loss=loss,
        timesteps=RangeTimesteps(first, end, config.p, config.coin, config.antithetic),
    )
    if isinstance(loss, Consistency):
        loss.require_unchanged()
    if job.world.leads:
        save_model(job.directory, target, trained.state, trained.ema)
    metrics = {"index": config.only, "range": [first, end], "borders": list(borders)}
    return Outcome(metrics={**metrics, "parameters": total_parameters(target)}, cost=trained.cost)


def measure(plan: Plan[Config], parents: Sequence[Artifact], execution: Execution) -> dict[str, Any]:
    """Time a step, the teacher's part in it included, for `--dry-run`."""
    original = require_class_conditional(parents[0])
    target = expert_config(original, plan.config.projection)
    teacher = original if plan.config.consistency else None
    return measure_training(target, settings_of(plan.config), execution, teacher=teacher)


STAGE = Stage(
    name="finetune-ranges",
    version=1,
    makes="expert",
    config=Config,
    reads=lambda config: Reads("base", ("model",)),
    plan=plan_expert,
    run=run_expert,
    shares_work=True,
    measure=measure,
)


def collecting(experts: Sequence[Path]) -> Stage[Config]:
    """Return the stage that puts the experts of all ranges together.

    Args:
        experts: Their artifacts, in the order of the ranges.
    """
    further = tuple(Reads("expert", ("expert",), named=(str(path),)) for path in experts)
    return Stage(
        name=STAGE.name,
        version=1,
        makes="experts",
        config=Config,
        reads=lambda config: Reads("base", ("model",), also=further),
        plan=plan_collection,
        run=run_collection,
    )


def plan_collection(config: Config, parents: Sequence[Artifact]) -> Plan[Config]:
    """Check that the experts are of this model and of all its ranges.

    Raises:
        InputError: one is of another model, of other ranges or missing.
    """
    base, *experts = parents
    plan = plan_all(config, base)
    require_experts(base, experts, borders_of(plan.config))
    size = sum(file.bytes for artifact in experts for file in artifact.manifest.files)
    return replace(plan, data=InheritedData.of(experts[0]), summary={"ranges": len(experts), "disk_bytes": size})


def require_experts(base: Artifact, experts: Sequence[Artifact], borders: Sequence[int]) -> None:
    """Check that experts started from one model and that there is one for each range, in order.

    Raises:
        InputError: one is of another model, of other ranges or missing.
    """
    timesteps = borders[-1]
    for artifact in experts:
        parent = artifact.manifest.parents[0]
        if parent.digest != base.manifest.digest:
            raise InputError(
                f"{artifact.path} was fine-tuned from another model (digest {parent.digest[:12]})",
                expected=f"experts of {base.path} (digest {base.manifest.digest[:12]})",
                fix=f"finectl finetune-ranges {base.path}",
            )
        if read_borders(artifact, timesteps) != tuple(borders):
            raise InputError(
                f"{artifact.path} is of ranges with the borders {artifact.manifest.metrics['borders']}",
                expected=str(list(borders)),
                fix=f"finectl finetune-ranges {base.path} --borders {','.join(map(str, borders))}",
            )
    found = [artifact.manifest.metrics.get("index") for artifact in experts]
    for index in range(len(borders) - 1):
        if index not in found:
            first, end = borders[index], borders[index + 1]
            raise InputError(
                f"the expert {index} of timesteps {first} to {end - 1} is missing",
                expected=f"one expert for each of {len(borders) - 1} ranges",
                fix=f"finectl finetune-ranges {base.path} --only {index}, with the options of the others",
            )
    if found != list(range(len(borders) - 1)):
        raise InputError(f"the experts are those of the ranges {found}", expected="each once and in order")


def run_collection(job: Job[Config]) -> Outcome:
    """Link the experts' files into one artifact, and copy where links do not reach."""
    base, *experts = job.parents
    shutil.copyfile(experts[0].file(CONFIG), job.directory / CONFIG)
    for index, artifact in enumerate(experts):
        for weights, name in FILES.items():
            target = job.directory / expert_file(index, weights)
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                _link(artifact.file(name), target)
    sync(job.directory)
    metrics = {
        "borders": experts[0].manifest.metrics["borders"],
        "base": base.manifest.digest,
        "parameters": experts[0].manifest.metrics["parameters"],
    }
    return Outcome(metrics=metrics, cost=total_cost(experts))


def _link(source: Path, target: Path) -> None:
    """Give a file a second name; on another file system, or one without links, copy it."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        temporary = target.with_name(f".{target.name}.tmp")
        shutil.copyfile(source, temporary)
        os.replace(temporary, target)
