"""The data sets that `--data` names: what they are, how many images, which size, and how they are split.

Everything here answers before torch, numpy or PIL is imported (an image folder may need PIL for the images' sizes): it
is what `--help`, `--dry-run` and an artifact's recipe ask. The images themselves are loaded by `finectl.data.dataset`.
"""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from finectl.errors import InputError, UsageError
from finectl.registry import Entry, Registry

DEFAULT_RESIZE_FILTER = "bicubic"
HELDOUT_PERCENT = 20

# Each module defines `describe(argument, image_size, resize_filter) -> DataInfo` and
# `load_images(argument, info, indices) -> (images float32 (N, C, H, W) in [-1, 1], labels int64 (N,))`.
SOURCES = Registry(
    "data set",
    {
        "digits": Entry("finectl.data.digits", "1,797 real 8x8 grey digits in 10 classes, from scikit-learn's wheel"),
        "photos": Entry("finectl.data.photos", "1,026 RGB tiles of 8 real photographs, from scikit-image's wheel"),
        "folder": Entry("finectl.data.folder", "folder:PATH, your own images, flat or one subfolder a class"),
    },
)


@dataclass(frozen=True)
class DataInfo:
    """What a data set is, known without loading it.

    Args:
        name: The specification as `--data` takes it: "digits", "photos" or "folder:PATH".
        fingerprint: sha256 (hex) of the files' contents; it decides the split.
        count: Images in the whole set.
        train_count: Images in the training split.
        heldout_count: Images in the held-out split.
        image_size: Height and width of the images as loaded, in pixels.
        channels: 1 (grey) or 3 (RGB).
        num_classes: Number of classes, 1 when there are no labels.
        class_names: One name a class, in the order of the labels.
        bundled: Whether the set comes with an installed package rather than from the user.
        resize_filter: Name of the filter that brought the images to `image_size`, "none" when they are as stored.
    """

    name: str
    fingerprint: str
    count: int
    train_count: int
    heldout_count: int
    image_size: int
    channels: int
    num_classes: int
    class_names: tuple[str, ...]
    bundled: bool
    resize_filter: str = "none"


def parse_spec(spec: str) -> tuple[str, str]:
    """Split a data specification into the source's name and its argument.

    Args:
        spec: "digits", "photos" or "folder:PATH".

    Returns:
        Name in `SOURCES`, and PATH (empty for a bundled set).

    Raises:
        UsageError: no such source, a path missing after `folder:`, or an argument where none is taken.
    """
    name, colon, argument = spec.partition(":")
    if name not in SOURCES and Path(spec).is_dir():
        raise UsageError(f"--data {spec} is a folder", expected="the prefix folder:", fix=f"--data folder:{spec}")
    SOURCES[name]  # raises with the nearest name
    if name == "folder" and not argument:
        raise UsageError(f"--data {spec} names no folder", expected="folder:PATH", fix="--data folder:./images")
    if name != "folder" and colon:
        raise UsageError(f"--data {name} takes nothing after its name, got {spec!r}", fix=f"--data {name}")
    return name, argument


def describe(spec: str, image_size: int | None = None, resize_filter: str = DEFAULT_RESIZE_FILTER) -> DataInfo:
    """Say what a data set is without loading its images.

    Args:
        spec: "digits", "photos" or "folder:PATH".
        image_size: Side of the loaded images in pixels; None for the set's own.
        resize_filter: PIL's name of the filter for an image folder: "bicubic", "lanczos", "bilinear", "box", "nearest".

    Returns:
        Counts, shape, classes and fingerprint.

    Raises:
        UsageError: the specification, the size or the filter is not possible.
        InputError: the package or the folder is missing, empty, or holds files that are not images.
    """
    name, argument = parse_spec(spec)
    if image_size is not None and image_size < 1:
        raise UsageError(f"image size {image_size} pixels", expected="at least 1 pixel")
    info: DataInfo = SOURCES.load(name).describe(argument, image_size, resize_filter)
    return info


def heldout_size(count: int) -> int:
    """Return how many of `count` images are held out: 20 %, rounded, and at least 1 where there are 2 or more."""
    rounded = (2 * HELDOUT_PERCENT * count + 100) // 200
    return max(rounded, 1) if count >= 2 else 0


def split_indices(fingerprint: str, count: int) -> tuple[list[int], list[int]]:
    """Split a data set into training and held-out images, by its fingerprint alone.

    The images are ranked by sha256 of fingerprint and index; the first 20 % of that ranking are held out.

    Args:
        fingerprint: The set's fingerprint, hexadecimal.
        count: Number of images.

    Returns:
        Indices of the training and of the held-out images, each in ascending order.
    """
    ranking = sorted(range(count), key=lambda index: hashlib.sha256(f"{fingerprint}:{index}".encode()).digest())
    heldout = heldout_size(count)
    return sorted(ranking[heldout:]), sorted(ranking[:heldout])


def package_folder(package: str, distribution: str, fix: str) -> Path:
    """Return the folder of an installed package without importing it.

    Args:
        package: Name of a top-level package.
        distribution: What pip calls it, for the message.
        fix: Command that installs it.

    Raises:
        InputError: the package is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            f"{distribution} is not installed; the bundled data set is part of its wheel",
            fix=fix,
        )
    return Path(spec.submodule_search_locations[0])


def read_packaged(path: Path, distribution: str, fix: str) -> bytes:
    """Return the bytes of a file in an installed package.

    Args:
        path: The file.
        distribution: What pip calls the package, for the message.
        fix: Command that installs a version which holds the file.

    Raises:
        InputError: the installed version lacks the file.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}); this version of {distribution} does not hold the data set",
            fix=fix,
        ) from error
