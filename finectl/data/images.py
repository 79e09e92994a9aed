"""Pictures on disk: tensors in [-1, 1] as PNG files and grids."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

GRID_PADDING = 2
SMALLEST_SIDE = 32
ROW_SIDE = 48  # images of a row with a name are at least this large
ROW_PIXELS = 4096  # a row is not wider than this, unless four images are
LEAST_COLUMNS = 4
NAME_SIZE, NAME_PIXELS, NAME_MARGIN = 13, 300, 8
WHITE, GREY, BLACK = (255, 255, 255), (127, 127, 127), (0, 0, 0)


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


def make_rows(pictures: Sequence[Tensor], names: Sequence[str]) -> Image.Image:
    """Return one row of images a model, with its name at the left.

    Small images are enlarged by a whole factor, so that the images of all models are about as large. Rows that would
    be too wide show fewer images, the same ones for all.

    Args:
        pictures: For each model, images (N, C, H, W) as uint8 levels, grey or RGB, N at least 1.
        names: The models' names.
    """
    target = max(ROW_SIDE, *(max(levels.shape[-2:]) for levels in pictures))
    scales = [max(1, target // max(levels.shape[-2:])) for levels in pictures]
    cell_w, cell_h = (
        GRID_PADDING + max(levels.shape[axis] * scale for levels, scale in zip(pictures, scales, strict=True))
        for axis in (-1, -2)
    )
    columns = min(max(len(levels) for levels in pictures), max(LEAST_COLUMNS, ROW_PIXELS // cell_w))
    font = _font()
    labels = [_wrapped(name, font, (cell_h - GRID_PADDING) // (NAME_SIZE + 3)) for name in names]
    left = NAME_MARGIN * 2 + max(math.ceil(font.getlength(line)) for label in labels for line in label)
    grey = all(levels.shape[1] in (1, 2) for levels in pictures)
    canvas = Image.new("RGB", (left + columns * cell_w + GRID_PADDING, len(names) * cell_h + GRID_PADDING), GREY)
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((0, 0, left - 1, canvas.height), fill=WHITE)
    for row, (levels, scale, label) in enumerate(zip(pictures, scales, labels, strict=True)):
        top = row * cell_h + GRID_PADDING
        middle = (NAME_MARGIN, top + (cell_h - GRID_PADDING) // 2)
        draw.multiline_text(middle, "\n".join(label), fill=BLACK, font=font, anchor="lm", spacing=3)
        for column, image in enumerate(levels[:columns]):
            large = image.repeat_interleave(scale, -2).repeat_interleave(scale, -1)
            canvas.paste(to_picture(large), (left + column * cell_w + GRID_PADDING, top))
    return canvas.convert("L") if grey else canvas


def _font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Return Pillow's own font, in its one size where this Pillow has no other (before 10.1, or without FreeType)."""
    try:
        return ImageFont.load_default(NAME_SIZE)
    except (TypeError, ImportError, OSError):
        return ImageFont.load_default()


def _wrapped(name: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, lines: int) -> list[str]:
    """Return a name in at most `lines` lines that are not too wide, broken after hyphens; the rest is left out."""
    wrapped = [""]
    for word in re.findall(r"[^-\s]*[-\s]+|[^-\s]+", name):
        if wrapped[-1] and font.getlength(wrapped[-1] + word) > NAME_PIXELS:
            wrapped.append("")
        wrapped[-1] += word
    cut = [line if font.getlength(line) <= NAME_PIXELS else _cut(line, font) for line in wrapped]
    if len(cut) <= max(lines, 1):
        return cut
    return [*cut[: max(lines, 1) - 1], _cut(" ".join(cut[max(lines, 1) - 1 :]), font)]


def _cut(line: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    while line and font.getlength(f"{line}...") > NAME_PIXELS:
        line = line[:-1]
    return f"{line}..."
