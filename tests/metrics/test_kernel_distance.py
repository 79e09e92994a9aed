"""Kernel distance against its definition and other people's programs."""

from __future__ import annotations

import json

import pytest
import torch
from make_reference_values import CASES, PATH, feature_sets

from finectl.errors import ComputationError, InputError, UsageError
from finectl.metrics.kernel_distance import kernel_distance, kernel_mmd2

VALUES = json.loads(PATH.read_text(encoding="utf-8"))["cases"]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_other_programs(case: str) -> None:
    features, reference = feature_sets(case)
    least = min(len(features), len(reference))
    measured = kernel_distance(features[:least], reference[:least], subset_size=least)
    for program, value in VALUES[case]["kid"].items():
        assert measured.value == pytest.approx(value, rel=1e-9), program
    assert measured.details["subsets"] == 1 and measured.details["subset_size"] == least
    assert measured.low < measured.value < measured.high


def test_is_the_mean_over_pairs_of_different_rows() -> None:
    x, y = normal(5, 3), normal(4, 3, seed=1) + 1

    def kernel(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(a @ b / 3 + 1) ** 3

    within_x = [kernel(x[i], x[j]) for i in range(5) for j in range(5) if i != j]
    within_y = [kernel(y[i], y[j]) for i in range(4) for j in range(4) if i != j]
    between = [kernel(a, b) for a in x for b in y]
    expected = sum(within_x) / 20 + sum(within_y) / 12 - 2 * sum(between) / 20
    assert kernel_mmd2(x, y) == pytest.approx(expected, rel=1e-12)


def test_unbiased_for_equal_distributions_and_growing_with_a_shift() -> None:
    values = [kernel_mmd2(normal(30, 4, seed=2 * seed), normal(30, 4, seed=2 * seed + 1)) for seed in range(300)]
    drawn = torch.tensor(values)
    assert abs(float(drawn.mean())) < 3 * float(drawn.std()) / 300**0.5
    assert min(values) < 0
    shifted = [kernel_mmd2(normal(50, 4) + shift, normal(50, 4, seed=1)) for shift in (0, 0.5, 1, 2)]
    assert shifted == sorted(shifted)


def test_subsets_are_drawn_from_the_seed() -> None:
    x, y = normal(60, 4), normal(80, 4, seed=1) + 0.5
    first = kernel_distance(x, y, subsets=20, subset_size=30, seed=3)
    assert first == kernel_distance(x, y, subsets=20, subset_size=30, seed=3)
    assert first.value != kernel_distance(x, y, subsets=20, subset_size=30, seed=4).value
    assert first.details.keys() == {"n", "subsets", "subset_size", "seed", "std"}
    assert (first.details["n"], first.details["subsets"], first.details["subset_size"]) == (60, 20, 30)
    many = kernel_distance(x, y, subsets=2000, subset_size=30)
    assert many.value == pytest.approx(kernel_mmd2(x, y), abs=5 * many.details["std"] / 2000**0.5)


def test_small_sets_have_subsets_of_their_size() -> None:
    x, y = normal(40, 4), normal(50, 4, seed=1)
    small = kernel_distance(x, y, subsets=3)
    assert (small.details["subsets"], small.details["subset_size"]) == (3, 40)
    whole = kernel_distance(x, y[:40])
    assert (whole.details["subsets"], whole.details["std"]) == (1, 0)
    assert whole.value == kernel_mmd2(x, y[:40])


@pytest.mark.parametrize(("subsets", "size"), [(10, 50), (1, 50), (20, 200)])
def test_the_interval_is_that_of_repeated_draws(subsets: int, size: int) -> None:
    reference = normal(200, 4, seed=1000)
    measured = [kernel_distance(normal(200, 4, seed=seed) + 0.5, reference, subsets, size, seed) for seed in range(150)]
    errors = torch.tensor([(one.high - one.value) / 1.959964 for one in measured])
    spread = float(torch.tensor([one.value for one in measured]).std())
    assert float(errors.mean()) == pytest.approx(spread, rel=0.2)


def test_the_order_of_rows_does_not_matter_to_whole_sets() -> None:
    x, y = normal(40, 4), normal(40, 4, seed=1)
    assert kernel_mmd2(x.flip(0), y.roll(3, 0)) == pytest.approx(kernel_mmd2(x, y), rel=1e-9)


def test_float32_features_are_measured_in_float64() -> None:
    x, y = normal(40, 4).float() + 30, normal(40, 4, seed=1).float() + 30
    assert kernel_mmd2(x, y) == kernel_mmd2(x.double(), y.double())


def test_wrong_inputs_are_refused() -> None:
    with pytest.raises(InputError, match="compared with"):
        kernel_distance(normal(5, 3), normal(5, 4))
    with pytest.raises(InputError, match="1 and 5 images"):
        kernel_distance(normal(1, 3), normal(5, 3))
    with pytest.raises(UsageError, match="0 subsets"):
        kernel_distance(normal(5, 3), normal(5, 3), subsets=0)
    with pytest.raises(UsageError, match="of 1 images"):
        kernel_distance(normal(5, 3), normal(5, 3), subset_size=1)
    with pytest.raises(ComputationError, match="not finite"):
        kernel_mmd2(normal(5, 3) * torch.nan, normal(5, 3))
