"""One expert: a copy of the model that is fine-tuned on one range, held to what the model itself predicts.

Reference: DeMe, arXiv 2410.06664, section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from finectl.adapters.projection import identity_state
from finectl.artifacts.job import Execution, Job, Outcome, Plan
from finectl.artifacts.store import Artifact
from finectl.data.bank import open_bank, require_bank_of
from finectl.diffusion.ranges import range_of
from finectl.errors import InputError, UsageError
from finectl.models.io import build_model, load_weights, read_config, save_model, total_parameters
from finectl.stages.finetune_ranges.config import (
    DIFF_TUNING,
    REFRESHED,
    Config,
    borders_of,
    chain_of,
    expert_config,
    plan_all,
)
from finectl.training.estimate import measure_training
from finectl.training.settings import TrainSettings, data_options, describe_settings, settings_of

if TYPE_CHECKING:
    from finectl.training.consistency import Consistency

SEED_STEP = 1_000_003
"""Between the seeds of one range and the next: the same draws would give the experts' differences much in common."""


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
    """Resolve the options of one expert, as `plan_all` and `plan_of_range` say.

    Raises:
        InputError: the bank is of another model.
    """
    plan = plan_of_range(plan_all(config, parents[0]), config.only or 0)
    if len(parents) == 1:
        return plan
    require_bank_of(parents[1], parents[0])
    return replace(plan, config=replace(plan.config, bank=str(parents[1].path.absolute())))


def expert_settings(config: Config) -> TrainSettings:
    """Return how one expert is trained: each with draws of its own, the first with those of `--seed`."""
    return replace(settings_of(config), seed=config.seed + SEED_STEP * (config.only or 0))


def run_expert(job: Job[Config]) -> Outcome:
    """Fine-tune the model on one range and write its raw and EMA weights."""
    from finectl.data.dataset import load
    from finectl.metrics.heldout_loss import heldout_evaluator
    from finectl.training.batches import Retained
    from finectl.training.consistency import Consistency
    from finectl.training.device import resolve_device
    from finectl.training.loop import fit
    from finectl.training.retention import ChainLoss, ChainTimesteps
    from finectl.training.run import Loss, Timesteps, plain_loss
    from finectl.training.texts import conditioned
    from finectl.training.timesteps import RangeTimesteps

    config, base = job.config, job.parents[0]
    original = read_config(base)
    target = expert_config(original, config.projection)
    borders = borders_of(config)
    first, end = range_of(borders, config.only or 0)
    weights = load_weights(base, config.weights)  # theta_0

    train = load(config.data or "", "train", config.image_size, data_options(config, job))
    student: Any = build_model(target)
    student.load_state_dict({**identity_state(target), **weights})
    device = resolve_device(job.execution.device, job.world.local_rank)
    settings = expert_settings(config)
    loss: Loss = plain_loss
    if config.consistency:
        teacher: Any = build_model(original)  # without projections
        teacher.load_state_dict(weights)
        if job.execution.compile:
            teacher.compile()
        loss = consistency(config, teacher.to(device), updates_an_epoch=-(-len(train) // settings.batch_size))
    held = load(config.data or "", "heldout", config.image_size, data_options(config, job))
    models = [student, *([loss.teacher] if isinstance(loss, Consistency) else [])]
    train, held = conditioned(job, models, train, held, dropout=config.caption_dropout)
    timesteps: Timesteps = RangeTimesteps(first, end, config.p, config.coin, config.antithetic)
    retained, chain = None, chain_of(config)
    if chain is not None:
        retained = Retained(open_bank(_bank(job), student.config.num_classes), chain.retained)
        loss, timesteps = ChainLoss(chain), ChainTimesteps(chain, timesteps)
    trained = fit(
        job,
        student,
        train,
        settings,
        heldout=heldout_evaluator(held, device, diffusion=target.diffusion),
        loss=loss,
        timesteps=timesteps,
        retained=retained,
    )
    if isinstance(loss, Consistency):
        loss.require_unchanged()
    if job.world.leads:
        save_model(job.directory, target, trained.state, trained.ema)
    metrics = {"index": config.only, "range": [first, end], "borders": list(borders)}
    return Outcome(metrics={**metrics, "parameters": total_parameters(target)}, cost=trained.cost)


def _bank(job: Job[Config]) -> Artifact:
    """Return the bank of the model.

    Raises:
        InputError: there is none.
    """
    if len(job.parents) == 1:
        base = job.parents[0].path
        raise InputError(
            f"--method {DIFF_TUNING} of {base} needs its bank", expected="--bank ARTIFACT", fix=f"finectl bank {base}"
        )
    return job.parents[1]


def consistency(config: Config, teacher: Any, *, updates_an_epoch: int) -> Consistency:
    """Return the loss that `--consistency` and `--teacher` ask for."""
    from finectl.training.consistency import Consistency, RefreshedConsistency

    weight = config.consistency or 0.0
    if config.teacher == REFRESHED:
        return RefreshedConsistency(teacher, weight, updates_an_epoch)
    return Consistency(teacher, weight)


def measure(plan: Plan[Config], parents: Sequence[Artifact], execution: Execution) -> dict[str, Any]:
    """Time a step, the teacher's part in it included, for `--dry-run`."""
    original = read_config(parents[0])
    target = expert_config(original, plan.config.projection)
    teacher = original if plan.config.consistency else None
    return measure_training(target, settings_of(plan.config), execution, teacher=teacher)
