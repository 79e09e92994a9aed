"""EDM's process: noise levels at the quantiles of the distribution that its training draws them from.

EDM makes data of standard deviation sigma_data noisy as z = x_0 + sigma n and trains F with

    D(z; sigma) = c_skip z + c_out F(c_in z; ln(sigma) / 4),    weight 1 / c_out^2 on |D - x_0|^2,    ln(sigma) ~ N.

Divide data and z by sigma_data, and it is a variance-preserving process: alpha_bar = sigma_data^2 / (sigma^2 +
sigma_data^2), the noisy image is c_in z, the weight on the error of F is 1, and F is -v. So a model of this process
predicts v, its timestep t of T is the level at the quantile (t + 1/2) / T of ln(sigma), uniform timesteps are EDM's
distribution of sigma, and t / T is the rank of the noise.

What differs from EDM: levels are T fixed ones, the largest at the quantile 1 - 1 / (2 T) (sigma = 15.6 by default), not
80. Sampling starts there from noise of the right variance without the share alpha of the data's mean that belongs in
it: samples of data whose mean is m (of data / sigma_data) are off by at most alpha m = 0.032 m by default, and EDM's by
0.006 m. The network is told 4 c_noise = ln(sigma), stretched so that the levels go from 0 to T - 1, which is the range
that its sinusoids resolve; an imported network of EDM itself is told c_noise as it is. EDM's own checkpoints are
pickles, which are never read; state dicts of its ADM networks are (`finectl.models.foreign.edm`).

Reference: Karras et al., arXiv 2206.00364, section 5 and table 1.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from finectl.diffusion.config import DiffusionConfig

NOISE_SCALE = 4
"""c_noise = ln(sigma) / 4."""
RHO = 7.0
"""Exponent of EDM's steps."""


def log_sigmas(config: DiffusionConfig) -> Tensor:
    """Return ln(sigma) of every timestep, (T,), float64, rising.

    Reference: arXiv 2206.00364, table 1 (training distribution).
    """
    ranks = (torch.arange(config.timesteps, dtype=torch.float64) + 0.5) / config.timesteps
    return config.p_mean + config.p_std * torch.special.ndtri(ranks)


def alphas_cumprod(config: DiffusionConfig) -> Tensor:
    """Return sigma_data^2 / (sigma^2 + sigma_data^2) of every timestep, (T,), float64."""
    return torch.sigmoid(2 * (math.log(config.sigma_data) - log_sigmas(config)))


def network_times(config: DiffusionConfig) -> Tensor:
    """Return what a network is told of every timestep: ln(sigma) on a line from 0 to T - 1, (T,), float64."""
    logs = log_sigmas(config)
    return (logs - logs[0]) / (logs[-1] - logs[0]).clamp(min=torch.finfo(torch.float64).tiny) * (config.timesteps - 1)


def to_scheduler(config: DiffusionConfig, steps: int) -> dict[str, Any]:
    """Return the options of a diffusers scheduler whose timesteps are the levels of `sampling_levels`."""
    kept = alphas_cumprod(config)[sampling_levels(config, steps)]  # (steps,)
    before = torch.cat([kept.new_ones(1), kept[:-1]])
    return {
        "num_train_timesteps": steps,
        "trained_betas": (1 - kept / before).tolist(),
        "prediction_type": config.prediction,
    }


def sampling_levels(config: DiffusionConfig, steps: int) -> Tensor:
    """Return the timesteps of the reverse process, (steps,), int64, rising, each once.

    They are the nearest to EDM's steps from the largest to the smallest sigma, which are even in sigma^(1 / 7).

    Args:
        config: The process.
        steps: 1..T.

    Reference: arXiv 2206.00364, Eq. 5.
    """
    logs = log_sigmas(config)
    first, last = ((logs[place] / RHO).exp() for place in (0, -1))
    wanted = RHO * torch.linspace(float(first), float(last), steps, dtype=torch.float64).log()  # (steps,)
    if steps == 1:
        return torch.tensor([config.timesteps - 1])
    above = torch.searchsorted(logs, wanted).clamp(1, config.timesteps - 1)
    levels = above - (wanted - logs[above - 1] < logs[above] - wanted).long()
    # Each once: where EDM's steps are closer than the levels, the next free one below, or at the bottom above.
    places = torch.arange(steps)
    levels = (levels - places).flip(0).cummin(0).values.flip(0) + places
    return torch.maximum(levels, places)
