"""FINE, phase 2: dense models of any depth from a learngene."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import run_cli
from torch import Tensor

from finectl.artifacts.manifest import read_manifest
from finectl.artifacts.store import open_artifact
from finectl.data.dataset import load
from finectl.initializers.expansion import freeze, interpolate, place_curves
from finectl.models.dit import DiT, dense_state_dict
from finectl.models.io import load_model, load_weights, read_config
from finectl.models.learngene import Learngene, load_learngene
from finectl.models.presets import LAYER_TYPES


@pytest.fixture(scope="module")
def ancestor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A condensed model far from its start, so that no part of it is zero, and its learngene."""
    root = tmp_path_factory.mktemp("ancestor")
    place = ("--workspace", root)
    condensed = run_cli("condense", "--depth", 3, "--steps", 20, "--batch-size", 16, "--lr", 0.01, "--ema", 0.5, *place)
    return root, condensed.path, run_cli("extract", condensed.path, *place).path


def init(ancestor: Any, *options: object, source: Path | None = None) -> Path:
    root, _, learngene = ancestor
    return run_cli("init", source or learngene, *options, "--workspace", root).path


def state(path: Path, weights: str = "ema") -> dict[str, Tensor]:
    return load_weights(open_artifact(path), weights)


def learngene_of(ancestor: Any) -> Learngene:
    return load_learngene(open_artifact(ancestor[2]))


def output(model: DiT) -> Tensor:
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(x, torch.tensor([0, 10, 500, 999]), torch.tensor([0, 3, 9, 10]))


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_the_same_depth_without_tuning_restores_the_condensed_model(ancestor: Any, weights: str) -> None:
    root, condensed, _ = ancestor
    learngene = run_cli("extract", condensed, "--weights", weights, "--workspace", root).path
    made = init(ancestor, "--depth", 3, "--tune-steps", 0, source=learngene)
    artifact = open_artifact(condensed)
    wanted = dense_state_dict(load_model(artifact, weights), read_config(artifact))
    found = state(made)
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
    before, after = output(load_model(artifact, weights)), output(load_model(open_artifact(made)))
    assert float(before.abs().mean()) > 0.01
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_ema_and_raw_weights_are_never_mixed(ancestor: Any) -> None:
    _, condensed, _ = ancestor
    ema, raw = state(condensed, "ema"), state(condensed, "raw")
    assert all(not torch.equal(value, raw[name]) for name, value in ema.items() if name.startswith("factors."))


def test_interpolation_has_the_ends_and_the_middle_of_the_curve() -> None:
    curve = torch.tensor([[0.0, 10.0], [1.0, 20.0], [4.0, 60.0]])
    assert torch.equal(interpolate(curve, 3), curve)
    assert interpolate(curve, 1).tolist() == [[1.0, 20.0]]
    assert interpolate(curve, 2).tolist() == [[0.0, 10.0], [4.0, 60.0]]
    assert interpolate(curve, 5).tolist() == [[0, 10], [0.5, 15], [1, 20], [2.5, 40], [4, 60]]
    even = torch.tensor([[0.0], [1.0], [4.0], [5.0]])
    assert interpolate(even, 1).tolist() == [[2.5]]
    assert interpolate(torch.tensor([[7.0]]), 4).tolist() == [[7.0]] * 4
    torch.testing.assert_close(interpolate(torch.arange(12.0)[:, None], 30)[:, 0], torch.linspace(0, 11, 30))
    for depth in range(1, 61):
        curve = torch.randn(depth, 3)
        assert torch.equal(interpolate(curve, depth), curve), "the same depth is the identity, bit for bit"


def test_curves_are_placed_by_layer_and_type(ancestor: Any) -> None:
    learngene = learngene_of(ancestor)
    placed = place_curves(learngene, 5, "interpolated", 0.0)
    assert len(placed) == 5 * 2 * len(LAYER_TYPES)
    for kind, path in LAYER_TYPES.items():
        for what in ("sigma", "bias"):
            curve = learngene.curves[f"{what}.{kind}"]
            assert curve.shape[0] == 3
            for layer, row in ((0, 0), (2, 1), (4, 2)):
                assert torch.equal(placed[f"blocks.{layer}.{path}.{what}"], curve[row])
            middle = (curve[0] + curve[1]) / 2
            torch.testing.assert_close(placed[f"blocks.1.{path}.{what}"], middle)
    same = place_curves(learngene, 4, "identical", 0.0)
    for layer in range(4):
        torch.testing.assert_close(same[f"blocks.{layer}.mlp.fc1.sigma"], learngene.curves["sigma.in"].mean(0))
    assert place_curves(learngene, 4, "random", 0.0) == {}


def test_only_the_ends_of_residual_branches_are_scaled_by_depth(ancestor: Any) -> None:
    learngene = learngene_of(ancestor)
    as_read = place_curves(learngene, 6, "interpolated", 0.0)
    scaled = place_curves(learngene, 6, "interpolated", 2.0)
    for name, value in as_read.items():
        factor = (3 / 6) ** 2 if ".attn.proj." in name or ".mlp.fc2." in name else 1.0
        torch.testing.assert_close(scaled[name], factor * value)
    own = place_curves(learngene, 3, "interpolated", 2.0)
    assert all(torch.equal(own[name], value) for name, value in place_curves(learngene, 3, "interpolated", 0.0).items())


