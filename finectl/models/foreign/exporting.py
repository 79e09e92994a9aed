"""A model of finectl in another tool's layout: the folder that diffusers loads, or the published DiT's tensors."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finectl.artifacts.files import sha256_file, write_atomic, write_json
from finectl.errors import InputError, UsageError
from finectl.models.foreign import components, diffusers_dit, diffusers_unet, published_dit
from finectl.models.foreign.layout import Layout, check_names, write_layout
from finectl.models.foreign.readers import Reader
from finectl.models.foreign.source import INDEX, MODEL_CONFIG, OWN, OWN_WEIGHTS, SCHEDULER_CONFIG, WEIGHTS
from finectl.models.io import ModelConfig, require_no_extras
from finectl.models.presets import NORM_EPS, DiTConfig
from finectl.models.projections import FOLDABLE
from finectl.models.unet_config import CLASSES, TEXT_UNET, UNetConfig

ADAPTER = "peft"
"""The target that holds what parameter-efficient tuning trained, and none of the model's other weights."""
TARGETS = ("diffusers", published_dit.NAME, ADAPTER)
SCHEDULER = SCHEDULER_CONFIG.split("/", maxsplit=1)[0]
NEEDED = {"DiTPipeline": ("vae",), "StableDiffusionPipeline": ("vae", "text_encoder", "tokenizer"), "DDPMPipeline": ()}
"""Pipeline -> the parts without which it is nothing."""

FOLD = "finectl merge MODEL --method linear --weights 1 --fold"
LOADER = "Projections in diffusers"

LOAD_DIFFUSERS = """# How to load this

    from diffusers import {kind}
    model = {kind}.from_pretrained("THIS FOLDER")

{more}`finectl.json` holds what diffusers has no place for; `finectl convert THIS FOLDER` reads it back.
"""
LOAD_DIT = """# How to load this

The tensors of a published DiT checkpoint, under its names, as safetensors (nothing here is a pickle):

    from safetensors.torch import load_file
    model.load_state_dict(load_file("dit.safetensors"))

where `model` is a DiT with depth {depth}, hidden_size {width}, num_heads {heads}, patch_size {patch},
in_channels {channels}, input_size {size}, num_classes {classes} and learn_sigma {sigma}.
For a tool that opens .pt files only:

    import torch; torch.save(load_file("dit.safetensors"), "dit.pt")

`finectl.json` holds what the tensors do not tell; `finectl convert THIS FOLDER` reads it back.
"""


@dataclass(frozen=True)
class Parts:
    """What goes into a pipeline beside the network.

    Args:
        folders: Name -> folder, to be copied.
        entries: Name -> library and class, for model_index.json.
        index: The model_index.json that the model came with; empty where there was none.
        labels: Class number -> name.
        latents: Whether the network works on latents, which are not clipped to [-1, 1].
    """

    folders: Mapping[str, Path] = field(default_factory=dict)
    entries: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    index: Mapping[str, Any] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    latents: bool = False


def warnings_for(config: ModelConfig, target: str, guided_labels: int) -> list[str]:
    """Return what an export changes, one line each.

    Args:
        config: The model's.
        target: One of `TARGETS`.
        guided_labels: Classes that have names.
    """
    if target == ADAPTER or not isinstance(config, DiTConfig):
        return []
    notes = []
    divisor = diffusers_dit.FREQUENCY_DIVISOR if target == "diffusers" else published_dit.FREQUENCY_DIVISOR
    if config.frequency_divisor != divisor:
        notes.append(
            f"the model was trained with time frequencies over {config.frequency_divisor}, {target} computes them over "
            f"{divisor}: its outputs will differ by several percent; train with --frequency-divisor {divisor} for an "
            "exact export"
        )
    if target == published_dit.NAME and config.mlp_norm_eps != NORM_EPS:
        notes.append(
            f"a norm's epsilon is {config.mlp_norm_eps:g} in the model and {NORM_EPS:g} there: outputs differ by about "
            "1e-7"
        )
    if target == "diffusers" and config.num_classes < diffusers_dit.PIPELINE_CLASSES:
        notes.append(
            f"the label table of {config.num_classes} classes is padded to {diffusers_dit.PIPELINE_CLASSES}, because "
            f"DiTPipeline's null class is {diffusers_dit.PIPELINE_CLASSES}; finectl.json keeps the real number"
        )
    if target == "diffusers" and guided_labels:
        notes.append("class names are in model_index.json; diffusers' save_pretrained loses them")
    return notes


