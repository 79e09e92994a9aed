"""Which classes are drawn of a model that has seen some classes of a data set only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support import TINY_DATA, run_cli

from finectl.artifacts.manifest import read_manifest

PART = "digits#0,1,2"


@pytest.fixture
def model(workspace: Path) -> Path:
    """A model of three of the ten digits."""
    made = run_cli("init", "--method", "he", "--model", "dit-nano", "--depth", 1, "--data", PART).path
    return run_cli("train", made, *TINY_DATA).path


def sampled(path: Path) -> list[int]:
    return sorted(set(load_file(path / "samples.safetensors")["labels"].tolist()))


def test_samples_are_of_the_classes_that_the_model_has_seen(model: Path) -> None:
    few = ("--samples", 12, "--sampling-steps", 2)
    said = run_cli("sample", model, *few)
    assert sampled(said.path) == [0, 1, 2]
    assert "labels 0,1,2" in said.err and PART in said.err and "--labels" in said.err
    named = run_cli("sample", model, *few, "--labels", "1,5")
    assert sampled(named.path) == [1, 5] and PART not in named.err


def test_the_classes_of_a_whole_set_are_all_of_them(chain: Any) -> None:
    """The resolved options, and with them the artifact's name, are those that they were."""
    said = run_cli("sample", chain.model, "--samples", 10, "--sampling-steps", 1)
    assert read_manifest(said.path).config["labels"] == "0,1,2,3,4,5,6,7,8,9" and "labels" not in said.err
    said = run_cli(
        "evaluate", chain.model, "--metrics", "frechet", "--samples", 10, "--sampling-steps", 1, "--allow-few"
    )
    assert read_manifest(said.path).config["labels"] is None and "labels" not in said.err
    every = run_cli(
        *("evaluate", chain.model, "--metrics", "frechet", "--samples", 10, "--sampling-steps", 1, "--allow-few"),
        *("--labels", "0,1,2,3,4,5,6,7,8,9"),
    )
    assert every.path == said.path  # one way of writing all of them


def test_a_set_that_is_gone_is_no_obstacle(workspace: Path, tmp_path: Path) -> None:
    import numpy as np
    import PIL.Image

    for name in ("apple", "pear"):
        for number in range(4):
            (tmp_path / "set" / name).mkdir(exist_ok=True, parents=True)
            PIL.Image.fromarray(np.full((8, 8), number, np.uint8)).save(tmp_path / "set" / name / f"{number}.png")
    data = f"folder:{tmp_path / 'set'}#pear"
    made = run_cli("init", "--method", "he", "--model", "dit-nano", "--depth", 1, "--data", data).path
    assert sampled(run_cli("sample", made, "--samples", 4, "--sampling-steps", 1).path) == [1]
    (tmp_path / "set").rename(tmp_path / "elsewhere")
    said = run_cli("sample", made, "--samples", 4, "--sampling-steps", 1)
    assert sampled(said.path) == [0, 1] and "not at hand" in said.err


def test_evaluation_draws_the_classes_of_the_reference(model: Path) -> None:
    few = ("--metrics", "frechet,accuracy", "--samples", 30, "--sampling-steps", 2, "--allow-few", "--batch-size", 30)
    own = run_cli("evaluate", model, *few)
    assert "labels 0,1,2" in own.err
    row = json.loads((own.path / "metrics.json").read_text())[0]
    assert row["frechet"]["protocol"]["labels"] == "0,1,2"
    assert row["frechet"]["protocol"]["reference"] == f"{PART}/train"
    # The images of `sample` are these very ones, and are used.
    made = run_cli("sample", model, "--samples", 30, "--sampling-steps", 2, "--seed", 0, "--batch-size", 30).path
    again = run_cli("evaluate", made, *few)
    found = json.loads((again.path / "metrics.json").read_text())[0]
    assert found["frechet"] == row["frechet"] and found["accuracy"] == row["accuracy"]
    # Of another part, its classes; --labels wins.
    other = run_cli("evaluate", model, *few, "--data", "digits#7,8").path
    assert read_manifest(other).config["labels"] == "7,8"
    named = run_cli("evaluate", model, *few, "--labels", "4").path
    assert read_manifest(named).config["labels"] == "4"


def test_classes_that_nothing_draws(model: Path, workspace: Path) -> None:
    made = run_cli("sample", model, "--samples", 4, "--sampling-steps", 1).path
    refused = run_cli("evaluate", made, "--labels", "1", "--metrics", "accuracy")
    assert refused.code == 2 and "no model draws classes" in refused.err
    refused = run_cli("evaluate", model, "--labels", "11", "--metrics", "accuracy", "--samples", 4)
    assert refused.code == 2 and "between 0 and 9" in refused.err
