"""`condense --method share|tleg|wave` and `--distill`, down to models of other depths."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import run_cli, weights

from finectl.artifacts.manifest import read_manifest
from finectl.artifacts.store import open_artifact
from finectl.artifacts.tensors import load_tensors
from finectl.errors import EXIT_INPUT, EXIT_USAGE
from finectl.models.io import load_weights, read_dit_config
from finectl.models.presets import LAYER_TYPES
from finectl.training.log import read_log

TINY = ("--model", "dit-nano", "--depth", 3, "--steps", 3, "--batch-size", 8, "--lr", 0.01, "--eval-every", 3)
METHODS = ("share", "tleg", "wave")


@pytest.fixture(scope="module")
def learngenes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = ("--workspace", tmp_path_factory.mktemp("methods"))
    made = {}
    for method in METHODS:
        condensed = run_cli("condense", "--method", method, *TINY, *place).path
        assert condensed.name.startswith(f"dit-nano-l3-{method}-")
        made[method] = run_cli("extract", condensed, *place).path
    return made


@pytest.mark.parametrize("method", METHODS)
def test_a_model_of_its_own_depth_is_the_condensed_model(learngenes: dict[str, Path], method: str) -> None:
    learngene = learngenes[method]
    made = run_cli("init", learngene, "--method", method, "--depth", 3, "--tune-steps", 0).path
    parent = open_artifact(learngene / read_manifest(learngene).parents[0].path)
    from finectl.models.dit import dense_state_dict

    wanted = dense_state_dict(load_weights(parent, "ema"), read_dit_config(parent))
    found = load_tensors(made / "model.safetensors")
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert torch.allclose(value, wanted[name], atol=1e-6), name
    assert bool(found["blocks.0.attn.qkv.weight"].any())


def test_every_layer_of_share_is_the_tied_block(learngenes: dict[str, Path]) -> None:
    made = load_tensors(
        run_cli("init", learngenes["share"], "--method", "share", "--depth", 5).path / "model.safetensors"
    )
    block = load_tensors(learngenes["share"] / "learngene.safetensors")
    for kind, path in LAYER_TYPES.items():
        for index in range(5):
            assert torch.equal(made[f"blocks.{index}.{path}.weight"], block[f"{kind}.base_weight"])
            assert torch.equal(made[f"blocks.{index}.{path}.bias"], block[f"{kind}.base_bias"])


def test_tleg_reads_its_line_at_the_targets_layers(learngenes: dict[str, Path]) -> None:
    made = load_tensors(
        run_cli("init", learngenes["tleg"], "--method", "tleg", "--depth", 5).path / "model.safetensors"
    )
    line = load_tensors(learngenes["tleg"] / "learngene.safetensors")
    for index in range(5):
        wanted = line["in.base_weight"] + index / 5 * line["in.slope_weight"]
        assert torch.allclose(made[f"blocks.{index}.mlp.fc1.weight"], wanted, atol=1e-6)


@pytest.mark.parametrize("method", ["share", "tleg"])
def test_scaled_branches_and_nothing_else(learngenes: dict[str, Path], method: str) -> None:
    source = (learngenes[method], "--method", method, "--depth", 6)
    plain, scaled, halved = (
        load_tensors(run_cli("init", *source, *options).path / "model.safetensors")
        for options in ((), ("--variant", "scaled"), ("--variant", "scaled", "--set", "exponent=1"))
    )
    for name, value in plain.items():
        factor = 0.5 if ".attn.proj." in name or ".mlp.fc2." in name else 1.0
        assert torch.allclose(scaled[name], value * factor**0.75), name
        assert torch.allclose(halved[name], value * factor), name


def test_wave_tunes_scalers_and_biases_and_leaves_the_templates(learngenes: dict[str, Path]) -> None:
    source = (learngenes["wave"], "--method", "wave", "--depth", 2, "--batch-size", 8, "--tune-samples", 16)
    before, after = (run_cli("init", *source, "--tune-steps", steps).path for steps in (0, 2))
    assert weights(before) != weights(after)
    assert read_manifest(after).cost["steps"] == 2
    templates = load_tensors(learngenes["wave"] / "learngene.safetensors")["o.templates"].double()
    weight = load_tensors(after / "model.safetensors")["blocks.1.attn.proj.weight"].double()
    tiles = weight.view(2, 32, 2, 32).permute(0, 2, 1, 3).reshape(4, -1)  # each is a sum of templates
    basis = torch.linalg.qr(templates.flatten(1).T)[0]
    assert float((tiles - tiles @ basis @ basis.T).norm() / tiles.norm()) < 1e-5


def test_a_learngene_of_another_method_is_refused(learngenes: dict[str, Path]) -> None:
    ran = run_cli("init", learngenes["share"], "--method", "tleg", "--depth", 2)
    assert ran.code == EXIT_INPUT
    assert "condense --method share" in ran.err and "finectl condense --method tleg" in ran.err


@pytest.mark.parametrize(
    "options",
    [
        ("--method", "tleg", "--rank", 8),
        ("--method", "share", "--factorize", "qkv"),
        ("--method", "tleg", "--sigma-lr", 0.1),
        ("--method", "fine", "--template-size", 8),
        ("--method", "wave", "--sigma-sharing", 2),
        ("--method", "wave", "--template-size", 24),
        ("--distill-steps", 3),
    ],
)
def test_an_option_of_another_method_is_refused(options: tuple[object, ...], tmp_path: Path) -> None:
    ran = run_cli("condense", *TINY, *options, "--workspace", tmp_path)
    assert ran.code == EXIT_USAGE and ran.out == "" and "error: " in ran.err


def test_fewer_types_and_smaller_templates(tmp_path: Path) -> None:
    options = (
        "--method",
        "wave",
        "--factorize",
        "qkv,out",
        "--template-size",
        16,
        "--rank",
        8,
        "--workspace",
        tmp_path,
    )
    made = run_cli("condense", *TINY, *options).path
    config = read_dit_config(open_artifact(made)).factorized
    assert config is not None and config.types == ("qkv", "out")
    state = load_tensors(made / "model.safetensors")
    assert state["factors.qkv.templates"].shape == (8, 16, 16)  # 8 (192 + 64) / 16^2
    assert state["blocks.0.attn.qkv.scalers"].shape == (8, 12, 4)
    again = run_cli("condense", "--recipe", made, "--workspace", tmp_path)
    assert again.path == made and "already there" in again.err


@pytest.mark.parametrize("method", ["fine", *METHODS])
def test_towards_a_teacher(chain: Any, method: str) -> None:
    """The loss of the first update is the distance from the teacher: of a model that predicts 0, its mean square."""
    options = ("--method", method, "--distill", chain.model, *TINY, "--workspace", chain.root)
    made = run_cli("condense", *options).path
    manifest = read_manifest(made)
    assert [parent.role for parent in manifest.parents] == ["teacher"]
    assert manifest.config["distill_steps"] == 3 and manifest.config["data"] == "digits"
    plain = run_cli("condense", "--method", method, *TINY, "--workspace", chain.root).path
    assert weights(plain) != weights(made)
    first = {
        path: next(line["loss"] for line in read_log(path / "log.jsonl") if "loss" in line) for path in (plain, made)
    }
    assert first[plain] > 2 * first[made], "noise has variance 1, and a hardly trained teacher predicts less"
    short = run_cli("condense", *options, "--distill-steps", 1).path
    assert weights(short) != weights(made)
    assert read_manifest(made).cost["flops"] > read_manifest(short).cost["flops"] > read_manifest(plain).cost["flops"]


def test_a_teacher_of_other_images_is_refused(chain: Any) -> None:
    ran = run_cli("condense", "--distill", chain.model, "--data", "photos", *TINY, "--workspace", chain.root)
    assert ran.code == EXIT_INPUT and "photos" in ran.err
    ran = run_cli("condense", "--distill", chain.model, "--learn-sigma", *TINY, "--workspace", chain.root)
    assert ran.code == EXIT_USAGE and "--no-learn-sigma" in ran.err


def test_from_goes_with_fine_alone(chain: Any) -> None:
    for options in (("--method", "tleg"), ("--distill", chain.model)):
        ran = run_cli("condense", "--from", chain.model, *options, "--workspace", chain.root)
        assert ran.code == EXIT_USAGE and "--from" in ran.err and "--distill" in ran.err


def test_the_dense_architecture_is_the_same_for_all(learngenes: dict[str, Path]) -> None:
    dense = {replace(read_dit_config(open_artifact(path)), factorized=None) for path in learngenes.values()}
    assert len(dense) == 1
