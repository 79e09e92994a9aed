"""Lineage: what an artifact was made from, as far as the workspace still holds it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from finectl.artifacts.manifest import ParentRecord
from finectl.artifacts.store import Artifact, Workspace


@dataclass(frozen=True)
class Ancestry:
    """An artifact and the ancestries of its parents; a parent that is gone is only its record."""

    artifact: Artifact
    parents: tuple[Ancestry | ParentRecord, ...]


def trace(workspace: Workspace, artifact: Artifact) -> Ancestry:
    """Follow the parents of an artifact to the beginning.

    Raises:
        InputError: a manifest names a parent by an absolute path.
    """
    parents: list[Ancestry | ParentRecord] = []
    for record in artifact.manifest.parents:
        parent = workspace.parent(artifact, record.path, record.digest)
        parents.append(record if parent is None else trace(workspace, parent))
    return Ancestry(artifact, tuple(parents))


def model_chain(ancestry: Ancestry) -> list[Artifact]:
    """Return the `model` artifacts from the first initialisation to this one: what was spent on this model alone."""
    chain = [ancestry.artifact]
    current = ancestry
    while current.parents and isinstance(current.parents[0], Ancestry):
        current = current.parents[0]
        if current.artifact.kind != "model":
            break
        chain.insert(0, current.artifact)
    return chain


def total_cost(chain: list[Artifact]) -> dict[str, Any]:
    """Return the optimiser updates and wall seconds of a chain of artifacts together."""
    return {
        "steps": sum(artifact.manifest.cost.get("steps", 0) for artifact in chain),
        "wall_s": round(sum(artifact.manifest.cost.get("wall_s", 0.0) for artifact in chain), 1),
    }
