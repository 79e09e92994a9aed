"""`finectl gen-weights train` and `predict`, end to end on a small collection of weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from support import Ran, run_cli, weights, whole
from weight_artifacts import LAYERS, make_collection

from finectl.adapters.lora_export import read_exported
from finectl.adapters.weight_dataset import WeightDataset
from finectl.artifacts.store import Artifact
from finectl.models.text import describe_text, load_text
from finectl.training import loop
from finectl.training.weights.files import read_generator
from finectl.training.weights.generate import Sampling, load_generator

SMALL = ("--steps", 4, "--batch-size", 8, "--block-size", 64, "--basis", "pca8", "--eval-every", 2, "--warmup-steps", 0)


@pytest.fixture(name="home", scope="module")
def _home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, WeightDataset, Artifact]]:
    workspace = tmp_path_factory.mktemp("generator")
    dataset = make_collection(workspace)
    made = run_cli("gen-weights", "train", dataset.artifact.path, *SMALL, "--workspace", workspace)
    yield workspace, dataset, whole(made.path)


def predict(workspace: Path, *arguments: object) -> Ran:
    return run_cli("gen-weights", "predict", *arguments, "--workspace", workspace)


def test_a_generator_beats_the_mean_on_held_out_combinations(home: tuple[Path, WeightDataset, Artifact]) -> None:
    _, dataset, generator = home
    metrics = generator.manifest.metrics
    assert metrics["r2"]["test"] > 0.8  # 0 is the mean of the training weights
    assert metrics["linear_start"]["r2_of_coefficients"] > 0.8
    assert 400 <= metrics["t_star"] <= 999
    assert metrics["distances"]["test"]["nearest_over_between"] > 0.3
    assert not (generator.path / "checkpoints").exists()
    found = json.loads((generator.path / "metrics.json").read_text())
    assert set(found["sweep"]) == {"0", "2", "4"}
    best = max(value for row in found["sweep"].values() for value in row.values())
    assert found["sweep"][str(metrics["update"])][str(metrics["t_star"])] == best
    assert set(found["test"]["norm_ratio"]) == {"stem", "attention.query", "head"}
    read = load_generator(generator)
    concept = next(one for one in dataset.concepts if one.role == "test")
    made = read.lora(read.encode([concept.prompt]), Sampling(read.t_star))
    trained = dataset.last(concept)
    errors = [
        float((made[name] - trained[name]).norm() / (trained[name] - dataset.initial[name]).norm()) for name in made
    ]
    assert max(errors) < 0.7


def test_one_step_makes_a_lora_of_the_base(home: tuple[Path, WeightDataset, Artifact]) -> None:
    workspace, dataset, generator = home
    ran = predict(workspace, "Mosaic in cool", generator.path, "--export", "peft", "--json")
    assert ran.code == 0, ran.err
    answer = json.loads(ran.out)
    assert answer["metrics"]["prediction_s"] > 0 and "weights in 5 blocks" in ran.err
    lora = whole(Path(answer["path"]))
    tensors = load_file(lora.file("lora.safetensors"))
    assert {name: tuple(value.shape) for name, value in tensors.items()} == {
        name: shape for layer in LAYERS for name, shape in layer.shapes.items()
    }
    config = json.loads(lora.file("config.json").read_text())
    assert config["base"] == dataset.base and config["prompt"] == "Mosaic in cool"
    exported = read_exported(lora.path / "export", LAYERS)
    assert all(torch.equal(exported[name], tensors[name]) for name in tensors)
    others = [
        predict(workspace, "Mosaic in cool", generator.path, *more).path for more in (("--steps", 3), ("--draws", 2))
    ]
    assert len({lora.path, *others}) == 3
    again = predict(workspace, "Mosaic in cool", generator.path, "--batch-size", 2)
    for name, value in load_file(again.path / "lora.safetensors").items():
        torch.testing.assert_close(value, tensors[name], rtol=1e-4, atol=1e-6)


def test_prompts_of_unknown_words_and_other_encoders_are_refused(home: tuple[Path, WeightDataset, Artifact]) -> None:
    workspace, _, generator = home
    unknown = predict(workspace, "zebra crossing", generator.path)
    assert unknown.code == 2 and "knows no synonyms" in unknown.err and "mosaic" in unknown.err
    half = predict(workspace, "zebra mosaic", generator.path, "--dry-run")
    assert half.code == 0 and "network_calls: 5" in half.err
    assert predict(workspace, "  ", generator.path).code == 2
    other = {**describe_text("hash"), "digest": "0" * 64}
    with mock.patch("finectl.stages.gen_weights.predict.describe_text", return_value=other):
        refused = predict(workspace, "mosaic", generator.path, "--text-encoder", "hash")
    assert refused.code == 3 and "--text-encoder" in refused.err and "0" * 12 in refused.err
    assert predict(workspace, "mosaic", generator.path, "--steps", 1000, "--t-star", 10).code == 2


def test_a_killed_training_goes_on_as_if_it_had_not_been(
    home: tuple[Path, WeightDataset, Artifact], tmp_path: Path
) -> None:
    _, dataset, generator = home
    step, done = loop.train_step, []

    def killed(run: Any, number: int) -> Any:
        if number == 3:
            done.append(number)
            raise RuntimeError("the power went off")
        return step(run, number)

    command = ("gen-weights", "train", dataset.artifact.path, *SMALL, "--save-every", 1, "--workspace", tmp_path)
    with mock.patch.object(loop, "train_step", killed):
        assert run_cli(*command).code == 1
    assert done == [3]
    resumed = run_cli(*command)
    assert weights(resumed.path) == weights(generator.path)


@pytest.mark.parametrize(
    "options",
    [
        ("--basis", "none", "--prediction", "epsilon", "--linear-rank", 0, "--linear-start", "zero", "--t-min", 0,
         "--text-input", "tokens", "--index-embed", "sin", "--rule", 2),
        ("--prediction", "x0", "--loss", "decoded", "--linear-start", "zero", "--pos-embed", "learned", "--rule", 3),
    ],
)  # fmt: skip
def test_other_ways_to_train(home: tuple[Path, WeightDataset, Artifact], options: tuple[object, ...]) -> None:
    workspace, dataset, _ = home
    few = ("--steps", 2, "--batch-size", 4, "--block-size", 64, "--eval-every", 2, "--t-star", 500)
    made = whole(run_cli("gen-weights", "train", dataset.artifact.path, *few, *options, "--workspace", workspace).path)
    config, others = read_generator(made)
    assert others["t_star"] == 500 and config.blocks == len(load_file(made.file("normaliser.safetensors"))["mean"])
    named = dict(zip(options[::2], options[1::2], strict=True))
    assert config.diffusion.prediction == {"epsilon": "epsilon", "x0": "sample"}[str(named["--prediction"])]
    text = load_text(others["text"])
    assert text.digest == describe_text("hash")["digest"]
    assert predict(workspace, "blur in warm", made.path).code == 0


def test_wrong_options_are_said_before_any_work(home: tuple[Path, WeightDataset, Artifact]) -> None:
    workspace, dataset, _ = home
    for options, words in (
        (("--basis", "pca3"), "--basis"),
        (("--t-min", 700, "--t-max", 500), "--t-min"),
        (("--linear-rank", 0, "--linear-start", "ridge"), "--linear-rank"),
        (("--block-size", 66, "--basis", "none"), "multiple of 4"),
    ):
        ran = run_cli("gen-weights", "train", dataset.artifact.path, *options, "--workspace", workspace)
        assert ran.code == 2 and words in ran.err, ran.err
