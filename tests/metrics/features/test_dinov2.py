"""DINOv2's features, with tiny networks of facebook's layout and random weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from extractor_tools import Harmful, image, run_python
from safetensors.torch import save_file
from torch.nn.functional import conv2d, gelu, interpolate, layer_norm, silu, softmax

from finectl.errors import InputError
from finectl.metrics.features import FeatureOptions, dinov2

WIDTH, DEPTH, HEADS, GRID = 128, 2, 2, 5
State = dict[str, torch.Tensor]


def tiny_state(*, gated: bool = False, grid: int = GRID, width: int = WIDTH, seed: int = 0) -> State:
    """Return a state dict as facebook's files have it."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 0.1, mean: float = 0.0) -> torch.Tensor:
        return mean + std * torch.randn(*shape, generator=generator)

    state = {
        "cls_token": normal(1, 1, width),
        "pos_embed": normal(1, 1 + grid**2, width, std=0.5),
        "mask_token": normal(1, width),
        "patch_embed.proj.weight": normal(width, 3, 14, 14),
        "patch_embed.proj.bias": normal(width),
        "norm.weight": normal(width, mean=1.0),
        "norm.bias": normal(width),
    }
    hidden = 2 * width
    for block in range(DEPTH):
        shapes = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
        shapes |= {"mlp.w12": (2 * hidden, width), "mlp.w3": (width, hidden)} if gated else {
            "mlp.fc1": (hidden, width), "mlp.fc2": (width, hidden)}  # fmt: skip
        for name, shape in shapes.items():
            state[f"blocks.{block}.{name}.weight"] = normal(*shape)
            state[f"blocks.{block}.{name}.bias"] = normal(shape[0])
        for name in ("norm1", "norm2"):
            state[f"blocks.{block}.{name}.weight"] = normal(width, mean=1.0)
            state[f"blocks.{block}.{name}.bias"] = normal(width)
        for name in ("ls1", "ls2"):
            state[f"blocks.{block}.{name}.gamma"] = normal(width, mean=0.7)
    return state


def bicubic_1d(count: int, target: int, scale: float) -> np.ndarray:
    """Return the matrix (target, count) of Keys' cubic kernel, a = -0.75, at (i + 1/2) / scale - 1/2; edges repeat."""
    matrix = np.zeros((target, count))
    for i in range(target):
        x = (i + 0.5) / scale - 0.5
        for tap in range(math.floor(x) - 1, math.floor(x) + 3):
            d, a = abs(x - tap), -0.75
            near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * (d**3 - 5 * d**2 + 8 * d - 4)
            matrix[i, min(max(tap, 0), count - 1)] += near if d <= 1 else far
    return matrix


def reference_positions(positions: torch.Tensor, grid: int) -> torch.Tensor:
    if grid == 16:
        return positions[0].double()
    matrix = bicubic_1d(grid, 16, (16 + 0.1) / grid)
    square = positions[0, 1:].double().numpy().reshape(grid, grid, -1)
    patches = np.einsum("yi,xj,ijd->yxd", matrix, matrix, square).reshape(256, -1)
    return torch.cat([positions[0, :1].double(), torch.from_numpy(patches)])


