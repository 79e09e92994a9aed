"""The experts of all ranges, put together in one artifact."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from finectl.artifacts.files import staged, sync
from finectl.artifacts.job import InheritedData, Job, Outcome, Plan, Reads, Stage
from finectl.artifacts.lineage import total_cost
from finectl.artifacts.store import Artifact
from finectl.errors import InputError
from finectl.models.experts import expert_file, read_borders
from finectl.models.io import CONFIG, FILES, read_config
from finectl.models.parts import require_same
from finectl.stages.finetune_ranges.config import LOCATIONS, NAME, UNCHANGED_AT, Config, borders_of, plan_all


def collecting(experts: Sequence[Path]) -> Stage[Config]:
    """Return the stage that puts the experts of all ranges together.

    Args:
        experts: Their artifacts, in the order of the ranges.
    """
    further = tuple(Reads("expert", ("expert",), named=(str(path),)) for path in experts)
    return Stage(
        name=NAME,
        version=1,
        makes="experts",
        config=Config,
        reads=lambda config: Reads("base", ("model",), also=further),
        plan=plan_collection,
        run=run_collection,
        locations=LOCATIONS,
        unchanged_at=UNCHANGED_AT,
    )


def plan_collection(config: Config, parents: Sequence[Artifact]) -> Plan[Config]:
    """Check that the experts are of this model and of all its ranges.

    Raises:
        InputError: one is of another model, of other ranges or missing.
    """
    base, *experts = parents
    plan = plan_all(config, base)
    require_experts(base, experts, borders_of(plan.config))
    size = sum(file.bytes for artifact in experts for file in artifact.manifest.files)
    return replace(plan, data=InheritedData.of(experts[0]), summary={"ranges": len(experts), "disk_bytes": size})


def require_experts(base: Artifact, experts: Sequence[Artifact], borders: Sequence[int]) -> None:
    """Check that experts started from one model and that there is one for each range, in order.

    Raises:
        InputError: one is of another model, of other ranges, of another architecture or missing.
    """
    timesteps, architecture = borders[-1], read_config(experts[0])
    for artifact in experts:
        parent = artifact.manifest.parents[0]
        if parent.digest != base.manifest.digest:
            raise InputError(
                f"{artifact.path} was fine-tuned from another model (digest {parent.digest[:12]})",
                expected=f"experts of {base.path} (digest {base.manifest.digest[:12]})",
                fix=f"finectl finetune-ranges {base.path}",
            )
        if read_borders(artifact, timesteps) != tuple(borders):
            raise InputError(
                f"{artifact.path} is of ranges with the borders {artifact.manifest.metrics['borders']}",
                expected=str(list(borders)),
                fix=f"finectl finetune-ranges {base.path} --borders {','.join(map(str, borders))}",
            )
        require_same(architecture, experts[0], read_config(artifact), artifact)
    found = [artifact.manifest.metrics.get("index") for artifact in experts]
    for index in range(len(borders) - 1):
        if index not in found:
            first, end = borders[index], borders[index + 1]
            raise InputError(
                f"the expert {index} of timesteps {first} to {end - 1} is missing",
                expected=f"one expert for each of {len(borders) - 1} ranges",
                fix=f"finectl finetune-ranges {base.path} --only {index}, with the options of the others",
            )
    if found != list(range(len(borders) - 1)):
        raise InputError(f"the experts are those of the ranges {found}", expected="each once and in order")


def run_collection(job: Job[Config]) -> Outcome:
    """Link the experts' files into one artifact, and copy where links do not reach."""
    base, *experts = job.parents
    shutil.copyfile(experts[0].file(CONFIG), job.directory / CONFIG)
    for index, artifact in enumerate(experts):
        for weights, name in FILES.items():
            target = job.directory / expert_file(index, weights)
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                _link(artifact.file(name), target)
    sync(job.directory)
    metrics = {
        "borders": experts[0].manifest.metrics["borders"],
        "base": base.manifest.digest,
        "parameters": experts[0].manifest.metrics["parameters"],
    }
    return Outcome(metrics=metrics, cost=total_cost(experts))


def _link(source: Path, target: Path) -> None:
    """Give a file a second name; on another file system, or one without links, copy it."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        with staged(target) as temporary:
            shutil.copyfile(source, temporary)
