"""Fine-tuned models around the one that they started from: their files and their one architecture. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finectl.artifacts.store import Artifact, Workspace
from finectl.errors import InputError
from finectl.models.experts import read_experts
from finectl.models.io import ModelConfig, read_config, weights_file

EXPERTS, BASE = "experts", "base"
SHOWN_FIELDS = 3
UNET_PREFIX = "unet."


@dataclass(frozen=True)
class Parts:
    """What is merged, or compared.

    Args:
        config: The architecture of the models, projections and all.
        base_artifact: theta_0; None where none is needed.
        base: The file of its averaged weights.
        files: Those of the models.
        names: How messages and tables name them.
        borders: The borders of the experts' timestep ranges; None for models that are no experts.
    """

    config: ModelConfig
    base_artifact: Artifact | None
    base: Path | None
    files: tuple[Path, ...]
    names: tuple[str, ...]
    borders: tuple[int, ...] | None

    @property
    def count(self) -> int:
        """How many models there are."""
        return len(self.files)

    @classmethod
    def of(cls, parents: Sequence[Artifact], *, based: bool) -> Parts:
        """Find the files of the inputs.

        Args:
            parents: Experts, which name their base themselves, or models.
            based: Whether the last of several models is theta_0.

        Raises:
            InputError: an artifact is damaged, the base is gone, or the architectures differ.
        """
        if parents[0].kind == EXPERTS:
            return cls._of_experts(parents[0])
        base = parents[-1] if based else None
        models = list(parents[:-1] if base is not None else parents)
        architecture = read_config(models[0])
        for artifact in (*models[1:], *([base] if base else [])):
            require_same(architecture, models[0], read_config(artifact), artifact)
        files = tuple(weights_file(artifact, "ema") for artifact in models)
        names = tuple(artifact.name for artifact in models)
        return cls(architecture, base, weights_file(base, "ema") if base else None, files, names, None)

    @classmethod
    def _of_experts(cls, artifact: Artifact) -> Parts:
        experts = read_experts(artifact)
        base = base_of(artifact)
        names = [f"[{first}, {end})" for first, end in zip(experts.borders[:-1], experts.borders[1:], strict=True)]
        return cls(experts.config, base, weights_file(base, "ema"), experts.files, tuple(names), tuple(experts.borders))

    def described(self) -> str:
        """Return in words what they are."""
        what = f"experts of {self.count} timestep ranges" if self.borders else f"{self.count} models"
        return f"{what} around {self.base_artifact.path}" if self.base_artifact else what


def base_of(experts: Artifact) -> Artifact:
    """Return the model that experts were fine-tuned from.

    Raises:
        InputError: it is gone, or was made anew since.
    """
    record = next((parent for parent in experts.manifest.parents if parent.role == BASE), None)
    found = None
    if record is not None:
        found = Workspace(experts.path.absolute().parent.parent).parent(experts, record.path, record.digest)
    if found is None:
        where = record.path if record else "unknown"
        raise InputError(
            f"the model that {experts.path} was fine-tuned from is gone, or another now ({where})",
            expected="theta_0, around which experts are merged",
            fix="make it again, or copy it back to its place in the workspace",
        )
    return found


def require_same(one: ModelConfig, first: Artifact, other: ModelConfig, second: Artifact) -> None:
    """Check that two models have one architecture.

    Raises:
        InputError: they differ; the message names the first fields.
    """
    left, right = one.to_dict(), other.to_dict()
    differing = [name for name in {**left, **right} if left.get(name) != right.get(name)]
    if differing:
        shown = ", ".join(f"{name} {left.get(name)} and {right.get(name)}" for name in differing[:SHOWN_FIELDS])
        raise InputError(
            f"{first.path} and {second.path} are of two architectures: {shown}",
            expected="models fine-tuned from one model",
        )


def missing_projections(config: ModelConfig) -> dict[str, Callable[[tuple[int, ...]], Any]]:
    """Return what theta_0 is extended by where the models have projections: the identity."""

    def identity(shape: tuple[int, ...]) -> Any:
        import numpy as np

        return np.eye(shape[0], dtype=np.float32).reshape(shape)

    return {place.parameter: identity for place in config.places}


def block_of(name: str) -> str:
    """Return the block of a parameter: `blocks.3`, `down_blocks.0`, or what it is part of outside of them."""
    parts = name.removeprefix(UNET_PREFIX).split(".")
    return ".".join(parts[:2]) if len(parts) > 1 and parts[1].isdecimal() else parts[0]
