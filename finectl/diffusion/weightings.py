"""Weights of the denoising loss over timesteps, for models that predict the noise, v or the clean image.

Each is defined by its weight w_x of the clean image's error. The same loss as an error of the noise has w_x / SNR, as
one of v it has w_x / (SNR + 1), with SNR = alpha_bar / (1 - alpha_bar). The table holds the last one, which is finite
at every alpha_bar; the other two follow by a division.

Reference: Salimans and Ho, arXiv 2202.00512, section 4 (SNR + 1, truncated SNR); Hang et al., arXiv 2303.09556
(Min-SNR); Choi et al., arXiv 2204.00227 (P2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from finectl.diffusion.losses import Denoiser, Noised, denoising_loss
from finectl.diffusion.schedule import NoiseSchedule

UNIFORM = "uniform"
MIN_SNR_GAMMA = 5.0
"""Largest SNR of Min-SNR, its paper's choice; P2 has k = 1 and gamma = 1, its paper's too."""
SMALLEST = 1e-12
"""Of alpha_bar and 1 - alpha_bar, where they are divided by: schedules that end without signal have a zero there."""

# Weight of the error of v, from alpha_bar and 1 - alpha_bar: w_x (1 - alpha_bar).
WEIGHTINGS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "snr": lambda signal, noise: signal,  # w_x = SNR: every timestep's noise counts alike
    "snr+1": lambda signal, noise: torch.ones_like(signal),  # w_x = SNR + 1: every timestep's v does
    "trunc-snr": torch.maximum,  # w_x = max(SNR, 1)
    "min-snr": lambda signal, noise: torch.minimum(signal, MIN_SNR_GAMMA * noise),  # w_x = min(SNR, gamma)
    "p2": torch.mul,  # w_x = SNR / (k + SNR)^gamma
}
"""Name -> weight; `uniform`, which is no entry, weighs every timestep alike in the error of whatever is predicted."""


def weights(name: str, schedule: NoiseSchedule, normalise: bool = False) -> Tensor:
    """Return the weight of every timestep in the squared error of what the model predicts.

    Args:
        name: `uniform` or a key of `WEIGHTINGS`.
        schedule: The forward process, and what the model predicts.
        normalise: Whether the weights are divided by their mean over 0..T-1.

    Returns:
        (T,), float64, finite, on the schedule's device.

    Reference: see the module.
    """
    signal = schedule.alphas_cumprod.clamp(SMALLEST, 1 - SMALLEST)  # (T,)
    noise = 1 - signal
    if name == UNIFORM:
        return torch.ones_like(signal)
    found = WEIGHTINGS[name](signal, noise)
    if schedule.prediction == "epsilon":
        found = found / signal
    elif schedule.prediction == "sample":
        found = found / noise
    return found / found.mean() if normalise else found


class WeightedLoss:
    """The denoising loss with weights over timesteps; the bound of a learned variance keeps its own.

    Args:
        name: As in `weights`.
        schedule: The forward process that the loss will be called with.
        normalise: As in `weights`.
    """

    def __init__(self, name: str, schedule: NoiseSchedule, normalise: bool = False) -> None:
        self.weights = weights(name, schedule, normalise)

    def __call__(self, model: Denoiser, schedule: NoiseSchedule, batch: Noised, *, step: int) -> Tensor:
        """Return each image's loss, (B,), float32, as `finectl.training.run.Loss` says."""
        weight = self.weights.to(batch.t.device)[batch.t].float()
        return denoising_loss(model, schedule, *batch.tensors, weight=weight)
