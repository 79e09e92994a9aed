"""Names and shapes of parameters by formula, beside those of the built networks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from finectl.models.extras import Extras
from finectl.models.io import ModelConfig, build_model, total_parameters
from finectl.models.presets import preset
from finectl.models.shapes import parameter_shapes
from finectl.models.unet_config import UNetConfig
from finectl.models.unet_presets import text_unet_preset, unet_preset

DIT = preset("dit-nano", image_size=8, channels=1, num_classes=10)
UNET = unet_preset("unet-nano", image_size=8, channels=1)
LABELLED = replace(
    UNET, network={**UNET.network, "num_class_embeds": 11}, num_classes=10, null_class=True,
    parameters=UNET.parameters + 11 * 64,
)  # fmt: skip
DEEPER = {"dit-b": preset("dit-b", image_size=32, channels=4, num_classes=1000, learn_sigma=True)}


def built(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in build_model(config).named_parameters()}


@pytest.mark.parametrize(
    "config",
    [
        DIT,
        replace(DIT, extras=Extras(bottleneck=5, prompts=3)),
        DEEPER["dit-b"],
        UNET,
        LABELLED,
        unet_preset("unet-cifar", image_size=32, channels=3),
        text_unet_preset("unet-text-nano", image_size=8, channels=3, text_width=24),
    ],
    ids=["dit", "dit-extras", "dit-b", "unet", "unet-labels", "unet-cifar", "unet-text"],
)
def test_names_and_shapes_are_those_of_the_network(config: ModelConfig) -> None:
    found = parameter_shapes(config)
    assert found == built(config)
    assert total_parameters(config) == sum(torch.Size(shape).numel() for shape in found.values())


def test_a_network_of_unknown_options_has_no_formula() -> None:
    network = {**UNET.network, "resnet_time_scale_shift": "scale_shift"}
    odd = UNetConfig(UNET.architecture, network, 8, 1, parameters=0)
    odd = replace(odd, parameters=sum(torch.Size(shape).numel() for shape in built(odd).values()))
    assert parameter_shapes(odd) is None
