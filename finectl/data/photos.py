"""`--data photos`: square RGB tiles of the real photographs in scikit-image's wheel, one class a photograph.

Each photograph is cut into 64x64 tiles that do not overlap, from its top left corner, row by row; what is left over at
the right and at the bottom is not used. The right half of the stereo pair is left out, because its tiles would be near
copies of the left half's across the two splits; the colour wheel and the logo are no photographs.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finectl.data.captions import captioned, of_classes
from finectl.data.sources import DataInfo, DataOptions, heldout_size, package_folder, read_packaged
from finectl.errors import InputError, UsageError

if TYPE_CHECKING:
    import PIL.Image

    from finectl.data.dataset import Store

TILE_SIZE = 64
IMAGE_SIZE = 32
RESIZE_FILTER = "lanczos"
INSTALL = "pip install --upgrade 'finectl[photos]'"


@dataclass(frozen=True)
class Photo:
    """A photograph: its class, its file in scikit-image's data folder, and its size in pixels."""

    name: str
    file: str
    width: int
    height: int

    @property
    def tiles(self) -> int:
        """Number of whole tiles."""
        return (self.width // TILE_SIZE) * (self.height // TILE_SIZE)


PHOTOS = (
    Photo("astronaut", "astronaut.png", 512, 512),
    Photo("cat", "chelsea.png", 451, 300),
    Photo("coffee", "coffee.png", 600, 400),
    Photo("galaxies", "hubble_deep_field.jpg", 1000, 872),
    Photo("motorcycle", "motorcycle_left.png", 741, 500),
    Photo("retina", "retina.jpg", 1411, 1411),
    Photo("rocket", "rocket.jpg", 640, 427),
    Photo("tissue", "ihc.png", 512, 512),
)
CAPTIONS = tuple(f"a photo of {photo.name}" for photo in PHOTOS)


def data_folder() -> Path:
    """Return scikit-image's data folder, without importing scikit-image."""
    return package_folder("skimage", "scikit-image", INSTALL) / "data"


def describe(argument: str, image_size: int | None, options: DataOptions) -> DataInfo:
    """Describe the tiles of the photographs.

    Raises:
        UsageError: an image size above the tiles' 64 pixels was asked for.
        InputError: scikit-image is not installed, or its version lacks one of the photographs.
    """
    size = IMAGE_SIZE if image_size is None else image_size
    if size > TILE_SIZE:
        raise UsageError(
            f"--data photos has tiles of {TILE_SIZE}x{TILE_SIZE} pixels, {size} was asked for",
            expected=f"an image size of at most {TILE_SIZE} pixels",
        )
    digest = hashlib.sha256()
    for photo in PHOTOS:
        content = read_packaged(data_folder() / photo.file, "scikit-image", INSTALL)
        digest.update(f"{photo.file} {hashlib.sha256(content).hexdigest()}\n".encode())
    count = sum(photo.tiles for photo in PHOTOS)
    info = DataInfo(
        name="photos",
        fingerprint=digest.hexdigest(),
        count=count,
        train_count=count - heldout_size(count),
        heldout_count=heldout_size(count),
        image_size=size,
        channels=3,
        num_classes=len(PHOTOS),
        class_names=tuple(photo.name for photo in PHOTOS),
        bundled=True,
        resize_filter=RESIZE_FILTER if size != TILE_SIZE else "none",
    )
    return captioned(info, of_classes(CAPTIONS), options)


def captions(argument: str, info: DataInfo, options: DataOptions, labels: Sequence[int]) -> list[str]:
    """Return the caption of every tile: it names its photograph."""
    return [CAPTIONS[label] for label in labels]


def labels(argument: str, info: DataInfo, options: DataOptions) -> list[int]:
    """Return the photograph of every tile."""
    return [label for label, photo in enumerate(PHOTOS) for _ in range(photo.tiles)]


def open_images(argument: str, info: DataInfo, options: DataOptions) -> Store:
    """Cut the tiles.

    Args:
        argument: Unused.
        info: What `describe` returned; its `image_size` is the size of the result.
        options: Unused: the filter is part of what this data set is.

    Returns:
        Tiles uint8 (3, H, W), each with its photograph's place in `PHOTOS` as label.

    Raises:
        InputError: a photograph cannot be read or is not of the size that was expected.
    """
    import numpy as np
    import torch

    from finectl.data.dataset import MemoryStore
    from finectl.data.pixels import to_levels

    tiles = [to_levels(tile) for photo in PHOTOS for tile in _tiles(photo, info.image_size)]
    found = torch.tensor(labels(argument, info, options), dtype=torch.int64)
    return MemoryStore(torch.from_numpy(np.stack(tiles)), found)


def _tiles(photo: Photo, size: int) -> list[PIL.Image.Image]:
    import PIL.Image

    from finectl.data.pixels import FILTERS

    path = data_folder() / photo.file
    try:
        with PIL.Image.open(io.BytesIO(read_packaged(path, "scikit-image", INSTALL))) as opened:
            image = opened.convert("RGB")
    except (OSError, SyntaxError) as error:
        raise InputError(
            f"{path} is not a readable image: {error}", fix="pip install --force-reinstall scikit-image"
        ) from error
    if image.size != (photo.width, photo.height):
        raise InputError(
            f"{path} has {image.width}x{image.height} pixels", expected=f"{photo.width}x{photo.height} pixels"
        )
    tiles = []
    for top in range(0, photo.height - TILE_SIZE + 1, TILE_SIZE):
        for left in range(0, photo.width - TILE_SIZE + 1, TILE_SIZE):
            tile = image.crop((left, top, left + TILE_SIZE, top + TILE_SIZE))
            tiles.append(tile if size == TILE_SIZE else tile.resize((size, size), FILTERS[RESIZE_FILTER]))
    return tiles
