"""Starts of fine-tuning from a collection whose weights are a linear function of the words."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from weight_artifacts import make_collection

from finectl.adapters.weight_dataset import WeightDataset
from finectl.errors import InputError, UsageError
from finectl.models.text import describe_text, load_text
from finectl.training.weights.names import STARTS
from finectl.training.weights.starts import StartMaker, ridge


@pytest.fixture(scope="module", name="dataset")
def _dataset(tmp_path_factory: pytest.TempPathFactory) -> WeightDataset:
    return make_collection(tmp_path_factory.mktemp("starts"))


@pytest.fixture(scope="module", name="maker")
def _maker(dataset: WeightDataset) -> StartMaker:
    held = [concept for concept in dataset.concepts if concept.role == "test"]
    return StartMaker(dataset, load_text(describe_text("hash")), others=held)


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return sum(float((one[name] - other[name]).square().sum()) for name in one) ** 0.5


def test_the_regression_is_nearer_than_the_mean_and_the_neighbour(dataset: WeightDataset, maker: StartMaker) -> None:
    for concept in (one for one in dataset.concepts if one.role == "test"):
        own = {name: value.mean(0) for name, value in dataset.checkpoints(concept).items()}
        far = {start: distance(maker.make(start, concept, 0)[0], own) for start in ("lora", "mean", "nearest", "ridge")}
        assert far["ridge"] < min(far["mean"], far["nearest"]) < far["lora"]
        assert distance(maker.make("oracle", concept, 0)[0], own) < 1e-6


def test_the_start_is_the_collections_and_the_mean_is_of_training_concepts(
    dataset: WeightDataset, maker: StartMaker
) -> None:
    concept = next(one for one in dataset.concepts if one.role == "test")
    assert distance(maker.make("lora", concept, 0)[0], dataset.initial) == 0
    assert distance(maker.make("e2gan", concept, 3)[0], dataset.initial) == 0
    trained = [one for one in dataset.concepts if one.role == "train"]
    stem = torch.stack([dataset.checkpoints(one)["stem.lora_A.weight"].mean(0) for one in trained]).mean(0)
    assert torch.allclose(maker.make("mean", concept, 0)[0]["stem.lora_A.weight"], stem, atol=1e-6)


def test_the_neighbour_shares_a_word_and_training_concepts_are_their_own(
    dataset: WeightDataset, maker: StartMaker
) -> None:
    for concept in dataset.concepts:
        name = maker.nearest_name(concept)
        if concept.role == "train":
            assert name == concept.name
        else:
            assert set(name.split("-")) & set(concept.atoms)


def test_noise_is_another_with_another_seed_and_as_large(dataset: WeightDataset, maker: StartMaker) -> None:
    concept = next(one for one in dataset.concepts if one.role == "test")
    neighbour = maker.make("nearest", concept, 0)[0]
    first, again, other = (maker.make("noised", concept, seed)[0] for seed in (0, 0, 1))
    assert distance(first, again) == 0 and distance(first, other) > 0
    for name, value in neighbour.items():
        one, two = (float((made[name] - value).norm()) for made in (first, other))
        assert one == pytest.approx(two, rel=1e-4) and one > 0


def test_another_prompt_is_never_the_concepts_own(dataset: WeightDataset, maker: StartMaker) -> None:
    for concept in (one for one in dataset.concepts if one.role == "test"):
        for seed in range(4):
            assert maker.other_prompt(concept, seed) != concept.prompt
    alone = StartMaker(dataset, maker.encoder, others=[dataset.concepts[-1]])
    prompts = {alone.other_prompt(dataset.concepts[-1], seed) for seed in range(3)}
    assert len(prompts) == 3 and dataset.concepts[-1].prompt not in prompts


def test_what_is_not_there_is_said(dataset: WeightDataset, maker: StartMaker, tmp_path: Path) -> None:
    concept = dataset.concepts[0]
    with pytest.raises(UsageError, match="did you mean 'ridge'"):
        maker.make("rigde", concept, 0)
    with pytest.raises(InputError, match="need a generator"):
        maker.make("prediction", concept, 0)
    assert set(STARTS) == {name[1:] for name in dir(StartMaker) if name[1:] in STARTS}


def test_ridge_against_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 1, 3, generator=generator)
    y = torch.randn(6, 2, generator=generator).double()
    flat = x[:, 0].double()
    unit = float(flat.square().sum()) / 6
    expected = torch.linalg.inv(flat.T @ flat + 0.5 * unit * torch.eye(3).double()) @ flat.T @ y
    assert torch.allclose(ridge(x, y, 0.5), expected)
    # A concept with two equal texts counts once.
    assert torch.allclose(ridge(x.repeat(1, 2, 1), y, 0.5), expected)
