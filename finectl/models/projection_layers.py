"""The layers of channel-wise projections: bias-free maps of channels that start as the identity.

With the identity a float32 forward pass equals that of the network without projections, bit for bit, as long as the
device multiplies in float32: TF32 and bfloat16 round the activations on their way through any product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from torch import Tensor, nn

from finectl.models.projections import Place

PREFIX = "projections."


class TokenProjection(nn.Linear):
    """x -> W x for the channels of every token, with W = I until `load_state_dict`: (B, T, C) -> (B, T, C)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, bias=False)

    def reset_parameters(self) -> None:
        nn.init.eye_(self.weight)


class ImageProjection(nn.Conv2d):
    """x -> W x for the channels of every pixel, with W = I until `load_state_dict`: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, kernel_size=1, bias=False)

    def reset_parameters(self) -> None:
        nn.init.dirac_(self.weight)

    def after(self, block: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        """Map the output of a block, as its forward hook; of several outputs the first is the block's own."""
        if isinstance(output, tuple):
            return (self(output[0]), *output[1:])
        return self(output)


def build_projections(places: Sequence[Place], layer: Callable[[int], nn.Module]) -> nn.ModuleDict:
    """Return the projections as modules, each under the name of its block.

    Args:
        places: Where they sit.
        layer: Makes the layer for so many channels.
    """
    root = nn.ModuleDict()
    for place in places:
        *parents, name = place.where.split(".")
        table = root
        for parent in parents:
            if parent not in table:
                table[parent] = nn.ModuleDict()
            table = cast(nn.ModuleDict, table[parent])
        table[name] = layer(place.channels)
    return root


def attach(network: nn.Module, projections: nn.ModuleDict, places: Sequence[Place]) -> None:
    """Let projections map the outputs of a network's blocks."""
    for place in places:
        projection = cast(ImageProjection, projections.get_submodule(place.where))
        # A method and no closure: a copy of the model then holds the copies of its projections.
        network.get_submodule(place.where).register_forward_hook(projection.after)


def identity_like(weight: Tensor) -> Tensor:
    """Return the identity in the shape (C, C) or (C, C, 1, 1) of a projection's weight."""
    return nn.init.eye_(weight.new_empty(weight.shape[:2])).reshape(weight.shape)
