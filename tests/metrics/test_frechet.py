"""Frechet distance and moments against closed forms, other people's programs and independent computations."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from make_reference_values import CASES, PATH, feature_sets

from finectl.errors import ComputationError, InputError
from finectl.metrics import frechet as implementation
from finectl.metrics.frechet import Gaussian, Moments, frechet, frechet_distance, frechet_infinity, moments
from finectl.metrics.gaussian import contrasts, undo_contrasts

VALUES: dict[str, Any] = json.loads(PATH.read_text(encoding="utf-8"))["cases"]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def given(mean: torch.Tensor, cov: torch.Tensor) -> Gaussian:
    return Gaussian.from_moments(mean, cov, 0)


def formed(features: torch.Tensor) -> Gaussian:
    """The Gaussian of features, with its covariance as a matrix whatever their number."""
    return Gaussian.from_moments(*moments(features), len(features))


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_other_programs(case: str) -> None:
    features, reference = feature_sets(case)
    assert float(features.sum() + reference.sum()) == pytest.approx(VALUES[case]["checksum"], rel=1e-9)
    distance = frechet_distance(Gaussian.of(features), Gaussian.of(reference))
    assert distance == pytest.approx(VALUES[case]["fid"]["rows"], rel=1e-11)
    for program in ("torch-fidelity", "clean-fid"):
        # Of a singular product they take roots of the rounding errors of 0.
        accuracy = 1e-6 if "singular" in case else 1e-9
        assert distance == pytest.approx(VALUES[case]["fid"][program], rel=accuracy), program


def test_commuting_gaussians_have_the_closed_form() -> None:
    basis = torch.linalg.qr(normal(6, 6))[0]
    first, second = normal(6, seed=1).square(), normal(6, seed=2).square()
    mean1, mean2 = normal(6, seed=3), normal(6, seed=4)
    expected = (mean1 - mean2).square().sum() + (first.sqrt() - second.sqrt()).square().sum()
    distance = frechet_distance(given(mean1, basis * first @ basis.T), given(mean2, basis * second @ basis.T))
    assert distance == pytest.approx(float(expected), rel=1e-12)


def test_one_dimension() -> None:
    first, second = given(torch.tensor([1.0]), torch.tensor([[4.0]])), given(torch.tensor([4.0]), torch.tensor([[9.0]]))
    assert frechet_distance(first, second) == pytest.approx(9 + 1)


@pytest.mark.parametrize("count", [10, 500])
def test_distance_to_itself_is_zero(count: int) -> None:
    features = normal(count, 40) @ normal(40, 40, seed=1)
    for one in (Gaussian.of(features), formed(features)):
        for other in (Gaussian.of(features), formed(features)):
            assert 0 <= frechet_distance(one, other) <= 1e-12 * one.trace


def test_disjoint_supports_add_their_traces() -> None:
    zero = torch.zeros(4)
    first, second = torch.diag(torch.tensor([1.0, 2, 0, 0])), torch.diag(torch.tensor([0.0, 0, 3, 4]))
    assert frechet_distance(given(zero, first), given(zero, second)) == pytest.approx(10, rel=1e-14)


@pytest.mark.parametrize("counts", [(12, 12), (12, 200), (200, 12), (200, 200), (61, 60), (2, 3)])
@pytest.mark.parametrize("decay", [0, 3, 5])
def test_all_ways_agree(counts: tuple[int, int], decay: int, monkeypatch: pytest.MonkeyPatch) -> None:
    spread = torch.logspace(0, -decay, 60, dtype=torch.float64)
    mixing = torch.linalg.qr(normal(60, 60, seed=2))[0]
    first, second = (
        normal(counts[0], 60) * spread @ mixing,
        (1.3 * normal(counts[1], 60, seed=1) * spread + 0.1) @ mixing,
    )
    ways = [(Gaussian.of(first), Gaussian.of(second)), (formed(first), formed(second))]
    ways += [(Gaussian.of(first), formed(second)), (formed(first), Gaussian.of(second))]
    distances = [frechet_distance(*way) for way in ways] + [frechet_distance(b, a) for a, b in ways]
    monkeypatch.setattr(implementation, "_fast_overlap", lambda *_: None)
    exact = [frechet_distance(*way) for way in ways]
    assert distances + exact == pytest.approx([exact[0]] * 12, rel=1e-9)


@pytest.mark.parametrize("decay", [3, 6, 9, 12])
@pytest.mark.parametrize("order", ["rising", "mixed"])
def test_the_fast_way_is_left_where_it_loses_digits(decay: int, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Independent features: the eigenvalues of the product reach down to 1e-12 ... 1e-24 of the largest.
    spread = torch.logspace(-decay / 2, 0, 80, dtype=torch.float64)
    if order == "mixed":
        spread = spread[torch.randperm(80, generator=torch.Generator().manual_seed(0))]
    first, second = Gaussian.of(normal(200, 80) * spread), Gaussian.of(normal(200, 80, seed=1) * spread)
    distance = frechet_distance(first, second)
    monkeypatch.setattr(implementation, "_fast_overlap", lambda *_: None)
    assert distance == pytest.approx(frechet_distance(first, second), rel=1e-10)


def test_the_fast_way_is_taken_for_ordinary_covariances(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Gaussian.of(normal(300, 60)), Gaussian.of(normal(300, 60, seed=1))
    few = Gaussian.of(normal(30, 60, seed=2))
    expected = frechet_distance(first, second), frechet_distance(few, second)
    monkeypatch.delattr(torch.linalg, "svdvals")
    assert (frechet_distance(first, second), frechet_distance(few, second)) == expected
    with pytest.raises(AttributeError):
        frechet_distance(few, few)


@pytest.mark.parametrize("count", [12, 200])
def test_agrees_with_the_matrix_square_root(count: int) -> None:
    scipy_linalg = pytest.importorskip("scipy.linalg")
    mean1, cov1 = moments(normal(count, 20))
    mean2, cov2 = moments(normal(count, 20, seed=1) @ normal(20, 20, seed=2))
    root = scipy_linalg.sqrtm((cov1 @ cov2).numpy())
    expected = float((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace()) - 2 * float(root.trace().real)
    # sqrtm itself keeps about half the digits of a singular product
    distance = frechet_distance(given(mean1, cov1), given(mean2, cov2))
    assert distance == pytest.approx(expected, rel=1e-6 if count < 20 else 1e-10)


def test_fewer_images_than_features_is_exact() -> None:
    first, second = normal(15, 60), 2 * normal(15, 60, seed=1) + 0.3
    centred1, centred2 = first - first.mean(0), second - second.mean(0)
    expected = (first.mean(0) - second.mean(0)).square().sum() + (
        centred1.square().sum() + centred2.square().sum() - 2 * torch.linalg.svdvals(centred1 @ centred2.T).sum()
    ) / 14
    assert frechet_distance(Gaussian.of(first), Gaussian.of(second)) == pytest.approx(float(expected), rel=1e-13)


@pytest.mark.parametrize("count", [2, 15])
def test_few_images_are_kept_as_rows_that_give_the_covariance(count: int) -> None:
    features = normal(count, 20) + 5
    gaussian = Gaussian.of(features)
    assert gaussian.factor is not None and tuple(gaussian.factor.shape) == (count - 1, 20)
    torch.testing.assert_close(gaussian.covariance, torch.cov(features.T), rtol=1e-12, atol=1e-13)
    assert gaussian.trace == pytest.approx(float(gaussian.covariance.trace()), rel=1e-13)
    centred = features - features.mean(0)
    torch.testing.assert_close(undo_contrasts(contrasts(centred)), centred, rtol=1e-12, atol=1e-13)
    assert Gaussian.of(normal(21, 20)).factor is None


def test_symmetric_and_growing_with_a_shift() -> None:
    first, second = Gaussian.of(normal(100, 8)), Gaussian.of(normal(100, 8, seed=1) * 1.5)
    distance = frechet_distance(first, second)
    assert distance == pytest.approx(frechet_distance(second, first), rel=1e-12)
    assert frechet_distance(first, Gaussian.of(normal(100, 8) + 2)) == pytest.approx(4 * 8, rel=1e-12)


@pytest.mark.parametrize("count", [20, 50])
def test_scaling_features_scales_the_distance_by_the_square(count: int) -> None:
    first, second = normal(count, 30), normal(50, 30, seed=1) + 1
    plain, scaled = frechet(first, Gaussian.of(second)), frechet(1e-4 * first, Gaussian.of(1e-4 * second))
    assert scaled.value == pytest.approx(1e-8 * plain.value, rel=1e-10)
    assert scaled.high - scaled.low == pytest.approx(1e-8 * (plain.high - plain.low), rel=1e-9)


@pytest.mark.parametrize("count", [5, 200])
def test_the_order_of_rows_does_not_matter(count: int) -> None:
    features, reference = normal(count, 30), Gaussian.of(normal(100, 30, seed=1) + 0.2)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    one, other = frechet(features, reference), frechet(features[order], reference)
    assert (one.value, one.low, one.high) == pytest.approx((other.value, other.low, other.high), rel=1e-9)


@pytest.mark.parametrize("dim", [3, 10])
def test_constant_features(dim: int) -> None:
    constant, other = torch.ones(5, dim), normal(8, dim)
    for point in (Gaussian.of(constant), formed(constant)):
        assert frechet_distance(point, Gaussian.of(constant + 1)) == dim
        expected = float((other.mean(0) - 1).square().sum()) + float(torch.cov(other.T).trace())
        for gaussian in (Gaussian.of(other), formed(other)):
            assert frechet_distance(point, gaussian) == pytest.approx(expected, rel=1e-13)
            assert frechet_distance(gaussian, point) == pytest.approx(expected, rel=1e-13)
    still = frechet(constant, Gaussian.of(other))
    assert still.low == pytest.approx(still.value) == still.high


@pytest.mark.parametrize(("dim", "count", "scale"), [(8, 100, 1.2), (64, 400, 1.0), (64, 48, 1.2), (64, 64, 1.2)])
def test_the_interval_is_that_of_repeated_draws(dim: int, count: int, scale: float) -> None:
    spread = torch.logspace(0, -1, dim, dtype=torch.float64)
    reference = Gaussian.of(normal(1000, dim) * spread)
    measured = [frechet(normal(count, dim, seed=seed) * spread * scale + 0.3, reference) for seed in range(1, 201)]
    values = torch.tensor([one.value for one in measured])
    errors = torch.tensor([(one.high - one.value) / 1.959964 for one in measured])
    ratio = float(errors.mean() / values.std())
    # A standard deviation of 200 values is itself only known to 5 %.
    assert 0.85 < ratio < (1.15 if count > 2 * dim else 1.4)
    assert measured[0].details == {"n": count}


@pytest.mark.parametrize(("dim", "count"), [(8, 300), (64, 1500)])
def test_the_interval_is_that_of_the_bootstrap(dim: int, count: int) -> None:
    reference = Gaussian.of(normal(3000, dim))
    features = normal(count, dim, seed=1) @ (torch.eye(dim) + 0.3 * normal(dim, dim, seed=2) / math.sqrt(dim)) + 0.2
    measured = frechet(features, reference)
    random = torch.Generator().manual_seed(0)
    drawn = [
        frechet_distance(Gaussian.of(features[torch.randint(count, (count,), generator=random)]), reference)
        for _ in range(300)
    ]
    error = (measured.high - measured.value) / 1.959964
    assert error == pytest.approx(float(torch.tensor(drawn).std()), rel=0.15)


@pytest.mark.parametrize("count", [6, 12, 40])
def test_influences_are_the_derivatives_by_the_weights_of_rows(count: int) -> None:
    features, reference = normal(count, 12), Gaussian.of(normal(50, 12, seed=1) + 0.5)

    def distance(weights: torch.Tensor) -> float:
        mean = weights @ features
        centred = features - mean
        # The factor keeps influence and distance on the same, unbiased scale.
        cov = (centred.T * weights) @ centred * (count / (count - 1))
        return frechet_distance(Gaussian.from_moments(mean, cov, count), reference)

    step, uniform = 1e-5, torch.full((count,), 1 / count, dtype=torch.float64)
    slopes = []
    for row in range(count):
        towards = torch.eye(count, dtype=torch.float64)[row] - uniform
        slopes.append((distance(uniform + step * towards) - distance(uniform - step * towards)) / (2 * step))
    influence = implementation._influence(features, Gaussian.of(features), reference)
    centred = influence - influence.mean()
    shift = 2 * (features - features.mean(0)) @ (features.mean(0) - reference.mean)
    expected = torch.tensor(slopes, dtype=torch.float64)
    # The covariance's share carries the factor N / (N - 1) of the unbiased estimate.
    torch.testing.assert_close((centred - shift) * count / (count - 1) + shift, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dim", [8, 40])
def test_extrapolation_finds_the_limit(dim: int) -> None:
    spread = torch.logspace(0, -1, dim, dtype=torch.float64)
    reference = given(torch.zeros(dim), torch.diag(spread.square()))
    truth = float((0.3 * spread).square().sum() + (0.2 * spread).square().sum())
    measured = [
        frechet_infinity(normal(10 * dim, dim, seed=seed) * spread * 1.2 + 0.3 * spread, reference)
        for seed in range(100)
    ]
    values = torch.tensor([one.value for one in measured])
    finite = torch.tensor([one.details["distances"][-1] for one in measured])
    assert abs(float(values.mean()) - truth) < 0.3 * abs(float(finite.mean()) - truth)
    assert sum(one.low < truth < one.high for one in measured) >= 88
    errors = torch.tensor([(one.high - one.value) / 1.959964 for one in measured])
    assert 0.85 < float(errors.mean() / values.std()) < 1.25


@pytest.mark.parametrize("count", [16, 37, 300])
def test_extrapolation_measures_growing_parts(count: int) -> None:
    features, reference = normal(count, 30), Gaussian.of(normal(200, 30, seed=1))
    measured = frechet_infinity(features, reference)
    sizes, distances = measured.details["sizes"], measured.details["distances"]
    assert sizes == [count * eighths // 8 for eighths in range(4, 9)] and measured.details["n"] == count
    assert distances[-1] == pytest.approx(frechet(features, reference).value, rel=1e-12)
    for size, distance in zip(sizes, distances, strict=True):
        assert distance == pytest.approx(frechet_distance(formed(features[:size]), reference), rel=1e-9)
    inverse = 1 / torch.tensor(sizes, dtype=torch.float64)
    line = torch.linalg.lstsq(
        torch.stack([torch.ones_like(inverse), inverse], dim=1), torch.tensor(distances, dtype=torch.float64)[:, None]
    ).solution
    assert measured.value == pytest.approx(float(line[0, 0]), rel=1e-9)
    assert measured.low < measured.value < measured.high


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
    with pytest.raises(InputError, match=r"shapes \(2,\) and \(3, 3\)"):
        given(mean[:2], cov)
    with pytest.raises(InputError, match="eigenvalue"):
        given(mean, -cov)
    with pytest.raises(InputError, match="eigenvalue"):
        given(mean, torch.diag(torch.tensor([1.0, 1, -1e-4])))
    with pytest.raises(InputError, match="transpose"):
        given(mean, cov + 0.1 * torch.eye(3).roll(1, 0))
    with pytest.raises(InputError, match="between 3 features and statistics of another size, 4 features"):
        frechet_distance(given(mean, cov), Gaussian.of(normal(9, 4)))
    with pytest.raises(InputError, match="another size"):
        frechet(normal(9, 4), given(mean, cov))
    with pytest.raises(ComputationError, match="not finite"):
        given(mean * torch.nan, cov)
    for count in (2, 5):
        with pytest.raises(ComputationError, match="not finite"):
            Gaussian.of(torch.full((count, 3), torch.inf))
    with pytest.raises(ComputationError, match="distance is not finite"):
        frechet_distance(given(mean + 1e200, cov), given(mean, cov))
    with pytest.raises(ComputationError, match="not finite"):
        moments(torch.tensor([[1.0, torch.inf], [0, 0]]))
    for function in (moments, Gaussian.of):
        with pytest.raises(InputError, match="1 images have no covariance"):
            function(torch.ones(1, 3))
        with pytest.raises(InputError, match="shape"):
            function(torch.ones(3))
    with pytest.raises(InputError, match="15 images to extrapolate"):
        frechet_infinity(normal(15, 3), given(mean, cov))
    with pytest.raises(InputError, match="shape"):
        Moments(3).update(torch.ones(4, 2))
    with pytest.raises(InputError, match="merged"):
        Moments(3).merge(Moments(2))
    with pytest.raises(InputError, match="no images"):
        _ = Moments(3).mean
