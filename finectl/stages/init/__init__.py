"""Init: a dense model of any depth, by one of the methods in `finectl.initializers`, or a UNet at random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from finectl.artifacts.job import Job, Outcome, Plan, Reads, Stage
from finectl.artifacts.lineage import trace, whole_cost
from finectl.artifacts.store import Artifact, Workspace
from finectl.data.classes import have_same_labels
from finectl.data.sources import DataInfo
from finectl.errors import InputError, UsageError
from finectl.initializers import METHODS, PAPER_TUNE_STEPS, SMALL_TUNE_STEPS, Method
from finectl.initializers.generated import plan_generated
from finectl.models.io import read_dit_config, save_model
from finectl.models.learngene import dense_config, require_condensed_by, sigma_rule
from finectl.models.presets import DiTConfig, count_parameters, family_name, preset
from finectl.models.unet_presets import is_unet
from finectl.stages.init.config import UNREAD, Config, changed_constants, constants_of, variant_of
from finectl.stages.init.unet import plan_unet, require_unet_options, run_unet, text_encoder_of
from finectl.training.process import of_process
from finectl.training.settings import PAPER, SMALL, resolve_data
from finectl.training.text_settings import unchanged

FITTED_RULE = "nearest"
"""How sigma is read of models that `condense --from` made, and of no others."""
# What `train` does where nothing is said: the budget of a pre-training whose ancestor is not there.
SMALL_WHOLE_STEPS = 600
PAPER_WHOLE_STEPS = 10_000
TUNE_PERCENT = 5
LEAST_TUNE_SAMPLES = 256
GENERATOR = "weight-generator"


def reads(config: Config) -> Reads | None:
    """Return what the method starts from; with `--model`, one that takes nothing from INPUT needs none.

    Raises:
        UsageError: there is no such method, or `--model` goes with one that takes its shapes from its input.
    """
    method = METHODS[config.method]  # an unknown name is an error here
    if config.sigma_from is not None:
        return reads_generator(config, method)
    if config.prompt is not None:
        raise UsageError("--prompt is for generated sigma, and no --sigma-from is given", fix="leave --prompt out")
    if config.model is None:
        return Reads("source", method.sources)
    if is_unet(config.model):
        require_unet_options(config)
        return None
    if not method.widths:
        raise UsageError(
            f"--model {config.model} does not go with --method {config.method}, which takes its shapes from INPUT",
            fix="leave --model out",
        )
    return None if method.anew else Reads("source", method.sources)


def reads_generator(config: Config, method: Method) -> Reads:
    """Return what is read where sigma are generated: a learngene, and the generator.

    Raises:
        UsageError: the method reads no sigma of a learngene.
    """
    if "sigma" not in method.options or method.condensed != "fine" or is_unet(config.model):
        raise UsageError(
            f"--sigma-from does not go with --method {config.method}", expected="--method fine", fix="--method fine"
        )
    generator = Reads("generator", (GENERATOR,), named=(cast(str, config.sigma_from),))
    return Reads("source", method.sources, also=(generator,))


def plan(config: Config, parents: Sequence[Artifact]) -> Plan[Config]:
    """Resolve the options against the source and the target data.

    Raises:
        UsageError: the preset or the patch does not fit the data.
        InputError: the data set is missing or empty, or has fewer images than are to be tuned on.
    """
    if is_unet(config.model):
        return plan_unet(config)
    if config.sigma_from is None:
        text_encoder_of(config)  # none goes with these
    source = read_dit_config(parents[0]) if parents else None
    data, fields = resolve_data(config, parents, source.image_size if source and config.data is None else None)
    target = architecture(config, source, data)
    if architecture(replace(config, process=None), source, data) == target:
        config = replace(config, process=None)
    usual_batch = int((SMALL if data.bundled else PAPER)["batch_size"])
    method = METHODS[config.method]
    if source is not None:
        method.require_fit(source, target)
    if method.fitted and parents:
        require_fitted(parents[0])
    if parents and parents[0].kind == "learngene" and method.condensed:
        require_condensed_by(parents[0], method.condensed)
    part = data.train_count if method.whole_data else max(LEAST_TUNE_SAMPLES, data.train_count * TUNE_PERCENT // 100)
    steps = default_tune_steps(method, parents[0] if parents else None, data.bundled)
    resolved = replace(
        config,
        depth=target.depth,
        variant=variant_of(config),
        set=changed_constants(config),
        **fields,
        tune_steps=steps if config.tune_steps is None else config.tune_steps,
        sigma=config.sigma or (sigma_rule(parents[0].manifest) if parents else None),
        tune_samples=config.tune_samples or min(part, data.train_count),
        batch_size=config.batch_size or usual_batch,
        width_map=config.width_map if source is not None and widths_of(source) != widths_of(target) else "rows",
    )
    # What the method does not read does not make another artifact.
    read = method.options_of(resolved.variant)
    resolved = replace(resolved, **{name: value for name, value in UNREAD.items() if name not in read})
    notes: tuple[str, ...] = ()
    if parents and parents[-1].kind == GENERATOR:
        given, notes = plan_generated(config, parents[0], parents[-1], target)
        resolved = replace(resolved, **given)
    parameters = count_parameters(target)["total"]
    named = [config.method, *([resolved.variant] if resolved.variant in method.variants[1:] else [])]
    return Plan(
        resolved,
        slug="-".join([family_name(target).replace("/", "-"), *named, f"l{target.depth}"]),
        data=data,
        summary={"parameters": parameters, "disk_bytes": 4 * parameters},
        notes=notes,
    )


def widths_of(config: DiTConfig) -> tuple[int, int, int]:
    """Return what decides how many channels there are of each kind."""
    return config.width, config.heads, config.mlp_ratio


def default_tune_steps(method: Method, source: Artifact | None, bundled: bool) -> int:
    """Return the updates of `--tune-steps` where it is left out.

    A method that is given a share of its ancestor's budget gets that of all updates that went into INPUT. Where they
    are not known, a whole budget is what `train` does, and a part of one is the few updates of other methods.
    """
    cost = trace_cost(source) if method.tune_share and source is not None else {}
    if cost.get("steps"):
        return max(1, round(method.tune_share * cost["steps"]))
    if method.tune_share == 1:
        return SMALL_WHOLE_STEPS if bundled else PAPER_WHOLE_STEPS
    return SMALL_TUNE_STEPS if bundled else PAPER_TUNE_STEPS


def trace_cost(source: Artifact) -> dict[str, Any]:
    """Return what an artifact and all that it was made from cost; its own cost where a parent is gone."""
    home = Workspace(source.path.absolute().parent.parent)
    return whole_cost(trace(home, source)) or source.manifest.cost


def require_fitted(source: Artifact) -> None:
    """Check that a learngene is that of a dense ancestor.

    Raises:
        InputError: it was pre-trained as a condensed model.
    """
    if sigma_rule(source.manifest) != FITTED_RULE:
        raise InputError(
            f"{source.path} was not fitted to a dense ancestor",
            expected="the learngene of a condensed model that condense --from made",
            fix="finectl condense --from MODEL | finectl extract -; or --method fine, which takes this one",
        )


def architecture(config: Config, source: DiTConfig | None, data: DataInfo) -> DiTConfig:
    """Return the dense target: the shapes of the source or of `--model`, with the data's images and classes."""
    given: dict[str, Any] = {"image_size": data.image_size, "channels": data.channels, "num_classes": data.num_classes}
    if config.model is None and source is not None:
        shapes = replace(dense_config(source, config.depth or source.depth), **given)
        return of_process(shapes, config.process, data)
    shapes = preset(cast(str, config.model), depth=config.depth, **given)
    if source is None:
        return of_process(shapes, config.process, data)
    # Another width, and all else as the source has it: what is predicted, from which noise, with which frequencies.
    sizes: dict[str, Any] = {name: getattr(shapes, name) for name in ("width", "depth", "heads", "patch_size")}
    return of_process(replace(dense_config(source, shapes.depth), **given, **sizes), config.process, data)


