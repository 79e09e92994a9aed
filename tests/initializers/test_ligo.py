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
from finectl.initializers.growth import MODULES, Mixture, WidthMaps, start_map
from finectl.initializers.room import block_room
from finectl.initializers.transfer import BLOCKS
from finectl.models.dit import DiT, initialize_
from finectl.models.io import load_model, load_weights
from finectl.models.presets import LAYER_TYPES, DiTConfig, count_parameters, preset
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


def mixture_of(source: DiT, depth: int, rows: dict[str, torch.Tensor]) -> Mixture:
    state = source.state_dict()
    prefixes = [f"{BLOCKS}{index}." for index in range(source.config.depth)]
    layers = [{n[len(p) :]: v for n, v in state.items() if n.startswith(p)} for p in prefixes]
    rest = {name: value for name, value in state.items() if not name.startswith(BLOCKS)}
    target = preset("dit-nano", image_size=8, channels=1, num_classes=10, depth=depth)
    maps = WidthMaps(source.config, target, generator_for("maps"))
    return Mixture(target, layers, rest, rows, maps, {})


@pytest.mark.parametrize(
    ("layers", "depth", "chosen"), [(3, 7, [0, 1, 2, 0, 1, 2, 0]), (5, 3, [0, 2, 4]), (1, 2, [0, 0])]
)
def test_rows_start_at_one_layer_and_sum_to_one(layers: int, depth: int, chosen: list[int]) -> None:
    rows = ligo.start_rows(layers, depth, 0.03, generator_for("test"))
    modules = ("q", "k", "v", "o", "in", "out", "adaln")
    assert set(rows) == {f"{module}.{part}" for module in modules for part in ("weight", "bias")}
    for row in rows.values():
        assert row.shape == (depth, layers) and row.argmax(1).tolist() == chosen
        torch.testing.assert_close(row.sum(1), torch.ones(depth))
        assert bool((row > 0).all()) and float(row.max(1).values.min()) >= 1 / (1 + 0.03 * (layers - 1))
    if layers > 1:
        assert not torch.equal(rows["q.weight"], rows["q.bias"]), "each has coefficients of its own"
        assert not torch.equal(rows["q.weight"], rows["k.weight"])


def test_one_hot_starts_copy(ancestor: Any) -> None:
    whole = averaged(ancestor[1])
    copied = ("--tune-steps", 0, "--set", "noise=0")
    same = averaged(init(ancestor, "--depth", DEPTH, *copied).path)
    assert set(same) == set(whole) and all(torch.equal(whole[name], same[name]) for name in whole)
    for depth, chosen in ((5, [0, 1, 2, 0, 1]), (2, [0, 2])):
        made = averaged(init(ancestor, "--depth", depth, *copied).path)
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
        f"{module}.{part}": torch.randn(depth, 2, generator=generator_for("rows", index, bias))
        for index, module in enumerate(module for modules in MODULES.values() for module in modules)
        for bias, part in enumerate(("weight", "bias"))
    }
    model, state = mixture_of(source, depth, rows), source.state_dict()
    wanted = {name: value for name, value in state.items() if not name.startswith(BLOCKS)}
    for kind, path in LAYER_TYPES.items():
        for part in ("weight", "bias"):
            for place in range(depth):
                first, second = (state[f"blocks.{layer}.{path}.{part}"] for layer in (0, 1))
                parts = MODULES[kind]  # queries, keys and values each with coefficients of its own
                mixed = [
                    row[place, 0] * one + row[place, 1] * other
                    for row, one, other in zip(
                        (rows[f"{module}.{part}"] for module in parts),
                        first.chunk(len(parts)),
                        second.chunk(len(parts)),
                        strict=True,
                    )
                ]
                wanted[f"blocks.{place}.{path}.{part}"] = torch.cat(mixed)
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
    model = mixture_of(source, 1, ligo.start_rows(2, 1, 0.03, generator_for("test")))
    ligo.freeze(model, {name for name, _ in model.named_parameters() if not name.startswith(BLOCKS)})
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"blocks.0.{path}.{part}_rows" for path in LAYER_TYPES.values() for part in ("weight", "bias")}
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
            parts = 3 if path == "attn.qkv" else 1
            wanted = torch.stack([part.flatten(1).sum(1) for part in (stack * gradient).chunk(parts, dim=1)])
            torch.testing.assert_close(found[f"blocks.0.{path}.{part}_rows"].grad, wanted, rtol=1e-3, atol=1e-5)


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
        whole = torch.stack([source[f"blocks.{layer}.{path}.weight"] for layer in range(DEPTH)]).double()
        parts = 3 if path == "attn.qkv" else 1
        for place in range(depth):
            values = made[f"blocks.{place}.{path}.weight"].double().chunk(parts)
            for stack, value in zip(whole.chunk(parts, dim=1), values, strict=True):
                columns = stack.flatten(1).T
                row = torch.linalg.lstsq(columns, value.flatten()[:, None]).solution
                assert float((columns @ row - value.flatten()[:, None]).norm() / value.norm()) < 1e-5


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


