"""Presets of UNets: parameters counted without torch, what is refused, and the way from init to evaluate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import run_cli, weights, whole

from finectl.diffusion.random import generator_for
from finectl.errors import EXIT_SAVED, EXIT_USAGE, UsageError
from finectl.models.io import build_model, misfits, read_config
from finectl.models.presets import preset
from finectl.models.unet import initial_state
from finectl.models.unet_config import UNetConfig
from finectl.models.unet_presets import UNET_PRESETS, is_unet, unet_preset

NANO = ("init", "--method", "he", "--model", "unet-nano")
TRAINING = ("--steps", 3, "--batch-size", 4, "--eval-every", 0)


@pytest.mark.parametrize(("name", "size"), [("unet-nano", 8), ("unet-cifar", 32), ("unet-lsun", 256)])
@pytest.mark.parametrize("channels", [1, 3])
def test_parameters_are_those_that_diffusers_has(name: str, size: int, channels: int) -> None:
    config = unet_preset(name, image_size=size, channels=channels)
    with torch.device("meta"):
        model = build_model(config)
    assert config.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert UNetConfig.from_dict(config.to_dict()) == config
    known = {"unet-cifar": 35_746_307, "unet-lsun": 113_673_219}
    if channels == 3 and name in known:
        assert config.parameters == known[name]


def test_names_and_sizes_that_do_not_fit_are_refused() -> None:
    assert is_unet("UNet-CIFAR") and not is_unet("dit-nano") and not is_unet(None)
    with pytest.raises(UsageError, match="did you mean 'unet-nano'"):
        unet_preset("unet-nan", image_size=8, channels=1)
    with pytest.raises(UsageError, match="12x12"):
        unet_preset("unet-cifar", image_size=12, channels=1)
    for name in UNET_PRESETS:
        with pytest.raises(UsageError, match="is a UNet"):
            preset(name, image_size=32, channels=3, num_classes=1)


def test_initial_weights_are_those_of_the_seed_alone() -> None:
    config = unet_preset("unet-nano", image_size=8, channels=1)
    torch.manual_seed(1)
    first = initial_state(config, generator_for("init", 0))
    torch.manual_seed(2)
    before = torch.get_rng_state()
    again = initial_state(config, generator_for("init", 0))
    assert torch.equal(torch.get_rng_state(), before)
    other = initial_state(config, generator_for("init", 1))
    assert not misfits(build_model(config), first)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["unet.conv_in.weight"], other["unet.conv_in.weight"])
    assert first["unet.conv_in.weight"].std() > 0.05


def test_a_unet_from_init_to_evaluate(workspace: Path, fast_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = run_cli(*NANO).path
    assert weights(made) == weights(run_cli(*NANO, "--workspace", fast_disk / "again").path)
    assert read_config(whole(made)) == unet_preset("unet-nano", image_size=8, channels=1)
    with monkeypatch.context() as hasty:
        hasty.setattr("finectl.training.clock.Clock.is_over", lambda clock: True)
        stopped = run_cli("train", made, *TRAINING)
    assert stopped.code == EXIT_SAVED, stopped.err
    resumed = run_cli("train", made, *TRAINING)
    assert "step=1 steps=3" in resumed.err
    unbroken = run_cli("train", made, *TRAINING, "--workspace", fast_disk / "unbroken").path
    assert weights(resumed.path) == weights(unbroken) != weights(made)
    sampled = run_cli("sample", resumed.path, "--samples", 3, "--sampling-steps", 2).path
    assert len(list((sampled / "samples").glob("*.png"))) == 3
    measured = run_cli("evaluate", resumed.path, "--samples", 64, "--sampling-steps", 2)
    assert measured.code == 0, measured.err
    exported = run_cli("convert", resumed.path, "--to", "diffusers").path
    assert (exported / "unet" / "diffusion_pytorch_model.safetensors").exists()


@pytest.mark.parametrize("method", ["fine", "direct", "mimetic", "pruned-kd"])
def test_other_methods_make_no_unet(workspace: Path, method: str) -> None:
    ran = run_cli("init", "--method", method, "--model", "unet-nano")
    assert ran.code == EXIT_USAGE
    assert f"--method {method}" in ran.err and "finectl init --method he --model unet-nano" in ran.err


@pytest.mark.parametrize("option", [("--depth", 3), ("--variant", "kaiming"), ("--set", "layers=3")])
def test_options_of_transformers_do_not_go_with_a_unet(workspace: Path, option: tuple[object, ...]) -> None:
    ran = run_cli(*NANO, *option)
    assert ran.code == EXIT_USAGE and str(option[0]) in ran.err
    assert run_cli("condense", "--model", "unet-nano", "--steps", 1).code == EXIT_USAGE
