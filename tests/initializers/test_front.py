"""FRONT: the cosine transform over depth, and models read from its low frequencies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.fft import dct, dctn, idctn
from support import run_cli
from torch import Tensor

from finectl.artifacts.manifest import read_manifest
from finectl.artifacts.store import open_artifact
from finectl.initializers.front import dct_matrix, read_at, resize, resize_layers, resize_width, width_maps
from finectl.models.io import load_weights
from finectl.models.presets import DiTConfig


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A dense ancestor of four layers that was trained a little."""
    root = tmp_path_factory.mktemp("front")
    scratch = run_cli("init", "--method", "he", "--model", "dit-nano", "--depth", 4, "--workspace", root).path
    options = ("--steps", 6, "--batch-size", 8, "--lr", 0.01, "--ema", 0, "--workspace", root)
    return root, run_cli("train", scratch, *options).path


def made(trained: Any, depth: int, *options: object) -> Path:
    root, ancestor = trained
    return run_cli("init", ancestor, "--method", "front", "--depth", depth, *options, "--workspace", root).path


def state(path: Path) -> dict[str, Tensor]:
    return load_weights(open_artifact(path), "ema")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def standard(stack: Tensor) -> Tensor:
    """Bring each layer to mean 0 and deviation 1."""
    flat = stack.flatten(1)
    flat = (flat - flat.mean(1, keepdim=True)) / flat.std(1, correction=0, keepdim=True)
    return flat.unflatten(1, stack.shape[1:])


@pytest.mark.parametrize("size", [1, 2, 5, 12])
def test_the_transform_is_that_of_scipy(size: int) -> None:
    values, matrix = random(size, 3), dct_matrix(size)
    np.testing.assert_allclose((matrix @ values).numpy(), dct(values.numpy(), axis=0, norm="ortho"), atol=1e-12)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("layers", "depth"), [(12, 4), (4, 9), (6, 1), (1, 3)])
def test_resizing_keeps_constants_and_low_cosines(layers: int, depth: int) -> None:
    torch.testing.assert_close(resize(random(layers, 5), layers), random(layers, 5), rtol=0, atol=1e-12)
    constant = random(1, 5)
    torch.testing.assert_close(resize(constant.repeat(layers, 1), depth), constant.repeat(depth, 1))
    for frequency in range(min(layers, depth)):
        wave, wanted = (
            torch.cos(torch.pi * frequency * (torch.arange(size, dtype=torch.float64) + 0.5) / size)[:, None]
            for size in (layers, depth)
        )
        torch.testing.assert_close(resize(wave, depth), wanted, rtol=0, atol=1e-12)


def test_frequencies_that_do_not_fit_are_dropped() -> None:
    places = (torch.arange(8, dtype=torch.float64) + 0.5) / 8
    assert float(resize(torch.cos(torch.pi * 3 * places)[:, None], 3).abs().max()) < 1e-12


