"""GANs: parameters counted without torch, what goes through the networks, and hostile configurations."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from finectl.errors import InputError, UsageError
from finectl.models.gan.config import (
    DiscriminatorConfig,
    GeneratorConfig,
    discriminator_for,
    preset,
)
from finectl.models.gan.discriminator import PatchDiscriminator
from finectl.models.gan.generator import Generator, initialize_, recompute_statistics
from finectl.models.gan.io import GanConfig


def counted(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def tiny(**changes: object) -> GeneratorConfig:
    return replace(GeneratorConfig(4, 2, 16, 6), **changes)


def made(config: GeneratorConfig, seed: int = 0) -> Generator:
    model = Generator(config)
    initialize_(model, torch.Generator().manual_seed(seed))
    return model


@pytest.mark.parametrize(("name", "size", "wanted"), [("e2gan", 256, 7_059_971), ("pix2pix", 256, 11_378_179)])
def test_the_published_sizes(name: str, size: int, wanted: int) -> None:
    with torch.device("meta"):
        model = Generator(preset(name, size))
    assert preset(name, size).parameters == counted(model) == wanted


def test_the_small_size_without_what_is_trained_with_adapters() -> None:
    config = preset("nano", 32)
    norms = sum(2 * layer.norm_size for layer in config.layers())
    assert (config.norm, config.frozen_parameters, norms) == ("batch", 110_672, 672)
    assert config.parameters == counted(Generator(config)) == 110_672 + 672


@pytest.mark.parametrize(
    "config",
    [
        tiny(),
        tiny(text_width=0),
        tiny(norm="batch"),
        tiny(affine=False),
        tiny(bias=False),
        tiny(blocks=1),
        tiny(ngf=3),
        tiny(skips=True),
    ],
)
def test_layers_and_counts_are_those_of_the_network(config: GeneratorConfig) -> None:
    model = Generator(config)
    modules = dict(model.named_modules())
    weights = {name for name, module in modules.items() if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)}
    assert [layer.name for layer in config.layers() if layer.name not in weights] == []
    assert len(config.layers()) == len(weights)
    for layer in config.layers():
        assert tuple(modules[layer.name].weight.shape) == layer.shape
        assert (modules[layer.name].bias is not None) == layer.bias
        if layer.norm:
            assert modules[layer.norm].num_features == layer.shape[0]
    assert config.parameters == counted(model)


def test_layers_are_in_the_order_in_which_they_run() -> None:
    config = tiny(blocks=3)
    model, ran = made(config), []
    for layer in config.layers():
        model.get_submodule(layer.name).register_forward_hook(lambda m, a, o, name=layer.name: ran.append(name))
    model(torch.zeros(1, 3, 16, 16), torch.zeros(1, 2, 6))
    assert ran == [layer.name for layer in config.layers()]


@pytest.mark.parametrize("size", [8, 16, 32, 64, 128])
def test_discriminator_fits_every_image(size: int) -> None:
    config = discriminator_for("nano", size)
    model = PatchDiscriminator(config)
    verdict = model(torch.zeros(2, 6, size, size))
    assert verdict.shape[:2] == (2, 1) and min(verdict.shape[2:]) >= 2
    assert config.parameters == counted(model)


def test_the_discriminator_sees_patches_of_70_pixels() -> None:
    model = PatchDiscriminator(discriminator_for("e2gan", 256))
    kernels = [(module.kernel_size[0], module.stride[0]) for module in model.children() if hasattr(module, "stride")]
    field = 1
    for kernel, stride in reversed(kernels):
        field = (field - 1) * stride + kernel
    assert field == 70
    assert counted(model) == 2_769_601  # 2,768,705 of pix2pix's, whose norms learn nothing, and 896 of these


def test_text_decides_and_masked_text_does_not() -> None:
    model = made(preset("nano", 16, text_width=8)).eval()
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1
    tokens = torch.randn(2, 4, 8, generator=generator)
    mask = torch.tensor([[True, True, False, False]] * 2)
    plain = model(images, tokens, mask)
    assert plain.shape == images.shape and plain.abs().max() <= 1
    other = tokens.clone()
    other[:, 2:] = 5.0
    assert torch.equal(model(images, other, mask), plain)
    assert not torch.allclose(model(images, -tokens, mask), plain)
    with pytest.raises(ValueError, match="conditioned on text"):
        model(images)


def test_a_generator_without_text_needs_none() -> None:
    model = made(tiny(text_width=0))
    assert model(torch.zeros(1, 3, 24, 16)).shape == (1, 3, 24, 16)


def test_the_draw_depends_on_the_seed_only() -> None:
    first, again, other = (made(tiny(), seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["stem.conv.weight"], other["stem.conv.weight"])


def test_batch_statistics_are_averages_over_all_batches() -> None:
    model = made(tiny(norm="batch", text_width=0)).eval()
    batches = [(torch.rand(2, 3, 16, 16),) for _ in range(3)]
    recompute_statistics(model, batches)
    means = [model.stem.conv(torch.nn.functional.pad(x, (3,) * 4, mode="reflect")).mean((0, 2, 3)) for (x,) in batches]
    assert torch.allclose(model.stem.norm.running_mean, torch.stack(means).mean(0), atol=1e-6)
    assert not model.training and model.stem.norm.momentum == 0.1


@pytest.mark.parametrize(
    "changes",
    [
        {"ngf": 0},
        {"blocks": 0},
        {"norm": "layer"},
        {"image_size": 20},
        {"image_size": 8},
        {"norm": "batch", "affine": False},
    ],
)
def test_sizes_that_make_no_network(changes: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        tiny(**changes)


def test_configurations_as_json() -> None:
    for config in (tiny(), DiscriminatorConfig(4, 2)):
        kind = type(config)
        assert kind.from_dict(config.to_dict()) == config
        for damaged in ({**config.to_dict(), "x": 1}, {}, {**config.to_dict(), "norm": 3}):
            with pytest.raises(InputError):
                kind.from_dict(damaged)
    with pytest.raises(UsageError, match="did you mean 'nano'"):
        preset("nan", 32)


def test_a_configuration_without_skips_is_of_a_generator_without_them() -> None:
    values = tiny().to_dict()
    del values["skips"]
    assert GeneratorConfig.from_dict(values) == tiny(skips=False)
    assert preset("nano", 32).skips and not preset("e2gan", 256).skips


@pytest.mark.parametrize("skips", [False, True])
def test_skips_bring_single_pixels_to_the_output(skips: bool) -> None:
    model = made(tiny(text_width=0, skips=skips)).eval()
    for n in (1, 2):  # nothing comes up from the residual blocks
        torch.nn.init.zeros_(model.get_submodule(f"up{n}").norm.weight)
    image = torch.rand(1, 3, 16, 16)
    other = image.clone()
    other[..., 8, 8] = -1.0
    assert torch.equal(model(image), model(other)) != skips


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_only_instance_normalisation_takes_out_what_a_channel_has_evenly(norm: str) -> None:
    model = made(tiny(norm=norm, text_width=0)).train()
    x = torch.randn(2, 4, 8, 8)
    x[1] += 3.0
    means = model.stem.norm(x).mean((2, 3))
    assert bool((means[1] - means[0] > 1).all()) == (norm == "batch")
    assert bool(means.abs().max() < 1e-5) == (norm == "instance")


def test_counting_needs_no_torch() -> None:
    code = (
        "import sys; from finectl.models.gan.config import preset; from finectl.adapters.lora import lora_layers;"
        "c = preset('e2gan', 256); c.parameters; lora_layers(c, 4); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_gan_as_json_and_damaged() -> None:
    text = {"name": "hash", "digest": "0", "length": 4, "width": 6}
    config = GanConfig(tiny(), DiscriminatorConfig(4, 1), text, "nano")
    values = config.to_dict()
    assert GanConfig.from_dict(values) == config
    for damaged in (
        {},
        {**values, "architecture": "dit"},
        {**values, "generator": 3},
        {**values, "text": {"name": "hash"}},
        {**values, "discriminator": {}},
    ):
        with pytest.raises(InputError):
            GanConfig.from_dict(damaged)
