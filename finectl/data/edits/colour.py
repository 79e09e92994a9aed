"""Colourings: what becomes of a pixel depends on that pixel alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]

RED, GREEN, BLUE = np.float32(0.299), np.float32(0.587), np.float32(0.114)  # shares of brightness, ITU-R BT.601
SEPIA = ((38, 20, 8), (255, 240, 200))
DUOTONE = ((44, 8, 84), (255, 236, 120))
NIGHT = ((2, 4, 24), (120, 160, 235))


def brightness(image: Image) -> NDArray[np.float32]:
    """Return the brightness (H, W), 0 to 255, of an image uint8 (H, W, 3)."""
    red, green, blue = np.moveaxis(image.astype(np.float32), 2, 0)
    grey: NDArray[np.float32] = red * RED + green * GREEN + blue * BLUE  # no matrix product: its last bits may differ
    return grey


def levels(values: NDArray[np.float32]) -> Image:
    """Return numbers as levels, rounded and cut at 0 and 255."""
    return np.rint(np.clip(values, 0, 255)).astype(np.uint8)


def _between(image: Image, dark: tuple[int, int, int], bright: tuple[int, int, int]) -> Image:
    """Colour by brightness, on the line between two colours."""
    share = brightness(image)[:, :, None] / np.float32(255)  # (H, W, 1)
    low, high = np.array(dark, np.float32), np.array(bright, np.float32)
    return levels(low + share * (high - low))


def plain(image: Image) -> Image:
    """Leave the colours as they are."""
    return image.copy()


def sepia(image: Image) -> Image:
    """Colour from dark brown to cream, by brightness."""
    return _between(image, *SEPIA)


def grey(image: Image) -> Image:
    """Keep the brightness alone."""
    return np.repeat(levels(brightness(image))[:, :, None], 3, axis=2)


def negative(image: Image) -> Image:
    """Invert every level."""
    return 255 - image


def warm(image: Image) -> Image:
    """Raise red and lower blue."""
    return levels(image.astype(np.float32) * np.array([1.15, 1.0, 0.6], np.float32) + np.array([28, 8, 0], np.float32))


def cool(image: Image) -> Image:
    """Raise blue and lower red."""
    return levels(image.astype(np.float32) * np.array([0.6, 0.95, 1.1], np.float32) + np.array([0, 10, 36], np.float32))


def swap(image: Image) -> Image:
    """Exchange the channels: red takes green's place, green blue's, blue red's."""
    return np.ascontiguousarray(image[:, :, [2, 0, 1]])


def duotone(image: Image) -> Image:
    """Colour from dark violet to pale yellow, by brightness."""
    return _between(image, *DUOTONE)


def solarise(image: Image) -> Image:
    """Invert the levels above the middle, and stretch what results over the whole range."""
    return levels(np.float32(2) * np.minimum(image, 255 - image))


def faded(image: Image) -> Image:
    """Take away half of the colour and of the contrast, and lift the blacks."""
    grey_level = brightness(image)[:, :, None]
    muted = grey_level + (image - grey_level) * np.float32(0.55)
    return levels(np.float32(105) + muted * np.float32(0.5))


def night_blue(image: Image) -> Image:
    """Colour from black to a pale blue, darker than the source."""
    dimmed = levels(np.float32(255) * (brightness(image)[:, :, None] / np.float32(255)) ** np.float32(1.4))
    return _between(np.repeat(dimmed, 3, axis=2), *NIGHT)