@pytest.mark.parametrize("depth", [3, 10])
def test_leaving_rows_and_columns_out_changes_nothing(depth: int) -> None:
    stack = standard(random(6, 5, 4))
    kept = min(6, depth)
    spectrum = np.zeros((depth, 5, 4))
    spectrum[:kept] = dctn(stack.numpy(), norm="ortho")[:kept]
    wanted = idctn(spectrum, norm="ortho") * (depth / 6) ** 0.5
    np.testing.assert_allclose(resize_layers(stack, depth).numpy(), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("unit", [False, True])
def test_the_same_depth_is_the_identity(unit: bool) -> None:
    stack = 3 * random(6, 5, 4) + 2
    torch.testing.assert_close(resize_layers(stack, 6, unit), stack, rtol=0, atol=1e-12)
    zeros = torch.zeros(6, 4)
    for depth in (2, 6, 9):
        assert not bool(resize_layers(zeros, depth, unit).any()), "biases that were never used stay zero"


@pytest.mark.parametrize(("depth", "unit"), [(1, False), (3, False), (9, True)])
def test_layers_that_are_alike_stay_as_they_are(depth: int, unit: bool) -> None:
    layer = 0.1 * random(1, 5, 4) + 0.3
    found = resize_layers(layer.repeat(6, 1, 1), depth, unit)
    torch.testing.assert_close(found, layer.repeat(depth, 1, 1), rtol=0, atol=1e-12)


def test_means_and_deviations_are_read_at_the_places_of_the_target() -> None:
    pattern = standard(random(1, 5, 4))
    mean, deviation = random(6, 1, 1, seed=1), random(6, 1, 1, seed=2).abs()
    found = resize_layers(mean + deviation * pattern, 3)
    # Layers of the target lie at 1/2, 5/2 and 9/2 of the ancestor's.
    for index in range(3):
        between = [(curve[2 * index] + curve[2 * index + 1]) / 2 for curve in (mean, deviation)]
        torch.testing.assert_close(found[index], between[0] + between[1] * pattern[0], rtol=0, atol=1e-12)
    curve = torch.tensor([[0.0], [1.0], [3.0]])
    assert read_at(curve, 3).tolist() == curve.tolist()
    assert read_at(curve, 1).tolist() == [[1.0]]
    assert read_at(curve, 6).flatten().tolist() == [0, 0.25, 0.75, 1.5, 2.5, 3]


def test_the_variant_gives_layers_the_deviation_that_was_read() -> None:
    stack = random(12, 40, 30)
    mean, deviation = stack.flatten(1).mean(1), stack.flatten(1).std(1, correction=0)
    plain, restored = (resize_layers(stack, 4, unit).flatten(1) for unit in (False, True))
    for found in (plain, restored):
        torch.testing.assert_close(found.mean(1)[:, None], read_at(mean[:, None], 4))
    torch.testing.assert_close(restored.std(1, correction=0)[:, None], read_at(deviation[:, None], 4))
    assert float(plain.std(1).mean()) == pytest.approx((4 / 12) ** 0.5, rel=0.05), "unrelated layers average out"


@pytest.mark.parametrize("depth", [2, 4, 7])
@pytest.mark.parametrize("variant", ["plain", "std"])
def test_a_model_of_any_depth(trained: Any, depth: int, variant: str) -> None:
    ancestor, path = state(trained[1]), made(trained, depth, "--variant", variant)
    found = state(path)
    for part in ("attn.qkv.weight", "mlp.fc2.weight", "adaLN_modulation.1.bias"):
        source = torch.stack([ancestor[f"blocks.{index}.{part}"] for index in range(4)])
        wanted = resize_layers(source, depth, variant == "std").float()
        for index in range(depth):
            assert torch.equal(found[f"blocks.{index}.{part}"], wanted[index])
            if depth == 4:
                torch.testing.assert_close(wanted[index], source[index], rtol=0, atol=1e-6)
    assert f"blocks.{depth}.attn.qkv.weight" not in found
    rest = {name: value for name, value in ancestor.items() if not name.startswith("blocks.")}
    assert all(torch.equal(found[name], value) for name, value in rest.items())
    metrics = read_manifest(path).metrics
    block = sum(value.numel() for name, value in ancestor.items() if name.startswith("blocks.0."))
    assert metrics["parameters_transferred"] == depth * block


def config(width: int, heads: int) -> DiTConfig:
    return DiTConfig(width, 1, heads, patch_size=2, image_size=8, channels=1, num_classes=10)


WIDTHS = [((32, 4), (16, 2)), ((16, 2), (32, 4)), ((24, 3), (32, 4)), ((16, 2), (32, 2)), ((32, 2), (16, 2))]


@pytest.mark.parametrize(("before", "after"), WIDTHS)
def test_constant_weights_give_what_they_gave(before: tuple[int, int], after: tuple[int, int]) -> None:
    source, target = config(*before), config(*after)
    maps = width_maps(source, target)
    layer = {
        "mlp.fc1.weight": torch.full((4 * source.width, source.width), 0.3),
        "mlp.fc2.weight": torch.full((source.width, 4 * source.width), 0.3),
        "adaLN_modulation.1.weight": torch.full((6 * source.width, source.width), 0.3),
        "mlp.fc1.bias": torch.full((4 * source.width,), 0.2),
        "attn.qkv.bias": torch.full((3 * source.width,), 0.2),
        "y_embedder.embedding_table.weight": torch.full((11, source.width), 0.2),
    }
    for unit in (False, True):
        made = resize_width(layer, maps, unit)
        for name in ("mlp.fc1", "mlp.fc2", "adaLN_modulation.1"):  # the sum over the inputs
            before_, found = layer[f"{name}.weight"].double().sum(1), made[f"{name}.weight"].sum(1)
            torch.testing.assert_close(found, before_[:1].expand(len(found)), rtol=1e-6, atol=0)
        for name in ("mlp.fc1.bias", "y_embedder.embedding_table.weight"):
            torch.testing.assert_close(made[name], torch.full_like(made[name], 0.2), rtol=1e-6, atol=0)
        values = made["attn.qkv.bias"][2 * target.width :]
        if not unit:
            torch.testing.assert_close(values, torch.full_like(values, 0.2), rtol=1e-6, atol=0)


def test_smooth_weights_on_smooth_inputs_give_the_resized_output() -> None:
    source, target = config(48, 3), config(32, 2)
    maps = width_maps(source, target)

    def wave(size: int, frequency: int) -> Tensor:
        return torch.cos(torch.pi * frequency * (torch.arange(size, dtype=torch.float64) + 0.5) / size)

    def weight(rows: int, columns: int) -> Tensor:
        return 1 / columns * (2 + torch.outer(wave(rows, 3), wave(columns, 5)))

    made = resize_width({"mlp.fc1.weight": weight(192, 48)}, maps)["mlp.fc1.weight"]
    torch.testing.assert_close(made, weight(128, 32), rtol=0, atol=1e-12)
    x, smaller = (wave(size, 5) + 0.5 for size in (48, 32))
    hidden = maps.given["hidden"]
    assert hidden is not None
    torch.testing.assert_close(made @ smaller, hidden @ (weight(192, 48) @ x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("before", "after"), [((16, 2), (32, 4)), ((16, 2), (24, 3)), ((16, 2), (32, 2))])
def test_linear_parts_of_a_wider_model_compute_the_same(before: tuple[int, int], after: tuple[int, int]) -> None:
    source, target = config(*before), config(*after)
    maps = width_maps(source, target)
    layer = {"attn.qkv.weight": random(48, 16), "attn.proj.weight": random(16, 16, seed=1)}
    made = resize_width(layer, maps)
    x = random(5, 16, seed=2)  # five tokens
    stream = maps.given["stream"]
    assert stream is not None
    wider = x @ stream.T
    norm = torch.nn.functional.layer_norm
    torch.testing.assert_close(norm(wider, (target.width,)), norm(x, (16,)) @ stream.T, rtol=1e-5, atol=1e-5)

    def attended(tokens: Tensor, tensors: dict[str, Tensor], heads: int) -> Tensor:
        parts = (tokens @ tensors["attn.qkv.weight"].T).unflatten(1, (3, heads, -1)).permute(1, 2, 0, 3)
        mixed = torch.nn.functional.scaled_dot_product_attention(*parts).transpose(0, 1).flatten(1)
        return mixed @ tensors["attn.proj.weight"].T

    found, wanted = attended(wider, made, target.heads), attended(x, layer, source.heads)
    torch.testing.assert_close(found, wanted @ stream.T, rtol=0, atol=1e-10)


def test_chunks_and_heads_do_not_run_into_each_other() -> None:
    source, target = config(32, 4), config(16, 2)
    maps = width_maps(source, target)
    layer = {"attn.qkv.bias": torch.zeros(96), "adaLN_modulation.1.bias": torch.zeros(192)}
    layer["attn.qkv.bias"][32 + 16 : 32 + 24] = 1.0  # the third head of the keys, which is the second of the target's
    layer["adaLN_modulation.1.bias"][64:96] = 1.0  # the gate, the third of the six
    made = resize_width(layer, maps)
    assert made["attn.qkv.bias"].abs().gt(1e-9).nonzero().flatten().tolist() == list(range(24, 32))
    assert made["adaLN_modulation.1.bias"].abs().gt(1e-9).nonzero().flatten().tolist() == list(range(32, 48))
    torch.testing.assert_close(made["attn.qkv.bias"][24:32], torch.ones(8).double())


def test_the_variant_keeps_what_unrelated_weights_give() -> None:
    source, target = config(64, 4), config(32, 2)
    layer = {"mlp.fc1.weight": random(256, 64), "mlp.fc1.bias": random(256, seed=1)}
    plain, restored = (resize_width(layer, width_maps(source, target), unit) for unit in (False, True))
    assert float(restored["mlp.fc1.bias"].std(correction=0)) == pytest.approx(
        float(layer["mlp.fc1.bias"].std(correction=0))
    )
    before = layer["mlp.fc1.weight"].square().sum(1).mean()
    assert float(restored["mlp.fc1.weight"].square().sum(1).mean() / before) == pytest.approx(1, rel=0.02)
    # Half of the rows and half of the columns: half of the variance is left of either, and half as many are summed,
    # twice as large.
    assert float(plain["mlp.fc1.weight"].square().sum(1).mean() / before) == pytest.approx(0.5, rel=0.1)


def test_the_variant_leaves_what_only_grows_alone() -> None:
    layer = {"attn.qkv.weight": random(48, 16), "mlp.fc2.weight": random(16, 64), "mlp.fc2.bias": random(16)}
    plain, std = (resize_width(layer, width_maps(config(16, 2), config(32, 2)), unit) for unit in (False, True))
    assert all(torch.equal(plain[name], std[name]) for name in layer)


@pytest.mark.parametrize("variant", ["plain", "std"])
def test_a_wider_model_from_the_command(trained: Any, variant: str) -> None:
    ancestor, path = state(trained[1]), made(trained, 1, "--model", "dit-s", "--variant", variant)
    found, name = state(path), "y_embedder.embedding_table.weight"
    given = width_maps(config(64, 4), config(384, 6)).given["stream"]
    assert given is not None
    wanted = ancestor[name].double() @ given.T
    torch.testing.assert_close(found[name].double(), wanted, rtol=1e-5, atol=1e-6)
    metrics = read_manifest(path).metrics
    layer_and_rest = sum(
        value.numel() for name, value in ancestor.items() if name[:8] not in ("blocks.1", "blocks.2", "blocks.3")
    )
    assert metrics["parameters_transferred_with_embedders"] == layer_and_rest, "one layer at its own size, and the rest"
