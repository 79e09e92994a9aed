"""Heur-LG and Auto-LG: fixed rules for which layers are taken, and what the rules transfer at published sizes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import run_cli
from torch import Tensor

from finectl.artifacts.manifest import read_manifest
from finectl.artifacts.store import open_artifact
from finectl.initializers import METHODS, auto_lg, heur_lg, weight_selection
from finectl.models.dit import dense_state_dict
from finectl.models.io import load_model, load_weights, read_config
from finectl.models.presets import count_parameters, preset

DEPTHS = (4, 6, 8, 10, 12)
EXACT_BLOCK = {"dit-b": 10_628_352, "dit-l": 18_889_728}
EXACT_REST = {"dit-b": 2_775_584, "dit-l": 4_487_200}


def first(layers: int, depth: int) -> dict[int, int]:
    return weight_selection.placement(layers, depth, "first")


def even(layers: int, depth: int) -> dict[int, int]:
    return weight_selection.placement(layers, depth, "even")


def heur(layers: int, depth: int) -> dict[int, int]:
    return heur_lg.placement(layers, depth, int(METHODS["heur-lg"].constants["layers"]))


def gradients(layers: int, depth: int) -> dict[int, int]:
    return heur_lg.on_top([0.0] * layers, depth, int(METHODS["heur-lg"].constants["layers"]))


def auto(layers: int, depth: int) -> dict[int, int]:
    return auto_lg.placement(layers, depth, int(METHODS["auto-lg"].constants["layers"]))


@pytest.mark.parametrize(
    ("rule", "base", "large"),
    [
        (first, 87.8, 155.6),
        (even, 87.8, 155.6),
        (heur, 34.66, 61.16),
        (gradients, 34.66, 61.16),
        (auto, 62.3, 110.3),
    ],
)
def test_parameters_transferred_at_published_sizes(
    rule: Callable[[int, int], dict[int, int]], base: float, large: float
) -> None:
    """Millions of parameters, averaged over five depths, for latents of 32x32x4 and 1,000 classes."""
    for name, millions in (("dit-b", base), ("dit-l", large)):
        model = preset(name, image_size=32, channels=4, num_classes=1000, learn_sigma=True, depth=12)
        counts = count_parameters(model)
        rest = counts["total"] - counts["blocks"]
        assert (counts["block"], rest) == (EXACT_BLOCK[name], EXACT_REST[name])
        transferred = [len(rule(model.depth, depth)) * counts["block"] + rest for depth in DEPTHS]
        mean = sum(transferred) / len(DEPTHS) / 1e6
        digits = 2 if rule in (heur, gradients) else 1
        assert round(mean, digits) == millions


def test_which_layers_are_taken() -> None:
    assert heur(12, 4) == {1: 9, 2: 10, 3: 11}
    assert heur(12, 2) == {0: 10, 1: 11}
    assert heur(2, 5) == {3: 0, 4: 1}
    assert heur(12, 12) == {9: 9, 10: 10, 11: 11}
    assert auto(12, 8) == {index: index for index in range(6)}
    assert auto(12, 4) == auto(4, 12) == {index: index for index in range(4)}


@pytest.mark.parametrize("method", ["he", "mimetic"])
def test_methods_without_a_source_transfer_nothing(method: str, ancestor: Any) -> None:
    metrics = read_manifest(init(ancestor, "--method", method, "--depth", 2)).metrics
    assert metrics["parameters_transferred"] == metrics["parameters_transferred_with_embedders"] == 0


@pytest.fixture(scope="module")
def ancestor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A condensed model of seven layers, and its dense state."""
    root = tmp_path_factory.mktemp("ancestor")
    options = ("--depth", 7, "--steps", 10, "--batch-size", 8, "--lr", 0.01, "--ema", 0.5)
    path = run_cli("condense", *options, "--workspace", root).path
    artifact = open_artifact(path)
    return root, path, dense_state_dict(load_model(artifact, "ema"), read_config(artifact))


def layer(tensors: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    prefix = f"blocks.{index}."
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def init(ancestor: Any, *options: object) -> Path:
    root, path, _ = ancestor
    return run_cli("init", path, *options, "--workspace", root).path


@pytest.mark.parametrize(
    ("method", "depth", "places"),
    [
        (("heur-lg",), 5, [None, None, 4, 5, 6]),
        (("heur-lg",), 2, [5, 6]),
        (("heur-lg", "--set", "layers=1"), 3, [None, None, 6]),
        (("auto-lg",), 8, [0, 1, 2, 3, 4, 5, None, None]),
        (("auto-lg",), 2, [0, 1]),
        (("auto-lg", "--set", "layers=2"), 4, [0, 1, None, None]),
    ],
)
def test_layers_are_placed_and_the_others_are_the_control(
    ancestor: Any, method: tuple[str, ...], depth: int, places: list[int | None]
) -> None:
    whole = ancestor[2]
    made = init(ancestor, "--method", *method, "--depth", depth)
    found = load_weights(open_artifact(made), "ema")
    control = load_weights(open_artifact(init(ancestor, "--method", "he", "--depth", depth)), "ema")
    assert set(found) == set(control)
    for index, place in enumerate(places):
        wanted = layer(control, index) if place is None else layer(whole, place)
        assert all(torch.equal(value, wanted[name]) for name, value in layer(found, index).items()), index
    rest = {name: value for name, value in whole.items() if not name.startswith("blocks.")}
    assert all(torch.equal(found[name], value) for name, value in rest.items())
    metrics = read_manifest(made).metrics
    block = count_parameters(preset("dit-nano", image_size=8, channels=1, num_classes=10))["block"]
    assert metrics["parameters_transferred"] == sum(place is not None for place in places) * block
    embedders = sum(value.numel() for value in rest.values())
    assert metrics["parameters_transferred_with_embedders"] == metrics["parameters_transferred"] + embedders
    assert read_manifest(made).cost.get("steps", 0) == 0


def test_neither_changes_the_width(ancestor: Any) -> None:
    root, path, _ = ancestor
    for method in ("heur-lg", "auto-lg"):
        ran = run_cli("init", path, "--method", method, "--model", "dit-s", "--workspace", root)
        assert ran.code == 2 and "--model" in ran.err


@pytest.mark.parametrize("method", ["heur-lg", "auto-lg"])
@pytest.mark.parametrize("value", ["0", "2.5"])
def test_layers_are_counted_in_whole_numbers(ancestor: Any, method: str, value: str) -> None:
    root, path, _ = ancestor
    ran = run_cli("init", path, "--method", method, "--set", f"layers={value}", "--workspace", root)
    assert ran.code == 2 and f"--set layers={value}" in ran.err and "whole number" in ran.err


@pytest.mark.parametrize(
    ("method", "variant", "name"), [("heur-lg", "last", "tau"), ("auto-lg", "similarity", "layers")]
)
def test_a_number_that_a_variant_does_not_read_is_refused(ancestor: Any, method: str, variant: str, name: str) -> None:
    root, path, _ = ancestor
    ran = run_cli("init", path, "--method", method, "--variant", variant, "--set", f"{name}=1", "--workspace", root)
    assert ran.code == 2 and f"no number '{name}'" in ran.err