def dit(width: int, heads: int, depth: int = 2) -> DiTConfig:
    return DiTConfig(width, depth, heads, patch_size=2, image_size=8, channels=1, num_classes=10)


def test_what_is_transferred_from_four_layers() -> None:
    for name, wanted in (("dit-b", 45_288_992), ("dit-l", 80_046_112)):
        depths = (4, 6, 8, 10, 12)
        configs = [
            preset(name, image_size=32, channels=4, num_classes=1000, learn_sigma=True, depth=depth) for depth in depths
        ]
        counts = count_parameters(configs[0])
        rest = counts["total"] - counts["blocks"]
        average = sum(block_room(configs[0], target) + rest for target in configs) / len(depths)
        assert average == wanted, name
    assert block_room(dit(32, 4), dit(16, 4, depth=5)) == 5 * count_parameters(dit(16, 4))["block"]
    assert block_room(dit(16, 4), dit(32, 4)) == 2 * count_parameters(dit(16, 4))["block"]


def test_maps_copy_old_channels_and_average_for_new_ones() -> None:
    wide = start_map(4, 7, generator_for("test"))
    assert torch.equal(wide[:4], torch.eye(4))
    torch.testing.assert_close(wide[4:].sum(1), torch.ones(3))
    assert bool((wide[4:] > 0).all()) and len({tuple(row) for row in wide[4:].tolist()}) == 3
    assert start_map(6, 3, generator_for("test")).argmax(1).tolist() == [0, 2, 4]
    assert start_map(6, 4, generator_for("test"), heads=True).argmax(1).tolist() == [0, 1, 3, 4]


def test_only_spaces_whose_size_changes_have_a_map() -> None:
    def names(source: tuple[int, int], target: tuple[int, int]) -> set[str]:
        return set(WidthMaps(dit(*source), dit(*target), generator_for("maps")).maps)

    heads, inside = ({f"{space}_{of}" for space in "qkv"} for of in ("heads", "inside"))
    assert names((32, 4), (32, 4)) == set()
    assert names((16, 2), (32, 4)) == {"stream", "hidden"} | heads
    assert names((16, 4), (32, 4)) == {"stream", "hidden"} | inside
    assert names((32, 4), (32, 2)) == heads | inside


