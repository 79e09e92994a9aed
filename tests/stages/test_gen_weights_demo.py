"""The whole of `finectl gen-weights` on a few of the bundled photographs, with the settings of the demo's `ci`.

Nothing is said of how good weights of so few concepts and updates are; what holds for any is checked.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from support import ROOT, run_cli, whole

from finectl.adapters.weight_dataset import open_weights
from finectl.artifacts.store import Artifact, open_artifact
from finectl.artifacts.tensors import load_tensors
from finectl.models.weights.layout import Layout

RECIPE = ROOT / "recipes" / "gen-weights-demo.yaml:ci"
CONCEPTS = ROOT / "recipes" / "gen-weights-ci.jsonl"
PROMPT = "soft pencil drawing in warm orange light"


@pytest.fixture(scope="module", name="made")
def _made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """The artifacts of all steps, by kind, each step reading the one before it as in a pipe."""
    pytest.importorskip("skimage")
    place = ("--workspace", tmp_path_factory.mktemp("demo"), "--quiet")
    steps = "gen-weights"
    found = [run_cli(steps, "prompts", "--set", CONCEPTS, *place)]
    found.append(run_cli(steps, "pairs", "-", "--recipe", RECIPE, *place, stdin=found[-1].out))
    found.append(run_cli(steps, "base", "-", "--recipe", RECIPE, *place, stdin=found[-1].out))
    found.append(run_cli(steps, "collect", "-", "--recipe", RECIPE, "--workers", 1, *place, stdin=found[-1].out))
    found.append(run_cli(steps, "train", "-", "--recipe", RECIPE, *place, stdin=found[-1].out))
    found.append(run_cli(steps, "predict", PROMPT, "-", "--recipe", RECIPE, *place, stdin=found[-1].out))
    found.append(run_cli(steps, "report", found[-2].path, "--recipe", RECIPE, "--workers", 1, *place))
    artifacts = [whole(one.path) for one in found]
    return {artifact.kind: artifact for artifact in artifacts}


def test_every_step_makes_its_artifact(made: dict[str, Artifact]) -> None:
    assert list(made) == ["prompts", "pairs", "gan", "weight-dataset", "weight-generator", "lora", "evaluation"]
    for kind, parent in (("pairs", "prompts"), ("gan", "pairs"), ("weight-generator", "weight-dataset")):
        assert made[kind].manifest.parents[0].digest == made[parent].manifest.digest


def test_what_is_predicted_fits_the_base_bit_for_bit(made: dict[str, Artifact]) -> None:
    lora = load_tensors(made["lora"].file("lora.safetensors"))
    dataset = open_weights(made["weight-dataset"])
    config = json.loads(made["lora"].file("config.json").read_text())
    assert config["base"] == dataset.base == made["gan"].manifest.digest
    assert {name: tuple(value.shape) for name, value in lora.items()} == {
        name: tuple(value.shape) for name, value in dataset.initial.items()
    }
    layout = Layout.of(dataset.layers, 1, 256)
    again = layout.unpack(layout.pack(lora))
    assert all(torch.equal(again[name], value) for name, value in lora.items())
    assert any(not torch.equal(value, dataset.initial[name]) for name, value in lora.items())


def test_predicting_again_gives_the_same_weights(made: dict[str, Artifact], tmp_path: Path) -> None:
    generator = made["weight-generator"].path
    again = run_cli("gen-weights", "predict", PROMPT, generator, "--recipe", RECIPE, "--out", tmp_path / "again").path
    file = "lora.safetensors"
    assert open_artifact(again).file(file).read_bytes() == made["lora"].file(file).read_bytes()


def test_the_report_compares_the_held_out_concept(made: dict[str, Artifact]) -> None:
    folder = made["evaluation"].path
    with (folder / "runs.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["concept"] for row in rows} == {"grey-pencil"}
    assert {row["start"] for row in rows} == {"lora", "mean", "ridge", "prediction", "shuffled", "oracle"}
    assert {row["updates"] for row in rows} == {"0", "5"}
    value = {(row["start"], row["updates"]): float(row["l1"]) for row in rows}
    assert value["oracle", "0"] < value["lora", "0"]  # its own weights are better than none
    assert value["lora", "5"] < value["lora", "0"]
    assert (folder / "table.md").read_text().count("| prediction") >= 2
