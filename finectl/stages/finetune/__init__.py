"""Finetune: a model on other data, in its own classes, without forgetting what it knows.

Diff-Tuning mixes two sets in every batch: images of the pre-trained model itself (`finectl bank`), under no class
(`--bank-labels own`: under theirs, which is ours), which are learned again mostly at low noise, and those of the
target, mostly at high noise. Plain fine-tuning sees the target alone, at all timesteps alike. Either may train all
parameters or few of them (`--peft`).

`config.py` holds the options, `plan.py` what they come to, this file the run.

Reference: Diff-Tuning, arXiv 2406.00773.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from finectl.artifacts.job import Job, Outcome, Reads, Stage
from finectl.data.bank import KIND as BANK
from finectl.data.bank import open_bank
from finectl.errors import InputError
from finectl.models.io import ModelConfig, build_model, load_weights, read_config, save_model
from finectl.models.label_rows import relabelled
from finectl.stages.finetune.config import LOCATIONS, OWN, UNCHANGED, Config, peft_of
from finectl.stages.finetune.plan import description, measure, plan, student_config
from finectl.training.chain_settings import KD, chain_of
from finectl.training.settings import data_options, settings_of

if TYPE_CHECKING:
    from finectl.data.dataset import ImageSet
    from finectl.training.batches import Retained
    from finectl.training.chain import Chain


def run(job: Job[Config]) -> Outcome:
    """Fine-tune the model and write its raw and EMA weights, and what `--peft` trained apart from them."""
    from finectl.adapters.peft.table import result_config
    from finectl.adapters.peft.tuning import tune
    from finectl.data.dataset import load
    from finectl.metrics.heldout_loss import heldout_evaluator
    from finectl.training.device import resolve_device
    from finectl.training.loop import fit
    from finectl.training.retention import ChainLoss, ChainTimesteps
    from finectl.training.run import Loss, Timesteps, plain_loss, uniform_timesteps
    from finectl.training.texts import conditioned

    config, base = job.config, job.parents[0]
    train = load(config.data or "", "train", config.image_size, data_options(config, job))
    if config.shots:
        train = train.few(config.shots, config.seed)
    held = load(config.data or "", "heldout", config.image_size, data_options(config, job))

    target = student_config(config, read_config(base), train.info.num_classes)
    student, teacher = _networks(job, target)
    tuning = tune(student, peft_of(config), config.seed)
    device = resolve_device(job.execution.device, job.world.local_rank)
    if teacher is not None:
        teacher.to(device)
    models = [student] if teacher is None else [student, teacher]
    train, held = conditioned(job, models, train, held, dropout=config.caption_dropout)

    chain = chain_of(config, config.batch_size or 0)
    loss: Loss = plain_loss
    timesteps: Timesteps = uniform_timesteps
    if chain:
        loss, timesteps = ChainLoss(chain, teacher), ChainTimesteps(chain)
    trained = fit(
        job,
        student,
        train,
        settings_of(config),
        heldout=heldout_evaluator(held, device, diffusion=target.diffusion),
        loss=loss,
        timesteps=timesteps,
        retained=_retained(job, chain, train, student.config.num_classes),
    )
    if isinstance(loss, ChainLoss):
        loss.require_unchanged()
    if job.world.leads:
        averages = tuning.result_state(trained.ema)
        save_model(job.directory, result_config(target, tuning.peft), tuning.result_state(trained.state), averages)
        if tuning.peft:
            tuning.save_adapter(job.directory / "adapter", trained.ema, base.name)
    return Outcome(metrics=description(config, job.parents, target), cost=trained.cost)


def _networks(job: Job[Config], target: ModelConfig) -> tuple[Any, Any | None]:
    """Return the pre-trained model with the target's label table, and as it came where its predictions are retained."""
    config, original = job.config, read_config(job.parents[0])
    weights = load_weights(job.parents[0], config.weights)
    student: Any = build_model(target)
    rows = config.label_rows
    student.load_state_dict(relabelled(weights, original, target, rows, config.seed) if rows else weights)
    if config.retention != KD:
        return student, None
    teacher: Any = build_model(original)
    teacher.load_state_dict(weights)
    if job.execution.compile:
        teacher.compile()
    return student, teacher


def _retained(job: Job[Config], chain: Chain | None, train: ImageSet, null_label: int) -> Retained | None:
    """Return the images that a batch retains: the bank's, or without one those of the target, which have no class then.

    Raises:
        InputError: there is no bank.
    """
    import torch

    from finectl.training.batches import Retained

    if chain is None or not chain.retained:
        return None
    if len(job.parents) > 1:
        own = job.config.bank_labels == OWN
        return Retained(open_bank(job.parents[1], None if own else null_label), chain.retained)
    if job.config.retention != KD:
        raise InputError(
            f"--retention bank of {job.parents[0].path} needs its bank",
            expected="--bank ARTIFACT",
            fix=f"finectl bank {job.parents[0].path}",
        )
    nothing = torch.full_like(train.store.labels, null_label)
    return Retained(replace(train, rows=nothing), chain.retained)


def reads(config: Config) -> Reads:
    """Return what is read: the model, and the bank where one is named."""
    bank = (Reads(BANK, (BANK,), named=(config.bank,)),) if config.bank is not None else ()
    return Reads("model", ("model",), also=bank)


STAGE = Stage(
    name="finetune",
    version=1,
    makes="model",
    config=Config,
    reads=reads,
    plan=plan,
    run=run,
    locations=LOCATIONS,
    shares_work=True,
    unchanged_at=UNCHANGED,
    measure=measure,
)
