"""`--data digits`: the 1,797 handwritten 8x8 digits in scikit-learn's wheel.

Reference: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998
(the test part, as scikit-learn ships it: 64 pixels of 0..16 and a label a line).
"""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from finectl.data.captions import captioned, of_classes
from finectl.data.sources import DataInfo, DataOptions, heldout_size, package_folder, read_packaged
from finectl.errors import InputError, UsageError

if TYPE_CHECKING:
    from finectl.data.dataset import Store

COUNT = 1797
IMAGE_SIZE = 8
LARGEST_VALUE = 16
INSTALL = "pip install --upgrade scikit-learn"
CLASS_NAMES = tuple("0123456789")
CAPTIONS = tuple(f"a photo of the digit {name}" for name in CLASS_NAMES)


def data_file() -> Path:
    """Return the path of the digits in scikit-learn's folder, without importing scikit-learn."""
    return package_folder("sklearn", "scikit-learn", INSTALL) / "datasets" / "data" / "digits.csv.gz"


def describe(argument: str, image_size: int | None, options: DataOptions) -> DataInfo:
    """Describe the digits; they are never resized.

    Raises:
        UsageError: an image size other than 8 pixels was asked for.
        InputError: scikit-learn is not installed.
    """
    if image_size not in (None, IMAGE_SIZE):
        raise UsageError(
            f"--data digits has images of {IMAGE_SIZE}x{IMAGE_SIZE} pixels, {image_size} was asked for",
            expected=f"--image-size {IMAGE_SIZE}, or another data set",
        )
    heldout = heldout_size(COUNT)
    info = DataInfo(
        name="digits",
        fingerprint=hashlib.sha256(read_packaged(data_file(), "scikit-learn", INSTALL)).hexdigest(),
        count=COUNT,
        train_count=COUNT - heldout,
        heldout_count=heldout,
        image_size=IMAGE_SIZE,
        channels=1,
        num_classes=len(CLASS_NAMES),
        class_names=CLASS_NAMES,
        bundled=True,
    )
    return captioned(info, of_classes(CAPTIONS), options)


def captions(argument: str, info: DataInfo, options: DataOptions, labels: Sequence[int]) -> list[str]:
    """Return the caption of every image: it names its digit."""
    return [CAPTIONS[label] for label in labels]


def labels(argument: str, info: DataInfo, options: DataOptions) -> list[int]:
    """Return the digit of every image."""
    return [int(float(line.rpartition(",")[2])) for line in _lines()]


def _lines() -> list[str]:
    return gzip.decompress(read_packaged(data_file(), "scikit-learn", INSTALL)).decode().split()


def open_images(argument: str, info: DataInfo, options: DataOptions) -> Store:
    """Load the digits.

    Args:
        argument: Unused.
        info: What `describe` returned.
        options: Unused.

    Returns:
        1,797 images uint8 (1, 8, 8) of levels 0..16, labels 0..9.

    Raises:
        InputError: the file does not hold the 1,797 digits.
    """
    import torch

    from finectl.data.dataset import MemoryStore

    lines = _lines()
    rows = [[int(float(value)) for value in line.split(",")] for line in lines]
    width = IMAGE_SIZE**2 + 1
    if len(rows) != COUNT or any(len(row) != width for row in rows):
        raise InputError(
            f"{data_file()} holds {len(rows)} lines",
            expected=f"{COUNT} lines of {width} numbers, as scikit-learn ships",
        )
    table = torch.tensor(rows, dtype=torch.int64)
    images = table[:, :-1].to(torch.uint8).reshape(-1, 1, IMAGE_SIZE, IMAGE_SIZE)  # (1797, 1, 8, 8)
    return MemoryStore(images, table[:, -1].clone(), largest=LARGEST_VALUE)
