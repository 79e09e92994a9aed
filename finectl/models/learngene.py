"""A learngene on disk: the shared factors, the rest that does not depend on depth, and the curves over depth.

Three files keep the three apart, because they are counted apart:

- `learngene.safetensors`: `<type>.U` (m1, r) and `<type>.V` (m2, r), the learngene proper;
- `rest.safetensors`: the embedders and the final layer, under their names in the model;
- `curves.safetensors`: `sigma.<type>` (L, ceil(r / s)) and `bias.<type>` (L, m1), one row a layer of the ancestor.

Reference: FINE, arXiv 2409.19289, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from finectl.artifacts.files import write_json
from finectl.artifacts.manifest import Manifest
from finectl.artifacts.store import Artifact
from finectl.artifacts.tensors import load_tensors, save_tensors
from finectl.models.io import CONFIG, read_dit_config
from finectl.models.presets import LAYER_TYPES, DiTConfig, count_parameters, layer_shapes

if TYPE_CHECKING:
    from torch import Tensor

FACTORS = "learngene.safetensors"
REST = "rest.safetensors"
CURVES = "curves.safetensors"
SIGMA_RULE = "sigma_rule"
"""Name, among the metrics of a condensed model and of its learngene, of how sigma is read."""


@dataclass(frozen=True, eq=False)
class Learngene:
    """What is kept of a condensed model.

    Args:
        config: The architecture of the condensed model.
        factors: `<type>.U` (m1, r) and `<type>.V` (m2, r).
        rest: Embedders and final layer by parameter name.
        curves: `sigma.<type>` (L, ceil(r / s)) of factorised types and `bias.<type>` (L, m1) of all types.
    """

    config: DiTConfig
    factors: Mapping[str, Tensor]
    rest: Mapping[str, Tensor]
    curves: Mapping[str, Tensor]


def split_state(state: Mapping[str, Tensor], config: DiTConfig) -> Learngene:
    """Take a condensed model's state apart.

    The weights of a type that is not factorised belong to one layer each; they depend on depth and are left behind.
    """
    import torch

    factored = config.factorized.types if config.factorized else ()
    curves = {}
    for kind, path in LAYER_TYPES.items():
        layers = [f"blocks.{index}.{path}" for index in range(config.depth)]
        curves[f"bias.{kind}"] = torch.stack([state[f"{layer}.bias"] for layer in layers])
        if kind in factored:
            curves[f"sigma.{kind}"] = torch.stack([state[f"{layer}.sigma"] for layer in layers])
    prefix = "factors."
    return Learngene(
        config,
        {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)},
        {name: value for name, value in state.items() if not name.startswith((prefix, "blocks."))},
        curves,
    )


def save_learngene(directory: Path, learngene: Learngene) -> None:
    """Write the three files and the ancestor's config.json."""
    write_json(directory / CONFIG, learngene.config.to_dict())
    save_tensors(directory / FACTORS, learngene.factors)
    save_tensors(directory / REST, learngene.rest)
    save_tensors(directory / CURVES, learngene.curves)


def load_learngene(artifact: Artifact) -> Learngene:
    """Read a `learngene` artifact.

    Raises:
        InputError: a file is missing or damaged.
    """
    return Learngene(
        read_dit_config(artifact),
        load_tensors(artifact.file(FACTORS)),
        load_tensors(artifact.file(REST)),
        load_tensors(artifact.file(CURVES)),
    )


def sigma_rule(manifest: Manifest) -> str:
    """Return how `init` reads sigma off a condensed model's curves over depth, where it is not told.

    Layers that were trained as one condensed model lie on curves, which are interpolated. Those of an ancestor that was
    trained without shared factors do not: whole layers are taken (`nearest`).

    Args:
        manifest: Of a condensed model, or of its learngene.
    """
    return str(manifest.metrics.get(SIGMA_RULE, "interpolated"))


def storage(config: DiTConfig, depths: list[int]) -> dict[str, int]:
    """Count the parameters kept, and those of the dense models of a family that they stand for.

    Args:
        config: The condensed model's architecture.
        depths: Depths of the family.

    Returns:
        `learngene` (U and V), `rest` (embedders and final layer), `curves` (sigma and biases of the ancestor's layers),
        `kept` (their sum), `dense` (all models of the family together).
    """
    counts = count_parameters(config)
    dense = count_parameters(dense_config(config, config.depth))
    learngene = counts["factors"]
    rest = counts["total"] - counts["factors"] - counts["blocks"]
    factors = config.factorized
    sigma = len(factors.types) * factors.sigma_count if factors else 0
    curves = config.depth * (sum(rows for rows, _ in layer_shapes(config).values()) + sigma)
    return {
        "learngene": learngene,
        "rest": rest,
        "curves": curves,
        "kept": learngene + rest + curves,
        "dense": sum(dense["block"] * depth + rest for depth in depths),
    }


def evenly_spaced(layers: int, depth: int) -> list[int]:
    """Return which of an ancestor's layers stand for those of a model of another depth: first and last, evenly between.

    Layer i of the model, counted from 0, is layer round(i (L - 1) / (L' - 1)); a single one is the middle layer.

    Args:
        layers: Layers of the ancestor, L.
        depth: Layers of the model, L'; above L, layers are repeated.
    """
    if depth == 1:
        return [(layers - 1) // 2]
    return [round(index * (layers - 1) / (depth - 1)) for index in range(depth)]


def dense_config(config: DiTConfig, depth: int) -> DiTConfig:
    """Return the dense architecture of another depth with the shapes of `config`."""
    return replace(config, depth=depth, factorized=None)
