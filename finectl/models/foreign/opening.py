"""From a checkpoint that was found to a model of finectl: its configuration, and how its tensors are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from finectl.artifacts.files import sha256_file
from finectl.diffusion.config import DDPM, DiffusionConfig
from finectl.errors import InputError, UsageError
from finectl.models.foreign import diffusers_dit, diffusers_unet, edm, published_dit
from finectl.models.foreign.layout import Layout, Shape
from finectl.models.foreign.readers import Reader, RenamedReader, StateReader, as_state, load_pickled
from finectl.models.foreign.source import SCHEDULER_CONFIG, UNKNOWN_YET, Source, format_of, shapes_of
from finectl.models.io import ModelConfig, config_from
from finectl.models.presets import DiTConfig
from finectl.models.unet_config import UNetConfig

TRAINING_KEYS = {"raw": "model", "ema": "ema"}


@dataclass(frozen=True)
class Hints:
    """What the weights do not tell and the user may: None where it was left out."""

    heads: int | None = None
    image_size: int | None = None
    num_classes: int | None = None


@dataclass(frozen=True)
class Opened:
    """A checkpoint whose tensors can be read.

    Args:
        config: Of the model that is made.
        layout: How its tensors are made.
        readers: `raw` and, where there are both, `ema` -> the tensors.
        format: A key of `FORMATS`.
        restored: Whether the configuration is the one that finectl exported the model with.
    """

    config: ModelConfig
    layout: Layout
    readers: Mapping[str, Reader]
    format: str
    restored: bool


def peek(source: Source, hints: Hints) -> ModelConfig | None:
    """Return the configuration of a checkpoint as far as that takes no torch; None for a file of PyTorch.

    Raises:
        InputError: it is of an architecture that is not supported.
        UsageError: a hint is needed, or does not go with the checkpoint.
    """
    shapes = shapes_of(source)
    if source.format == UNKNOWN_YET or (shapes is None and not source.values):
        return None
    return _config(source, source.format, shapes, {}, hints)[0]


def open_source(source: Source, hints: Hints) -> Opened:
    """Open a checkpoint and find out how finectl's tensors are made of its own.

    Raises:
        InputError: it is damaged, holds code, or is of an architecture that is not supported.
        UsageError: a hint is needed, or does not go with the checkpoint.
    """
    trained_with: Mapping[str, Any] = {}
    if source.pickled:
        readers, trained_with = _pickled(source)
    else:
        readers = {which: source.reader(which) for which in source.weights}
    kind = source.format
    if kind == UNKNOWN_YET:
        kind = format_of(list(readers["raw"].shapes), source.where)
    if kind == edm.NAME:
        readers = {which: RenamedReader(r, edm.bare_names(r.shapes)) for which, r in readers.items()}
    if kind == diffusers_unet.NAME:
        readers = {which: RenamedReader(r, diffusers_unet.new_names(r.shapes)) for which, r in readers.items()}
    shapes = readers["raw"].shapes
    config, restored = _config(source, kind, shapes, trained_with, hints)
    layout = _layout(config, kind, shapes)
    if isinstance(config, UNetConfig):
        config = replace(config, parameters=layout.parameters)
    return Opened(config, layout, readers, kind, restored)


def _pickled(source: Source) -> tuple[dict[str, Reader], Mapping[str, Any]]:
    """Return the tensors of a file of PyTorch, raw and EMA where it holds both, and the options of its training."""
    path = source.weights["raw"][0]
    content = load_pickled(path)
    if not isinstance(content, Mapping):
        raise InputError(f"{path} holds a {type(content).__name__}", expected="a state dict, or a table of them")
    states = {which: content[key] for which, key in TRAINING_KEYS.items() if isinstance(content.get(key), Mapping)}
    if not states and isinstance(content.get("state_dict"), Mapping):
        states = {"raw": content["state_dict"]}
    if "raw" not in states:
        states = {"raw": states.get("ema", content)}
    options = content.get("args")
    readers: dict[str, Reader] = {which: StateReader(path, as_state(state, path)) for which, state in states.items()}
    return readers, vars(options) if hasattr(options, "__dict__") else {}


def _config(
    source: Source, kind: str, shapes: Mapping[str, Shape] | None, trained_with: Mapping[str, Any], hints: Hints
) -> tuple[ModelConfig, bool]:
    """Return the configuration, and whether it is the one that finectl exported the model with."""
    own = config_from(source.own["config"]) if isinstance(source.own.get("config"), Mapping) else None
    if own is not None and source.own.get("sha256") == sha256_file(source.weights["raw"][0]):
        return own, True
    if hints.heads and kind != published_dit.NAME:
        raise UsageError(f"--heads does not go with the format {kind!r}, whose configuration says it")
    if hints.image_size and kind != published_dit.NAME:
        raise UsageError(f"--image-size does not go with the format {kind!r}, whose configuration says it")
    where = str(source.where)
    if kind == published_dit.NAME:
        dit = published_dit.config_from_shapes(
            shapes or {}, where, heads=hints.heads, image_size=hints.image_size, trained_with=trained_with
        )
        return _with_classes(dit, hints.num_classes, where), False
    if kind == diffusers_dit.NAME:
        dit = diffusers_dit.config_from(source.values, where, diffusion_of(source))
        known = own.num_classes if own is not None else None
        return _with_classes(dit, hints.num_classes if hints.num_classes is not None else known, where), False
    if kind == diffusers_unet.NAME:
        classes = own.num_classes if own is not None and hints.num_classes is None else hints.num_classes
        return diffusers_unet.config_from(source.values, where, diffusion_of(source), shapes, classes), False
    if shapes is None:
        raise InputError(f"{where} cannot be read")
    return edm.config_from_shapes({bare: shapes[name] for bare, name in edm.bare_names(shapes).items()}, where), False


def diffusion_of(source: Source) -> DiffusionConfig:
    """Return the noise schedule of the scheduler beside a model; that of DDPM where there is none.

    Raises:
        InputError: it is none that finectl knows.
    """
    if source.scheduler is None:
        return DDPM
    base = source.root or source.where
    return DiffusionConfig.from_scheduler(source.scheduler, str(base / SCHEDULER_CONFIG))


def _with_classes(config: DiTConfig, classes: int | None, where: str) -> DiTConfig:
    """Return the configuration with the real number of classes of a table that was padded for DiTPipeline.

    Raises:
        UsageError: the table cannot be that of so many classes.
    """
    if classes is None or classes == config.num_classes:
        return config
    if config.num_classes != diffusers_dit.PIPELINE_CLASSES or not 0 <= classes < config.num_classes:
        raise UsageError(
            f"--num-classes {classes} does not go with {where}, whose table has {config.num_classes} classes and the "
            "null class",
            expected=f"{config.num_classes}; fewer only of a table of {diffusers_dit.PIPELINE_CLASSES}",
        )
    return replace(config, num_classes=classes)


def _layout(config: ModelConfig, kind: str, shapes: Mapping[str, Shape]) -> Layout:
    if isinstance(config, DiTConfig):
        if kind == published_dit.NAME:
            return published_dit.import_layout(config, table_rows=shapes[published_dit.TABLE][0])
        table = shapes.get(diffusers_dit.TABLE_IN_BLOCK, (config.num_classes + 1,))
        return diffusers_dit.import_layout(config, table[0])
    if kind == diffusers_unet.NAME:
        return diffusers_unet.import_layout(config)
    return edm.import_layout(config, shapes, diffusers_unet.network_shapes(config))
