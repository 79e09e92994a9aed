"""Learned mixtures of a dense ancestor's layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import run_cli, weights

from finectl.artifacts.manifest import read_manifest
from finectl.artifacts.store import open_artifact
from finectl.data.dataset import load
from finectl.diffusion.losses import denoising_loss
from finectl.diffusion.random import generator_for
from finectl.diffusion.schedule import NoiseSchedule
from finectl.initializers import ligo
from finectl.initializers.transfer import BLOCKS
from finectl.models.dit import DiT, initialize_
from finectl.models.io import load_model, load_weights
from finectl.models.presets import LAYER_TYPES, count_parameters, preset
from finectl.training import loop

DEPTH = 3
SMALL = ("--tune-samples", 64, "--batch-size", 16)


@pytest.fixture(scope="module")
def ancestor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A dense model whose layers all do something."""
    root = tmp_path_factory.mktemp("ligo")
    start = run_cli("init", "--method", "he", "--model", "dit-nano", "--depth", DEPTH, "--workspace", root).path
    options = ("--steps", 60, "--batch-size", 16, "--lr", 0.01, "--warmup-steps", 0, "--ema", 0.5, "--eval-every", 0)
    return root, run_cli("train", start, *options, "--workspace", root).path


def init(ancestor: Any, *options: object, root: Path | None = None) -> Any:
    return run_cli("init", ancestor[1], "--method", "ligo", *options, "--workspace", root or ancestor[0])


def averaged(path: Path) -> dict[str, torch.Tensor]:
    return load_weights(open_artifact(path), "ema")


def training_loss(path: Path) -> float:
    """Return the mean denoising loss on a part of the training images, at fixed timesteps and noise."""
    data, model = load("digits", "train").subset(256, 0), load_model(open_artifact(path)).eval()
    x0 = data.images
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    t = torch.arange(len(x0)) * 1000 // len(x0)
    with torch.no_grad():
        schedule = NoiseSchedule.of(model.config, torch.device("cpu"))
        return float(denoising_loss(model, schedule, x0, data.labels, t, noise).mean())


def random_dit(depth: int, seed: int = 0) -> DiT:
    """Return a model in which no parameter is zero."""
    model = initialize_(
        DiT(preset("dit-nano", image_size=8, channels=1, num_classes=10, depth=depth)), generator_for("test", seed)
    )
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator_for("test", seed, parameter.numel()))
        parameter.data.add_(0.05 * noise)
    return model


def mixture_of(source: DiT, depth: int, rows: dict[str, torch.Tensor]) -> ligo.Mixture:
    state = source.state_dict()
    prefixes = [f"{BLOCKS}{index}." for index in range(source.config.depth)]
    layers = [{n[len(p) :]: v for n, v in state.items() if n.startswith(p)} for p in prefixes]
    rest = {name: value for name, value in state.items() if not name.startswith(BLOCKS)}
    target = preset("dit-nano", image_size=8, channels=1, num_classes=10, depth=depth)
    return ligo.Mixture(target, layers, rest, rows)


@pytest.mark.parametrize(
    ("layers", "depth", "chosen"), [(3, 7, [0, 1, 2, 0, 1, 2, 0]), (5, 3, [0, 2, 4]), (1, 2, [0, 0])]
)
def test_rows_start_at_one_layer_and_sum_to_one(layers: int, depth: int, chosen: list[int]) -> None:
    rows = ligo.start_rows(layers, depth, generator_for("test"))
    assert set(rows) == {f"{kind}.{part}" for kind in LAYER_TYPES for part in ("weight", "bias")}
    for row in rows.values():
        assert row.shape == (depth, layers) and row.argmax(1).tolist() == chosen
        torch.testing.assert_close(row.sum(1), torch.ones(depth))
        assert bool((row > 0).all()) and float(row.max(1).values.min()) >= 1 / (1 + 0.03 * (layers - 1))
    if layers > 1:
        assert not torch.equal(rows["qkv.weight"], rows["qkv.bias"]), "each has coefficients of its own"
        assert not torch.equal(rows["qkv.weight"], rows["o.weight"])


