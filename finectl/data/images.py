"""Pictures on disk: tensors in [-1, 1] as PNG files and grids."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

GRID_PADDING = 2
SMALLEST_SIDE = 32


def to_uint8(images: Tensor) -> Tensor:
    """Return images (N, C, H, W) in [-1, 1] as uint8 levels 0..255 of the same shape."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_picture(levels: Tensor) -> Image.Image:
    """Return one image (C, H, W) of uint8 levels as a grey or RGB picture; of more channels the first three."""
    if levels.shape[0] in (1, 2):
        return Image.fromarray(levels[0].cpu().numpy())
    return Image.fromarray(levels[:3].permute(1, 2, 0).contiguous().cpu().numpy())


def save_pngs(directory: Path, levels: Tensor, first: int) -> None:
    """Write images (N, C, H, W) of uint8 levels as `<number>.png`, numbered from `first`."""
    directory.mkdir(exist_ok=True)
    for index, image in enumerate(levels):
        to_picture(image).save(directory / f"{first + index:06d}.png")


def make_grid(levels: Tensor, columns: int | None = None) -> Image.Image:
    """Return images (N, C, H, W) of uint8 levels side by side, enlarged by a whole factor where they are small.

    Args:
        levels: The images, N at least 1.
        columns: Images a row; about a square by default.
    """
    count, channels, height, width = levels.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    scale = max(1, SMALLEST_SIDE // height)
    large = levels.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    cell_h, cell_w = height * scale + GRID_PADDING, width * scale + GRID_PADDING
    canvas = torch.full((channels, rows * cell_h + GRID_PADDING, columns * cell_w + GRID_PADDING), 127).to(torch.uint8)
    for index, image in enumerate(large):
        top = (index // columns) * cell_h + GRID_PADDING
        left = (index % columns) * cell_w + GRID_PADDING
        canvas[:, top : top + height * scale, left : left + width * scale] = image
    return to_picture(canvas)
