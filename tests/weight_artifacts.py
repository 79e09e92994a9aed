"""A small collection of weights as an artifact, for tests: a linear function of the words, and noise."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from finectl.adapters.lora import LoraLayer
from finectl.adapters.weight_dataset import CONFIG, INIT, KIND, WeightDataset, concept_file, open_weights, write_concept
from finectl.artifacts.files import write_json
from finectl.artifacts.job import Job, Outcome, Plan, Stage
from finectl.artifacts.tensors import save_tensors
from finectl.console import Console
from finectl.data.concepts import FILE, Concept, write_concepts
from finectl.models.text import describe_text
from finectl.runner import RunOptions, run_stage

LAYERS = (
    LoraLayer("stem", "conv", (2, 3, 3, 3), (8, 2, 1, 1), "norm", 8),
    LoraLayer("attention.query", "linear", (2, 8), (8, 2)),
    LoraLayer("head", "conv", (1, 8, 3, 3), (3, 1, 1, 1)),
)
COLOURS, TEXTURES = ("warm", "cool", "grey", "faded"), ("pencil", "mosaic", "blur", "relief")
VAL, TEST = (("warm", "blur"), ("grey", "pencil")), (("cool", "mosaic"), ("faded", "relief"))


@dataclass(frozen=True)
class Config:
    """Options of the stage below."""

    noise: float = 0.05
    seed: int = 0


def concepts() -> tuple[Concept, ...]:
    """Return 12 concepts for training, 2 for validation and 2 for testing."""
    found = []
    for colour, texture in itertools.product(COLOURS, TEXTURES):
        role = "val" if (colour, texture) in VAL else "test" if (colour, texture) in TEST else "train"
        text = f"{texture} in {colour}"
        found.append(Concept(f"{colour}-{texture}", text, (f"{colour} {texture}",), (colour, texture), role))
    return tuple(found)


def shapes() -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors."""
    return {name: shape for layer in LAYERS for name, shape in layer.shapes.items()}


def weights_of(noise: float, seed: int) -> tuple[dict[str, Tensor], dict[str, list[dict[str, Tensor]]]]:
    """Return the shared start, and two checkpoints of every concept."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(size: float) -> dict[str, Tensor]:
        return {name: size * torch.randn(shape, generator=generator) for name, shape in shapes().items()}

    initial, mean = drawn(0.3), drawn(0.02)
    words = {word: drawn(0.02) for word in (*COLOURS, *TEXTURES)}
    found: dict[str, list[dict[str, Tensor]]] = {}
    for concept in concepts():
        one, two = (words[atom] for atom in concept.atoms)
        own = {name: initial[name] + mean[name] + one[name] + two[name] for name in initial}
        noises = [drawn(0.02 * noise) for _ in range(2)]
        found[concept.name] = [{name: own[name] + more[name] for name in own} for more in noises]
    return initial, found


def collection_stage() -> Stage[Config]:
    """Return a stage that writes the collection as `finectl gen-weights collect` does."""

    def run(job: Job[Config]) -> Outcome:
        initial, found = weights_of(job.config.noise, job.config.seed)
        save_tensors(job.directory / INIT, initial)
        for name, kept in found.items():
            write_concept(job.directory / concept_file(name), kept, {"l1": 0.1})
        write_concepts(job.directory / FILE, concepts())
        described = {"layers": [layer.to_dict() for layer in LAYERS], "base": "b" * 64, "kept": [8, 10]}
        write_json(job.directory / CONFIG, {**described, "text": describe_text("hash")})
        return Outcome()

    def plan(config: Config, parents: object) -> Plan[Config]:
        return Plan(config, slug="tiny")

    return Stage("gen-weights-collect", 1, KIND, Config, lambda config: None, plan, run, locations=())


def make_collection(workspace: Path, **config: float) -> WeightDataset:
    """Make the collection in a workspace and open it."""
    options = RunOptions(workspace=workspace)
    made = run_stage(collection_stage(), Config(**config), (), options, Console(quiet=True))  # type: ignore[arg-type]
    assert made.artifact is not None
    return open_weights(made.artifact)
