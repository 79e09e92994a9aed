"""Images that a user names one by one or by folders, as controls or to measure controls on. No torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from finectl.artifacts.cache import remembered_sha256
from finectl.artifacts.files import sha256_json
from finectl.data.folder import image_files
from finectl.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


def image_files_of(paths: Sequence[str]) -> list[Path]:
    """Return the files that paths name: themselves, and of a folder all images in the order of their names.

    Raises:
        InputError: one is not there, or a folder holds no images.
    """
    files: list[Path] = []
    for text in paths:
        path = Path(text)
        if not path.exists():
            raise InputError(f"there is no image {text}", expected="an image, or a folder of images")
        files += [path / name for name in image_files(path)] if path.is_dir() else [path]
    return files


def digest_of_files(files: Sequence[Path]) -> str:
    """Return sha256 (hex) over the contents of files, in order."""
    return sha256_json([remembered_sha256(file) for file in files])


def read_square(file: Path, size: int, channels: int) -> npt.NDArray[np.uint8]:
    """Return the central square of an image at a size, uint8 (channels, size, size).

    Raises:
        InputError: it cannot be read.
    """
    import PIL.Image

    from finectl.data.pixels import FORMATS, square, to_8_bits, to_levels

    try:
        with PIL.Image.open(os.fspath(file), formats=FORMATS) as image:
            return to_levels(square(to_8_bits(image, channels), size, "bicubic"))
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise InputError(f"{file} is not a readable image: {error}", expected=", ".join(FORMATS)) from error
