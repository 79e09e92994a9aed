"""The reverse process with diffusers' schedulers and classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finectl.diffusion import edm
from finectl.diffusion.config import DDPM, DiffusionConfig
from finectl.diffusion.losses import Denoiser
from finectl.diffusion.random import generator_for
from finectl.diffusion.schedulers import SCHEDULERS, require_scheduler, steps_handed_over
from finectl.errors import ComputationError


@dataclass(frozen=True, eq=False)
class Pretrained:
    """The model that another one was fine-tuned from, in that one's reverse process; it is never given a class.

    Args:
        model: (x_t, t, y) to the prediction, of the same shape as the other one's.
        null_label: Its own label that stands for no class.
        share: The share in [0, 1] of the reverse steps, the last ones, which it makes in the other one's place; None:
            at all steps it gives the unconditional prediction of guidance.

    Reference: Diff-Tuning, arXiv 2406.00773 (hand-over); Domain Guidance, arXiv 2504.01521.
    """

    model: Denoiser
    null_label: int
    share: float | None

    def predict(self, x: Tensor, t: int) -> Tensor:
        """Return its unconditional output for images (B, C, H, W) at one timestep, float32."""
        times = torch.full((x.shape[0],), t, dtype=torch.int64, device=x.device)
        return self.model(x, times, torch.full_like(times, self.null_label)).float()


def make_scheduler(
    name: str,
    sampling_steps: int,
    learned_sigma: bool,
    diffusion: DiffusionConfig = DDPM,
    *,
    clip: bool = True,
) -> Any:
    """Return a diffusers scheduler for the noise schedule that a model was trained with.

    Args:
        name: A key of `SCHEDULERS`.
        sampling_steps: Steps of the reverse process, 1..1000. Of EDM's process the scheduler knows these levels alone.
        learned_sigma: Whether the model predicts the variance; only DDPM uses it.
        diffusion: The forward process, and what the model predicts.
        clip: Whether the clean image lies in [-1, 1], as pixels do and latents do not.

    Raises:
        UsageError: there is no such scheduler, or it does not go with what the model predicts.
    """
    require_scheduler(name, diffusion.prediction)
    options = edm.to_scheduler(diffusion, sampling_steps) if diffusion.is_edm else diffusion.to_scheduler()
    if clip and name in ("ddpm", "ddim"):
        options["clip_sample_range"] = diffusion.data_scale
    if name == "ddpm":
        options.update(variance_type="learned_range" if learned_sigma else "fixed_small", clip_sample=clip)
    if name == "ddim":
        options.update(set_alpha_to_one=True, clip_sample=clip)
    if name == "pndm":
        options["skip_prk_steps"] = True
    scheduler = SCHEDULERS.load(name)(**options)
    if diffusion.is_edm and name == "dpm-solver++":
        scheduler.set_timesteps(timesteps=list(range(sampling_steps))[::-1])  # its own spacing leaves some levels out
    else:
        scheduler.set_timesteps(sampling_steps)
    return scheduler


@torch.no_grad()
def sample_images(
    model: Denoiser,
    shape: tuple[int, int, int],
    labels: Sequence[int],
    *,
    null_label: int,
    scheduler: str,
    sampling_steps: int,
    guidance: float,
    seed: int,
    first: int = 0,
    learned_sigma: bool = False,
    device: str | torch.device = "cpu",
    after_step: Callable[[], None] | None = None,
    diffusion: DiffusionConfig = DDPM,
    clip: bool = True,
    pretrained: Pretrained | None = None,
) -> Tensor:
    """Generate one batch of images.

    Image k of a run is drawn from generators seeded by (seed, k), so it does not depend on how the run is cut into
    batches.

    Args:
        model: (x_t, t, y) to the prediction, (B, C, H, W) or (B, 2C, H, W) with the variance.
        shape: (C, H, W).
        labels: The class of each image.
        null_label: The label that stands for no class.
        scheduler: A key of `SCHEDULERS`.
        sampling_steps: Steps of the reverse process.
        guidance: Scale w of classifier-free guidance; 1 is none.
        seed: Seed of the run.
        first: Number k of the batch's first image.
        learned_sigma: Whether the model predicts the variance.
        device: Where to compute.
        after_step: Called after each step.
        diffusion: The forward process, and what the model predicts.
        clip: Whether the images lie in [-1, 1], as pixels do and latents do not.
        pretrained: A second model, and what it does in the reverse process.

    Returns:
        (B, C, H, W), float32, clamped to [-1, 1] with `clip`.

    Raises:
        ComputationError: the images are not finite.

    Reference: Ho and Salimans, arXiv 2207.12598, Eq. 6, with 1 + w there being `guidance` here.
    """
    stepper = make_scheduler(scheduler, sampling_steps, learned_sigma, diffusion, clip=clip)
    levels = _levels(sampling_steps, diffusion)
    generators = [generator_for("sample", seed, first + index) for index in range(len(labels))]
    start = [torch.randn(shape, generator=generator) for generator in generators]
    x = torch.stack(start).to(device) * stepper.init_noise_sigma  # (B, C, H, W)
    y = torch.tensor(list(labels), dtype=torch.int64, device=device)
    keywords = {"generator": generators} if scheduler == "ddpm" else {}
    guide = pretrained if pretrained is not None and pretrained.share is None else None
    count = len(stepper.timesteps)
    own = count - steps_handed_over((pretrained.share if pretrained else None) or 0.0, count)
    for number, t in enumerate(stepper.timesteps):
        x_in, level = stepper.scale_model_input(x, t), levels[int(t)]
        if pretrained is not None and number >= own:
            output = pretrained.predict(x_in, level)
        else:
            output = _guided(model, x_in, level, y, null_label, guidance, guide)
        if learned_sigma and scheduler != "ddpm":
            output = output[:, : shape[0]]
        x = stepper.step(output, t, x, **keywords).prev_sample
        if after_step is not None:
            after_step()
    x = x / diffusion.data_scale
    _require_finite(x)
    return x.float().clamp(-1, 1) if clip else x.float()


def sampled_timesteps(scheduler: str, sampling_steps: int, diffusion: DiffusionConfig = DDPM) -> list[int]:
    """Return the timestep of each step of the reverse process, as the model is given it, in the order of the steps."""
    levels = _levels(sampling_steps, diffusion)
    return [levels[int(t)] for t in make_scheduler(scheduler, sampling_steps, False, diffusion).timesteps]


def _levels(sampling_steps: int, diffusion: DiffusionConfig) -> Sequence[int]:
    """Return the model's timestep of each timestep that a scheduler knows."""
    return edm.sampling_levels(diffusion, sampling_steps).tolist() if diffusion.is_edm else range(diffusion.timesteps)


