"""EDM's process against the formulas of its paper (arXiv 2206.00364), written out, and its sampling of a Gaussian."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from finectl.diffusion import edm
from finectl.diffusion.config import DDPM, PROCESSES, DiffusionConfig, named_process
from finectl.diffusion.losses import denoising_loss
from finectl.diffusion.sampling import make_scheduler, sample_images
from finectl.diffusion.schedule import NoiseSchedule
from finectl.errors import InputError, UsageError

EDM = PROCESSES["edm"]
SIGMA_DATA = 0.5


def batch(seed: int = 0, count: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    x0 = torch.randn(count, 1, 4, 4, generator=random, dtype=torch.float64)
    noise = torch.randn(x0.shape, generator=random, dtype=torch.float64)
    return x0, noise, torch.randint(1000, (count,), generator=random)


@pytest.mark.parametrize("sigma_data", [SIGMA_DATA, 1.3])
def test_the_process_is_edms_preconditioning(sigma_data: float) -> None:
    """The noisy image is c_in z, what is predicted is -F, and an error of F counts 1: Eq. 7 and 8, table 1."""
    config = replace(EDM, sigma_data=sigma_data)
    schedule = NoiseSchedule.from_config(config)
    x0, noise, t = batch()
    sigma = edm.log_sigmas(config).exp()[t][:, None, None, None]
    total = (sigma**2 + sigma_data**2).sqrt()
    c_skip, c_out, c_in = sigma_data**2 / total**2, sigma * sigma_data / total, 1 / total
    z = x0 + sigma * noise
    assert torch.allclose(schedule.add_noise(x0, noise, t), c_in * z, rtol=0, atol=1e-12)
    target = (x0 - c_skip * z) / c_out  # of F
    assert torch.allclose(schedule.target(x0, noise, t), -target, rtol=0, atol=1e-12)
    # A network that is wrong by some d is wrong by c_out d in x_0, and EDM weighs that square by 1 / c_out^2.
    wrong = torch.randn(x0.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    network = target + wrong
    denoised = c_skip * z + c_out * network
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    theirs = (weight * (denoised - x0) ** 2).flatten(1).mean(1)
    ours = denoising_loss(lambda x, t, y: -network, schedule, x0, t, t, noise)
    assert torch.allclose(ours.double(), theirs, rtol=1e-5)


def test_the_noise_of_a_prediction() -> None:
    schedule = NoiseSchedule.from_config(EDM)
    x0, noise, t = batch()
    found = schedule.noise_of(schedule.target(x0, noise, t), schedule.add_noise(x0, noise, t), t)
    assert torch.allclose(found, noise, rtol=0, atol=1e-12)


def test_uniform_timesteps_are_edms_distribution_of_noise() -> None:
    """Each of 20 equally likely parts of a normal ln(sigma) holds its 50 of the 1,000 levels; so do the moments."""
    logs = edm.log_sigmas(EDM)
    normal = torch.distributions.Normal(torch.tensor(-1.2, dtype=torch.float64), 1.2)
    borders = normal.icdf(torch.arange(1, 20, dtype=torch.float64) / 20)
    assert torch.bincount(torch.bucketize(logs, borders), minlength=20).tolist() == [50] * 20
    assert float(logs.mean()) == pytest.approx(-1.2, abs=1e-9)
    assert float(logs.std()) == pytest.approx(1.2, rel=5e-3)  # the tails beyond the last levels are missing
    # t / T is the rank of the noise, up to half a level.
    ranks = normal.cdf(logs)
    assert torch.allclose(ranks, (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000, atol=1e-9)


def test_betas_and_their_products_go_together() -> None:
    schedule = NoiseSchedule.from_config(EDM)
    assert torch.allclose(torch.cumprod(1 - schedule.betas, 0), schedule.alphas_cumprod, rtol=1e-9)
    assert bool((schedule.betas > 0).all()) and bool((schedule.betas < 1).all())


def test_a_network_is_told_the_logarithm_of_the_noise() -> None:
    told, logs = edm.network_times(EDM), edm.log_sigmas(EDM)
    assert told[0] == 0 and float(told[-1]) == pytest.approx(999)
    slopes = told.diff() / (logs / 4).diff()  # c_noise = ln(sigma) / 4
    assert float(slopes.min()) == pytest.approx(float(slopes.max()))


def test_latents_have_the_same_noise_of_their_own_deviation() -> None:
    latents = named_process("edm", latents=True)
    assert latents.sigma_data == 1 and latents.data_scale == 1
    assert torch.allclose(edm.alphas_cumprod(latents), edm.alphas_cumprod(EDM), atol=1e-14)
    assert named_process("ddpm", latents=True) == DDPM


@pytest.mark.parametrize("steps", [1, 2, 7, 50, 333, 1000])
def test_the_steps_of_sampling(steps: int) -> None:
    """Each level once, from the largest noise on, near EDM's own steps (Eq. 5) where those are far apart."""
    levels = edm.sampling_levels(EDM, steps)
    assert len(levels) == steps and levels[-1] == 999 and levels[0] >= 0
    assert bool((levels.diff() > 0).all())
    if steps == 7:
        logs = edm.log_sigmas(EDM)
        first, last = (float(logs[place].div(7).exp()) for place in (0, -1))
        wanted = [7 * math.log(first + (last - first) * place / 6) for place in range(7)]
        for level, log in zip(levels.tolist(), wanted, strict=True):
            assert int((logs - log).abs().argmin()) == level


