"""Floating-point operations of training, against what a counter sees in real passes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fitting import CONFIG, images, model, run
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from finectl.adapters.peft.table import PeftOptions
from finectl.adapters.peft.tuning import tune
from finectl.artifacts.manifest import read_manifest
from finectl.artifacts.store import open_artifact
from finectl.models.dit import DiT
from finectl.models.io import ModelConfig, build_model, load_model
from finectl.models.presets import DiTConfig, FactorConfig
from finectl.models.unet_config import UNetConfig
from finectl.training import flops
from finectl.training.batches import Batches
from finectl.training.distill import Distillation
from finectl.training.estimate import forward_flops
from finectl.training.flops import count_forward, part_sizes, training_flops, update_operations
from finectl.training.loop import plain_loss
from finectl.world import World

DENSE = replace(CONFIG, factorized=None)
ALL = FactorConfig(("qkv", "o", "in", "out", "adaln"), 12)
UNET = UNetConfig(
    "unet2d",
    {
        "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": [8, 16],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4,
    },
    image_size=8,
    channels=1,
    parameters=1,
)  # fmt: skip


def seen(config: ModelConfig, count: int, trained: Any = None, *, backward: bool = False) -> int:
    """Count what a real network does."""
    net = build_model(config).train()
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(trained is None or name in trained)
    return counted(net, count, backward=backward)


def counted(net: Any, count: int, *, backward: bool = False) -> int:
    """Count what a network does."""
    config = net.config
    x = torch.randn(count, config.channels, config.image_size, config.image_size)
    zeros = torch.zeros(count, dtype=torch.int64)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = net(x, zeros, zeros)
        if backward:
            output.square().mean().backward()
    net.zero_grad(set_to_none=True)
    assert counter.get_total_flops() > 0
    return int(counter.get_total_flops())


@pytest.mark.parametrize("learn_sigma", [False, True])
@pytest.mark.parametrize("depth", [1, 3])
def test_the_formula_of_a_dense_transformer_is_exact(depth: int, learn_sigma: bool) -> None:
    config = DiTConfig(48, depth, 4, 2, 16, 3, 10, learn_sigma=learn_sigma)
    assert count_forward(config, 2) == 2 * forward_flops(config) == seen(config, 2)


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 8, 64])
@pytest.mark.parametrize("factors", [FactorConfig(("qkv", "out"), 8), ALL])
def test_a_factorised_model_counts_what_it_computes(factors: FactorConfig, count: int, depth: int) -> None:
    config = replace(CONFIG, depth=depth, factorized=factors)
    assert count_forward(config, count) == seen(config, count)


def test_what_is_frozen_decides_how_a_layer_computes() -> None:
    """As in the tuning of sigma; a frozen adaln that is not factorised makes the first layer differ from the others."""
    for config in (replace(CONFIG, depth=4, factorized=ALL), replace(CONFIG, depth=4)):
        names = [name for name, _ in build_model(config).named_parameters() if name.endswith(".sigma")]
        for count in (1, 16, 128):
            assert count_forward(config, count, names) == seen(config, count, names)


def test_a_unet_is_counted_an_image() -> None:
    assert count_forward(UNET, 3) == seen(UNET, 3)
    conditioned = replace(UNET, num_classes=2, sigma_data=0.5, network={**UNET.network, "num_class_embeds": 2})
    assert count_forward(conditioned, 2) == seen(conditioned, 2)


@pytest.mark.parametrize("method", ["lora", "difffit", "bitfit", "adaptformer", "vpt"])
def test_frozen_weights_of_a_transformer_take_no_gradient(method: str) -> None:
    _check_adapted(DiTConfig(64, 4, 4, 2, 16, 3, 10), method)


@pytest.mark.parametrize("method", ["lora", "bitfit"])
@pytest.mark.parametrize("sigma_data", [None, 0.5])
def test_frozen_weights_of_a_unet_take_no_gradient(sigma_data: float | None, method: str) -> None:
    _check_adapted(replace(UNET, sigma_data=sigma_data), method)


def _check_adapted(config: ModelConfig, method: str) -> None:
    net = build_model(config)
    tune(net, PeftOptions(method), seed=0)
    net.eval()
    before, state = torch.random.get_rng_state(), {name: value.clone() for name, value in net.state_dict().items()}
    one = update_operations(net)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert one == counted(net, 1, backward=True) == counted(net, 3, backward=True) // 3
    assert 1.9 < one / counted(net, 1) < 2.4


def test_what_is_not_frozen_at_all_is_counted_by_its_architecture() -> None:
    assert update_operations(build_model(UNET)) is None
    assert update_operations(model(CONFIG)) is None


def test_tuning_of_sigma_counts_its_own_backward_pass() -> None:
    config = replace(CONFIG, depth=4, factorized=ALL)
    net = build_model(config)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name.endswith(".sigma"))
    assert update_operations(net) is None, "its layers take another way with another number of images"
    batches = Batches(images(), 13, 0, torch.device("cpu"), World(), parts=3)
    expected = 10 * (counted(net, 5, backward=True) + 2 * counted(net, 4, backward=True))
    assert training_flops(net, plain_loss, batches, 10) == expected


def test_a_run_with_frozen_weights_says_what_it_took(tmp_path: Path) -> None:
    net = DiT(DENSE)
    tune(net, PeftOptions("lora"), seed=0)
    expected = 10 * 8 * counted(net, 1, backward=True)
    assert run(tmp_path, start=net).cost["flops"] == expected


def test_a_backward_pass_takes_about_two_forward_ones() -> None:
    for config in (DiTConfig(64, 4, 4, 2, 16, 3, 10), UNET):
        assert seen(config, 4, backward=True) == pytest.approx(3 * seen(config, 4), rel=0.06)


def test_counting_changes_no_random_numbers_and_no_defaults() -> None:
    before = torch.random.get_rng_state()
    count_forward(UNET, 1)
    count_forward(CONFIG, 1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.zeros(1).sum().item() == 0.0


@pytest.mark.parametrize(("batch_size", "size", "parts"), [(13, 2, 3), (8, 1, 1), (9, 4, 2)])
def test_the_parts_of_all_processes_are_a_batch(batch_size: int, size: int, parts: int) -> None:
    def batches(rank: int) -> Batches:
        return Batches(images(), batch_size, 0, torch.device("cpu"), World(rank, size), parts=parts)

    sizes = [slots.stop - slots.start for rank in range(size) for slots in batches(rank).slots]
    assert part_sizes(batches(0)) == Counter(sizes) and sum(sizes) == batch_size


def test_training_costs_three_forward_passes_an_image(tmp_path: Path) -> None:
    dense = run(tmp_path / "dense", start=DiT(DENSE))
    assert dense.cost["flops"] == 3 * 10 * 8 * forward_flops(DENSE)
    shared = run(tmp_path / "shared", execution={"accumulate": 3})
    assert shared.cost["flops"] == 3 * 10 * (2 * seen(CONFIG, 3) + seen(CONFIG, 2))
    with pytest.raises(BaseException, match="saved"):
        run(tmp_path / "again", start=DiT(DENSE), stop_after=4)
    assert run(tmp_path / "again", start=DiT(DENSE)).cost["flops"] == dense.cost["flops"]


def test_distillation_counts_the_ancestor_and_the_layers_that_run(tmp_path: Path) -> None:
    config = replace(CONFIG, depth=4)
    student, teacher = model(config), DiT(replace(DENSE, depth=4))
    loss = Distillation(teacher, student, 6, 0)
    assert len({len(loss.layers(step)) for step in range(6)}) > 1
    forwards = []

    def counted(*arguments: Any, step: int) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            losses = loss(*arguments, step=step)
        forwards.append(counter.get_total_flops())
        return losses

    run(tmp_path, start=student, loss=counted)
    batches = Batches(images(), 8, 0, torch.device("cpu"), World())
    ancestor = 6 * 8 * forward_flops(teacher.config)
    assert training_flops(student, loss, batches, 10) == 3 * (sum(forwards) - ancestor) + ancestor


def test_a_network_that_cannot_be_followed_is_trained_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Reads(DiT):
        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return super().forward(x, t + int(y.sum().item() > 1e9), y)

    monkeypatch.setattr(flops, "build_model", Reads)
    assert count_forward(CONFIG, 2) is None
    trained = run(tmp_path)
    assert trained.cost["flops"] is None and trained.cost["steps"] == 10


def test_every_stage_that_trains_says_what_it_took(chain: Any) -> None:
    for path in (chain.condensed, chain.init, chain.model):
        cost = read_manifest(path).cost
        assert cost["flops"] > 0 and cost["samples"] == 8 * cost["steps"], path
    batches = Batches(images(), 8, 0, torch.device("cpu"), World())
    trained = open_artifact(chain.model)
    assert trained.manifest.cost["flops"] == training_flops(load_model(trained), plain_loss, batches, 3)
