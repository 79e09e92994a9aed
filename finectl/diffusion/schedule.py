"""The forward process: betas, their products, and noisy images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TRAIN_TIMESTEPS = 1000
BETA_START = 1e-4
BETA_END = 0.02


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """A variance-preserving diffusion with linear betas.

    Args:
        betas: (T,), float64 in (0, 1).
        alphas_cumprod: (T,), float64, the products of 1 - beta.

    Reference: Ho et al., arXiv 2006.11239, section 2.
    """

    betas: Tensor
    alphas_cumprod: Tensor

    @classmethod
    def linear(cls, device: str | torch.device = "cpu") -> NoiseSchedule:
        """Return the schedule of DDPM and DiT: 1,000 betas from 1e-4 to 0.02."""
        betas = torch.linspace(BETA_START, BETA_END, TRAIN_TIMESTEPS, dtype=torch.float64)
        return cls(betas.to(device), torch.cumprod(1 - betas, dim=0).to(device))

    def __len__(self) -> int:
        return int(self.betas.shape[0])

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise.

        Args:
            x0: (B, C, H, W), images in [-1, 1].
            noise: (B, C, H, W), standard normal.
            t: (B,), int64 in 0..T-1.

        Reference: arXiv 2006.11239, Eq. 4.
        """
        kept = self.alphas_cumprod[t]  # (B,)
        return at_images(kept.sqrt(), x0) * x0 + at_images((1 - kept).sqrt(), x0) * noise


def at_images(values: Tensor, images: Tensor) -> Tensor:
    """Shape one value an image, (B,), so that it multiplies images (B, C, H, W) in their dtype."""
    return values.to(images.dtype)[:, None, None, None]
