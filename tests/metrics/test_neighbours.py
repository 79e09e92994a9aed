"""Precision, recall, density and coverage against torch-fidelity, direct counting and known cases."""

from __future__ import annotations

import json

import pytest
import torch
from make_reference_values import CASES, PATH, feature_sets

from finectl.errors import ComputationError, InputError, UsageError
from finectl.metrics import neighbours
from finectl.metrics.accuracy import wilson_interval
from finectl.metrics.neighbours import neighbour_metrics, neighbourhoods

VALUES = json.loads(PATH.read_text(encoding="utf-8"))["cases"]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_torch_fidelity(case: str) -> None:
    measured = neighbour_metrics(*feature_sets(case))
    for name in ("precision", "recall"):  # torch-fidelity rounds these to float32
        assert measured[name].value == pytest.approx(VALUES[case][name], rel=1e-6)


def test_counts_what_the_definitions_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "BLOCK_ELEMENTS", 7 * 40)
    x, y = 1.2 * normal(33, 3) + 1.0, normal(40, 3, seed=1)

    def distance(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a - b).norm())

    def radius(rows: torch.Tensor, index: int, k: int) -> float:
        return sorted(distance(rows[index], rows[other]) for other in range(len(rows)) if other != index)[k - 1]

    near, wide = [radius(y, j, 3) for j in range(40)], [radius(y, j, 5) for j in range(40)]
    reach = [radius(x, i, 3) for i in range(33)]
    torch.testing.assert_close(neighbourhoods(y, 5), torch.tensor(wide, dtype=torch.float64), rtol=1e-12, atol=0)
    measured = neighbour_metrics(x, y)
    precise = sum(any(distance(a, b) <= r for b, r in zip(y, near, strict=True)) for a in x)
    recalled = sum(any(distance(a, b) <= r for a, r in zip(x, reach, strict=True)) for b in y)
    holding = [sum(distance(a, b) <= r for b, r in zip(y, wide, strict=True)) for a in x]
    covered = sum(any(distance(a, b) <= r for a in x) for b, r in zip(y, wide, strict=True))
    assert 0 < precise < 33 and 0 < recalled < 40 and 0 < covered < 40
    assert {name: one.value for name, one in measured.items()} == pytest.approx(
        {"precision": precise / 33, "recall": recalled / 40, "density": sum(holding) / 5 / 33, "coverage": covered / 40}
    )
    assert (measured["recall"].low, measured["recall"].high) == wilson_interval(recalled, 40)
    assert measured["precision"].details == {"n": 33, "k": 3} and measured["coverage"].details == {"n": 40, "k": 5}
    assert measured["density"].low < measured["density"].value < measured["density"].high


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_a_set_against_itself(offset: float) -> None:
    features = normal(60, 8) + offset
    measured = neighbour_metrics(features, features.flip(0))
    assert [measured[name].value for name in ("precision", "recall", "coverage")] == [1, 1, 1]
    # Each ball holds its centre and k others, the farthest of them on its edge: rounding does not lose it.
    assert measured["density"].value == pytest.approx(6 / 5, rel=1e-12)


def test_sets_far_apart_and_constant_sets() -> None:
    apart = neighbour_metrics(normal(20, 4), normal(20, 4, seed=1) + 100)
    assert [one.value for one in apart.values()] == [0, 0, 0, 0]
    assert apart["precision"].low == 0 < apart["precision"].high < 0.2
    constant = neighbour_metrics(torch.ones(10, 3), torch.ones(10, 3))
    assert [one.value for one in constant.values()] == [1, 1, 2, 1]


def test_equal_distributions_have_density_one() -> None:
    assert neighbour_metrics(normal(1500, 4), normal(1500, 4, seed=1))["density"].value == pytest.approx(1, abs=0.05)


def test_one_mode_is_precise_and_recalls_little() -> None:
    modes = torch.cat([normal(100, 2), normal(100, 2, seed=1) + 50])
    measured = neighbour_metrics(normal(100, 2, seed=2), modes)
    assert measured["precision"].value > 0.9 and measured["recall"].value < 0.6 and measured["coverage"].value < 0.6


def test_order_scale_and_block_size_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = normal(50, 6) + 0.3, normal(70, 6, seed=1)
    plain = neighbour_metrics(x, y)
    others = [neighbour_metrics(x.flip(0), y.roll(9, 0)), neighbour_metrics(x * 1e-3, y * 1e-3)]
    monkeypatch.setattr(neighbours, "BLOCK_ELEMENTS", 1)
    others.append(neighbour_metrics(x, y))
    for other in others:
        for name, one in plain.items():
            assert (other[name].value, other[name].low) == pytest.approx((one.value, one.low), rel=1e-9)


def test_wrong_inputs_are_refused() -> None:
    with pytest.raises(InputError, match="3 images do not have 3 neighbours"):
        neighbour_metrics(normal(3, 2), normal(9, 2))
    with pytest.raises(InputError, match="5 images do not have 5 neighbours"):
        neighbour_metrics(normal(9, 2), normal(5, 2))
    with pytest.raises(InputError, match="2 images do not have 2 neighbours"):
        neighbourhoods(normal(2, 2), 2)
    with pytest.raises(UsageError, match="k = 0"):
        neighbourhoods(normal(4, 2), 0)
    with pytest.raises(InputError, match="shapes"):
        neighbour_metrics(normal(9, 2), normal(9, 3))
    with pytest.raises(ComputationError, match="not finite"):
        neighbour_metrics(normal(9, 2) * torch.nan, normal(9, 2))
