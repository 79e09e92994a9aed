"""Inception Score against closed forms and torch-fidelity's values."""

from __future__ import annotations

import json
import math

import pytest
import torch
from make_reference_values import CASES, PATH, SPLITS, feature_sets

from finectl.errors import ComputationError, InputError, UsageError
from finectl.metrics.inception_score import inception_score

VALUES = json.loads(PATH.read_text(encoding="utf-8"))["cases"]


def logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_torch_fidelity(case: str) -> None:
    measured = inception_score(feature_sets(case)[0], SPLITS)
    assert measured.value == pytest.approx(VALUES[case]["is"]["mean"], rel=1e-9)
    assert measured.details["std"] == pytest.approx(VALUES[case]["is"]["std"], rel=1e-9)
    assert (measured.details["n"], measured.details["splits"]) == (CASES[case][1], SPLITS)


def test_sure_of_every_class_is_the_number_of_classes_and_unsure_is_one() -> None:
    sure = 1e4 * torch.eye(7).repeat(20, 1)
    assert inception_score(sure, 1).value == pytest.approx(7, rel=1e-12)
    assert inception_score(sure, 10).value == pytest.approx(7, rel=1e-12)
    assert inception_score(torch.zeros(30, 7)).value == pytest.approx(1, rel=1e-12)
    # Always the same class: sure, but without variety; the other classes' probabilities are exactly 0.
    assert inception_score(sure[:1].expand(20, -1)).value == pytest.approx(1, rel=1e-12)


def test_half_of_the_images_of_each_of_two_classes() -> None:
    p = 0.9
    rows = torch.tensor([[p, 1 - p], [1 - p, p]], dtype=torch.float64).log().repeat(50, 1)
    divergence = math.log(2) + p * math.log(p) + (1 - p) * math.log(1 - p)
    assert inception_score(rows, 5).value == pytest.approx(math.exp(divergence), rel=1e-12)


def test_splits_are_consecutive() -> None:
    sure = 1e4 * torch.eye(2).repeat_interleave(10, 0)
    assert inception_score(sure, 2).value == pytest.approx(1)
    assert inception_score(sure, 1).value == pytest.approx(2)


@pytest.mark.parametrize("splits", [1, 10])
def test_the_interval_is_that_of_repeated_draws(splits: int) -> None:
    measured = [inception_score(logits(400, 10, seed=seed), splits) for seed in range(200)]
    errors = torch.tensor([(one.high - one.value) / 1.959964 for one in measured])
    spread = float(torch.tensor([one.value for one in measured]).std())
    assert float(errors.mean()) == pytest.approx(spread, rel=0.15)
    assert all(one.low < one.value < one.high for one in measured)


def test_the_order_within_a_split_and_a_constant_do_not_matter() -> None:
    rows = logits(50, 6)
    shifted = rows.flip(0) + torch.arange(50)[:, None]
    assert inception_score(shifted, 1).value == pytest.approx(inception_score(rows, 1).value, rel=1e-12)


def test_wrong_inputs_are_refused() -> None:
    with pytest.raises(UsageError, match="9 images in 10 splits"):
        inception_score(logits(9, 4))
    with pytest.raises(UsageError, match="in 0 splits"):
        inception_score(logits(9, 4), 0)
    with pytest.raises(InputError, match="shape"):
        inception_score(torch.zeros(9))
    with pytest.raises(ComputationError, match="not finite"):
        inception_score(torch.full((10, 3), torch.nan))