def test_weights_go_through_the_maps_of_their_channels() -> None:
    source = initialize_(DiT(dit(16, 2)), generator_for("test"))
    for parameter in source.parameters():
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator_for("test", parameter.numel())))
    state, target = source.state_dict(), dit(24, 3, depth=1)
    maps = WidthMaps(source.config, target, generator_for("maps"))
    rows = ligo.start_rows(2, 1, 0.0, generator_for("test"))  # the first of the two layers, as it is
    layers = [{n[9:]: v for n, v in state.items() if n.startswith(f"{BLOCKS}{index}.")} for index in range(2)]
    rest = {name: value for name, value in state.items() if not name.startswith(BLOCKS)}
    model = Mixture(target, layers, {}, rows, maps, rest)
    found = model.dense()
    assert {name: value.shape for name, value in found.items()} == {
        name: value.shape for name, value in DiT(target).state_dict().items()
    }
    of = {name: value.detach() for name, value in maps.maps.items()}
    stream, hidden = of["stream"], of["hidden"]
    whole = {space: torch.kron(of[f"{space}_heads"], torch.eye(8)) for space in "qkv"}  # heads of 8 channels stay whole
    chosen = int(rows["q.weight"][0].argmax())
    layer = {name: value.detach() for name, value in layers[chosen].items()}
    qkv = torch.cat(
        [whole[s] @ part @ stream.T for s, part in zip("qkv", layer["attn.qkv.weight"].chunk(3), strict=True)]
    )
    adaln = torch.cat([stream @ part @ stream.T for part in layer["adaLN_modulation.1.weight"].chunk(6)])
    wanted = {
        "blocks.0.attn.qkv.weight": qkv,
        "blocks.0.attn.proj.weight": stream @ layer["attn.proj.weight"] @ whole["v"].T,
        "blocks.0.mlp.fc1.weight": hidden @ layer["mlp.fc1.weight"] @ stream.T,
        "blocks.0.mlp.fc2.weight": stream @ layer["mlp.fc2.weight"] @ hidden.T,
        "blocks.0.mlp.fc1.bias": hidden @ layer["mlp.fc1.bias"],
        "blocks.0.adaLN_modulation.1.weight": adaln,
        "x_embedder.proj.weight": torch.einsum("ij,jchw->ichw", stream, rest["x_embedder.proj.weight"]),
        "t_embedder.mlp.2.weight": stream @ rest["t_embedder.mlp.2.weight"] @ stream.T,
        "y_embedder.embedding_table.weight": rest["y_embedder.embedding_table.weight"] @ stream.T,
        "final_layer.linear.weight": rest["final_layer.linear.weight"] @ stream.T,
        "final_layer.linear.bias": rest["final_layer.linear.bias"],
    }
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)
    dense = DiT(target)
    dense.load_state_dict(found)
    x, t, y = torch.randn(4, 1, 8, 8, generator=generator_for("x")), torch.arange(4) * 300, torch.arange(4)
    torch.testing.assert_close(model(x, t, y), dense(x, t, y), rtol=1e-3, atol=1e-4)
    model(x, t, y).square().mean().backward()
    assert all(bool(parameter.grad.any()) for parameter in maps.parameters() if parameter.grad is not None)
    assert {name for name, parameter in maps.named_parameters() if parameter.grad is None} == set()


@pytest.fixture(scope="module")
def wide(ancestor: Any) -> Path:
    """A dense model of width 384 with heads of 64 channels."""
    options = ("--method", "he", "--model", "dit-s", "--depth", 1, "--workspace", ancestor[0])
    return run_cli("init", *options).path


def test_a_narrower_target_starts_at_selected_channels(ancestor: Any, wide: Path) -> None:
    place = ("--model", "dit-nano", "--depth", 1, "--workspace", ancestor[0])
    selected = run_cli("init", wide, "--method", "weight-selection", *place).path
    made = run_cli("init", wide, "--method", "ligo", "--tune-steps", 0, "--set", "noise=0", *place).path
    wanted, found = averaged(selected), averaged(made)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    metrics = read_manifest(made).metrics
    assert metrics["parameters_transferred_with_embedders"] == metrics["parameters"]


def test_maps_of_a_wider_target_are_tuned(ancestor: Any) -> None:
    options = ("--model", "dit-s", "--depth", 1)
    start = init(ancestor, *options, "--tune-steps", 0)
    tuned = init(ancestor, *options, "--tune-steps", 12, "--batch-size", 16)
    assert tuned.code == 0, tuned.err
    assert training_loss(tuned.path) < 0.97 * training_loss(start.path)
    source, before, after = averaged(ancestor[1]), averaged(start.path), averaged(tuned.path)
    name = "t_embedder.mlp.0.weight"
    assert torch.equal(before[name][:64], source[name]) and not torch.equal(after[name], before[name])
    metrics = read_manifest(tuned.path).metrics
    assert metrics["parameters_transferred"] == DEPTH * count_parameters(random_dit(1).config)["block"]
    rest = sum(value.numel() for name, value in source.items() if not name.startswith(BLOCKS))
    assert metrics["parameters_transferred_with_embedders"] == metrics["parameters_transferred"] + rest