@pytest.mark.parametrize("depth", [1, 2, 6])
def test_weights_of_any_depth_are_built_from_the_shared_factors(ancestor: Any, depth: int) -> None:
    learngene = learngene_of(ancestor)
    made = init(ancestor, "--depth", depth, "--tune-steps", 0)
    found = state(made)
    assert read_config(open_artifact(made)).depth == depth
    assert len([name for name in found if name.endswith("attn.qkv.weight")]) == depth
    sigma = interpolate(learngene.curves["sigma.qkv"], depth)
    for layer in range(depth):
        weight = (learngene.factors["qkv.U"] * sigma[layer]) @ learngene.factors["qkv.V"].T
        torch.testing.assert_close(found[f"blocks.{layer}.attn.qkv.weight"], weight, rtol=1e-4, atol=1e-6)
    for name, value in learngene.rest.items():
        assert torch.equal(found[name], value), name


def test_sigma_starts_as_the_option_says(ancestor: Any) -> None:
    made = {
        sigma: state(init(ancestor, "--depth", 3, "--tune-steps", 0, "--sigma", sigma))["blocks.0.mlp.fc1.weight"]
        for sigma in ("interpolated", "identical", "random")
    }
    for one, two in (("interpolated", "identical"), ("identical", "random"), ("interpolated", "random")):
        assert not torch.allclose(made[one], made[two])
    seeds = [
        state(init(ancestor, "--depth", 3, "--tune-steps", 0, "--sigma", "random", "--seed", seed)) for seed in (1, 2)
    ]
    assert not torch.allclose(seeds[0]["blocks.0.mlp.fc1.weight"], seeds[1]["blocks.0.mlp.fc1.weight"])


def test_tuning_changes_sigma_and_biases_and_nothing_else(ancestor: Any) -> None:
    learngene = learngene_of(ancestor)
    options = ("--depth", 2, "--batch-size", 8, "--tune-lr", 0.05)
    start, tuned = state(init(ancestor, "--depth", 2, "--tune-steps", 0)), init(ancestor, *options, "--tune-steps", 5)
    found = state(tuned)
    for name in learngene.rest:
        assert torch.equal(found[name], start[name]), name
    assert not torch.equal(found["blocks.1.mlp.fc1.weight"], start["blocks.1.mlp.fc1.weight"])
    assert not torch.equal(found["blocks.1.mlp.fc1.bias"], start["blocks.1.mlp.fc1.bias"])
    for kind, path in LAYER_TYPES.items():
        # W = U diag(sigma) V^T has its columns in the span of U and its rows in the span of V: the factors were frozen.
        U, V = learngene.factors[f"{kind}.U"].double(), learngene.factors[f"{kind}.V"].double()
        weight = found[f"blocks.0.{path}.weight"].double()
        core = torch.linalg.lstsq(U, weight).solution @ torch.linalg.pinv(V.T)
        torch.testing.assert_close(U @ torch.diag(core.diagonal()) @ V.T, weight, rtol=1e-3, atol=1e-4)
    frozen_biases = state(init(ancestor, *options, "--tune-steps", 5, "--no-tune-biases"))
    for path in LAYER_TYPES.values():
        assert torch.equal(frozen_biases[f"blocks.0.{path}.bias"], start[f"blocks.0.{path}.bias"])
    assert read_manifest(tuned).cost["steps"] == 5


def test_what_is_frozen() -> None:
    from dataclasses import replace

    from finectl.models.presets import FactorConfig, preset

    dense = preset("dit-nano", image_size=8, channels=1, num_classes=10, depth=2)
    model = DiT(replace(dense, factorized=FactorConfig(("qkv", "in"), 8)))
    copied = {name: value for name, value in model.state_dict().items() if not name.startswith("y_embedder.")}
    freeze(model, copied=copied, biases=True)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert "y_embedder.embedding_table.weight" in trained
    assert {n for n in trained if n.startswith("factors.")} == set()
    assert "blocks.0.attn.qkv.sigma" in trained and "blocks.1.mlp.fc2.bias" in trained
    assert not {"x_embedder.proj.weight", "final_layer.linear.bias", "blocks.0.mlp.fc2.weight"} & trained
    freeze(model, copied=copied, biases=False)
    assert "blocks.1.mlp.fc2.bias" not in {n for n, p in model.named_parameters() if p.requires_grad}


