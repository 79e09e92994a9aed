"""A learngene at another width stands for the dense models of the other width."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import run_cli

from finectl.artifacts.store import open_artifact
from finectl.artifacts.tensors import load_tensors
from finectl.diffusion.random import generator_for
from finectl.errors import EXIT_USAGE
from finectl.initializers.learngene_width import at_width, tile_channels
from finectl.initializers.width import axes, select
from finectl.models.dit import DiT, dense_state_dict, initialize_
from finectl.models.io import read_dit_config
from finectl.models.learngene import Learngene, split_state
from finectl.models.presets import LAYER_TYPES, DiTConfig, FactorConfig, layer_shapes, preset
from finectl.models.tying import TemplateConfig, Tying

SOURCE = DiTConfig(width=32, depth=2, heads=4, patch_size=2, image_size=4, channels=1, num_classes=3)
TYPES = tuple(LAYER_TYPES)
FORMS: dict[str, Tying] = {
    "fine": FactorConfig(TYPES, 32),
    "wave": TemplateConfig.of_rank(TYPES, 8, 32, layer_shapes(SOURCE)),
}
TARGETS = {"narrower": (16, 2), "wider": (64, 8), "uneven": (48, 6), "larger heads": (48, 4)}


def learngene_of(tying: Tying) -> Learngene:
    model = initialize_(DiT(replace(SOURCE, factorized=tying)), generator_for("test", 0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator_for("noise", parameter.numel())))
    return split_state(model.state_dict(), model.config)


def dense_of(learngene: Learngene) -> dict[str, torch.Tensor]:
    """Return the dense model of the learngene's own depth."""
    state = {**{f"factors.{name}": value for name, value in learngene.factors.items()}, **learngene.rest}
    for name, curve in learngene.curves.items():
        what, kind = name.split(".")
        for index, value in enumerate(curve):
            state[f"blocks.{index}.{LAYER_TYPES[kind]}.{what}"] = value
    return dense_state_dict(state, learngene.config)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("target", TARGETS)
def test_it_is_the_dense_model_at_that_width(form: str, target: str) -> None:
    width, heads = TARGETS[target]
    tying = FORMS[form]
    wanted_config = replace(SOURCE, width=width, heads=heads)
    tile = tying.size if isinstance(tying, TemplateConfig) else None
    taken = axes(SOURCE, wanted_config, tile_channels(SOURCE, wanted_config, tile) if tile else None)
    learngene = learngene_of(tying)
    found = dense_of(at_width(learngene, wanted_config))
    dense = dense_of(learngene)
    assert {name: value.shape for name, value in found.items()} == {
        name: value.shape for name, value in DiT(wanted_config).state_dict().items()
    }
    for prefix in ("", "blocks.0.", "blocks.1."):
        part = {n[len(prefix) :]: v for n, v in dense.items() if n.startswith(prefix) and (prefix or "blocks" not in n)}
        for name, value in select(part, taken).items():
            assert torch.allclose(found[prefix + name], value, atol=1e-5), prefix + name


@pytest.mark.parametrize("form", FORMS)
def test_the_same_width_is_the_same_learngene(form: str) -> None:
    learngene = learngene_of(FORMS[form])
    assert at_width(learngene, replace(SOURCE, depth=9)) is learngene


def test_tiles_hold_whole_heads() -> None:
    taken = tile_channels(SOURCE, replace(SOURCE, width=16, heads=2), 8)["q"]
    assert taken.tolist() == [*range(8), *range(16, 24)]


@pytest.mark.parametrize("method", ["fine", "wave"])
def test_a_wider_model_from_the_command_line(method: str, tmp_path: Path) -> None:
    place = ("--workspace", tmp_path)
    tiny = ("--model", "dit-nano", "--depth", 2, "--steps", 2, "--batch-size", 8, "--eval-every", 0)
    learngene = run_cli("extract", run_cli("condense", "--method", method, *tiny, *place).path, *place).path
    options = ("--method", method, "--model", "dit-s", "--depth", 1, "--tune-samples", 8, "--batch-size", 8, *place)
    made = run_cli("init", learngene, *options, "--tune-steps", 0).path
    config = read_dit_config(open_artifact(made))
    assert config == preset("dit-s", depth=1, image_size=8, channels=1, num_classes=10)
    state = load_tensors(made / "model.safetensors")
    hidden = state["blocks.0.mlp.fc1.weight"]  # (4 d', d'): unit i is unit i // 6 of the learngene's model
    outgoing = state["blocks.0.mlp.fc2.weight"]
    copies = [0, 1] if method == "fine" else [0, 32]  # side by side, or tile by tile
    assert torch.equal(*state["blocks.0.mlp.fc1.bias"][copies])
    assert not torch.equal(outgoing[:, copies[0]], outgoing[:, copies[1]]), "copies get gradients of their own"
    assert hidden.shape == (4 * 384, 384)
    tuned = run_cli("init", learngene, *options, "--tune-steps", 1).path
    assert load_tensors(tuned / "model.safetensors").keys() == state.keys()


def test_templates_that_do_not_tile_are_refused_in_a_dry_run(tmp_path: Path) -> None:
    place = ("--workspace", tmp_path)
    tiny = ("--model", "dit-s", "--depth", 1, "--steps", 1, "--batch-size", 4, "--eval-every", 0, "--template-size", 96)
    learngene = run_cli("extract", run_cli("condense", "--method", "wave", *tiny, *place).path, *place).path
    ran = run_cli("init", learngene, "--method", "wave", "--model", "dit-nano", "--dry-run", *place)
    assert ran.code == EXIT_USAGE and "96x96" in ran.err and "--template-size" in ran.err
