"""Textures: what becomes of a pixel depends on those around it. Sizes follow the image's shorter side."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pictures
from PIL import ImageFilter

from finectl.data.edits.colour import Image, brightness, levels

UNIT_SIDE = 32  # the shorter side at which sizes are as they stand here
POSTER_LEVELS = 4
TILE = 4
DOT = 5
PAPER = np.array([250, 246, 235], np.float32)


def _scale(image: Image) -> float:
    return max(1.0, min(image.shape[:2]) / UNIT_SIDE)


def _filtered(image: Image, kind: ImageFilter.Filter) -> Image:
    return np.asarray(Pictures.fromarray(image).filter(kind))


def _slopes(image: Image) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the brightness's slopes downwards and to the right, (H, W) each, by Sobel's filter."""
    padded = np.pad(brightness(image), 1, mode="edge")
    height, width = image.shape[:2]

    def shifted(down: int, right: int) -> NDArray[np.float32]:
        return padded[1 + down : 1 + down + height, 1 + right : 1 + right + width]

    down = sum(weight * (shifted(1, x) - shifted(-1, x)) for x, weight in ((-1, 1), (0, 2), (1, 1)))
    right = sum(weight * (shifted(y, 1) - shifted(y, -1)) for y, weight in ((-1, 1), (0, 2), (1, 1)))
    return np.asarray(down, np.float32), np.asarray(right, np.float32)


def smooth(image: Image) -> Image:
    """Remove fine detail and keep edges: medians of small windows, twice."""
    window = ImageFilter.MedianFilter(3 if _scale(image) < 3 else 5)
    return _filtered(_filtered(image, window), window)


def poster(image: Image) -> Image:
    """Leave four levels a channel, 0 to 255."""
    step = np.float32(255 / (POSTER_LEVELS - 1))
    return levels(np.rint(_filtered(image, ImageFilter.MedianFilter(3)) / step) * step)


def emboss(image: Image) -> Image:
    """Show the relief that light from the upper left would give, tinted by the image's own colours."""
    soft = _filtered(image, ImageFilter.GaussianBlur(0.4 * _scale(image)))
    down, right = _slopes(soft)
    relief = np.float32(128) - (down + right) * np.float32(0.28)  # (H, W)
    chroma = (image - brightness(image)[:, :, None]) * np.float32(0.6)
    return levels(relief[:, :, None] + chroma)


def pencil(image: Image) -> Image:
    """Draw dark strokes on paper washed with colour: brightness divided by its surroundings (a colour dodge)."""
    grey = levels(brightness(image))
    around = np.asarray(Pictures.fromarray(grey).filter(ImageFilter.GaussianBlur(1.6 * _scale(image))), np.float32)
    drawn = np.clip((grey + np.float32(8)) / (around + np.float32(8)), 0, 1) ** np.float32(2.2)
    chroma = image - brightness(image)[:, :, None]
    return levels(drawn[:, :, None] * np.float32(240) + chroma * np.float32(0.6))


def edges(image: Image) -> Image:
    """Show bright outlines on black, in the image's own hues."""
    down, right = _slopes(_filtered(image, ImageFilter.GaussianBlur(0.35 * _scale(image))))
    strength = np.clip(np.hypot(down, right) * np.float32(0.9), 0, 255)
    hue = image.astype(np.float32) + 40
    hue /= hue.max(axis=2, keepdims=True)
    return levels(strength[:, :, None] * hue)


def blur(image: Image) -> Image:
    """Put the image out of focus."""
    return _filtered(image, ImageFilter.GaussianBlur(1.5 * _scale(image)))


def mosaic(image: Image) -> Image:
    """Give every square tile the mean of its pixels."""
    side = max(2, round(TILE * _scale(image)))
    height, width = image.shape[:2]
    rows, columns = -(-height // side), -(-width // side)
    padded = np.pad(image, ((0, rows * side - height), (0, columns * side - width), (0, 0)), mode="edge")
    tiles = padded.reshape(rows, side, columns, side, 3).astype(np.float32).mean(axis=(1, 3))
    return levels(tiles).repeat(side, axis=0).repeat(side, axis=1)[:height, :width]


def halftone(image: Image) -> Image:
    """Print dots of ink on paper, the larger the darker the image is there, in the image's colour."""
    pitch = DOT * _scale(image) ** 0.6
    height, width = image.shape[:2]
    soft = _filtered(image, ImageFilter.GaussianBlur(pitch / 3))
    dark = 1 - brightness(soft) / 255  # (H, W)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    angle = np.float32(np.pi / 4)
    u, v = (x * np.cos(angle) + y * np.sin(angle)) / pitch, (y * np.cos(angle) - x * np.sin(angle)) / pitch
    screen = (np.cos(2 * np.pi * u) + np.cos(2 * np.pi * v)) / 4 + np.float32(0.5)  # 1 at the middle of a dot
    ink = np.clip((dark - (1 - screen)) * np.float32(6) + np.float32(0.5), 0, 1)[:, :, None]
    return levels(PAPER * (1 - ink) + soft * np.float32(0.45) * ink)
