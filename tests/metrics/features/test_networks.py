"""What the extractors of others' networks share."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from finectl.errors import InputError
from finectl.metrics.features.networks import computing, fit, require_packages, uninitialised

CPU = torch.device("cpu")


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    require_packages(["torch", "json"], "x")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "open_clip" else find(name))
    with pytest.raises(InputError, match="a CLIP model needs open_clip, not installed") as caught:
        require_packages(["json", "open_clip"], "a CLIP model")
    assert caught.value.fix == "pip install 'finectl[vision]'"


def test_networks_without_draws_are_whole_and_leave_the_random_numbers_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with uninitialised():
        net = nn.Sequential(nn.Linear(300, 300), nn.LayerNorm(300), nn.Conv2d(3, 4, 5), nn.Embedding(7, 8))
        noise, mask = torch.randn(2, 3), torch.empty(3, 3).fill_(-1).triu_(1)
        # A truncated normal is drawn until it is in range, which must come to an end whatever the memory held.
        left = nn.init.kaiming_uniform_(torch.full((2, 2), 3.0)) + nn.init.normal_(torch.full((2, 2), 4.0))
        rest = nn.init.trunc_normal_(torch.full((50,), 1e9), std=0.02)
    assert torch.equal(torch.get_rng_state(), before)
    assert {name: tuple(value.shape) for name, value in net.named_parameters()}["2.weight"] == (4, 3, 5, 5)
    assert left.tolist() == [[7.0, 7.0], [7.0, 7.0]]
    assert noise.shape == (2, 3) and rest.abs().max() <= 2 and mask.tolist() == [[0, -1, -1], [0, 0, -1], [0, 0, 0]]
    assert float(nn.Linear(300, 300).weight.detach().std()) > 0.01 and not torch.equal(torch.get_rng_state(), before)


def test_a_state_is_fitted_whatever_its_dtype() -> None:
    with uninitialised():
        net = nn.Linear(3, 2)
    state = {"weight": torch.full((2, 3), 2.0, dtype=torch.float16), "bias": torch.ones(2, dtype=torch.float64)}
    fit(net, state, Path("x"), "a layer")
    assert net.float()(torch.ones(1, 3)).tolist() == [[7.0, 7.0]]


def test_the_first_faults_are_shown_and_the_others_counted() -> None:
    with pytest.raises(InputError) as caught:
        fit(nn.Linear(3, 2), {f"t{i}": torch.ones(1) for i in range(9)}, Path("w.pth"), "a layer")
    assert "w.pth does not fit a layer: weight is missing; bias is missing; t0 has no place in it and 8 more" in str(
        caught.value
    )
    assert "2 tensors" in caught.value.expected


def test_float32_is_true_float32_and_what_others_have_set_comes_back() -> None:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    kept = matmul.allow_tf32, cudnn.allow_tf32
    try:
        matmul.allow_tf32, cudnn.allow_tf32 = True, True
        with pytest.raises(ValueError, match="x"), computing(CPU, "float32"):
            assert not matmul.allow_tf32 and not cudnn.allow_tf32 and torch.is_inference_mode_enabled()
            raise ValueError("x")
        assert matmul.allow_tf32 and cudnn.allow_tf32
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = kept
    ones = torch.ones(2, 2)
    with computing(CPU, "float32"):
        assert (ones @ ones).dtype == torch.float32
    with computing(CPU, "bfloat16"):
        assert (ones @ ones).dtype == torch.bfloat16
