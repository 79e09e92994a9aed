"""Import: a model from another tool's checkpoint."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

from finectl.artifacts.files import write_json
from finectl.artifacts.job import Job, Outcome, Plan
from finectl.diffusion.config import PROCESSES
from finectl.errors import UsageError
from finectl.models.foreign import components
from finectl.models.foreign.layout import check_names, check_values, write_layout
from finectl.models.foreign.opening import Hints, open_source, peek
from finectl.models.foreign.source import UNKNOWN_YET, Source, find_source
from finectl.models.io import CONFIG, FILES, ModelConfig, total_parameters
from finectl.models.unet_config import UNetConfig
from finectl.stages.convert.config import Config, checked_digest

UNSAFE = re.compile(r"[^A-Za-z0-9.]+")
LONGEST_SLUG = 60


def plan_import(config: Config) -> Plan[Config]:
    """Find the source, its configuration and its digest."""
    if config.vae is not None:
        raise UsageError("--vae goes with --to diffusers", fix="leave --vae out")
    source = find_source(config.source or "", config.format)
    known = peek(source, _hints(config))
    if known is not None:
        of_process(known, config.process)
    way = config.components or "reference"
    parts = components.parts_of(source) if way != "none" else {}
    notes = [f"{source.name}: {source.format}" + (f", {total_parameters(known):,} parameters" if known else "")]
    if source.values and source.scheduler is None:
        notes.append("no scheduler beside the model: taking the noise schedule of DDPM, 1,000 linear betas")
    digest = checked_digest(config, source.digest(components.digests(parts)))
    sizes = {which: sum(path.stat().st_size for path in files) for which, files in source.weights.items()}
    return Plan(
        replace(
            config,
            source=source.name if not Path(source.name).exists() else os.path.abspath(source.name),
            format=None if source.format == UNKNOWN_YET else source.format,
            weights="ema",  # both are kept, where there are both
            components=way,
            source_digest=digest,
            process=None if config.process == "ddpm" else config.process,
        ),
        slug=UNSAFE.sub("-", _stem(source)).strip("-.")[:LONGEST_SLUG] or "imported",
        summary={
            "parameters": total_parameters(known) if known else None,
            "parts": sorted(parts),
            "disk_bytes": sum(sizes.values()),
        },
        notes=tuple(notes),
    )


def run_import(job: Job[Config]) -> Outcome:
    """Check the tensors of the source and write the model's, raw and EMA apart."""
    config = job.config
    source = find_source(config.source or "", config.format)
    opened = open_source(source, _hints(config))
    opened = replace(opened, config=of_process(opened.config, config.process))
    if opened.restored:
        job.console.note("untouched since finectl exported it: the configuration is the one that it had")
    for reader in opened.readers.values():
        check_names(opened.layout, reader.shapes, reader.where)
        check_values(opened.layout, reader)
    for which, reader in opened.readers.items():
        write_layout(job.directory / FILES[which], opened.layout, reader, job.stop_if_requested)
    write_json(job.directory / CONFIG, opened.config.to_dict())
    way = config.components or "none"
    components.keep(job.directory, source, components.parts_of(source) if way != "none" else {}, way)
    parameters = total_parameters(opened.config)
    job.console.note(f"{opened.format}: {parameters:,} parameters, {' and '.join(sorted(opened.readers))} weights")
    return Outcome(
        metrics={
            "method": opened.format,
            "parameters": parameters,
            "weights": sorted(opened.readers),
            "noise_schedule": opened.config.diffusion.to_dict(),
        }
    )


def of_process(model: ModelConfig, process: str | None) -> ModelConfig:
    """Return an imported architecture with the process of `--process`.

    A network of EDM is defined at every noise, so that it may be of DDPM's process or of its own; any other one is of
    the process that it was trained in.

    Raises:
        UsageError: it is no network of EDM.
    """
    if process is None:
        return model
    if not isinstance(model, UNetConfig) or model.sigma_data is None:
        raise UsageError(
            f"--process {process} is for networks of EDM, and this one is of the process that it was trained in",
            fix="leave --process out",
        )
    return replace(model, diffusion=PROCESSES[process])


def _hints(config: Config) -> Hints:
    return Hints(config.heads, config.image_size, config.num_classes)


def _stem(source: Source) -> str:
    """Return the readable part of the model's name: that of the file, of the folder, or the hub's id."""
    if source.where.is_file():
        return source.where.stem
    path = Path(source.name)
    return path.resolve().name if path.exists() else source.name
