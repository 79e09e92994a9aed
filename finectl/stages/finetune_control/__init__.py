"""Fine-tune a ControlNet: a branch on a frozen UNet of text learns to obey a control, with Diff-Tuning or without.

The branch starts as a copy of the UNet's first half behind convolutions of zeros. With Diff-Tuning it sees new pairs of
control and image mostly at high noise, and images of the UNet's own mostly at low noise: with the controls that are
measured on them, or with `--bank-control empty`. The paper does not say which; with theirs it obeys sooner.

Reference: Zhang et al., arXiv 2302.05543; Diff-Tuning, arXiv 2406.00773, section 4.2.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from finectl.artifacts.job import Job, Outcome, Stage
from finectl.data.sources import DataInfo
from finectl.errors import InputError
from finectl.models.control_config import KIND
from finectl.models.io import load_any_model, total_parameters
from finectl.stages.finetune_control.config import (
    EXTRACTED,
    LOCATIONS,
    Config,
    control_of,
    measures_of,
    plan,
    reads,
    uses_bank,
)
from finectl.training.chain_settings import KD, chain_of
from finectl.training.settings import data_options, settings_of

if TYPE_CHECKING:
    import torch

    from finectl.data.controls import ControlInfo
    from finectl.data.dataset import ImageSet
    from finectl.models.control import Controlled
    from finectl.models.vae import Vae
    from finectl.training.batches import Retained
    from finectl.training.controls import Pairs
    from finectl.training.run import Loss


def run(job: Job[Config]) -> Outcome:
    """Train the branch and write its raw and EMA weights in diffusers' layout."""
    from finectl.data.dataset import load
    from finectl.metrics.heldout_loss import heldout_evaluator
    from finectl.models.control import Controlled, branch_state, new_branch, rename_kept, save_branch
    from finectl.models.vae import load_vae
    from finectl.stages.finetune_control.validation import Validation
    from finectl.training.consistency import checksum, require_checksum
    from finectl.training.controls import WithoutTexts
    from finectl.training.device import resolve_device
    from finectl.training.loop import Watch, fit
    from finectl.training.retention import ChainTimesteps
    from finectl.training.run import uniform_timesteps

    config, settings = job.config, settings_of(job.config)
    device = resolve_device(job.execution.device, job.world.local_rank)
    options = data_options(config, job)
    train = load(config.data or "", "train", config.image_size, options)
    held = load(config.data or "", "heldout", config.image_size, options)
    info = control_of(config, train.info, options)
    vae = load_vae(config.vae, device) if config.vae else None
    bank = open_bank_of(job)
    pairs = pairs_of(job, train, bank, info, device, vae)

    backbone: Any = load_any_model(job.parents[0], config.weights)
    before = checksum(backbone)
    branch = new_branch(backbone, int(vae.record["downscale"]) if vae else 1, config.seed)
    model = Controlled(backbone, branch, pairs.table).to(device)
    chain = chain_of(config, settings.batch_size)
    loss, retained = loss_of(config, model, pairs, train, bank)
    measures = measures_of(config)
    extractor = (lambda: info.extractor(device)) if measures else None
    validation = Validation.of(job, model, held, extractor, measures, vae) if config.validate_every else None
    trained = fit(
        job,
        model,
        pairs.of(train),
        settings,
        heldout=heldout_evaluator(pairs.of(held), device, diffusion=model.config.diffusion),
        loss=WithoutTexts(loss, pairs.count, settings.batch_size, config.caption_dropout or 0.0, config.seed),
        timesteps=ChainTimesteps(chain) if chain else uniform_timesteps,
        retained=retained,
        watch=Watch(config.validate_every or 1, validation) if validation else None,
        shardable=False,
    )
    require_checksum(backbone, before)
    if not job.world.leads:
        return Outcome()
    save_branch(job.directory, branch, branch_state(trained.state), branch_state(trained.ema))
    rename_kept(job.directory)
    metrics = {**description(config, model), "control": info.to_dict()}
    return Outcome(metrics={**metrics, "validation": validation.reached() if validation else None}, cost=trained.cost)


def description(config: Config, model: Controlled) -> dict[str, Any]:
    """Return what was trained and how, for the manifest."""
    batch = settings_of(config).batch_size
    chain = chain_of(config, batch)
    return {
        "method": config.method,
        "parameters": total_parameters(model.backbone.config),
        "trainable_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "batch": {"retained": chain.retained if chain else 0, "target": chain.new if chain else batch},
        "mean_timestep": chain.mean_timesteps(model.config.diffusion.timesteps) if chain else None,
    }


def open_bank_of(job: Job[Config]) -> ImageSet | None:
    """Return the images of the bank, if one is used.

    Raises:
        InputError: there is no bank.
    """
    from finectl.data.bank import open_bank

    if not uses_bank(job.config):
        return None
    if len(job.parents) < 2:
        raise InputError(
            f"--retention bank of {job.parents[0].path} needs its bank",
            expected="--bank ARTIFACT",
            fix=f"finectl bank {job.parents[0].path}",
        )
    return open_bank(job.parents[1])


def pairs_of(
    job: Job[Config],
    images: ImageSet,
    bank: ImageSet | None,
    info: ControlInfo,
    device: torch.device,
    vae: Vae | None,
) -> Pairs:
    """Return the table of the data's texts and controls, and of those of the bank's images."""
    from finectl.data.bank import bank_prompts
    from finectl.data.captions import captions_of
    from finectl.training.controls import open_controls, pair_up
    from finectl.training.texts import open_table

    config, options = job.config, data_options(job.config, job)
    record = cast(DataInfo, job.data).text or {}
    captions = captions_of(images.info, options, images.store.labels.tolist())
    prompts = () if bank is None else bank_prompts(job.parents[1]) or ("",) * len(bank)
    table = open_table([*captions, *prompts], record, device, job.console, job.stop_if_requested)
    maps = open_controls(job, images, info, options, device, vae)
    again = None
    if bank is not None and config.bank_control == EXTRACTED:
        again = open_controls(job, bank, info, options, device, vae)
    side = images.info.image_size * (int(vae.record["downscale"]) if vae else 1)
    rows, kept = table.rows_of(captions), table.rows_of(prompts) if bank is not None else None
    return pair_up(table, rows, maps, side, kept, again)


def loss_of(
    config: Config, model: Controlled, pairs: Pairs, train: ImageSet, bank: ImageSet | None
) -> tuple[Loss, Retained | None]:
    """Return the loss of each image, and the images that are retained, if any.

    Without a bank (`--retention kd`) they are the training images themselves, and the UNet without its branch teaches.
    """
    import torch

    from finectl.models.control import Uncontrolled
    from finectl.training.batches import Retained
    from finectl.training.retention import ChainLoss
    from finectl.training.run import plain_loss

    chain = chain_of(config, settings_of(config).batch_size)
    if chain is None:
        return plain_loss, None
    if chain.retained and config.retention == KD:
        nothing = torch.full((pairs.count,), pairs.null)
        return ChainLoss(chain, Uncontrolled(model)), Retained(replace(train, rows=nothing), chain.retained)
    if chain.retained and bank is not None:
        return ChainLoss(chain), Retained(replace(bank, rows=pairs.retained), chain.retained)
    return ChainLoss(chain), None


STAGE = Stage(
    name="finetune",
    version=1,
    makes=KIND,
    config=Config,
    reads=reads,
    plan=plan,
    run=run,
    locations=LOCATIONS,
    shares_work=True,
)
