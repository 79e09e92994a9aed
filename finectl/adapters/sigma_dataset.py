"""A collection of what layers own (sigma, biases) in models that were tuned on many tasks at several depths.

`init.safetensors` holds the start of each depth, `concepts/<task>-l<depth>.safetensors` the kept values of a task,
stacked (K, L, ...), `config.json` the learngene and how its models were tuned. Opening it needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finectl.adapters.weight_dataset import CONFIG, EXPECTED, INIT, concept_file, target_of
from finectl.artifacts.files import read_json_object
from finectl.artifacts.store import Artifact
from finectl.artifacts.tensors import load_tensors, read_metadata
from finectl.data.concepts import Concept, read_concepts
from finectl.errors import InputError
from finectl.models.weights.curves import by_layer, prefixes

if TYPE_CHECKING:
    from torch import Tensor

SIGMA = "sigma"
"""What such a collection says that it holds."""
HOW = ("base", "source", "sigma", "depth_scale")
"""Of config.json, what decides where tuning started: the learngene and how it is read."""


@dataclass(frozen=True)
class SigmaDataset:
    """An opened collection.

    Args:
        artifact: Where it is.
        shapes: `<name>.<type>` to the shape that one layer has of it.
        depths: Those of the models, in ascending order.
        concepts: The tasks that were tuned at all of these depths; each has a role.
        base: Digest of the learngene.
        kept: The updates after which values were kept, K of them.
        config: All of config.json.
        text: None: no text encoder took part.
    """

    artifact: Artifact
    shapes: Mapping[str, tuple[int, ...]]
    depths: tuple[int, ...]
    concepts: tuple[Concept, ...]
    base: str
    kept: tuple[int, ...]
    config: Mapping[str, Any]
    text: None = None

    @property
    def initial(self) -> dict[str, Tensor]:
        """The start of all depths, by layer, as `finectl.models.weights.curves.model_layout` names them."""
        path = self.artifact.file(INIT)
        found = load_tensors(path)
        layers: dict[str, Tensor] = {}
        for depth in self.depths:
            prefix = f"l{depth}."
            curves = {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
            self._require(curves, depth, (), str(path))
            layers.update(by_layer({name: curves[name] for name in self.shapes}, depth))
        return layers

    def checkpoints(self, concept: str | Concept) -> dict[str, Tensor]:
        """Return the values of a task at all depths, by layer, each (K, ...).

        Raises:
            InputError: it is not in the collection, or a file does not fit.
        """
        name = concept if isinstance(concept, str) else concept.name
        layers: dict[str, Tensor] = {}
        for depth in self.depths:
            path = self.artifact.file(concept_file(task_name(name, depth)))
            curves = load_tensors(path)
            self._require(curves, depth, (len(self.kept),), str(path))
            layers.update(by_layer({name: curves[name] for name in self.shapes}, depth, first_axis=1))
        return {prefix + name: layers[prefix + name] for prefix in prefixes(self.depths) for name in self.shapes}

    def record(self, concept: str | Concept, depth: int) -> dict[str, Any]:
        """Return what was measured while a task was tuned at a depth."""
        name = concept if isinstance(concept, str) else concept.name
        return dict(read_metadata(self.artifact.file(concept_file(task_name(name, depth)))) or {})

    def _require(self, curves: Mapping[str, Tensor], depth: int, first: tuple[int, ...], where: str) -> None:
        for name, shape in self.shapes.items():
            wanted = (*first, depth, *shape)
            if name not in curves or tuple(curves[name].shape) != wanted:
                raise InputError(f"{where} has no {name!r} of shape {wanted}", expected=EXPECTED)


def task_name(name: str, depth: int) -> str:
    """Return the name of a task at a depth; its file is named after it."""
    return f"{name}-l{depth}"


def open_sigma(artifact: Artifact) -> SigmaDataset:
    """Open a collection, without torch.

    Raises:
        InputError: it holds something else, or is damaged.
    """
    if target_of(artifact) != SIGMA:
        raise InputError(f"{artifact.path} holds no sigma", fix="finectl gen-weights collect --target sigma LEARNGENE")
    path = artifact.file(CONFIG)
    values = read_json_object(path, expected=EXPECTED)
    try:
        return SigmaDataset(
            artifact=artifact,
            shapes={str(name): tuple(int(side) for side in shape) for name, shape in values["shapes"].items()},
            depths=tuple(sorted(int(depth) for depth in values["depths"])),
            concepts=read_concepts(artifact),
            base=str(values["base"]),
            kept=tuple(int(update) for update in values["kept"]),
            config={**values, **{name: values[name] for name in HOW}},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is damaged: {error!r}", expected=EXPECTED) from error
