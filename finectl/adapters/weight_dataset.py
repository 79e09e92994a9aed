"""A collection of low-rank weights: those of many concepts, all trained from one start.

`init.safetensors` is the start, `concepts/<name>.safetensors` holds the kept weights of a concept, stacked for each
tensor (K, ...), `config.json` the adapted layers and the generator they belong to. Opening it needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finectl.adapters.lora import LoraLayer, lora_shapes, require_lora
from finectl.artifacts.files import read_json_object
from finectl.artifacts.store import Artifact
from finectl.artifacts.tensors import load_tensors, read_metadata, save_tensors
from finectl.data.concepts import Concept, read_concepts
from finectl.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

KIND, SHARD_KIND = "weight-dataset", "weight-shard"
CONFIG, INIT, FOLDER = "config.json", "init.safetensors", "concepts"
EXPECTED = "a collection that finectl gen-weights collect made"
LORA = "lora"
"""What a collection holds where it does not say."""


@dataclass(frozen=True)
class WeightDataset:
    """An opened collection.

    Args:
        artifact: Where it is.
        layers: The adapted layers, in order.
        concepts: The concepts whose weights are there; each has a role.
        base: Digest of the GAN that the weights belong to.
        text: Record of its text encoder.
        kept: The updates whose weights were kept, K of them: the same ones for each order of the data.
        config: All of config.json.
    """

    artifact: Artifact
    layers: tuple[LoraLayer, ...]
    concepts: tuple[Concept, ...]
    base: str
    text: Mapping[str, Any] | None
    kept: tuple[int, ...]
    config: Mapping[str, Any]

    @property
    def initial(self) -> dict[str, Tensor]:
        """The start that all concepts share, by name."""
        found = load_tensors(self.artifact.file(INIT))
        require_lora(self.layers, found, str(self.artifact.path))
        return {name: found[name] for name in lora_shapes(self.layers)}

    def checkpoints(self, concept: str | Concept) -> dict[str, Tensor]:
        """Return the weights of a concept, each tensor (K, ...): of each order of the data, the last trained ones last.

        Raises:
            InputError: it is not in the collection, or its file does not fit.
        """
        name = concept if isinstance(concept, str) else concept.name
        path = self.artifact.file(concept_file(name))
        found = load_tensors(path)
        for key, shape in lora_shapes(self.layers).items():
            wanted = (len(self.kept), *shape)
            if key not in found or tuple(found[key].shape) != wanted:
                raise InputError(f"{path} has no {key!r} of shape {wanted}", expected=EXPECTED)
        return {key: found[key] for key in lora_shapes(self.layers)}

    def last(self, concept: str | Concept) -> dict[str, Tensor]:
        """Return the last weights of a concept."""
        return {name: value[-1] for name, value in self.checkpoints(concept).items()}

    def record(self, concept: str | Concept) -> dict[str, Any]:
        """Return what was measured while a concept's weights were trained."""
        name = concept if isinstance(concept, str) else concept.name
        return dict(read_metadata(self.artifact.file(concept_file(name))) or {})


def open_weights(artifact: Artifact) -> WeightDataset:
    """Open a collection, without torch.

    Raises:
        InputError: it is damaged.
    """
    path = artifact.file(CONFIG)
    values = read_json_object(path, expected=EXPECTED)
    if values.get("target", LORA) != LORA:
        raise InputError(
            f"{artifact.path} holds {values['target']} of models, no low-rank weights",
            expected="a collection of collect without --target",
            fix="finectl gen-weights train takes it",
        )
    try:
        return WeightDataset(
            artifact=artifact,
            layers=tuple(LoraLayer.from_dict(layer) for layer in values["layers"]),
            concepts=read_concepts(artifact),
            base=str(values["base"]),
            text=values["text"],
            kept=tuple(int(update) for update in values["kept"]),
            config=values,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged: {error!r}", expected=EXPECTED) from error


def target_of(artifact: Artifact) -> str:
    """Return what a collection, or a generator trained on one, holds: `lora` or `sigma`.

    Raises:
        InputError: its config.json is missing or damaged.
    """
    return str(read_json_object(artifact.file(CONFIG), expected=EXPECTED).get("target", LORA))


def concept_file(name: str) -> str:
    """Return the path, inside the artifact, of a concept's weights."""
    return f"{FOLDER}/{name}.safetensors"


def write_concept(path: Path, kept: Sequence[Mapping[str, Tensor]], record: Mapping[str, Any]) -> None:
    """Write the weights of a concept in one atomic file.

    Args:
        path: Where it goes.
        kept: Of each kept update, the earliest first.
        record: What was measured, as JSON.
    """
    import torch

    path.parent.mkdir(parents=True, exist_ok=True)
    stacked = {name: torch.stack([state[name].float().cpu() for state in kept]) for name in kept[0]}
    save_tensors(path, stacked, metadata=json.loads(json.dumps(record)))
