"""Frechet distance and moments against closed forms and independent computations."""

from __future__ import annotations

import pytest
import torch

from finectl.errors import ComputationError, InputError
from finectl.metrics.frechet import Moments, frechet_distance, moments


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_commuting_gaussians_have_the_closed_form() -> None:
    basis = torch.linalg.qr(normal(6, 6))[0]
    first, second = normal(6, seed=1).square(), normal(6, seed=2).square()
    mean1, mean2 = normal(6, seed=3), normal(6, seed=4)
    expected = (mean1 - mean2).square().sum() + (first.sqrt() - second.sqrt()).square().sum()
    distance = frechet_distance(mean1, basis * first @ basis.T, mean2, basis * second @ basis.T)
    assert distance == pytest.approx(float(expected), rel=1e-12)


def test_one_dimension() -> None:
    mean1, mean2 = torch.tensor([1.0]), torch.tensor([4.0])
    assert frechet_distance(mean1, torch.tensor([[4.0]]), mean2, torch.tensor([[9.0]])) == pytest.approx(9 + 1)


@pytest.mark.parametrize("count", [10, 500])
def test_distance_to_itself_is_zero(count: int) -> None:
    mean, cov = moments(normal(count, 40) @ normal(40, 40, seed=1))
    assert frechet_distance(mean, cov, mean, cov) <= 1e-12 * float(cov.trace())


def test_disjoint_supports_add_their_traces() -> None:
    zero = torch.zeros(4)
    first, second = torch.diag(torch.tensor([1.0, 2, 0, 0])), torch.diag(torch.tensor([0.0, 0, 3, 4]))
    assert frechet_distance(zero, first, zero, second) == pytest.approx(10, rel=1e-14)


@pytest.mark.parametrize("count", [12, 200])
def test_agrees_with_the_matrix_square_root(count: int) -> None:
    scipy_linalg = pytest.importorskip("scipy.linalg")
    mean1, cov1 = moments(normal(count, 20))
    mean2, cov2 = moments(normal(count, 20, seed=1) @ normal(20, 20, seed=2))
    root = scipy_linalg.sqrtm((cov1 @ cov2).numpy())
    expected = float((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace()) - 2 * float(root.trace().real)
    # sqrtm itself keeps about half the digits of a singular product
    assert frechet_distance(mean1, cov1, mean2, cov2) == pytest.approx(expected, rel=1e-6 if count < 20 else 1e-10)


def test_fewer_images_than_features_is_exact() -> None:
    first, second = normal(15, 60), 2 * normal(15, 60, seed=1) + 0.3
    centred1, centred2 = first - first.mean(0), second - second.mean(0)
    expected = (first.mean(0) - second.mean(0)).square().sum() + (
        centred1.square().sum() + centred2.square().sum() - 2 * torch.linalg.svdvals(centred1 @ centred2.T).sum()
    ) / 14
    assert frechet_distance(*moments(first), *moments(second)) == pytest.approx(float(expected), rel=1e-13)


def test_symmetric_and_growing_with_a_shift() -> None:
    first, second = moments(normal(100, 8)), moments(normal(100, 8, seed=1) * 1.5)
    distance = frechet_distance(*first, *second)
    assert distance == pytest.approx(frechet_distance(*second, *first), rel=1e-12)
    assert frechet_distance(first[0], first[1], first[0] + 2, first[1]) == pytest.approx(4 * 8, rel=1e-12)


def test_scaling_features_scales_the_distance_by_the_square() -> None:
    first, second = normal(50, 8), normal(50, 8, seed=1) + 1
    distance = frechet_distance(*moments(first), *moments(second))
    scaled = frechet_distance(*moments(1e-4 * first), *moments(1e-4 * second))
    assert scaled == pytest.approx(1e-8 * distance, rel=1e-10)


def test_constant_features() -> None:
    mean, cov = moments(torch.ones(5, 3))
    assert frechet_distance(mean, cov, mean + 1, cov) == 3


@pytest.mark.parametrize("batch", [1, 7, 64, 1000])
def test_streaming_equals_one_batch(batch: int) -> None:
    features = normal(300, 9) * 1e-3 + 1e4  # the spread is small beside the mean
    stream = Moments(9)
    for part in features.split(batch):
        stream.update(part)
    assert stream.count == 300
    torch.testing.assert_close(stream.mean, features.mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(stream.cov, torch.cov(features.T), rtol=1e-7, atol=1e-14)
    assert torch.equal(stream.cov, stream.cov.T)


def test_merging_equals_one_batch() -> None:
    features = normal(50, 4)
    parts = [Moments(4), Moments(4), Moments(4)]
    parts[0].update(features[:20])
    parts[2].update(features[20:])
    for part in parts[1:]:
        parts[0].merge(part)
    torch.testing.assert_close(parts[0].mean, features.mean(0))
    torch.testing.assert_close(parts[0].cov, torch.cov(features.T))


def test_float32_features_are_accumulated_in_float64() -> None:
    features = (normal(5000, 3) + 1000).float()
    mean, cov = moments(features)
    assert mean.dtype == cov.dtype == torch.float64
    torch.testing.assert_close(cov, torch.cov(features.double().T), rtol=1e-12, atol=0)


def test_results_do_not_alias_the_accumulator() -> None:
    stream = Moments(2)
    stream.update(normal(5, 2))
    before = stream.mean
    stream.mean.fill_(0)
    stream.update(normal(5, 2, seed=1))
    assert not torch.equal(stream.mean, torch.zeros(2))
    assert not torch.equal(stream.mean, before)


def test_wrong_inputs_are_refused() -> None:
    mean, cov = moments(normal(10, 3))
    with pytest.raises(InputError, match="shapes"):
        frechet_distance(mean[:2], cov, mean, cov)
    with pytest.raises(InputError, match="eigenvalue"):
        frechet_distance(mean, -cov, mean, cov)
    with pytest.raises(InputError, match="transpose"):
        frechet_distance(mean, cov + 0.1 * torch.eye(3).roll(1, 0), mean, cov)
    with pytest.raises(ComputationError, match="not finite"):
        frechet_distance(mean * torch.nan, cov, mean, cov)
    with pytest.raises(ComputationError, match="not finite"):
        moments(torch.tensor([[1.0, torch.inf], [0, 0]]))
    with pytest.raises(InputError, match="1 images have no covariance"):
        moments(torch.ones(1, 3))
    with pytest.raises(InputError, match="shape"):
        Moments(3).update(torch.ones(4, 2))
    with pytest.raises(InputError, match="merged"):
        Moments(3).merge(Moments(2))
    with pytest.raises(InputError, match="no images"):
        _ = Moments(3).mean
