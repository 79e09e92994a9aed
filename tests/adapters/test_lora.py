"""Low-rank adapters: counts, equality of attached and merged, and the layouts of PEFT, diffusers and kohya."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finectl.adapters.lora import (
    RANKS_854,
    LoraLayer,
    attach_lora,
    count_lora,
    initial_lora,
    load_lora,
    lora_layers,
    lora_shapes,
    lora_state,
    merge_lora,
)
from finectl.adapters.lora_export import DIFFUSERS_WEIGHTS, KOHYA_WEIGHTS, NORMS, export_lora, read_exported
from finectl.artifacts.tensors import load_tensors
from finectl.errors import InputError, UsageError
from finectl.models.gan.config import GeneratorConfig, Layer, preset
from finectl.models.gan.generator import Generator, initialize_
from finectl.training.gan.adapted import crucial_layers

RANKS = "2,stem=3,transformer.attn2=1"


def small() -> GeneratorConfig:
    return GeneratorConfig(4, 2, 16, 6)


def made(config: GeneratorConfig) -> Generator:
    model = Generator(config).eval()
    initialize_(model, torch.Generator().manual_seed(0))
    return model


def drawn(layers: tuple[LoraLayer, ...], seed: int = 3) -> dict[str, Tensor]:
    """Adapters that change everything, normalisations too."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in lora_shapes(layers).items()}


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1, torch.randn(2, 4, 6, generator=generator)


@pytest.fixture
def case() -> tuple[Generator, tuple[LoraLayer, ...], dict[str, Tensor], Tensor]:
    """A model without adapters, adapters, their values, and what the model answers with them."""
    config = small()
    layers = lora_layers(config, RANKS)
    lora = drawn(layers)
    adapted = attach_lora(made(config), layers)
    load_lora(adapted, layers, lora)
    with torch.no_grad():
        answer = adapted(*inputs())
        assert not torch.allclose(answer, made(config)(*inputs()), atol=1e-2)
    return made(config), layers, lora, answer


def test_weights_of_a_unit_of_rank() -> None:
    config = preset("e2gan", 256)
    one, two = (count_lora(lora_layers(config, rank)) for rank in (1, 2))
    assert (len(lora_layers(config, 1)), two - one, one - (two - one)) == (24, 38_294, 5_376)
    assert count_lora(lora_layers(preset("nano", 32), 2)) == 10_380


def test_weights_of_the_layers_that_e2gan_adapts() -> None:
    assert count_lora(crucial_layers(lora_layers(preset("e2gan", 256), 1))) == 22_934


