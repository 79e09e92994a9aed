"""What training options become when they are left out: known before torch is imported."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finectl.artifacts.job import Job
from finectl.artifacts.store import Artifact
from finectl.data.captions import ALL, NONE
from finectl.data.sources import DEFAULT_RESIZE_FILTER, DataInfo, DataOptions, absolute_spec, describe
from finectl.errors import InputError, UsageError
from finectl.models.autoencoder import works_on_latents
from finectl.models.io import read_config
from finectl.models.vae import is_same_space, latent_space

DEFAULT_DATA = "digits"
USUAL_BETAS = (0.9, 0.999)
"""PyTorch's, of Adam."""


@dataclass(frozen=True)
class DataFields:
    """The options of every stage that reads images; None is what the input artifact was made with, or a default."""

    data: str | None
    image_size: int | None
    resize_filter: str | None
    skip_bad: bool | None


@dataclass(frozen=True)
class TrainFields:
    """The options of every stage that trains; None is a default that depends on the data."""

    flip: bool
    steps: int | None
    batch_size: int | None
    lr: float | None
    lr_schedule: str
    warmup_steps: int | None
    weight_decay: float
    clip_grad: float | None
    ema: float | None
    eval_every: int | None
    keep_every: int
    keep_at: str | None
    seed: int


@dataclass(frozen=True)
class OptimiserFields:
    """Further options of the optimiser and of the moving average."""

    betas: str | None
    ema_power: float


