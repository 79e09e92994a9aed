"""Weights of earlier updates: listed, loaded into any architecture, and refused with what there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import run_cli

from finectl.artifacts.manifest import FileRecord, Manifest
from finectl.artifacts.store import Artifact, open_artifact
from finectl.artifacts.tensors import load_tensors, save_tensors
from finectl.errors import InputError, UsageError
from finectl.models.io import build_model, checkpoint_file, checkpoints, load_any_model, load_model, save_model
from finectl.models.unet_config import UNetConfig

UNET = UNetConfig(
    "unet2d",
    {
        "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": [8],
        "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "layers_per_block": 1,
        "norm_num_groups": 4,
    },
    image_size=8,
    channels=1,
    parameters=1,
)  # fmt: skip
STEPS = ("--steps", 7, "--batch-size", 8, "--eval-every", 0, "--warmup-steps", 0)


@pytest.mark.parametrize("stage", ["condense", "train"])
def test_kept_updates_are_listed_hashed_and_loaded(stage: str, chain: Any) -> None:
    source = ("--depth", 2) if stage == "condense" else (chain.init,)
    plain = open_artifact(run_cli(stage, *source, *STEPS).path)
    artifact = open_artifact(run_cli(stage, *source, *STEPS, "--keep-every", 2).path)
    assert checkpoints(plain) == [] and checkpoints(artifact) == [2, 4, 6]
    assert artifact.manifest.config["keep_every"] == 2 and artifact.manifest.recipe != plain.manifest.recipe
    assert artifact.manifest.digest != plain.manifest.digest
    last = load_model(artifact).state_dict()
    for update in (2, 4, 6):
        loaded = load_model(artifact, "ema", update).state_dict()
        kept = load_tensors(artifact.path / checkpoint_file(update))
        assert {value.dtype for value in kept.values()} == {torch.float32}
        assert all(torch.equal(loaded[name], value) for name, value in kept.items())
        assert any(not torch.equal(loaded[name], value) for name, value in last.items())
    assert all(torch.equal(last[name], value) for name, value in load_model(plain).state_dict().items())


def test_updates_that_are_named(chain: Any) -> None:
    regular = open_artifact(run_cli("train", chain.init, *STEPS, "--keep-every", 2).path)
    named = open_artifact(run_cli("train", chain.init, *STEPS, "--keep-at", "4,1").path)
    assert checkpoints(named) == [1, 4] and named.manifest.config["keep_at"] == "1,4"
    assert run_cli("train", chain.init, *STEPS, "--keep-at", " 1, 4,4").path == named.path
    for name in (checkpoint_file(4), "ema.safetensors"):
        assert (named.path / name).read_bytes() == (regular.path / name).read_bytes()
    refused = run_cli("train", chain.init, *STEPS, "--keep-at", "8")
    assert refused.code == 2 and "update 8" in refused.err and "--steps 8" in refused.err


def test_an_update_that_is_not_kept(chain: Any) -> None:
    kept = open_artifact(run_cli("train", chain.init, *STEPS, "--keep-every", 3).path)
    with pytest.raises(InputError, match="no weights of update 4") as caught:
        load_model(kept, checkpoint=4)
    assert "3, 6" in caught.value.expected
    with pytest.raises(InputError, match="no weights of update 7"):
        load_model(kept, checkpoint=7)
    with pytest.raises(InputError) as caught:
        load_model(open_artifact(chain.model), checkpoint=3)
    assert "--keep-every" in caught.value.fix
    with pytest.raises(UsageError, match="raw weights of update 3"):
        load_model(kept, "raw", 3)


def test_a_unet_and_names_that_are_no_updates(tmp_path: Path) -> None:
    net, other = build_model(UNET), build_model(UNET)
    save_model(tmp_path, UNET, net.state_dict())
    names = ["config.json", "model.safetensors", checkpoint_file(1_000_000), checkpoint_file(20)]
    (tmp_path / "checkpoints").mkdir()
    for name in names[2:]:
        save_tensors(tmp_path / name, other.state_dict())
    names += ["checkpoints/notes.txt", "checkpoints/12.safetensors", "other/checkpoints/000003.safetensors"]
    files = [FileRecord(name, 0, "") for name in names]
    artifact = Artifact(tmp_path, Manifest("model", "train", "", [], {}, {}, "", [], files, "", {}))
    assert checkpoints(artifact) == [20, 1_000_000]
    for update in (20, 1_000_000):
        loaded = load_any_model(artifact, "ema", update).state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in other.state_dict().items())
    loaded = load_model(artifact).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in net.state_dict().items())