def require_exportable(config: ModelConfig, target: str, pipeline: str | None) -> None:
    """Check that another tool can hold a model.

    Raises:
        UsageError: it cannot hold this architecture.
        InputError: it cannot hold these sizes, or channel-wise projections, bottlenecks or prompts.
    """
    require_no_projections(config)
    require_no_extras(config, "the model has", f"plain layers, as {target} has them")
    if config.diffusion.is_edm:
        raise InputError(
            "the model is of EDM's process, which scales the data, and no pipeline of another tool would",
            expected="a model of a process that other tools know, such as finectl init --process ddpm makes",
        )
    if target == published_dit.NAME and not isinstance(config, DiTConfig):
        raise UsageError("the layout of published DiTs holds Diffusion Transformers only", fix="--to diffusers")
    if target != "diffusers":
        return
    if isinstance(config, DiTConfig):
        diffusers_dit.export_config(config, "")
    else:
        diffusers_unet.export_config(config, "")
    if pipeline == "DiTPipeline" and config.num_classes > diffusers_dit.PIPELINE_CLASSES:
        raise InputError(
            f"the model has {config.num_classes} classes, and DiTPipeline's null class is "
            f"{diffusers_dit.PIPELINE_CLASSES}",
            expected=f"at most {diffusers_dit.PIPELINE_CLASSES}",
            fix="--components none: the transformer alone",
        )


def require_no_projections(config: ModelConfig) -> None:
    """Check that a model has no channel-wise projections: layers that no other tool has a place for.

    Raises:
        InputError: it has some; the message says whether they can be folded into the network, and how.
    """
    if not config.places:
        return
    kept = [place for place in config.places if not place.convolutions]
    reason = f"; {len(kept)} cannot be folded, such as that of {kept[0].where}: {kept[0].reason}" if kept else ""
    retrain = "fine-tune it with --projection none"
    if isinstance(config, UNetConfig):
        retrain = f"load it as finectl's README says ({LOADER}), or fine-tune it with --projection {FOLDABLE}"
    raise InputError(
        f"the model has {len(config.places)} channel-wise projections, for which other tools have no place{reason}",
        expected="a model without projections, or one whose projections are folded into its convolutions",
        fix=retrain if kept else FOLD,
    )


def pipeline_of(config: ModelConfig, parts: Mapping[str, Any]) -> str | None:
    """Return the pipeline that a model and its parts make; None for the bare network.

    DDPMPipeline passes no labels, so a class-conditional UNet is exported bare.
    """
    if isinstance(config, DiTConfig):
        wanted = "DiTPipeline"
    elif config.architecture == TEXT_UNET:
        wanted = "StableDiffusionPipeline"
    else:
        wanted = "DDPMPipeline"
    bare = wanted == "DDPMPipeline" and config.num_classes > 0
    return wanted if not bare and all(name in parts for name in NEEDED[wanted]) else None


def export_published(
    directory: Path, config: DiTConfig, reader: Reader, after_tensor: Callable[[], None] | None = None
) -> None:
    """Write the tensors of a published DiT, and how to load them.

    Args:
        directory: Where the files go.
        config: Dense.
        reader: The model's dense tensors.
        after_tensor: Called after each tensor.
    """
    _write(directory / OWN_WEIGHTS, published_dit.export_layout(config), reader, after_tensor)
    _write_own(directory, config, directory / OWN_WEIGHTS)
    text = LOAD_DIT.format(
        depth=config.depth, width=config.width, heads=config.heads, patch=config.patch_size, channels=config.channels,
        size=config.image_size, classes=config.num_classes, sigma=config.learn_sigma,
    )  # fmt: skip
    write_atomic(directory / "README.md", text.encode())


