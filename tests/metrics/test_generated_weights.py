"""What is told of generated weights: R^2, norms, and whether they are copies."""

from __future__ import annotations

import pytest
import torch

from finectl.adapters.lora import LoraLayer
from finectl.metrics.generated_weights import Memorisation, health, norm_ratios, r_squared, spread
from finectl.models.weights.layout import Layout

LAYERS = [LoraLayer("a", "linear", (1, 4), (4, 1)), LoraLayer("b", "linear", (1, 8), (8, 1))]


def drawn(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 2, 16, generator=torch.Generator().manual_seed(seed))


def test_r_squared_is_one_for_the_weights_and_zero_for_the_mean() -> None:
    wanted = drawn(3, 0)
    assert r_squared(wanted, wanted) == 1.0
    assert r_squared(torch.zeros_like(wanted), wanted) == 0.0
    assert r_squared(0.5 * wanted, wanted) == pytest.approx(0.75)
    assert r_squared(-wanted, wanted) == pytest.approx(-3.0)


def test_norms_are_those_of_each_layer() -> None:
    layout = Layout.of(LAYERS, 1, 16)
    wanted = drawn(3, 0)
    predicted = wanted.clone()
    predicted[:, 1] *= 0.5
    assert norm_ratios(layout, predicted, wanted) == {"a": 1.0, "b": 0.5}


def test_copies_are_told_from_new_weights() -> None:
    training, own = drawn(10, 0), drawn(3, 1)
    copies = Memorisation.of(training[:3], own, training)
    assert copies.nearest == pytest.approx(0.0, abs=1e-4)
    assert copies.to_dict()["nearest_over_between"] == pytest.approx(0.0, abs=1e-4)
    new = Memorisation.of(own, own, training)
    assert new.own == pytest.approx(0.0, abs=1e-4)
    assert new.to_dict()["nearest_over_between"] > 0.7
    alone = training[:1]
    assert Memorisation.of(alone, alone, alone).between != Memorisation.of(alone, alone, alone).between


def test_health_of_every_split() -> None:
    layout = Layout.of(LAYERS, 1, 16)
    training, mean, scale = drawn(10, 0), drawn(1, 5)[0], torch.full((2, 16), 2.0)
    predicted = {"train": training.clone(), "test": mean.expand(4, 2, 16)}
    found = health(layout, predicted, {"train": training, "test": drawn(4, 6)}, mean, scale, training)
    assert found["train"]["r2"] == 1.0 and found["test"]["r2"] == 0.0
    assert found["test"]["concepts"] == 4 and set(found["train"]["norm_ratio"]) == {"a", "b"}


def test_timesteps_are_spread_over_a_range() -> None:
    assert list(spread(400, 1000, 7)) == [400, 500, 600, 700, 799, 899, 999]
    assert list(spread(5, 7, 7)) == [5, 6]
    assert list(spread(5, 6, 3)) == [5]
