"""Diff-Tuning: new images are learned mostly at high noise, retained ones kept mostly at low noise.

Pre-trained knowledge is the easier to transfer the less noise there is: it is retained at low timesteps, on images of
the pre-trained model itself or by its predictions, and given up at high ones.

Reference: Diff-Tuning, arXiv 2406.00773.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from finectl.diffusion.losses import Denoiser, Noised, output_loss
from finectl.diffusion.schedule import NoiseSchedule
from finectl.training.chain import WEIGHTS, Chain
from finectl.training.consistency import checksum, require_checksum
from finectl.training.run import Timesteps

__all__ = ["Chain", "ChainLoss", "ChainTimesteps"]


class ChainTimesteps:
    """Timesteps of a batch whose first images are retained.

    With `sampling`, retained images draw t in proportion to xi(t) and new ones to psi(t); with `weights`, all draw
    uniformly.

    Args:
        chain: The coefficients.
        new: How new images draw t instead, such as within one range.

    Reference: arXiv 2406.00773; that the coefficients are probabilities is from its released code.
    """

    def __init__(self, chain: Chain, new: Timesteps | None = None) -> None:
        self.chain = chain
        self.new = new

    def __call__(self, count: int, schedule: NoiseSchedule, *, step: int, generator: torch.Generator) -> Tensor:
        """Return (count,) timesteps, int64, on the generator's device, as `finectl.training.run.Timesteps` says."""
        chain, total, device = self.chain, len(schedule), generator.device
        if chain.coefficients == WEIGHTS:
            return torch.randint(total, (count,), generator=generator, device=device)
        draws = torch.rand(count, generator=generator, device=device, dtype=torch.float64)
        kept = _inverse(chain.xi, total, draws[: chain.retained])
        if self.new is not None:
            return torch.cat([kept, self.new(chain.new, schedule, step=step, generator=generator)])
        return torch.cat([kept, _inverse(chain.psi, total, draws[chain.retained :])])


def _inverse(coefficient: Callable[[Tensor, int], Tensor], total: int, draws: Tensor) -> Tensor:
    """Return timesteps of probabilities that are proportional to a coefficient, from uniform draws in [0, 1)."""
    every = torch.arange(total, device=draws.device, dtype=torch.float64)
    up_to = coefficient(every, total).cumsum(0)  # (T,)
    return torch.searchsorted(up_to, draws * up_to[-1], right=True).clamp(max=total - 1)


class ChainLoss:
    """Each image's denoising loss, times what it counts.

    The factors make the batch's mean loss that of the new images plus lambda times that of the retained ones. With a
    teacher, retained images are held to its prediction of no class instead: over all output channels, with no bound
    of a learned variance.

    Args:
        chain: Shares and coefficients.
        teacher: The pre-trained model, on the device of the training. It is put in evaluation mode and gets no
            gradients.

    Reference: arXiv 2406.00773, the losses of retention and of adaptation.
    """

    def __init__(self, chain: Chain, teacher: nn.Module | None = None) -> None:
        self.chain = chain
        self.teacher = None if teacher is None else teacher.eval().requires_grad_(False)
        self._checksum = "" if teacher is None else checksum(teacher)

    def __call__(self, model: Denoiser, schedule: NoiseSchedule, batch: Noised, *, step: int) -> Tensor:
        """Return each image's loss, (B,), float32, as `finectl.training.run.Loss` says."""
        x0, y, t, noise = batch.tensors
        places = range(len(x0)) if batch.slots is None else range(self.chain.batch)[batch.slots]
        first = sum(place < self.chain.retained for place in places)  # retained images come before all others
        x_t = batch.at(schedule)
        output = model(x_t, t, y).float()
        if self.teacher is None or not first:
            losses = output_loss(output, schedule, x0, x_t, t, noise)
        else:
            kept = self._distance(self.teacher, output[:first], x_t[:first], t[:first])
            new = [part[first:] for part in (x0, x_t, t, noise)]
            losses = torch.cat([kept, output_loss(output[first:], schedule, *new)])
        return losses * self.factors(t, first, len(schedule))

    def factors(self, t: Tensor, first: int, timesteps: int) -> Tensor:
        """Return what each image's loss counts, (b,), float32.

        Args:
            t: (b,), int64 timesteps.
            first: How many of the images, from the first on, are retained.
            timesteps: T.
        """
        chain = self.chain
        factors = torch.ones(len(t), device=t.device)
        factors[:first] = chain.weight * chain.batch / max(chain.retained, 1)
        factors[first:] = chain.batch / chain.new
        if chain.coefficients == WEIGHTS:
            place = t.double()
            factors[:first] *= chain.xi(place[:first], timesteps).float()
            factors[first:] *= chain.psi(place[first:], timesteps).float()
        return factors

    def _distance(self, teacher: nn.Module, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the mean squared distance from the teacher's output, (b,)."""
        config: Any = teacher.config
        none = torch.full_like(t, config.num_classes)
        with torch.no_grad():
            wanted = teacher(x_t, t, none).float()  # (b, C or 2C, H, W)
        return (output - wanted).square().flatten(1).mean(1)

    def require_unchanged(self) -> None:
        """Check that the teacher, if any, is what it was when training began.

        Raises:
            ComputationError: a weight or a buffer of it has changed.
        """
        if self.teacher is not None:
            require_checksum(self.teacher, self._checksum)
