"""The images that an editor starts from, and how they are split: by picture, never within one."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from finectl.data.pairs import Source
from finectl.data.photos import INSTALL, PHOTOS, data_folder
from finectl.data.sources import DEFAULT_OPTIONS, SOURCES, DataInfo, describe, parse_spec, read_packaged
from finectl.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import PIL.Image
    from numpy.typing import NDArray
    from torch import Tensor

PHOTO_SPLITS = {"cat": "test", "rocket": "val"}  # the others train
SHORT_SIDES = (4, 7, 10)  # of a photograph that is cut, in crops
LEAST_RANGE = 40  # levels of brightness; a flatter crop shows nothing that an edit could change
DEFAULT_SIZE = 32
DEFAULT_CROPS = 1000  # as many images as the paper has
HELD_PERCENT = 10  # each of val and test
LEAST_IMAGES = 3


def describe_sources(spec: str, image_size: int | None) -> DataInfo:
    """Describe what `--data` names, without torch.

    Raises:
        UsageError: there is no such data set.
        InputError: its images are missing, or they are latents or too few.
    """
    if spec == "photos":
        return describe(spec)
    info = describe(spec, image_size)
    if info.vae is not None or info.channels not in (1, 3):
        raise InputError(f"--data {spec} has no pictures", expected="photos or folder:PATH")
    if info.count < LEAST_IMAGES:
        raise InputError(
            f"--data {spec} has {info.count} images", expected=f"at least {LEAST_IMAGES}, one for each split"
        )
    return info


def read_sources(spec: str, info: DataInfo, image_size: int, limit: int | None) -> tuple[tuple[Source, ...], Tensor]:
    """Return the source images of all splits.

    Args:
        spec: What `--data` names.
        info: What `describe_sources` returned.
        image_size: Height and width that are wanted.
        limit: How many of them, at most, over all splits.

    Returns:
        What they are called, and the images, uint8 (N, 3, H, W).
    """
    import numpy as np
    import torch

    if spec == "photos":
        found = [crop for photo in PHOTOS for crop in _crops(photo.name, photo.file, image_size)]
        chosen = thinned([source for source, _ in found], limit)
        stacked = np.stack([found[row][1] for row in chosen])
        return tuple(found[row][0] for row in chosen), torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous()
    name, argument = parse_spec(spec)
    store = SOURCES.load(name).open_images(argument, info, DEFAULT_OPTIONS)
    splits = split_of([f"{row}" for row in range(info.count)], info.fingerprint)
    sources = [Source(f"{row:06d}", f"{row:06d}", split) for row, split in enumerate(splits)]
    chosen = thinned(sources, limit)
    images = store.read(torch.tensor(chosen, dtype=torch.int64))
    return tuple(sources[row] for row in chosen), images.expand(-1, 3, -1, -1).contiguous()


def most_images(spec: str, info: DataInfo, image_size: int, limit: int | None) -> int:
    """Return how many source images there are at most, without reading them: flat crops are not known yet."""
    count = info.count
    if spec == "photos":
        count = 0
        for photo in PHOTOS:
            shorter = min(photo.width, photo.height)
            for side in _sides(shorter, image_size):
                width, height = (max(side, round(length * side / shorter)) for length in (photo.width, photo.height))
                count += (width // image_size) * (height // image_size)
    return count if limit is None else min(limit, count)


def split_of(names: Sequence[str], salt: str) -> list[str]:
    """Return the split of every picture: 80 % train, 10 % val, 10 % test, by a hash of its name.

    Raises:
        InputError: there are fewer than three.
    """
    if len(names) < LEAST_IMAGES:
        raise InputError(
            f"there are {len(names)} source images", expected=f"at least {LEAST_IMAGES}, one for each split"
        )
    order = sorted(range(len(names)), key=lambda row: hashlib.sha256(f"{salt}:{names[row]}".encode()).digest())
    held = max(1, len(names) * HELD_PERCENT // 100)
    splits = ["train"] * len(names)
    for place, row in enumerate(order[: 2 * held]):
        splits[row] = "test" if place < held else "val"
    return splits


def thinned(sources: Sequence[Source], limit: int | None) -> list[int]:
    """Return at most `limit` of the images, evenly spread and of every split in the proportion of the whole."""
    if limit is None or limit >= len(sources):
        return list(range(len(sources)))
    kept: list[int] = []
    for split in ("val", "test", "train"):
        rows = [row for row, source in enumerate(sources) if source.split == split]
        share = max(1, len(rows) * limit // len(sources)) if split != "train" else limit - len(kept)
        count = min(share, len(rows))
        kept += [rows[place * len(rows) // count] for place in range(count)]
    return sorted(kept)


def _crops(name: str, file: str, size: int) -> list[tuple[Source, NDArray[np.uint8]]]:
    """Cut a photograph, brought to several sizes, into crops that do not overlap; flat ones are left out."""
    import numpy as np
    import PIL.Image

    from finectl.data.edits.colour import brightness

    path = data_folder() / file
    try:
        with PIL.Image.open(io.BytesIO(read_packaged(path, "scikit-image", INSTALL))) as opened:
            photo = opened.convert("RGB")
    except (OSError, SyntaxError) as error:
        raise InputError(
            f"{path} is not a readable image: {error}", fix="pip install --force-reinstall scikit-image"
        ) from error
    found = []
    for side in _sides(min(photo.size), size):
        scaled = np.asarray(_scaled(photo, side))
        for top in range(0, scaled.shape[0] - size + 1, size):
            for left in range(0, scaled.shape[1] - size + 1, size):
                crop = scaled[top : top + size, left : left + size]
                if np.ptp(brightness(crop)) >= LEAST_RANGE:
                    source = Source(f"{name}-{side}-{top}-{left}", name, PHOTO_SPLITS.get(name, "train"))
                    found.append((source, crop))
    return found


def _sides(shorter: int, size: int) -> list[int]:
    """Return the shorter sides to which a photograph is brought, none above its own unless a crop needs that."""
    return sorted({min(crops * size, max(shorter, size)) for crops in SHORT_SIDES})


def _scaled(photo: PIL.Image.Image, side: int) -> PIL.Image.Image:
    """Bring a photograph's shorter side to so many pixels."""
    from finectl.data.pixels import FILTERS

    shorter = min(photo.size)
    width, height = (max(side, round(length * side / shorter)) for length in photo.size)
    return photo.resize((width, height), FILTERS["lanczos"])
