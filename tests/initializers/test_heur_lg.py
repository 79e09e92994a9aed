"""Heur-LG by gradients: the share of large entries, its changes over checkpoints, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from support import run_cli
from torch import Tensor

from finectl.artifacts.manifest import read_manifest
from finectl.artifacts.store import open_artifact
from finectl.data.dataset import load
from finectl.errors import EXIT_INPUT, EXIT_USAGE
from finectl.initializers.heur_lg import changes, large_share, on_top
from finectl.models.dit import Block, DiT, dense_state_dict
from finectl.models.io import checkpoints, load_model, load_weights, read_dit_config
from finectl.models.learngene import dense_config
from finectl.models.presets import LAYER_TYPES
from finectl.training.probe import probes

DEPTH = 4
TRAINING = ("--steps", 8, "--batch-size", 8, "--lr", 0.01, "--warmup-steps", 0, "--ema", 0.5)
GRADIENTS = ("--method", "heur-lg", "--variant", "gradients")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A workspace, a dense model and a condensed one, both with three checkpoints before the last."""
    root = tmp_path_factory.mktemp("heur")
    place = ("--keep-every", 2, "--workspace", root)
    start = run_cli("init", "--method", "he", "--model", "dit-nano", "--depth", DEPTH, "--workspace", root).path
    dense = run_cli("train", start, *TRAINING, *place).path
    condensed = run_cli("condense", "--depth", DEPTH, *TRAINING, *place).path
    return root, dense, condensed


def init(trained: Any, source: Path, *options: object) -> Any:
    return run_cli("init", source, *GRADIENTS, *options, "--workspace", trained[0])


def test_the_lowest_scores_go_on_top_in_order() -> None:
    scores = [0.5, 0.1, 0.4, 0.2, 0.3]
    assert on_top(scores, 4, 3) == {1: 1, 2: 3, 3: 4}
    assert on_top(scores, 2, 3) == {0: 1, 1: 3}
    assert on_top(scores, 8, 5) == {3: 0, 4: 1, 5: 2, 6: 3, 7: 4}
    assert on_top([0.0] * 4, 3, 2) == {1: 0, 2: 1}


def test_a_score_is_the_mean_absolute_change() -> None:
    shares = torch.tensor([[0.0, 0.5], [0.4, 0.5], [0.2, 0.8]], dtype=torch.float64)
    assert changes(shares) == pytest.approx([0.3, 0.15])


def test_the_share_counts_entries_of_the_matrices_above_the_threshold(trained: Any) -> None:
    model = cast(DiT, load_model(open_artifact(trained[1])))
    block = cast(Block, model.blocks[0])
    entries = 0
    for path in LAYER_TYPES.values():
        layer = block.get_submodule(path)
        layer.weight.grad, layer.bias.grad = torch.zeros(layer.weight.shape), torch.ones(layer.bias.shape)
        entries += layer.weight.numel()
    assert large_share(block, 0.1) == 0, "biases do not count"
    cast(Tensor, block.attn.proj.weight.grad)[0, :4] = torch.tensor([0.2, -0.2, 0.1, 0.05])
    assert large_share(block, 0.1) == pytest.approx(2 / entries)


def share_by_hand(source: Path, checkpoint: int | None, tau: float, batches: int) -> list[float]:
    """The noise schedule written out, and gradients by another way."""
    artifact = open_artifact(source)
    config, state = read_dit_config(artifact), load_weights(artifact, "ema", checkpoint)
    model = DiT(dense_config(config, config.depth))
    model.load_state_dict(dense_state_dict(state, config) if config.factorized else state)
    fixed = probes(
        load("digits", "train"),
        "init-heur-lg",
        batches=batches,
        batch_size=64,
        timesteps=1000,
        seed=0,
        device=torch.device("cpu"),
    )
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    kept = torch.cumprod(1 - betas, 0)
    found = torch.zeros(config.depth, dtype=torch.float64)
    for x0, y, t, noise in fixed:
        a = kept[t].float()[:, None, None, None]
        loss = (model(a.sqrt() * x0 + (1 - a).sqrt() * noise, t, y) - noise).square().mean()
        for index, block in enumerate(model.blocks):
            weights = [block.get_submodule(path).weight for path in LAYER_TYPES.values()]
            entries = torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights, retain_graph=True)])
            found[index] += (entries.abs() > tau).double().mean() / batches
    return found.tolist()


