"""Where channel-wise projections sit in a network, and which of them a neighbouring convolution can take (no torch).

A projection maps the channels of a block's output at every position: F -> W F with W (C, C), the identity at the
start. In a UNet there is one behind every down block, the middle block and every up block; what a down block hands to
the skip connections is taken inside the block and not projected. In a Diffusion Transformer there is one behind every
block.

A convolution K with bias b takes a projection that follows it at once: W (K * x + b) = (W K) * x + W b. So an up block
that ends in its upsampler's convolution takes it there, and one that ends in a residual block with a convolution on
its shortcut takes it in both of the convolutions whose outputs that block adds. Nothing else can:

- A down block's output is the last skip connection as well, and that one is not projected.
- The middle block, and an up block that ends in attention, add their input unchanged: x + f(x). The middle block could
  take it if a shortcut convolution with the weight W were added to it, which has as many parameters, saves no work
  worth the name and makes a network that diffusers does not build.
- The blocks of a transformer add to a residual stream, which every next layer normalises over the channels; a
  normalisation does not commute with W.

Reference: arXiv 2410.06664, section 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finectl.errors import UsageError
from finectl.registry import nearest

NONE = "none"
BLOCKS = "blocks"
FOLDABLE = "foldable"
UNFOLDABLE = "unfoldable"
KINDS = {
    NONE: "no projections",
    BLOCKS: "one behind every block",
    FOLDABLE: "only where a neighbouring convolution takes them exactly",
}
"""What may be asked for. A fourth, `unfoldable`, is what is left of `blocks` after folding."""

SKIP = "the skip connection takes the block's output without the projection"
IDENTITY = "its last residual block adds its input unchanged"
ATTENTION = "it ends in attention, which adds its input unchanged"
RESIDUAL_UPSAMPLER = "its upsampler is a residual block that adds its input unchanged"
STREAM = "it is on the residual stream, and the next layer normalises over the channels"

# diffusers' defaults, for a configuration that leaves an option out
UP_BLOCKS = {
    "unet2d": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "unet2d-condition": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
OLD_PREFIX = "UNetRes"
"""What the names of block types began with before diffusers 0.1."""
CONVOLUTION_UPSAMPLERS = ("UpBlock2D", "CrossAttnUpBlock2D", "AttnUpBlock2D")
RESIDUAL_UPSAMPLERS = ("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D")
RESIDUAL_ENDS = ("UpBlock2D", "ResnetUpsampleBlock2D")
ATTENTION_ENDS = ("AttnUpBlock2D", "CrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D")


@dataclass(frozen=True)
class Place:
    """Where a projection sits.

    Args:
        where: The block whose output it maps, by its name in the network.
        channels: Of that output, C; the projection has C^2 parameters.
        positions: Of that output, for one image.
        convolutions: The modules that can take it, all of them together; empty where none can.
        reason: Why none can.
    """

    where: str
    channels: int
    positions: int
    convolutions: tuple[str, ...] = ()
    reason: str = ""

    @property
    def parameter(self) -> str:
        """Name of its weight in the model's state."""
        return f"projections.{self.where}.weight"


def count_projections(places: Sequence[Place]) -> int:
    """Return the parameters of projections."""
    return sum(place.channels**2 for place in places)


def chosen(kind: str, places: Sequence[Place]) -> tuple[Place, ...]:
    """Return those of all places of a network at which a kind of `projections` puts one.

    Raises:
        UsageError: there is no such kind, or it is `foldable` and nothing can be folded.
    """
    if kind not in (*KINDS, UNFOLDABLE):
        raise UsageError(
            f"there is no projection {kind!r}{nearest(kind, KINDS)}", expected=f"one of: {', '.join(KINDS)}"
        )
    if kind == NONE:
        return ()
    if not places:
        raise UsageError("projections go behind blocks, and the configuration names none")
    if kind == BLOCKS:
        return tuple(places)
    found = tuple(place for place in places if bool(place.convolutions) == (kind == FOLDABLE))
    if kind == FOLDABLE and not found:
        last = places[-1]
        raise UsageError(
            f"no projection of this architecture can be folded; that of {last.where}: {last.reason}",
            expected="a UNet with up blocks that end in a convolution",
            fix=f"take {BLOCKS!r}, which keeps the projections as layers, or {NONE!r}",
        )
    return found


def transformer_places(width: int, depth: int, tokens: int) -> tuple[Place, ...]:
    """Return the places of projections in a Diffusion Transformer, block by block."""
    return tuple(Place(f"blocks.{index}", width, tokens, reason=STREAM) for index in range(depth))


def unet_places(
    architecture: str, network: Mapping[str, Any], widths: Sequence[int], image_size: int
) -> tuple[Place, ...]:
    """Return the places of projections in a UNet of diffusers: down blocks, middle block, up blocks.

    Args:
        architecture: `unet2d` or `unet2d-condition`.
        network: The options of diffusers' class.
        widths: Channels of each resolution, the finest first.
        image_size: Side of the square input, in pixels (or latent pixels).
    """
    levels = len(widths)
    areas = [math.ceil(image_size / 2**level) ** 2 for level in range(levels)]
    places = [
        Place(f"down_blocks.{level}", width, areas[min(level + 1, levels - 1)], reason=SKIP)
        for level, width in enumerate(widths)
    ]
    if levels and network.get("mid_block_type", "") is not None:
        places.append(Place("mid_block", widths[-1], areas[-1], reason=IDENTITY))
    types = network.get("up_block_types", UP_BLOCKS[architecture])
    for index, (kind, width) in enumerate(zip(types, reversed(widths), strict=False)):
        last = index == levels - 1
        convolutions, reason = _taking(index, str(kind).removeprefix(OLD_PREFIX), network, last=last)
        area = areas[max(levels - 2 - index, 0)]
        places.append(Place(f"up_blocks.{index}", width, area, convolutions, reason))
    return tuple(places)


def _taking(index: int, kind: str, network: Mapping[str, Any], *, last: bool) -> tuple[tuple[str, ...], str]:
    """Return which convolutions of an up block can take a projection of its output, or why none can.

    Every up block but the last has an upsampler. The last residual block of an up block has more channels in than out,
    those of the skip connection, and so a convolution on its shortcut.
    """
    where = f"up_blocks.{index}"
    if not last:
        by_option = kind == "AttnUpBlock2D" and network.get("upsample_type", "conv") == "resnet"
        if kind in RESIDUAL_UPSAMPLERS or by_option:
            return (), RESIDUAL_UPSAMPLER
        if kind in CONVOLUTION_UPSAMPLERS:
            return (f"{where}.upsamplers.0.conv",), ""
    elif kind in RESIDUAL_ENDS:
        layers = network.get("layers_per_block", 2)
        # The list goes from the finest resolution on, and the last up block is of the finest; it has one layer more.
        resnet = f"{where}.resnets.{layers[0] if isinstance(layers, list | tuple) else layers}"
        return (f"{resnet}.conv2", f"{resnet}.conv_shortcut"), ""
    if kind in ATTENTION_ENDS:
        return (), ATTENTION
    return (), f"the block type {kind} is not known to end in a convolution"