def exact(config: DiffusionConfig, mean: float, deviation: float) -> object:
    """Return the perfect denoiser of images whose values are independent and normal."""
    kept = NoiseSchedule.from_config(config).alphas_cumprod
    middle, variance = mean * config.data_scale, (deviation * config.data_scale) ** 2

    def predict(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        signal, spread = (value[t][:, None, None, None] for value in (kept.sqrt(), (1 - kept).sqrt()))
        total = signal**2 * variance + spread**2
        x0 = middle + signal * variance / total * (x.double() - signal * middle)
        noise = (x.double() - signal * x0) / spread
        return (signal * noise - spread * x0).float()

    return predict


def sampled(config: DiffusionConfig, mean: float, deviation: float, scheduler: str, steps: int) -> Tensor:
    return sample_images(
        exact(config, mean, deviation),  # type: ignore[arg-type]
        (1, 32, 32),
        [0] * 16,
        null_label=0,
        scheduler=scheduler,
        sampling_steps=steps,
        guidance=1.0,
        seed=1,
        diffusion=config,
        clip=False,
    )


@pytest.mark.parametrize(
    ("scheduler", "steps", "error"), [("ddim", 50, 0.05), ("ddim", 1000, 0.01), ("ddpm", 1000, 0.02)]
)
@pytest.mark.parametrize("deviation", [0.5, 0.2])
def test_a_gaussian_is_sampled_with_its_variance(deviation: float, scheduler: str, steps: int, error: float) -> None:
    """16,384 values: their own error is 0.6 %."""
    images = sampled(EDM, 0.0, deviation, scheduler, steps)
    assert float(images.std()) == pytest.approx(deviation, rel=error)


def test_second_order_steps_are_closer() -> None:
    assert float(sampled(EDM, 0.0, 0.2, "dpm-solver++", 50).std()) == pytest.approx(0.2, rel=0.015)


def test_the_start_lacks_a_known_share_of_the_mean() -> None:
    """Sampling starts at the largest level, from noise of mean 0: what that leaves out is alpha times the mean."""
    alpha = float(edm.alphas_cumprod(EDM)[-1].sqrt())
    assert alpha == pytest.approx(0.032, abs=5e-4)
    mean, deviation = -0.4, SIGMA_DATA  # of deviation sigma_data the reverse process only shifts: the share stays
    images = sampled(EDM, mean, deviation, "ddim", 1000)
    lacking = mean - float(images.mean())
    assert lacking == pytest.approx(alpha * mean, abs=0.012)  # three errors of a mean of 16,384 values
    assert float(images.std()) == pytest.approx(deviation, rel=0.015)


def test_images_are_clipped_where_images_end() -> None:
    assert make_scheduler("ddim", 10, False, EDM).config.clip_sample_range == 2.0
    assert make_scheduler("ddim", 10, False).config.clip_sample_range == 1.0


def test_the_schedulers_levels_are_those_of_the_process() -> None:
    for name in ("ddpm", "ddim", "dpm-solver++"):
        scheduler = make_scheduler(name, 20, False, EDM)
        assert scheduler.timesteps.tolist() == list(range(20))[::-1]
        kept = edm.alphas_cumprod(EDM)[edm.sampling_levels(EDM, 20)]
        assert torch.allclose(scheduler.alphas_cumprod.double(), kept, rtol=1e-3)


def test_configurations_of_other_processes_are_what_they_were() -> None:
    assert DDPM.to_dict() == {
        "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "timesteps": 1000, "prediction": "epsilon",
    }  # fmt: skip
    assert DiffusionConfig.from_dict(EDM.to_dict()) == EDM
    assert "beta_start" not in EDM.to_dict() and EDM.to_dict()["p_mean"] == -1.2


@pytest.mark.parametrize(
    "values",
    [
        {"beta_schedule": "edm"},  # epsilon
        {"beta_schedule": "edm", "prediction": "v_prediction", "p_std": 0.0},
        {"beta_schedule": "edm", "prediction": "v_prediction", "sigma_data": -1.0},
        {"beta_schedule": "edm", "prediction": "v_prediction", "beta_start": 0.1},
        {"sigma_data": 0.5},
        {"beta_schedule": "edn", "prediction": "v_prediction"},
    ],
)
def test_what_is_no_such_process(values: dict[str, object]) -> None:
    with pytest.raises(InputError):
        DiffusionConfig.from_dict(values)


def test_no_scheduler_of_diffusers_scales_the_data() -> None:
    with pytest.raises(UsageError, match="scales"):
        EDM.to_scheduler()
    EDM.require_variance(learned=False)
    with pytest.raises(UsageError, match="variance"):
        EDM.require_variance(learned=True)
