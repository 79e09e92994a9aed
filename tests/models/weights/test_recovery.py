"""One step back to clean weights: the right form, and how wrong the printed one is."""

from __future__ import annotations

import pytest
import torch

from finectl.diffusion.config import DiffusionConfig
from finectl.diffusion.schedule import NoiseSchedule
from finectl.models.weights.recovery import clean_of, noise_of

# Timestep of the linear schedule -> sigma / alpha, and sigma (1 / alpha - 1).
TABLE = {300: (1.24, 0.46), 500: (3.44, 2.49), 700: (12.0, 11.0), 900: (60.8, 59.9), 999: (157.0, 157.0)}


@pytest.fixture(name="weights")
def _weights() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(854, 256, generator=generator), torch.randn(854, 256, generator=generator)


@pytest.mark.parametrize("t", TABLE)
def test_the_printed_equation_is_wrong_by_what_the_table_says(
    weights: tuple[torch.Tensor, torch.Tensor], t: int
) -> None:
    clean, noise = (values.double() for values in weights)
    schedule = NoiseSchedule.linear()
    alpha, sigma = schedule.alphas_cumprod[t].sqrt(), (1 - schedule.alphas_cumprod[t]).sqrt()
    noisy = alpha * clean + sigma * noise
    found = clean_of(schedule, noise, noisy, torch.full((854,), t))
    assert (found - clean).square().mean().sqrt() < 5e-6
    printed = noisy / alpha - sigma * noise
    wrong = (printed - clean).square().mean().sqrt()
    gain, expected = TABLE[t]
    assert wrong == pytest.approx(expected, rel=0.02)
    assert wrong == pytest.approx(float(sigma * (1 / alpha - 1)), rel=0.01)
    assert float(sigma / alpha) == pytest.approx(gain, rel=0.01)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("t", [0, 300, 700])
def test_every_prediction_recovers_clean_weights(
    weights: tuple[torch.Tensor, torch.Tensor], prediction: str, t: int
) -> None:
    clean, noise = weights
    schedule = NoiseSchedule.from_config(DiffusionConfig(prediction=prediction))
    times = torch.full((854,), t)
    images = clean[:, None, None], noise[:, None, None]
    noisy = schedule.add_noise(*images, times)
    target = schedule.target(*images, times)
    found = clean_of(schedule, target, noisy, times)
    torch.testing.assert_close(found, images[0], rtol=0, atol=2e-5)
    # Of nearly clean weights little tells the noise.
    torch.testing.assert_close(
        noise_of(schedule, found, noisy, times), images[1], rtol=0, atol=1e-2 if t == 0 else 1e-4
    )
