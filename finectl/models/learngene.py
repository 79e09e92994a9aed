"""A learngene on disk: what layers share, the rest that does not depend on depth, and the curves over depth.

Three files keep the three apart, because they are counted apart:

- `learngene.safetensors`: the learngene proper, `<type>.<name>`: U (m1, r) and V (m2, r) of FINE; `base_weight`,
  `base_bias` and with TLEG `slope_weight`, `slope_bias` of lines; `templates` (N, w, w) of WAVE;
- `rest.safetensors`: the embedders and the final layer, under their names in the model;
- `curves.safetensors`: one row a layer of the ancestor: `sigma.<type>` (L, ceil(r / s)) of FINE, `scalers.<type>`
  (L, N, m1 / w, m2 / w) of WAVE, and `bias.<type>` (L, m1) where layers have biases of their own.

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
from finectl.errors import InputError
from finectl.models.io import CONFIG, read_dit_config
from finectl.models.presets import LAYER_TYPES, DiTConfig, count_parameters, layer_shapes

if TYPE_CHECKING:
    from torch import Tensor

FACTORS = "learngene.safetensors"
REST = "rest.safetensors"
CURVES = "curves.safetensors"
CURVED = ("sigma", "scalers", "bias")
"""What a layer has of its own that can be read at other depths."""
SIGMA_RULE = "sigma_rule"
"""Name, among the metrics of a condensed model and of its learngene, of how sigma is read."""


@dataclass(frozen=True, eq=False)
class Learngene:
    """What is kept of a condensed model.

    Args:
        config: The architecture of the condensed model.
        factors: What layers share, `<type>.<name>`.
        rest: Embedders and final layer by parameter name.
        curves: What each layer has of its own, `<name>.<type>`, (L, ...): sigma or scalers, and biases.
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

    curves = {}
    for kind, path in LAYER_TYPES.items():
        for name in CURVED:
            layers = [state.get(f"blocks.{index}.{path}.{name}") for index in range(config.depth)]
            if layers[0] is not None:
                curves[f"{name}.{kind}"] = torch.stack([value for value in layers if value is not None])
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


def require_condensed_by(artifact: Artifact, method: str) -> None:
    """Check how a learngene's model was condensed.

    Args:
        artifact: A learngene.
        method: The `condense --method` that is needed.

    Raises:
        InputError: it was another one.
    """
    tying = read_dit_config(artifact).factorized
    if tying is None or tying.method != method:
        raise InputError(
            f"{artifact.path} is a learngene of condense --method {tying.method if tying else 'none'}",
            expected=f"one of condense --method {method}",
            fix=f"finectl condense --method {method} | finectl extract - | finectl init - --method ...",
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
        `learngene` (what layers share), `rest` (embedders and final layer), `curves` (what each layer has of its own),
        `kept` (their sum), `dense` (all models of the family together).
    """
    counts = count_parameters(config)
    dense = count_parameters(dense_config(config, config.depth))
    learngene = counts["factors"]
    rest = counts["total"] - counts["factors"] - counts["blocks"]
    tying = config.factorized
    # The weights of a type that is not shared belong to one layer each: of them the biases are kept.
    shapes = layer_shapes(config).items()
    own = sum(tying.own_count(kind, *shape) if tying and kind in tying.types else shape[0] for kind, shape in shapes)
    curves = config.depth * own
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
