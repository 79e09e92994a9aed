"""Evenly spaced layers, tuned towards the ancestor's predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import run_cli

from finectl.artifacts.manifest import read_manifest
from finectl.artifacts.store import open_artifact
from finectl.errors import EXIT_INPUT
from finectl.models.io import load_model, load_weights


@pytest.fixture(scope="module")
def ancestor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A dense model of depth 4 whose layers all do something."""
    root = tmp_path_factory.mktemp("pruned")
    start = run_cli("init", "--method", "he", "--model", "dit-nano", "--depth", 4, "--workspace", root).path
    options = ("--steps", 60, "--batch-size", 16, "--lr", 0.01, "--warmup-steps", 0, "--ema", 0.5, "--eval-every", 0)
    return root, run_cli("train", start, *options, "--workspace", root).path


def init(ancestor: Any, *options: object) -> Path:
    root, model = ancestor
    return run_cli("init", model, "--method", "pruned-kd", *options, "--workspace", root).path


def distance(one: Path, other: Path) -> float:
    """Return the mean squared difference of two models' predictions."""
    x = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    t, y = torch.arange(64) * 15, torch.arange(64) % 10
    with torch.no_grad():
        first, second = (load_model(open_artifact(path)).eval()(x, t, y) for path in (one, other))
    return float((first - second).square().mean())


def test_without_updates_it_is_the_layers_as_they_are(ancestor: Any) -> None:
    whole = load_weights(open_artifact(ancestor[1]), "ema")
    same = load_weights(open_artifact(init(ancestor, "--depth", 4, "--tune-steps", 0)), "ema")
    assert all(torch.equal(whole[name], same[name]) for name in whole)
    half = load_weights(open_artifact(init(ancestor, "--depth", 2, "--tune-steps", 0)), "ema")
    for place, layer in ((0, 0), (1, 3)):
        name = "attn.qkv.weight"
        assert torch.equal(half[f"blocks.{place}.{name}"], whole[f"blocks.{layer}.{name}"])


def test_updates_bring_it_nearer_to_the_ancestor(ancestor: Any) -> None:
    pruned = init(ancestor, "--depth", 2, "--tune-steps", 0)
    tuned = init(ancestor, "--depth", 2, "--tune-steps", 40, "--batch-size", 32)
    assert distance(tuned, ancestor[1]) < 0.7 * distance(pruned, ancestor[1])
    manifest = read_manifest(tuned)
    assert manifest.cost["steps"] == 40 and manifest.config["tune_samples"] == 1438
    assert manifest.config["sigma"] == "random", "what the method does not read is no part of its recipe"
    assert manifest.metrics["parameters_transferred_with_embedders"] == manifest.metrics["parameters"]


def test_data_on_which_the_ancestor_knows_nothing_are_refused(ancestor: Any) -> None:
    root, model = ancestor
    ran = run_cli("init", model, "--method", "pruned-kd", "--depth", 2, "--data", "photos", "--workspace", root)
    assert ran.code == EXIT_INPUT and "--tune-steps 0" in ran.err


def test_another_width_is_tuned_towards_the_ancestor(ancestor: Any) -> None:
    root, _ = ancestor
    wide = init(ancestor, "--model", "dit-s", "--depth", 2, "--tune-steps", 0)
    found = load_weights(open_artifact(wide), "ema")
    rows = found["blocks.0.mlp.fc1.weight"].view(256, 6, 64, 6).sum(3)
    torch.testing.assert_close(rows, rows[:, :1].expand_as(rows), rtol=1e-4, atol=1e-5)
    assert not torch.equal(found["blocks.0.mlp.fc1.weight"][0], found["blocks.0.mlp.fc1.weight"][1])
    options = ("--method", "pruned-kd", "--model", "dit-nano", "--depth", 2, "--workspace", root)
    narrow = [run_cli("init", wide, *options, "--batch-size", 16, "--tune-steps", steps).path for steps in (0, 20)]
    assert distance(narrow[1], wide) < 0.9 * distance(narrow[0], wide)
