"""Noise schedules and predictions other than DDPM's, against diffusers and against closed forms."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from finectl.diffusion.config import DDPM, PREDICTIONS, DiffusionConfig
from finectl.diffusion.losses import denoising_loss, variational_bound
from finectl.diffusion.sampling import make_scheduler, sample_images
from finectl.diffusion.schedule import NoiseSchedule, at_images
from finectl.errors import InputError, UsageError

SCHEDULES = [
    DDPM,
    DiffusionConfig(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    DiffusionConfig(beta_schedule="squaredcos_cap_v2", timesteps=400),
]


@pytest.mark.parametrize("config", SCHEDULES, ids=lambda config: config.beta_schedule)
def test_it_is_the_schedule_of_diffusers(config: DiffusionConfig) -> None:
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(**config.to_scheduler())
    ours = NoiseSchedule.of(SimpleNamespace(diffusion=config))
    assert len(ours) == config.timesteps
    torch.testing.assert_close(ours.betas.float(), theirs.betas, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=1e-3, atol=1e-7)
    assert torch.equal(NoiseSchedule.of(SimpleNamespace(diffusion=DDPM)).betas, NoiseSchedule.linear().betas)
    assert make_scheduler("dpm-solver++", 10, False, config).config.beta_schedule == config.beta_schedule


def noisy(schedule: NoiseSchedule) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    x0 = torch.rand(6, 2, 4, 4, generator=random) * 2 - 1
    noise = torch.randn(6, 2, 4, 4, generator=random)
    t = torch.tensor([0, 1, 100, 500, 900, 999])
    return x0, noise, t, schedule.add_noise(x0, noise, t)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perfect_prediction_has_no_loss_and_gives_the_noise_back(prediction: str) -> None:
    schedule = NoiseSchedule.from_config(DiffusionConfig(prediction=prediction))
    x0, noise, t, x_t = noisy(schedule)
    target = schedule.target(x0, noise, t)
    y = torch.zeros(6, dtype=torch.int64)
    assert denoising_loss(lambda *_: target, schedule, x0, y, t, noise).abs().max() == 0
    off = denoising_loss(lambda *_: target + 0.5, schedule, x0, y, t, noise)
    torch.testing.assert_close(off, torch.full((6,), 0.25))
    # At t = 0 the noise is a hundredth of the image, so that rounding counts a hundred times.
    torch.testing.assert_close(schedule.noise_of(target, x_t, t), noise, rtol=1e-4, atol=1e-4)


def test_v_is_what_diffusers_calls_v() -> None:
    from diffusers import DDPMScheduler

    schedule = NoiseSchedule.from_config(DiffusionConfig(prediction="v_prediction"))
    x0, noise, t, _ = noisy(schedule)
    theirs = DDPMScheduler(beta_end=0.02).get_velocity(x0, noise, t)
    torch.testing.assert_close(schedule.target(x0, noise, t), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_bound_is_that_of_the_noise_that_the_prediction_stands_for(prediction: str) -> None:
    schedule = NoiseSchedule.from_config(DiffusionConfig(prediction=prediction))
    x0, noise, t, x_t = noisy(schedule)
    fraction = torch.full_like(x0, 0.3)
    target = schedule.target(x0, noise, t)
    output = torch.cat([target, fraction], dim=1)
    loss = denoising_loss(lambda *_: output, schedule, x0, t, t, noise)
    wanted = variational_bound(schedule, x0, x_t, t, noise, fraction)
    torch.testing.assert_close(loss, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scheduler", ["ddpm", "ddim", "pndm", "dpm-solver++"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perfect_model_is_sampled_to_its_image(scheduler: str, prediction: str) -> None:
    config = DiffusionConfig(prediction=prediction, beta_schedule="scaled_linear")
    if (scheduler, prediction) == ("pndm", "sample"):
        with pytest.raises(UsageError, match="clean image"):
            make_scheduler(scheduler, 25, False, config)
        return
    schedule = NoiseSchedule.from_config(config)
    image = torch.tensor([0.5, -0.25]).view(1, 2, 1, 1)

    def perfect(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Know the image: the noise is what is left of x_t."""
        kept = schedule.alphas_cumprod[t]
        signal, rest = at_images(kept.sqrt(), x), at_images((1 - kept).sqrt(), x)
        return schedule.target(image.expand_as(x), (x - signal * image) / rest, t)

    made = sample_images(
        perfect, (2, 4, 4), [0, 0], null_label=1, scheduler=scheduler, sampling_steps=25, guidance=1.0, seed=0,
        diffusion=config,
    )  # fmt: skip
    torch.testing.assert_close(made, image.expand_as(made), rtol=0, atol=0.1)


def test_latents_are_not_clipped() -> None:
    schedule = NoiseSchedule.linear()

    def far(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        kept = schedule.alphas_cumprod[t]
        return (x - at_images(kept.sqrt(), x) * 4.0) / at_images((1 - kept).sqrt(), x)

    def highest(clip: bool) -> float:
        made = sample_images(
            far, (1, 2, 2), [0], null_label=1, scheduler="ddim", sampling_steps=20, guidance=1.0, seed=0, clip=clip
        )
        return float(made.max())

    assert highest(True) == 1.0
    assert highest(False) == pytest.approx(4.0, abs=0.05)


def test_a_wrong_schedule_is_refused() -> None:
    with pytest.raises(UsageError):
        DiffusionConfig(beta_start=0.0)
    with pytest.raises(UsageError):
        DiffusionConfig(prediction="flow")
    for wrong in ([], {"beta": 1}, {"timesteps": 1.5}, {"timesteps": True}, {"beta_end": "0.02"}):
        with pytest.raises(InputError):
            DiffusionConfig.from_dict(wrong)
    with pytest.raises(InputError, match="no beta schedule"):
        DiffusionConfig.from_scheduler({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "scheduler")
    read = DiffusionConfig.from_scheduler({"num_train_timesteps": 10, "beta_schedule": "linear"}, "scheduler")
    assert read == DiffusionConfig(timesteps=10)
