"""A ControlNet on a frozen UNet as one model: it starts as the UNet, only the branch moves, diffusers loads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import run_cli, whole
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from finectl.errors import UsageError
from finectl.models.control import Controlled, Uncontrolled, branch_state, new_branch, rename_kept, save_branch
from finectl.models.control_config import count_branch, embedding_widths, require_controllable
from finectl.models.io import load_any_model, read_config
from finectl.models.presets import preset
from finectl.models.unet_config import UNetConfig
from finectl.models.unet_presets import unet_preset
from finectl.training.step import Ema


class Given:
    """A table of three pairs; the last is the empty one."""

    length = 4

    def __init__(self, width: int, side: int) -> None:
        random = torch.Generator().manual_seed(1)
        self._texts = torch.randn(3, self.length, width, generator=random)
        self._controls = torch.rand(3, 3, side, side, generator=random)
        self._controls[2] = 0

    def __len__(self) -> int:
        return 3

    def texts(self, rows: Tensor) -> Tensor:
        return self._texts[rows]

    def controls(self, rows: Tensor) -> Tensor:
        return self._controls[rows]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = ("--workspace", tmp_path_factory.mktemp("control"), "--text-encoder", "hash")
    return run_cli("init", "--method", "he", "--model", "unet-text-nano", *place).path


def controlled(base: Path, scale: int = 1) -> tuple[Controlled, Any, tuple[Tensor, Tensor, Tensor]]:
    backbone: Any = load_any_model(whole(base))
    side = backbone.config.image_size
    model = Controlled(backbone, new_branch(backbone, scale, seed=3), Given(64, side * scale))
    random = torch.Generator().manual_seed(2)
    x = torch.randn(3, 1, side, side, generator=random)
    return model, backbone, (x, torch.tensor([3, 500, 999]), torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("scale", [1, 8])
def test_the_start_is_the_unet_itself_bit_for_bit(base: Path, scale: int) -> None:
    model, backbone, (x, t, y) = controlled(base, scale)
    with torch.no_grad():
        expected = backbone(x, t, model.conditions.texts(y))
        assert torch.equal(model(x, t, y), expected) and torch.equal(Uncontrolled(model)(x, t, y), expected)
        for zero in model.branch.controlnet_down_blocks:
            zero.bias.add_(0.1)
        moved = model(x, t, y)
        assert not torch.equal(moved, expected) and torch.equal(Uncontrolled(model)(x, t, y), expected)
        model.scale = 0.0
        assert torch.equal(model(x, t, y), expected)


def test_only_the_branch_has_parameters_and_gradients_and_the_control_counts(base: Path) -> None:
    model, backbone, (x, t, y) = controlled(base)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    assert all(name.startswith("branch.") for name, _ in model.named_parameters())
    assert set(model.state_dict()) == {f"branch.{name}" for name in model.branch.state_dict()}
    assert model.config.num_classes == 2 and model.config.label_dropout == 0.0 and model.config.null_class
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        (model(x, t, y) - 1).square().mean().backward()
        optimizer.step()
    model.train()
    assert not backbone.training and all(parameter.grad is None for parameter in backbone.parameters())
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    with torch.no_grad():
        table: Any = model.conditions
        kept = model(x, t, y)
        table._controls[0] = 1 - table._controls[0]
        changed = model(x, t, y)
    assert not torch.equal(changed[0], kept[0]) and torch.equal(changed[1:], kept[1:])


def test_the_unet_follows_to_a_type_and_the_average_is_the_branchs(base: Path) -> None:
    model, backbone, (x, t, y) = controlled(base)
    model.double()
    assert next(backbone.parameters()).dtype == torch.float64
    model.float()
    ema = Ema(model.named_parameters(), 0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-3)
        with ema.denoiser(model) as averaged:
            assert torch.equal(averaged(x, t, y), Uncontrolled(model)(x, t, y))


def test_an_update_counts_the_branch_behind_and_the_frozen_unet_only_where_gradients_pass(base: Path) -> None:
    model, _, (x, t, y) = controlled(base)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x[:1], t[:1], y[:1]).square().mean().backward()
    assert model.update_operations() == counter.get_total_flops() > 10**6
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x[:1], t[:1], y[:1])
    forward = counter.get_total_flops()
    assert 1.5 * forward < (model.update_operations() or 0) < 2.5 * forward


@pytest.mark.parametrize("scale", [1, 2, 8])
def test_the_count_is_that_of_the_modules(base: Path, scale: int) -> None:
    artifact = whole(base)
    config = read_config(artifact)
    assert isinstance(config, UNetConfig)
    branch = new_branch(load_any_model(artifact), scale, seed=0)  # type: ignore[arg-type]
    assert count_branch(artifact, config, scale) == sum(parameter.numel() for parameter in branch.parameters())


def test_the_same_seed_gives_the_same_branch_and_leaves_torchs_own_alone(base: Path) -> None:
    backbone: Any = load_any_model(whole(base))
    torch.manual_seed(5)
    drawn = torch.randn(1)
    torch.manual_seed(5)
    one, same, other = (new_branch(backbone, 1, seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.randn(1), drawn)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert {name for name in one if not torch.equal(one[name], other[name])} <= {
        name for name in one if name.startswith("controlnet_cond_embedding.")
    }


def test_diffusers_loads_averaged_and_raw_weights(base: Path, tmp_path: Path) -> None:
    from diffusers import ControlNetModel

    branch = new_branch(load_any_model(whole(base)), 2, seed=0)  # type: ignore[arg-type]
    raw = {name: value + 1 for name, value in branch.state_dict().items()}
    ema = {name: value - 1 for name, value in branch.state_dict().items()}
    save_branch(tmp_path, branch, raw, ema)
    for folder, wanted in ((tmp_path, ema), (tmp_path / "raw", raw)):
        loaded = ControlNetModel.from_pretrained(folder)
        assert loaded.config.conditioning_embedding_out_channels == [16, 32]
        assert all(torch.equal(value, wanted[name]) for name, value in loaded.state_dict().items())


def test_kept_averages_get_diffusers_names_once(tmp_path: Path) -> None:
    from finectl.artifacts.tensors import load_tensors, save_tensors

    path = tmp_path / "checkpoints" / "000010.safetensors"
    path.parent.mkdir()
    save_tensors(path, {"branch.conv_in.weight": torch.ones(2)})
    for _ in range(2):
        rename_kept(tmp_path)
        assert list(load_tensors(path)) == ["conv_in.weight"]
    assert branch_state({"branch.a": torch.ones(1), "b": torch.ones(1)}).keys() == {"a"}


def test_embeddings_halve_a_control_as_often_as_it_is_larger() -> None:
    assert embedding_widths(1) == (16,) and embedding_widths(8) == (16, 32, 96, 256)
    assert embedding_widths(16) == (16, 32, 96, 256, 256)
    for scale in (0, 3, 12):
        with pytest.raises(UsageError, match=f"controls of {scale} pixels"):
            embedding_widths(scale)


def test_other_architectures_are_refused_with_what_mends_it() -> None:
    dit = preset("dit-nano", image_size=8, channels=1, num_classes=10)
    for config, name in ((dit, "dit"), (unet_preset("unet-nano", image_size=8, channels=1), "unet2d")):
        with pytest.raises(
            UsageError, match=f"architecture '{name}', for which diffusers has no ControlNet"
        ) as refused:
            require_controllable(config, "M")
        assert "unet-text-nano" in refused.value.fix and "UNet2DConditionModel" in refused.value.expected


def test_stable_diffusions_branch_has_as_many_parameters_as_the_published_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from finectl.models.unet import TextUNet
    from finectl.models.unet_presets import text_unet_preset

    config = text_unet_preset("unet-sd14", image_size=64, channels=4, text_width=768)
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in TextUNet(config).state_dict().items()}
    monkeypatch.setattr("finectl.models.control_config.weights_file", lambda artifact, weights: Path("weights"))
    monkeypatch.setattr("finectl.models.control_config.tensor_shapes", lambda path: shapes)
    anything: Any = None
    assert count_branch(anything, config, 8) == 361_279_120
