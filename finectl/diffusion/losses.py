"""The denoising losses: the squared error of what is predicted, and the bound that trains a learned variance."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from finectl.diffusion.schedule import NoiseSchedule, at_images

Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]
HALF_STEP = 1 / 255


@dataclass(frozen=True, eq=False)
class Noised:
    """Images of a batch, and what was drawn for them.

    Args:
        x0: (b, C, H, W), in [-1, 1].
        y: (b,), int64 labels.
        t: (b,), int64 timesteps.
        noise: (b, C, H, W), standard normal.
        slots: The images' place in the global batch; None where they are the whole batch.
    """

    x0: Tensor
    y: Tensor
    t: Tensor
    noise: Tensor
    slots: slice | None = None

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x0, y, t and noise, in the order of `denoising_loss`."""
        return self.x0, self.y, self.t, self.noise

    def at(self, schedule: NoiseSchedule) -> Tensor:
        """Return the noisy images, (b, C, H, W)."""
        return schedule.add_noise(self.x0, self.noise, self.t)


def denoising_loss(
    model: Denoiser,
    schedule: NoiseSchedule,
    x0: Tensor,
    y: Tensor,
    t: Tensor,
    noise: Tensor,
    *,
    bound: bool = True,
    weight: Tensor | None = None,
) -> Tensor:
    """Return each image's loss: the mean squared error of the prediction, and the bound of a learned variance.

    Args:
        model: (x_t, t, y) to (B, C, H, W), or (B, 2C, H, W) when it predicts the variance too.
        schedule: The forward process, and what the model predicts: the noise, v or the clean image.
        x0: (B, C, H, W), images in [-1, 1].
        y: (B,), int64 labels.
        t: (B,), int64 timesteps.
        noise: (B, C, H, W), standard normal.
        bound: Whether the bound counts; without it the loss is the squared error alone, whatever the model predicts.
        weight: (B,), of each image's squared error; 1 by default.

    Returns:
        (B,), float32.

    Reference: arXiv 2006.11239, Eq. 14; arXiv 2202.00512, section 4; arXiv 2102.09672, Eq. 16.
    """
    x_t = schedule.add_noise(x0, noise, t)
    return output_loss(model(x_t, t, y).float(), schedule, x0, x_t, t, noise, bound=bound, weight=weight)


def output_loss(
    output: Tensor,
    schedule: NoiseSchedule,
    x0: Tensor,
    x_t: Tensor,
    t: Tensor,
    noise: Tensor,
    *,
    bound: bool = True,
    weight: Tensor | None = None,
) -> Tensor:
    """Return what `denoising_loss` does, of an output that is there already.

    Args:
        output: (B, C, H, W) or (B, 2C, H, W), float32: what the model made of `x_t`.
        schedule: As in `denoising_loss`, and so all others.
        x_t: (B, C, H, W), the noisy images.
    """
    channels = x0.shape[1]
    predicted = output[:, :channels]
    loss = (predicted - schedule.target(x0, noise, t)).square().flatten(1).mean(1)  # (B,)
    if weight is not None:
        loss = weight * loss
    if bound and output.shape[1] == 2 * channels:
        # The bound trains the variance only: the noise prediction passes it without a gradient.
        predicted_noise = schedule.noise_of(predicted.detach(), x_t, t)
        loss = loss + variational_bound(schedule, x0, x_t, t, predicted_noise, output[:, channels:])
    return loss


def variational_bound(
    schedule: NoiseSchedule, x0: Tensor, x_t: Tensor, t: Tensor, predicted: Tensor, fraction: Tensor
) -> Tensor:
    """Return each image's term of the variational bound at its timestep, in bits a dimension.

    At t > 0 it is the divergence from the true posterior to the model's; at t = 0 the negative log-likelihood of the
    8-bit image under the model.

    Args:
        schedule: The forward process.
        x0: (B, C, H, W).
        x_t: (B, C, H, W).
        t: (B,), int64.
        predicted: (B, C, H, W), the predicted noise.
        fraction: (B, C, H, W), the variance output v in about [-1, 1]: the log variance lies a share (v + 1) / 2 of
            the way from the posterior's to that of beta.

    Returns:
        (B,), float32.

    Reference: Nichol and Dhariwal, arXiv 2102.09672, Eq. 15 and section 3.1.
    """
    kept = schedule.alphas_cumprod
    before = torch.cat([kept.new_ones(1), kept[:-1]])
    posterior = schedule.betas * (1 - before) / (1 - kept)
    posterior_log = torch.cat([posterior[1:2], posterior[1:]]).log()[t]  # the first is 0: the next one stands in
    share = (fraction + 1) / 2
    model_log = share * at_images(schedule.betas.log()[t], x0) + (1 - share) * at_images(posterior_log, x0)
    weight_x0 = at_images((before.sqrt() * schedule.betas / (1 - kept))[t], x0)
    weight_xt = at_images(((1 - schedule.betas).sqrt() * (1 - before) / (1 - kept))[t], x0)
    x0_predicted = (x_t - at_images((1 - kept).sqrt()[t], x0) * predicted) / at_images(kept.sqrt()[t], x0)
    model_mean = weight_x0 * x0_predicted + weight_xt * x_t
    true_mean = weight_x0 * x0 + weight_xt * x_t
    divergence = gaussian_divergence(true_mean, at_images(posterior_log, x0), model_mean, model_log)
    likelihood = -discretised_log_likelihood(x0, model_mean, model_log / 2)
    terms = torch.where((t == 0)[:, None, None, None], likelihood, divergence)
    return terms.flatten(1).mean(1) / math.log(2)


def gaussian_divergence(mean1: Tensor, log_var1: Tensor, mean2: Tensor, log_var2: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence of N(mean1, exp(log_var1)) from N(mean2, exp(log_var2)), elementwise."""
    squares = (mean1 - mean2).square() * torch.exp(-log_var2)
    return 0.5 * (log_var2 - log_var1 - 1 + torch.exp(log_var1 - log_var2) + squares)


def discretised_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Return the log probability of the 8-bit level at `x`, in [-1, 1], under a Gaussian; the ends take the tails.

    Reference: arXiv 2006.11239, Eq. 13.
    """
    scale = torch.exp(-log_std)
    upper = torch.special.ndtr((x - mean + HALF_STEP) * scale)
    lower = torch.special.ndtr((x - mean - HALF_STEP) * scale)
    inside = torch.where(x > 0.999, 1 - lower, torch.where(x < -0.999, upper, upper - lower))
    return inside.clamp(min=1e-12).log()
