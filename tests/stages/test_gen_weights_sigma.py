"""Sigma of FINE learngenes from the text of a task: collecting, training a generator, and models of any depth."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support import run_cli

from finectl.adapters.sigma_dataset import open_sigma
from finectl.artifacts.store import open_artifact
from finectl.artifacts.tensors import load_tensors
from finectl.data.tasks import data_of
from finectl.errors import Interrupted
from finectl.initializers.expansion import curves_at
from finectl.models.io import load_weights
from finectl.models.learngene import load_learngene
from finectl.stages.gen_weights.collect_sigma.tuning import SigmaWork

COLLECT = ("--target", "sigma", "--tasks", 10, "--task-classes", 2, "--depths", "1,3")
TUNING = ("--steps", 5, "--batch-size", 8, "--checkpoints", 1, "--workers", 1)
TRAIN = ("--size", "tiny", "--steps", 2, "--batch-size", 4, "--basis", "pca4", "--eval-every", 2)
PROMPT = "the digits 3 and 7"


@dataclass(frozen=True)
class Made:
    """A collection, and a generator trained on it."""

    root: Path
    learngene: Path
    collection: Path
    generator: Path


@pytest.fixture(scope="module")
def made(_chain: Any) -> Made:
    place = ("--workspace", _chain.root)
    collection = run_cli("gen-weights", "collect", _chain.learngene, *COLLECT, *TUNING, *place).path
    generator = run_cli("gen-weights", "train", collection, *TRAIN, *place).path
    return Made(_chain.root, _chain.learngene, collection, generator)


def init(made: Made, *options: object, workspace: Path | None = None) -> Path:
    return run_cli("init", made.learngene, *options, "--workspace", workspace or made.root).path


def test_a_collection_holds_what_init_tunes_on_the_same_task(made: Made) -> None:
    dataset = open_sigma(open_artifact(made.collection))
    assert dataset.depths == (1, 3)
    assert {concept.role for concept in dataset.concepts} == {"train", "val"}  # others are collected where asked for
    concept = next(concept for concept in dataset.concepts if len(concept.atoms) == 2)
    tuned = init(
        made,
        *("--depth", 3, "--data", data_of(concept), "--tune-steps", 5, "--batch-size", 8),
        *("--tune-samples", dataset.record(concept, 3)["images"]),
    )
    learngene = load_learngene(open_artifact(made.learngene))
    values = {name: tensor[-1] for name, tensor in dataset.checkpoints(concept).items()}
    weights = load_weights(open_artifact(tuned), "raw")
    factor_u, factor_v = learngene.factors["qkv.U"], learngene.factors["qkv.V"]
    for layer in range(3):
        wanted = (factor_u * values[f"l3.{layer}.sigma.qkv"]) @ factor_v.T
        assert torch.allclose(weights[f"blocks.{layer}.attn.qkv.weight"], wanted, atol=1e-5)
        assert torch.equal(weights[f"blocks.{layer}.attn.qkv.bias"], values[f"l3.{layer}.bias.qkv"])


def test_parts_go_together_and_are_not_tuned_again(made: Made, workspace: Path) -> None:
    given = (made.learngene, "--target", "sigma", "--tasks", 3, "--task-classes", 2, "--depths", "1", *TUNING)
    for number in (1, 2):
        part = run_cli("gen-weights", "collect", *given, "--shard", f"{number}/2").path
        assert part.parent.name == "weight-shard"
    whole = run_cli("gen-weights", "collect", *given)
    assert "3 models are taken from parts" in whole.err
    other = run_cli("gen-weights", "collect", *given, "--force", "--workspace", workspace / "other").path
    names = sorted(path.name for path in (whole.path / "concepts").iterdir())
    assert len(names) == 3
    for name in names:
        first, second = (load_tensors(path / "concepts" / name) for path in (whole.path, other))
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_an_interrupted_collection_goes_on_with_what_is_missing(
    made: Made, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    tune = SigmaWork.do

    def interrupted(work: SigmaWork, opened: Any, item: Any, asked: Any) -> float | None:
        if len(done) == 2:
            raise Interrupted("a signal", saved=True)
        done.append(item.name)
        return tune(work, opened, item, asked)

    def counted(work: SigmaWork, opened: Any, item: Any, asked: Any) -> float | None:
        done.append(item.name)
        return tune(work, opened, item, asked)

    given = ("gen-weights", "collect", made.learngene, "--target", "sigma", "--tasks", 3, "--depths", "1", *TUNING)
    monkeypatch.setattr(SigmaWork, "do", interrupted)
    assert run_cli(*given).code == 75
    monkeypatch.setattr(SigmaWork, "do", counted)
    whole = run_cli(*given).path
    assert len(done) == len(set(done)) == len(list((whole / "concepts").iterdir())) == 3


def test_a_model_of_a_depth_that_was_never_collected_in_one_step(made: Made) -> None:
    ran = run_cli(
        *("init", made.learngene, "--sigma-from", made.generator, "--prompt", PROMPT, "--depth", 2),
        *("--workspace", made.root),
    )
    artifact = open_artifact(ran.path)
    assert artifact.manifest.cost["steps"] == 0  # no updates
    assert [parent.role for parent in artifact.manifest.parents] == ["source", "generator"]
    weights = load_weights(artifact, "raw")
    other = load_weights(open_artifact(init(made, *sigma_options(made, "the digits 1 and 8"))), "raw")
    plain = load_weights(open_artifact(init(made, "--depth", 2, "--tune-steps", 0)), "raw")
    name = "blocks.1.mlp.fc1.weight"
    assert not torch.equal(weights[name], plain[name])
    assert not torch.equal(weights[name], other[name])  # the text decides
    assert torch.equal(weights["x_embedder.proj.weight"], plain["x_embedder.proj.weight"])


def sigma_options(made: Made, prompt: str, depth: int = 2) -> tuple[object, ...]:
    return "--sigma-from", made.generator, "--prompt", prompt, "--depth", depth


def test_the_generator_says_what_it_generates_and_is_read_by_nothing_else(made: Made) -> None:
    said = json.loads((made.generator / "config.json").read_text())
    assert said["target"] == "sigma" and said["base"] == open_artifact(made.learngene).manifest.digest
    refused = run_cli("gen-weights", "predict", PROMPT, made.generator)
    assert refused.code == 3 and "--sigma-from" in refused.err


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--prompt", "the digits 3 and 7", "--sigma", "nearest"), 2, "both given"),
        ((), 2, "needs the task in words"),
        (("--prompt", "zebra"), 2, "no word of"),
        (("--prompt", "the digit 3", "--model", "dit-s", "--depth", 2), 2, "width"),
        (("--prompt", "the digit 3", "--method", "he"), 2, "--method fine"),
    ],
)
def test_what_does_not_fit_is_refused(made: Made, options: tuple[object, ...], code: int, said: str) -> None:
    refused = run_cli("init", made.learngene, "--sigma-from", made.generator, *options, "--workspace", made.root)
    assert refused.code == code, refused.err
    assert said in refused.err


def test_another_learngene_is_refused(made: Made, workspace: Path) -> None:
    condensed = run_cli("condense", "--depth", 2, "--steps", 1, "--batch-size", 8).path
    other = run_cli("extract", condensed).path
    refused = run_cli("init", other, *sigma_options(made, PROMPT))
    assert refused.code == 3 and "another learngene" in refused.err


def test_the_start_of_a_collection_is_that_of_init(made: Made) -> None:
    dataset = open_sigma(open_artifact(made.collection))
    learngene = load_learngene(open_artifact(made.learngene))
    curves = curves_at(learngene, 3, "interpolated", 0.75)
    for name, value in curves.items():
        assert torch.equal(dataset.initial[f"l3.2.{name}"], value[2])


@pytest.mark.parametrize("options", [("--tasks", 3), ("--depths", "2,4")])
def test_options_of_sigma_do_not_go_with_low_rank_weights(options: tuple[object, ...], workspace: Path) -> None:
    refused = run_cli("gen-weights", "collect", *options)
    assert refused.code == 2 and "--target sigma" in refused.err
