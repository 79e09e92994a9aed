"""A learngene at another width stands for the dense models of the other width."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import run_cli

from finectl.artifacts.manifest import read_manifest
from finectl.artifacts.store import open_artifact
from finectl.artifacts.tensors import load_tensors
from finectl.diffusion.random import generator_for
from finectl.errors import EXIT_USAGE
from finectl.initializers.expansion import freeze
from finectl.initializers.learngene_width import Mapped, at_width, tile_channels
from finectl.initializers.width import axes, select
from finectl.models.dit import DiT, dense_state_dict, initialize_
from finectl.models.io import load_weights, read_dit_config
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


def mapped_of(learngene: Learngene, width: int, heads: int) -> tuple[Mapped, dict[str, torch.Tensor]]:
    """Return the model with learned maps before they are tuned, and the dense one that the choice of rows makes."""
    config = replace(learngene.config, width=width, heads=heads)
    chosen = at_width(learngene, config)
    state = dict(chosen.rest)
    for name, curve in chosen.curves.items():
        what, kind = name.split(".")
        state.update({f"blocks.{i}.{LAYER_TYPES[kind]}.{what}": value for i, value in enumerate(curve)})
    return Mapped(config, learngene, state, chosen.rest), dense_of(chosen)


def predict(model: DiT) -> torch.Tensor:
    x = torch.randn(3, 1, 4, 4, generator=generator_for("x"))
    return model(x, torch.tensor([0, 400, 999]), torch.tensor([0, 2, 3]))


def as_dense(model: Mapped) -> DiT:
    made = DiT(replace(model.config, factorized=None))
    made.load_state_dict(model.dense())
    return made


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("sharing", [1, 4])
def test_learned_maps_start_at_the_choice_of_rows(target: str, sharing: int) -> None:
    model, wanted = mapped_of(learngene_of(FactorConfig(TYPES, 24, sharing)), *TARGETS[target])
    found = model.dense()
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)
    torch.testing.assert_close(predict(model), predict(as_dense(model)), rtol=1e-3, atol=1e-4)


def test_learned_maps_are_what_is_tuned_and_factors_stay() -> None:
    learngene = learngene_of(FactorConfig(("qkv", "in", "out"), 32))  # the others are dense layers of the target
    model, _ = mapped_of(learngene, 48, 4)
    freeze(model, copied=learngene.rest, biases=False)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    maps = {f"width_maps.maps.{name}" for name in ("stream", "hidden", "q_inside", "k_inside", "v_inside")}
    assert trained == maps | {
        f"blocks.{layer}.{LAYER_TYPES[kind]}.sigma" for layer in (0, 1) for kind in ("qkv", "in", "out")
    }
    assert not any(name.startswith("factors.") for name in model.state_dict())


def test_moved_maps_reach_every_layer_alike() -> None:
    learngene = learngene_of(FORMS["fine"])
    model, _ = mapped_of(learngene, 48, 4)
    predict(model).square().mean().backward()
    for name, parameter in model.width_maps.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.any()), name
        noise = 0.1 * torch.randn(parameter.shape, generator=generator_for("moved", parameter.numel()))
        parameter.data.add_(noise)
    dense = as_dense(model)
    torch.testing.assert_close(predict(model), predict(dense), rtol=1e-3, atol=1e-4)
    state, stream, hidden = dense.state_dict(), model.width_maps.maps["stream"], model.width_maps.maps["hidden"]
    copies = torch.bincount(torch.arange(48) * 32 // 48)[torch.arange(48) * 32 // 48]
    for layer in (0, 1):
        sigma = learngene.curves["sigma.in"][layer]
        wanted = (hidden @ learngene.factors["in.U"] * sigma) @ (stream @ learngene.factors["in.V"]).T / copies
        torch.testing.assert_close(state[f"blocks.{layer}.mlp.fc1.weight"], wanted.detach(), rtol=1e-3, atol=1e-4)
    table = learngene.rest["y_embedder.embedding_table.weight"] @ stream.T
    torch.testing.assert_close(state["y_embedder.embedding_table.weight"], table.detach(), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A workspace, and a learngene of FINE in it whose sigma and factors have moved."""
    root = tmp_path_factory.mktemp("learned")
    options = ("--depth", 2, "--steps", 10, "--batch-size", 8, "--lr", 0.01, "--ema", 0.5, "--eval-every", 0)
    return root, run_cli("extract", run_cli("condense", *options, "--workspace", root).path, "--workspace", root).path


def init(tiny: tuple[Path, Path], *options: object) -> Path:
    root, learngene = tiny
    few = ("--depth", 1, "--tune-samples", 16, "--batch-size", 8)
    return run_cli("init", learngene, *few, *options, "--workspace", root).path


def test_learned_maps_from_the_command_line(tiny: tuple[Path, Path]) -> None:
    wide = ("--model", "dit-s")
    rows = load_weights(open_artifact(init(tiny, *wide, "--tune-steps", 0)), "ema")
    start = init(tiny, *wide, "--tune-steps", 0, "--width-map", "learned")
    assert read_manifest(start).config["width_map"] == "learned"
    for name, value in load_weights(open_artifact(start), "ema").items():
        torch.testing.assert_close(value, rows[name], rtol=1e-5, atol=1e-6, msg=name)
    tuned = init(tiny, *wide, "--tune-steps", 3, "--width-map", "learned")
    again = init(tiny, *wide, "--tune-steps", 3, "--width-map", "learned", "--grad-checkpointing", "--force")
    found, same = (load_weights(open_artifact(path), "ema") for path in (tuned, again))
    assert found.keys() == rows.keys()
    for name in ("t_embedder.mlp.0.weight", "final_layer.linear.weight", "y_embedder.embedding_table.weight"):
        assert not torch.equal(found[name], rows[name]), "embedders and final layer go through the stream's map"
        torch.testing.assert_close(found[name], same[name], rtol=1e-3, atol=1e-5)
    assert (
        read_manifest(tuned).metrics["parameters_transferred"] == read_manifest(start).metrics["parameters_transferred"]
    )


def test_without_another_width_there_is_nothing_to_learn(tiny: tuple[Path, Path]) -> None:
    plain = init(tiny, "--tune-steps", 0)
    assert init(tiny, "--tune-steps", 0, "--width-map", "learned") == plain
    assert read_manifest(plain).config["width_map"] == "rows"


def test_templates_that_do_not_tile_are_refused_in_a_dry_run(tmp_path: Path) -> None:
    place = ("--workspace", tmp_path)
    tiny = ("--model", "dit-s", "--depth", 1, "--steps", 1, "--batch-size", 4, "--eval-every", 0, "--template-size", 96)
    learngene = run_cli("extract", run_cli("condense", "--method", "wave", *tiny, *place).path, *place).path
    ran = run_cli("init", learngene, "--method", "wave", "--model", "dit-nano", "--dry-run", *place)
    assert ran.code == EXIT_USAGE and "96x96" in ran.err and "--template-size" in ran.err