def test_without_noise_layers_are_copied(ancestor: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ligo, "NOISE", 0.0)
    whole = averaged(ancestor[1])
    same = averaged(init(ancestor, "--depth", DEPTH, "--tune-steps", 0, root=tmp_path).path)
    assert set(same) == set(whole) and all(torch.equal(whole[name], same[name]) for name in whole)
    for depth, chosen in ((5, [0, 1, 2, 0, 1]), (2, [0, 2])):
        made = averaged(init(ancestor, "--depth", depth, "--tune-steps", 0, root=tmp_path).path)
        for place, layer in enumerate(chosen):
            for name in ("attn.qkv.weight", "mlp.fc2.bias", "adaLN_modulation.1.weight"):
                assert torch.equal(made[f"blocks.{place}.{name}"], whole[f"blocks.{layer}.{name}"])


def test_the_noise_adds_a_little_of_the_other_layers(ancestor: Any) -> None:
    whole, made = averaged(ancestor[1]), averaged(init(ancestor, "--depth", DEPTH, "--tune-steps", 0).path)
    for name in (f"blocks.{index}.attn.qkv.weight" for index in range(DEPTH)):
        distance = float((whole[name] - made[name]).norm() / whole[name].norm())
        assert 1e-3 < distance < 0.1


def test_mixtures_are_what_their_coefficients_say() -> None:
    source, depth = random_dit(2), 3
    rows = {
        f"{kind}.{part}": torch.randn(depth, 2, generator=generator_for("rows", index, bias))
        for index, kind in enumerate(LAYER_TYPES)
        for bias, part in enumerate(("weight", "bias"))
    }
    model, state = mixture_of(source, depth, rows), source.state_dict()
    wanted = {name: value for name, value in state.items() if not name.startswith(BLOCKS)}
    for kind, path in LAYER_TYPES.items():
        for part in ("weight", "bias"):
            for place in range(depth):
                first, second = (state[f"blocks.{layer}.{path}.{part}"] for layer in (0, 1))
                of_first, of_second = rows[f"{kind}.{part}"][place]
                wanted[f"blocks.{place}.{path}.{part}"] = of_first * first + of_second * second
    found = model.dense()
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    dense = DiT(model.config)
    dense.load_state_dict(found)
    x, t, y = torch.randn(4, 1, 8, 8, generator=generator_for("x")), torch.arange(4) * 300, torch.arange(4)
    torch.testing.assert_close(model(x, t, y), dense(x, t, y), rtol=1e-4, atol=1e-4)
    # What is mixed moves with the model, once for all layers.
    model.double()
    dense.double()
    torch.testing.assert_close(model(x.double(), t, y), dense(x.double(), t, y), rtol=1e-5, atol=1e-5)
    assert {value.dtype for value in model.buffers()} == {torch.float64}
    assert len(list(model.buffers())) == 1 + 2 * len(LAYER_TYPES) and set(model.state_dict()) == {
        name for name, _ in model.named_parameters()
    }


