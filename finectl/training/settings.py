"""What training options become when they are left out: known before torch is imported."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finectl.artifacts.store import Artifact
from finectl.data.sources import DataInfo, describe
from finectl.errors import InputError
from finectl.models.io import read_config
from finectl.models.presets import DiTConfig, count_parameters

DEFAULT_DATA = "digits"


@dataclass(frozen=True)
class TrainSettings:
    """How a model is trained.

    Args:
        steps: Optimiser updates.
        batch_size: Images an update.
        lr: Learning rate of AdamW.
        lr_schedule: `constant`, or `cosine` down to 0.
        warmup_steps: Updates over which the learning rate rises to `lr`; Adam's first steps, of full size in every
            weight, would else undo what a good initialisation holds.
        weight_decay: Decoupled weight decay.
        ema: Decay of the exponential moving average, in [0, 1].
        eval_every: Held-out loss every so many updates; 0 never.
        seed: Seed of the data order and of every draw.
    """

    steps: int
    batch_size: int
    lr: float
    lr_schedule: str
    warmup_steps: int
    weight_decay: float
    ema: float
    eval_every: int
    seed: int


# Bundled sets are small enough for a laptop; other data gets the papers' settings (FINE, arXiv 2409.19289, section 4).
SMALL = {"batch_size": 128, "lr": 1e-3, "ema": 0.99, "warmup_steps": 100}
PAPER = {"batch_size": 256, "lr": 1e-4, "ema": 0.9999, "warmup_steps": 0}


def resolve_settings(config: Any, bundled: bool, *, small: dict[str, Any], paper: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a stage's configuration that were left out, for this kind of data.

    Args:
        config: A dataclass with the fields of `TrainSettings`, None where an option was left out.
        bundled: Whether the data set is one of the small bundled ones.
        small: The stage's own defaults on bundled data, `steps` at least, over those of `SMALL`.
        paper: The same on other data, over those of `PAPER`.
    """
    defaults: dict[str, Any] = {**SMALL, **small} if bundled else {**PAPER, **paper}
    chosen = {key: value if getattr(config, key) is None else getattr(config, key) for key, value in defaults.items()}
    every = max(1, chosen["steps"] // 10) if config.eval_every is None else config.eval_every
    return {**chosen, "eval_every": every}


def settings_of(config: Any) -> TrainSettings:
    """Return the training settings among the fields of a resolved configuration."""
    return TrainSettings(**{name: getattr(config, name) for name in TrainSettings.__dataclass_fields__})


def resolve_data(spec: str | None, image_size: int | None, parents: Sequence[Artifact]) -> DataInfo:
    """Describe the data that `--data` names: without it, that of the input artifact, else the bundled digits.

    Raises:
        InputError: the data set is missing, empty or corrupt.
        UsageError: there is no such data set.
    """
    recorded = parents[0].manifest.data.get("name") if parents else None
    chosen = spec or recorded or DEFAULT_DATA
    source, colon, path = chosen.partition(":")
    # An absolute path, so that the stages that inherit the data find it from any working directory.
    return describe(f"{source}:{os.path.abspath(path)}" if colon and path else chosen, image_size)


def require_fit(artifact: Artifact, data: DataInfo) -> None:
    """Check that a model takes the images and labels of a data set.

    Raises:
        InputError: it does not; the message gives both shapes.
    """
    model = read_config(artifact)
    wanted = (model.channels, model.image_size, model.num_classes)
    found = (data.channels, data.image_size, data.num_classes)
    if wanted != found:
        raise InputError(
            f"{data.name} has {found[0]}x{found[1]}x{found[1]} images of {found[2]} classes",
            expected=f"{wanted[0]}x{wanted[1]}x{wanted[1]} images of {wanted[2]} classes, as {artifact.path} takes",
            fix=f"initialise a model for that data: finectl init --data {data.name}",
        )


def describe_settings(settings: TrainSettings) -> str:
    """Return the settings in one line, for a note."""
    return (
        f"{settings.steps} steps, batch {settings.batch_size}, lr {settings.lr:g} ({settings.lr_schedule}), "
        f"EMA {settings.ema:g}"
    )


def training_estimate(config: DiTConfig, settings: TrainSettings) -> dict[str, Any]:
    """Estimate what training a model takes, for `--dry-run`.

    Memory counts weights, gradients, two moments and the EMA in float32, and about 20 activations of the model's width
    for each token and layer that the backward pass needs; disk counts raw and EMA weights and the resume state.
    """
    parameters = count_parameters(config)["total"]
    activations = 20 * settings.batch_size * config.tokens * config.width * config.depth
    return {
        "parameters": parameters,
        "memory_bytes": 4 * (5 * parameters + activations),
        "disk_bytes": 4 * (2 + 4) * parameters,
    }
