"""Second moments of the inputs of a model's layers."""

from __future__ import annotations

import pytest
import torch

from finectl.data.dataset import load
from finectl.models.dit import DiT, initialize_
from finectl.models.presets import LAYER_TYPES, preset
from finectl.training.moments import input_moments


def model() -> DiT:
    config = preset("dit-nano", image_size=8, channels=1, num_classes=10, depth=2)
    return initialize_(DiT(config), torch.Generator().manual_seed(0))


def test_shapes_and_that_they_are_moments() -> None:
    moments = input_moments(model(), load("digits"), seed=0, device=torch.device("cpu"), images=128)
    assert set(moments) == set(LAYER_TYPES)
    for kind, value in moments.items():
        size = 256 if kind == "out" else 64
        assert value.shape == (2, size, size) and value.dtype == torch.float64
        torch.testing.assert_close(value, value.transpose(1, 2))
        assert float(torch.linalg.eigvalsh(value).min()) > -1e-9
    # Inputs of an untrained block are tokens normalised to unit variance: the mean square of an entry is 1.
    assert float(moments["qkv"][0].diagonal().mean()) == pytest.approx(1.0, abs=1e-3)
    torch.testing.assert_close(moments["adaln"][0], moments["adaln"][1])  # one condition for all layers


def test_they_depend_on_the_seed_alone_and_leave_no_hooks() -> None:
    data, device, net = load("digits"), torch.device("cpu"), model()
    first, again, other = (input_moments(net, data, seed=s, device=device, images=64)["in"] for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_it_can_be_stopped_between_batches() -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    net = model()
    with pytest.raises(KeyboardInterrupt):
        input_moments(net, load("digits"), seed=0, device=torch.device("cpu"), images=64, between=stop)
    assert not any(module._forward_pre_hooks for module in net.modules())