def test_gradients_of_coefficients_are_those_of_the_weights_along_the_layers() -> None:
    source = random_dit(2)
    model = mixture_of(source, 1, ligo.start_rows(2, 1, generator_for("test")))
    ligo.freeze(model, {name for name, _ in model.named_parameters() if not name.startswith(BLOCKS)})
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"blocks.0.{path}.{part}_row" for path in LAYER_TYPES.values() for part in ("weight", "bias")}
    dense = DiT(model.config)
    dense.load_state_dict(model.dense())
    x, t, y = torch.randn(4, 1, 8, 8, generator=generator_for("x")), torch.arange(4) * 300, torch.arange(4)
    for each in (model, dense):
        each(x, t, y).square().mean().backward()
    found, through = dict(model.named_parameters()), dict(dense.named_parameters())
    for path in LAYER_TYPES.values():
        for part in ("weight", "bias"):
            stack = torch.stack([source.state_dict()[f"blocks.{layer}.{path}.{part}"] for layer in (0, 1)])
            gradient = through[f"blocks.0.{path}.{part}"].grad
            assert gradient is not None
            wanted = (stack * gradient).flatten(1).sum(1)
            torch.testing.assert_close(found[f"blocks.0.{path}.{part}_row"].grad, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("depth", [2, 5])
def test_tuning_lowers_the_loss_and_leaves_the_source_alone(ancestor: Any, depth: int) -> None:
    before = weights(ancestor[1])
    start = init(ancestor, "--depth", depth, "--tune-steps", 0).path
    tuned = init(ancestor, "--depth", depth, "--tune-steps", 40, "--batch-size", 32).path
    assert training_loss(tuned) < 0.97 * training_loss(start)
    assert weights(ancestor[1]) == before
    manifest, source, made = read_manifest(tuned), averaged(ancestor[1]), averaged(tuned)
    assert all(torch.equal(made[name], value) for name, value in source.items() if not name.startswith(BLOCKS))
    assert manifest.cost["steps"] == 40 and manifest.cost["flops"] > 0
    assert manifest.config["tune_samples"] == 1438 and manifest.config["tune_lr"] == 1e-2
    metrics, block = manifest.metrics, count_parameters(random_dit(depth).config)["block"]
    assert metrics["parameters_transferred"] == min(DEPTH, depth) * block
    rest = sum(value.numel() for name, value in source.items() if not name.startswith(BLOCKS))
    assert metrics["parameters_transferred_with_embedders"] == metrics["parameters_transferred"] + rest
    # Each tensor stays a mixture: what is left of it beside the ancestor's layers is rounding.
    for path in LAYER_TYPES.values():
        stack = torch.stack([source[f"blocks.{layer}.{path}.weight"].flatten() for layer in range(DEPTH)]).double()
        for place in range(depth):
            value = made[f"blocks.{place}.{path}.weight"].flatten().double()
            row = torch.linalg.lstsq(stack.T, value[:, None]).solution
            assert float((stack.T @ row - value[:, None]).norm() / value.norm()) < 1e-5


def test_embedders_that_start_anew_are_trained(ancestor: Any) -> None:
    options = ("--depth", 2, "--data", "photos", "--image-size", 16, "--batch-size", 8, "--tune-samples", 16)
    start, tuned = (averaged(init(ancestor, *options, "--tune-steps", steps).path) for steps in (0, 2))
    source = averaged(ancestor[1])
    for name in ("x_embedder.proj.weight", "y_embedder.embedding_table.weight", "final_layer.linear.bias"):
        assert not torch.equal(start[name], tuned[name]), name
    for name in ("x_embedder.proj.bias", "t_embedder.mlp.0.weight", "final_layer.adaLN_modulation.1.weight"):
        assert torch.equal(source[name], tuned[name]), name


def test_an_interrupted_tuning_goes_on_to_the_same_weights(
    ancestor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--depth", 4, "--tune-steps", 8, *SMALL)
    unbroken = init(ancestor, *options, root=tmp_path / "unbroken").path
    assert weights(init(ancestor, *options, root=tmp_path / "again").path) == weights(unbroken)
    step = loop.train_step

    def stopped(run: Any, number: int) -> torch.Tensor:
        if number == 5:
            raise KeyboardInterrupt
        return step(run, number)

    place = ("--save-every", 2)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", stopped)
        broken = init(ancestor, *options, *place, root=tmp_path / "broken")
    assert broken.code != 0 and broken.out == "", broken.err
    resumed = init(ancestor, *options, *place, root=tmp_path / "broken")
    assert "step=4 steps=8" in resumed.err, resumed.err
    assert weights(resumed.path) == weights(unbroken)


def test_ways_of_running_do_not_change_what_is_learned(ancestor: Any, tmp_path: Path) -> None:
    options = ("--depth", 4, "--tune-steps", 3, *SMALL)
    usual = averaged(init(ancestor, *options, root=tmp_path / "usual").path)
    for name, way in {
        "checkpointed": ("--grad-checkpointing",),
        "in parts": ("--accumulate", 2),
        "narrow": ("--dtype", "bfloat16"),
    }.items():
        other = averaged(init(ancestor, *options, *way, root=tmp_path / name).path)
        for key, value in usual.items():
            torch.testing.assert_close(other[key], value, rtol=0.05, atol=0.01 if name == "narrow" else 1e-4, msg=key)
