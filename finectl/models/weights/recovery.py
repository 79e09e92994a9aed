"""From one prediction back to clean weights.

With w_t = alpha w + sigma noise, the paper's Eq. 3 prints w_t / alpha - sigma noise, which misses the division of the
noise: it is wrong by sigma (1 / alpha - 1) noise, 2.5 at timestep 500 of the linear schedule and 157 at the last one.

Reference: arXiv 2407.11966, Eq. 3, put right; Salimans and Ho, arXiv 2202.00512, appendix D.
"""

from __future__ import annotations

from torch import Tensor

from finectl.diffusion.schedule import NoiseSchedule


def clean_of(schedule: NoiseSchedule, predicted: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """Return the clean weights that a prediction stands for.

    Args:
        schedule: The forward process, and what is predicted: noise, v or the clean weights.
        predicted: (M, ...), what the network returned.
        x_t: (M, ...), what it was given.
        t: (M,), int64 timesteps.

    Returns:
        (M, ...): (w_t - sigma noise) / alpha, alpha w_t - sigma v, or the prediction itself.
    """
    if schedule.prediction == "sample":
        return predicted
    kept = schedule.alphas_cumprod[t].reshape(-1, *[1] * (x_t.ndim - 1))
    signal, noise = kept.sqrt().to(x_t.dtype), (1 - kept).sqrt().to(x_t.dtype)
    if schedule.prediction == "epsilon":
        return (x_t - noise * predicted) / signal
    return signal * x_t - noise * predicted


def noise_of(schedule: NoiseSchedule, clean: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """Return the noise that clean weights leave of noisy ones, (M, ...), for deterministic sampling in several steps.

    Reference: Song et al., arXiv 2010.02502, Eq. 12.
    """
    kept = schedule.alphas_cumprod[t].reshape(-1, *[1] * (x_t.ndim - 1))
    return (x_t - kept.sqrt().to(x_t.dtype) * clean) / (1 - kept).sqrt().to(x_t.dtype)
