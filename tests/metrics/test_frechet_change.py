"""The difference of two Fréchet distances of paired images."""

from __future__ import annotations

import pytest
import torch

from finectl.errors import InputError
from finectl.metrics.frechet import Gaussian, frechet, frechet_change, frechet_distance

DIM = 6


def pairs(count: int, seed: int, apart: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that have most in common, as images of two models from one noise have."""
    random = torch.Generator().manual_seed(seed)
    common = torch.randn(count, DIM, generator=random, dtype=torch.float64)
    own = torch.randn(count, DIM, generator=random, dtype=torch.float64)
    return 1.2 * common + apart * own + 0.2, common


@pytest.fixture(scope="module")
def reference() -> Gaussian:
    return Gaussian.of(torch.randn(5000, DIM, generator=torch.Generator().manual_seed(9), dtype=torch.float64) * 0.8)


def test_it_is_the_difference_of_the_distances(reference: Gaussian) -> None:
    one, other = pairs(200, 0)
    found = frechet_change(one, other, reference)
    wanted = frechet_distance(Gaussian.of(one), reference) - frechet_distance(Gaussian.of(other), reference)
    assert found.value == pytest.approx(wanted, rel=1e-9) and found.details["n"] == 200
    same = frechet_change(one, one.clone(), reference)
    assert same.value == 0 and same.low == pytest.approx(0, abs=1e-9) and same.high == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("count", [200, 5])
def test_pairs_are_more_certain_than_the_distances(reference: Gaussian, count: int) -> None:
    """Also of fewer rows than features, which are measured in another way."""
    one, other = pairs(count, 1, apart=0.05)
    found, alone = frechet_change(one, other, reference), frechet(one, reference)
    assert 0 < found.high - found.low < (alone.high - alone.low) * 0.8


def test_its_interval_is_that_of_repeated_draws(reference: Gaussian) -> None:
    draws = [frechet_change(*pairs(150, seed), reference) for seed in range(10, 130)]
    spread = torch.tensor([draw.value for draw in draws], dtype=torch.float64).std()
    errors = torch.tensor([(draw.high - draw.low) / 2 / 1.96 for draw in draws], dtype=torch.float64)
    assert 0.8 < float(errors.mean() / spread) < 1.25


def test_rows_that_are_no_pairs_are_refused(reference: Gaussian) -> None:
    one, other = pairs(20, 0)
    with pytest.raises(InputError, match=r"\(20, 6\) and \(10, 6\)"):
        frechet_change(one, other[:10], reference)
