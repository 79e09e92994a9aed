"""What experts of timestep ranges have in common: options, ranges, architecture and plan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from finectl.adapters.projection import add_projections
from finectl.artifacts.job import Plan
from finectl.artifacts.store import Artifact
from finectl.diffusion.ranges import equal_borders, parse_borders
from finectl.errors import UsageError
from finectl.models.io import ModelConfig, read_config, total_parameters
from finectl.models.presets import DiTConfig
from finectl.training.chain import SAMPLING, SHARE, WEIGHT, Chain, retained_of
from finectl.training.chain_settings import POWER
from finectl.training.estimate import BYTES, training_estimate
from finectl.training.settings import (
    DataFields,
    OptimiserFields,
    TrainFields,
    require_fit,
    resolve_settings,
    settings_of,
    settled_betas,
)
from finectl.training.text_settings import CaptionFields, resolve_captioned, unchanged

NAME = "finetune-ranges"
RANGES = 4
SMALL = {"steps": 300, "batch_size": 64, "lr": 5e-4, "ema": 0.9999, "warmup_steps": 0}
PAPER = {"steps": 20_000, "batch_size": 64, "lr": 5e-5}
REFRESHED = "refreshed"
DEME, DIFF_TUNING = "deme", "diff-tuning"
CONSISTENCY = 1.0
LOCATIONS = ("data", "text_encoder", "bank")
UNCHANGED_AT: dict[str, object] = {
    "teacher": "frozen",
    "method": DEME,
    "retention_power": None,
    "retention_weight": None,
    "retention_share": None,
    **unchanged("text_digest", "caption_dropout"),
}
OF_RETENTION = ("retention_power", "retention_weight", "retention_share", "bank")


@dataclass(frozen=True)
class Config(DataFields, TrainFields, OptimiserFields, CaptionFields):
    """The options of `finectl finetune-ranges`; None is a default that depends on the data."""

    weights: str
    ranges: int | None
    borders: str | None
    p: float
    coin: str
    antithetic: bool
    consistency: float | None
    projection: str
    only: int | None = None
    teacher: str = "frozen"
    method: str = DEME
    retention_power: float | None = None
    retention_weight: float | None = None
    retention_share: float | None = None
    bank: str | None = None


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
        InputError: the data does not fit the model; for one of text, captions or the text encoder are missing.
    """
    model = read_config(base)
    config = replace(config, **resolve_retention(config, model))
    if config.teacher == REFRESHED and not config.consistency:
        raise UsageError("--teacher refreshed with --consistency 0: there is no teacher", expected="one of them")
    borders = resolve_borders(config, model.diffusion.timesteps)
    data, fields = resolve_captioned(config, [base], model, model.image_size)
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
    chain_of(resolved)  # the batch has room for what is retained
    slug = f"{base.name.rsplit('-', 1)[0]}-r{len(borders) - 1}-t{settings.steps}"
    teacher = model if config.consistency else None
    estimate = training_estimate(expert_config(model, config.projection), settings, teacher=teacher)
    if config.teacher == REFRESHED:  # its state saves the teacher, too
        estimate["disk_bytes"] += BYTES * total_parameters(model)
    return Plan(resolved, slug, data, estimate)


def resolve_retention(config: Config, model: ModelConfig) -> dict[str, Any]:
    """Return the options of the method, resolved: what an expert is held to is the model's predictions or its images.

    Raises:
        UsageError: an option is given that the method does not use, or the model has no null class to retain under.
    """
    if config.method == DEME:
        for name in OF_RETENTION:
            if (value := getattr(config, name)) is not None:
                option = f"--{name.replace('_', '-')}"
                raise UsageError(
                    f"{option} {value} with --method {DEME}, which retains no images", fix=f"--method {DIFF_TUNING}"
                )
        return {"consistency": CONSISTENCY if config.consistency is None else config.consistency}
    if config.consistency:
        raise UsageError(
            f"--consistency {config.consistency:g} with --method {DIFF_TUNING}, which retains images instead",
            fix="leave --consistency out",
        )
    if model.num_classes and not model.has_null_class:
        raise UsageError(
            f"--method {DIFF_TUNING} retains images under no class, and the model has {model.num_classes} classes only",
            expected="a model with a null class, or without classes",
            fix=f"--method {DEME}; or, if the last row of its table is the null class, import it again with "
            "--num-classes",
        )
    return {
        "consistency": 0.0,
        "retention_power": POWER if config.retention_power is None else config.retention_power,
        "retention_weight": WEIGHT[SAMPLING] if config.retention_weight is None else config.retention_weight,
        "retention_share": SHARE if config.retention_share is None else config.retention_share,
    }


def chain_of(config: Config) -> Chain | None:
    """Return how retained images share a batch under resolved options; None where there are none.

    Raises:
        UsageError: the batch leaves no image to retain.
    """
    if config.retention_share is None or config.retention_power is None or config.retention_weight is None:
        return None
    batch = config.batch_size or 0
    kept = retained_of(batch, config.retention_share)
    return Chain(batch, kept, retention_power=config.retention_power, weight=config.retention_weight)


def borders_of(config: Config) -> tuple[int, ...]:
    """Return the borders of a resolved configuration."""
    return tuple(int(border) for border in (config.borders or "").split(","))
