"""`--data folder:PATH`: the user's own images, all in one folder or one subfolder a class."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from finectl.data.sources import DataInfo, heldout_size
from finectl.errors import InputError, UsageError

if TYPE_CHECKING:
    import torch

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
FLAT_CLASS = "all"
LISTED_FAULTS = 10
READ_BYTES = 1 << 20

Result = TypeVar("Result")


def describe(argument: str, image_size: int | None, resize_filter: str) -> DataInfo:
    """Describe a folder of images from its files' headers and contents.

    Args:
        argument: Path of the folder.
        image_size: Side in pixels to which the images' central squares are resized; None takes the images' own size,
            when they are square and all of one size.
        resize_filter: Name in `finectl.data.pixels.FILTERS`.

    Returns:
        One class for each subfolder that holds images, or the single class "all" when there are no subfolders. All
        images are RGB unless every one of them is grey.

    Raises:
        UsageError: the filter is unknown.
        InputError: the folder is missing, holds no images, mixes images with class folders, holds files that are not
            images, or images of several sizes without an `image_size`.
    """
    from finectl.data.pixels import FILTERS, GREY_MODES

    if resize_filter not in FILTERS:
        raise UsageError(f"unknown resize filter {resize_filter!r}", expected=f"one of: {', '.join(FILTERS)}")
    root = Path(argument)
    files = image_files(root)
    classes = class_names(files)
    headers = _each(root, files, _header)
    size = _common_size(root, files, headers) if image_size is None else image_size
    needs_resize = any(header[:2] != (size, size) for header in headers)
    heldout = heldout_size(len(files))
    return DataInfo(
        name=f"folder:{argument}",
        fingerprint=fingerprint(root, files),
        count=len(files),
        train_count=len(files) - heldout,
        heldout_count=heldout,
        image_size=size,
        channels=1 if all(mode in GREY_MODES for _, _, mode in headers) else 3,
        num_classes=len(classes),
        class_names=classes,
        bundled=False,
        resize_filter=resize_filter if needs_resize else "none",
    )


def load_images(argument: str, info: DataInfo, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Load images of a folder.

    Args:
        argument: Path of the folder.
        info: What `describe` returned.
        indices: Which images, counted in the order of their sorted paths, in the order wanted.

    Returns:
        Images float32 (N, C, H, W) in [-1, 1], labels int64 (N,).

    Raises:
        InputError: some of the files are corrupt; up to 10 of them are named.
    """
    import torch
    from PIL import Image

    from finectl.data.pixels import square, to_8_bits, to_tensor

    def decode(path: Path) -> torch.Tensor:
        with Image.open(path) as image:
            return to_tensor(square(to_8_bits(image, info.channels), info.image_size, info.resize_filter))

    root = Path(argument)
    all_files = image_files(root)
    if len(all_files) != info.count or class_names(all_files) != info.class_names:
        raise InputError(f"{root} has changed: it held {info.count} images a moment ago, now {len(all_files)}")
    files = [all_files[index] for index in indices]
    labels = {name: label for label, name in enumerate(info.class_names)}
    images = torch.stack(_each(root, files, decode))  # (N, C, H, W)
    return images, torch.tensor([labels[_class_of(file)] for file in files], dtype=torch.int64)


def image_files(root: Path) -> list[str]:
    """List the images under a folder, hidden ones left out.

    Args:
        root: The folder.

    Returns:
        Paths relative to `root` with forward slashes, sorted, whatever the order of the directory.

    Raises:
        InputError: the folder is missing, is no folder, or holds no images, or holds images beside class folders.
    """
    if not root.is_dir():
        state = "is not a folder" if root.exists() else "does not exist"
        raise InputError(f"{root} {state}", expected="a folder of images", fix="--data folder:PATH")
    files = sorted(_walk(root, "", ()))
    if not files:
        raise InputError(f"{root} holds no images", expected=f"files that end in {' '.join(SUFFIXES)}")
    loose = [file for file in files if "/" not in file]
    if loose and len(loose) < len(files):
        raise InputError(
            f"{root} holds {len(loose)} images beside {len(class_names(files)) - 1} class folders",
            expected="either images alone or one subfolder a class",
            fix=f"move {loose[0]} and its like into a subfolder",
        )
    return files


def class_names(files: Sequence[str]) -> tuple[str, ...]:
    """Return the sorted names of the class folders; ("all",) for images that lie in no subfolder."""
    return tuple(sorted({_class_of(file) for file in files}))


def fingerprint(root: Path, files: Sequence[str]) -> str:
    """Return the sha256 over (relative path, bytes, sha256 of the content) of every image, in sorted order.

    Raises:
        InputError: a file cannot be read.
    """

    def line(path: Path) -> bytes:
        status = path.stat()
        content = _content_digest(os.fspath(path), status.st_size, status.st_mtime_ns)
        return b"\0" + str(status.st_size).encode() + b"\0" + content.encode() + b"\n"

    digest = hashlib.sha256()
    for file, rest in zip(files, _each(root, files, line), strict=True):
        digest.update(os.fsencode(file) + rest)
    return digest.hexdigest()


@lru_cache(maxsize=1 << 20)
def _content_digest(path: str, size: int, mtime_ns: int) -> str:
    """Hash a file once a process: size and time of change are part of the key only."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _walk(folder: Path, prefix: str, above: tuple[str, ...]) -> Iterator[str]:
    real = os.path.realpath(folder)
    if real in above:  # a link that leads back up
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _walk(Path(entry.path), f"{prefix}{entry.name}/", (*above, real))
            elif entry.name.lower().endswith(SUFFIXES):
                yield prefix + entry.name


def _class_of(file: str) -> str:
    return file.split("/", 1)[0] if "/" in file else FLAT_CLASS


def _header(path: Path) -> tuple[int, int, str]:
    from PIL import Image

    with Image.open(path) as image:
        return image.width, image.height, image.mode


def _common_size(root: Path, files: Sequence[str], headers: Sequence[tuple[int, int, str]]) -> int:
    width, height, _ = headers[0]
    for file, (other_width, other_height, _) in zip(files, headers, strict=True):
        if (other_width, other_height) != (width, height):
            raise InputError(
                f"the images in {root} differ in size: {files[0]} has {width}x{height} pixels, "
                f"{file} has {other_width}x{other_height}",
                expected="a size to which the images' central squares are resized",
                fix="--image-size 32",
            )
    if width != height:
        raise InputError(
            f"the images in {root} are not square: {width}x{height} pixels",
            expected="a size to which the images' central squares are resized",
            fix="--image-size 32",
        )
    return width


def _each(root: Path, files: Sequence[str], work: Callable[[Path], Result]) -> list[Result]:
    """Apply `work` to every file and report all files that fail, not only the first."""
    from PIL import Image

    results, faults = [], []
    for file in files:
        try:
            results.append(work(root / file))
        # PIL raises each of these for damaged files, depending on the format and on where the damage is.
        except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
            faults.append(f"{file} ({error})")
    if faults:
        more = f" and {len(faults) - LISTED_FAULTS} more" if len(faults) > LISTED_FAULTS else ""
        raise InputError(
            f"{len(faults)} of {len(files)} images in {root} cannot be read: {', '.join(faults[:LISTED_FAULTS])}{more}",
            fix="remove these files or put whole ones in their place",
        )
    return results
