"""`sample` and `evaluate` with a second model: what they make, record and refuse."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.test_bad_input import refused
from support import run_cli

from finectl.artifacts.files import sha256_json
from finectl.artifacts.manifest import read_manifest
from finectl.artifacts.store import open_artifact
from finectl.artifacts.tensors import load_tensors
from finectl.errors import EXIT_INPUT, EXIT_USAGE
from finectl.training.generate import Generator

SHORT = ("--steps", 3, "--batch-size", 8, "--lr", 0.01, "--eval-every", 0)
FEW = ("--samples", 6, "--sampling-steps", 5, "--batch-size", 4)


@dataclass(frozen=True)
class Pair:
    """A model, one that was fine-tuned from it on other data, and models that do not go with them."""

    root: Path
    base: Path
    tuned: Path
    large: Path
    classes: Path

    def run(self, command: str, *arguments: object) -> Any:
        return run_cli(command, *arguments, "--workspace", self.root)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    root = tmp_path_factory.mktemp("pair")
    place = ("--workspace", root)
    nano = ("--method", "he", "--model", "dit-nano", "--depth", 1, *place)
    start = run_cli("init", *nano).path
    base = run_cli("train", start, *SHORT, "--data", "digits#0,1,2", *place).path
    tuned = run_cli("train", base, *SHORT, "--data", "digits#5,6,7", *place).path
    large = run_cli("init", *nano, "--data", "photos").path
    other = run_cli("init", *nano, "--data", "shape:1x8x8:3", "--force")
    yield Pair(root, base, tuned, large, other.path if other.code == 0 else start)


def levels(path: Path) -> torch.Tensor:
    return load_tensors(path / "samples.safetensors")["images"]


def alone(path: Path, null: bool, count: int = 6) -> torch.Tensor:
    """Images of one model alone, of the classes 5 to 7 in turn or of none."""
    generator = Generator.of(
        open_artifact(path), "ema", None, torch.device("cpu"),
        scheduler="ddim", sampling_steps=5, guidance=1.0, seed=0, dtype="float32",
    )  # fmt: skip
    labels = [10 if null else 5 + index % 3 for index in range(count)]
    return torch.cat([generator.images(first, labels[first : first + 4]) for first in range(0, count, 4)])


def test_none_and_all_of_the_steps_are_the_two_models_alone(pair: Pair) -> None:
    plain = pair.run("sample", pair.tuned, *FEW).path
    none = pair.run("sample", pair.tuned, *FEW, "--handover", pair.base, "--fraction", 0).path
    every = pair.run("sample", pair.tuned, *FEW, "--handover", pair.base, "--fraction", 1).path
    half = pair.run("sample", pair.tuned, *FEW, "--handover", pair.base, "--fraction", 0.5).path
    assert torch.equal(levels(none), levels(plain)) and torch.equal(levels(plain), alone(pair.tuned, null=False))
    assert torch.equal(levels(every), alone(pair.base, null=True))
    assert not torch.equal(levels(half), levels(none)) and not torch.equal(levels(half), levels(every))


def test_the_second_model_is_a_parent_with_its_role(pair: Pair) -> None:
    handed = read_manifest(pair.run("sample", pair.tuned, *FEW, "--handover", pair.base).path)
    assert [parent.role for parent in handed.parents] == ["model", "handover"]
    assert handed.parents[1].digest == read_manifest(pair.base).digest
    assert handed.config["fraction"] == 0.1 and handed.config["handover"] == str(pair.base.resolve())
    guided = pair.run("sample", pair.tuned, *FEW, "--domain-guidance", pair.base, "--guidance", 1.5).path
    assert [parent.role for parent in read_manifest(guided).parents] == ["model", "guide"]
    again = pair.run("sample", "--recipe", guided)
    assert again.path == guided and "already there" in again.err
    assert not torch.equal(levels(guided), levels(pair.run("sample", pair.tuned, *FEW, "--guidance", 1.5).path))


def test_a_dry_run_counts_the_calls_of_both_models(pair: Pair) -> None:
    def plan(*options: object) -> dict[str, Any]:
        return json.loads(pair.run("sample", pair.tuned, *FEW, *options, "--dry-run", "--json").out)

    assert plan()["network_calls"] == 30 and "pretrained_network_calls" not in plan()
    handed = plan("--handover", pair.base, "--fraction", 0.4)
    assert (handed["network_calls"], handed["pretrained_network_calls"]) == (18, 12)
    guided = plan("--domain-guidance", pair.base, "--guidance", 2)
    assert (guided["network_calls"], guided["pretrained_network_calls"]) == (30, 30)


def test_what_one_model_samples_has_the_recipe_that_it_had(pair: Pair) -> None:
    """The fields that recipes were made of before there were second models."""
    manifest = read_manifest(pair.run("sample", pair.tuned, *FEW).path)
    names = ("weights", "samples", "labels", "scheduler", "sampling_steps", "guidance", "batch_size", "seed")
    config = {**{name: manifest.config[name] for name in names}, "vae_digest": ""}
    parts = {
        "stage": "sample",
        "version": 1,
        "config": config,
        "parents": [["model", read_manifest(pair.tuned).digest]],
        "data": manifest.data["fingerprint"],
    }
    assert manifest.recipe == sha256_json(parts)


def test_evaluate_measures_what_sample_makes_with_two_models(pair: Pair) -> None:
    few = ("--metrics", "accuracy", "--samples", 6, "--sampling-steps", 5, "--guidance", 3)
    guided = pair.run("evaluate", pair.tuned, *few, "--domain-guidance", pair.base).path
    row = read_manifest(guided).metrics["models"][0]
    assert row["sampling"]["domain_guidance"] == read_manifest(pair.base).digest
    assert [parent.role for parent in read_manifest(guided).parents] == ["model", "guide"]
    made = pair.run("sample", pair.tuned, *FEW, "--guidance", 3, "--domain-guidance", pair.base).path
    direct = read_manifest(pair.run("evaluate", made, "--metrics", "accuracy", "--samples", 6).path).metrics["models"][
        0
    ]
    assert row["accuracy"]["value"] == direct["accuracy"]["value"]
    plan = json.loads(pair.run("evaluate", pair.tuned, *few, "--dry-run", "--json").out)
    assert plan["config"]["domain_guidance"] is None and plan["models"] == 1


def test_models_that_do_not_go_together_are_refused(pair: Pair) -> None:
    ran = pair.run("sample", pair.tuned, *FEW, "--handover", pair.large)
    refused(ran, EXIT_INPUT, "differ in the shape of the images: 1x8x8 and 3x32x32", "--handover MODEL")
    ran = pair.run("evaluate", pair.tuned, "--domain-guidance", pair.large, "--guidance", 2, "--metrics", "accuracy")
    refused(ran, EXIT_INPUT, "differ in the shape of the images: 1x8x8 and 3x32x32", "--domain-guidance MODEL")


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("prediction", "v_prediction", "the prediction of the diffusion: epsilon and v_prediction"),
        ("beta_end", 0.01, "the beta end of the diffusion: 0.02 and 0.01"),
        ("timesteps", 500, "the timesteps of the diffusion: 1000 and 500"),
        ("learn_sigma", True, "the variance: fixed and learned"),
    ],
)
def test_other_schedules_and_predictions_are_refused(pair: Pair, field: str, value: Any, said: str) -> None:
    from dataclasses import replace
    from unittest import mock

    from finectl.models.io import read_config
    from finectl.training import pretrained

    def read(artifact: Any) -> Any:
        config = read_config(artifact)
        if artifact.path != pair.base:
            return config
        if field == "learn_sigma":
            return replace(config, learn_sigma=value)
        return replace(config, diffusion=replace(config.diffusion, **{field: value}))

    with mock.patch.object(pretrained, "read_config", read):
        refused(pair.run("sample", pair.tuned, *FEW, "--handover", pair.base), EXIT_INPUT, said, "--handover MODEL")


def test_options_that_lack_another_are_refused(pair: Pair) -> None:
    ran = pair.run("sample", pair.tuned, *FEW, "--fraction", 0.2)
    refused(ran, EXIT_USAGE, "--fraction 0.2 hands steps over to no model", "--handover PRETRAINED --fraction 0.2")
    ran = pair.run("sample", pair.tuned, *FEW, "--domain-guidance", pair.base)
    refused(ran, EXIT_USAGE, "--guidance, which is 1: none", "--guidance 1.5")
    ran = pair.run("sample", pair.tuned, *FEW, "--domain-guidance", pair.base, "--handover", pair.base)
    refused(ran, EXIT_USAGE, "--handover", "one second model")
    ran = pair.run("sample", pair.tuned, *FEW, "--handover", pair.base, "--fraction", 1.5)
    assert ran.code == EXIT_USAGE


def test_each_model_has_its_own_null_class(pair: Pair) -> None:
    """A base of three classes, whose null class is the fourth row of its table."""
    from finectl.models.io import read_config

    if read_config(open_artifact(pair.classes)).num_classes == 10:
        pytest.skip("no model of three classes without data")
    made = pair.run("sample", pair.tuned, *FEW, "--handover", pair.classes, "--fraction", 1).path
    generator = Generator.of(
        open_artifact(pair.classes), "ema", None, torch.device("cpu"),
        scheduler="ddim", sampling_steps=5, guidance=1.0, seed=0, dtype="float32",
    )  # fmt: skip
    wanted = torch.cat([generator.images(0, [3] * 4), generator.images(4, [3] * 2)])
    assert torch.equal(levels(made), wanted)
