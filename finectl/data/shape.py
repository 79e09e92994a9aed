"""`--data shape:4x32x32:1000`: what data will look like, for `--dry-run` before there is any (no torch import)."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING

from finectl.data.captions import captioned
from finectl.data.sources import DataInfo, DataOptions, heldout_size
from finectl.errors import InputError, UsageError

if TYPE_CHECKING:
    from finectl.data.dataset import Store

# As many images as ImageNet's training set: a plan reads the number only for what is held out.
COUNT = 1_281_167


def describe(argument: str, image_size: int | None, options: DataOptions) -> DataInfo:
    """Describe data of a shape.

    Args:
        argument: `CxSxS:CLASSES`, such as `4x32x32:1000` for ImageNet's latents at 256 pixels.
        image_size: S, if it is given at all.
        options: Without effect.

    Raises:
        UsageError: the shape cannot be read, or is not square.
    """
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+):(\d+)", argument)
    channels, height, width, classes = map(int, match.groups()) if match else (0, 0, 0, 0)
    if min(channels, height, classes) < 1 or height != width or image_size not in (None, height):
        raise UsageError(f"--data shape:{argument} is no shape of square images", expected="such as shape:4x32x32:1000")
    heldout = heldout_size(COUNT)
    info = DataInfo(
        name=f"shape:{argument}",
        fingerprint=hashlib.sha256(argument.encode()).hexdigest(),
        count=COUNT,
        train_count=COUNT - heldout,
        heldout_count=heldout,
        image_size=height,
        channels=channels,
        num_classes=classes,
        class_names=(),
        bundled=False,
    )
    return captioned(info, info.fingerprint, options)


def open_images(argument: str, info: DataInfo, options: DataOptions) -> Store:
    """Refuse to read data that are not there.

    Raises:
        InputError: always.
    """
    raise InputError(
        f"--data {info.name} says what data will look like, and there is none to train on",
        expected="images or latents of that shape",
        fix="--data latents:PATH, made by: finectl encode --data folder:IMAGES --image-size 256 --vae PATH",
    )
