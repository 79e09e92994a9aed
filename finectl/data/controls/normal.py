"""`--control normal`: surface normals of the depth that a network measures, as colours (n + 1) / 2.

With z the inverse depth in [0, 1] stretched over as many pixels as the image has, the normal is that of the surface
(x, y, z): (-dz/dx, dz/dy, 1) over its length, x to the right, y up, z to the viewer. A flat image is (128, 128, 255).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from finectl.data.controls import ControlInfo, Extractor, Setting
from finectl.data.controls.depth import depth_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CHANNELS = 3
SETTINGS = {"relief": Setting(0.25, 0.001, 100.0, "range of the depth over the side of the image")}


def make(info: ControlInfo, device: str | torch.device) -> Extractor:
    """Return what measures normals.

    Raises:
        InputError: the network, or what runs it, is not there.
    """
    measure, relief = depth_of(info, device), info.settings["relief"]

    def normals(images: Tensor) -> Tensor:
        return normals_of(measure(images), relief)

    return normals


def normals_of(depth: Tensor, relief: float) -> Tensor:
    """Return the normals of depths (B, H, W) in [0, 1] as uint8 (B, 3, H, W)."""
    import torch

    height = depth.double() * relief * depth.shape[-1]  # in pixels
    down, right = torch.gradient(height, dim=(1, 2))
    normal = torch.stack([-right, down, torch.ones_like(height)], dim=1)  # y points up, rows go down
    normal = normal / normal.norm(dim=1, keepdim=True)
    return ((normal + 1) * 127.5).round().to(torch.uint8)
