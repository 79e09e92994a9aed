"""Adapters of small layers, applied as one product with W + BA."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from finectl.adapters import low_rank_layers
from finectl.adapters.lora import LoraLayer, attach_lora, lora_shapes

LAYERS = (LoraLayer("0", "conv", (2, 3, 3, 3), (6, 2, 1, 1)), LoraLayer("2", "linear", (2, 8), (5, 2)))


def made() -> nn.Sequential:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 6, 3, stride=2, padding=1)
    return nn.Sequential(conv, nn.ReLU(), nn.Linear(8, 5, bias=False))


def adapted() -> nn.Module:
    model = attach_lora(made(), LAYERS)
    with torch.no_grad():
        for name in lora_shapes(LAYERS):
            parameter = model.get_parameter(name)
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


def outcome(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    answer = model(torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16))
    answer.square().sum().backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return answer.detach(), gradients


def test_the_sum_says_what_two_products_say(monkeypatch: pytest.MonkeyPatch) -> None:
    summed = adapted()
    assert isinstance(summed[0], low_rank_layers.SummedConv2d)  # type: ignore[index]
    assert isinstance(summed[2], low_rank_layers.SummedLinear)  # type: ignore[index]
    monkeypatch.setattr(low_rank_layers, "LARGEST", 39)
    apart = adapted()
    assert type(apart[0]) is nn.Conv2d and type(apart[2]) is nn.Linear  # type: ignore[index]
    assert list(summed.state_dict()) == list(apart.state_dict())
    (one, gradients), (other, wanted) = outcome(summed), outcome(apart)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert list(gradients) == list(wanted) == list(lora_shapes(LAYERS))
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-3)


def test_copies_have_adapters_of_their_own() -> None:
    model = adapted()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_parameter("0.lora_B.weight").zero_()
        other.get_parameter("2.lora_B.weight").zero_()
        x = torch.ones(1, 3, 16, 16)
        assert torch.equal(other(x), made()(x)) and not torch.allclose(model(x), other(x))
    assert type(made()[0]) is nn.Conv2d
