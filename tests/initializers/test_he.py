"""Random initialisation: DiT's own, and the Kaiming variant."""

from __future__ import annotations

from pathlib import Path

import torch
from support import run_cli
from torch import Tensor

from finectl.artifacts.manifest import read_manifest
from finectl.artifacts.store import open_artifact
from finectl.diffusion.random import generator_for
from finectl.models.dit import DiT, initialize_
from finectl.models.io import load_weights
from finectl.models.presets import preset

FAN_IN = {"attn.qkv": 64, "attn.proj": 64, "mlp.fc1": 64, "mlp.fc2": 256}
MATRICES = {f"blocks.{index}.{layer}.weight" for index in range(3) for layer in FAN_IN}


def init(workspace: Path, *options: object) -> dict[str, Tensor]:
    where = ("--model", "dit-nano", "--depth", 3, "--workspace", workspace)
    made = run_cli("init", "--method", "he", *where, *options).path
    assert read_manifest(made).metrics["parameters_transferred_with_embedders"] == 0
    return load_weights(open_artifact(made), "raw")


def dits_own(seed: int) -> dict[str, Tensor]:
    config = preset("dit-nano", depth=3, image_size=8, channels=1, num_classes=10)
    return initialize_(DiT(config), generator_for("init", seed)).state_dict()


def test_the_usual_variant_is_dits_own_to_the_last_bit(workspace: Path) -> None:
    for options in ((), ("--variant", "xavier")):
        found = init(workspace, "--seed", 4, *options)
        for name, value in dits_own(4).items():
            assert torch.equal(found[name], value), name


def test_kaiming_draws_the_four_matrices_of_every_block(workspace: Path) -> None:
    found, usual = init(workspace, "--variant", "kaiming"), dits_own(0)
    assert {name for name, value in found.items() if not torch.equal(value, usual[name])} == MATRICES
    for name in MATRICES:
        value = found[name]
        std = (2 / FAN_IN[name.split(".", 2)[2].removesuffix(".weight")]) ** 0.5
        error = 5 / value.numel() ** 0.5  # of the mean in standard deviations; that of the deviation is smaller
        assert abs(float(value.mean())) < error * std, name
        assert abs(float(value.std()) / std - 1) < error, name
        assert float(value.abs().max()) > 2.5 * std, "normal, not uniform"
    drawn = torch.cat([found[name].flatten()[:64] for name in sorted(MATRICES)])
    assert drawn.unique().numel() == drawn.numel(), "each matrix has numbers of its own"
    other = init(workspace, "--variant", "kaiming", "--seed", 1)
    assert all(not torch.equal(other[name], found[name]) for name in MATRICES)


def test_kaiming_starts_as_the_identity(workspace: Path) -> None:
    found = init(workspace, "--variant", "kaiming")
    for index in range(3):
        assert not bool(found[f"blocks.{index}.adaLN_modulation.1.weight"].any()), "gates are zero"
    assert not bool(found["final_layer.linear.weight"].any())
