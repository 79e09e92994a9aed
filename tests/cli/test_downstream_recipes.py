"""The recipes of the papers' downstream sets, planned on stand-ins of the right shapes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import ROOT, run_cli, tiny_vae

from finectl.artifacts.files import write_json
from finectl.artifacts.job import Job, Outcome, Plan, Stage
from finectl.artifacts.store import Artifact
from finectl.console import Console
from finectl.data.latents import LatentIndex, write_shard
from finectl.models.io import CONFIG, read_dit_config
from finectl.models.presets import DiTConfig, FactorConfig, preset
from finectl.runner import RunOptions, run_stage
from finectl.stages import train

RECIPE = ROOT / "recipes" / "fine-downstream.yaml"
SETS = ("celeba-hq", "lsun-bedroom", "lsun-church")
TYPES = ("qkv", "o", "in", "out", "adaln")
IMAGES = 4
# Trainable parameters with ImageNet's 1,001 rows in the label table, and the width: one class has two rows.
MODELS = {"b": ("dit-b", 6, 66_545_696, 768), "l": ("dit-l", 12, 231_163_936, 1024)}
CASES = [(name, size) for name in SETS for size in MODELS]
every_recipe = pytest.mark.parametrize(("name", "size"), CASES)


@dataclass(frozen=True)
class Nothing:
    """Options of the stand-ins' stage."""

    text: str


def publish(root: Path, kind: str, stage: str, name: str, write: Any) -> Path:
    """Publish an artifact of a few files in the name of a stage."""

    def plan(config: Nothing, parents: Sequence[Artifact]) -> Plan[Nothing]:
        return Plan(config, slug=name)

    def run(job: Job[Nothing]) -> Outcome:
        write(job.directory)
        return Outcome()

    declared: Stage[Any] = Stage(stage, 1, kind, Nothing, lambda config: None, plan, run)
    made = run_stage(declared, Nothing(name), [], RunOptions(workspace=root), Console(quiet=True)).artifact
    assert made is not None
    return made.path


def write_latents(directory: Path) -> None:
    """Write a few latents of 256-pixel images of one class."""
    vae = {"digest": "cd" * 32, "scaling_factor": 0.18215, "shift_factor": 0.0, "downscale": 8, "latent_channels": 4}
    index = LatentIndex(
        count=IMAGES,
        shard_size=IMAGES,
        latent_channels=4,
        latent_size=32,
        image_size=256,
        storage="float16",
        flips=True,
        class_names=("all",),
        vae={**vae, "channels": 3},
        source={"fingerprint": "ab" * 32, "bundled": False, "resize_filter": "bicubic", "skipped": 0},
    )
    moments = torch.zeros(IMAGES, *index.row)
    write_shard(
        directory / index.shards[0].file, index.storage, moments, torch.zeros(IMAGES, dtype=torch.int64), moments
    )
    index.write(directory)


def learngene_config(size: str) -> DiTConfig:
    name, _, _, width = MODELS[size]
    shape = preset(name, image_size=32, channels=4, num_classes=1000, depth=12, learn_sigma=True)
    return replace(shape, factorized=FactorConfig(TYPES, width))


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A workspace with latents and with learngenes of DiT-B and DiT-L, of which only the shapes are there."""
    root = tmp_path_factory.mktemp("downstream")
    made = {"latents": publish(root, "latents", "encode", "latents", write_latents)}
    for size in MODELS:
        config = learngene_config(size).to_dict()

        def write(directory: Path, config: dict[str, Any] = config) -> None:
            write_json(directory / CONFIG, config)

        made[size] = publish(root, "learngene", "extract", f"learngene-{size}", write)
    return root, made


def planned(stage: str, name: str, size: str, *options: object) -> dict[str, Any]:
    ran = run_cli(stage, *options, "--recipe", f"{RECIPE}:{name}-{size}", "--dry-run", "--json")
    assert ran.code == 0, ran.err
    plan: dict[str, Any] = json.loads(ran.out)
    return plan


@every_recipe
def test_init_on_latents_of_the_set(name: str, size: str, stand_ins: Any) -> None:
    root, made = stand_ins
    _, depth, parameters, width = MODELS[size]
    plan = planned("init", name, size, made[size], "--data", f"latents:{made['latents']}", "--workspace", root)
    assert plan["parameters"] == parameters - 999 * width
    assert plan["data"]["name"] == f"latents:{made['latents']}"
    config = plan["config"]
    assert (config["method"], config["depth"], config["tune_steps"], config["batch_size"]) == ("fine", depth, 300, 64)
    assert (config["sigma"], config["depth_scale"], config["model"]) == ("interpolated", 0.0, None)


@every_recipe
def test_init_before_there_are_any_data(name: str, size: str, stand_ins: Any) -> None:
    root, made = stand_ins
    plan = planned("init", name, size, made[size], "--workspace", root)
    assert plan["data"]["name"] == "shape:4x32x32:1"
    assert plan["parameters"] == MODELS[size][2] - 999 * MODELS[size][3]


@every_recipe
def test_training_of_what_init_makes(name: str, size: str, stand_ins: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    root, made = stand_ins
    target = replace(learngene_config(size), depth=MODELS[size][1], num_classes=1, factorized=None)
    started = publish(
        root, "model", "init", f"{name}-{size}", lambda place: write_json(place / CONFIG, target.to_dict())
    )
    assert read_dit_config(Artifact(started, open_manifest(started))) == target
    monkeypatch.setattr(train, "STAGE", replace(train.STAGE, measure=None))  # which would time steps of a whole DiT-L
    plan = planned("train", name, size, started, "--data", f"latents:{made['latents']}", "--workspace", root)
    config = plan["config"]
    assert (config["steps"], config["batch_size"], config["lr"], config["ema"]) == (100_000, 64, 1e-4, 0.9999)
    assert (config["lr_schedule"], config["warmup_steps"], config["weight_decay"]) == ("constant", 0, 0.0)
    assert plan["parameters"] == MODELS[size][2] - 999 * MODELS[size][3]


def open_manifest(path: Path) -> Any:
    from finectl.artifacts.manifest import read_manifest

    return read_manifest(path)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    noise = np.random.default_rng(0).integers(0, 256, (IMAGES, 16, 20, 3), dtype=np.uint8)
    for number, pixels in enumerate(noise):
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@every_recipe
def test_encoding_of_a_folder_of_images(name: str, size: str, images: Path, tmp_path: Path, workspace: Path) -> None:
    vae = tiny_vae(tmp_path / "vae", channels=3, down_block_types=("DownEncoderBlock2D",) * 4,
                   up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=(4, 4, 4, 4))  # fmt: skip
    plan = planned("encode", name, size, "--data", f"folder:{images}", "--vae", vae)
    assert plan["latents"] == "4x32x32" and plan["images"] == IMAGES
    assert plan["config"]["flip"] is True and plan["config"]["image_size"] == 256
    unnamed = run_cli("encode", "--vae", vae, "--recipe", f"{RECIPE}:{name}-{size}", "--dry-run")
    assert unnamed.code == 3 and f"data/{name}" in unnamed.err, "the set's own folder, which is not here"
