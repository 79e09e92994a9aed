"""What experts of timestep ranges have in common: options, ranges, architecture and plan."""

from __future__ import annotations

from dataclasses import dataclass, replace

from finectl.adapters.projection import add_projections
from finectl.artifacts.job import Plan
from finectl.artifacts.store import Artifact
from finectl.diffusion.ranges import equal_borders, parse_borders
from finectl.errors import UsageError
from finectl.models.io import ModelConfig, read_config, total_parameters
from finectl.models.presets import DiTConfig
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
LOCATIONS = ("data", "text_encoder")
UNCHANGED_AT: dict[str, object] = {"teacher": "frozen", **unchanged("text_digest", "caption_dropout")}


@dataclass(frozen=True)
class Config(DataFields, TrainFields, OptimiserFields, CaptionFields):
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
    teacher: str = "frozen"


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
    slug = f"{base.name.rsplit('-', 1)[0]}-r{len(borders) - 1}-t{settings.steps}"
    teacher = model if config.consistency else None
    estimate = training_estimate(expert_config(model, config.projection), settings, teacher=teacher)
    if config.teacher == REFRESHED:  # its state saves the teacher, too
        estimate["disk_bytes"] += BYTES * total_parameters(model)
    return Plan(resolved, slug, data, estimate)


def borders_of(config: Config) -> tuple[int, ...]:
    """Return the borders of a resolved configuration."""
    return tuple(int(border) for border in (config.borders or "").split(","))
