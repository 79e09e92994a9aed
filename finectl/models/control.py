"""diffusers' ControlNet on a frozen UNet of text, behind the interface of finectl's own networks.

The branch is a copy of the UNet's first half that sees the control, too; what it computes is added to the UNet's skip
connections through convolutions that start at zero, so that the start is the UNet itself, bit for bit.

Reference: Zhang et al., arXiv 2302.05543.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from finectl.artifacts.files import read_json_object, write_json
from finectl.artifacts.store import Artifact
from finectl.artifacts.tensors import load_tensors, save_tensors
from finectl.errors import InputError
from finectl.models.control_config import CLASS, FILES, embedding_widths
from finectl.models.io import CONFIG, checkpoint_file, misfits
from finectl.models.operations import Call, count_operations
from finectl.models.unet import TextUNet

PREFIX = "branch."


class Conditions(Protocol):
    """A table of pairs of a text and a control; a row of it stands in the place of a class.

    The last row is the empty text with the empty control, black all over.
    """

    def __len__(self) -> int: ...
    @property
    def length(self) -> int: ...
    def texts(self, rows: Tensor) -> Tensor:
        """Return the texts of rows (B,), int64 on any device: (B, S, E), floating-point on the same device."""

    def controls(self, rows: Tensor) -> Tensor:
        """Return the controls of rows (B,): (B, 3, H, W), float32 in [0, 1], on the same device."""


class Controlled(nn.Module):
    """A frozen UNet of text and its ControlNet as one model of (x, t, row of a table).

    The UNet is no submodule: parameters, state and average are those of the branch alone. It follows to any device.

    Args:
        backbone: The UNet, which is frozen and put in evaluation mode.
        branch: diffusers' `ControlNetModel`.
        conditions: What the rows stand for.

    Attributes:
        scale: What the branch counts.
    """

    def __init__(self, backbone: TextUNet, branch: nn.Module, conditions: Conditions) -> None:
        super().__init__()
        self._held = (backbone.eval().requires_grad_(False),)  # a tuple: PyTorch does not look into it
        self.branch: Any = branch
        self.conditions = conditions
        self.scale = 1.0
        # Texts are left out by another row, which keeps the control, not by the row of nothing.
        self.config = backbone.config.with_texts(len(conditions) - 1, conditions.length, 0.0)

    @property
    def backbone(self) -> TextUNet:
        """The frozen UNet."""
        return self._held[0]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        self.backbone._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def enable_gradient_checkpointing(self) -> None:
        """Keep only the inputs of the blocks for the backward pass, and compute the rest again there."""
        self.backbone.unet.enable_gradient_checkpointing()
        self.branch.enable_gradient_checkpointing()

    def update_operations(self) -> int | None:
        """Return the floating-point operations of an update of the branch on one image; see `training.flops`."""
        device = next(self.parameters()).device
        row, side = torch.zeros(1, dtype=torch.int64, device=device), self.config.image_size
        shapes = [self.conditions.texts(row).shape, self.conditions.controls(row).shape]

        def make() -> Call:
            x = torch.zeros(1, self.config.channels, side, side, device=device)
            texts, controls = (torch.zeros(shape, device=device) for shape in shapes)
            return self.predict, (x, torch.zeros_like(row), texts, controls), list(self.parameters())

        return count_operations(make)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict the noise (or another target) in a batch of noisy images.

        Args:
            x: (B, C, H, W), float.
            t: (B,), timesteps in 0..T-1.
            y: (B,), int64 rows of the table of conditions.

        Returns:
            (B, out_channels, H, W).
        """
        return self.predict(x, t, self.conditions.texts(y).to(x.dtype), self.conditions.controls(y).to(x.dtype))

    def predict(self, x: Tensor, t: Tensor, texts: Tensor, controls: Tensor) -> Tensor:
        """Do what `forward` does, for texts (B, S, E) and controls (B, 3, H, W)."""
        skips, middle = self.branch(
            x,
            t,
            encoder_hidden_states=texts,
            controlnet_cond=controls,
            conditioning_scale=self.scale,
            return_dict=False,
        )
        predicted = self.backbone.unet(
            x,
            t,
            encoder_hidden_states=texts,
            down_block_additional_residuals=tuple(skips),
            mid_block_additional_residual=middle,
        )
        return cast(Tensor, predicted.sample)


