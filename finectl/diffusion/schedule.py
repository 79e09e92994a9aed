"""The forward process: betas, their products, noisy images, and what a model predicts of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from finectl.diffusion import edm
from finectl.diffusion.config import BETA_END, BETA_START, DDPM, TRAIN_TIMESTEPS, DiffusionConfig

__all__ = ["BETA_END", "BETA_START", "TRAIN_TIMESTEPS", "NoiseSchedule", "at_images"]

COSINE_OFFSET = 0.008
LARGEST_COSINE_BETA = 0.999


class HasDiffusion(Protocol):
    """The configuration of a model that says how its images were made noisy."""

    @property
    def diffusion(self) -> DiffusionConfig: ...


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """A variance-preserving diffusion.

    Args:
        betas: (T,), float64 in (0, 1).
        alphas_cumprod: (T,), float64, the products of 1 - beta.
        config: What the betas were made from, and what the model predicts.

    Reference: Ho et al., arXiv 2006.11239, section 2.
    """

    betas: Tensor
    alphas_cumprod: Tensor
    config: DiffusionConfig = DDPM

    @classmethod
    def linear(cls, device: str | torch.device = "cpu") -> NoiseSchedule:
        """Return the schedule of DDPM and DiT: 1,000 betas from 1e-4 to 0.02, noise prediction."""
        return cls.from_config(DDPM, device)

    @classmethod
    def of(cls, model: HasDiffusion, device: str | torch.device = "cpu") -> NoiseSchedule:
        """Return the schedule that a model's configuration names.

        Args:
            model: The configuration of a model, of any architecture.
            device: Where the betas are kept.
        """
        return cls.from_config(model.diffusion, device)

    @classmethod
    def from_config(cls, config: DiffusionConfig, device: str | torch.device = "cpu") -> NoiseSchedule:
        """Return the schedule of these numbers.

        Reference: arXiv 2006.11239, section 4 (linear); Rombach et al., arXiv 2112.10752, section D (scaled linear);
        Nichol and Dhariwal, arXiv 2102.09672, Eq. 17 (cosine); `finectl.diffusion.edm`.
        """
        if config.is_edm:
            kept = edm.alphas_cumprod(config)
            before = torch.cat([kept.new_ones(1), kept[:-1]])
            return cls((1 - kept / before).to(device), kept.to(device), config)
        first, last, count = config.beta_start, config.beta_end, config.timesteps
        if config.beta_schedule == "linear":
            betas = torch.linspace(first, last, count, dtype=torch.float64)
        elif config.beta_schedule == "scaled_linear":
            betas = torch.linspace(math.sqrt(first), math.sqrt(last), count, dtype=torch.float64).square()
        else:
            time = torch.arange(count + 1, dtype=torch.float64) / count  # (T + 1,)
            kept = torch.cos((time + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2).square()
            betas = (1 - kept[1:] / kept[:-1]).clamp(max=LARGEST_COSINE_BETA)
        return cls(betas.to(device), torch.cumprod(1 - betas, dim=0).to(device), config)

    def __len__(self) -> int:
        return int(self.betas.shape[0])

    @property
    def prediction(self) -> str:
        """What the model predicts: `epsilon`, `v_prediction` or `sample`."""
        return self.config.prediction

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise; EDM's process divides x_0 by sigma_data.

        Args:
            x0: (B, C, H, W), images in [-1, 1].
            noise: (B, C, H, W), standard normal.
            t: (B,), int64 in 0..T-1.

        Reference: arXiv 2006.11239, Eq. 4.
        """
        kept = self.alphas_cumprod[t]  # (B,)
        signal = kept.sqrt() * self.config.data_scale
        return at_images(signal, x0) * x0 + at_images((1 - kept).sqrt(), x0) * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return what a perfect model would predict, (B, C, H, W).

        Args:
            x0: (B, C, H, W), images in [-1, 1].
            noise: (B, C, H, W), standard normal.
            t: (B,), int64 in 0..T-1.

        Reference: arXiv 2006.11239, Eq. 14 (noise); Salimans and Ho, arXiv 2202.00512, section 4 (clean image, and
        v = sqrt(alpha_bar_t) noise - sqrt(1 - alpha_bar_t) x_0).
        """
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return x0
        kept = self.alphas_cumprod[t]
        spread = (1 - kept).sqrt() * self.config.data_scale
        return at_images(kept.sqrt(), x0) * noise - at_images(spread, x0) * x0

    def noise_of(self, predicted: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the noise that a prediction stands for, (B, C, H, W).

        Args:
            predicted: (B, C, H, W), a model's output without its variance.
            x_t: (B, C, H, W), the noisy images.
            t: (B,), int64 in 0..T-1.

        Reference: arXiv 2202.00512, section 4 and appendix D.
        """
        if self.prediction == "epsilon":
            return predicted
        kept = self.alphas_cumprod[t]
        signal, noise = at_images(kept.sqrt(), x_t), at_images((1 - kept).sqrt(), x_t)
        if self.prediction == "sample":
            return (x_t - signal * predicted) / noise
        return signal * predicted + noise * x_t


def at_images(values: Tensor, images: Tensor) -> Tensor:
    """Shape one value an image, (B,), so that it multiplies images (B, C, H, W) in their dtype."""
    return values.to(images.dtype)[:, None, None, None]
