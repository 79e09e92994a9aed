"""The forward process and the losses, against closed forms and torch.distributions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from finectl.diffusion.losses import (
    denoising_loss,
    discretised_log_likelihood,
    gaussian_divergence,
    variational_bound,
)
from finectl.diffusion.ranges import equal_ranges
from finectl.diffusion.schedule import NoiseSchedule
from finectl.errors import UsageError

SCHEDULE = NoiseSchedule.linear()


def test_the_betas_are_linear_and_the_products_are_theirs() -> None:
    betas = [1e-4 + (0.02 - 1e-4) * t / 999 for t in range(1000)]
    torch.testing.assert_close(SCHEDULE.betas, torch.tensor(betas, dtype=torch.float64))
    product, products = 1.0, []
    for beta in betas:
        product *= 1 - beta
        products.append(product)
    torch.testing.assert_close(SCHEDULE.alphas_cumprod, torch.tensor(products, dtype=torch.float64))
    assert len(SCHEDULE) == 1000
    assert float(SCHEDULE.alphas_cumprod[0]) == pytest.approx(0.9999)
    assert float(SCHEDULE.alphas_cumprod[-1]) == pytest.approx(4.0358e-5, rel=1e-3)


def test_it_is_the_schedule_of_diffusers() -> None:
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    torch.testing.assert_close(SCHEDULE.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=1e-4, atol=1e-7)
    x0, noise, t = torch.randn(3, 1, 2, 2), torch.randn(3, 1, 2, 2), torch.tensor([0, 500, 999])
    torch.testing.assert_close(SCHEDULE.add_noise(x0, noise, t), theirs.add_noise(x0, noise, t), rtol=1e-4, atol=1e-5)


def test_noise_keeps_the_variance_and_each_image_has_its_own_timestep() -> None:
    random = torch.Generator().manual_seed(0)
    x0 = torch.randn(4, 3, 64, 64, generator=random)
    noise = torch.randn(4, 3, 64, 64, generator=random)
    t = torch.tensor([0, 250, 600, 999])
    noisy = SCHEDULE.add_noise(x0, noise, t)
    assert noisy.dtype == torch.float32
    torch.testing.assert_close(noisy.flatten(1).var(1), torch.ones(4), rtol=0.05, atol=0)
    for index in range(4):
        alone = SCHEDULE.add_noise(x0[index : index + 1], noise[index : index + 1], t[index : index + 1])
        assert torch.equal(alone[0], noisy[index])
        kept = float(SCHEDULE.alphas_cumprod[t[index]])
        torch.testing.assert_close(alone[0], math.sqrt(kept) * x0[index] + math.sqrt(1 - kept) * noise[index])


def constant(value: Tensor) -> Callable[..., Tensor]:
    return lambda x, t, y: value


def test_the_loss_is_the_mean_squared_error_of_each_image() -> None:
    x0, noise = torch.zeros(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    y, t = torch.zeros(2, dtype=torch.int64), torch.tensor([3, 700])
    assert torch.equal(denoising_loss(constant(noise), SCHEDULE, x0, y, t, noise), torch.zeros(2))
    off = noise + torch.tensor([1.0, 2.0])[:, None, None, None]
    torch.testing.assert_close(
        denoising_loss(constant(off), SCHEDULE, x0, y, t, noise), torch.tensor([1.0, 4.0]), rtol=1e-5, atol=1e-5
    )


def test_the_model_sees_the_noisy_image_the_timestep_and_the_label() -> None:
    seen: list[Any] = []

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.extend([x, t, y])
        return torch.zeros_like(x)

    x0, noise = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    t, y = torch.tensor([3, 700]), torch.tensor([4, 5])
    denoising_loss(model, SCHEDULE, x0, y, t, noise)
    assert torch.equal(seen[0], SCHEDULE.add_noise(x0, noise, t)) and seen[1] is t and seen[2] is y


def test_the_divergence_is_that_of_two_normal_distributions() -> None:
    random = torch.Generator().manual_seed(0)
    mean1, log_var1, mean2, log_var2 = torch.randn(4, 100, generator=random, dtype=torch.float64)
    wanted = kl_divergence(Normal(mean1, (log_var1 / 2).exp()), Normal(mean2, (log_var2 / 2).exp()))
    torch.testing.assert_close(gaussian_divergence(mean1, log_var1, mean2, log_var2), wanted)
    assert torch.equal(gaussian_divergence(mean1, log_var1, mean1, log_var1), torch.zeros(100, dtype=torch.float64))


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.3), (0.7, 0.05), (-1.2, 0.5), (0.123, 0.01), (3.0, 1.0)])
def test_the_discretised_likelihood_sums_to_one_over_the_levels(mean: float, std: float) -> None:
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    log_probability = discretised_log_likelihood(
        levels, torch.full_like(levels, mean), torch.full_like(levels, math.log(std))
    )
    assert float(log_probability.exp().sum()) == pytest.approx(1.0, abs=1e-6)
    normal = Normal(torch.tensor(mean, dtype=torch.float64), std)
    inside = normal.cdf(levels[100] + 1 / 255) - normal.cdf(levels[100] - 1 / 255)
    assert float(log_probability[100].exp()) == pytest.approx(float(inside), rel=1e-6, abs=2e-12)
    assert float(log_probability[0].exp()) == pytest.approx(float(normal.cdf(levels[0] + 1 / 255)), rel=1e-6, abs=2e-12)


def posterior(x0: Tensor, x_t: Tensor, t: int) -> tuple[Tensor, float]:
    """Return mean and variance of q(x_{t-1} | x_t, x_0), DDPM Eq. 7, in plain numbers."""
    beta, kept, before = (
        float(SCHEDULE.betas[t]),
        float(SCHEDULE.alphas_cumprod[t]),
        float(SCHEDULE.alphas_cumprod[t - 1]),
    )
    mean = math.sqrt(before) * beta / (1 - kept) * x0 + math.sqrt(1 - beta) * (1 - before) / (1 - kept) * x_t
    return mean, beta * (1 - before) / (1 - kept)


@pytest.mark.parametrize("t", [1, 10, 500, 999])
@pytest.mark.parametrize("fraction", [-1.0, -0.2, 1.0])
def test_the_bound_is_the_divergence_of_the_posterior_from_the_model(t: int, fraction: float) -> None:
    random = torch.Generator().manual_seed(t)
    x0 = torch.rand(1, 1, 4, 4, generator=random, dtype=torch.float64) * 2 - 1
    noise = torch.randn(1, 1, 4, 4, generator=random, dtype=torch.float64)
    predicted = noise + 0.01 * torch.randn(1, 1, 4, 4, generator=random, dtype=torch.float64)
    times = torch.tensor([t])
    x_t = SCHEDULE.add_noise(x0, noise, times)
    kept = float(SCHEDULE.alphas_cumprod[t])
    x0_predicted = (x_t - math.sqrt(1 - kept) * predicted) / math.sqrt(kept)
    true_mean, variance = posterior(x0, x_t, t)
    model_mean, _ = posterior(x0_predicted, x_t, t)
    share = (fraction + 1) / 2
    model_std = math.exp(0.5 * (share * math.log(float(SCHEDULE.betas[t])) + (1 - share) * math.log(variance)))
    wanted = kl_divergence(Normal(true_mean, math.sqrt(variance)), Normal(model_mean, model_std))
    bound = variational_bound(SCHEDULE, x0, x_t, times, predicted, torch.full_like(x0, fraction))
    torch.testing.assert_close(bound, wanted.flatten(1).mean(1) / math.log(2), rtol=1e-6, atol=1e-9)


def test_the_bound_at_the_first_timestep_is_the_likelihood_of_the_image() -> None:
    x0 = (torch.randint(0, 256, (1, 1, 4, 4), dtype=torch.float64)) / 127.5 - 1
    noise, t = torch.randn(1, 1, 4, 4, dtype=torch.float64), torch.tensor([0])
    x_t = SCHEDULE.add_noise(x0, noise, t)
    bound = variational_bound(SCHEDULE, x0, x_t, t, noise, torch.ones_like(x0))
    # With the true noise the mean is x_0 itself, and the largest variance is beta_0.
    std = math.sqrt(float(SCHEDULE.betas[0]))
    wanted = -discretised_log_likelihood(x0, x0, torch.full_like(x0, math.log(std))) / math.log(2)
    torch.testing.assert_close(bound, wanted.flatten(1).mean(1), rtol=1e-5, atol=1e-6)


def test_the_bound_trains_the_variance_alone() -> None:
    x0, noise = torch.rand(3, 2, 4, 4) * 2 - 1, torch.randn(3, 2, 4, 4)
    y, t = torch.zeros(3, dtype=torch.int64), torch.tensor([0, 400, 999])
    output = torch.randn(3, 4, 4, 4, requires_grad=True)
    only_noise = denoising_loss(constant(output), SCHEDULE, x0, y, t, noise, bound=False)
    torch.testing.assert_close(only_noise, (output[:, :2] - noise).square().flatten(1).mean(1))
    both = denoising_loss(constant(output), SCHEDULE, x0, y, t, noise)
    (gradient,) = torch.autograd.grad((both - only_noise).sum(), output, retain_graph=True)
    assert torch.equal(gradient[:, :2], torch.zeros_like(gradient[:, :2]))
    assert bool((gradient[:, 2:] != 0).any()) and bool(torch.isfinite(gradient).all())
    assert bool((both > only_noise).all())


def test_ranges_cover_every_timestep_once_and_evenly() -> None:
    for total, count in ((1000, 4), (1000, 3), (1000, 1000), (10, 1), (7, 3)):
        ranges = equal_ranges(total, count)
        assert [t for first, last in ranges for t in range(first, last + 1)] == list(range(total))
        sizes = {last - first + 1 for first, last in ranges}
        assert len(ranges) == count and max(sizes) - min(sizes) <= 1
    for count in (0, 11):
        with pytest.raises(UsageError):
            equal_ranges(10, count)
