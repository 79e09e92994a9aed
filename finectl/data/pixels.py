"""From image files to levels 0..255: 8 bits a channel, the central square, resizing by a named filter. No torch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

# PIL widens these filters when it shrinks an image, so that all but "nearest" are free of aliasing.
FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
    "nearest": Image.Resampling.NEAREST,
}
# A file's name does not say what it holds, and some formats start other programs when they are decoded.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
GREY_MODES = frozenset({"1", "L", "LA", "I;16", "I;16B", "I;16L", "I;16N", "I"})


def to_8_bits(image: Image.Image, channels: int, upright: bool = True) -> Image.Image:
    """Decode an image to 8-bit grey or RGB; transparency is dropped.

    Args:
        image: An opened image of any mode with 8 or 16 bits a channel.
        channels: 1 or 3.
        upright: Turn it as its EXIF orientation says.

    Raises:
        ValueError: the image has 32 bits a channel, whose range is not known.
    """
    # Some versions of PIL give 16-bit PNG and PPM as 32-bit integers; its own conversion clips 16-bit values at 255.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"32 bits a channel (mode {image.mode}); 8 or 16 are read")
    return (ImageOps.exif_transpose(image) if upright else image).convert("L" if channels == 1 else "RGB")


def square(image: Image.Image, size: int, resize_filter: str) -> Image.Image:
    """Cut the central square out of an image and resize it to `size` x `size` pixels."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    if image.size != (side, side):
        image = image.crop((left, top, left + side, top + side))
    return image if side == size else image.resize((size, size), FILTERS[resize_filter])


def to_levels(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Return an 8-bit grey or RGB image as uint8 (C, H, W) of levels 0..255."""
    pixels = np.asarray(image, dtype=np.uint8)  # (H, W) or (H, W, 3)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))
