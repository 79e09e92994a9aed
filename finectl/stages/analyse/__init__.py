"""Analyse: what fine-tuning did to models, in numbers and pictures.

Of experts, or of models around their base: norms of task vectors and their cosines, by block; gradient similarity
between timesteps; the loss in the plane of two task vectors; and how much each block's output changed by channel and by
position. Each analysis is kept when it is done, so that an interrupted run goes on with the next.

Reference: DeMe, arXiv 2410.06664, sections 3.2, 5, 8 and 12.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from finectl.artifacts.analyses import kept, parse_only
from finectl.artifacts.files import write_json
from finectl.artifacts.job import InheritedData, Job, Outcome, Plan, Reads, Stage
from finectl.artifacts.store import Artifact
from finectl.data.sources import DataInfo
from finectl.errors import InputError, UsageError
from finectl.models.io import read_config, total_parameters
from finectl.models.parts import Parts, require_same
from finectl.stages.analyse.config import (
    ACTIVATIONS,
    ANALYSES,
    COSINES,
    GRADIENTS,
    LANDSCAPE,
    NORMS,
    OF_DATA,
    OF_PAIRS,
    Config,
    neutral,
    parse_plane,
)
from finectl.training.settings import require_fit
from finectl.training.text_settings import resolve_captioned, unchanged

EXPERTS = "experts"
METRICS = "metrics.json"


def reads(config: Config) -> Reads:
    """Return what is looked at: experts, or with `--base` any models; and a merged model beside them."""
    merged = (Reads("merged", ("model",), named=(config.merged,)),) if config.merged is not None else ()
    if config.base is None:
        return Reads(EXPERTS, (EXPERTS,), also=merged)
    base = Reads("base", ("model",), named=(config.base,))
    return Reads("model", ("model",), many=True, also=(base, *merged))


def parts_of(config: Config, parents: Sequence[Artifact]) -> tuple[Parts, Artifact | None]:
    """Return the models around their base, and the merged model if there is one.

    Raises:
        InputError: an artifact is damaged, the base is gone, or the architectures differ.
    """
    merged = parents[-1] if config.merged is not None else None
    parts = Parts.of(parents[:-1] if merged is not None else parents, based=config.base is not None)
    if merged is not None and config.base is not None:
        require_same(parts.config, parents[0], read_config(merged), merged)
    elif merged is not None and read_config(merged).to_dict() != parts.config.to_dict():
        raise InputError(
            f"{merged.path} is of another architecture than the experts of {parents[0].path}",
            expected="a model merged from them, with projections where they have some",
            fix=f"finectl merge {parents[0].path} --weights ..., without --fold",
        )
    return parts, merged


def plan(config: Config, parents: Sequence[Artifact]) -> Plan[Config]:
    """Resolve which analyses are made, and what they need.

    Raises:
        UsageError: an analysis is none or is not possible of these models, or an option does not fit.
        InputError: the models are not of one architecture, the base is gone, or the data does not fit them.
    """
    parts, merged = parts_of(config, parents)
    asked = parse_only(config.only, ANALYSES) if config.only is not None else None
    wanted, notes = require_pairs(asked, parts)
    data: Any = InheritedData.of(parents[0])
    fields: dict[str, Any] = {}
    if any(name in OF_DATA for name in wanted):
        try:
            data, fields = resolve_images(config, parts, parents)
        except InputError as error:
            if asked is not None or config.data is not None:
                raise
            wanted = tuple(name for name in wanted if name not in OF_DATA)
            notes += (f"without images only {', '.join(wanted)}: {error.what}",)
    if LANDSCAPE in wanted:
        parse_plane(config.plane, parts.names)
    elif merged is not None:
        raise UsageError("--merged marks a model in the landscape", expected="--only with landscape, or no --merged")
    if GRADIENTS in wanted and config.timesteps > parts.config.diffusion.timesteps:
        raise UsageError(
            f"--timesteps {config.timesteps}", expected=f"at most the model's {parts.config.diffusion.timesteps}"
        )
    resolved = neutral(
        replace(
            config,
            **fields,
            only=",".join(wanted),
            base=str(parts.base_artifact.path.resolve()) if config.base is not None and parts.base_artifact else None,
            merged=str(merged.path.resolve()) if merged is not None else None,
        )
    )
    points = config.grid**2 if LANDSCAPE in wanted else 0
    return Plan(
        resolved,
        slug=f"{parents[0].name.rsplit('-', 1)[0]}-analysis",
        data=data,
        summary={
            "models": parts.count,
            "parameters": total_parameters(parts.config),
            "analyses": list(wanted),
            "landscape_points": points,
        },
        notes=(f"{parts.described()}; {', '.join(wanted)}", *notes),
    )


def require_pairs(asked: tuple[str, ...] | None, parts: Parts) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the analyses that so many models allow, and a note on those that are left out.

    Raises:
        UsageError: one that needs two task vectors was asked for, and there is one.
    """
    if parts.count > 1:
        return asked or ANALYSES, ()
    if asked is None:
        return tuple(name for name in ANALYSES if name not in OF_PAIRS), (
            f"one model, so no {' and no '.join(OF_PAIRS)}",
        )
    for name in asked:
        if name in OF_PAIRS:
            raise UsageError(f"--only {name} of one model", expected="two models at least, or experts of two ranges")
    return asked, ()


def resolve_images(config: Config, parts: Parts, parents: Sequence[Artifact]) -> tuple[DataInfo, dict[str, Any]]:
    """Return the data set, and the fields of `DataFields` as they are resolved.

    Raises:
        InputError: the data is missing or does not fit; for models of text, captions or the text encoder are.
    """
    model = read_config(parents[0])
    size = model.image_size if config.data is None else None
    data, fields = resolve_captioned(config, [parents[0]], model, size)
    require_fit(parents[0], data)
    return data, fields


def run(job: Job[Config]) -> Outcome:
    """Make each analysis that is not there yet, then write numbers, tables and pictures.

    Raises:
        InputError: a file is damaged, or the task vectors span no plane.
        ComputationError: a weight is not finite.
        Interrupted: a signal came; the analyses that are done are kept.
    """
    from finectl.stages.analyse.report import summary, write_report
    from finectl.stages.analyse.setting import Setting

    parts, merged = parts_of(job.config, job.parents)
    setting = Setting(job, parts)
    job.state.mkdir(parents=True, exist_ok=True)
    found = {name: kept(job, name, lambda name=name: analyse(name, setting, merged)) for name in job.config.chosen}  # type: ignore[misc]
    write_json(job.directory / METRICS, {"models": list(parts.names), **found})
    write_report(job, parts.names, found)
    return Outcome(metrics={"models": list(parts.names), **summary(found)})


def analyse(name: str, setting: Any, merged: Artifact | None) -> dict[str, Any]:
    """Make one analysis."""
    if name in (NORMS, COSINES):
        from finectl.stages.analyse.norms import cosines, norms

        return {NORMS: norms, COSINES: cosines}[name](setting)
    if name == GRADIENTS:
        from finectl.stages.analyse.gradients import gradient_similarity

        return gradient_similarity(setting)
    if name == LANDSCAPE:
        from finectl.stages.analyse.landscape import loss_landscape

        return loss_landscape(setting, merged)
    if name == ACTIVATIONS:
        from finectl.stages.analyse.activations import activation_changes

        return activation_changes(setting)
    raise ValueError(name)


STAGE = Stage(
    name="analyse",
    version=1,
    makes="analysis",
    config=Config,
    reads=reads,
    plan=plan,
    run=run,
    locations=("data", "base", "merged", "text_encoder"),
    unchanged_at=unchanged("text_digest"),
)
