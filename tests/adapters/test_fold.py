"""Folding: exact in float64 wherever a convolution takes a projection, refused with the reason everywhere else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from projected import inputs, output, random_state, sd14, text_unet, unet
from support import run_cli, whole
from torch import Tensor, nn

from finectl.adapters.fold import fold, fold_difference, fold_one
from finectl.adapters.projection import add_projections, identity_state
from finectl.artifacts.job import Job, Outcome, Plan, Stage
from finectl.console import Console
from finectl.errors import EXIT_INPUT, InputError, UsageError
from finectl.models.io import build_model, read_config, save_model
from finectl.models.presets import preset
from finectl.models.unet_config import UNetConfig
from finectl.models.unet_presets import unet_preset
from finectl.runner import RunOptions, run_stage

EXACT = 1e-10
RESIDUAL = {"up_block_types": ["ResnetUpsampleBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"]}
NETWORKS: dict[str, tuple[UNetConfig, list[str]]] = {
    "plain": (unet(), ["up_blocks.0", "up_blocks.1", "up_blocks.2"]),
    "one level": (
        unet(
            block_out_channels=[8],
            down_block_types=["DownBlock2D"],
            up_block_types=["UpBlock2D"],
            mid_block_type=None,
        ),
        ["up_blocks.0"],
    ),
    "attention at the end": (
        unet(up_block_types=["UpBlock2D", "UpBlock2D", "AttnUpBlock2D"]),
        ["up_blocks.0", "up_blocks.1"],
    ),
    "residual upsamplers": (unet(**RESIDUAL, upsample_type="resnet"), ["up_blocks.2"]),
    "scale and shift": (
        unet(**RESIDUAL, resnet_time_scale_shift="scale_shift", layers_per_block=2),
        ["up_blocks.1", "up_blocks.2"],
    ),
    "text": (text_unet(), ["up_blocks.0"]),
    "text, plain end": (
        text_unet(
            up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
            down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
        ),
        ["up_blocks.0", "up_blocks.1"],
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_folding_changes_nothing_in_float64(name: str) -> None:
    base, foldable = NETWORKS[name]
    config = add_projections(base, "blocks")
    state = {key: value.double() for key, value in random_state(config).items()}
    folded = fold(config, state)
    gone = [place.where for place in config.places if place.where not in folded.kept]
    assert gone == foldable
    before, after = output(config, state, torch.float64), output(folded.config, folded.state, torch.float64)
    assert (before - after).abs().max() < EXACT
    without = {**state, **{key: value.double() for key, value in identity_state(config).items()}}
    assert (before - output(config, without, torch.float64)).abs().max() > 1e-3, "the projections do nothing"
    assert fold_difference(config, state) < EXACT
    for where in foldable:  # one at a time too: an error at one place cannot hide behind another
        name = f"projections.{where}.weight"
        one = {**fold_one(config, state, where), name: without[name]}
        assert (before - output(config, one, torch.float64)).abs().max() < EXACT


def test_the_convolutions_that_take_a_projection_are_the_last_of_their_block() -> None:
    for base, _ in [*NETWORKS.values(), (unet_preset("unet-lsun", image_size=256, channels=3), []), (sd14(), [])]:
        with torch.device("meta"):
            network: Any = build_model(base).unet
        for place in base.all_places:
            for name in place.convolutions:
                module = network.get_submodule(name)
                assert isinstance(module, nn.Conv2d) and module.out_channels == place.channels
            if place.convolutions[1:]:
                assert len(network.get_submodule(place.where).resnets) - 1 == int(place.convolutions[0].split(".")[3])


def test_a_foldable_model_becomes_plain() -> None:
    config = add_projections(unet(), "foldable")
    state = random_state(config)
    folded = fold(config, state)
    assert folded.config == unet() and folded.kept == {}
    assert set(folded.state) == set(build_model(unet()).state_dict())
    assert all(value.dtype == torch.float32 for value in folded.state.values())
    torch.testing.assert_close(output(folded.config, folded.state), output(config, state))
    assert "projections.up_blocks.0.weight" in state, "the given state must stay as it was"


def test_what_is_left_says_why_and_can_be_folded_no_further() -> None:
    config = add_projections(text_unet(), "blocks")
    folded = fold(config, random_state(config))
    assert folded.config.projections == "unfoldable"
    assert set(folded.kept) == {"down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.1"}
    assert "skip" in folded.kept["down_blocks.0"] and "attention" in folded.kept["up_blocks.1"]
    again = fold(folded.config, folded.state)
    assert again.config == folded.config and again.kept == folded.kept
    assert all(again.state[name] is value for name, value in folded.state.items())


def test_a_transformer_keeps_all_of_its_projections() -> None:
    config = add_projections(preset("dit-nano", image_size=8, channels=1, num_classes=10, depth=2), "blocks")
    state = build_model(config).state_dict()
    folded = fold(config, state)
    assert folded.config == config and set(folded.kept) == {"blocks.0", "blocks.1"}
    with pytest.raises(UsageError, match="normalises"):
        fold_one(config, state, "blocks.0")


@pytest.mark.parametrize(
    ("where", "reason"),
    [("down_blocks.1", "skip"), ("mid_block", "unchanged"), ("up_blocks.1", "attention"), ("conv_in", "no projection")],
)
def test_a_place_where_nothing_can_be_folded_is_refused(where: str, reason: str) -> None:
    config = add_projections(text_unet(), "blocks")
    with pytest.raises(UsageError, match=reason):
        fold_one(config, random_state(config), where)


def test_a_state_that_does_not_fit_is_refused() -> None:
    config = add_projections(unet(), "foldable")
    state = random_state(config)
    first = "projections.up_blocks.0.weight"
    convolution = "unet.up_blocks.0.upsamplers.0.conv.weight"
    for wrong in (
        {name: value for name, value in state.items() if name != first},
        {**state, first: torch.eye(8)[..., None, None]},
        {name: value for name, value in state.items() if name != convolution},
        {**state, convolution: state[convolution][:4]},
    ):
        with pytest.raises(InputError, match=r"up_blocks\.0"):
            fold(config, wrong)


def publish(root: Path, config: UNetConfig, state: dict[str, Tensor]) -> Path:
    """Publish a model artifact."""

    def plan(options: UNetConfig, parents: object) -> Plan[Any]:
        return Plan(options, slug="made")

    def run(job: Job[Any]) -> Outcome:
        save_model(job.directory, config, state)
        return Outcome()

    stage: Stage[Any] = Stage("made", 1, "model", UNetConfig, lambda options: None, plan, run)
    made = run_stage(stage, config, [], RunOptions(workspace=root), Console(quiet=True)).artifact
    assert made is not None
    return made.path


def test_a_folded_model_is_one_that_diffusers_loads_and_others_are_refused(workspace: Path) -> None:
    from diffusers import UNet2DModel

    base = unet()
    for kind, words in (
        ("foldable", "finectl merge MODEL --method linear --weights 1 --fold"),
        ("blocks", "--projection foldable"),
    ):
        config = add_projections(base, kind)
        refused = run_cli("convert", publish(workspace, config, random_state(config)), "--to", "diffusers")
        assert refused.code == EXIT_INPUT
        assert "channel-wise projections" in refused.err and words in refused.err
    config = add_projections(base, "foldable")
    state = random_state(config)
    # The command that the refusal names.
    folded = run_cli("merge", publish(workspace, config, state), "--method", "linear", "--weights", 1, "--fold").path
    assert read_config(whole(folded)).projections == "none"
    exported = whole(run_cli("convert", folded, "--to", "diffusers").path)
    loaded = UNet2DModel.from_pretrained(exported.path / "unet").eval()
    x, t, _ = inputs(base)
    with torch.no_grad():
        given = loaded(x, t).sample
    torch.testing.assert_close(given, output(config, state))
    back = run_cli("convert", exported.path)
    assert back.code == 0, back.err


def test_a_transformer_with_projections_is_exported_to_no_layout() -> None:
    from finectl.models.foreign.exporting import require_exportable

    config = add_projections(preset("dit-nano", image_size=8, channels=1, num_classes=10), "blocks")
    for target in ("diffusers", "dit"):
        with pytest.raises(InputError, match="channel-wise projections"):
            require_exportable(config, target, None)
    require_exportable(replace(config, projections="none"), "diffusers", None)
