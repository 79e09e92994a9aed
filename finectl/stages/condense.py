"""Condense: factorised pre-training (FINE, phase 1).

A DiT is trained whose matrices of a type all share U and V, W^(l) = U diag(sigma^(l)) V^T, with the plain denoising
loss; the gradient reaches U, V and every sigma, never a free W. What the layers have in common gathers in U and V.

Reference: FINE, arXiv 2409.19289, section 3.2, Eq. 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from finectl.artifacts.job import Job, Outcome, Plan, Stage
from finectl.artifacts.store import Artifact
from finectl.data.sources import DataInfo
from finectl.errors import UsageError
from finectl.models.presets import DiTConfig, FactorConfig, count_parameters, preset
from finectl.training.settings import (
    describe_settings,
    resolve_data,
    resolve_settings,
    settings_of,
    training_estimate,
)

# In a short run the shared factors bear, and need, a higher rate than dense weights. sigma is of scale 1, entries of U
# and V are of scale 1 / sqrt(width), and Adam moves all by about the same: sigma gets a rate of its own.
SMALL = {"steps": 1500, "lr": 4e-3}
SMALL_SIGMA_FACTOR = 5.0
PAPER = {"steps": 30_000}


@dataclass(frozen=True)
class Config:
    """The options of `finectl condense`; None is a default that depends on the model or the data."""

    model: str
    depth: int | None
    factorize: str
    rank: int | None
    overcomplete: bool
    sigma_sharing: int
    learn_sigma: bool
    frequency_divisor: int
    data: str | None
    image_size: int | None
    steps: int | None
    batch_size: int | None
    lr: float | None
    sigma_lr: float | None
    lr_schedule: str
    warmup_steps: int | None
    weight_decay: float
    ema: float | None
    eval_every: int | None
    seed: int


def plan(config: Config, parents: Sequence[Artifact]) -> Plan[Config]:
    """Resolve the options against the preset and the data set.

    Raises:
        UsageError: the preset, a type, the rank or the patch does not fit.
        InputError: the data set is missing or empty.
    """
    data = resolve_data(config.data, config.image_size, ())
    model = architecture(config, data)
    factors = cast(FactorConfig, model.factorized)
    settings = resolve_settings(config, data.bundled, small=SMALL, paper=PAPER)
    sigma_lr = settings["lr"] * (SMALL_SIGMA_FACTOR if data.bundled else 1.0)
    resolved = replace(
        config,
        data=data.name,
        image_size=data.image_size,
        depth=model.depth,
        rank=factors.rank,
        factorize=",".join(factors.types),
        sigma_lr=sigma_lr if config.sigma_lr is None else config.sigma_lr,
        **settings,
    )
    notes: tuple[str, ...] = ()
    if config.data is None:
        notes = (f"no --data: training on the bundled {data.name} with {describe_settings(settings_of(resolved))}",)
    return Plan(
        resolved,
        slug=f"{config.model.replace('/', '-')}-l{model.depth}-r{factors.rank}",
        data=data,
        summary=training_estimate(model, settings_of(resolved)),
        notes=notes,
    )


def architecture(config: Config, data: DataInfo) -> DiTConfig:
    """Return the auxiliary model's architecture on a data set.

    Raises:
        UsageError: the preset, a type, the rank or the patch does not fit.
    """
    dense = preset(
        config.model,
        image_size=data.image_size,
        channels=data.channels,
        num_classes=data.num_classes,
        depth=config.depth,
        learn_sigma=config.learn_sigma,
    )
    rank = config.rank or dense.width
    if rank > dense.width and not config.overcomplete:
        raise UsageError(
            f"--rank {rank} is above the width {dense.width} of {config.model}: the factors would be overcomplete",
            expected=f"a rank of at most {dense.width}",
            fix=f"--rank {dense.width}, or --overcomplete if it is meant",
        )
    types = tuple(part.strip() for part in config.factorize.split(",") if part.strip())
    factors = FactorConfig(types, rank, config.sigma_sharing)
    return replace(dense, factorized=factors, frequency_divisor=config.frequency_divisor)


def run(job: Job[Config]) -> Outcome:
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
    train = load(config.data or "", "train", config.image_size)
    heldout = heldout_evaluator(
        load(config.data or "", "heldout", config.image_size), resolve_device(job.execution.device)
    )
    named = list(model.named_parameters())
    groups: list[dict[str, Any]] = [
        {"params": [parameter for name, parameter in named if not name.endswith(".sigma")]},
        {"params": [parameter for name, parameter in named if name.endswith(".sigma")], "lr": config.sigma_lr},
    ]
    trained = fit(job, model, train, settings_of(config), groups=groups, heldout=heldout)
    save_model(job.directory, model_config, trained.model.state_dict(), trained.ema.state_dict())
    counts = count_parameters(model_config)
    return Outcome(metrics={"parameters": counts["total"], "parameters_shared": counts["factors"]}, cost=trained.cost)


STAGE = Stage(
    name="condense", version=1, makes="condensed", config=Config, reads=lambda config: None, plan=plan, run=run
)
