"""Lineage: what an artifact was made from, as far as the workspace still holds it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finectl.artifacts.manifest import ParentRecord
from finectl.artifacts.store import Artifact, Workspace

TENSORS = ".safetensors"
EARLIER = "checkpoints/"


# The stage at which a model begins: what it starts from, be it a dense model, is an ancestor with a cost of its own.
INITIALISING = "init"
MERGING = "merge"
MODEL_KINDS = ("model", "experts")
RAW, AVERAGED = "model.safetensors", "ema.safetensors"
COLLECTED = "experts"
"""A kind whose cost is that of its parents, told again."""


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
    """Return the models from the first initialisation to this one: what was spent on this model alone.

    Of a merged model they are those of all models that it was merged from, each once.
    """
    made: dict[Path, Artifact] = {}
    left: list[Ancestry | ParentRecord] = [ancestry]
    while left:
        one = left.pop(0)
        if isinstance(one, Ancestry) and (one is ancestry or one.artifact.kind in MODEL_KINDS):
            made.setdefault(one.artifact.path, one.artifact)
            left += _model_parents(one)
    return list(made.values())[::-1]


def total_cost(chain: Iterable[Artifact]) -> dict[str, Any]:
    """Return what making several artifacts cost together.

    Returns:
        `steps` (optimiser updates), `wall_s` (seconds), `samples` (images seen in training) and `flops`
        (floating-point operations of the training). `flops` is None where they are not known of one that was trained:
        manifests of earlier versions do not have them.
    """
    costs = [artifact.manifest.cost for artifact in chain]
    trained = [cost.get("flops") for cost in costs if cost.get("steps", 0)]
    return {
        "steps": sum(cost.get("steps", 0) for cost in costs),
        "wall_s": round(sum(cost.get("wall_s", 0.0) for cost in costs), 1),
        "samples": sum(cost.get("samples", 0) for cost in costs),
        "flops": None if None in trained else sum(trained),
    }


def stored_bytes(ancestry: Ancestry) -> int | None:
    """Return the size of what has to be kept to make such a model: that of what its chain was initialised from.

    Args:
        ancestry: Of a model.

    Returns:
        Bytes of the tensor files of the parent (its learngene, or another) of the first model of the chain, without
        weights of earlier updates, and without raw weights where there are averaged ones; 0 when nothing was taken
        from any; None when that parent is gone.
    """
    source = _source(_links(ancestry)[0])
    if source is None:
        return 0
    if not isinstance(source, Ancestry):
        return None
    # Of raw and averaged weights the averaged ones are what is taken.
    left_out = (EARLIER, RAW) if source.artifact.has(AVERAGED) else (EARLIER,)
    files = source.artifact.manifest.files
    return sum(file.bytes for file in files if file.path.endswith(TENSORS) and not file.path.startswith(left_out))


def ancestor_cost(ancestry: Ancestry) -> dict[str, Any] | None:
    """Return what was spent once for all models that start from the same ancestor.

    Args:
        ancestry: Of a model.

    Returns:
        The cost, as `total_cost` gives it, of the parent of the first model of the chain and of everything that this
        parent was made from (for FINE: `extract`, `condense`, and the dense model of `condense --from`); zeros when
        nothing was taken from any; None when one of them is gone.
    """
    source = _source(_links(ancestry)[0])
    return total_cost([]) if source is None else whole_cost(source)


def whole_cost(ancestry: Ancestry | ParentRecord) -> dict[str, Any] | None:
    """Return what an artifact and everything that it was made from cost, as `total_cost` gives it.

    Returns:
        The cost, each artifact counted once; None when one of them is gone.
    """
    made: dict[Path, Artifact] = {}
    left = [ancestry]
    while left:
        one = left.pop()
        if not isinstance(one, Ancestry):
            return None
        made[one.artifact.path] = one.artifact
        left += [] if _starts_anew(one.artifact) else one.parents
    return total_cost(artifact for artifact in made.values() if artifact.kind != COLLECTED)


def _links(ancestry: Ancestry) -> list[Ancestry]:
    """Return the ancestries of a chain of models, from the first initialisation to the last."""
    links = [ancestry]
    while links[0].artifact.manifest.stage != INITIALISING and (source := _source(links[0])) is not None:
        if not isinstance(source, Ancestry) or source.artifact.kind not in MODEL_KINDS:
            break
        links.insert(0, source)
    return links


def _model_parents(ancestry: Ancestry) -> tuple[Ancestry | ParentRecord, ...]:
    """Return what a model's updates were made on top of: its source, and of a merged model all that was merged."""
    stage = ancestry.artifact.manifest.stage
    if stage == INITIALISING or _starts_anew(ancestry.artifact):
        return ()
    return ancestry.parents if stage == MERGING else ancestry.parents[:1]


def _source(ancestry: Ancestry) -> Ancestry | ParentRecord | None:
    """Return what an artifact's tensors were made from; None when it was nothing."""
    return ancestry.parents[0] if ancestry.parents and not _starts_anew(ancestry.artifact) else None


def _starts_anew(artifact: Artifact) -> bool:
    """Tell whether a model took its shapes at most from its parent, as the control does."""
    return bool(artifact.manifest.metrics.get("parameters_transferred_with_embedders") == 0)