def _require_finite(images: Tensor) -> None:
    if not bool(torch.isfinite(images).all()):
        raise ComputationError(
            "the generated images are not finite",
            expected="finite values",
            fix="use a smaller --guidance or --dtype float32; see the loss: finectl evaluate --metrics loss",
        )


def _guided(
    model: Denoiser, x: Tensor, t: int, y: Tensor, null_label: int, guidance: float, guide: Pretrained | None = None
) -> Tensor:
    """Return the model's output, its prediction moved away from the unconditional one by the guidance scale.

    The unconditional one is the model's own, or that of a pre-trained model which guides.

    All channels of the prediction are guided, as diffusers' DiTPipeline does; the published DiT sampler guides the
    first three of its four latent channels only.
    """
    times = torch.full((x.shape[0],), t, dtype=torch.int64, device=x.device)
    if guidance == 1.0:
        return model(x, times, y).float()
    if guide is not None:
        conditional, unconditional = model(x, times, y).float(), guide.predict(x, t)
    else:
        both = model(x.repeat(2, 1, 1, 1), times.repeat(2), torch.cat([y, torch.full_like(y, null_label)])).float()
        conditional, unconditional = both.chunk(2)
    channels = x.shape[1]
    noise = unconditional[:, :channels] + guidance * (conditional[:, :channels] - unconditional[:, :channels])
    return torch.cat([noise, conditional[:, channels:]], dim=1)
