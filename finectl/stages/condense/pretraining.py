"""Condense by pre-training: a DiT whose layers share parameters is trained with the plain denoising loss.

The gradient reaches what is shared (U and V) and what a layer has of its own (sigma), never a free W. What the layers
have in common gathers in what they share. With a teacher, the loss of the first `--distill-steps` updates, all by
default, is the distance from the teacher's prediction instead.

Reference: FINE, arXiv 2409.19289, section 3.2, Eq. 3; the teacher: arXiv 2312.05614 and arXiv 2406.17503.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from finectl.artifacts.job import Job, Outcome, Plan
from finectl.artifacts.store import Artifact
from finectl.data.sources import DataInfo
from finectl.errors import UsageError
from finectl.models.io import read_config, require_class_conditional
from finectl.models.presets import DiTConfig, count_parameters, preset
from finectl.stages.condense.config import Config, groups_of, parameter_counts, resolved_tying, tying_of
from finectl.training.estimate import training_estimate
from finectl.training.settings import (
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
DEFAULT_MODEL = "dit-nano"
DEFAULT_DIVISOR = 128


def plan_pretraining(config: Config, parents: Sequence[Artifact]) -> Plan[Config]:
    """Resolve the options against the preset, the data set and the teacher, if there is one.

    Raises:
        UsageError: the preset, a type, the rank or the patch does not fit, or an option does not go with the method.
        InputError: the data set is missing or empty, or the teacher does not take it.
    """
    config = without_ancestor(config)
    teacher = read_config(parents[0]) if parents else None
    data, fields = resolve_data(config, parents, teacher.image_size if teacher and config.data is None else None)
    model = architecture(config, data, parents)
    settings = resolve_settings(config, data.bundled, small=SMALL, paper=PAPER)
    sigma_lr = settings["lr"] * (SMALL_SIGMA_FACTOR if data.bundled else 1.0)
    own = config.method in ("fine", "wave")
    if config.sigma_lr is not None and not own:
        raise UsageError(f"--sigma-lr does not go with --method {config.method}", fix="leave --sigma-lr out")
    resolved = replace(
        config,
        depth=model.depth,
        **resolved_tying(config, model),
        sigma_lr=(sigma_lr if config.sigma_lr is None else config.sigma_lr) if own else None,
        distill=str(parents[0].path.resolve()) if parents else None,
        distill_steps=distilled_updates(config, settings["steps"]),
        **fields,
        **settings,
    )
    notes: tuple[str, ...] = ()
    if config.data is None and not parents:
        notes = (f"no --data: training on the bundled {data.name} with {describe_settings(settings_of(resolved))}",)
    form = f"r{resolved.rank}" if config.method == "fine" else config.method
    return Plan(
        resolved,
        slug=f"{cast(str, config.model).replace('/', '-')}-l{model.depth}-{form}",
        data=data,
        summary={**training_estimate(model, settings_of(resolved)), **parameter_counts(model)},
        notes=notes,
    )


def architecture(config: Config, data: DataInfo, parents: Sequence[Artifact]) -> DiTConfig:
    """Return the condensed model's architecture on a data set; with a teacher it predicts what that does.

    Raises:
        UsageError: the preset, a type, the rank or the patch does not fit.
        InputError: the teacher does not take the data, or is conditioned on text.
    """
    dense = preset(
        cast(str, config.model),
        image_size=data.image_size,
        channels=data.channels,
        num_classes=data.num_classes,
        depth=config.depth,
        learn_sigma=config.learn_sigma,
    )
    if parents:
        teacher = require_class_conditional(parents[0])
        require_fit(parents[0], data)
        if teacher.out_channels != dense.out_channels:
            raise UsageError(
                f"the teacher predicts {teacher.out_channels} channels and this model {dense.out_channels}",
                fix="--no-learn-sigma" if dense.learn_sigma else "--learn-sigma",
            )
        dense = replace(dense, diffusion=teacher.diffusion)
    return replace(dense, factorized=tying_of(config, dense), frequency_divisor=config.frequency_divisor)


def distilled_updates(config: Config, steps: int) -> int:
    """Return how many updates imitate the teacher: none without one, else all where `--distill-steps` does not say.

    Raises:
        UsageError: more are asked for than there are updates.
    """
    if config.distill is None:
        return 0
    wanted = steps if config.distill_steps is None else config.distill_steps
    if wanted > steps:
        raise UsageError(f"--distill-steps {wanted} is above --steps {steps}", expected=f"at most {steps}")
    return wanted


def without_ancestor(config: Config) -> Config:
    """Return the configuration of a run from scratch, in which the options of `--from` are not read.

    Raises:
        UsageError: one of them was given, or there are no steps.
    """
    if config.distill_steps and config.distill is None:
        raise UsageError("--distill-steps needs a model to distil from", fix="--distill TEACHER, or --from MODEL")
    if config.steps == 0:
        raise UsageError("--steps 0 would leave the factors at random", expected="x>=1, or --from MODEL")
    return replace(config, model=config.model or DEFAULT_MODEL, cp_weighting="none", cp_iterations=0)


def run_pretraining(job: Job[Config]) -> Outcome:
    """Train the condensed model and write its raw and EMA weights."""
    from finectl.data.dataset import load
    from finectl.diffusion.random import generator_for
    from finectl.metrics.heldout_loss import heldout_evaluator
    from finectl.models.dit import DiT, initialize_
    from finectl.models.io import load_model, save_model
    from finectl.training.device import resolve_device
    from finectl.training.distill import Distillation
    from finectl.training.loop import fit
    from finectl.training.run import Loss, plain_loss

    config = job.config
    model_config = architecture(config, cast(DataInfo, job.data), job.parents)
    device = resolve_device(job.execution.device, job.world.local_rank)
    model = initialize_(DiT(model_config), generator_for("condense", config.seed))
    train = load(config.data or "", "train", config.image_size, data_options(config, job))
    held = load(config.data or "", "heldout", config.image_size, data_options(config, job))
    heldout = heldout_evaluator(held, device, diffusion=model_config.diffusion)
    loss: Loss = plain_loss
    if job.parents and config.distill_steps:
        teacher = load_model(job.parents[0]).to(device)
        loss = Distillation(teacher, model, config.distill_steps, config.seed, depths=False)
    trained = fit(job, model, train, settings_of(config), groups=groups_of(model, config), heldout=heldout, loss=loss)
    if job.world.leads:
        save_model(job.directory, model_config, trained.state, trained.ema)
    counts = count_parameters(model_config)
    return Outcome(metrics={"parameters": counts["total"], "parameters_shared": counts["factors"]}, cost=trained.cost)
