"""Training towards the data and towards what a frozen teacher predicts, on the same noisy images."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from finectl.diffusion.losses import Denoiser, output_loss
from finectl.diffusion.schedule import NoiseSchedule
from finectl.errors import ComputationError


class Consistency:
    """The denoising loss, and the distance from the prediction of a frozen teacher, at every timestep that is drawn.

    A learned variance is not held to the teacher's: its bound trains it, and the method is about the prediction.

    Args:
        teacher: On the device of the training. It is put in evaluation mode and gets no gradients.
        weight: Of the distance, above 0.

    Reference: DeMe, arXiv 2410.06664, Eq. 5.
    """

    def __init__(self, teacher: nn.Module, weight: float = 1.0) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        self.weight = weight
        self._checksum = checksum(teacher)

    def __call__(
        self, model: Denoiser, schedule: NoiseSchedule, x0: Tensor, y: Tensor, t: Tensor, noise: Tensor, *, step: int
    ) -> Tensor:
        """Return each image's loss, (B,), float32, as `finectl.training.run.Loss` says."""
        x_t = schedule.add_noise(x0, noise, t)
        channels = x0.shape[1]
        with torch.no_grad():
            wanted = self.teacher(x_t, t, y)[:, :channels].float()  # (B, C, H, W)
        output = model(x_t, t, y).float()
        distance = (output[:, :channels] - wanted).square().flatten(1).mean(1)  # (B,)
        return output_loss(output, schedule, x0, x_t, t, noise) + self.weight * distance

    def require_unchanged(self) -> None:
        """Check that the teacher is what it was when training began.

        Raises:
            ComputationError: a weight or a buffer of it has changed.
        """
        found = checksum(self.teacher)
        if found != self._checksum:
            raise ComputationError(
                f"the frozen teacher changed during training: its checksum is {found[:16]}",
                expected=self._checksum[:16],
                fix="run again with --no-resume; if it comes again, it is a bug in finectl",
            )


def checksum(model: nn.Module) -> str:
    """Return the SHA-256 of a model's weights and buffers, by name, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, value in sorted([*model.named_parameters(), *model.named_buffers()]):
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)}:".encode())
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(content.numpy().data)
    return digest.hexdigest()