def reference_features(state: State, images: torch.Tensor, grid: int) -> torch.Tensor:
    """Compute the class token after the last norm in float64, operation by operation."""
    s = {name: tensor.double() for name, tensor in state.items()}
    width = s["cls_token"].shape[-1]

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return layer_norm(x, (width,), s[f"{name}.weight"], s[f"{name}.bias"], 1e-6)

    patches = conv2d(images.double(), s["patch_embed.proj.weight"], s["patch_embed.proj.bias"], stride=14)
    x = torch.cat([s["cls_token"].expand(len(images), 1, width), patches.flatten(2).mT], dim=1)
    x = x + reference_positions(state["pos_embed"], grid)
    for block in range(DEPTH):
        name = f"blocks.{block}"
        qkv = linear(f"{name}.attn.qkv", norm(f"{name}.norm1", x))
        q, k, v = qkv.reshape(*x.shape[:2], 3, width // 64, 64).permute(2, 0, 3, 1, 4)
        mixed = softmax(q @ k.mT / 8, dim=-1) @ v
        x = x + s[f"{name}.ls1.gamma"] * linear(f"{name}.attn.proj", mixed.transpose(1, 2).flatten(2))
        y = norm(f"{name}.norm2", x)
        if f"{name}.mlp.w12.weight" in s:
            gate, value = linear(f"{name}.mlp.w12", y).chunk(2, dim=-1)
            y = linear(f"{name}.mlp.w3", silu(gate) * value)
        else:
            y = linear(f"{name}.mlp.fc2", gelu(linear(f"{name}.mlp.fc1", y)))
        x = x + s[f"{name}.ls2.gamma"] * y
    return norm("norm", x)[:, 0]


def load(path: Path, dtype: str = "float32") -> dinov2.DinoFeatures:
    options = FeatureOptions(dino=str(path), dtype=dtype)
    return dinov2.load(dinov2.describe(options), options, torch.device("cpu"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dino") / "dinov2_vitl14_pretrain.pth"
    torch.save(tiny_state(), path)
    return path


@pytest.fixture(scope="module")
def extractor(weights: Path) -> dinov2.DinoFeatures:
    return load(weights)


@pytest.mark.parametrize(("gated", "grid"), [(False, GRID), (True, 37), (False, 16)])
def test_features_are_those_of_the_reference(gated: bool, grid: int, tmp_path: Path) -> None:
    state = tiny_state(gated=gated, grid=grid)
    torch.save(state, tmp_path / "a.pth")
    extractor = load(tmp_path / "a.pth")
    assert extractor.outputs == {"features": WIDTH}
    batch = torch.stack([extractor.prepare(image(seed=i)) for i in range(2)])
    features = extractor.forward(batch, ["features"])["features"]
    assert features.dtype == torch.float32 and features.shape == (2, WIDTH)
    assert torch.allclose(features.double(), reference_features(state, batch, grid), atol=2e-5, rtol=1e-5)
    assert (features[0] - features[1]).abs().max() > 1e-2


def test_positions_are_interpolated_as_facebook_does_and_not_otherwise() -> None:
    positions = tiny_state(grid=37)["pos_embed"]
    found = dinov2.interpolated(positions, 37)
    assert found.shape == (1, 257, WIDTH)
    assert torch.allclose(found[0].double(), reference_positions(positions, 37), atol=1e-5)
    square = positions[:, 1:].reshape(1, 37, 37, WIDTH).permute(0, 3, 1, 2)
    plain = interpolate(square, size=(16, 16), mode="bicubic").flatten(2).mT
    assert (found[:, 1:] - plain).abs().max() > 0.05, "without the offset the points lie elsewhere"
    assert torch.equal(dinov2.interpolated(positions, 37, 37), positions)


@pytest.mark.parametrize("size", [(40, 56), (500, 333), (224, 224), (1, 1)])
def test_images_are_resized_as_edm2_does(extractor: dinov2.DinoFeatures, size: tuple[int, int]) -> None:
    pixels = image(*size)
    prepared = extractor.prepare(pixels)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    expected = interpolate(tensor, size=(224, 224), mode="bicubic", antialias=True) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (expected - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
    assert prepared.shape == (3, 224, 224) and torch.allclose(prepared, expected[0], atol=1e-5)


def test_grey_is_repeated(extractor: dinov2.DinoFeatures) -> None:
    grey = image(channels=1)
    assert torch.equal(extractor.prepare(grey), extractor.prepare(grey.repeat(3, axis=2)))


def test_bfloat16_is_near_and_not_the_same(extractor: dinov2.DinoFeatures, weights: Path) -> None:
    exact, rough = extractor, load(weights, "bfloat16")
    batch = exact.prepare(image())[None]
    one, two = (extractor.forward(batch, ["features"])["features"] for extractor in (exact, rough))
    assert two.dtype == torch.float32
    assert 1e-5 < (one - two).norm() / one.norm() < 0.05


def test_safetensors_give_the_same_features_and_are_described_before_loading(weights: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(tiny_state(), path)
    assert dinov2.describe(FeatureOptions(dino=str(path))).details["architecture"] == "width 128, depth 2"
    batch = load(weights).prepare(image())[None]
    features = [load(file).forward(batch, ["features"])["features"] for file in (weights, path)]
    assert torch.equal(*features)


def test_the_digest_is_that_of_the_content(weights: Path, tmp_path: Path) -> None:
    copy, other = tmp_path / "copy.pth", tmp_path / "other.pth"
    copy.write_bytes(weights.read_bytes())
    torch.save(tiny_state(seed=1), other)
    one, two, three = (dinov2.describe(FeatureOptions(dino=str(path))) for path in (weights, copy, other))
    assert one.digest == two.digest != three.digest
    assert one.name == "dinov2" and "224" in one.resize and "EDM2" in one.resize


def test_known_sizes_have_names() -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tiny_state(grid=37, width=384).items()}
    shapes |= {f"blocks.{block}.norm1.weight": (384,) for block in range(12)}
    assert dinov2.Layout(Path("x"), shapes).name == "ViT-S/14"


def with_registers(state: State) -> State:
    return {**state, "register_tokens": torch.zeros(1, 4, WIDTH)}


def with_patches_of_16(state: State) -> State:
    return {**state, "patch_embed.proj.weight": torch.zeros(WIDTH, 3, 16, 16)}


def without_scale(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if ".ls" not in name}


def without_bias(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if name != "blocks.1.attn.proj.bias"}


def with_more(state: State) -> State:
    return {**state, "head.weight": torch.zeros(3, WIDTH)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (with_registers, "register tokens"),
        (with_patches_of_16, r"patches are \(16, 16\)"),
        (without_scale, "no blocks.0.ls1.gamma"),
        (without_bias, "blocks.1.attn.proj.bias is missing"),
        (with_more, "head.weight has no place"),
    ],
)
def test_other_networks_are_refused(change: Any, said: str, tmp_path: Path) -> None:
    torch.save(change(tiny_state()), tmp_path / "a.pth")
    with pytest.raises(InputError, match=said) as caught:
        load(tmp_path / "a.pth")
    assert str(tmp_path / "a.pth") in caught.value.what


def test_a_file_with_code_is_refused_and_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({**tiny_state(), "x": Harmful()}, tmp_path / "a.pth")
    with pytest.raises(InputError, match="could run code"):
        load(tmp_path / "a.pth")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("damage", ["cut off", "other", "empty"])
def test_damaged_files_are_refused_while_planning(damage: str, weights: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    content = {"cut off": weights.read_bytes()[:-4000], "other": b"<html>not found</html>", "empty": b""}[damage]
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        dinov2.describe(FeatureOptions(dino=str(path)))
    assert str(path) in caught.value.what
    assert "https://dl.fbaipublicfiles.com/dinov2" in caught.value.fix and "--dino" in caught.value.fix


def test_without_the_file_the_message_has_all_that_mends_it() -> None:
    with pytest.raises(InputError) as caught:
        dinov2.describe(FeatureOptions())
    error = caught.value
    text = " ".join((error.what, error.expected, error.fix))
    for part in ("dinov2_vitl14_pretrain.pth", "https://dl.fbaipublicfiles.com", "--dino", "--download", "loss", "fdd"):
        assert part in text


def test_weights_that_are_not_numbers_give_features_that_are_not(tmp_path: Path) -> None:
    state = tiny_state()
    state["norm.bias"][3] = math.nan
    torch.save(state, tmp_path / "a.pth")
    extractor = load(tmp_path / "a.pth")
    features = extractor.forward(extractor.prepare(image())[None], ["features"])["features"]
    assert not features.isfinite().all()


def test_planning_needs_no_torch(weights: Path) -> None:
    code = (
        "import sys; from finectl.metrics.features import FeatureOptions, dinov2\n"
        f"info = dinov2.describe(FeatureOptions(dino={str(weights)!r}))\n"
        "print(info.digest, [name for name in ('torch', 'timm', 'numpy') if name in sys.modules])"
    )
    assert run_python(code).split() == [dinov2.describe(FeatureOptions(dino=str(weights))).digest, "[]"]
