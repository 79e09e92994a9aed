"""What is measured of pairs: against what can be counted by hand."""

from __future__ import annotations

import math

import pytest
import torch

from finectl.errors import InputError
from finectl.metrics.pairs.fd_rand import digest, fd_rand, features_for, random_features
from finectl.metrics.pairs.inception import find_inception
from finectl.metrics.pairs.measure import PairMeter, metrics_for
from finectl.metrics.pairs.paired import l1, paired_means


def images(count: int = 24, seed: int = 0, side: int = 16) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_l1_is_in_the_units_of_the_images() -> None:
    ones = torch.ones(2, 3, 4, 4)
    assert l1(ones, -ones).tolist() == [2.0, 2.0]
    half = torch.cat([ones[:1], ones[:1] * 0.5])
    assert l1(half, ones).tolist() == [0.0, 0.5]


def test_paired_means_of_a_known_difference() -> None:
    x = torch.zeros(3, 3, 16, 16)
    y = x + 0.2
    found = paired_means(x, y)
    assert found["l1"].value == pytest.approx(0.2, abs=1e-6)
    # 0 and 0.2 become the levels 128 and 153.
    assert found["psnr"].value == pytest.approx(20 * math.log10(255 / 25), abs=1e-6)
    assert 0 < found["ssim"].value < 1
    assert paired_means(x, x)["ssim"].value == pytest.approx(1.0)


def test_pairs_of_other_shapes_are_refused() -> None:
    with pytest.raises(InputError, match="pairs of shapes"):
        paired_means(images(4), images(3))
    with pytest.raises(InputError, match="uint8"):
        paired_means(images(4).to(torch.uint8), images(4))


def test_fd_rand_is_zero_for_the_same_images_and_grows_with_the_difference() -> None:
    x = images(48)
    assert fd_rand(x, x).value == pytest.approx(0.0, abs=1e-6)
    near, far = fd_rand((x * 0.9), x).value, fd_rand((x * 0.3), x).value
    assert 0 < near < far
    # Which image is whose target does not matter.
    assert fd_rand(x.flip(0), x).value == pytest.approx(0.0, abs=1e-6)


def test_fd_rand_has_at_most_half_as_many_features_as_images() -> None:
    assert [features_for(n) for n in (8, 15, 16, 93, 128, 1000)] == [4, 4, 8, 32, 64, 64]
    with pytest.raises(InputError, match="fd_rand of 7 images"):
        features_for(7)
    details = fd_rand(images(20), images(20, 1)).details
    assert details["features"] == 8 and details["network"] == digest(8) != digest(16)


def test_the_random_network_is_always_the_same() -> None:
    x = images(3)
    torch.manual_seed(1)
    first = random_features(x, 8)
    torch.manual_seed(2)
    assert torch.equal(first, random_features(x, 8)) and first.shape == (3, 8)
    # Written down once: a change of the network must change its version.
    assert digest(8)[:16] == "fa8857644068e619"


def test_what_can_be_measured_is_measured() -> None:
    assert metrics_for(24, 16, None) == ("l1", "psnr", "ssim", "fd_rand")
    assert metrics_for(4, 8, None) == ("l1", "psnr")
    meter = PairMeter(metrics_for(24, 16, None))
    found = meter.measure(images(24) * 0.5, images(24))
    assert list(found) == ["l1", "psnr", "ssim", "fd_rand"]
    assert all(set(record) >= {"value", "interval"} for record in found.values())


def test_no_inception_is_no_fid(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert find_inception(None) is None
    with pytest.raises(InputError, match="--inception"):
        find_inception("/no/such/file.pt")
    with pytest.raises(InputError, match="needs the Inception network"):
        PairMeter(("l1", "clean_fid")).measure(images(8), images(8))
