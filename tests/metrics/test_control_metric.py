"""Dissimilarities of controls."""

from __future__ import annotations

import pytest
import torch

from finectl.data.controls import CONTROLS
from finectl.metrics.control import DISSIMILARITIES, disagreement, squared_error, structural


def maps(count: int = 3, channels: int = 1, side: int = 16) -> torch.Tensor:
    return torch.randint(0, 256, (count, channels, side, side), generator=torch.Generator().manual_seed(0)).byte()


@pytest.mark.parametrize("name", list(DISSIMILARITIES))
def test_the_same_maps_are_0_and_others_more(name: str) -> None:
    one = maps(channels=3)
    found = DISSIMILARITIES[name](one, one)
    assert found.shape == (3,) and found.dtype == torch.float64 and torch.allclose(found, torch.zeros(3).double())
    assert bool((DISSIMILARITIES[name](one, one.flip(-1)) > 0.05).all())


def test_values_in_closed_form() -> None:
    black, white = torch.zeros(1, 1, 8, 8).byte(), torch.full((1, 1, 8, 8), 255).byte()
    half = black.clone()
    half[..., :4] = 255
    assert squared_error(black, white).item() == 1.0 and squared_error(half, white).item() == 0.5
    assert structural(black, black).item() == pytest.approx(0.0) and structural(black, white).item() > 0.49
    classes = torch.zeros(1, 3, 4, 4).byte()
    other = classes.clone()
    other[:, 1, 0, 0] = 7
    assert disagreement(classes, other).item() == 1 / 16


def test_maps_smaller_than_the_window_are_compared() -> None:
    one = maps(side=4)
    assert torch.allclose(structural(one, one), torch.zeros(3).double())


def test_every_control_names_measures_that_there_are() -> None:
    assert all(set(control.measures) <= set(DISSIMILARITIES) for control in CONTROLS._entries.values())
