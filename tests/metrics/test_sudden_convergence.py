"""The rule of sudden convergence on curves whose answer is known."""

from __future__ import annotations

import random

import pytest

from finectl.metrics.sudden_convergence import smoothed, sudden_convergence


def curve(values: list[float], every: int = 100) -> list[tuple[int, float]]:
    return [(every * index, value) for index, value in enumerate(values)]


def noisy(values: list[float], noise: float, seed: int) -> list[float]:
    draw = random.Random(seed)
    return [value + draw.gauss(0.0, noise) for value in values]


def test_a_step_is_found_where_it_is_with_the_midpoint_as_threshold() -> None:
    found = sudden_convergence(curve([4.0] * 6 + [2.0] * 6))
    assert found is not None
    assert (found.drop_at, found.before, found.after, found.threshold, found.noise) == (600, 4.0, 2.0, 3.0, 0.0)
    # Smoothed, the values at 500 and 600 are 3.33 and 2.67.
    assert found.step == 600
    assert found.to_dict()["step"] == 600


def test_a_late_return_moves_the_step_behind_it() -> None:
    values = [4.0] * 6 + [2.0, 2.0, 2.0, 3.9, 3.9, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    found = sudden_convergence(curve(values))
    assert found is not None and found.drop_at == 600 and found.step == 1100
    assert all(value < found.threshold for value in smoothed(values)[11:])
    assert sudden_convergence(curve([4.0] * 6 + [2.0] * 6 + [4.0, 4.0])) is None, "it does not stay below"


@pytest.mark.parametrize("seed", range(20))
def test_noise_and_a_straight_decline_are_no_convergence_and_a_fall_above_noise_is(seed: int) -> None:
    assert sudden_convergence(curve(noisy([1.0] * 30, 0.1, seed))) is None
    assert sudden_convergence(curve([1.0 - 0.02 * index for index in range(30)])) is None
    found = sudden_convergence(curve(noisy([1.0] * 14 + [0.0] * 16, 0.08, seed)))
    assert found is not None and abs(found.step - 1400) <= 100 and found.drop_at == 1400
    assert 0.4 < found.threshold < 0.6 and 0.03 < found.noise < 0.2


def test_a_rise_few_values_and_a_flat_curve_are_none() -> None:
    assert sudden_convergence(curve([2.0] * 6 + [4.0] * 6)) is None
    assert sudden_convergence(curve([4.0, 2.0, 2.0])) is None
    assert sudden_convergence(curve([])) is None
    assert sudden_convergence(curve([1.0] * 10)) is None


def test_a_fall_by_some_percent_is_wandering() -> None:
    assert sudden_convergence(curve([1.0] * 8 + [0.92] * 8)) is None
    found = sudden_convergence(curve([1.0] * 8 + [0.88] * 8))
    assert found is not None and found.step == 800
    # Measured: the number of edges had come to be right, their places had not.
    wandering = [
        0.447,
        0.447,
        0.454,
        0.452,
        0.450,
        0.444,
        0.446,
        0.438,
        0.440,
        0.445,
        0.429,
        0.429,
        0.432,
        0.439,
        0.439,
    ]
    wandering += [0.435, 0.439, 0.444, 0.445, 0.436, 0.424, 0.426, 0.426, 0.423, 0.422, 0.434, 0.427, 0.425, 0.424]
    assert sudden_convergence(curve(wandering, 50)) is None


def test_the_first_value_may_be_the_only_one_before_the_fall() -> None:
    found = sudden_convergence(curve([4.0] + [2.0] * 8))
    assert found is not None and found.drop_at == 100 and found.before == 4.0
    assert smoothed([1.0, 2.0, 6.0]) == [1.5, 3.0, 4.0]
