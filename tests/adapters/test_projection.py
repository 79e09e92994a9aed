"""Channel-wise projections: where they sit, how many parameters they have, and that the identity changes no bit."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from projected import base_state, inputs, output, random_state, sd14, text_unet, unet

from finectl.adapters.projection import add_projections, identity_state
from finectl.errors import InputError, UsageError
from finectl.models.dit import initialize_
from finectl.models.io import build_model, config_from, total_parameters
from finectl.models.presets import DiTConfig, count_parameters, preset
from finectl.models.unet_config import UNetConfig
from finectl.models.unet_presets import unet_preset
from finectl.training.estimate import activation_bytes, forward_flops, training_estimate
from finectl.training.flops import count_forward
from finectl.training.settings import TrainSettings
from finectl.training.step import Ema


def nano() -> DiTConfig:
    return preset("dit-nano", image_size=8, channels=1, num_classes=10, depth=2)


CIFAR = unet_preset("unet-cifar", image_size=32, channels=3)
LSUN = unet_preset("unet-lsun", image_size=256, channels=3)


@pytest.mark.parametrize(
    ("config", "base", "channels"),
    [
        (CIFAR, 35_746_307, [128, 256, 256, 256, 256, 256, 256, 256, 128]),
        (LSUN, 113_673_219, [128, 128, 256, 256, 512, 512, 512, 512, 512, 256, 256, 128, 128]),
        (sd14(), 859_520_964, [320, 640, 1280, 1280, 1280, 1280, 1280, 640, 320]),
    ],
)
def test_the_published_unets_have_so_many_parameters(config: UNetConfig, base: int, channels: list[int]) -> None:
    added = {9: 491_520 if config is CIFAR else 9_216_000, 13: 1_638_400}[len(channels)]
    projected = add_projections(config, "blocks")
    with torch.device("meta"):
        model = build_model(projected)
    counted = {name: parameter.numel() for name, parameter in model.named_parameters()}
    projections = {name: size for name, size in counted.items() if name.startswith("projections.")}
    assert sum(counted.values()) - sum(projections.values()) == base == total_parameters(config)
    assert sum(projections.values()) == added == total_parameters(projected) - base
    assert list(projections.values()) == [count**2 for count in channels]
    assert list(projections) == [place.parameter for place in projected.places]


def test_the_foldable_ones_are_those_of_up_blocks_that_end_in_a_convolution() -> None:
    for config, wanted in ((CIFAR, [0, 1, 2, 3]), (LSUN, [0, 1, 2, 3, 4, 5]), (sd14(), [0, 1, 2])):
        found = add_projections(config, "foldable").places
        assert [place.where for place in found] == [f"up_blocks.{index}" for index in wanted]
    foldable = add_projections(LSUN, "foldable")
    assert total_parameters(foldable) - total_parameters(LSUN) == 688_128


@pytest.mark.parametrize("config", [unet(), unet(mid_block_type=None), text_unet()])
@pytest.mark.parametrize("kind", ["blocks", "foldable"])
def test_identities_change_no_bit(config: UNetConfig, kind: str) -> None:
    projected = add_projections(config, kind)
    state = base_state(config)
    extended = {**state, **identity_state(projected)}
    assert torch.equal(output(projected, extended), output(config, state))
    assert not torch.equal(output(projected, random_state(projected)), output(config, state))


def test_a_transformer_takes_one_behind_every_block_and_identities_change_no_bit() -> None:
    config = replace(nano(), learn_sigma=True)
    projected = add_projections(config, "blocks")
    assert [place.parameter for place in projected.places] == [f"projections.blocks.{i}.weight" for i in range(2)]
    torch.manual_seed(0)
    state = {name: 0.1 * torch.randn(value.shape) for name, value in build_model(config).state_dict().items()}
    arguments = (torch.randn(3, 1, 8, 8), torch.tensor([0, 5, 900]), torch.tensor([1, 2, 10]))
    base, model = build_model(config), build_model(projected)
    base.load_state_dict(state)
    model.load_state_dict({**state, **identity_state(projected)})
    assert torch.equal(model(*arguments), base(*arguments))
    with torch.no_grad():
        model.get_parameter("projections.blocks.1.weight").mul_(torch.rand(64))
    assert not torch.allclose(model(*arguments), base(*arguments))


def test_a_new_model_starts_with_identities() -> None:
    projected = add_projections(nano(), "blocks")
    model = initialize_(build_model(projected), torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    plain = initialize_(build_model(nano()), torch.Generator().manual_seed(0)).state_dict()  # type: ignore[arg-type]
    state = model.state_dict()
    wanted = {**plain, **identity_state(projected)}
    assert set(state) == set(wanted)
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    unet_model = build_model(add_projections(unet(), "blocks")).state_dict()
    identities = identity_state(add_projections(unet(), "blocks"))
    assert all(torch.equal(unet_model[name], value) for name, value in identities.items())


def test_the_skip_connection_of_a_down_block_is_not_projected() -> None:
    config = add_projections(unet(), "blocks")
    state = random_state(config)
    model: Any = build_model(config).eval()
    model.load_state_dict(state)
    seen: dict[str, Any] = {}
    block, after = model.unet.down_blocks[1], model.unet.down_blocks[2]
    block.register_forward_hook(lambda module, given, output: seen.update(output=output))
    after.register_forward_pre_hook(
        lambda module, given, named: seen.update(next=named["hidden_states"]), with_kwargs=True
    )
    model(*inputs(config))
    weight = state["projections.down_blocks.1.weight"]
    skip = seen["output"][1][-1]
    torch.testing.assert_close(seen["next"], torch.nn.functional.conv2d(skip, weight))
    assert not torch.allclose(seen["next"], skip)


def test_a_copy_and_an_average_use_their_own_projections() -> None:
    config = add_projections(unet(), "blocks")
    model = build_model(config).eval()
    model.load_state_dict(random_state(config))
    before = model(*inputs(config))
    other = copy.deepcopy(model)
    average = Ema(model.named_parameters(), 0.9)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name.startswith("projections."):
                parameter.zero_()
    assert torch.equal(model(*inputs(config)), before)
    assert not torch.allclose(other(*inputs(config)), before)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("projections."):
                parameter.zero_()
    with average.denoiser(model) as averaged:
        torch.testing.assert_close(averaged(*inputs(config)), before)


def test_every_projection_gets_a_gradient() -> None:
    for config in (add_projections(unet(), "blocks"), add_projections(text_unet(), "blocks")):
        model = build_model(config)
        model.load_state_dict(random_state(config))
        for checkpointed in (False, True):
            if checkpointed:
                model.unet.enable_gradient_checkpointing()  # type: ignore[operator, union-attr]
            model.train().zero_grad()
            model(*inputs(config)).square().mean().backward()
            gradients = [model.get_parameter(place.parameter).grad for place in config.places]
            assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)


def test_configurations_with_projections_survive_json_and_those_without_do_not_mention_them() -> None:
    for config in (unet(), nano()):
        assert "projections" not in config.to_dict()
        projected = add_projections(config, "blocks")
        assert config_from(json.loads(json.dumps(projected.to_dict()))) == projected
    for values in (
        {**nano().to_dict(), "projections": "foldable"},
        {**nano().to_dict(), "projections": "skips"},
        {**nano().to_dict(), "projections": 1},
        {**unet().to_dict(), "projections": "skips"},
        {**unet().to_dict(), "projections": None},
    ):
        with pytest.raises(InputError):
            config_from(values)


def test_what_cannot_be_is_refused_with_the_reason() -> None:
    with pytest.raises(UsageError, match="normalises over the channels"):
        add_projections(nano(), "foldable")
    ends = ["AttnUpBlock2D"] * 3
    with pytest.raises(UsageError, match="ends in attention"):
        add_projections(unet(up_block_types=ends, upsample_type="resnet"), "foldable")
    with pytest.raises(UsageError, match="did you mean 'blocks'"):
        add_projections(nano(), "block")
    assert add_projections(nano(), "none") == nano()
    assert add_projections(add_projections(unet(), "foldable"), "blocks").projections == "blocks"
    with pytest.raises(UsageError, match=r"none at down_blocks\.0"):
        add_projections(add_projections(unet(), "blocks"), "foldable")


def test_estimates_count_projections() -> None:
    settings = TrainSettings(
        steps=1, batch_size=4, lr=1e-3, lr_schedule="constant", warmup_steps=0, weight_decay=0.0, ema=0.9,
        eval_every=0, seed=0,
    )  # fmt: skip
    dit, plain = add_projections(nano(), "blocks"), nano()
    assert count_parameters(dit)["projections"] == 2 * 64**2
    assert forward_flops(dit) - forward_flops(plain) == 2 * 2 * 64**2 * plain.tokens
    assert activation_bytes(dit, False, checkpointed=False) - activation_bytes(plain, False, checkpointed=False) == (
        4 * 2 * 64 * plain.tokens
    )
    for config in (plain, unet()):
        before = training_estimate(config, settings)
        after = training_estimate(add_projections(config, "blocks"), settings)
        assert after["parameters"] > before["parameters"] and after["memory_bytes"] > before["memory_bytes"]
    projected = add_projections(unet(), "blocks")
    extra = sum(2 * place.channels**2 * place.positions for place in projected.places)
    assert (count_forward(projected, 3) or 0) - (count_forward(unet(), 3) or 0) == 3 * extra > 0
