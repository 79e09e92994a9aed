"""Init: a dense model of any depth, by one of the methods in `finectl.initializers`, or a UNet at random."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from finectl.artifacts.job import Job, Outcome, Plan, Reads, Stage
from finectl.artifacts.lineage import trace, whole_cost
from finectl.artifacts.store import Artifact, Workspace
from finectl.data.captions import ALL, NONE
from finectl.data.classes import have_same_labels
from finectl.data.sources import DataInfo
from finectl.errors import InputError, UsageError
from finectl.initializers import METHODS, PAPER_TUNE_STEPS, SMALL_TUNE_STEPS, Method
from finectl.initializers.generated import plan_generated
from finectl.models.io import read_dit_config, save_model, total_parameters
from finectl.models.learngene import dense_config, require_condensed_by, sigma_rule
from finectl.models.presets import DiTConfig, count_parameters, family_name, preset
from finectl.models.text import describe_text
from finectl.models.text.clip import MENDING
from finectl.models.unet_presets import TEXT_PRESETS, is_text_unet, is_unet
from finectl.registry import nearest
from finectl.training.process import of_process, unet_for
from finectl.training.settings import PAPER, SMALL, DataFields, resolve_data
from finectl.training.text_settings import TextFields, unchanged

FITTED_RULE = "nearest"
"""How sigma is read of models that `condense --from` made, and of no others."""
# What `train` does where nothing is said: the budget of a pre-training whose ancestor is not there.
SMALL_WHOLE_STEPS = 600
PAPER_WHOLE_STEPS = 10_000
TUNE_PERCENT = 5
LEAST_TUNE_SAMPLES = 256
GENERATOR = "weight-generator"
UNET_METHOD = "he"
"""The one method that makes a UNet."""
# Options that only some methods read, and what they are for the others.
UNREAD: dict[str, Any] = {
    "sigma": "random",
    "depth_scale": 0.0,
    "tune_steps": 0,
    "tune_samples": None,
    "tune_lr": 0.0,
    "tune_biases": False,
    "width_map": "rows",
    "flip": False,
    "batch_size": None,
}


@dataclass(frozen=True)
class Config(DataFields, TextFields):
    """The options of `finectl init`; None is a default that depends on the input or the data."""

    method: str
    variant: str | None
    set: str | None
    depth: int | None
    model: str | None
    sigma: str | None
    depth_scale: float
    tune_steps: int | None
    tune_samples: int | None
    tune_lr: float
    tune_biases: bool
    width_map: str
    flip: bool
    batch_size: int | None
    seed: int
    sigma_from: str | None = None
    prompt: str | None = None
    process: str | None = None


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


def require_unet_options(config: Config) -> None:
    """Check that nothing is asked of a UNet that only a Diffusion Transformer has.

    Raises:
        UsageError: the method needs equal layers, or an option goes with such methods.
    """
    if config.method != UNET_METHOD:
        raise UsageError(
            f"--model {config.model} does not go with --method {config.method}, which works on the equal layers of a "
            "Diffusion Transformer",
            expected=f"--method {UNET_METHOD}, diffusers' own random initialisation",
            fix=f"finectl init --method {UNET_METHOD} --model {config.model}",
        )
    for name in ("variant", "depth", "set"):
        if getattr(config, name) is not None:
            raise UsageError(f"--{name} does not go with --model {config.model}, a UNet", fix=f"leave --{name} out")


def variant_of(config: Config) -> str | None:
    """Return the variant of the method, the usual one where none is named.

    Raises:
        UsageError: the method has no such variant.
    """
    known = METHODS[config.method].variants
    if config.variant is None:
        return known[0] if known else None
    if config.variant not in known:
        raise UsageError(
            f"--method {config.method} has no variant {config.variant!r}{nearest(config.variant, list(known))}",
            expected=f"one of: {', '.join(known)}" if known else "no --variant",
        )
    return config.variant


def constants_of(config: Config) -> dict[str, float]:
    """Return the numbers in the method's definition, with what `--set` changes.

    Raises:
        UsageError: the method has no such number, or the value is none.
    """
    known = METHODS[config.method].constants_of(variant_of(config))
    given: dict[str, float] = {}
    for part in filter(None, (config.set or "").split(",")):
        name, _, value = (word.strip() for word in part.partition("="))
        if name not in known:
            raise UsageError(
                f"--method {config.method} has no number {name!r} to --set{nearest(name, list(known))}",
                expected=f"one of: {', '.join(known)}" if known else "no --set",
            )
        try:
            given[name] = float(value)
        except ValueError as error:
            raise UsageError(f"--set {part}: {value!r} is no number", expected=f"{name}={known[name]:g}") from error
        if not math.isfinite(given[name]):
            raise UsageError(f"--set {part}: {value!r} is not finite", expected=f"{name}={known[name]:g}")
    return {**known, **given}


def changed_constants(config: Config) -> str | None:
    """Return `--set` in its one way of writing: what differs from the usual values, in the order of the table."""
    usual = METHODS[config.method].constants
    return ",".join(f"{name}={value:g}" for name, value in constants_of(config).items() if value != usual[name]) or None


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


def plan_unet(config: Config) -> Plan[Config]:
    """Resolve the options of a UNet against the target data.

    Raises:
        UsageError: the preset does not fit the data.
        InputError: the data set is missing or empty.
    """
    name = cast(str, config.model).lower()
    record = text_encoder_of(config)
    data, fields = resolve_data(config, (), captions=ALL if record else NONE)
    data = replace(data, text=record)
    target = unet_for(name, data, config.process)
    if unet_for(name, data, None) == target:
        config = replace(config, process=None)
    parameters = total_parameters(target)
    if record is not None:
        fields |= {"text_encoder": record["name"], "text_digest": record["digest"]}
    return Plan(
        replace(config, **fields, **{**UNREAD, "sigma": None}, model=name),
        slug=f"{name}-{config.method}",
        data=data,
        summary={"parameters": parameters, "disk_bytes": 4 * parameters},
    )


def text_encoder_of(config: Config) -> dict[str, Any] | None:
    """Return the text encoder for `--model`, None where that takes no text.

    Raises:
        UsageError: none is named, or one for a model that takes no text.
        InputError: it is not there.
    """
    if is_text_unet(config.model):
        if config.text_encoder is None:
            raise UsageError(f"--model {config.model} is conditioned on text, and no encoder is named", fix=MENDING)
        return describe_text(config.text_encoder, TEXT_PRESETS[cast(str, config.model).lower()].text_width)
    if config.text_encoder is not None:
        raise UsageError(
            f"--text-encoder {config.text_encoder}: no model of text is made",
            expected=f"--model {' or '.join(TEXT_PRESETS)}",
        )
    return None


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


def run_unet(job: Job[Config]) -> Outcome:
    """Draw the weights of a UNet as diffusers does, and write it."""
    from finectl.diffusion.random import generator_for
    from finectl.models.unet import initial_state

    data = cast(DataInfo, job.data)
    target = unet_for(cast(str, job.config.model), data, job.config.process)
    if job.world.leads:
        save_model(job.directory, target, initial_state(target, generator_for("init", job.config.seed)))
    return Outcome(
        metrics={"method": job.config.method, "depth": target.depth, "parameters": total_parameters(target)}
        | dict.fromkeys(("parameters_transferred", "parameters_transferred_with_embedders"), 0)
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
