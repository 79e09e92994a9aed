"""Export: a model in another tool's layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from finectl.adapters.peft.files import adapter_files
from finectl.artifacts.files import sha256_json, write_atomic
from finectl.artifacts.job import InheritedData, Job, Outcome, Plan
from finectl.artifacts.store import Artifact, Workspace
from finectl.data.sources import describe
from finectl.errors import InputError, UsageError
from finectl.models.foreign import components
from finectl.models.foreign.exporting import (
    ADAPTER,
    Parts,
    export_diffusers,
    export_published,
    pipeline_of,
    require_exportable,
    warnings_for,
)
from finectl.models.foreign.readers import Reader, SafetensorsReader, StateReader
from finectl.models.io import ModelConfig, load_weights, read_config, total_parameters, weights_file
from finectl.models.presets import DiTConfig
from finectl.models.vae import CLASS, describe_vae, require_same_space
from finectl.stages.convert.config import Config, checked_digest

FLOAT_BYTES = 4


def plan_export(config: Config, model: Artifact) -> Plan[Config]:
    """Find the parts that go with the model, and say what the export changes."""
    for name in ("format", "heads", "image_size", "num_classes", "process"):
        if getattr(config, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')} is for an import, and --to asks for an export")
    if config.components == "reference":
        raise UsageError(
            "--components reference does not go with --to: a diffusers folder holds all of its parts",
            expected="--components copy or none",
        )
    if config.vae is not None and (config.to != "diffusers" or config.components == "none"):
        raise UsageError("--vae goes with --to diffusers --components copy", fix="leave --vae out")
    if config.to == ADAPTER:
        return _plan_adapter(config, model)
    architecture = read_config(model)
    parts, digests = find_parts(config, model, architecture, None)
    require_exportable(architecture, config.to or "", pipeline_of(architecture, parts.folders))
    parameters = total_parameters(architecture)
    return Plan(
        replace(
            config,
            source=str(model.path.absolute()),
            components=config.components or "copy",
            source_digest=checked_digest(config, sha256_json(digests) if digests else None),
        ),
        slug=f"{model.name.rsplit('-', 1)[0]}-{config.to}",
        data=InheritedData.of(model),
        summary={
            "parameters": parameters,
            "pipeline": pipeline_of(architecture, parts.folders) if config.to == "diffusers" else None,
            "parts": sorted(parts.folders),
            "disk_bytes": FLOAT_BYTES * parameters,
        },
        notes=tuple(warnings_for(architecture, config.to or "", len(parts.labels))),
        makes="export",
    )


def _plan_adapter(config: Config, model: Artifact) -> Plan[Config]:
    """Look for what parameter-efficient tuning trained.

    Raises:
        InputError: the model has none apart from its weights.
        UsageError: raw weights are asked for, and averaged ones are kept.
    """
    files = adapter_files(model)
    if config.weights != "ema":
        raise UsageError(
            f"--weights {config.weights}: the adapter of a model is kept averaged only", expected="--weights ema"
        )
    return Plan(
        replace(config, source=str(model.path.absolute()), components="none"),
        slug=f"{model.name.rsplit('-', 1)[0]}-{config.to}",
        data=InheritedData.of(model),
        summary={
            "files": [Path(file).name for file in files],
            "disk_bytes": sum(model.file(file).stat().st_size for file in files),
        },
        makes="export",
    )


def _run_adapter(job: Job[Config]) -> Outcome:
    """Copy the adapter of a model."""
    model = job.parents[0]
    for file in adapter_files(model):
        write_atomic(job.directory / Path(file).name, model.file(file).read_bytes())
        job.stop_if_requested()
    return Outcome(metrics={"format": ADAPTER, "pipeline": None, "peft": model.manifest.metrics.get("peft")})


def run_export(job: Job[Config]) -> Outcome:
    """Write the folder of the other tool."""
    if job.config.to == ADAPTER:
        return _run_adapter(job)
    config, model = job.config, job.parents[0]
    architecture = read_config(model)
    reader: Reader = SafetensorsReader(model.path, [weights_file(model, config.weights)])
    if isinstance(architecture, DiTConfig) and architecture.factorized is not None:
        from finectl.models.dit import dense_state_dict

        reader = StateReader(model.path, dense_state_dict(load_weights(model, config.weights), architecture))
        architecture = replace(architecture, factorized=None)
    pipeline: str | None = None
    if config.to == "diffusers":
        parts, _ = find_parts(config, model, architecture, job.workspace)
        pipeline = pipeline_of(architecture, parts.folders)
        export_diffusers(job.directory, architecture, reader, parts, job.stop_if_requested)
    elif isinstance(architecture, DiTConfig):
        export_published(job.directory, architecture, reader, job.stop_if_requested)
    return Outcome(metrics={"format": config.to, "pipeline": pipeline, "parameters": total_parameters(architecture)})


def find_parts(
    config: Config, model: Artifact, architecture: ModelConfig, workspace: Workspace | None
) -> tuple[Parts, list[str]]:
    """Return what goes into a pipeline beside the network, and the digests of it.

    Args:
        config: The options.
        model: What is exported.
        architecture: Its configuration.
        workspace: Where its ancestors are; None for the one that it lies in.

    Raises:
        InputError: a part is missing, has changed, or does not fit the model.
    """
    home = workspace or Workspace(model.path.absolute().parent.parent)
    if config.to != "diffusers" or config.components == "none":
        return Parts(), []
    kept = components.known_parts(model, home)
    folders = {name: components.locate(kept.artifact, name, part) for name, part in kept.parts.items()}
    entries = {name: (part.library, part.kind) for name, part in kept.parts.items()}
    recorded = model.manifest.data.get("vae")
    vae = config.vae or (recorded["name"] if recorded else None)  # what it was trained on wins over what it came with
    if vae is not None:
        folders[components.VAE] = find_vae(str(vae), model, architecture)
        entries[components.VAE] = ("diffusers", CLASS)
    labels = components.known_labels(model, home) or _bundled_labels(model)
    if len(labels) != architecture.num_classes and isinstance(architecture, DiTConfig):
        labels = {}  # those of an ancestor with other classes
    digests = [f"{name} {components.folder_digest(folders[name])}" for name in sorted(folders)]
    latents = components.VAE in folders or bool(recorded)
    return Parts(folders, entries, kept.index, labels, latents), digests


def find_vae(name: str, model: Artifact, architecture: ModelConfig) -> Path:
    """Return the folder of an autoencoder, checked to be that of a model.

    Raises:
        InputError: it is missing, or it is not the one whose latents the model works on.
    """
    recorded = model.manifest.data.get("vae")
    found = describe_vae(name)
    if recorded:
        require_same_space(recorded, found, str(model.path))
    if found["latent_channels"] != architecture.channels:
        raise InputError(
            f"the autoencoder {name} has latents of {found['latent_channels']} channels",
            expected=f"{architecture.channels} channels, as {model.path} takes",
            fix="name the autoencoder of the model: --vae PATH",
        )
    return components.vae_folder(name)


def _bundled_labels(model: Artifact) -> dict[str, str]:
    """Return the class names of the bundled set that a model was trained on."""
    if not model.manifest.data.get("bundled"):
        return {}
    names = describe(str(model.manifest.data["name"])).class_names
    return {str(index): name for index, name in enumerate(names)}
