"""Auto-LG by similarity: the matching, which models are compared on what, and its budget."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from support import run_cli

from finectl.artifacts.manifest import read_manifest
from finectl.artifacts.store import open_artifact
from finectl.errors import EXIT_INPUT
from finectl.initializers import auto_lg
from finectl.initializers.auto_lg import monotone_matching
from finectl.models.dit import DiT
from finectl.models.io import load_weights
from finectl.models.presets import count_parameters, preset

DEPTH = 4
STEPS = 30
SIMILARITY = ("--method", "auto-lg", "--variant", "similarity")
TUNING = ("--tune-steps", 3, "--batch-size", 8)


@pytest.fixture(scope="module")
def ancestor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A workspace and a dense model."""
    root = tmp_path_factory.mktemp("auto")
    start = run_cli("init", "--method", "he", "--model", "dit-nano", "--depth", DEPTH, "--workspace", root).path
    options = ("--steps", STEPS, "--batch-size", 16, "--lr", 0.003, "--ema", 0.5)
    return root, run_cli("train", start, *options, "--workspace", root).path


def init(ancestor: Any, *options: object) -> Any:
    return run_cli("init", ancestor[1], *SIMILARITY, *options, "--workspace", ancestor[0])


def blocks_of(path: Path) -> list[dict[str, torch.Tensor]]:
    state = load_weights(open_artifact(path), "ema")
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    prefixes = [f"blocks.{index}." for index in range(depth)]
    return [{n[len(p) :]: v for n, v in state.items() if n.startswith(p)} for p in prefixes]


@pytest.mark.parametrize(("depth", "layers"), [(1, 4), (3, 5), (5, 3), (4, 4), (3, 1)])
def test_the_matching_is_the_best_of_all_that_never_go_back(depth: int, layers: int) -> None:
    for seed in range(10):
        scores = torch.rand(depth, layers, generator=torch.Generator().manual_seed(seed))
        every = itertools.combinations_with_replacement(range(layers), depth)
        best = max(every, key=lambda path: sum(float(scores[row, layer]) for row, layer in enumerate(path)))
        assert monotone_matching(scores) == list(best)


def test_a_model_that_is_compared_with_itself_gets_its_own_layers(
    ancestor: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def copied(request: Any) -> Any:
        """Stand in for the pseudo-descendant: some of the ancestor's layers."""
        whole = auto_lg.Ancestor.of(request)
        model = DiT(request.target)
        made = auto_lg.assemble(request, [whole.layers[layer] for layer in wanted], whole.rest)
        model.load_state_dict(dict(made.state))
        return model, {}

    monkeypatch.setattr(auto_lg, "pseudo_descendant", copied)
    for wanted in ([0, 1, 2, 3], [0, 1]):
        ran = run_cli("init", ancestor[1], *SIMILARITY, "--depth", len(wanted), "--workspace", tmp_path)
        assert f"layers {', '.join(str(layer + 1) for layer in wanted)} of the ancestor" in ran.err


@pytest.mark.parametrize("depth", [2, 6])
def test_every_layer_is_one_of_the_ancestors(ancestor: Any, depth: int) -> None:
    ran = init(ancestor, "--depth", depth, *TUNING)
    found, layers = blocks_of(ran.path), blocks_of(ancestor[1])
    taken = []
    for block in found:
        same = [i for i, layer in enumerate(layers) if all(torch.equal(layer[n], v) for n, v in block.items())]
        assert len(same) == 1
        taken += same
    assert taken == sorted(taken) and len(taken) == depth
    assert f"layers {', '.join(str(layer + 1) for layer in taken)} of the ancestor" in ran.err
    manifest = read_manifest(ran.path)
    block = count_parameters(preset("dit-nano", image_size=8, channels=1, num_classes=10))["block"]
    assert manifest.metrics["parameters_transferred"] == depth * block
    assert manifest.cost["steps"] == 3 and manifest.cost["samples"] == 24


def test_its_budget_is_a_third_of_the_ancestors(ancestor: Any) -> None:
    made = init(ancestor, "--depth", 1, "--batch-size", 8).path
    assert read_manifest(made).config["tune_steps"] == read_manifest(made).cost["steps"] == STEPS // 3
    assert read_manifest(made).config["tune_samples"] == read_manifest(ancestor[1]).data["count"] - 359, "all of them"


def test_the_fixed_rule_trains_nothing_and_reads_no_tuning_option(ancestor: Any) -> None:
    place = ("--method", "auto-lg", "--depth", 2, "--workspace", ancestor[0])
    made = run_cli("init", ancestor[1], *place).path
    assert run_cli("init", ancestor[1], *place, *TUNING, "--flip").path == made
    assert read_manifest(made).config["tune_steps"] == read_manifest(made).cost["steps"] == 0
    assert init(ancestor, "--depth", 2, *TUNING).path != init(ancestor, "--depth", 2, "--tune-steps", 4).path


def test_other_labels_will_do_and_other_images_will_not(ancestor: Any, tmp_path: Path) -> None:
    small = run_cli("init", "--method", "he", "--model", "dit-nano", "--depth", 2, "--workspace", tmp_path)
    assert small.code == 0
    ran = init(ancestor, "--depth", 2, "--data", "photos", "--image-size", 16)
    assert ran.code == EXIT_INPUT
    for word in ("3x16x16", "1x8x8", "expected:", "--variant first"):
        assert word in ran.err