@dataclass(frozen=True)
class TrainSettings:
    """How a model is trained.

    Args:
        steps: Optimiser updates.
        batch_size: Images an update, over all processes.
        lr: Learning rate of AdamW.
        lr_schedule: `constant`, or `cosine` down to 0.
        warmup_steps: Updates over which the learning rate rises to `lr`; Adam's first steps, of full size in every
            weight, would else undo what a good initialisation holds.
        weight_decay: Decoupled weight decay.
        ema: Decay of the exponential moving average, in [0, 1].
        eval_every: Held-out loss every so many updates; 0 never.
        seed: Seed of the data order and of every draw.
        clip_grad: Largest norm of all gradients together; 0 leaves them as they are.
        keep_every: Keep the averaged weights after every so many updates; 0 keeps the last only.
        keep_at: Keep them after these updates too, as `parse_updates` reads them.
        betas: Decays of AdamW's two moments, as `parse_betas` reads them; None for the usual ones.
        ema_power: The decay after step k is at most 1 - (1 + k) to minus this power; 0 keeps it at `ema`.
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
    clip_grad: float = 0.0
    keep_every: int = 0
    keep_at: str | None = None
    betas: str | None = None
    ema_power: float = 0.0

    def keeps(self, update: int) -> bool:
        """Tell whether the averaged weights after an update are kept beside the last ones."""
        regular = self.keep_every > 0 and update % self.keep_every == 0
        return 0 < update < self.steps and (regular or update in parse_updates(self.keep_at))

    @property
    def kept(self) -> int:
        """Updates whose averaged weights are kept beside the last ones."""
        regular = max(self.steps - 1, 0) // self.keep_every if self.keep_every else 0
        others = (update for update in parse_updates(self.keep_at) if self.keeps(update))
        return regular + sum(not self.keep_every or update % self.keep_every > 0 for update in others)


# Bundled sets are small enough for a laptop; other data gets the papers' settings (FINE, arXiv 2409.19289, section 4).
SMALL = {"batch_size": 128, "lr": 1e-3, "ema": 0.99, "warmup_steps": 100, "clip_grad": 0.0}
PAPER = {"batch_size": 256, "lr": 1e-4, "ema": 0.9999, "warmup_steps": 0, "clip_grad": 0.0}


def resolve_settings(
    config: Any, bundled: bool, *, small: dict[str, Any], paper: dict[str, Any], before: int = 0
) -> dict[str, Any]:
    """Return the fields of a stage's configuration that were left out, for this kind of data.

    Args:
        config: A dataclass with the fields of `TrainSettings`, None where an option was left out.
        bundled: Whether the data set is one of the small bundled ones.
        small: The stage's own defaults on bundled data, `steps` at least, over those of `SMALL`.
        paper: The same on other data, over those of `PAPER`.
        before: Updates that come before those of `--steps`.

    Raises:
        UsageError: `--keep-at` is no list of updates, or names one that is never made.
    """
    defaults: dict[str, Any] = {**SMALL, **small} if bundled else {**PAPER, **paper}
    chosen = {key: value if getattr(config, key) is None else getattr(config, key) for key, value in defaults.items()}
    updates = before + chosen["steps"]
    every = max(1, updates // 10) if config.eval_every is None else config.eval_every
    kept = parse_updates(config.keep_at)
    if kept and kept[-1] > updates:
        raise UsageError(
            f"--keep-at {config.keep_at} keeps weights of update {kept[-1]:,}, and there are {updates:,}",
            expected=f"updates from 1 to {updates:,}" if updates else "updates to keep weights of",
            fix=f"--steps {kept[-1]}, or leave that update out",
        )
    # One way of writing a list, so that the same updates give the same artifact.
    return {**chosen, "eval_every": every, "keep_at": ",".join(map(str, kept)) or None}


@functools.lru_cache(maxsize=16)
def parse_updates(text: str | None) -> tuple[int, ...]:
    """Return the updates of `--keep-at`, each once and in ascending order; none for None.

    Raises:
        UsageError: it is no list of positive integers.
    """
    if text is None:
        return ()
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"--keep-at {text!r} is no list of updates", expected="positive integers, such as 30,100,300")
    return tuple(sorted({int(part) for part in parts}))


def parse_betas(text: str | None) -> tuple[float, float]:
    """Return the two decays of `--betas`, such as 0.95,0.999; the usual ones for None.

    Raises:
        UsageError: they are not two numbers in [0, 1).
    """
    if text is None:
        return USUAL_BETAS
    try:
        first, second = (float(part) for part in text.split(","))
    except ValueError:
        first = second = math.nan
    if not (0 <= first < 1 and 0 <= second < 1):
        raise UsageError(f"--betas {text!r}", expected="two numbers from 0 to below 1, such as 0.9,0.999")
    return first, second


def settled_betas(text: str | None) -> str | None:
    """Return `--betas` in its one way of writing; None for the usual ones.

    Raises:
        UsageError: they are not two numbers in [0, 1).
    """
    betas = parse_betas(text)
    return None if betas == USUAL_BETAS else ",".join(f"{beta:g}" for beta in betas)


def settings_of(config: Any) -> TrainSettings:
    """Return the training settings among the fields of a resolved configuration."""
    names = TrainSettings.__dataclass_fields__
    return TrainSettings(**{name: getattr(config, name) for name in names if hasattr(config, name)})


def resolve_data(
    config: DataFields, parents: Sequence[Artifact], image_size: int | None = None, captions: str = NONE
) -> tuple[DataInfo, dict[str, Any]]:
    """Describe the data that `--data` names: without it, that of the input artifact, else the bundled digits.

    Args:
        config: The options.
        parents: The input artifacts.
        image_size: The size to load at where the options name none.
        captions: What is read of the images' captions, as `DataOptions` says.

    Returns:
        The data set, and the fields of `DataFields` as they are resolved.

    Raises:
        InputError: the data set is missing, empty or corrupt.
        UsageError: there is no such data set.
    """
    recorded = parents[0].manifest.data.get("name") if parents else None
    # How the data was read is part of what it is: who inherits the one inherits the other.
    inherited = parents[0].manifest.config if parents and config.data is None else {}
    chosen = config.data or recorded or DEFAULT_DATA
    # An absolute path, so that the stages that inherit the data find it from any working directory.
    located = absolute_spec(chosen)
    options = DataOptions(
        resize_filter=config.resize_filter or inherited.get("resize_filter") or DEFAULT_RESIZE_FILTER,
        flip=getattr(config, "flip", False),
        skip_bad=bool(inherited.get("skip_bad") if config.skip_bad is None else config.skip_bad),
        captions=captions,
    )
    info = describe(located, config.image_size or image_size, options)
    resolved = {
        "data": info.name,
        "image_size": info.image_size,
        "resize_filter": options.resize_filter,
        "skip_bad": options.skip_bad,
    }
    return info, resolved


def data_options(config: DataFields, job: Job[Any]) -> DataOptions:
    """Return how a resolved configuration reads its data, in a run that shows progress and may be asked to stop."""
    return DataOptions(
        resize_filter=config.resize_filter or DEFAULT_RESIZE_FILTER,
        flip=getattr(config, "flip", False),
        skip_bad=bool(config.skip_bad),
        console=job.console,
        check=job.stop_if_requested,
        captions=ALL if getattr(config, "text_encoder", None) else NONE,
    )


def require_fit(artifact: Artifact, data: DataInfo) -> None:
    """Check that a model takes the images and labels of a data set.

    Raises:
        InputError: it does not; the message gives both shapes, or both autoencoders.
    """
    model = read_config(artifact)
    # Without classes of its own a model does not read labels.
    wanted = (model.channels, model.image_size, model.num_classes)
    found = (data.channels, data.image_size, data.num_classes if model.num_classes else 0)
    if wanted != found:
        raise InputError(
            f"{data.name} has {data.channels}x{data.image_size}x{data.image_size} images of {data.num_classes} classes",
            expected=f"{wanted[0]}x{wanted[1]}x{wanted[1]} images of {wanted[2]} classes, as {artifact.path} takes",
            fix=f"initialise a model for that data: finectl init --data {data.name}",
        )
    require_space(artifact, data)


def require_images(artifact: Artifact, data: DataInfo) -> None:
    """Check that a model takes the images of a data set, whatever their classes.

    Raises:
        InputError: it does not; the message gives both shapes, or both autoencoders.
    """
    model = read_config(artifact)
    if (data.channels, data.image_size) != (model.channels, model.image_size):
        side, pixels = model.image_size, data.vae is None
        fix = (
            f"leave --image-size out; a data set of one size takes a model of its own: finectl init --data {data.name}"
        )
        if data.channels != model.channels:
            fix = f"a data set of {model.channels} channels, or another model: finectl init --data {data.name}"
            if pixels and works_on_latents(artifact, model.channels):
                fix = f"finectl encode --data {data.name} --vae PATH --image-size PIXELS, then --data latents:PATH"
        elif not pixels:
            fix = f"latents of {side}x{side}: finectl encode with another --image-size"
        raise InputError(
            f"{data.name} has {data.channels}x{data.image_size}x{data.image_size} images",
            expected=f"{model.channels}x{side}x{side}, as {artifact.path} takes",
            fix=fix,
        )
    require_space(artifact, data)


def require_space(artifact: Artifact, data: DataInfo) -> None:
    """Check that latents are those of the autoencoder whose latents a model was trained on.

    Raises:
        InputError: they are of another one.
    """
    trained_on = artifact.manifest.data.get("vae")
    if trained_on and data.vae and not is_same_space(trained_on, data.vae):
        raise InputError(
            f"{data.name} holds latents of {latent_space(data.vae)}, "
            f"{artifact.path} works on those of {latent_space(trained_on)}",
            expected="latents of one autoencoder, at one scale",
            fix=f"finectl encode --vae {trained_on['name']}",
        )


def describe_settings(settings: TrainSettings) -> str:
    """Return the settings in one line, for a note."""
    return (
        f"{settings.steps} steps, batch {settings.batch_size}, lr {settings.lr:g} ({settings.lr_schedule}), "
        f"EMA {settings.ema:g}"
    )
