"""The network of the weight generator: its size, its shapes, and what it is told."""

from __future__ import annotations

import json

import pytest
import torch

from finectl.diffusion.config import DiffusionConfig
from finectl.errors import InputError, UsageError
from finectl.models.weights.config import PRESETS, WeightUNetConfig, count_parameters, preset
from finectl.models.weights.unet import ResBlock, TransformerBlock, WeightUNet, pool, sinusoid

MILLIONS = {"tiny": 1.4, "small": 4.7, "base": 36.1, "paper": 97.0}
FULL = {"index_embed": "sin+table", "pos_embed": "learned", "text_input": "tokens+pooled", "text_rank": 3}


def tiny(**fields: object) -> WeightUNetConfig:
    return preset("tiny", **{"blocks": 5, "length": 16, "text_width": 8, **fields})


def awake(config: WeightUNetConfig) -> WeightUNet:
    """Return a network none of whose layers is zero."""
    network = WeightUNet(config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return network


def inputs(count: int = 5, length: int = 16) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 1, length, generator=generator)
    tokens = torch.randn(1, 4, 8, generator=generator)
    mask = torch.tensor([[True, True, True, False]])
    return x, torch.full((count,), 700), torch.arange(count), tokens, mask


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_sizes_that_they_are_said_to_have(name: str) -> None:
    config = preset(name, blocks=854, length=256, text_width=768, index_embed="sin")
    assert count_parameters(config) / 1e6 == pytest.approx(MILLIONS[name], abs=0.05)
    if name in ("tiny", "small"):
        for more in ({}, FULL):
            config = preset(name, **{"blocks": 7, "length": 64, "text_width": 24, "index_embed": "sin", **more})
            built = sum(p.numel() for p in WeightUNet(config).parameters() if p.requires_grad)
            assert built == count_parameters(config)


def test_the_tiny_preset_with_the_hashed_text_encoder_has_a_million_parameters() -> None:
    assert count_parameters(preset("tiny", blocks=854, length=256, text_width=64, index_embed="sin")) == 969_921


def test_there_are_six_residual_and_five_transformer_blocks() -> None:
    modules = list(WeightUNet(tiny()).modules())
    assert sum(isinstance(module, ResBlock) for module in modules) == 6
    assert sum(isinstance(module, TransformerBlock) for module in modules) == 5


@pytest.mark.parametrize("fields", [{}, FULL, {"length": 256}])
def test_one_text_for_all_blocks_is_the_same_as_that_text_for_each(fields: dict[str, object]) -> None:
    network = awake(tiny(**fields))
    x, t, n, tokens, mask = inputs(length=int(fields.get("length", 16)))  # type: ignore[call-overload]
    shared = network(x, t, n, tokens, mask)
    each = network(x, t, n, tokens.expand(5, -1, -1), mask.expand(5, -1))
    assert shared.shape == x.shape
    torch.testing.assert_close(shared, each, rtol=1e-5, atol=1e-6)


def test_time_index_and_text_all_matter_and_hidden_vectors_do_not() -> None:
    network = awake(tiny(**FULL))
    x, t, n, tokens, mask = inputs()
    usual = network(x, t, n, tokens, mask)
    assert not torch.allclose(usual, network(x, t - 300, n, tokens, mask))
    assert not torch.allclose(usual, network(x, t, n.flip(0), tokens, mask))
    other = tokens.clone()
    other[:, 3] += 1.0
    torch.testing.assert_close(usual, network(x, t, n, other, mask))
    other[:, 1] += 1.0
    assert not torch.allclose(usual, network(x, t, n, other, mask))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_linear_path_holds_a_map_from_texts_to_clean_blocks(prediction: str) -> None:
    """At its start the rest of the network predicts 0, so v = -sigma w, noise = -alpha / sigma w, and w itself."""
    network = WeightUNet(tiny(text_rank=8, diffusion=DiffusionConfig(prediction=prediction)))
    x, t, n, tokens, mask = inputs()
    texts = torch.randn(6, 8, generator=torch.Generator().manual_seed(4))
    units = network.centre_texts_(texts)
    assert units.mean(0).abs().max() < 1e-6 and units.square().mean() == pytest.approx(1.0)
    weights = torch.randn(8, 5, 16, generator=torch.Generator().manual_seed(5))
    network.set_linear_(weights)
    told = (pool(tokens, mask) - network.text_mean) / network.text_unit
    clean = torch.einsum("e,enl->nl", told[0], weights)
    gain = {"epsilon": -1.0, "v_prediction": -1.0, "sample": 1.0}[prediction]
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[700]
    gain *= float(
        {"epsilon": (kept / (1 - kept)).sqrt(), "v_prediction": (1 - kept).sqrt(), "sample": kept**0}[prediction]
    )
    torch.testing.assert_close(network(x, t, n, tokens, mask)[:, 0], gain * clean, rtol=1e-4, atol=1e-5)


def test_the_index_code_is_that_of_the_paper() -> None:
    """SinEnc(n, 2i) = sin(n / 10000^(2i/d)), SinEnc(n, 2i + 1) = cos(the same)."""
    code = sinusoid(torch.tensor([3]), 8)[0]
    for place in range(4):
        angle = torch.tensor(3 / 10_000 ** (2 * place / 8))
        torch.testing.assert_close(code[2 * place], angle.sin())
        torch.testing.assert_close(code[2 * place + 1], angle.cos())


def test_configurations_travel_as_json_and_wrong_ones_are_refused() -> None:
    config = tiny(**FULL, diffusion=DiffusionConfig(prediction="sample"))
    values = json.loads(json.dumps(config.to_dict()))
    assert WeightUNetConfig.from_dict(values) == config
    with pytest.raises(InputError, match="wrong"):
        WeightUNetConfig.from_dict({**values, "length": 18})
    with pytest.raises(InputError, match="blokcs"):
        WeightUNetConfig.from_dict({**values, "blokcs": 3})
    with pytest.raises(UsageError, match="did you mean 'tiny'"):
        preset("tyni", blocks=1, length=4, text_width=2)
    with pytest.raises(UsageError, match="18 numbers"):
        tiny(length=18)
    with pytest.raises(UsageError, match="--pos-embed"):
        tiny(pos_embed="sin")