def test_the_ranks_of_854_blocks() -> None:
    groups = [count_lora([layer]) for layer in lora_layers(preset("e2gan", 256), RANKS_854)]
    assert (sum(groups), sum(-(-group // 256) for group in groups)) == (218_200, 854)


def test_ranks_of_single_modules() -> None:
    ranks = {
        layer.name: layer.rank for layer in lora_layers(small(), "2,transformer=5,transformer.attn2.to_q=1,head=3")
    }
    assert ranks["transformer.attn1.to_q"] == 5 and ranks["transformer.attn2.to_q"] == 1
    assert ranks["head.conv"] == 3 and ranks["stem.conv"] == 2
    with pytest.raises(UsageError, match="did you mean 'stem'"):
        lora_layers(small(), "2,stam=1")
    for text in ("", "x", "0", "2,stem=0", "2,stem"):
        with pytest.raises(UsageError):
            lora_layers(small(), text)


def test_the_start_changes_nothing_and_is_the_same_for_all() -> None:
    config = small()
    layers = lora_layers(config, RANKS)
    base = made(config)
    start = initial_lora(base.state_dict(), layers, 7)
    assert list(start) == list(lora_shapes(layers))
    adapted = attach_lora(made(config), layers)
    load_lora(adapted, layers, start)
    assert torch.equal(adapted(*inputs()), base(*inputs()))
    again, other = (initial_lora(base.state_dict(), layers, seed) for seed in (7, 8))
    assert all(torch.equal(start[name], again[name]) for name in start)
    assert not torch.equal(start["stem.conv.lora_A.weight"], other["stem.conv.lora_A.weight"])


def test_only_adapters_and_norms_learn() -> None:
    layers = lora_layers(small(), 2)
    adapted = attach_lora(made(small()), layers)
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trained == set(lora_shapes(layers))


def test_merged_weights_compute_the_same(case: Any) -> None:
    base, _, lora, answer = case
    state = base.state_dict()
    merged = merge_lora(state, lora)
    assert set(merged) == set(state)
    dense = made(small())
    dense.load_state_dict(merged)
    assert torch.allclose(dense(*inputs()), answer, atol=1e-5)
    assert torch.equal(base.state_dict()["stem.conv.weight"], made(small()).state_dict()["stem.conv.weight"])


def test_what_is_loaded_comes_back(case: Any) -> None:
    _, layers, lora, _ = case
    adapted = attach_lora(made(small()), layers)
    load_lora(adapted, layers, lora)
    found = lora_state(adapted, layers)
    assert list(found) == list(lora) and all(torch.equal(found[name], lora[name]) for name in lora)
    with pytest.raises(InputError, match="lacks"):
        load_lora(adapted, layers, {name: lora[name] for name in list(lora)[1:]})
    with pytest.raises(InputError, match="has shape"):
        load_lora(adapted, layers, {**lora, "stem.conv.lora_A.weight": torch.zeros(1)})


def test_adapters_of_another_model_are_refused() -> None:
    layers = lora_layers(GeneratorConfig(8, 2, 16, 6), 2)
    with pytest.raises(InputError, match=r"stem\.conv"):
        attach_lora(made(small()), layers)
    with pytest.raises(InputError, match="has no"):
        initial_lora({}, layers, 0)
    with pytest.raises(InputError, match="has no"):
        merge_lora({}, drawn(layers))


def test_layers_as_json() -> None:
    for layer in lora_layers(small(), RANKS):
        assert LoraLayer.from_dict(json.loads(json.dumps(layer.to_dict()))) == layer
    values = layer.to_dict()
    for damaged in ({}, {**values, "x": 1}, {**values, "a_shape": ["x"]}, {**values, "b_shape": 3}):
        with pytest.raises(InputError):
            LoraLayer.from_dict(damaged)


def test_peft_loads_them_and_answers_the_same(case: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base, layers, lora, answer = case
    export_lora(tmp_path, "peft", layers, lora)
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path)).eval()
    with torch.no_grad():
        assert torch.allclose(loaded(*inputs()), answer, atol=1e-5)
    again = loaded.merge_and_unload()
    with torch.no_grad():
        assert torch.allclose(again(*inputs()), answer, atol=1e-5)


def test_peft_saves_what_is_read_back(case: Any, tmp_path: Path) -> None:
    """What PEFT itself writes, with an alpha that is not the rank, means the same here."""
    peft = pytest.importorskip("peft")
    base, layers, _, _ = case
    norms = [layer.norm for layer in layers if layer.norm]
    config = peft.LoraConfig(
        r=2,
        lora_alpha=6,
        target_modules=[layer.name for layer in layers],
        rank_pattern={layer.name: layer.rank for layer in layers if layer.rank != 2},
        modules_to_save=norms,
        init_lora_weights=False,
    )
    theirs = peft.get_peft_model(base, config).eval()
    theirs.save_pretrained(str(tmp_path))
    adapted = attach_lora(made(small()), layers)
    load_lora(adapted, layers, read_exported(tmp_path, layers))
    double = [part.double() for part in inputs()]  # the order of sums differs, and norms make rounding larger
    with torch.no_grad():
        assert torch.allclose(adapted.double()(*double), theirs.double()(*double), atol=1e-5)


@pytest.mark.parametrize("form", ["peft", "diffusers", "kohya"])
def test_every_layout_is_read_back(case: Any, tmp_path: Path, form: str) -> None:
    _, layers, lora, _ = case
    files = export_lora(tmp_path / "a", form, layers, lora)
    found = read_exported(tmp_path / "a", layers)
    assert set(found) == set(lora) and all(torch.allclose(found[name], lora[name], rtol=1e-6) for name in lora)
    for one, two in zip(files, export_lora(tmp_path / "b", form, layers, lora), strict=True):
        assert one.read_bytes() == two.read_bytes()
    with pytest.raises(InputError, match="does not fit"):
        read_exported(tmp_path / "a", lora_layers(small(), 5))


def test_merged_is_a_plain_state(case: Any, tmp_path: Path) -> None:
    base, layers, lora, answer = case
    (file,) = export_lora(tmp_path, "merged", layers, lora, base.state_dict())
    dense = made(small())
    dense.load_state_dict(load_tensors(file))
    assert torch.allclose(dense(*inputs()), answer, atol=1e-5)
    with pytest.raises(UsageError, match="need the model"):
        export_lora(tmp_path, "merged", layers, lora)
    with pytest.raises(UsageError, match="unknown layout"):
        export_lora(tmp_path, "onnx", layers, lora)
    with pytest.raises(InputError, match="no adapters"):
        read_exported(tmp_path, layers)


@dataclass(frozen=True)
class Listed:
    """The layers of a model of diffusers."""

    found: tuple[Layer, ...]

    def layers(self) -> tuple[Layer, ...]:
        return self.found


def text_unet() -> tuple[nn.Module, Listed]:
    """A tiny UNet of diffusers, and some of its layers: linear ones and a convolution."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()
    wanted = ("attn1.to_q", "attn2.to_k", "attn2.to_out.0", "ff.net.2", "resnets.0.conv1", "downsamplers.0.conv")
    found = [
        Layer(name, tuple(module.weight.shape))
        for name, module in unet.named_modules()
        if name.endswith(wanted) and isinstance(module, nn.Linear | nn.Conv2d)
    ]
    assert {layer.kind for layer in found} == {"linear", "conv"}
    return unet, Listed(tuple(found))


def unet_inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(1, 4, 8, 8, generator=generator),
        torch.tensor([3]),
        torch.randn(1, 5, 8, generator=generator),
    )


def unet_case() -> tuple[Any, tuple[LoraLayer, ...], dict[str, Tensor], Tensor]:
    unet, config = text_unet()
    layers = lora_layers(config, "2,mid_block=3")
    lora = drawn(layers)
    adapted = attach_lora(text_unet()[0], layers)
    load_lora(adapted, layers, lora)
    with torch.no_grad():
        answer = adapted(*unet_inputs()).sample
        assert not torch.allclose(answer, unet(*unet_inputs()).sample, atol=1e-2)
    return unet, layers, lora, answer


def test_diffusers_loads_them_and_answers_the_same(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    unet, layers, lora, answer = unet_case()
    (file,) = export_lora(tmp_path, "diffusers", layers, lora)
    unet.load_lora_adapter(str(tmp_path), weight_name=file.name, prefix="unet", use_safetensors=True)
    with torch.no_grad():
        assert torch.allclose(unet(*unet_inputs()).sample, answer, atol=1e-5)


def test_diffusers_reads_the_configuration_in_the_header(tmp_path: Path) -> None:
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
    from safetensors import safe_open

    _, layers, lora, _ = unet_case()
    export_lora(tmp_path, "diffusers", layers, lora)
    with safe_open(tmp_path / DIFFUSERS_WEIGHTS, "pt") as file:
        config = json.loads(file.metadata()[LORA_ADAPTER_METADATA_KEY])
    assert config["unet.r"] == config["unet.lora_alpha"] == 2
    assert set(config["unet.rank_pattern"].values()) == {3}


def test_diffusers_converts_kohya(tmp_path: Path) -> None:
    """The names and alphas of kohya's layout, through diffusers' own conversion, answer the same."""
    pytest.importorskip("peft")
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    unet, layers, lora, answer = unet_case()
    export_lora(tmp_path, "kohya", layers, lora)
    state, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(
        str(tmp_path), weight_name=KOHYA_WEIGHTS, use_safetensors=True, unet_config=unet.config
    )
    StableDiffusionLoraLoaderMixin.load_lora_into_unet(state, network_alphas=alphas, unet=unet)
    with torch.no_grad():
        assert torch.allclose(unet(*unet_inputs()).sample, answer, atol=1e-5)


def test_norms_lie_beside_where_the_layout_has_no_place(case: Any, tmp_path: Path) -> None:
    base, layers, lora, _ = case
    _, norms = export_lora(tmp_path, "kohya", layers, lora)
    assert norms.name == NORMS
    found = load_tensors(norms)
    assert set(found) == {name for name in lora if ".lora_" not in name}
    assert not base.load_state_dict(found, strict=False).unexpected_keys
