"""Timesteps of a range: how often they fall into it, their mirror images, and what they depend on."""

from __future__ import annotations

import math

import pytest
import torch

from finectl.diffusion.random import generator_for
from finectl.diffusion.schedule import NoiseSchedule
from finectl.training.timesteps import COINS, RangeTimesteps

SCHEDULE = NoiseSchedule.linear()
BATCH = 16


def drawn(timesteps: RangeTimesteps, steps: int, count: int = BATCH) -> torch.Tensor:
    """Return (steps, count) timesteps."""
    batches = [timesteps(count, SCHEDULE, step=step, generator=generator_for("test", 0, step)) for step in range(steps)]
    return torch.stack(batches)


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("coin", COINS)
@pytest.mark.parametrize(("p", "count"), [(0.4, 4), (0.3, 4), (0.0, 4), (1.0, 4), (0.5, 8)])
def test_how_often_they_fall_into_the_range(p: float, count: int, coin: str, antithetic: bool) -> None:
    first = 1000 // count
    t = drawn(RangeTimesteps(first, 2 * first, p, coin, antithetic), 2000)
    assert t.dtype == torch.int64 and int(t.min()) >= 0 and int(t.max()) < 1000
    inside = ((t >= first) & (t < 2 * first)).double()
    expected = (1 - p) + p / count
    # Draws of one coin are not independent: their mean over a step's draws is.
    error = float(inside.mean(1).std()) / math.sqrt(len(inside))
    assert abs(float(inside.mean()) - expected) <= 3 * error + 1e-12
    if p == 0:
        assert bool(inside.all())


def test_one_coin_decides_for_a_batch_or_for_a_sample() -> None:
    first, end = 250, 500
    all_inside = {}
    for coin in COINS:
        t = drawn(RangeTimesteps(first, end, 0.4, coin), 500)
        all_inside[coin] = float(((t >= first) & (t < end)).all(1).double().mean())
    assert all_inside["batch"] == pytest.approx(0.6, abs=0.07)
    assert all_inside["sample"] < 0.02


@pytest.mark.parametrize("count", [1, 2, 7, 16])
@pytest.mark.parametrize("coin", COINS)
def test_antithetic_pairs_mirror_each_other(coin: str, count: int) -> None:
    first, end, half = 250, 500, (count + 1) // 2
    t = drawn(RangeTimesteps(first, end, 0.5, coin, antithetic=True), 300, count)
    assert t.shape == (300, count)
    sums = (t[:, :half][:, : count - half] + t[:, half:]).flatten()
    assert set(sums.tolist()) <= {first + end - 1, 999}
    if count > 1:
        assert set(sums.tolist()) == {first + end - 1, 999}
    local = drawn(RangeTimesteps(first, end, 0.0, coin, antithetic=True), 50, count)
    assert bool((local[:, : count - half] + local[:, half:] == first + end - 1).all())


def test_they_depend_on_the_generator_alone() -> None:
    timesteps = RangeTimesteps(0, 250, 0.4, "sample", antithetic=True)
    one, two = (timesteps(9, SCHEDULE, step=step, generator=generator_for("test", 5)) for step in (3, 8))
    assert torch.equal(one, two)
    other = timesteps(9, SCHEDULE, step=3, generator=generator_for("test", 6))
    assert not torch.equal(one, other)


def test_every_timestep_of_the_range_comes_up() -> None:
    t = drawn(RangeTimesteps(990, 1000, 0.0), 100)
    assert set(t.flatten().tolist()) == set(range(990, 1000))
