"""TLEG: the least-squares line over depth, and models read from it."""

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
from finectl.initializers.tleg import expand, fit_line, kept_parameters
from finectl.models.io import load_weights
from finectl.models.presets import count_parameters, preset


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A dense ancestor of four layers that was trained a little."""
    root = tmp_path_factory.mktemp("tleg")
    scratch = run_cli("init", "--method", "he", "--model", "dit-nano", "--depth", 4, "--workspace", root).path
    options = ("--steps", 6, "--batch-size", 8, "--lr", 0.01, "--ema", 0, "--workspace", root)
    return root, run_cli("train", scratch, *options).path


def made(trained: Any, depth: int) -> Path:
    root, ancestor = trained
    return run_cli("init", ancestor, "--method", "tleg", "--depth", depth, "--workspace", root).path


def state(path: Path) -> dict[str, Tensor]:
    return load_weights(open_artifact(path), "ema")


def test_the_fit_is_that_of_numpy() -> None:
    values = torch.randn(7, 5, 3, generator=torch.Generator().manual_seed(0))
    base, slope = fit_line(list(values))
    design = np.stack([np.ones(7), np.arange(7) / 7], axis=1)
    wanted = np.linalg.lstsq(design, values.double().numpy().reshape(7, -1), rcond=None)[0]
    np.testing.assert_allclose(torch.stack([base, slope]).flatten(1).numpy(), wanted, rtol=0, atol=1e-12)
    assert base.shape == (5, 3) and base.dtype == torch.float64


def test_layers_on_a_line_are_restored_and_read_at_other_depths() -> None:
    base, slope = torch.randn(2, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    layers = [base + index / 5 * slope for index in range(5)]
    found = fit_line(layers)
    torch.testing.assert_close(found, (base, slope), rtol=0, atol=1e-12)
    torch.testing.assert_close(expand(*found, 5), layers, rtol=0, atol=1e-12)
    deeper = expand(*found, 8)
    assert len(deeper) == 8
    for index, value in enumerate(deeper):
        torch.testing.assert_close(value, base + index / 8 * slope, rtol=0, atol=1e-12)
    torch.testing.assert_close(expand(*found, 1), [base], rtol=0, atol=1e-12)


def test_a_single_layer_is_repeated() -> None:
    layer = torch.randn(3, 4)
    base, slope = fit_line([layer])
    assert not bool(slope.any())
    for value in expand(base, slope, 3):
        torch.testing.assert_close(value, layer.double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "millions"), [("dit-b", 24.03), ("dit-l", 42.27)])
def test_two_blocks_are_kept(name: str, millions: float) -> None:
    config = preset(name, image_size=32, channels=4, num_classes=1000, learn_sigma=True)
    counts = count_parameters(config)
    kept = kept_parameters(config) + counts["total"] - counts["blocks"]
    assert round(kept / 1e6, 2) == millions


@pytest.mark.parametrize("depth", [1, 4, 6])
def test_a_model_of_any_depth(trained: Any, depth: int) -> None:
    ancestor, path = state(trained[1]), made(trained, depth)
    found = state(path)
    for part in ("attn.qkv.weight", "mlp.fc2.weight", "adaLN_modulation.1.weight", "adaLN_modulation.1.bias"):
        source = np.stack([ancestor[f"blocks.{index}.{part}"].double().numpy().ravel() for index in range(4)])
        design = np.stack([np.ones(4), np.arange(4) / 4], axis=1)
        base, slope = np.linalg.lstsq(design, source, rcond=None)[0]
        assert float(np.abs(slope).max()) > 1e-3, "the layers differ"
        for index in range(depth):
            value = found[f"blocks.{index}.{part}"]
            assert value.dtype == torch.float32
            np.testing.assert_allclose(value.numpy().ravel(), base + index / depth * slope, rtol=1e-5, atol=1e-6)
    assert f"blocks.{depth}.attn.qkv.weight" not in found
    rest = {name: value for name, value in ancestor.items() if not name.startswith("blocks.")}
    assert all(torch.equal(found[name], value) for name, value in rest.items())
    metrics = read_manifest(path).metrics
    block = sum(value.numel() for name, value in ancestor.items() if name.startswith("blocks.0."))
    assert metrics["parameters_transferred"] == 2 * block
    whole = 2 * block + sum(value.numel() for value in rest.values())
    assert metrics["parameters_transferred_with_embedders"] == whole


def test_a_model_on_a_line_is_restored_at_its_depth(trained: Any) -> None:
    root, _ = trained
    line = made(trained, 3)
    again = run_cli("init", line, "--method", "tleg", "--depth", 3, "--workspace", root).path
    wanted, found = state(line), state(again)
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)