class Uncontrolled(nn.Module):
    """The frozen UNet of a controlled one under the same rows, whose controls it does not see.

    Args:
        model: The controlled one.
    """

    def __init__(self, model: Controlled) -> None:
        super().__init__()
        self.unet, self.conditions, self.config = model.backbone.unet, model.conditions, model.config

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """See `Controlled.forward`."""
        texts = self.conditions.texts(y).to(x.dtype)
        return cast(Tensor, self.unet(x, t, encoder_hidden_states=texts).sample)


def new_branch(backbone: TextUNet, scale: int, seed: int) -> nn.Module:
    """Return the ControlNet that training starts from: the UNet's weights, and convolutions of zeros.

    Args:
        backbone: The UNet.
        scale: Pixels of a control along a side of one position of the UNet's input: 8 for Stable Diffusion.
        seed: Of the weights that read the control, the only random ones.

    Raises:
        InputError: diffusers has no ControlNet for such a UNet.
    """
    from diffusers import ControlNetModel

    widths = embedding_widths(scale)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made: nn.Module = ControlNetModel.from_unet(backbone.unet, conditioning_embedding_out_channels=widths)
    except (TypeError, ValueError, NotImplementedError, AttributeError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"diffusers makes no ControlNet for this UNet: {reason}", expected="blocks as Stable Diffusion's UNet has"
        ) from error
    return made.float()


def branch_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a ControlNet by diffusers' names, of those of a `Controlled`."""
    return {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}


def save_branch(directory: Path, branch: nn.Module, raw: Mapping[str, Tensor], ema: Mapping[str, Tensor]) -> None:
    """Write a ControlNet as diffusers does, averaged weights and, in `raw/`, the raw ones.

    Args:
        directory: Where the files go.
        branch: diffusers' module, for its configuration.
        raw: Its weights by diffusers' names.
        ema: Their moving average.
    """
    import diffusers

    config: Any = branch.config
    values = {"_class_name": CLASS, "_diffusers_version": diffusers.__version__}
    values |= {name: value for name, value in config.items() if not name.startswith("_")}
    for weights, state in (("ema", ema), ("raw", raw)):
        path = directory / FILES[weights]
        path.parent.mkdir(exist_ok=True)
        write_json(path.parent / CONFIG, values)
        save_tensors(path, {name: value.float() for name, value in state.items()})


def rename_kept(directory: Path) -> None:
    """Give the averages that training kept of earlier updates diffusers' names, too; done twice it changes nothing."""
    for path in sorted((directory / checkpoint_file(0)).parent.glob("*.safetensors")):
        state = load_tensors(path)
        if any(name.startswith(PREFIX) for name in state):
            save_tensors(path, branch_state(state))


def load_branch(artifact: Artifact, weights: str = "ema") -> nn.Module:
    """Return the ControlNet of an artifact, diffusers' module in evaluation mode.

    Raises:
        InputError: the files are damaged, or do not go together.
    """
    from diffusers import ControlNetModel

    values = read_json_object(artifact.file(CONFIG))
    with torch.random.fork_rng(devices=[]):
        branch = ControlNetModel.from_config(values)
    state = load_tensors(artifact.file(FILES[weights]))
    problems = misfits(branch, state)
    if problems:
        raise InputError(
            f"the weights of {artifact.path} do not fit its {CONFIG}: {problems[0]}",
            fix=f"make it again with --force: {' '.join(artifact.manifest.command)}",
        )
    branch.load_state_dict(state)
    return cast(nn.Module, branch.eval())
