"""`--control depth`: relative inverse depth by a network, each image's from 0 (farthest) to 255 (nearest)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from finectl.data.controls import CONTROLS, ControlInfo, Extractor, Setting

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CHANNELS = 1
SETTINGS: dict[str, Setting] = {}
KINDS = ("AutoModelForDepthEstimation",)


def make(info: ControlInfo, device: str | torch.device) -> Extractor:
    """Return what measures depth.

    Raises:
        InputError: the network, or what runs it, is not there.
    """
    measure = depth_of(info, device)

    def depth(images: Tensor) -> Tensor:
        import torch

        return (measure(images) * 255).round().to(torch.uint8)[:, None]

    return depth


def depth_of(info: ControlInfo, device: str | torch.device) -> Callable[[Tensor], Tensor]:
    """Return what measures depth: uint8 (B, C, H, W) -> float32 (B, H, W) in [0, 1] on the CPU, near is 1.

    An image without depth is 0 everywhere.

    Raises:
        InputError: the network, or what runs it, is not there.
    """
    from finectl.data.controls.network import load_network

    processor, network = load_network(info.model or {}, KINDS, CONTROLS[info.name].example, device)

    def measure(images: Tensor) -> Tensor:
        import torch
        from torch.nn import functional

        colour = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
        inputs = processor(images=list(colour), return_tensors="pt", input_data_format="channels_first").to(device)
        with torch.no_grad():
            found = network(**inputs).predicted_depth.float()  # (B, h, w)
        found = functional.interpolate(found[:, None], images.shape[-2:], mode="bicubic", align_corners=False)[:, 0]
        low, high = found.amin((1, 2), keepdim=True), found.amax((1, 2), keepdim=True)
        return ((found - low) / (high - low).clamp(min=1e-12)).clamp(0, 1).cpu()

    return measure
