"""Training towards the data and towards what a teacher predicts, on the same noisy images."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from finectl.diffusion.losses import Denoiser, Noised, output_loss
from finectl.diffusion.schedule import NoiseSchedule
from finectl.errors import ComputationError, InputError
from finectl.training.distributed import whole
from finectl.training.run import StatefulLoss
from finectl.training.step import Ema


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

    def __call__(self, model: Denoiser, schedule: NoiseSchedule, batch: Noised, *, step: int) -> Tensor:
        """Return each image's loss, (B,), float32, as `finectl.training.run.Loss` says."""
        x0, y, t, noise = batch.tensors
        x_t, channels = batch.at(schedule), x0.shape[1]
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
        require_checksum(self.teacher, self._checksum)


class RefreshedConsistency(Consistency, StatefulLoss):
    """The same with a teacher that becomes, at the start of each epoch after the first, the student's moving average.

    The average is taken without channel projections, which the teacher has none of. The released code of the method
    does so by mistake, in the process that leads; here all processes do. It is for replication: the paper's teacher is
    frozen, and the student is then held to a past of itself that drifts, with its projections left out.

    Args:
        teacher: As for `Consistency`; the weights of the first epoch.
        weight: Of the distance, above 0.
        epoch: Updates of an epoch, at least 1.
    """

    def __init__(self, teacher: nn.Module, weight: float, epoch: int) -> None:
        super().__init__(teacher, weight)
        self.epoch = epoch

    def begin(self, step: int, ema: Ema) -> None:
        """Take the average over at the first step of an epoch."""
        if step and step % self.epoch == 0:
            self.load_state_dict(whole(ema.state_dict()))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the teacher's weights."""
        return {name: parameter.detach() for name, parameter in self.teacher.named_parameters()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put weights in the teacher; what else there is, such as projections, is left out.

        Raises:
            InputError: one is missing, or has another shape.
        """
        for name, parameter in self.teacher.named_parameters():
            if name not in state or state[name].shape != parameter.shape:
                raise InputError(
                    f"the saved state has no teacher's {name!r} of shape {tuple(parameter.shape)}",
                    fix="drop it: run the same command with --no-resume",
                )
            parameter.data.copy_(state[name])
        self._checksum = checksum(self.teacher)


def checksum(model: nn.Module) -> str:
    """Return the SHA-256 of a model's weights and buffers, by name, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, value in sorted([*model.named_parameters(), *model.named_buffers()]):
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)}:".encode())
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(content.numpy().data)
    return digest.hexdigest()


def require_checksum(teacher: nn.Module, expected: str) -> None:
    """Check that a frozen teacher is what it was when training began.

    Args:
        teacher: The teacher.
        expected: What `checksum` said then.

    Raises:
        ComputationError: a weight or a buffer of it has changed.
    """
    found = checksum(teacher)
    if found != expected:
        raise ComputationError(
            f"the frozen teacher changed during training: its checksum is {found[:16]}",
            expected=expected[:16],
            fix="run again with --no-resume; if it comes again, it is a bug in finectl",
        )