def test_what_was_transferred_is_counted(ancestor: Any) -> None:
    learngene = learngene_of(ancestor)
    made = read_manifest(init(ancestor, "--depth", 4, "--tune-steps", 0)).metrics
    factors = sum(value.numel() for value in learngene.factors.values())
    curves = sum(value.numel() for value in learngene.curves.values())
    rest = sum(value.numel() for value in learngene.rest.values())
    assert made["parameters_transferred"] == factors + curves
    assert made["parameters_transferred_with_embedders"] == factors + curves + rest
    random = read_manifest(init(ancestor, "--depth", 4, "--tune-steps", 0, "--sigma", "random")).metrics
    assert random["parameters_transferred"] == factors
    control = read_manifest(init(ancestor, "--depth", 4, "--method", "he")).metrics
    assert control["parameters_transferred"] == control["parameters_transferred_with_embedders"] == 0
    assert control["parameters"] == made["parameters"]


def pictures(folder: Path, mode: str, classes: int, count: int = 10) -> str:
    from PIL import Image

    for label in range(classes):
        (folder / f"{label}").mkdir(parents=True)
        for index in range(count):
            colour = (index * 20 + label) if mode == "L" else (index * 20, label * 50, 7)
            Image.new(mode, (8, 8), colour).save(folder / f"{label}" / f"{index}.png")
    return f"folder:{folder}"


def test_a_new_set_of_labels_starts_the_label_table_anew(ancestor: Any, tmp_path: Path) -> None:
    learngene = learngene_of(ancestor)
    table = "y_embedder.embedding_table.weight"
    # As many classes as the digits, and yet not the same ones.
    made = init(ancestor, "--depth", 2, "--tune-steps", 0, "--data", pictures(tmp_path, "L", 10))
    found = state(made)
    assert found[table].shape == learngene.rest[table].shape and not torch.allclose(found[table], learngene.rest[table])
    for name, value in learngene.rest.items():
        assert name == table or torch.equal(found[name], value), name
    tuned = state(init(ancestor, "--depth", 2, "--tune-steps", 2, "--batch-size", 4, "--data", f"folder:{tmp_path}"))
    assert not torch.equal(tuned[table], found[table]), "what starts anew is trained"
    metrics = read_manifest(made).metrics
    left_out = learngene.rest[table].numel()
    whole = sum(value.numel() for value in learngene.rest.values())
    extra = metrics["parameters_transferred_with_embedders"] - metrics["parameters_transferred"]
    assert extra == whole - left_out


def test_other_channels_start_the_input_and_output_anew(ancestor: Any, tmp_path: Path) -> None:
    learngene = learngene_of(ancestor)
    made = init(ancestor, "--depth", 2, "--tune-steps", 1, "--batch-size", 4, "--data", pictures(tmp_path, "RGB", 3))
    config, found = read_config(open_artifact(made)), state(made)
    assert (config.channels, config.num_classes) == (3, 3)
    assert found["x_embedder.proj.weight"].shape == (64, 3, 2, 2)
    assert found["y_embedder.embedding_table.weight"].shape == (4, 64)
    assert torch.equal(found["t_embedder.mlp.0.weight"], learngene.rest["t_embedder.mlp.0.weight"])
    assert torch.equal(found["x_embedder.proj.bias"], learngene.rest["x_embedder.proj.bias"])
    load_model(open_artifact(made))


def test_tuning_sees_a_small_fixed_part_of_the_data(ancestor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from finectl.initializers import tuning

    seen = []
    real = tuning.fit

    def watch(job: Any, model: Any, data: Any, *rest: Any, **more: Any) -> Any:
        seen.append(data)
        return real(job, model, data, *rest, **more)

    monkeypatch.setattr(tuning, "fit", watch)
    for seed in (0, 0, 1):
        init(ancestor, "--depth", 1, "--tune-steps", 1, "--tune-samples", 50, "--seed", seed, "--force")
    assert [len(data) for data in seen] == [50, 50, 50]
    assert torch.equal(seen[0].images, seen[1].images) and not torch.equal(seen[0].images, seen[2].images)
    assert sorted(seen[0].labels.bincount().tolist()) == [5] * 10
    train = load("digits", "train").images.flatten(1)
    assert all(bool((train == image.flatten()).all(1).any()) for image in seen[0].images), (
        "no held-out image is among them"
    )


def test_the_control_is_random_and_of_the_same_shape(ancestor: Any) -> None:
    root, condensed, _ = ancestor
    made = state(init(ancestor, "--depth", 2, "--method", "he"))
    fine = state(init(ancestor, "--depth", 2, "--tune-steps", 0))
    assert {name: value.shape for name, value in made.items()} == {name: value.shape for name, value in fine.items()}
    assert not bool(made["final_layer.linear.weight"].any()), "DiT starts with a zero final layer"
    assert not bool(made["blocks.0.adaLN_modulation.1.weight"].any())
    bound = (6 / (64 + 256)) ** 0.5
    assert 0.9 * bound < float(made["blocks.0.mlp.fc1.weight"].abs().max()) <= bound
    other = state(run_cli("init", "--method", "he", "--model", "dit-nano", "--depth", 2, "--workspace", root).path)
    for name, value in made.items():
        assert torch.equal(other[name], value), "the preset and the learngene of the preset give the same control"
    from_condensed = state(init(ancestor, "--depth", 2, "--method", "he", source=condensed))
    assert torch.equal(from_condensed["blocks.1.mlp.fc1.weight"], made["blocks.1.mlp.fc1.weight"])