def run(job: Job[Config]) -> Outcome:
    """Initialise the model with the chosen method and write it."""
    from finectl.initializers.base import Initialized, Request

    config = job.config
    data = cast(DataInfo, job.data)
    if is_unet(config.model):
        return run_unet(job)
    source = job.parents[0] if job.parents else None
    target = architecture(config, read_dit_config(source) if source else None, data)
    same_labels = source is not None and have_same_labels(source.manifest.data, data)
    made: Initialized = METHODS.load(config.method)(
        Request(target, data, same_labels, source, job, constants_of(config))
    )
    if not job.world.leads:
        return Outcome()
    save_model(job.directory, target, made.state)
    with_embedders = made.transferred + made.transferred_embedders
    job.console.note(
        f"{config.method}, depth {target.depth}: {made.transferred:,} parameters transferred "
        f"({with_embedders:,} with embedders and final layer)"
    )
    return Outcome(
        metrics={
            "method": config.method,
            "depth": target.depth,
            "parameters": count_parameters(target)["total"],
            "parameters_transferred": made.transferred,
            "parameters_transferred_with_embedders": with_embedders,
        },
        cost=made.cost,
    )


STAGE = Stage(
    name="init",
    version=1,
    makes="model",
    config=Config,
    reads=reads,
    plan=plan,
    run=run,
    locations=("data", "text_encoder", "sigma_from"),
    unchanged_at={**unchanged("text_digest"), "prompt": None, "process": None},
    shares_work=True,
)