@pytest.mark.parametrize(("kind", "tau"), [("dense", 3e-5), ("condensed", 1e-3)])
def test_the_layers_that_change_least_are_taken(trained: Any, kind: str, tau: float) -> None:
    source = trained[1] if kind == "dense" else trained[2]
    batches, kept = 2, 2
    artifact = open_artifact(source)
    series = [*checkpoints(artifact), None]
    assert series == [2, 4, 6, None]
    rows = torch.tensor([share_by_hand(source, checkpoint, tau, batches) for checkpoint in series])
    assert 0.01 < float(rows.mean()) < 0.99
    scores = rows.diff(dim=0).abs().mean(0)
    chosen = sorted(scores.argsort()[:kept].tolist())
    depth = 3
    ran = init(trained, source, "--depth", depth, "--set", f"layers={kept},tau={tau},batches={batches}")
    found = load_weights(open_artifact(ran.path), "ema")
    config, state = read_dit_config(artifact), load_weights(artifact, "ema")
    whole = dense_state_dict(state, config) if config.factorized else state
    for place, layer in zip(range(depth - kept, depth), chosen, strict=True):
        for path in LAYER_TYPES.values():
            wanted = whole[f"blocks.{layer}.{path}.weight"]
            assert torch.equal(found[f"blocks.{place}.{path}.weight"], wanted), (place, layer)
    assert not bool(found["blocks.0.adaLN_modulation.1.weight"].any()), "what lies below starts anew"
    assert f"layers {', '.join(str(layer + 1) for layer in chosen)} are taken" in ran.err
    cost = read_manifest(ran.path).cost
    assert cost["steps"] == 0 and cost["samples"] == len(series) * batches * 64 and cost["wall_s"] > 0


def test_a_threshold_that_tells_nothing_apart_is_said(trained: Any) -> None:
    ran = init(trained, trained[1], "--depth", 2, "--set", "tau=1e6,batches=1")
    assert ran.code == 0 and "hardly tells layers apart" in ran.err
    assert "hardly" not in init(trained, trained[1], "--depth", 2, "--set", "tau=3e-5,batches=1").err


def test_the_data_of_the_gradients_is_the_ancestors(trained: Any) -> None:
    own = init(trained, trained[1], "--depth", 2, "--set", "batches=1").path
    photos = ("--data", "photos", "--image-size", 16)
    other = init(trained, trained[1], "--depth", 2, "--set", "batches=1", *photos).path
    one, two = (load_weights(open_artifact(path), "ema") for path in (own, other))
    assert all(torch.equal(value, two[name]) for name, value in one.items() if name.startswith("blocks."))


def test_an_ancestor_without_checkpoints_is_refused_with_the_command_that_makes_some(trained: Any) -> None:
    root, dense, _ = trained
    bare = run_cli("train", dense, *TRAINING, "--workspace", root).path
    single = run_cli("train", dense, *TRAINING, "--keep-every", 5, "--workspace", root).path
    for source, count in ((bare, 0), (single, 1)):
        ran = init(trained, source, "--depth", 2)
        assert ran.code == EXIT_INPUT and f"keeps {count}" in ran.err
        assert "expected:" in ran.err and "--keep-every N" in ran.err and "finectl train" in ran.err
    never = run_cli("init", dense, "--method", "he", "--workspace", root).path
    assert f"finectl train {never} --keep-every N" in init(trained, never, "--depth", 2).err


def test_batches_are_counted_in_whole_numbers(trained: Any) -> None:
    ran = init(trained, trained[1], "--depth", 2, "--set", "batches=0.5")
    assert ran.code == EXIT_USAGE and "batches=0.5" in ran.err
