"""Experts of timestep ranges on disk, found without torch.

An `experts` artifact has one config.json and, for each range, `experts/<index>/` with the files of a model.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

from finectl.artifacts.store import Artifact
from finectl.diffusion.ranges import is_partition
from finectl.errors import InputError
from finectl.models.io import FILES, ModelConfig, read_config

KIND = "experts"
FOLDER = "experts"


@dataclass(frozen=True)
class Experts:
    """The experts of all ranges.

    Args:
        config: Their architecture, projections and all.
        borders: The N + 1 borders of the ranges, from 0 to the number of timesteps.
        files: The safetensors file of each expert.
    """

    config: ModelConfig
    borders: tuple[int, ...]
    files: tuple[Path, ...]


def expert_file(index: int, weights: str) -> str:
    """Return the path, inside an artifact, of an expert's `ema` or `raw` weights."""
    return f"{FOLDER}/{index}/{FILES[weights]}"


def read_experts(artifact: Artifact, weights: str = "ema") -> Experts:
    """Return what an artifact of experts holds.

    Args:
        artifact: Of kind `experts`.
        weights: `ema` or `raw`; experts that never had an EMA give their raw weights for both.

    Raises:
        InputError: the borders are none, or the file of an expert is missing.
    """
    config = read_config(artifact)
    borders = read_borders(artifact, config.diffusion.timesteps)
    names = [
        expert_file(index, weights if artifact.has(expert_file(index, weights)) else "raw")
        for index in range(len(borders) - 1)
    ]
    missing = [index for index, name in enumerate(names) if not artifact.has(name)]
    if missing:
        first = missing[0]
        raise InputError(
            f"{artifact.path} has no expert {first}, of timesteps {borders[first]} to {borders[first + 1] - 1}",
            expected=f"{len(names)} experts",
            fix=f"make it again with --force: {' '.join(artifact.manifest.command)}",
        )
    return Experts(config, borders, tuple(artifact.file(name) for name in names))


def read_borders(artifact: Artifact, timesteps: int) -> tuple[int, ...]:
    """Return the borders that the manifest of experts, or of one of them, names.

    Args:
        artifact: Of kind `experts` or `expert`.
        timesteps: T of its model.

    Raises:
        InputError: they do not rise from 0 to T.
    """
    found = artifact.manifest.metrics.get("borders")
    if isinstance(found, list) and all(type(border) is int for border in found):
        borders = tuple(found)
        if is_partition(borders, timesteps):
            return borders
    raise InputError(
        f"the manifest of {artifact.path} gives the borders {found!r}",
        expected=f"integers that rise from 0 to {timesteps}",
        fix=f"make it again with --force: {' '.join(artifact.manifest.command)}",
    )


def expert_of(t: int, borders: tuple[int, ...]) -> int:
    """Return the index of the expert of a timestep: floor(t N / T) for equal ranges.

    Args:
        t: In 0..T-1.
        borders: The N + 1 borders.

    Reference: DeMe, arXiv 2410.06664, Eq. 7.
    """
    return bisect_right(borders, t, 1, len(borders) - 1) - 1
