"""The reverse process: images that depend on seed and number alone, guidance, and perfect denoisers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from finectl.diffusion.sampling import make_scheduler, sample_images
from finectl.diffusion.schedule import NoiseSchedule, at_images
from finectl.diffusion.schedulers import SCHEDULERS
from finectl.errors import ComputationError, UsageError

SCHEDULE = NoiseSchedule.linear()
SHAPE = (1, 4, 4)
POINT = torch.linspace(-0.9, 0.9, 16).reshape(1, 1, 4, 4)


def perfect(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """The noise in x_t when all data is the one image `POINT`."""
    kept = SCHEDULE.alphas_cumprod[t]
    return (x - at_images(kept.sqrt(), x) * POINT) / at_images((1 - kept).sqrt(), x)


def by_label(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """A model whose answer depends on all it is given, image by image."""
    return torch.tanh(x * 0.5) + 0.1 * torch.cos(t.float() + 3 * y)[:, None, None, None]


def sample(model: Any = by_label, labels: tuple[int, ...] = (0, 1, 2, 3, 4), **options: Any) -> Tensor:
    chosen = {"scheduler": "ddim", "sampling_steps": 8, "guidance": 1.0, "seed": 0, "null_label": 10, **options}
    return sample_images(model, SHAPE, labels, **chosen)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_image_k_is_the_same_whatever_the_batch_size(scheduler: str, guidance: float) -> None:
    options = {"scheduler": scheduler, "guidance": guidance}
    together = sample(**options)
    assert together.shape == (5, *SHAPE) and together.dtype == torch.float32
    assert float(together.abs().max()) <= 1 and bool(torch.isfinite(together).all())
    for first, size in ((0, 2), (2, 3), (4, 1)):
        part = sample(labels=(0, 1, 2, 3, 4)[first : first + size], first=first, **options)
        assert torch.equal(part, together[first : first + size])
    assert not torch.equal(together, sample(seed=1, **options))
    assert len({tuple(image.flatten().tolist()) for image in together}) == 5


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 2, 50])
def test_every_scheduler_takes_few_and_many_steps(scheduler: str, steps: int) -> None:
    images = sample(scheduler=scheduler, sampling_steps=steps)
    assert bool(torch.isfinite(images).all())


def test_an_unknown_scheduler() -> None:
    with pytest.raises(UsageError, match="did you mean"):
        make_scheduler("dimm", 10, False)


def test_guidance_of_one_is_none_and_calls_the_model_once() -> None:
    sizes = []

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        sizes.append((len(x), y.tolist()))
        return by_label(x, t, y)

    plain = sample(model, guidance=1.0)
    assert {size for size, _ in sizes} == {5}
    sizes.clear()
    almost = sample(model, guidance=1.0 + 1e-6)
    assert sizes[0] == (10, [0, 1, 2, 3, 4, 10, 10, 10, 10, 10])
    torch.testing.assert_close(almost, plain, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(sample(guidance=3.0), plain, atol=1e-3)


def test_guidance_moves_away_from_the_unconditional_prediction() -> None:
    """A model that sees no label is not moved; guidance 0 is the unconditional model."""

    def blind(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(x)

    torch.testing.assert_close(sample(blind, guidance=7.0), sample(blind), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sample(guidance=0.0), sample(labels=(10,) * 5), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_ddim_with_a_perfect_denoiser_finds_the_only_image(guidance: float) -> None:
    for steps in (1, 5, 50):
        images = sample(perfect, sampling_steps=steps, guidance=guidance)
        torch.testing.assert_close(images, POINT.expand_as(images), rtol=0, atol=2e-3)


@pytest.mark.parametrize("scheduler", ["ddpm", "pndm", "dpm-solver++"])
def test_the_other_schedulers_come_close_to_the_only_image(scheduler: str) -> None:
    images = sample(perfect, scheduler=scheduler, sampling_steps=100)
    assert float((images - POINT).abs().max()) < 0.1


def test_a_learned_variance_is_used_by_ddpm_and_left_out_by_the_others() -> None:
    def with_variance(value: float) -> Any:
        return lambda x, t, y: torch.cat([by_label(x, t, y), torch.full_like(x, value)], dim=1)

    for scheduler in SCHEDULERS:
        low = sample(with_variance(-1.0), scheduler=scheduler, learned_sigma=True)
        high = sample(with_variance(1.0), scheduler=scheduler, learned_sigma=True)
        assert torch.equal(low, high) == (scheduler != "ddpm")
        assert low.shape == (5, *SHAPE)
        guided = sample(with_variance(1.0), scheduler=scheduler, learned_sigma=True, guidance=2.0)
        assert guided.shape == (5, *SHAPE) and not torch.equal(guided, high)


def test_images_that_are_not_finite_are_no_images() -> None:
    with pytest.raises(ComputationError, match="not finite"):
        sample(lambda x, t, y: x * float("nan"))


def test_work_can_stop_between_two_steps() -> None:
    calls = []

    def stop() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(after_step=stop)
    assert len(calls) == 3


def test_the_schedulers_add_the_noise_that_training_added() -> None:
    for name in SCHEDULERS:
        theirs = make_scheduler(name, 10, False).alphas_cumprod
        torch.testing.assert_close(theirs.double(), SCHEDULE.alphas_cumprod, rtol=1e-4, atol=1e-7)
