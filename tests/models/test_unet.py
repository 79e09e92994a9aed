"""UNets of diffusers as models: configuration on disk, and the interface that every stage uses."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from finectl.diffusion.config import DiffusionConfig
from finectl.errors import InputError
from finectl.models.io import ARCHITECTURES, build_model, config_from, total_parameters
from finectl.models.presets import DiTConfig, preset
from finectl.models.unet import UNet
from finectl.models.unet_config import UNetConfig

NETWORK: dict[str, Any] = {
    "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4,
}  # fmt: skip


def config(**more: Any) -> UNetConfig:
    values = {"architecture": "unet2d", "network": NETWORK, "image_size": 8, "channels": 1, "parameters": 7}
    return UNetConfig(**{**values, **more})


def test_a_configuration_survives_json() -> None:
    for one in (
        config(),
        config(num_classes=3, null_class=True, label_dropout=0.1, network={**NETWORK, "num_class_embeds": 4}),
        config(sigma_data=0.5, diffusion=DiffusionConfig(beta_schedule="scaled_linear", prediction="v_prediction")),
    ):
        assert config_from(json.loads(json.dumps(one.to_dict()))) == one
    assert "diffusion" not in config().to_dict()
    assert total_parameters(config()) == 7


def test_the_properties_that_stages_ask_for() -> None:
    one = config(network={**NETWORK, "out_channels": 2})
    assert (one.learn_sigma, one.out_channels, one.depth, one.widths) == (True, 2, 2, (8, 16))
    assert not one.has_null_class
    assert one.activations > 0


@pytest.mark.parametrize(
    "values",
    [
        {"architecture": "unet"},
        {"architecture": "unet2d", "image_size": 8},
        {"image_size": "8"},
        {"channels": True},
        {"depth": 3},
        {"channels": 3},
        {"label_dropout": 0.1},
        {"diffusion": {"beta_schedule": "none"}},
    ],
)
def test_a_wrong_configuration_is_refused(values: dict[str, Any]) -> None:
    wrong = values if "architecture" in values else {**config().to_dict(), **values}
    with pytest.raises(InputError):
        config_from(wrong)


def test_building_a_unet_leaves_the_random_numbers_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    build_model(config())
    assert torch.equal(torch.get_rng_state(), before)


def test_classes_condition_the_output_and_an_unconditional_unet_ignores_them() -> None:
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([5, 5])
    x[1] = x[0]
    labels = torch.tensor([0, 1])
    with torch.no_grad():
        plain = build_model(config()).eval()(x, t, labels)
        conditional = build_model(config(num_classes=2, network={**NETWORK, "num_class_embeds": 2})).eval()(
            x, t, labels
        )
    torch.testing.assert_close(plain[0], plain[1])
    assert not torch.allclose(conditional[0], conditional[1], atol=1e-4)


def test_checkpointing_changes_no_gradient() -> None:
    model = build_model(config())
    assert isinstance(model, UNet)
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([5, 700]), torch.zeros(2, dtype=torch.int64)
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.enable_gradient_checkpointing()
        model.train().zero_grad()
        model(x, t, y).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 10
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_a_dit_keeps_its_configuration_file_and_may_have_another_schedule() -> None:
    plain = preset("dit-nano", image_size=8, channels=1, num_classes=10)
    assert set(plain.to_dict()) == {
        "architecture", "width", "depth", "heads", "patch_size", "image_size", "channels", "num_classes", "mlp_ratio",
        "label_dropout", "learn_sigma", "frequency_divisor", "factorized",
    }  # fmt: skip
    values = {**plain.to_dict(), "mlp_norm_eps": 1e-5, "diffusion": {"prediction": "sample"}}
    other = config_from(values)
    assert isinstance(other, DiTConfig)
    assert (other.mlp_norm_eps, other.diffusion) == (1e-5, DiffusionConfig(prediction="sample"))
    assert config_from(json.loads(json.dumps(other.to_dict()))) == other
    assert set(ARCHITECTURES) == {"dit", "unet2d", "unet2d-condition"}
