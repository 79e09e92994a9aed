"""Low-rank layers of an ancestor: the truncation, which layers, and what is counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import run_cli
from torch import Tensor

from finectl.artifacts.manifest import read_manifest
from finectl.artifacts.store import open_artifact
from finectl.initializers.svd import half_rank, kept_parameters, low_rank_layer, truncate
from finectl.initializers.width import axes, select
from finectl.models.io import load_weights, read_dit_config
from finectl.models.presets import LAYER_TYPES

WIDTH = 64


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A dense ancestor of four layers that was trained a little, so that no matrix is zero."""
    root = tmp_path_factory.mktemp("svd")
    scratch = run_cli("init", "--method", "he", "--model", "dit-nano", "--depth", 4, "--workspace", root).path
    options = ("--steps", 6, "--batch-size", 8, "--lr", 0.01, "--ema", 0, "--workspace", root)
    return root, run_cli("train", scratch, *options).path


def made(trained: Any, depth: int, *options: object) -> Path:
    root, ancestor = trained
    return run_cli("init", ancestor, "--method", "svd", "--depth", depth, *options, "--workspace", root).path


def state(path: Path) -> dict[str, Tensor]:
    return load_weights(open_artifact(path), "ema")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (8, 8)])
def test_truncation_is_that_of_numpy(shape: tuple[int, int]) -> None:
    weight = random(*shape)
    U, s, Vt = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    for rank in (1, 3):
        found = truncate(weight.double(), rank)
        np.testing.assert_allclose(found.numpy(), U[:, :rank] * s[:rank] @ Vt[:rank], rtol=0, atol=1e-12)
        assert int(torch.linalg.matrix_rank(found)) == rank
        error = float(torch.linalg.matrix_norm(weight.double() - found))
        assert error == pytest.approx(float((s[rank:] ** 2).sum() ** 0.5))


def test_a_matrix_of_low_rank_is_kept_exactly() -> None:
    weight = random(12, 3).double() @ random(3, 8, seed=1).double()
    torch.testing.assert_close(truncate(weight, 4), weight, rtol=0, atol=1e-12)
    torch.testing.assert_close(truncate(random(6, 9), 6), random(6, 9), rtol=0, atol=1e-6)


def test_a_layer_keeps_its_biases_and_half_of_each_rank() -> None:
    layer = {"attn.qkv.weight": random(24, 8), "attn.qkv.bias": random(24), "mlp.fc2.weight": random(8, 32)}
    found = low_rank_layer(layer)
    assert torch.equal(found["attn.qkv.bias"], layer["attn.qkv.bias"])
    for name in ("attn.qkv.weight", "mlp.fc2.weight"):
        assert int(torch.linalg.matrix_rank(found[name])) == half_rank(layer[name]) == 4
        assert found[name].dtype == torch.float32
    assert kept_parameters(layer) == 4 * (24 + 8 + 1) + 24 + 4 * (8 + 32 + 1)
    assert half_rank(torch.ones(1, 5)) == 1


@pytest.mark.parametrize(
    ("depth", "options", "chosen"),
    [(1, (), [1]), (2, (), [0, 3]), (6, (), [0, 1, 1, 2, 2, 3]), (2, ("--variant", "first"), [0, 1])],
)
def test_layers_are_chosen_and_cut(trained: Any, depth: int, options: tuple[str, ...], chosen: list[int]) -> None:
    ancestor, path = state(trained[1]), made(trained, depth, *options)
    found = state(path)
    for index, source in enumerate(chosen):
        for module in LAYER_TYPES.values():
            weight = found[f"blocks.{index}.{module}.weight"]
            wanted = truncate(ancestor[f"blocks.{source}.{module}.weight"], WIDTH // 2)
            torch.testing.assert_close(weight, wanted, rtol=0, atol=1e-6)
            assert int(torch.linalg.matrix_rank(weight.double(), rtol=1e-5)) <= WIDTH // 2
            bias = f"{module}.bias"
            assert torch.equal(found[f"blocks.{index}.{bias}"], ancestor[f"blocks.{source}.{bias}"])
    assert f"blocks.{depth}.attn.qkv.weight" not in found
    rest = {name: value for name, value in ancestor.items() if not name.startswith("blocks.")}
    assert all(torch.equal(found[name], value) for name, value in rest.items())
    # The five matrices of width d are (3d, d), (d, d), (4d, d), (d, 4d) and (6d, d): 23 d + 5 values for each of r.
    kept = WIDTH // 2 * (23 * WIDTH + 5) + 15 * WIDTH
    metrics = read_manifest(path).metrics
    assert metrics["parameters_transferred"] == len(set(chosen)) * kept
    whole = len(set(chosen)) * kept + sum(value.numel() for value in rest.values())
    assert metrics["parameters_transferred_with_embedders"] == whole


def test_the_first_layers_of_a_deeper_target_and_the_rest_as_dit_starts(trained: Any) -> None:
    found = state(made(trained, 6, "--variant", "first"))
    assert bool(found["blocks.3.adaLN_modulation.1.weight"].any())
    for index in (4, 5):
        assert not bool(found[f"blocks.{index}.adaLN_modulation.1.weight"].any())
        assert int(torch.linalg.matrix_rank(found[f"blocks.{index}.attn.proj.weight"])) == WIDTH


def test_another_width_is_selected_or_repeated_and_then_cut(trained: Any) -> None:
    root, ancestor = trained
    wide = made(trained, 1, "--model", "dit-s")
    nano, small = (read_dit_config(open_artifact(path)) for path in (ancestor, wide))
    for source, target, path in (
        (ancestor, small, wide),
        (
            wide,
            nano,
            run_cli("init", wide, "--method", "svd", "--model", "dit-nano", "--depth", 1, "--workspace", root).path,
        ),
    ):
        before, found = state(source), state(path)
        taken = axes(read_dit_config(open_artifact(source)), target)
        place = "blocks.1." if source == ancestor else "blocks.0."  # a single layer is the middle one
        layer = {name[9:]: value for name, value in before.items() if name.startswith(place)}
        for name, value in select(layer, taken).items():
            wanted = truncate(value, min(value.shape) // 2) if value.ndim == 2 else value
            torch.testing.assert_close(found[f"blocks.0.{name}"], wanted, rtol=1e-5, atol=1e-6)
    metrics = read_manifest(wide).metrics
    assert metrics["parameters_transferred"] == 18 * WIDTH**2 + 15 * WIDTH, "no more than the ancestor's layer"
    rest = sum(value.numel() for name, value in state(ancestor).items() if not name.startswith("blocks."))
    assert metrics["parameters_transferred_with_embedders"] == metrics["parameters_transferred"] + rest
