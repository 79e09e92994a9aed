"""Loss weights over timesteps against their closed forms, and the borders of timestep ranges."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from finectl.diffusion.config import DDPM, PREDICTIONS
from finectl.diffusion.losses import Noised, denoising_loss, variational_bound
from finectl.diffusion.ranges import equal_borders, parse_borders
from finectl.diffusion.schedule import NoiseSchedule
from finectl.diffusion.weightings import UNIFORM, WEIGHTINGS, WeightedLoss, weights
from finectl.errors import UsageError

AT = [0, 250, 500, 750, 999]
# Weights of the noise's error for the schedule of DDPM, computed apart from finectl.
EPSILON = {
    "snr": [1, 1, 1, 1, 1],
    "snr+1": [1.000, 1.918, 12.85, 303.0, 2.478e4],
    "trunc-snr": [1, 1, 11.85, 302.0, 2.478e4],
    "min-snr": [5.001e-4, 1, 1, 1, 1],
    "p2": [1.0e-4, 0.4786, 0.9222, 0.9967, 1],
}


def schedule(prediction: str = "epsilon") -> NoiseSchedule:
    return NoiseSchedule.from_config(replace(DDPM, prediction=prediction))


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_the_noise_error_has_the_published_weights(name: str) -> None:
    assert weights(name, schedule())[AT].tolist() == pytest.approx(EPSILON[name], rel=5e-4)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_the_three_predictions_have_the_same_loss(name: str) -> None:
    """w_eps = w_x / SNR and w_v = w_x / (SNR + 1)."""
    kept = schedule().alphas_cumprod
    snr = kept / (1 - kept)
    of_x = weights(name, schedule("sample"))
    assert torch.allclose(weights(name, schedule()), of_x / snr, rtol=1e-9)
    assert torch.allclose(weights(name, schedule("v_prediction")), of_x / (snr + 1), rtol=1e-9)
    expected = {
        "snr": snr, "snr+1": snr + 1, "trunc-snr": snr.clamp(min=1), "min-snr": snr.clamp(max=5), "p2": snr / (1 + snr),
    }  # fmt: skip
    assert torch.allclose(of_x, expected[name], rtol=1e-9)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", [UNIFORM, *WEIGHTINGS])
def test_weights_are_finite_where_nothing_of_the_image_is_left(name: str, prediction: str) -> None:
    ends = replace(schedule(prediction), alphas_cumprod=torch.tensor([1.0, 0.5, 1e-9, 0.0], dtype=torch.float64))
    found = weights(name, ends)
    assert bool(torch.isfinite(found.float()).all()) and bool((found >= 0).all())


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", [UNIFORM, *WEIGHTINGS])
def test_normalised_weights_have_the_mean_one(name: str, prediction: str) -> None:
    plain, normalised = (weights(name, schedule(prediction), normalise) for normalise in (False, True))
    assert float(normalised.mean()) == pytest.approx(1.0)
    assert torch.allclose(normalised * plain.mean(), plain)


def test_uniform_weighs_nothing() -> None:
    assert all(bool((weights(UNIFORM, schedule(prediction)) == 1).all()) for prediction in PREDICTIONS)


@pytest.mark.parametrize("channels_out", [1, 2])
def test_the_loss_weighs_the_squared_error_and_not_the_bound(channels_out: int) -> None:
    random = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(5, 1, 4, 4, generator=random) for _ in range(2))
    output = torch.randn(5, channels_out, 4, 4, generator=random)
    t, y, chain = torch.tensor(AT), torch.zeros(5, dtype=torch.int64), schedule()
    found = WeightedLoss("snr+1", chain)(lambda *_: output, chain, Noised(x0, y, t, noise), step=0)
    plain = denoising_loss(lambda *_: output, chain, x0, y, t, noise, bound=False)
    expected = plain / chain.alphas_cumprod[t].float()
    if channels_out == 2:
        x_t = chain.add_noise(x0, noise, t)
        expected = expected + variational_bound(chain, x0, x_t, t, output[:, :1], output[:, 1:])
    assert found.dtype == torch.float32 and torch.allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(("timesteps", "count"), [(1000, 4), (1000, 3), (10, 7), (1000, 1), (5, 5)])
def test_equal_borders(timesteps: int, count: int) -> None:
    borders = equal_borders(timesteps, count)
    assert (borders[0], borders[-1], len(borders)) == (0, timesteps, count + 1)
    for t in range(timesteps):
        index = t * count // timesteps
        assert borders[index] <= t < borders[index + 1]


def test_borders_as_they_are_typed() -> None:
    assert parse_borders("0, 250,500,1000", 1000) == (0, 250, 500, 1000)
    for text in ("", "0", "0,1001", "1,1000", "0,500,500,1000", "0,600,500,1000", "0,-1,1000", "a,b", "0,999"):
        with pytest.raises(UsageError, match="--borders"):
            parse_borders(text, 1000)
    with pytest.raises(UsageError):
        equal_borders(10, 11)
