"""An artifact that a stage makes beside its own, because others will want it again."""

from __future__ import annotations

import contextlib
import datetime
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from finectl.artifacts.files import sha256_json
from finectl.artifacts.job import DataRecord, Job, Outcome
from finectl.artifacts.manifest import NAME, Manifest, digest_of
from finectl.artifacts.provenance import cost_of, data_record, environment
from finectl.artifacts.staging import Staging, point_latest
from finectl.artifacts.store import Artifact, Workspace, open_artifact
from finectl.errors import FinectlError, OutputError


def byproduct_path(workspace: Workspace, kind: str, slug: str, config: Mapping[str, Any]) -> Path:
    """Return where a byproduct of this kind and configuration lies, or would lie."""
    return workspace.directory(kind, f"{slug}-{_recipe(kind, config)[:8]}")


def find_byproduct(workspace: Workspace, kind: str, slug: str, config: Mapping[str, Any]) -> Artifact | None:
    """Return a byproduct that an earlier run published; None where there is none, or it is damaged."""
    with contextlib.suppress(FinectlError):
        found = open_artifact(byproduct_path(workspace, kind, slug, config), [kind])
        return found if found.manifest.recipe == _recipe(kind, config) else None
    return None


def publish_byproduct(
    job: Job[Any],
    stage: str,
    kind: str,
    slug: str,
    config: Mapping[str, Any],
    data: DataRecord | None,
    write: Callable[[Path], Mapping[str, Any]],
) -> Path | None:
    """Make an artifact of the workspace in the middle of a stage.

    Args:
        job: The run that makes it.
        stage: The stage of that run.
        kind: Its kind.
        slug: The readable part of its name.
        config: All that decides its content; its recipe is the hash of this.
        data: The data set that it was made of, if one.
        write: Writes its files into a directory and returns its metrics.

    Returns:
        Its path; None when another process is making the same at this moment.
    """
    start_s = time.monotonic()
    final = byproduct_path(job.workspace, kind, slug, config)
    recipe = _recipe(kind, config)
    try:
        staging = Staging(final, recipe, fresh=True)
    except OutputError:
        return None
    try:
        if find_byproduct(job.workspace, kind, slug, config) is not None:
            return final
        metrics = write(staging.path)
        files = staging.records()
        Manifest(
            kind=kind,
            stage=stage,
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds"),
            command=["finectl", *sys.argv[1:]],
            config=dict(config),
            execution={},
            recipe=recipe,
            parents=[],
            files=files,
            digest=digest_of(files),
            data=data_record(data),
            metrics=dict(metrics),
            cost=cost_of(Outcome(), start_s),
            environment=environment(),
        ).write(staging.path / NAME)
        path = staging.publish(replace=final.exists())
        point_latest(path)
        return path
    finally:
        staging.discard_if_empty()
        staging.close()


def _recipe(kind: str, config: Mapping[str, Any]) -> str:
    return sha256_json({"kind": kind, "config": dict(config)})