def export_diffusers(
    directory: Path, config: ModelConfig, reader: Reader, parts: Parts, after_tensor: Callable[[], None] | None = None
) -> None:
    """Write a folder that diffusers' `from_pretrained` loads: a pipeline where its parts are there, else the network.

    Args:
        directory: Where the files go.
        config: Dense.
        reader: The model's dense tensors.
        parts: What goes into the pipeline beside the network.
        after_tensor: Called after each tensor.
    """
    version = importlib.metadata.version("diffusers")
    pipeline = pipeline_of(config, parts.folders)
    if isinstance(config, DiTConfig):
        values, layout = diffusers_dit.export_config(config, version), diffusers_dit.export_layout(config)
        name, kind = "transformer", diffusers_dit.CLASS
    else:
        values, layout = diffusers_unet.export_config(config, version), diffusers_unet.export_layout(config)
        name, kind = "unet", CLASSES[config.architecture]
    network = directory / name if pipeline else directory
    network.mkdir(exist_ok=True)
    write_json(network / MODEL_CONFIG, values)
    _write(network / WEIGHTS[0], layout, reader, after_tensor)
    entries: dict[str, Any] = {name: ["diffusers", kind]}
    entries[SCHEDULER] = _write_scheduler(directory, config, parts, version)
    if pipeline is not None:
        for part, folder in parts.folders.items():
            if part != SCHEDULER:
                components.copy_plain(folder, directory / part)
                entries[part] = list(parts.entries[part])
        write_json(directory / INDEX, _index(pipeline, version, entries, parts))
    _write_own(directory, config, network / WEIGHTS[0])
    padded = isinstance(config, DiTConfig) and diffusers_dit.table_rows(config) != config.num_classes + 1
    more = f"The null class is {diffusers_dit.PIPELINE_CLASSES}; the classes are the first ones.\n\n" if padded else ""
    write_atomic(directory / "README.md", LOAD_DIFFUSERS.format(kind=pipeline or kind, more=more).encode())


def _write(path: Path, layout: Layout, reader: Reader, after_tensor: Callable[[], None] | None) -> None:
    check_names(layout, reader.shapes, reader.where)
    write_layout(path, layout, reader, after_tensor)


def _write_own(directory: Path, config: ModelConfig, weights: Path) -> None:
    """Keep what the other layout has no place for, and the hash by which untouched weights are known again."""
    write_json(directory / OWN, {"config": config.to_dict(), "sha256": sha256_file(weights)})


def _write_scheduler(directory: Path, config: ModelConfig, parts: Parts, version: str) -> list[str]:
    """Write the scheduler that the model came with, else the one that samples it with the fewest surprises."""
    if SCHEDULER in parts.folders:
        components.copy_plain(parts.folders[SCHEDULER], directory / SCHEDULER)
        return list(parts.entries[SCHEDULER])
    values: dict[str, Any] = {"_diffusers_version": version, **config.diffusion.to_scheduler()}
    values["clip_sample"] = not parts.latents
    if isinstance(config, UNetConfig) and not parts.latents:
        values |= {"variance_type": "learned_range" if config.learn_sigma else "fixed_small"}
        kind = "DDPMScheduler"
    else:
        values |= {"set_alpha_to_one": True, "steps_offset": 0}
        kind = "DDIMScheduler"
    (directory / SCHEDULER).mkdir(exist_ok=True)
    write_json(directory / SCHEDULER_CONFIG, {"_class_name": kind, **values})
    return ["diffusers", kind]


def _index(pipeline: str, version: str, entries: Mapping[str, Any], parts: Parts) -> dict[str, Any]:
    """Return model_index.json: that of the pipeline which the model came in, as far as it still holds."""
    known = parts.index if parts.index.get("_class_name") == pipeline else {}
    kept = {name: value for name, value in known.items() if not isinstance(value, list)}
    gone = {name: [None, None] for name, value in known.items() if isinstance(value, list) and name not in entries}
    labels = {"id2label": dict(parts.labels)} if parts.labels and pipeline == "DiTPipeline" else {}
    return {**kept, **gone, "_class_name": pipeline, "_diffusers_version": version, **labels, **entries}
